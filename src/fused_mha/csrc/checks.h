// What is wrong with the arguments of a call: every tensor is checked against the call before a kernel sees its pointer.
// c_api.cpp calls these, and torch_operators.cpp `refuse`.
#pragma once

#include <cstdarg>

#include "c_api.h"

namespace fused_mha {

// The text of the last error of this thread, and what sets it.
const char* last_error();
void set_error(const char* format, va_list arguments);
// Sets it, and gives what a function of the C ABI returns then.
int64_t refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));

const char* dtype_name(int64_t dtype);
// The dtype of sums over elements of a dtype.
int64_t accumulator_dtype(int64_t dtype);

// Checks tensors one by one and keeps the first failure.
class Checker {
public:
    bool ok = true;

    // The tensor is there, of this dtype and size (a size of -1 allows any), its last of `dims` dimensions contiguous,
    // and all of it lies within its storage.
    void check(const char* name, const fused_mha_tensor& t, int64_t dtype, int dims, const int64_t (&size)[4]) {
        check_sizes(name, t, dtype, size);
        if (ok) check_memory(name, t, dims);
    }

    void check_sizes(const char* name, const fused_mha_tensor& t, int64_t dtype, const int64_t (&size)[4]) {
        if (!ok) return;
        if (t.dtype != dtype) return fail_with("%s must be of dtype %s; got %s", name, dtype_name(dtype), dtype_name(t.dtype));
        for (int d = 0; d < 4; ++d)
            if (t.size[d] < 0 || (size[d] >= 0 && t.size[d] != size[d]))
                return fail_with("%s must have size %lld in dimension %d; got %lld", name, (long long)size[d], d,
                                 (long long)t.size[d]);
    }

    // As if there were memory for it, where only the sizes of a tensor are given.
    void check_elements(const char* name, const fused_mha_tensor& t) {
        int64_t elements = 1;
        for (const int64_t size : t.size)
            if (__builtin_mul_overflow(elements, size, &elements) || elements > MOST_ELEMENTS) {
                if (ok) fail_with("%s has sizes that overflow", name);
                return;
            }
    }

    void check_floating(const char* name, const fused_mha_tensor& t) {
        if (ok && (t.dtype < 0 || t.dtype > FUSED_MHA_FLOAT16))
            fail_with("%s must be float32, float64, bfloat16 or float16; got %s", name, dtype_name(t.dtype));
    }

    void check_mask(const char* name, const fused_mha_tensor& t, int dims, const int64_t (&size)[4], int broadcast_dims) {
        if (!ok || !t.data) return;
        if (t.dtype < 0 || t.dtype > FUSED_MHA_BOOL)
            return fail_with("%s must be bool or floating; got %s", name, dtype_name(t.dtype));
        int64_t expected[4];
        for (int d = 0; d < 4; ++d) expected[d] = d < broadcast_dims && t.size[d] == 1 ? 1 : size[d];
        check(name, t, t.dtype, dims, expected);
    }

    __attribute__((format(printf, 2, 3))) void fail_with(const char* format, ...) {
        ok = false;
        va_list arguments;
        va_start(arguments, format);
        set_error(format, arguments);
        va_end(arguments);
    }

private:
    // Far beyond any memory, and far enough from 2^63 for the size of a workspace.
    static constexpr int64_t MOST_ELEMENTS = int64_t(1) << 46;

    void check_memory(const char* name, const fused_mha_tensor& t, int dims) {
        int64_t last = 0, elements = 1, bytes = 0;
        bool fits = true;
        for (int d = 0; d < 4; ++d) {
            int64_t extent = 0;
            fits = fits && t.stride[d] >= 0 && !__builtin_mul_overflow(elements, t.size[d], &elements) &&
                   !__builtin_mul_overflow(t.size[d] - 1, t.stride[d], &extent) &&
                   !__builtin_add_overflow(last, extent, &last);
        }
        if (fits && elements == 0) return;
        fits = fits && elements <= MOST_ELEMENTS && !__builtin_mul_overflow(last + 1, fused_mha_item_size(t.dtype), &bytes);
        if (!fits) return fail_with("%s has sizes or strides that overflow or are negative", name);
        if (!t.data) return fail_with("%s is missing", name);
        if (bytes > t.bytes)
            return fail_with("%s reaches byte %lld of a storage of %lld", name, (long long)bytes, (long long)t.bytes);
        if (dims > 0 && t.size[dims - 1] > 1 && t.stride[dims - 1] != 1)
            return fail_with("%s must be contiguous in its last dimension; got stride %lld", name,
                             (long long)t.stride[dims - 1]);
    }
};

void check_threads(Checker& checker, int64_t threads);
void check_seed(Checker& checker, const fused_mha_tensor& seed);
void check_forward(Checker& checker, const fused_mha_forward_arguments& call);
void check_backward(Checker& checker, const fused_mha_backward_arguments& call);
void check_product(Checker& checker, const fused_mha_product_arguments& call);
void check_module(Checker& checker, const fused_mha_module_arguments& call);
// Replaces what is absent by what it stands for.
void complete(Checker& checker, fused_mha_module_arguments& call);

void check_heads(Checker& checker, const fused_mha_heads_arguments& call);

}  // namespace fused_mha
