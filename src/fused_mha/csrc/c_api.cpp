// The entry points of the library: every tensor is checked against the call before a kernel sees its pointer.
#include "c_api.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "cpu_features.h"
#include "huge_pages.h"
#include "kernel_table.h"
#include "parallel.h"

namespace {

using fused_mha::current_kernels;

thread_local char last_error[512] = "";

int64_t fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
int64_t fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return -1;
}

constexpr int64_t ITEM_SIZES[] = {4, 8, 2, 2, 1, 8, 1};
constexpr const char* DTYPES[] = {"float32", "float64", "bfloat16", "float16", "bool", "int64", "uint8"};

// Checks tensors one by one and keeps the first failure.
class Checker {
public:
    bool ok = true;

    // The tensor is there, of this dtype and size (a size of -1 allows any), its last of `dims` dimensions contiguous,
    // and all of it lies within its storage.
    void check(const char* name, const fused_mha_tensor& t, int64_t dtype, int dims, const int64_t (&size)[4]) {
        if (!ok) return;
        if (t.dtype != dtype) return fail_with("%s must be of dtype %s; got %s", name, DTYPES[dtype], dtype_name(t));
        for (int d = 0; d < 4; ++d)
            if (t.size[d] < 0 || (size[d] >= 0 && t.size[d] != size[d]))
                return fail_with("%s must have size %lld in dimension %d; got %lld", name, (long long)size[d], d,
                                 (long long)t.size[d]);
        check_memory(name, t, dims);
    }

    void check_floating(const char* name, const fused_mha_tensor& t) {
        if (ok && (t.dtype < 0 || t.dtype > FUSED_MHA_FLOAT16))
            fail_with("%s must be float32, float64, bfloat16 or float16; got %s", name, dtype_name(t));
    }

    void check_mask(const char* name, const fused_mha_tensor& t, int dims, const int64_t (&size)[4], int broadcast_dims) {
        if (!ok || !t.data) return;
        if (t.dtype < 0 || t.dtype > FUSED_MHA_BOOL)
            return fail_with("%s must be bool or floating; got %s", name, dtype_name(t));
        int64_t expected[4];
        for (int d = 0; d < 4; ++d) expected[d] = d < broadcast_dims && t.size[d] == 1 ? 1 : size[d];
        check(name, t, t.dtype, dims, expected);
    }

    __attribute__((format(printf, 2, 3))) void fail_with(const char* format, ...) {
        ok = false;
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(last_error, sizeof last_error, format, arguments);
        va_end(arguments);
    }

private:
    static const char* dtype_name(const fused_mha_tensor& t) {
        return t.dtype >= 0 && t.dtype <= FUSED_MHA_UINT8 ? DTYPES[t.dtype] : "an unknown dtype";
    }

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
        // Far beyond any memory, and far enough from 2^63 for the size of a workspace.
        constexpr int64_t MOST_ELEMENTS = int64_t(1) << 46;
        fits = fits && elements <= MOST_ELEMENTS && !__builtin_mul_overflow(last + 1, ITEM_SIZES[t.dtype], &bytes);
        if (!fits) return fail_with("%s has sizes or strides that overflow or are negative", name);
        if (!t.data) return fail_with("%s is missing", name);
        if (bytes > t.bytes)
            return fail_with("%s reaches byte %lld of a storage of %lld", name, (long long)bytes, (long long)t.bytes);
        if (dims > 0 && t.size[dims - 1] > 1 && t.stride[dims - 1] != 1)
            return fail_with("%s must be contiguous in its last dimension; got stride %lld", name,
                             (long long)t.stride[dims - 1]);
    }
};

int64_t accumulator_dtype(int64_t dtype) { return dtype == FUSED_MHA_FLOAT64 ? FUSED_MHA_FLOAT64 : FUSED_MHA_FLOAT32; }

int64_t virtual_keys(const fused_mha_attention& a) { return (a.bias_k.data != nullptr) + (a.add_zero_attn != 0); }

void check_threads(Checker& checker, int64_t threads) {
    constexpr int64_t MOST_THREADS = 1 << 16;
    if (checker.ok && (threads < 1 || threads > MOST_THREADS))
        checker.fail_with("threads must be between 1 and %lld; got %lld", (long long)MOST_THREADS, (long long)threads);
}

void check_attention(Checker& checker, const fused_mha_attention& a) {
    checker.check_floating("query", a.query);
    if (!checker.ok) return;
    const int64_t dtype = a.query.dtype, N = a.query.size[0], L = a.query.size[1], H = a.query.size[2], D = a.query.size[3];
    const int64_t S = a.key.size[1], H_kv = a.key.size[2], D_v = a.value.size[3];
    checker.check("query", a.query, dtype, 4, {-1, -1, -1, -1});
    checker.check("key", a.key, dtype, 4, {N, -1, -1, D});
    checker.check("value", a.value, dtype, 4, {N, S, H_kv, -1});
    if (checker.ok && (D < 1 || H_kv < 1 || H % H_kv != 0))
        checker.fail_with("query must have a head size and a multiple of key's heads; got D = %lld, H = %lld, H_kv = %lld",
                          (long long)D, (long long)H, (long long)H_kv);
    checker.check_mask("attn_mask", a.attn_mask, 4, {N, H, L, S}, 3);
    checker.check_mask("key_padding_mask", a.key_padding_mask, 0, {N, S, 1, 1}, 0);
    if (a.bias_k.data || a.bias_v.data) {
        checker.check("bias_k", a.bias_k, dtype, 2, {H_kv, D, 1, 1});
        checker.check("bias_v", a.bias_v, dtype, 2, {H_kv, D_v, 1, 1});
    }
    if (checker.ok && !(a.dropout_p >= 0 && a.dropout_p <= 1))
        checker.fail_with("dropout_p must be between 0 and 1; got %g", a.dropout_p);
    if (a.dropout_p > 0) checker.check("seed", a.seed, FUSED_MHA_INT64, 1, {2, 1, 1, 1});
    check_threads(checker, a.threads);
    constexpr int64_t FARTHEST = int64_t(1) << 61;
    if (checker.ok && (a.first_visible < -FARTHEST || a.first_visible > FARTHEST || a.last_visible < -FARTHEST ||
                       a.last_visible > FARTHEST))
        checker.fail_with("first_visible and last_visible must be within +-2^61");
}

void check_stats(Checker& checker, const fused_mha_attention& a) {
    checker.check("stats", a.stats, accumulator_dtype(a.query.dtype), 4, {2, a.query.size[0], a.query.size[2], a.query.size[1]});
}

void check_forward(Checker& checker, const fused_mha_forward_arguments& call) {
    const fused_mha_attention& a = call.attention;
    check_attention(checker, a);
    if (!checker.ok) return;
    const int64_t dtype = a.query.dtype, N = a.query.size[0], L = a.query.size[1], H = a.query.size[2];
    const int64_t columns = a.key.size[1] + virtual_keys(a);
    checker.check("output", call.output, dtype, 4, {N, L, H, a.value.size[3]});
    if (a.stats.data) check_stats(checker, a);
    if (call.weights.data) {
        if (a.average_weights)
            checker.check("weights", call.weights, dtype, 3, {N, L, columns, 1});
        else
            checker.check("weights", call.weights, dtype, 4, {N, H, L, columns});
    }
    if (call.lse.data) checker.check("lse", call.lse, accumulator_dtype(dtype), 3, {N, H, L, 1});
}

void check_backward(Checker& checker, const fused_mha_backward_arguments& call) {
    const fused_mha_attention& a = call.attention;
    check_attention(checker, a);
    if (!checker.ok) return;
    const int64_t dtype = a.query.dtype, accumulator = accumulator_dtype(dtype);
    const int64_t N = a.query.size[0], L = a.query.size[1], H = a.query.size[2], D = a.query.size[3];
    const int64_t S = a.key.size[1], H_kv = a.key.size[2], D_v = a.value.size[3], columns = S + virtual_keys(a);
    check_stats(checker, a);
    checker.check("output", call.output, dtype, 4, {N, L, H, D_v});
    checker.check("grad_output", call.grad_output, dtype, 4, {N, L, H, D_v});
    if (call.grad_weights.data) {
        if (a.average_weights)
            checker.check("grad_weights", call.grad_weights, dtype, 3, {N, L, columns, 1});
        else
            checker.check("grad_weights", call.grad_weights, dtype, 4, {N, H, L, columns});
    }
    if (call.grad_lse.data) checker.check("grad_lse", call.grad_lse, accumulator, 3, {N, H, L, 1});
    checker.check("grad_query", call.grad_query, dtype, 4, {N, L, H, D});
    checker.check("grad_key", call.grad_key, dtype, 4, {N, S, H_kv, D});
    checker.check("grad_value", call.grad_value, dtype, 4, {N, S, H_kv, D_v});
    if (call.grad_attn_mask.data) {
        checker.check_mask("grad_attn_mask", call.grad_attn_mask, 4, {N, H, L, S}, 2);
        if (checker.ok && call.grad_attn_mask.dtype != accumulator)
            checker.fail_with("grad_attn_mask must be of dtype %s", DTYPES[accumulator]);
    }
    if (call.grad_columns.data) checker.check("grad_columns", call.grad_columns, accumulator, 3, {N, H, S, 1});
    if (call.grad_bias_k.data) checker.check("grad_bias_k", call.grad_bias_k, accumulator, 3, {N, H_kv, D, 1});
    if (call.grad_bias_v.data) checker.check("grad_bias_v", call.grad_bias_v, accumulator, 3, {N, H_kv, D_v, 1});
}

void check_product(Checker& checker, const fused_mha_product_arguments& call) {
    checker.check_floating("output", call.output);
    if (!checker.ok) return;
    const int64_t dtype = call.output.dtype, M = call.output.size[0], N = call.output.size[1];
    const int64_t K = call.left.size[call.left_is_transposed ? 0 : 1];
    checker.check("output", call.output, dtype, 2, {-1, -1, 1, 1});
    checker.check("left", call.left, dtype, 2, {call.left_is_transposed ? K : M, call.left_is_transposed ? M : K, 1, 1});
    checker.check("right", call.right, dtype, 2, {call.right_is_transposed ? N : K, call.right_is_transposed ? K : N, 1, 1});
    if (call.bias.data) checker.check("bias", call.bias, dtype, 1, {N, 1, 1, 1});
    check_threads(checker, call.threads);
}

void check_workspace(Checker& checker, const fused_mha_tensor& workspace, int64_t needed) {
    checker.check("workspace", workspace, FUSED_MHA_UINT8, 1, {-1, 1, 1, 1});
    if (checker.ok && workspace.size[0] < needed)
        checker.fail_with("workspace must have %lld bytes; got %lld", (long long)needed, (long long)workspace.size[0]);
}

// Of tensors that have been checked and are about to be written.
void advise_huge_pages(std::initializer_list<const fused_mha_tensor*> tensors) {
    for (const fused_mha_tensor* t : tensors) {
        int64_t last = 0, elements = 1;
        for (int d = 0; d < 4; ++d) {
            last += (t->size[d] - 1) * t->stride[d];
            elements *= t->size[d];
        }
        if (t->data && elements > 0) fused_mha::advise_huge_pages(t->data, (last + 1) * ITEM_SIZES[t->dtype]);
    }
}

}  // namespace

extern "C" {

int64_t fused_mha_abi_version(void) { return FUSED_MHA_ABI_VERSION; }

const char* fused_mha_last_error(void) { return last_error; }

void fused_mha_set_parallel_for(fused_mha_parallel_for parallel_for) { fused_mha::set_parallel_for(parallel_for); }

const char* fused_mha_available_isa(int64_t index) {
    const fused_mha::KernelTable* kernels = fused_mha::available_kernels(index);
    return kernels ? kernels->name : nullptr;
}

const char* fused_mha_cpu_vendor(void) { return fused_mha::cpu_vendor(); }

const char* fused_mha_isa(void) { return current_kernels().name; }

int64_t fused_mha_set_isa(const char* name) {
    return name && fused_mha::choose_kernels(name) ? 0 : fail("no instruction set %s", name ? name : "(null)");
}

int64_t fused_mha_forward_workspace(const fused_mha_forward_arguments* call) {
    Checker checker;
    check_forward(checker, *call);
    return checker.ok ? current_kernels().forward_workspace(*call) : -1;
}

int64_t fused_mha_forward(const fused_mha_forward_arguments* call) {
    const fused_mha::KernelTable& kernels = current_kernels();
    Checker checker;
    check_forward(checker, *call);
    if (checker.ok) check_workspace(checker, call->attention.workspace, kernels.forward_workspace(*call));
    if (!checker.ok) return -1;
    advise_huge_pages({&call->attention.workspace, &call->output, &call->weights});
    kernels.forward(*call);
    return 0;
}

int64_t fused_mha_backward_workspace(const fused_mha_backward_arguments* call) {
    Checker checker;
    check_backward(checker, *call);
    return checker.ok ? current_kernels().backward_workspace(*call) : -1;
}

int64_t fused_mha_backward(const fused_mha_backward_arguments* call) {
    const fused_mha::KernelTable& kernels = current_kernels();
    Checker checker;
    check_backward(checker, *call);
    if (checker.ok) check_workspace(checker, call->attention.workspace, kernels.backward_workspace(*call));
    if (!checker.ok) return -1;
    advise_huge_pages({&call->attention.workspace, &call->grad_query, &call->grad_key, &call->grad_value});
    kernels.backward(*call);
    return 0;
}

int64_t fused_mha_product_workspace(const fused_mha_product_arguments* call) {
    Checker checker;
    check_product(checker, *call);
    return checker.ok ? current_kernels().product_workspace(*call) : -1;
}

int64_t fused_mha_product(const fused_mha_product_arguments* call) {
    const fused_mha::KernelTable& kernels = current_kernels();
    Checker checker;
    check_product(checker, *call);
    if (checker.ok) check_workspace(checker, call->workspace, kernels.product_workspace(*call));
    if (!checker.ok) return -1;
    advise_huge_pages({&call->workspace, &call->output});
    kernels.product(*call);
    return 0;
}

int64_t fused_mha_dropout_mask(const fused_mha_tensor* seed, const fused_mha_tensor* mask, double dropout_p,
                               int64_t threads) {
    Checker checker;
    checker.check("seed", *seed, FUSED_MHA_INT64, 1, {2, 1, 1, 1});
    checker.check("mask", *mask, FUSED_MHA_BOOL, 4, {-1, -1, -1, -1});
    if (checker.ok && !(dropout_p >= 0 && dropout_p <= 1))
        checker.fail_with("dropout_p must be between 0 and 1; got %g", dropout_p);
    if (!checker.ok) return -1;
    current_kernels().dropout_mask(*seed, *mask, dropout_p, threads);
    return 0;
}

int64_t fused_mha_exp2(const void* x, void* result, int64_t count, int64_t dtype) {
    if (dtype != FUSED_MHA_FLOAT32 && dtype != FUSED_MHA_FLOAT64) return fail("exp2 takes float32 or float64");
    if (dtype == FUSED_MHA_FLOAT32)
        current_kernels().exp2_float(static_cast<const float*>(x), static_cast<float*>(result), count);
    else
        current_kernels().exp2_double(static_cast<const double*>(x), static_cast<double*>(result), count);
    return 0;
}

}  // extern "C"
