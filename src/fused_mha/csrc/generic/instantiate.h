// Instantiates the algorithms for the instruction set FMHA_ISA; included once by isa/<name>.cpp.
#pragma once

#include "generic/column_sums.h"
#include "generic/head_transform.h"
#include "generic/kernels.h"
#include "generic/module.h"

#if defined(FMHA_BASE)
namespace fused_mha::FMHA_BASE {
extern const KernelTable kernels;
}
#endif

namespace fused_mha::FMHA_ISA {
namespace {

// Calls f with the policy that computes on tensors of `dtype`. An instruction set with FMHA_BASE adds products of bfloat16
// to that one, and gets no other type: kernel_table.cpp.
template <class F>
auto with_policy([[maybe_unused]] int64_t dtype, F&& f) {
#if defined(FMHA_BASE)
    return f(BFloat16{});
#else
    if (dtype == FUSED_MHA_FLOAT64) return f(Float64{});
    return f(Float32{});
#endif
}

int64_t forward_workspace(const fused_mha_forward_arguments& call) {
    return with_policy(call.attention.query.dtype, [&](auto policy) { return attention_workspace<decltype(policy)>(call); });
}
void forward(const fused_mha_forward_arguments& call) {
    with_policy(call.attention.query.dtype, [&](auto policy) { run_attention<decltype(policy)>(call); });
}

int64_t backward_workspace(const fused_mha_backward_arguments& call) {
    return with_policy(call.attention.query.dtype, [&](auto policy) { return attention_workspace<decltype(policy)>(call); });
}
void backward(const fused_mha_backward_arguments& call) {
    with_policy(call.attention.query.dtype, [&](auto policy) { run_attention<decltype(policy)>(call); });
}

template <class P>
Matrices matrices_of(const fused_mha_product_arguments& call) {
    const fused_mha_tensor& left = call.left;
    const Matrices matrices = {Rows(left), Rows(call.right), Rows(call.output), call.bias.data,
                               call.output.size[0] * call.output.size[1], call.output.size[2],
                               call.left_is_transposed ? left.size[0] * left.size[1] : left.size[2],
                               call.left_is_transposed != 0, call.right_is_transposed != 0, call.threads};
    return matrices.with_least_to_pack<P>();
}
int64_t product_workspace(const fused_mha_product_arguments& call) {
    return with_policy(call.output.dtype, [&](auto policy) {
        const Product<decltype(policy)> product(matrices_of<decltype(policy)>(call));
        return workspace_bytes(product.packed_bytes(), product.worker_bytes(), call.threads);
    });
}
void product(const fused_mha_product_arguments& call) {
    if (call.output.size[0] * call.output.size[1] == 0 || call.output.size[2] == 0) return;
    with_policy(call.output.dtype, [&](auto policy) {
        Product<decltype(policy)> product(matrices_of<decltype(policy)>(call));
        const uintptr_t packed = aligned(call.workspace.data);
        product.pack(packed);
        product.multiply(packed, packed + uintptr_t(product.packed_bytes()));
    });
}

int64_t module_workspace(const fused_mha_module_arguments& call) {
    return with_policy(call.query.dtype, [&](auto policy) { return Module<decltype(policy)>(call).workspace(); });
}
void module(const fused_mha_module_arguments& call) {
    with_policy(call.query.dtype, [&](auto policy) { Module<decltype(policy)>(call).run(); });
}

void column_sums(const fused_mha_tensor& matrix, const fused_mha_tensor& sums, int64_t threads) {
    if (matrix.dtype == FUSED_MHA_FLOAT64) return ColumnSums<double>(matrix, sums).run(threads);
    ColumnSums<float>(matrix, sums).run(threads);
}

#if !defined(FMHA_BASE)
void heads(const fused_mha_heads_arguments& call) {
    if (call.x.dtype == FUSED_MHA_FLOAT64) return HeadTransform<double>(call).run();
    HeadTransform<float>(call).run();
}

void dropout_mask(const fused_mha_tensor& seed_tensor, const fused_mha_tensor& mask, double dropout_p, int64_t threads) {
    const int64_t H = mask.size[1], L = mask.size[2], S = mask.size[3];
    const DropoutSeed seed(static_cast<const int64_t*>(seed_tensor.data), seed_tensor.size[0], H, dropout_p);
    auto task = [&](int64_t index, int64_t) {
        const int64_t n = index / H, h = index % H;
        for (int64_t i = 0; i < L; ++i) {
            uint8_t* row = element<uint8_t>(mask, n, h, i);
            for (int64_t first = 0; first < S; first += 8) {
                uint32_t kept;
                draw_kept<8>(seed, n, h, i, 1, first, &kept);
                for (int64_t j = first; j < min(S, first + 8); ++j) row[j] = kept >> (j - first) & 1;
            }
        }
    };
    fused_mha::run(mask.size[0] * H, threads, task);
}

template <class T>
void exp2_of(const T* x, T* result, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES<T>)
        store_some<T, OwnData<T>>(result + i, exp2(load_some<T, OwnData<T>>(x + i, count - i)), count - i);
}
#endif

}  // namespace

extern const KernelTable kernels;
const KernelTable kernels = {
    FMHA_ISA_NAME,
#if defined(FMHA_BASE)
    &FMHA_BASE::kernels,
#else
    nullptr,
#endif
    forward_workspace, forward, backward_workspace, backward, product_workspace, product, module_workspace, module, column_sums,
#if defined(FMHA_BASE)
    nullptr, nullptr, nullptr, nullptr,
#else
    heads, dropout_mask, exp2_of<float>, exp2_of<double>,
#endif
};

}  // namespace fused_mha::FMHA_ISA
