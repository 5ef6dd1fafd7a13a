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
        check_sizes(name, t, dtype, size);
        if (ok) check_memory(name, t, dims);
    }

    void check_sizes(const char* name, const fused_mha_tensor& t, int64_t dtype, const int64_t (&size)[4]) {
        if (!ok) return;
        if (t.dtype != dtype) return fail_with("%s must be of dtype %s; got %s", name, DTYPES[dtype], dtype_name(t));
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
    // Far beyond any memory, and far enough from 2^63 for the size of a workspace.
    static constexpr int64_t MOST_ELEMENTS = int64_t(1) << 46;

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

// Whatever goes beside query, key and value, whose sizes have been checked.
void check_settings(Checker& checker, const fused_mha_attention& a) {
    const int64_t dtype = a.query.dtype, N = a.query.size[0], L = a.query.size[1], H = a.query.size[2], D = a.query.size[3];
    const int64_t S = a.key.size[1], H_kv = a.key.size[2], D_v = a.value.size[3];
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

void check_attention(Checker& checker, const fused_mha_attention& a) {
    checker.check_floating("query", a.query);
    if (!checker.ok) return;
    const int64_t dtype = a.query.dtype, N = a.query.size[0], D = a.query.size[3], S = a.key.size[1];
    checker.check("query", a.query, dtype, 4, {-1, -1, -1, -1});
    checker.check("key", a.key, dtype, 4, {N, -1, -1, D});
    checker.check("value", a.value, dtype, 4, {N, S, a.key.size[2], -1});
    check_settings(checker, a);
}

void check_stats(Checker& checker, const fused_mha_attention& a) {
    checker.check("stats", a.stats, accumulator_dtype(a.query.dtype), 4, {2, a.query.size[0], a.query.size[2], a.query.size[1]});
}

// What the forward writes beside the output.
void check_results(Checker& checker, const fused_mha_forward_arguments& call) {
    const fused_mha_attention& a = call.attention;
    const int64_t dtype = a.query.dtype, N = a.query.size[0], L = a.query.size[1], H = a.query.size[2];
    const int64_t columns = a.key.size[1] + virtual_keys(a);
    if (a.stats.data) check_stats(checker, a);
    if (call.weights.data) {
        if (a.average_weights)
            checker.check("weights", call.weights, dtype, 3, {N, L, columns, 1});
        else
            checker.check("weights", call.weights, dtype, 4, {N, H, L, columns});
    }
    if (call.lse.data) checker.check("lse", call.lse, accumulator_dtype(dtype), 3, {N, H, L, 1});
}

void check_forward(Checker& checker, const fused_mha_forward_arguments& call) {
    const fused_mha_attention& a = call.attention;
    check_attention(checker, a);
    if (!checker.ok) return;
    checker.check("output", call.output, a.query.dtype, 4, {a.query.size[0], a.query.size[1], a.query.size[2], a.value.size[3]});
    check_results(checker, call);
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
    const int64_t dtype = call.output.dtype, N = call.output.size[2];
    checker.check("output", call.output, dtype, 3, {-1, -1, -1, 1});
    checker.check("left", call.left, dtype, 3, {-1, -1, -1, 1});
    checker.check("right", call.right, dtype, 3, {-1, -1, -1, 1});
    if (call.bias.data) checker.check("bias", call.bias, dtype, 1, {N, 1, 1, 1});
    check_threads(checker, call.threads);
    if (!checker.ok) return;
    const auto rows = [](const fused_mha_tensor& t) { return t.size[0] * t.size[1]; };
    const int64_t M = call.left_is_transposed ? call.left.size[2] : rows(call.left);
    const int64_t K = call.left_is_transposed ? rows(call.left) : call.left.size[2];
    const int64_t right_K = call.right_is_transposed ? call.right.size[2] : rows(call.right);
    const int64_t right_N = call.right_is_transposed ? rows(call.right) : call.right.size[2];
    if (M != rows(call.output) || N != right_N || K != right_K)
        checker.fail_with("left (%lld, %lld) and right (%lld, %lld) must fit each other and output (%lld, %lld)",
                          (long long)M, (long long)K, (long long)right_K, (long long)right_N,
                          (long long)rows(call.output), (long long)N);
}

// A projection, or the heads: a matrix of all heads for each position. Absent, it only has sizes.
void check_heads(Checker& checker, const char* name, const fused_mha_tensor& t, int64_t dtype, int64_t N, int64_t length,
                 int64_t H, int64_t D, bool is_kept) {
    checker.check_sizes(name, t, dtype, {N, length, H, D});
    if (checker.ok) checker.check_elements(name, t);
    if (is_kept) checker.check(name, t, dtype, 4, {N, length, H, D});
    if (checker.ok && is_kept && H > 1 && t.stride[2] != D) checker.fail_with("%s must have its heads side by side", name);
}

void check_projection(Checker& checker, const char* name, const fused_mha_tensor& weight, const fused_mha_tensor& bias,
                      int64_t dtype, int64_t rows, int64_t columns) {
    char text[32];
    snprintf(text, sizeof text, "%s_weight", name);
    checker.check(text, weight, dtype, 2, {rows, columns, 1, 1});
    snprintf(text, sizeof text, "%s_bias", name);
    if (bias.data) checker.check(text, bias, dtype, 1, {rows, 1, 1, 1});
}

// Some rows of a packed weight or bias, if there is one.
fused_mha_tensor rows_of(fused_mha_tensor packed, int64_t first, int64_t rows) {
    if (!packed.data) return packed;
    const int64_t offset = first * packed.stride[0] * ITEM_SIZES[packed.dtype];
    packed.data = static_cast<char*>(packed.data) + offset;
    packed.bytes -= offset;
    packed.size[0] = rows;
    return packed;
}

// Replaces what is absent by what it stands for.
void complete(Checker& checker, fused_mha_module_arguments& call) {
    checker.check_floating("query", call.query);
    if (!checker.ok) return;
    const int64_t dtype = call.query.dtype;
    checker.check("query_weight", call.query_weight, dtype, 2, {-1, -1, 1, 1});
    if (call.query_bias.data) checker.check("query_bias", call.query_bias, dtype, 1, {-1, 1, 1, 1});
    if (!checker.ok) return;
    if (!call.key.data) call.key = call.query;
    if (!call.value.data) call.value = call.key;
    if (!call.key_weight.data) {
        const fused_mha_tensor packed = call.query_weight;
        const int64_t third = packed.size[0] / 3;
        if (packed.size[0] % 3) return checker.fail_with("query_weight has no three parts, and key_weight is missing");
        call.query_weight = rows_of(packed, 0, third);
        call.key_weight = rows_of(packed, third, third);
        call.value_weight = rows_of(packed, 2 * third, third);
    }
    const int64_t HD = call.query_weight.size[0], rows = call.key_weight.size[0], H = call.num_heads;
    const fused_mha_tensor bias = call.query_bias;
    if (bias.data && !call.key_bias.data && bias.size[0] == HD + rows + call.value_weight.size[0]) {
        call.query_bias = rows_of(bias, 0, HD);
        call.key_bias = rows_of(bias, HD, rows);
        call.value_bias = rows_of(bias, HD + rows, call.value_weight.size[0]);
    }
    fused_mha_attention& a = call.core.attention;
    if (a.query.data) return;
    if (H < 1 || HD < H || HD % H || rows < HD / H || rows % (HD / H))
        return checker.fail_with("num_heads must divide the rows of query_weight, %lld; got %lld", (long long)HD, (long long)H);
    const int64_t D = HD / H, H_kv = rows / D, D_v = call.value_weight.size[0] / H_kv;
    const int64_t N = call.query.size[0], L = call.query.size[1], S = call.key.size[1];
    a.query = {nullptr, dtype, 0, {N, L, H, D}, {0, 0, 0, 0}};
    a.key = {nullptr, dtype, 0, {N, S, H_kv, D}, {0, 0, 0, 0}};
    a.value = {nullptr, dtype, 0, {N, S, H_kv, D_v}, {0, 0, 0, 0}};
    call.core.output = {nullptr, dtype, 0, {N, L, H, D_v}, {0, 0, 0, 0}};
}

void check_module(Checker& checker, const fused_mha_module_arguments& call) {
    const fused_mha_attention& a = call.core.attention;
    checker.check_floating("query", call.query);
    if (!checker.ok) return;
    const int64_t dtype = call.query.dtype, N = call.query.size[0], L = call.query.size[1], S = call.key.size[1];
    checker.check("query", call.query, dtype, 3, {-1, -1, -1, 1});
    checker.check("key", call.key, dtype, 3, {N, -1, -1, 1});
    checker.check("value", call.value, dtype, 3, {N, S, -1, 1});
    const int64_t H = a.query.size[2], D = a.query.size[3], H_kv = a.key.size[2], D_v = a.value.size[3];
    constexpr int64_t MOST = 1 << 20;
    if (checker.ok && (N < 1 || L < 1 || S < 1 || H < 1 || D < 1 || H_kv < 1 || D_v < 1 || H > MOST || D > MOST ||
                       H_kv > MOST || D_v > MOST))
        return checker.fail_with("the batch, the sequences and the heads must not be empty, nor of more than 2^20 heads or "
                                 "a larger size");
    const bool is_kept = a.query.data != nullptr;
    check_heads(checker, "projected query", a.query, dtype, N, L, H, D, is_kept);
    check_heads(checker, "projected key", a.key, dtype, N, S, H_kv, D, is_kept);
    check_heads(checker, "projected value", a.value, dtype, N, S, H_kv, D_v, is_kept);
    check_heads(checker, "heads", call.core.output, dtype, N, L, H, D_v, is_kept);
    check_settings(checker, a);
    check_results(checker, call.core);
    check_projection(checker, "query", call.query_weight, call.query_bias, dtype, H * D, call.query.size[2]);
    check_projection(checker, "key", call.key_weight, call.key_bias, dtype, H_kv * D, call.key.size[2]);
    check_projection(checker, "value", call.value_weight, call.value_bias, dtype, H_kv * D_v, call.value.size[2]);
    check_projection(checker, "out", call.out_weight, call.out_bias, dtype, call.output.size[2], H * D_v);
    checker.check("output", call.output, dtype, 3, {N, L, -1, 1});
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

using fused_mha::KernelTable;

// How a computation is checked, measured and run, with where a call has its workspace.
template <class Call>
struct Computation {
    void (*check)(Checker&, const Call&);
    int64_t (*KernelTable::*workspace_bytes)(const Call&);
    void (*KernelTable::*run)(const Call&);
    const fused_mha_tensor& (*workspace)(const Call&);
};

template <class Call>
int64_t workspace_bytes(const Computation<Call>& computation, const Call& call) {
    Checker checker;
    computation.check(checker, call);
    return checker.ok ? (current_kernels().*computation.workspace_bytes)(call) : -1;
}

template <class Call>
int64_t run(const Computation<Call>& computation, const Call& call, std::initializer_list<const fused_mha_tensor*> results) {
    const KernelTable& kernels = current_kernels();
    Checker checker;
    computation.check(checker, call);
    if (checker.ok) check_workspace(checker, computation.workspace(call), (kernels.*computation.workspace_bytes)(call));
    if (!checker.ok) return -1;
    advise_huge_pages({&computation.workspace(call)});
    advise_huge_pages(results);
    (kernels.*computation.run)(call);
    return 0;
}

const Computation<fused_mha_forward_arguments> FORWARD = {
    check_forward, &KernelTable::forward_workspace, &KernelTable::forward,
    [](const fused_mha_forward_arguments& call) -> const fused_mha_tensor& { return call.attention.workspace; }};
const Computation<fused_mha_backward_arguments> BACKWARD = {
    check_backward, &KernelTable::backward_workspace, &KernelTable::backward,
    [](const fused_mha_backward_arguments& call) -> const fused_mha_tensor& { return call.attention.workspace; }};
const Computation<fused_mha_product_arguments> PRODUCT = {
    check_product, &KernelTable::product_workspace, &KernelTable::product,
    [](const fused_mha_product_arguments& call) -> const fused_mha_tensor& { return call.workspace; }};
const Computation<fused_mha_module_arguments> MODULE = {
    check_module, &KernelTable::module_workspace, &KernelTable::module,
    [](const fused_mha_module_arguments& call) -> const fused_mha_tensor& { return call.core.attention.workspace; }};

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

int64_t fused_mha_forward_workspace(const fused_mha_forward_arguments* call) { return workspace_bytes(FORWARD, *call); }
int64_t fused_mha_forward(const fused_mha_forward_arguments* call) {
    return run(FORWARD, *call, {&call->output, &call->weights});
}

int64_t fused_mha_backward_workspace(const fused_mha_backward_arguments* call) { return workspace_bytes(BACKWARD, *call); }
int64_t fused_mha_backward(const fused_mha_backward_arguments* call) {
    return run(BACKWARD, *call, {&call->grad_query, &call->grad_key, &call->grad_value});
}

int64_t fused_mha_product_workspace(const fused_mha_product_arguments* call) { return workspace_bytes(PRODUCT, *call); }
int64_t fused_mha_product(const fused_mha_product_arguments* call) { return run(PRODUCT, *call, {&call->output}); }

int64_t fused_mha_module_workspace(fused_mha_module_arguments* call) {
    Checker checker;
    complete(checker, *call);
    return checker.ok ? workspace_bytes(MODULE, *call) : -1;
}
int64_t fused_mha_module(fused_mha_module_arguments* call) {
    Checker checker;
    complete(checker, *call);
    return !checker.ok ? -1 : run(MODULE, *call, {&call->output, &call->core.weights});
}

int64_t fused_mha_column_sums(const fused_mha_tensor* matrix, const fused_mha_tensor* sums, int64_t threads) {
    Checker checker;
    checker.check_floating("matrix", *matrix);
    checker.check_floating("sums", *sums);
    if (!checker.ok) return -1;
    if (sums->dtype != matrix->dtype) checker.check_sizes("matrix", *matrix, accumulator_dtype(sums->dtype), {-1, -1, -1, 1});
    checker.check("matrix", *matrix, matrix->dtype, 3, {-1, -1, -1, 1});
    checker.check("sums", *sums, sums->dtype, 1, {matrix->size[2], 1, 1, 1});
    check_threads(checker, threads);
    if (!checker.ok) return -1;
    current_kernels().column_sums(*matrix, *sums, threads);
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
