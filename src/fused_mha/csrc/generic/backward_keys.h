// The keys and values of a backward task, packed, and the sums that become their gradients; attention_backward.h and
// backward_rows.h read it.
#pragma once

#include "generic/backward_plan.h"

namespace fused_mha::FMHA_ISA {
namespace {

template <class P>
class KeyChunk {
public:
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>;
    static constexpr int64_t A_WIDTH = Panels<P>::A_WIDTH;

    int64_t n, head, index;
    KeyPanel* const panels;  // `count` panels of keys that some query may see
    int64_t count;
    T *const keys_transposed, *const values_transposed;  // [panel][step along D or D_v][COLUMNS]
    T* const keys;                                       // [panel of D][step along keys][COLUMNS]
    T* const padding;                                    // [panel][COLUMNS]

    KeyChunk(const BackwardPlan<P>& plan, Arena& arena)
        : panels(arena.take<KeyPanel>(plan.chunk_panels)),
          keys_transposed(arena.take<T>(plan.chunk_rows() * Panels<P>::steps(plan.attention.D))),
          values_transposed(arena.take<T>(plan.chunk_rows() * Panels<P>::steps(plan.attention.D_v))),
          keys(arena.take<T>(plan.chunk_rows() / P::KSTEP * Panels<P>::panels(plan.attention.D) * COLUMNS)),
          padding(arena.take<T>(plan.chunk_rows())),
          plan(plan),
          attention(plan.attention),
          key_sums(arena.take<T>(plan.chunk_rows() * Panels<P>::panels(attention.D) * COLUMNS)),
          value_sums(arena.take<T>(plan.chunk_rows() * Panels<P>::panels(attention.D_v) * COLUMNS)),
          is_summed(arena.take<bool>(plan.chunk_panels)) {}

    int64_t key_panel_stride() const { return plan.chunk_panels * A_WIDTH * COLUMNS; }

    void pack(int64_t batch, int64_t of_head, int64_t chunk) {
        n = batch;
        head = of_head;
        index = chunk;
        const fused_mha_attention& a = attention.a;
        const int64_t first = index * plan.chunk_panels;
        count = attention.masking.visible_panels(n, panels, first, min(first + plan.chunk_panels, plan.all_panels));
        for (int64_t p = 0; p < count; ++p) {
            const void *pointers[COLUMNS], *key_pointers[COLUMNS];
            attention.rows_of_panel(a.value, a.bias_v, n, head, panels[p], pointers);
            attention.rows_of_panel(a.key, a.bias_k, n, head, panels[p], key_pointers);
            prefetch_rows(pointers, COLUMNS, attention.D_v * item_size(a.value.dtype));
            prefetch_rows(key_pointers, COLUMNS, attention.D * item_size(a.key.dtype));
            Panels<P>::pack_b_transposed(a.value.dtype, pointers, attention.D_v,
                                         values_transposed + p * Panels<P>::steps(attention.D_v) * COLUMNS);
            Panels<P>::pack_b_transposed(a.key.dtype, key_pointers, attention.D,
                                         keys_transposed + p * Panels<P>::steps(attention.D) * COLUMNS);
            Panels<P>::pack_b(a.key.dtype, key_pointers, COLUMNS, attention.D, keys + p * A_WIDTH * COLUMNS,
                              key_panel_stride());
            if (attention.masking.adds_padding()) attention.masking.padding_values(n, panels[p].first, padding + p * COLUMNS);
        }
        for (int64_t p = 0; p < count; ++p) is_summed[p] = false;
    }

    // dV of a panel += P^T dO, and dK += dS^T Q, over the rows of a block.
    void add(int64_t p, const T* weights, const T* grad_output, const T* grad_scores, const T* queries, int64_t rows) {
        const int64_t steps = Panels<P>::steps(rows);
        add_transposed(weights, grad_output, steps, attention.D_v, value_sums + p * COLUMNS * COLUMNS, is_summed[p]);
        add_transposed(grad_scores, queries, steps, attention.D, key_sums + p * COLUMNS * COLUMNS, is_summed[p]);
        is_summed[p] = true;
    }

    void write_gradients() const {
        const fused_mha_attention& a = attention.a;
        const int64_t first = index * plan.chunk_rows(), last = min(first + plan.chunk_rows(), attention.masking.keys);
        int64_t p = 0;
        for (int64_t j = first; j < last; ++j) {
            while (p < count && panels[p].first + COLUMNS <= j) ++p;
            const bool is_visible = p < count && panels[p].first <= j && is_summed[p];
            const int64_t row = is_visible ? (p * COLUMNS + j - panels[p].first) * COLUMNS : 0;
            write_key(is_visible ? key_sums + row : nullptr, j, attention.D, T(a.scale), plan.call.grad_key,
                      plan.call.grad_bias_k);
            write_key(is_visible ? value_sums + row : nullptr, j, attention.D_v, attention.kept_factor(),
                      plan.call.grad_value, plan.call.grad_bias_v);
        }
    }

private:
    const BackwardPlan<P>& plan;
    const Attention<P>& attention;
    T *const key_sums, *const value_sums;  // dK and dV: [panel of D or D_v][key][COLUMNS]
    bool* const is_summed;                 // of each panel: whether the sums hold something

    // sums (keys of a panel x columns) += a^T b, over the rows of the block; = where `accumulate` is false.
    void add_transposed(const T* a, const T* b, int64_t steps, int64_t columns, T* sums, bool accumulate) const {
#if defined(FMHA_BFLOAT16_DOT)
        if (multiplies_by_tiles<P>()) {
            constexpr int64_t TILES = (BLOCK_ROWS / 2 + TILE_STEPS - 1) / TILE_STEPS, TILE = TILE_STEPS * TILE_STEPS;
            alignas(64) float a_tiles[TILES * TILE];
            for (int64_t key = 0; key < COLUMNS; key += TILE_STEPS) {
                transpose_to_tiles(a, steps, key, a_tiles);
                for (int64_t c = 0; c < columns; c += COLUMNS)
                    gemm<P>(TILE_STEPS, columns - c,
                            {a_tiles, TILE_STEPS, TILE, b + c * steps, COLUMNS, sums + c * plan.chunk_rows() + key * COLUMNS,
                             steps, accumulate});
            }
            return;
        }
#endif
        const Parts parts{COLUMNS, ceil_div(COLUMNS, MR)};
        for (int64_t c = 0; c < columns; c += COLUMNS)
            for (int64_t t = 0; t < parts.parts; ++t)
                gemm<P, Layout::TRANSPOSED>(int(parts.size(t)), columns - c,
                                            {a + parts.begin(t), steps, 0, b + c * steps, COLUMNS,
                                             sums + c * plan.chunk_rows() + parts.begin(t) * COLUMNS, steps, accumulate});
    }

    void write_key(const T* sums, int64_t j, int64_t columns, T factor, const fused_mha_tensor& grad,
                   const fused_mha_tensor& grad_bias) const {
        const int64_t S = attention.masking.S;
        const bool is_real = j < S;
        if (!is_real && (!grad_bias.data || j != S)) return;
        const fused_mha_tensor& to = is_real ? grad : grad_bias;
        void* row = is_real ? row_of(grad, n, j, head) : row_of(grad_bias, n, head, 0);
        if (sums)
            unpack_row(sums, plan.chunk_rows() * COLUMNS, columns, factor, to.dtype, row);
        else
            zero(row, columns * item_size(to.dtype));
    }
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
