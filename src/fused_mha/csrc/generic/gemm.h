// The one matrix product of the library: C[R x NR] (+)= A[R x K] * B[K x NR], with C in registers.
//
// Every operand lies in panels: NR = two vectors of columns, row after row. In that form a matrix serves as B (a row is
// two vectors) and as A, plain or transposed (an element is broadcast), so P and dS are stored once for all of their
// products. bfloat16 operands pair two neighbours along K in 32 bits; K then counts pairs.
#pragma once

#include "c_api.h"
#include "generic/kernels.h"
#include "simd/vec.h"

namespace fused_mha::FMHA_ISA {
namespace {

// What one step along K does: `Element` is the unit that is broadcast, KSTEP the number of columns of A in it.
struct Float32 {
    static constexpr int64_t OPERAND = FUSED_MHA_FLOAT32;  // the type of tensors whose elements these are
    using Accumulator = float;
    using Element = float;
    static constexpr int KSTEP = 1;
    static FMHA_INLINE vfloat multiply_add(vfloat acc, vfloat a, vfloat b) { return a * b + acc; }
};
struct Float64 {
    static constexpr int64_t OPERAND = FUSED_MHA_FLOAT64;
    using Accumulator = double;
    using Element = double;
    static constexpr int KSTEP = 1;
    static FMHA_INLINE vdouble multiply_add(vdouble acc, vdouble a, vdouble b) { return a * b + acc; }
};
#if defined(FMHA_BFLOAT16_DOT)
struct BFloat16 {
    static constexpr int64_t OPERAND = FUSED_MHA_BFLOAT16;
    using Accumulator = float;
    using Element = float;  // 32 bits that hold two bfloat16
    static constexpr int KSTEP = 2;
    static FMHA_INLINE vfloat multiply_add(vfloat acc, vfloat a, vfloat b) { return dot_bfloat16(acc, a, b); }
};
#endif

template <class T>
constexpr int NR = 2 * LANES<T>;  // columns of a panel
constexpr int MR = FMHA_MR;       // most rows of C that the registers hold

// How A lies: in panels, in panels transposed, or in rows of its own, `a_row_bytes` apart.
enum class Layout { PANELS, TRANSPOSED, ROWS };

// After `a_panel_steps` along K, A goes on at the next panel.
struct GemmArguments {
    const void* a;
    int64_t a_panel_steps;   // steps along K in a panel of A
    int64_t a_panel_stride;  // elements from a panel of A to the next
    const void* b;
    int64_t b_row_stride;  // elements
    void* c;               // rows of NR accumulators
    int64_t steps;         // K
    bool accumulate;
    int64_t a_row_bytes = 0;
};

// Element (r, k) of A for one k after the other. Rows that lie anywhere are reached from four pointers by a multiple of
// 1, 2, 4 or 8 times their distance, as addresses of x86 can be: a pointer for each would be more than there are registers.
template <class E, int ROW, Layout LAYOUT>
class Elements {
public:
    Elements(const E* a, int64_t row_bytes) : row_bytes(row_bytes) {
        for (int i = 0; i < BASES; ++i) at[i] = reinterpret_cast<const char*>(a) + (LAYOUT == Layout::ROWS ? FIRST[i] * row_bytes : 0);
    }
    FMHA_INLINE E operator()(int r) const {
        if constexpr (LAYOUT == Layout::TRANSPOSED) return reinterpret_cast<const E*>(at[0])[r];
        if constexpr (LAYOUT == Layout::PANELS) return reinterpret_cast<const E*>(at[0])[r * ROW];
        E x;
        memcpy(&x, at[BASE[r]] + (r - FIRST[BASE[r]]) * row_bytes, sizeof x);
        return x;
    }
    FMHA_INLINE void next() {
        for (int i = 0; i < BASES; ++i) {
            at[i] += (LAYOUT == Layout::TRANSPOSED ? ROW : 1) * int64_t(sizeof(E));
            if constexpr (LAYOUT == Layout::ROWS) asm("" : "+r"(at[i]));  // it is to stay in a register
        }
    }

private:
    static constexpr int BASES = LAYOUT == Layout::ROWS ? 4 : 1;
    static_assert(MR <= 14);
    static constexpr int FIRST[4] = {0, 3, 5, 10}, BASE[14] = {0, 0, 0, 1, 0, 2, 2, 2, 0, 2, 3, 1, 3, 2};
    const char* at[BASES];
    const int64_t row_bytes;
};

template <class P, int R, int VECTORS, Layout LAYOUT>
__attribute__((noinline)) void gemm_rows(const GemmArguments& g) {
    using T = typename P::Accumulator;
    using E = typename P::Element;
    constexpr int W = LANES<T>, ROW = LAYOUT == Layout::TRANSPOSED ? NR<T> : NR<T> / P::KSTEP, AHEAD = 16;
    Vec<T> acc[R][VECTORS];
    T* c = static_cast<T*>(g.c);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) acc[r][v] = Vec<T>{};
    const E* panel = static_cast<const E*>(g.a);
    const E* b = static_cast<const E*>(g.b);
    for (int64_t left = g.steps; left > 0; left -= g.a_panel_steps, panel += g.a_panel_stride) {
        Elements<E, ROW, LAYOUT> a(panel, g.a_row_bytes);
        for (int64_t k = left < g.a_panel_steps ? left : g.a_panel_steps; k > 0; --k, a.next(), b += g.b_row_stride) {
            Vec<T> columns[VECTORS];
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) {
                columns[v] = load(b + v * W);
                __builtin_prefetch(b + AHEAD * NR<T> + v * W);  // from the second-level cache: 4 % of a large product
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Vec<T> x = splat(a(r));
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) acc[r][v] = P::multiply_add(acc[r][v], x, columns[v]);
            }
        }
    }
    // What was there is added last: sums over long K so fall into blocks, and their rounding errors grow that much slower.
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
            T* at = c + r * NR<T> + v * W;
            store(at, g.accumulate ? load(at) + acc[r][v] : acc[r][v]);
        }
}

template <class P, int VECTORS, Layout LAYOUT, int R = MR>
FMHA_INLINE void gemm_of_rows(int rows, const GemmArguments& g) {
    if constexpr (R > 1)
        if (rows < R) return gemm_of_rows<P, VECTORS, LAYOUT, R - 1>(rows, g);
    gemm_rows<P, R, VECTORS, LAYOUT>(g);
}

// Whether `gemm` takes the processor's tiles. No call may run while that changes: fused_mha_set_isa says so.
template <class P>
bool multiplies_by_tiles() {
    return P::KSTEP == 2 && tiles_in_use.load(std::memory_order_relaxed);
}

#if defined(FMHA_BFLOAT16_DOT)
template <Layout LAYOUT>
void gemm_by_tiles(int rows, int64_t columns, const GemmArguments& g);  // in tiles.h
#endif

// `rows` from 1 to MR (by tiles to 16), `columns` from 1 to NR: whole vectors are computed.
template <class P, Layout LAYOUT = Layout::PANELS>
void gemm(int rows, int64_t columns, const GemmArguments& g) {
#if defined(FMHA_BFLOAT16_DOT)
    if constexpr (P::KSTEP == 2 && LAYOUT != Layout::TRANSPOSED)
        if (multiplies_by_tiles<P>()) return gemm_by_tiles<LAYOUT>(rows, columns, g);
#endif
    if (columns > LANES<typename P::Accumulator>)
        gemm_of_rows<P, 2, LAYOUT>(rows, g);
    else
        gemm_of_rows<P, 1, LAYOUT>(rows, g);
}

// The same over a long K in blocks, which keeps the rounding errors of large head sizes small.
template <class P>
void gemm_in_blocks(int rows, int64_t columns, GemmArguments g) {
    constexpr int64_t BLOCK_PANELS = 4;
    const int64_t block = BLOCK_PANELS * g.a_panel_steps;
    int64_t left = g.steps;
    do {  // also with nothing to sum: C is written
        g.steps = left < block ? left : block;
        gemm<P>(rows, columns, g);
        g.a = static_cast<const typename P::Element*>(g.a) + BLOCK_PANELS * g.a_panel_stride;
        g.b = static_cast<const typename P::Element*>(g.b) + block * g.b_row_stride;
        g.accumulate = true;
        left -= block;
    } while (left > 0);
}

}  // namespace
}  // namespace fused_mha::FMHA_ISA
