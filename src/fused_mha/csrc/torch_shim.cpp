#include "torch_shim.h"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace fused_mha::torch_shim {

namespace {

struct OpaqueLibrary;
using Library = OpaqueLibrary*;
struct OpaqueList;
using List = OpaqueList*;

// name, result, parameters. Results of type int32_t are 0 on success, but for the codes of dtypes and devices.
#define FUSED_MHA_TORCH_FUNCTIONS(X)                                                                                  \
    X(aoti_torch_delete_tensor_object, int32_t, (Handle))                                                             \
    X(aoti_torch_get_data_ptr, int32_t, (Handle, void**))                                                             \
    X(aoti_torch_get_dim, int32_t, (Handle, int64_t*))                                                                \
    X(aoti_torch_get_sizes, int32_t, (Handle, int64_t**))                                                             \
    X(aoti_torch_get_strides, int32_t, (Handle, int64_t**))                                                           \
    X(aoti_torch_get_storage_offset, int32_t, (Handle, int64_t*))                                                     \
    X(aoti_torch_get_storage_size, int32_t, (Handle, int64_t*))                                                       \
    X(aoti_torch_get_dtype, int32_t, (Handle, int32_t*))                                                              \
    X(aoti_torch_get_device_type, int32_t, (Handle, int32_t*))                                                        \
    X(aoti_torch_empty_strided, int32_t,                                                                              \
      (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*))                                  \
    X(aoti_torch_call_dispatcher, int32_t, (const char*, const char*, Value*))                                        \
    X(aoti_torch_memory_format_contiguous_format, int32_t, ())                                                        \
    X(aoti_torch_library_init_impl, int32_t, (const char*, const char*, const char*, uint32_t, Library*))             \
    X(aoti_torch_library_impl, int32_t, (Library, const char*, Kernel))                                               \
    X(torch_list_size, int32_t, (List, size_t*))                                                                       \
    X(torch_list_get_item, int32_t, (List, size_t, Value*))                                                            \
    X(torch_delete_list, int32_t, (List))                                                                              \
    X(torch_get_num_threads, int32_t, (uint32_t*))                                                                    \
    X(aoti_torch_device_type_cpu, int32_t, ())                                                                        \
    X(aoti_torch_dtype_float32, int32_t, ())                                                                          \
    X(aoti_torch_dtype_float64, int32_t, ())                                                                          \
    X(aoti_torch_dtype_bfloat16, int32_t, ())                                                                         \
    X(aoti_torch_dtype_float16, int32_t, ())                                                                          \
    X(aoti_torch_dtype_bool, int32_t, ())                                                                             \
    X(aoti_torch_dtype_int64, int32_t, ())                                                                            \
    X(aoti_torch_dtype_uint8, int32_t, ())

struct Torch {
#define FUSED_MHA_MEMBER(name, result, parameters) result(*name) parameters;
    FUSED_MHA_TORCH_FUNCTIONS(FUSED_MHA_MEMBER)
#undef FUSED_MHA_MEMBER
    int32_t cpu, dtypes[7];  // torch's codes, in the order of `enum fused_mha_dtype`
    const char* (*exception_text)();  // of its last exception; null before torch 2.13
} torch;

constexpr char TOO_MANY_DIMENSIONS[] = "tensors of more than four dimensions are not supported";

void check(int32_t status, const char* what) {
    if (status == 0) return;
    fail("torch could not %s%s%s", what, torch.exception_text ? ": " : "", torch.exception_text ? torch.exception_text() : "");
}

}  // namespace

void fail(const char* format, ...) {
    char text[600];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    throw std::runtime_error(text);
}

const char* load(void* torch_library) {
    Torch found;
#define FUSED_MHA_LOOK_UP(name, result, parameters)                                  \
    found.name = reinterpret_cast<result(*) parameters>(dlsym(torch_library, #name)); \
    if (!found.name) return #name;
    FUSED_MHA_TORCH_FUNCTIONS(FUSED_MHA_LOOK_UP)
#undef FUSED_MHA_LOOK_UP
    found.exception_text =
        reinterpret_cast<const char* (*)()>(dlsym(torch_library, "torch_exception_get_what_without_backtrace"));
    found.cpu = found.aoti_torch_device_type_cpu();
    int32_t (*const codes[])() = {found.aoti_torch_dtype_float32,  found.aoti_torch_dtype_float64,
                                  found.aoti_torch_dtype_bfloat16, found.aoti_torch_dtype_float16,
                                  found.aoti_torch_dtype_bool,     found.aoti_torch_dtype_int64,
                                  found.aoti_torch_dtype_uint8};
    for (int i = 0; i < 7; ++i) found.dtypes[i] = codes[i]();
    torch = found;
    return nullptr;
}

bool register_cpu_kernels(const NamedKernel* kernels, size_t count) {
    Library library;  // lives as long as the process, as the kernels do
    if (torch.aoti_torch_library_init_impl("fused_mha", "CPU", __FILE__, __LINE__, &library) != 0) return false;
    for (size_t i = 0; i < count; ++i)
        if (torch.aoti_torch_library_impl(library, kernels[i].name, kernels[i].kernel) != 0) return false;
    return true;
}

int64_t thread_count() {
    uint32_t count = 1;
    check(torch.torch_get_num_threads(&count), "tell its number of threads");
    return count;
}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
    std::swap(handle, other.handle);
    return *this;
}

Tensor::~Tensor() {
    if (handle) torch.aoti_torch_delete_tensor_object(handle);
}

Handle Tensor::release() {
    Handle released = handle;
    handle = nullptr;
    return released;
}

Tensor Tensor::empty(const Sizes& sizes, int64_t dtype) {
    if (sizes.count > Sizes::MOST) fail(TOO_MANY_DIMENSIONS);
    if (dtype < 0) fail("tensors must be float32, float64, bfloat16 or float16");
    int64_t strides[Sizes::MOST];
    for (int64_t d = sizes.count, stride = 1; d-- > 0; stride *= sizes.at[d] > 1 ? sizes.at[d] : 1) strides[d] = stride;
    Handle handle = nullptr;
    check(torch.aoti_torch_empty_strided(sizes.count, sizes.at, strides, torch.dtypes[dtype], torch.cpu, 0, &handle),
          "allocate a tensor");
    return Tensor(handle);
}

Sizes Tensor::sizes() const {
    Sizes sizes;
    int64_t* all = nullptr;
    check(torch.aoti_torch_get_dim(handle, &sizes.count), "count a tensor's dimensions");
    check(torch.aoti_torch_get_sizes(handle, &all), "tell a tensor's sizes");
    for (int64_t d = 0; d < sizes.count && d < Sizes::MOST; ++d) sizes.at[d] = all[d];
    return sizes;
}

fused_mha_tensor Tensor::fields() const {
    fused_mha_tensor t = {};
    if (!handle) return t;
    const Sizes sizes = this->sizes();
    int64_t *strides = nullptr, offset = 0, bytes = 0;
    int32_t dtype = 0, device = 0;
    check(torch.aoti_torch_get_device_type(handle, &device), "tell a tensor's device");
    if (device != torch.cpu) fail("all tensors must be on the CPU");
    if (sizes.count > Sizes::MOST) fail(TOO_MANY_DIMENSIONS);
    check(torch.aoti_torch_get_strides(handle, &strides), "tell a tensor's strides");
    check(torch.aoti_torch_get_data_ptr(handle, &t.data), "tell where a tensor lies");
    check(torch.aoti_torch_get_storage_offset(handle, &offset), "tell where a tensor lies");
    check(torch.aoti_torch_get_storage_size(handle, &bytes), "tell a storage's size");
    check(torch.aoti_torch_get_dtype(handle, &dtype), "tell a tensor's dtype");
    t.dtype = -1;
    for (int i = 0; i < 7; ++i)
        if (torch.dtypes[i] == dtype) {
            t.dtype = i;
            t.bytes = bytes - offset * fused_mha_item_size(i);
        }
    int64_t elements = 1;
    for (int64_t d = 0; d < sizes.count; ++d) elements *= sizes.at[d];
    if (!t.data && elements > 0) fail("a tensor of %lld elements has no memory", (long long)elements);
    for (int64_t d = 0; d < 4; ++d) {
        t.size[d] = d < sizes.count ? sizes.at[d] : 1;
        t.stride[d] = d < sizes.count ? strides[d] : 0;
    }
    return t;
}

Tensor Tensor::last_contiguous() && {
    int64_t count = 0, *sizes = nullptr, *strides = nullptr;
    if (handle) {
        check(torch.aoti_torch_get_dim(handle, &count), "count a tensor's dimensions");
        check(torch.aoti_torch_get_sizes(handle, &sizes), "tell a tensor's sizes");
        check(torch.aoti_torch_get_strides(handle, &strides), "tell a tensor's strides");
    }
    const bool fits = count == 0 || strides[count - 1] == 1 || sizes[count - 1] == 1;
    return fits ? std::move(*this) : std::move(*this).contiguous();
}

Tensor Tensor::contiguous() && {
    if (!handle) return {};
    Value stack[] = {reinterpret_cast<Value>(release()), Value(torch.aoti_torch_memory_format_contiguous_format())};
    check(torch.aoti_torch_call_dispatcher("aten::contiguous", "", stack), "copy a tensor");
    return Tensor(reinterpret_cast<Handle>(stack[0]));
}

Tensor Arguments::optional_tensor() {
    Value* const value = reinterpret_cast<Value*>(*next++);
    if (!value) return {};
    const Handle handle = reinterpret_cast<Handle>(*value);
    delete value;
    return Tensor(handle);
}

std::optional<int64_t> Arguments::optional_integer() { return optional<int64_t>(); }
std::optional<double> Arguments::optional_number() { return optional<double>(); }

template <class T>
std::optional<T> Arguments::optional() {
    Value* const value = reinterpret_cast<Value*>(*next++);
    if (!value) return std::nullopt;
    T found;
    memcpy(&found, value, sizeof found);
    delete value;
    return found;
}

namespace {

std::vector<int64_t> taken(List list) {
    size_t count = 0;
    check(torch.torch_list_size(list, &count), "count a list");
    std::vector<int64_t> found(count);
    for (size_t i = 0; i < count; ++i)
        if (Value item; torch.torch_list_get_item(list, i, &item) == 0) found[i] = int64_t(item);
    torch.torch_delete_list(list);
    return found;
}

}  // namespace

std::vector<int64_t> Arguments::optional_integers() {
    const std::optional<List> list = optional<List>();
    return list ? taken(*list) : std::vector<int64_t>();
}

Sizes Arguments::sizes() {
    const std::vector<int64_t> found = taken(reinterpret_cast<List>(*next++));
    Sizes sizes;
    sizes.count = int64_t(found.size());
    for (size_t d = 0; d < found.size() && d < size_t(Sizes::MOST); ++d) sizes.at[d] = found[d];
    return sizes;
}

double Arguments::number() {
    double x;
    memcpy(&x, next++, sizeof x);
    return x;
}

}  // namespace fused_mha::torch_shim
