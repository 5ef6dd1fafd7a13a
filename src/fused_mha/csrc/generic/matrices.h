// What a product of matrices is made of: the rows of tensors. product.h and few_rows.h compute it.
#pragma once

#include "generic/attention.h"
#include "parallel.h"

namespace fused_mha::FMHA_ISA {
namespace {

// The rows of a tensor (outer, inner, columns), one after the other.
class Rows {
public:
    int64_t dtype;

    explicit Rows(const fused_mha_tensor& t)
        : dtype(t.dtype), data(static_cast<char*>(t.data)), inner(t.size[1]), outer_stride(t.stride[0] * item_size(dtype)),
          inner_stride(t.stride[1] * item_size(dtype)) {
        if (t.size[0] == 1 || outer_stride == inner * inner_stride) inner = INT64_MAX;  // rows of one stride: no division
    }

    FMHA_INLINE void* operator()(int64_t i, int64_t column = 0) const {
        return data + (i < inner ? i * inner_stride : i / inner * outer_stride + i % inner * inner_stride) +
               column * item_size(dtype);
    }

    // Bytes from row to row; 0 where that differs.
    int64_t stride() const { return inner == INT64_MAX ? inner_stride : 0; }

private:
    char* data;
    int64_t inner, outer_stride, inner_stride;  // strides in bytes
};

// What is multiplied: A (M, K), or (K, M) where it lies transposed, with B (K, N), or (N, K), to C (M, N).
struct Matrices {
    Rows left, right, output;
    const void* bias;  // (N), of C's type, or null
    int64_t M, N, K;
    bool left_is_transposed, right_is_transposed;
    int64_t threads;
    bool output_is_transposed = false;  // C lies as (N, M), and the bias belongs to its columns there, (M)

    bool has_few_rows = false;  // few_rows.h computes it

    // As it has least to pack: by a few rows, or C^T = B^T A^T. `all_rows` counts those of the whole call, of which this
    // may be a part: the sums must not depend on how it is cut, nor on N, as weights are joined. Tiles multiply faster
    // than few_rows.h, which does not use them, so that packing pays off from fewer rows on; and it weighs more beside the
    // product. It pays off for short sums too, whose lanes few_rows.h adds up in the end.
    template <class P>
    Matrices with_least_to_pack(int64_t all_rows) const {
        Matrices m = *this;
        const bool is_forward = right_is_transposed && !left_is_transposed, by_tiles = multiplies_by_tiles<P>();
        const int64_t less_to_pack = by_tiles ? 320 : max(128, K * LANES<typename P::Accumulator> / 32);  // in W x^T
        const int64_t few = is_forward           ? (by_tiles ? 4 : most_dots<P>())
                            : left_is_transposed ? (by_tiles ? 24 : 32)
                                                 : (by_tiles ? 16 : 160);
        m.has_few_rows = !(left_is_transposed && right_is_transposed) && all_rows <= few;
        if (m.has_few_rows || all_rows > less_to_pack || M >= N || !is_forward) return m;
        return {right, left, output, bias, N, M, K, false, true, threads, true};
    }
    template <class P>
    Matrices with_least_to_pack() const {
        return with_least_to_pack<P>(left_is_transposed ? K : M);
    }

private:
    // Rows of x up to which dot products are the faster ones: from one vector of them to two.
    template <class P>
    int64_t most_dots() const {
        constexpr int64_t W = LANES<typename P::Accumulator>, SHORT = 256, LONG = 768;
        return P::KSTEP == 2 ? 2 * W : W + W * (min(max(K, SHORT), LONG) - SHORT) / (LONG - SHORT);
    }
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
