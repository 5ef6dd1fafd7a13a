// Tensors and operators of torch, by its stable C API; torch_operators.cpp and torch_module.cpp write their kernels with these.
//
// The library is built and linked without torch: `load` looks the functions up in torch's own library. Their sources are
// torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable of torch 2.10 and newer.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "c_api.h"

namespace fused_mha::torch_shim {

struct OpaqueTensor;
using Handle = OpaqueTensor*;
// An argument or result: an integer, the bits of a double, an owned handle, or a pointer to what is optional.
using Value = uint64_t;
// Takes its arguments from the stack and leaves its results there.
using Kernel = void (*)(Value* stack, uint64_t arguments, uint64_t results);

// Finds torch's functions in what dlopen gave; the name of the first that is missing, or null.
const char* load(void* torch_library);
// Registers kernels with the CPU, by the names of operators in the namespace fused_mha.
struct NamedKernel {
    const char* name;
    Kernel kernel;
};
bool register_cpu_kernels(const NamedKernel* kernels, size_t count);
int64_t thread_count();

// Raises RuntimeError in Python.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Of a tensor; `count` may be more than there is room for.
struct Sizes {
    static constexpr int64_t MOST = 4;
    int64_t count = 0, at[MOST] = {};
    Sizes() = default;
    Sizes(std::initializer_list<int64_t> sizes) {
        for (const int64_t size : sizes) at[count++] = size;
    }
};

// Owns a reference to a tensor of torch, or to none.
class Tensor {
public:
    Tensor() = default;
    explicit Tensor(Handle handle) : handle(handle) {}
    Tensor(Tensor&& other) noexcept : handle(other.release()) {}
    Tensor& operator=(Tensor&& other) noexcept;
    ~Tensor();
    // Contiguous and uninitialised.
    static Tensor empty(const Sizes& sizes, int64_t dtype);
    // In the place of a result that nobody wants.
    static Tensor nothing(int64_t dtype) { return empty({0}, dtype); }

    explicit operator bool() const { return handle != nullptr; }
    Handle release();
    Sizes sizes() const;
    // As the C ABI takes it; absent for none. Fails beyond four dimensions and off the CPU.
    fused_mha_tensor fields() const;
    // The same values, the last dimension contiguous; a copy only where it must be.
    Tensor last_contiguous() &&;
    // A copy unless it is contiguous.
    Tensor contiguous() &&;

private:
    Handle handle = nullptr;
};

// The arguments of a kernel, in their order.
class Arguments {
public:
    explicit Arguments(const Value* stack) : next(stack) {}
    Tensor tensor() { return Tensor(reinterpret_cast<Handle>(*next++)); }
    Tensor optional_tensor();
    int64_t integer() { return int64_t(*next++); }
    std::optional<int64_t> optional_integer();
    std::vector<int64_t> optional_integers();  // empty where there are none
    Sizes sizes();
    bool boolean() { return (*next++ & 0xff) != 0; }
    double number();
    std::optional<double> optional_number();

private:
    const Value* next;
    template <class T>
    std::optional<T> optional();
};

// Leaves results on the stack.
template <class... Tensors>
void give(Value* stack, Tensors&&... results) {
    (void(*stack++ = reinterpret_cast<Value>(results.release())), ...);
}

}  // namespace fused_mha::torch_shim
