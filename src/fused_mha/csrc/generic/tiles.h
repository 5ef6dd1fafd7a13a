// The product of gemm.h by the processor's tiles (AMX): sixteen steps along K of bfloat16 pairs in one instruction.
//
// A panel of A is a tile as it lies, and so is half a panel of B. The shapes of the tiles are part of a thread's state,
// which other libraries change too: a task that multiplies ends with `release_tiles`.
#pragma once

#include "generic/panels.h"

namespace fused_mha::FMHA_ISA {
namespace {

#if defined(FMHA_BFLOAT16_DOT)

constexpr int TILE_STEPS = 16, TILE_COLUMNS = 16;
static_assert(TILE_STEPS == Panels<BFloat16>::A_WIDTH && 2 * TILE_COLUMNS == NR<float>);

// Two sets of tiles for rows of A and C, as most tasks have row tiles of two sizes: to shape tiles anew takes 140 cycles.
class TileShapes {
public:
    // The set for `rows` rows.
    FMHA_INLINE int set_for(int rows) {
        if (shaped[last] != rows) {
            last = 1 - last;
            if (shaped[last] != rows) shape(rows);
        }
        return last;
    }
    void release() {
        if (shaped[0] || shaped[1]) asm volatile("tilerelease" ::: "memory");
        shaped[0] = shaped[1] = last = 0;
    }

private:
    int shaped[2] = {}, last = 0;  // the rows of each set

    void shape(int rows) {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        static_assert(sizeof shapes == 64);
        shaped[last] = rows;
        for (int tile = 0; tile < 8; ++tile) {
            shapes.row_bytes[tile] = TILE_COLUMNS * sizeof(float);
            shapes.rows[tile] = uint8_t(tile < 6 ? max(shaped[tile / 3], 1) : TILE_STEPS);
        }
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    static int max(int a, int b) { return a > b ? a : b; }
};

thread_local TileShapes tile_shapes;

inline void release_tiles() { tile_shapes.release(); }

template <int TILE>
FMHA_INLINE void tile_load(const void* from, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(TILE) : "memory");
}
template <int TILE>
FMHA_INLINE void tile_store(void* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(TILE) : "memory");
}
template <int TILE>
FMHA_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int C, int A, int B>
FMHA_INLINE void tile_multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// `steps` rows of NR pairs as tiles of A for their columns from..from + 16: [tile of steps][column][TILE_STEPS].
inline void transpose_to_tiles(const float* rows, int64_t steps, int64_t from, float* to) {
    for (int64_t k = 0; k < steps; k += TILE_STEPS) {
        vfloat block[TILE_STEPS];
        for (int64_t i = 0; i < TILE_STEPS; ++i) block[i] = k + i < steps ? load(rows + (k + i) * NR<float> + from) : vfloat{};
        transpose_steps<vfloat, TILE_STEPS, TILE_STEPS / 2>(block);
        for (const vfloat& column : block) {
            store(to, column);
            to += TILE_STEPS;
        }
    }
}

// One step of tiles along K of A as it lies: in panels there are zeros behind the last step, else a copy gets them.
template <int TILE, Layout LAYOUT>
FMHA_INLINE void load_a_tile(const GemmArguments& g, int rows, int64_t k) {
    static_assert(LAYOUT != Layout::TRANSPOSED);
    constexpr int64_t ROW_BYTES = TILE_STEPS * sizeof(float);
    const float* a = static_cast<const float*>(g.a);
    if constexpr (LAYOUT == Layout::PANELS) {
        tile_load<TILE>(a + k / TILE_STEPS * g.a_panel_stride, ROW_BYTES);
    } else {
        const char* const first = reinterpret_cast<const char*>(a + k);
        if (k + TILE_STEPS <= g.steps) return tile_load<TILE>(first, g.a_row_bytes);
        alignas(64) float copy[MR * TILE_STEPS];
        for (int r = 0; r < rows; ++r)
            store(copy + r * TILE_STEPS, load_some<float, Float32Data>(
                                             reinterpret_cast<const float*>(first + r * g.a_row_bytes), g.steps - k));
        tile_load<TILE>(copy, ROW_BYTES);
    }
}

template <int SET, int VECTORS, Layout LAYOUT>
__attribute__((noinline)) void multiply_tiles(int rows, const GemmArguments& g) {
    constexpr int C = 3 * SET, A = 3 * SET + 2, B = 6;
    constexpr int64_t ROW_BYTES = NR<float> * sizeof(float);
    alignas(64) float last_of_b[TILE_STEPS * NR<float>];
    float* const c = static_cast<float*>(g.c);
    if (g.accumulate) {
        tile_load<C>(c, ROW_BYTES);
        if (VECTORS > 1) tile_load<C + 1>(c + TILE_COLUMNS, ROW_BYTES);
    } else {
        tile_zero<C>();
        if (VECTORS > 1) tile_zero<C + 1>();
    }
    const float* b = static_cast<const float*>(g.b);
    for (int64_t k = 0; k < g.steps; k += TILE_STEPS, b += TILE_STEPS * g.b_row_stride) {
        const float* from = b;
        int64_t stride = g.b_row_stride * int64_t(sizeof(float));
        if (const int64_t left = g.steps - k; left < TILE_STEPS) {  // nothing behind the last step takes part, NaN neither
            for (int64_t i = 0; i < TILE_STEPS; ++i)
                for (int v = 0; v < VECTORS; ++v)
                    store(last_of_b + i * NR<float> + v * TILE_COLUMNS,
                          i < left ? load(b + i * g.b_row_stride + v * TILE_COLUMNS) : vfloat{});
            from = last_of_b;
            stride = ROW_BYTES;
        }
        load_a_tile<A, LAYOUT>(g, rows, k);
        tile_load<B>(from, stride);
        tile_multiply_add<C, A, B>();
        if (VECTORS > 1) {
            tile_load<B + 1>(from + TILE_COLUMNS, stride);
            tile_multiply_add<C + 1, A, B + 1>();
        }
    }
    tile_store<C>(c, ROW_BYTES);
    if (VECTORS > 1) tile_store<C + 1>(c + TILE_COLUMNS, ROW_BYTES);
}

template <Layout LAYOUT>
FMHA_INLINE void gemm_by_tiles(int rows, int64_t columns, const GemmArguments& g) {
    const bool is_first = tile_shapes.set_for(rows) == 0;
    if (columns > TILE_COLUMNS)
        is_first ? multiply_tiles<0, 2, LAYOUT>(rows, g) : multiply_tiles<1, 2, LAYOUT>(rows, g);
    else
        is_first ? multiply_tiles<0, 1, LAYOUT>(rows, g) : multiply_tiles<1, 1, LAYOUT>(rows, g);
}

#else

inline void release_tiles() {}

#endif

}  // namespace
}  // namespace fused_mha::FMHA_ISA
