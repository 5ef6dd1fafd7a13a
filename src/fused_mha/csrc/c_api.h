// The C ABI of the CPU kernels: plain structs of pointers, sizes and strides. backends/native.py fills them.
//
// Shapes: N batch, H query heads, H_kv key/value heads, L query length, S key length, D and D_v head sizes.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FUSED_MHA_ABI_VERSION 7
#define FUSED_MHA_EXPORT __attribute__((visibility("default")))

enum fused_mha_dtype {
    FUSED_MHA_FLOAT32 = 0,
    FUSED_MHA_FLOAT64 = 1,
    FUSED_MHA_BFLOAT16 = 2,
    FUSED_MHA_FLOAT16 = 3,
    FUSED_MHA_BOOL = 4,
    FUSED_MHA_INT64 = 5,
    FUSED_MHA_UINT8 = 6,
};

// Bytes of an element; 0 for an unknown dtype.
static inline int64_t fused_mha_item_size(int64_t dtype) {
    switch (dtype) {
        case FUSED_MHA_FLOAT64:
        case FUSED_MHA_INT64: return 8;
        case FUSED_MHA_FLOAT32: return 4;
        case FUSED_MHA_BFLOAT16:
        case FUSED_MHA_FLOAT16: return 2;
        case FUSED_MHA_BOOL:
        case FUSED_MHA_UINT8: return 1;
        default: return 0;
    }
}

// A tensor of up to four dimensions; absent if `data` is null. Dimensions that it lacks have size 1.
typedef struct {
    void* data;
    int64_t dtype;
    int64_t bytes;      // from `data` to the end of its storage
    int64_t size[4];
    int64_t stride[4];  // in elements, >= 0
} fused_mha_tensor;

// What forward and backward share.
//
// With `cu_seqlens_q` and `cu_seqlens_k` the rows of the one batch element, N = 1, are those of packed sequences: number n
// has the queries cu_seqlens_q[n] to cu_seqlens_q[n + 1] - 1 and the keys likewise, and is attended to as if it were alone.
// Rows behind the last sequence see nothing, and there are none beside virtual keys. There is no attn_mask and there are no
// weights then, and visible keys are counted from a query's own position, which `bottom_right` shifts by the lengths of
// its sequence.
typedef struct {
    fused_mha_tensor query;             // (N, L, H, D)
    fused_mha_tensor key;               // (N, S, H_kv, D)
    fused_mha_tensor value;             // (N, S, H_kv, D_v)
    fused_mha_tensor attn_mask;         // (N|1, H|1, L|1, S): bool (true = ignore) or floating
    fused_mha_tensor key_padding_mask;  // (N, S): bool (true = ignore) or floating
    fused_mha_tensor bias_k;            // (H_kv, D)
    fused_mha_tensor bias_v;            // (H_kv, D_v)
    fused_mha_tensor seed;              // (2) or (FUSED_MHA_PLACED_SEED): int64, absent without dropout
    fused_mha_tensor sinks;             // (H): floating, logits beside the keys' in each row; or absent
    fused_mha_tensor alibi_slopes;      // (H): floating, or absent
    fused_mha_tensor cu_seqlens_q;      // (N' + 1): int64, of N' packed sequences; or absent
    fused_mha_tensor cu_seqlens_k;      // (N' + 1): int64, likewise
    fused_mha_tensor weights_of_heads;  // (n): int64, the heads whose weights are given, and have a gradient, in this order;
                                        // absent for all
    fused_mha_tensor stats;             // (2, N, H, L): row maxima and sums of the scores, in the accumulator type;
                                        // the forward may do without
    fused_mha_tensor workspace;         // bytes
    int64_t first_visible;              // query i sees the keys i + first_visible ... i + last_visible
    int64_t last_visible;
    int64_t bottom_right;               // whether query i has position i + S - L for alibi_slopes, not i
    int64_t add_zero_attn;
    int64_t average_weights;            // whether weights and their gradient are means over the heads
    int64_t threads;
    double dropout_p;
    double scale;
    double softcap;                     // of scaled scores; 0 for none
} fused_mha_attention;

typedef struct {
    fused_mha_attention attention;
    fused_mha_tensor output;   // (N, L, H, D_v)
    fused_mha_tensor weights;  // (N, L, S') averaged, (N, H, L, S') per head, (N, n, L, S') of weights_of_heads, or absent;
                               // S' = S + virtual keys
    fused_mha_tensor lse;      // (N, H, L), or absent
} fused_mha_forward_arguments;

typedef struct {
    fused_mha_attention attention;
    fused_mha_tensor output;           // (N, L, H, D_v)
    fused_mha_tensor grad_output;      // (N, L, H, D_v)
    fused_mha_tensor grad_weights;     // as the weights, or absent
    fused_mha_tensor grad_lse;         // (N, H, L), or absent
    fused_mha_tensor grad_query;       // (N, L, H, D)
    fused_mha_tensor grad_key;         // (N, S, H_kv, D)
    fused_mha_tensor grad_value;       // (N, S, H_kv, D_v)
    fused_mha_tensor grad_attn_mask;   // (N|1, H|1, L, S) in the accumulator type and zero before the call, or absent
    fused_mha_tensor grad_columns;     // (N, H, S), the scores' gradient summed over the queries, likewise, or absent
    fused_mha_tensor grad_bias_k;      // (N, H_kv, D) in the accumulator type, or absent; (N' + 1, H_kv, D) with packed
                                       // sequences, the last for what is behind them, as the two below
    fused_mha_tensor grad_bias_v;      // (N, H_kv, D_v) in the accumulator type, or absent
    fused_mha_tensor grad_sinks;       // (N, H) in the accumulator type, or absent
    fused_mha_tensor grad_distances;   // (N, H, S), the sum over the queries of what their distances to a key get, of which
                                       // alibi_slopes has -1 times the sum; in the accumulator type, or absent
} fused_mha_backward_arguments;

// output = left right + bias, of whole matrices. The rows of a matrix may be those of sequences, (batch, length, columns).
typedef struct {
    fused_mha_tensor left;    // (1, M, K), or (1, K, M) where it lies transposed
    fused_mha_tensor right;   // (1, K, N), or (1, N, K) where it lies transposed
    fused_mha_tensor bias;    // (N), or absent
    fused_mha_tensor output;  // (1, M, N)
    fused_mha_tensor workspace;
    int64_t left_is_transposed;
    int64_t right_is_transposed;
    int64_t threads;
} fused_mha_product_arguments;

// Q/K norm and rotation of heads; backward, where there is a grad_output.
enum { FUSED_MHA_NO_NORM = 0, FUSED_MHA_RMS_NORM = 1, FUSED_MHA_LAYER_NORM = 2, FUSED_MHA_L2_NORM = 3 };
#define FUSED_MHA_MOST_HEAD_SIZE 1024
// Numbers of the seed of a call that is a part of a longer one: the two of any seed, the first query, key and head in the
// longer call, and its number of heads. 8 divides the first key.
#define FUSED_MHA_PLACED_SEED 6
#define FUSED_MHA_HEAD_POSITIONS 32  // whose heads' gradients of a norm's parameters are one row of grad_weight
typedef struct {
    fused_mha_tensor x;            // (N, L, H, D)
    fused_mha_tensor weight;       // (D): floating, absent without a norm
    fused_mha_tensor bias;         // (D): floating, or absent
    fused_mha_tensor cos;          // (N|1, L, R / 2) in the accumulator type; absent without a rotation
    fused_mha_tensor sin;          // likewise
    fused_mha_tensor output;       // (N, L, H, D), or the gradient of x
    fused_mha_tensor grad_output;  // (N, L, H, D), or absent
    fused_mha_tensor grad_weight;  // (parts of N * L positions, D) in the accumulator type, or absent
    fused_mha_tensor grad_bias;    // likewise
    int64_t norm;
    int64_t interleaved;           // whether components 2j and 2j + 1 are a pair, not j and j + R / 2
    int64_t threads;
    double eps;
} fused_mha_heads_arguments;

// The forward of a whole module: query, key and value are projected, attended to and projected back. `core` needs no
// query, key, value and output: where they are given, the projections and the heads are kept there for the backward.
typedef struct {
    fused_mha_tensor query;         // (N, L, E)
    fused_mha_tensor query_weight;  // (H * D, E), or all three weights one after the other, (3 * H * D, E); beside bfloat16
                                    // inputs weights may be float32, and are rounded as they are read
    fused_mha_tensor query_bias;    // (H * D), or all three, or absent
    fused_mha_tensor out_weight;    // (E_out, H * D_v)
    fused_mha_tensor out_bias;      // (E_out), or absent
    fused_mha_tensor output;        // (N, L, E_out)
    fused_mha_tensor key;           // (N, S, kdim); query if absent
    fused_mha_tensor value;         // (N, S, vdim); key if absent
    fused_mha_tensor key_weight;    // (H_kv * D, kdim), absent if query_weight has it
    fused_mha_tensor value_weight;  // (H_kv * D_v, vdim), likewise
    fused_mha_tensor key_bias;      // (H_kv * D), absent if query_bias has it
    fused_mha_tensor value_bias;    // (H_kv * D_v), likewise
    fused_mha_forward_arguments core;
    int64_t num_heads;  // H
} fused_mha_module_arguments;

// torch's torch_parallel_for: calls f(begin, end, context) for parts of [begin, end) on its threads.
typedef int32_t (*fused_mha_parallel_for)(int64_t begin, int64_t end, int64_t grain,
                                          void (*f)(int64_t, int64_t, void*), void* context);

// 0 on success; else `fused_mha_last_error` says, for this thread, what is wrong.
FUSED_MHA_EXPORT int64_t fused_mha_abi_version(void);
FUSED_MHA_EXPORT const char* fused_mha_last_error(void);
FUSED_MHA_EXPORT void fused_mha_set_parallel_for(fused_mha_parallel_for parallel_for);

// Instruction sets by index, best last, null at the end; those that were compiled in and run on this machine.
FUSED_MHA_EXPORT const char* fused_mha_available_isa(int64_t index);
FUSED_MHA_EXPORT const char* fused_mha_isa(void);
// The instruction set whose code computes on a dtype: the one in use, or the one that it adds products of bfloat16 to.
FUSED_MHA_EXPORT const char* fused_mha_isa_of(int64_t dtype);
FUSED_MHA_EXPORT int64_t fused_mha_set_isa(const char* name);  // while no call runs

// The name of the processor as CPUID gives it, empty where there is none; and whether it has tiles (AMX) for products of
// a dtype.
FUSED_MHA_EXPORT const char* fused_mha_cpu_name(void);
FUSED_MHA_EXPORT int64_t fused_mha_cpu_has_tiles(int64_t dtype);

// Bytes of workspace that a call needs; its `workspace` may be absent here. Negative on an error.
FUSED_MHA_EXPORT int64_t fused_mha_forward_workspace(const fused_mha_forward_arguments*);
FUSED_MHA_EXPORT int64_t fused_mha_backward_workspace(const fused_mha_backward_arguments*);
FUSED_MHA_EXPORT int64_t fused_mha_forward(const fused_mha_forward_arguments*);
FUSED_MHA_EXPORT int64_t fused_mha_backward(const fused_mha_backward_arguments*);
FUSED_MHA_EXPORT int64_t fused_mha_product_workspace(const fused_mha_product_arguments*);
FUSED_MHA_EXPORT int64_t fused_mha_product(const fused_mha_product_arguments*);
// These complete the arguments in place.
FUSED_MHA_EXPORT int64_t fused_mha_module_workspace(fused_mha_module_arguments*);
FUSED_MHA_EXPORT int64_t fused_mha_module(fused_mha_module_arguments*);

// sums (C) = the sums over the rows of matrix (N, L, C), of its dtype, or of a half type where it is float32.
FUSED_MHA_EXPORT int64_t fused_mha_column_sums(const fused_mha_tensor* matrix, const fused_mha_tensor* sums, int64_t threads);

FUSED_MHA_EXPORT int64_t fused_mha_heads(const fused_mha_heads_arguments*);

// mask (N, H, L, S) bool, true = keep, as forward and backward draw it from seed.
FUSED_MHA_EXPORT int64_t fused_mha_dropout_mask(const fused_mha_tensor* seed, const fused_mha_tensor* mask,
                                                double dropout_p, int64_t threads);

// The kernels' exp2 of `count` numbers, for its test; float32 or float64 by `dtype`.
FUSED_MHA_EXPORT int64_t fused_mha_exp2(const void* x, void* result, int64_t count, int64_t dtype);

// Registers the CPU's kernels of torch.ops.fused_mha with torch, whose library dlopen gave; once in a process.
FUSED_MHA_EXPORT int64_t fused_mha_register_operators(void* torch_library);

#ifdef __cplusplus
}
#endif
