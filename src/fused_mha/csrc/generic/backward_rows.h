// A block of query rows of one head against the keys of a task: P, computed again from the saved row maxima and sums, dP
// and dS. attention_backward.h brings blocks and chunks together.
//
// delta = rowsum(P * dP). Where one chunk has all keys it is summed as it stands, over the P and dP of the block; where
// none has, it comes from attention_delta.h before any dP is there, and of half types from the output as it was rounded.
#pragma once

#include "generic/backward_keys.h"

namespace fused_mha::FMHA_ISA {
namespace {

static_assert(BLOCK_ROWS / MR <= 32, "hidden_tiles has a bit for each row tile of a block");

template <class P>
class RowBlock {
public:
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>;
    static constexpr int64_t A_WIDTH = Panels<P>::A_WIDTH;

    int64_t n, h, index, first_row, rows;

    RowBlock(const BackwardPlan<P>& plan, Arena& arena)
        : plan(plan), attention(plan.attention), masking(attention.masking), seed(attention.seed()) {
        const int64_t panels_of_key = Panels<P>::panels(attention.D), panels_of_value = Panels<P>::panels(attention.D_v);
        query_a = arena.take<T>(BLOCK_ROWS * panels_of_key * A_WIDTH);
        query_row = arena.take<T>(attention.reads_in_place ? panels_of_key * COLUMNS : 0);
        grad_a = arena.take<T>(BLOCK_ROWS * panels_of_value * A_WIDTH);
        query_b = P::KSTEP == 1 ? query_a : arena.take<T>(BLOCK_ROWS / P::KSTEP * panels_of_key * COLUMNS);
        grad_b = P::KSTEP == 1 ? grad_a : arena.take<T>(BLOCK_ROWS / P::KSTEP * panels_of_value * COLUMNS);
        const int64_t panels_at_once = plan.sees_all_keys ? plan.chunk_panels : 1;
        weights = arena.take<T>(panels_at_once * BLOCK_ROWS * COLUMNS);
        grad_strip = arena.take<T>(plan.chunk_panels * BLOCK_ROWS * A_WIDTH);
        grad_scores = P::KSTEP == 1 ? grad_strip : arena.take<T>(panels_at_once * BLOCK_ROWS * COLUMNS);
        weights_pairs = P::KSTEP == 1 ? nullptr : arena.take<T>(BLOCK_ROWS / 2 * COLUMNS);
        grad_pairs = P::KSTEP == 1 ? nullptr : arena.take<T>(BLOCK_ROWS / 2 * COLUMNS);
        cap_slopes = arena.take<T>(masking.caps() ? panels_at_once * BLOCK_ROWS * COLUMNS : 0);
        hidden_tiles = arena.take<uint32_t>(plan.chunk_panels);
    }

    Parts row_tiles() const { return {rows, ceil_div(rows, MR)}; }

    void place(int64_t batch, int64_t of_head, int64_t block) {
        n = batch;
        h = of_head;
        index = block;
        weights_index = plan.call.grad_weights.data ? index_of_weights(attention.a, h) : -1;
        first_row = plan.blocks.begin(block);
        rows = plan.blocks.size(block);
    }

    void pack() {
        const fused_mha_attention& a = attention.a;
        const fused_mha_tensor& grad = plan.call.grad_output;
        const void *queries[BLOCK_ROWS], *grads[BLOCK_ROWS];
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t i = first_row + r;
            queries[r] = row_of(a.query, n, i, h);
            row_max[r] = *element<T>(a.stats, 0, n, h, i);
            const T sum = *element<T>(a.stats, 1, n, h, i);
            inverse_sum[r] = sum == 0 ? T(0) : 1 / sum;
            grads[r] = sum == 0 ? nullptr : row_of(grad, n, i, h);
            delta_parts[r] = Vec<T>{};
            if (sum == 0)
                delta[r] = 0;
            else if (plan.needs_deltas)
                delta[r] = plan.deltas[(n * attention.H + h) * attention.L + i];
            else
                delta[r] = (plan.sees_all_keys ? 0 : plan.delta.of_output(n, h, i)) - plan.delta.of_lse(n, h, i);
        }
        Panels<P>::pack_a(a.query.dtype, queries, rows, attention.D, query_a);
        if (attention.reads_in_place) SingleQuery<P>::unpack(a.query.dtype, queries[0], attention.D, query_row);
        Panels<P>::pack_a(grad.dtype, grads, rows, attention.D_v, grad_a);
        if (P::KSTEP > 1) {
            Panels<P>::pack_b(a.query.dtype, queries, rows, attention.D, query_b, Panels<P>::steps(rows) * COLUMNS);
            Panels<P>::pack_b(grad.dtype, grads, rows, attention.D_v, grad_b, Panels<P>::steps(rows) * COLUMNS);
        }
    }

    // Brings rows begin..end behind the block, which `pack` will read, into the cache: they lie apart, one head among
    // others.
    void prefetch_next(int64_t begin, int64_t end) const {
        const fused_mha_backward_arguments& call = plan.call;
        for (int64_t i = first_row + rows + begin; i < min(first_row + rows + end, attention.L); ++i) {
            const void* of_row[] = {row_of(attention.a.query, n, i, h), row_of(call.grad_output, n, i, h),
                                    row_of(call.output, n, i, h)};
            prefetch_rows(of_row, 1, attention.D * item_size(attention.a.query.dtype));
            prefetch_rows(of_row + 1, 2, attention.D_v * item_size(call.output.dtype));
        }
    }

    // P and dP of the block's rows and one panel; false if the panel is hidden from all rows.
    bool score(const KeyChunk<P>& chunk, int64_t p) {
        const Parts tiles = row_tiles();
        const KeyPanel& panel = chunk.panels[p];
        const int64_t steps = Panels<P>::steps(attention.D), value_steps = Panels<P>::steps(attention.D_v);
        bool is_visible = false;
        hidden_tiles[p] = 0;
        for (int64_t t = 0; t < tiles.parts; ++t) {
            const int64_t first = tiles.begin(t), size = tiles.size(t);
            const TileMask<T> mask = masking.look(n, h, first_row + first, size, panel);
            T *const s = weights_of(p) + first * COLUMNS, *const dp = grad_scores_of(p) + first * COLUMNS;
            if (mask.kind == mask.HIDDEN) {
                memset(s, 0, size_t(size * COLUMNS) * sizeof(T));
                memset(dp, 0, size_t(size * COLUMNS) * sizeof(T));
                hidden_tiles[p] |= uint32_t(1) << t;
                continue;
            }
            is_visible = true;
            if (attention.reads_in_place)
                score_in_place(attention, n, h, panel, query_row, s);
            else
                gemm_in_blocks<P>(int(size), COLUMNS,
                                  {query_a + first * A_WIDTH, A_WIDTH, rows * A_WIDTH,
                                   chunk.keys_transposed + p * steps * COLUMNS, COLUMNS, s, steps, false});
            gemm_in_blocks<P>(int(size), COLUMNS,
                              {grad_a + first * A_WIDTH, A_WIDTH, rows * A_WIDTH,
                               chunk.values_transposed + p * value_steps * COLUMNS, COLUMNS, dp, value_steps, false});
            if (mask.kind == mask.MASKED)
                masking.apply(mask, n, h, first_row + first, size, panel, chunk.padding + p * COLUMNS, s,
                              masking.caps() ? cap_slopes_of(p) + first * COLUMNS : nullptr);
            if (attention.drops())
                weigh<true>(first, size, panel, s, dp);
            else
                weigh<false>(first, size, panel, s, dp);
        }
        return is_visible;
    }

    // After the P and dP of all keys, where one chunk has them.
    void sum_deltas() {
        for (int64_t r = 0; r < rows; ++r) delta[r] += reduce_add(delta_parts[r]);
    }

    // Of a head's sink, whose dP is 0, and which is the log-sum-exp of a row that sees nothing. `delta` is known then.
    T grad_of_sink() const {
        const Vec<T> sink = splat(masking.sink(h)), exponent_factor = splat(masking.exponent_factor);
        T sum = 0;
        for (int64_t r = 0; r < rows; ++r)
            if (inverse_sum[r] != 0)
                sum -= exp2((sink - splat(row_max[r])) * exponent_factor)[0] * inverse_sum[r] * delta[r];
            else
                sum += plan.delta.of_lse(n, h, first_row + r);
        return sum;
    }

    // Makes dS of a panel's dP, that of scores as `Masking::apply` leaves them.
    void differentiate(int64_t p) {
        const Parts tiles = row_tiles();
        for (int64_t t = 0; t < tiles.parts; ++t)
            if (!(hidden_tiles[p] >> t & 1))
                attention.drops() ? differentiate<true>(tiles.begin(t), tiles.size(t), weights_of(p), grad_scores_of(p))
                                  : differentiate<false>(tiles.begin(t), tiles.size(t), weights_of(p), grad_scores_of(p));
    }

    // Adds what the block's rows give to dK and dV of a panel that was differentiated; leaves dS as that of products of
    // queries and keys, and what the product with the keys takes.
    void add_to(KeyChunk<P>& chunk, int64_t p) {
        if (masking.caps()) uncap(p);
        if constexpr (P::KSTEP == 2) round_to_pairs(weights_of(p), grad_scores_of(p), grad_strip + p * rows * A_WIDTH);
        chunk.add(p, P::KSTEP == 1 ? weights_of(p) : weights_pairs, grad_b, P::KSTEP == 1 ? grad_scores_of(p) : grad_pairs,
                  query_b, rows);
    }

    // dS of a panel in full precision: [row][COLUMNS].
    T* grad_scores_of(int64_t p) const {
        return grad_scores + (plan.sees_all_keys || P::KSTEP == 1 ? p * rows * COLUMNS : 0);
    }
    // dS of the panels from p on, of which all were differentiated: [panel][row][A_WIDTH].
    const T* grad_strip_of(int64_t p) const { return grad_strip + p * rows * A_WIDTH; }

private:
    static constexpr int W = LANES<T>;
    const BackwardPlan<P>& plan;
    const Attention<P>& attention;
    const Masking<T>& masking;
    const DropoutSeed seed;
    T *query_a, *grad_a, *query_b, *grad_b;  // queries and dO, for products along D and along the rows
    T* query_row;                            // a single query as it lies
    int64_t weights_index;                   // of the head's gradient of weights; -1 without
    T row_max[BLOCK_ROWS], inverse_sum[BLOCK_ROWS], delta[BLOCK_ROWS];
    Vec<T> delta_parts[BLOCK_ROWS];          // what its lanes sum to, where one chunk has all keys
    T *weights, *grad_scores;                // P, negative where dropped, and dP, then dS: [panel][row][COLUMNS]
    T *weights_pairs, *grad_pairs;           // of one panel as pairs along the rows, of bfloat16
    T* grad_strip;                           // dS of all panels: [panel][row][A_WIDTH]
    T* cap_slopes;                           // the derivative of capped scores: [panel][row][COLUMNS]
    uint32_t* hidden_tiles;                  // of each panel: a bit for each tile of rows that sees none of it

    T* weights_of(int64_t p) const { return weights + (plan.sees_all_keys ? p * rows * COLUMNS : 0); }

    T* cap_slopes_of(int64_t p) const { return cap_slopes + (plan.sees_all_keys ? p * rows * COLUMNS : 0); }

    void uncap(int64_t p) {
        const Parts tiles = row_tiles();
        T *const ds = grad_scores_of(p), *const slopes = cap_slopes_of(p);
        for (int64_t t = 0; t < tiles.parts; ++t)
            for (int64_t i = tiles.begin(t) * COLUMNS; i < tiles.begin(t + 1) * COLUMNS; i += W)
                if (!(hidden_tiles[p] >> t & 1)) store(ds + i, load(ds + i) * load(slopes + i));
    }

    // Scores become P; dP is that of the weights after dropout, and becomes that before it.
    template <bool DROPS>
    void weigh(int64_t first, int64_t size, const KeyPanel& panel, T* s, T* dp) {
        const bool sums_deltas = plan.sees_all_keys, has_grad_weights = weights_index >= 0;
        const Vec<T> exponent_factor = splat(masking.exponent_factor), kept_factor = splat(attention.kept_factor());
        uint32_t kept[MR];
        if (DROPS) attention.draw(seed, n, h, first_row + first, size, panel, kept);
        for (int64_t r = 0; r < size; ++r, s += COLUMNS, dp += COLUMNS) {
            if (inverse_sum[first + r] == 0) {  // hidden everywhere: whatever gradient arrives
                memset(s, 0, COLUMNS * sizeof(T));
                memset(dp, 0, COLUMNS * sizeof(T));
                continue;
            }
            const Vec<T> shifts = splat(row_max[first + r]), inverse = splat(inverse_sum[first + r]);
            Vec<T> sum = delta_parts[first + r];
            for (int v = 0; v < 2; ++v) {
                Vec<T> x = exp2((load(s + v * W) - shifts) * exponent_factor) * inverse;
                Vec<T> dx = load(dp + v * W);
                if (has_grad_weights) dx = dx + plan.delta.grad_of_weights(n, weights_index, first_row + first + r, panel.first + v * W);
                if (DROPS) dx = select(~kept[r] >> (v * W), dx * kept_factor, Vec<T>{});
                if (sums_deltas) sum = sum + x * dx;
                store(dp + v * W, dx);
                store(s + v * W, DROPS ? select(~kept[r] >> (v * W), x, -x) : x);
            }
            delta_parts[first + r] = sum;
        }
    }

    // dP becomes dS, and P that after dropout.
    template <bool DROPS>
    void differentiate(int64_t first, int64_t size, T* s, T* dp) const {
        for (int64_t i = first * COLUMNS; i < (first + size) * COLUMNS; i += W) {
            Vec<T> x = load(s + i);
            if (DROPS) {
                const auto is_dropped = x < Vec<T>{};
                store(s + i, is_dropped ? Vec<T>{} : x);
                x = is_dropped ? -x : x;
            }
            store(dp + i, x * (load(dp + i) - splat(delta[i / COLUMNS])));
        }
    }

    // P and dS as pairs along the rows, and dS as pairs along the keys.
    void round_to_pairs([[maybe_unused]] const T* s, [[maybe_unused]] const T* ds, [[maybe_unused]] T* strip) const {
#if defined(FMHA_BFLOAT16_DOT)
        for (int64_t r = 0; r < rows; r += 2)
            for (int v = 0; v < 2; ++v) {
                const int64_t at = r * COLUMNS + v * W;
                const bool has_second = r + 1 < rows;
                const vfloat zero = {};
                store(weights_pairs + r / 2 * COLUMNS + v * W,
                      interleave_bfloat16(load(s + at), has_second ? load(s + at + COLUMNS) : zero));
                store(grad_pairs + r / 2 * COLUMNS + v * W,
                      interleave_bfloat16(load(ds + at), has_second ? load(ds + at + COLUMNS) : zero));
            }
        for (int64_t r = 0; r < rows; ++r)
            store(strip + r * A_WIDTH, to_bfloat16(load(ds + r * COLUMNS), load(ds + r * COLUMNS + W)));
#endif
    }
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
