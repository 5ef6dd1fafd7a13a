#include "checks.h"

#include <cmath>
#include <cstdio>
#include <utility>

namespace fused_mha {

namespace {
thread_local char error_text[512] = "";
}

const char* last_error() { return error_text; }

void set_error(const char* format, va_list arguments) { vsnprintf(error_text, sizeof error_text, format, arguments); }

int64_t refuse(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    set_error(format, arguments);
    va_end(arguments);
    return -1;
}

const char* dtype_name(int64_t dtype) {
    constexpr const char* NAMES[] = {"float32", "float64", "bfloat16", "float16", "bool", "int64", "uint8"};
    return dtype >= 0 && dtype <= FUSED_MHA_UINT8 ? NAMES[dtype] : "an unknown dtype";
}

int64_t accumulator_dtype(int64_t dtype) { return dtype == FUSED_MHA_FLOAT64 ? FUSED_MHA_FLOAT64 : FUSED_MHA_FLOAT32; }

namespace {

int64_t virtual_keys(const fused_mha_attention& a) { return (a.bias_k.data != nullptr) + (a.add_zero_attn != 0); }

// The heads whose weights are given: some of H, each once.
void check_weights_of_heads(Checker& checker, const fused_mha_attention& a) {
    const fused_mha_tensor& t = a.weights_of_heads;
    const int64_t H = a.query.size[2], count = t.size[0];
    if (!t.data) return;
    checker.check("weights_of_heads", t, FUSED_MHA_INT64, 1, {-1, 1, 1, 1});
    if (checker.ok && (count < 1 || count > H || a.average_weights))
        return checker.fail_with("weights_of_heads must have 1 to H = %lld heads, and no average_weights beside it; got %lld",
                                 (long long)H, (long long)count);
    const int64_t* const heads = static_cast<const int64_t*>(t.data);
    for (int64_t i = 0; checker.ok && i < count; ++i) {
        bool fits = heads[i] >= 0 && heads[i] < H;
        for (int64_t j = 0; j < i; ++j) fits = fits && heads[j] != heads[i];
        if (!fits)
            checker.fail_with("weights_of_heads must name heads from 0 to H - 1 = %lld, each once; got %lld at %lld",
                              (long long)H - 1, (long long)heads[i], (long long)i);
    }
}

// The weights, or their gradient.
void check_weights(Checker& checker, const char* name, const fused_mha_tensor& t, const fused_mha_attention& a) {
    if (!t.data) return;
    const int64_t N = a.query.size[0], L = a.query.size[1], columns = a.key.size[1] + virtual_keys(a);
    if (checker.ok && a.cu_seqlens_q.data) checker.fail_with("packed sequences have no weights");
    const int64_t heads = a.weights_of_heads.data ? a.weights_of_heads.size[0] : a.query.size[2];
    if (a.average_weights)
        checker.check(name, t, a.query.dtype, 3, {N, L, columns, 1});
    else
        checker.check(name, t, a.query.dtype, 4, {N, heads, L, columns});
}

}  // namespace

void check_threads(Checker& checker, int64_t threads) {
    constexpr int64_t MOST_THREADS = 1 << 16;
    if (checker.ok && (threads < 1 || threads > MOST_THREADS))
        checker.fail_with("threads must be between 1 and %lld; got %lld", (long long)MOST_THREADS, (long long)threads);
}

void check_seed(Checker& checker, const fused_mha_tensor& seed) {
    const bool is_placed = seed.size[0] == FUSED_MHA_PLACED_SEED;
    checker.check("seed", seed, FUSED_MHA_INT64, 1, {is_placed ? FUSED_MHA_PLACED_SEED : 2, 1, 1, 1});
}

namespace {

// Offsets of packed sequences ascend from 0 to no more than `rows`.
void check_offsets(Checker& checker, const char* name, const fused_mha_tensor& t, int64_t count, int64_t rows) {
    checker.check(name, t, FUSED_MHA_INT64, 1, {count, 1, 1, 1});
    if (checker.ok && count < 1) checker.fail_with("%s must have at least one element, 0", name);
    const int64_t* const offsets = static_cast<const int64_t*>(t.data);
    int64_t before = 0;
    for (int64_t n = 0; checker.ok && n < count; ++n) {
        if (n == 0 && offsets[n] != 0) checker.fail_with("%s must begin with 0; got %lld", name, (long long)offsets[n]);
        else if (offsets[n] < before)
            checker.fail_with("%s must not descend; got %lld behind %lld at %lld", name, (long long)offsets[n],
                              (long long)before, (long long)n);
        else if (offsets[n] > rows)
            checker.fail_with("%s must not reach beyond the %lld tokens there are; got %lld at %lld", name, (long long)rows,
                              (long long)offsets[n], (long long)n);
        before = offsets[n];
    }
}

int64_t last_offset(const fused_mha_tensor& t) { return static_cast<const int64_t*>(t.data)[t.size[0] - 1]; }

void check_sequences(Checker& checker, const fused_mha_attention& a) {
    if (!checker.ok || (!a.cu_seqlens_q.data && !a.cu_seqlens_k.data)) return;
    if (a.query.size[0] != 1 || a.attn_mask.data)
        return checker.fail_with("packed sequences are rows of one batch element, with no attn_mask");
    check_offsets(checker, "cu_seqlens_q", a.cu_seqlens_q, a.cu_seqlens_q.size[0], a.query.size[1]);
    check_offsets(checker, "cu_seqlens_k", a.cu_seqlens_k, a.cu_seqlens_q.size[0], a.key.size[1]);
    if (checker.ok && virtual_keys(a) && last_offset(a.cu_seqlens_q) != a.query.size[1])
        checker.fail_with("beside virtual keys, packed sequences must have all of the queries");
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
    for (const auto& [name, t] : {std::pair("sinks", &a.sinks), std::pair("alibi_slopes", &a.alibi_slopes)})
        if (t->data) {
            checker.check_floating(name, *t);
            checker.check(name, *t, t->dtype, 1, {H, 1, 1, 1});
        }
    check_sequences(checker, a);
    check_weights_of_heads(checker, a);
    if (checker.ok && !(a.softcap >= 0 && a.softcap < INFINITY))
        checker.fail_with("softcap must be positive, or 0 for none; got %g", a.softcap);
    if (checker.ok && !(a.dropout_p >= 0 && a.dropout_p <= 1))
        checker.fail_with("dropout_p must be between 0 and 1; got %g", a.dropout_p);
    if (a.dropout_p > 0) check_seed(checker, a.seed);
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
    if (a.stats.data) check_stats(checker, a);
    check_weights(checker, "weights", call.weights, a);
    if (call.lse.data) checker.check("lse", call.lse, accumulator_dtype(dtype), 3, {N, H, L, 1});
}

}  // namespace

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
    const int64_t S = a.key.size[1], H_kv = a.key.size[2], D_v = a.value.size[3];
    const int64_t parts_of_batch = a.cu_seqlens_q.data ? a.cu_seqlens_q.size[0] : N;
    check_stats(checker, a);
    checker.check("output", call.output, dtype, 4, {N, L, H, D_v});
    checker.check("grad_output", call.grad_output, dtype, 4, {N, L, H, D_v});
    check_weights(checker, "grad_weights", call.grad_weights, a);
    if (call.grad_lse.data) checker.check("grad_lse", call.grad_lse, accumulator, 3, {N, H, L, 1});
    checker.check("grad_query", call.grad_query, dtype, 4, {N, L, H, D});
    checker.check("grad_key", call.grad_key, dtype, 4, {N, S, H_kv, D});
    checker.check("grad_value", call.grad_value, dtype, 4, {N, S, H_kv, D_v});
    if (checker.ok && call.grad_attn_mask.data && a.cu_seqlens_q.data)
        return checker.fail_with("grad_attn_mask is not for packed sequences, which have no attn_mask");
    if (call.grad_attn_mask.data) {
        checker.check_mask("grad_attn_mask", call.grad_attn_mask, 4, {N, H, L, S}, 2);
        if (checker.ok && call.grad_attn_mask.dtype != accumulator)
            checker.fail_with("grad_attn_mask must be of dtype %s", dtype_name(accumulator));
    }
    if (call.grad_columns.data) checker.check("grad_columns", call.grad_columns, accumulator, 3, {N, H, S, 1});
    if (call.grad_bias_k.data) checker.check("grad_bias_k", call.grad_bias_k, accumulator, 3, {parts_of_batch, H_kv, D, 1});
    if (call.grad_bias_v.data) checker.check("grad_bias_v", call.grad_bias_v, accumulator, 3, {parts_of_batch, H_kv, D_v, 1});
    if (call.grad_sinks.data) checker.check("grad_sinks", call.grad_sinks, accumulator, 2, {parts_of_batch, H, 1, 1});
    if (call.grad_distances.data) checker.check("grad_distances", call.grad_distances, accumulator, 3, {N, H, S, 1});
    if (checker.ok && ((call.grad_sinks.data && !a.sinks.data) || (call.grad_distances.data && !a.alibi_slopes.data)))
        checker.fail_with("grad_sinks and grad_distances are of sinks and alibi_slopes, which are absent");
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

void check_heads(Checker& checker, const fused_mha_heads_arguments& call) {
    checker.check_floating("x", call.x);
    if (!checker.ok) return;
    const int64_t dtype = call.x.dtype, accumulator = accumulator_dtype(dtype);
    const int64_t N = call.x.size[0], L = call.x.size[1], H = call.x.size[2], D = call.x.size[3], pairs = call.cos.size[2];
    checker.check("x", call.x, dtype, 4, {-1, -1, -1, -1});
    if (checker.ok && (D < 1 || D > FUSED_MHA_MOST_HEAD_SIZE))
        checker.fail_with("x must have a head size from 1 to %d; got %lld", FUSED_MHA_MOST_HEAD_SIZE, (long long)D);
    checker.check("output", call.output, dtype, 4, {N, L, H, D});
    if (call.grad_output.data) checker.check("grad_output", call.grad_output, dtype, 4, {N, L, H, D});
    if (checker.ok && (call.norm < FUSED_MHA_NO_NORM || call.norm > FUSED_MHA_L2_NORM || !(call.eps >= 0)))
        checker.fail_with("norm must be from 0 to 3, with an eps of 0 or more; got %lld and %g", (long long)call.norm, call.eps);
    for (const auto& [name, t] : {std::pair("weight", &call.weight), std::pair("bias", &call.bias)})
        if (checker.ok && (t->data || (t == &call.weight && call.norm != FUSED_MHA_NO_NORM))) {
            checker.check_floating(name, *t);
            if (checker.ok && (dtype == FUSED_MHA_FLOAT64) != (t->dtype == FUSED_MHA_FLOAT64))
                checker.fail_with("%s must be float64 where x is, and only there", name);
            checker.check(name, *t, t->dtype, 1, {D, 1, 1, 1});
        }
    if (checker.ok && call.cos.data && (pairs < 1 || pairs > D / 2 || (call.cos.size[0] != 1 && call.cos.size[0] != N)))
        checker.fail_with("cos must be (N|1, L, R / 2) with R <= D");
    for (const auto& [name, t] : {std::pair("cos", &call.cos), std::pair("sin", &call.sin)})
        if (call.cos.data || t->data) checker.check(name, *t, accumulator, 3, {call.cos.size[0], L, pairs, 1});
    const int64_t parts = checker.ok ? (N * L + FUSED_MHA_HEAD_POSITIONS - 1) / FUSED_MHA_HEAD_POSITIONS : 0;
    for (const auto& [name, t] : {std::pair("grad_weight", &call.grad_weight), std::pair("grad_bias", &call.grad_bias)})
        if (t->data) checker.check(name, *t, accumulator, 2, {parts, D, 1, 1});
    check_threads(checker, call.threads);
}

namespace {

// A projection, or the heads: a matrix of all heads for each position. Absent, it only has sizes.
void check_projected(Checker& checker, const char* name, const fused_mha_tensor& t, int64_t dtype, int64_t N, int64_t length,
                 int64_t H, int64_t D, bool is_kept) {
    checker.check_sizes(name, t, dtype, {N, length, H, D});
    if (checker.ok) checker.check_elements(name, t);
    if (is_kept) checker.check(name, t, dtype, 4, {N, length, H, D});
    if (checker.ok && is_kept && H > 1 && t.stride[2] != D) checker.fail_with("%s must have its heads side by side", name);
}

// Beside bfloat16 a weight may be float32.
int64_t weight_dtype(int64_t dtype, const fused_mha_tensor& weight) {
    return dtype == FUSED_MHA_BFLOAT16 && weight.dtype == FUSED_MHA_FLOAT32 ? weight.dtype : dtype;
}

void check_projection(Checker& checker, const char* name, const fused_mha_tensor& weight, const fused_mha_tensor& bias,
                      int64_t dtype, int64_t rows, int64_t columns) {
    char text[32];
    snprintf(text, sizeof text, "%s_weight", name);
    checker.check(text, weight, weight_dtype(dtype, weight), 2, {rows, columns, 1, 1});
    snprintf(text, sizeof text, "%s_bias", name);
    if (bias.data) checker.check(text, bias, dtype, 1, {rows, 1, 1, 1});
}

// Some rows of a packed weight or bias, if there is one.
fused_mha_tensor rows_of(fused_mha_tensor packed, int64_t first, int64_t rows) {
    if (!packed.data) return packed;
    const int64_t offset = first * packed.stride[0] * fused_mha_item_size(packed.dtype);
    packed.data = static_cast<char*>(packed.data) + offset;
    packed.bytes -= offset;
    packed.size[0] = rows;
    return packed;
}

}  // namespace

void complete(Checker& checker, fused_mha_module_arguments& call) {
    checker.check_floating("query", call.query);
    if (!checker.ok) return;
    const int64_t dtype = call.query.dtype;
    checker.check("query_weight", call.query_weight, weight_dtype(dtype, call.query_weight), 2, {-1, -1, 1, 1});
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
    check_projected(checker, "projected query", a.query, dtype, N, L, H, D, is_kept);
    check_projected(checker, "projected key", a.key, dtype, N, S, H_kv, D, is_kept);
    check_projected(checker, "projected value", a.value, dtype, N, S, H_kv, D_v, is_kept);
    check_projected(checker, "heads", call.core.output, dtype, N, L, H, D_v, is_kept);
    check_settings(checker, a);
    check_results(checker, call.core);
    check_projection(checker, "query", call.query_weight, call.query_bias, dtype, H * D, call.query.size[2]);
    check_projection(checker, "key", call.key_weight, call.key_bias, dtype, H_kv * D, call.key.size[2]);
    check_projection(checker, "value", call.value_weight, call.value_bias, dtype, H_kv * D_v, call.value.size[2]);
    check_projection(checker, "out", call.out_weight, call.out_bias, dtype, call.output.size[2], H * D_v);
    checker.check("output", call.output, dtype, 3, {N, L, -1, 1});
}

}  // namespace fused_mha
