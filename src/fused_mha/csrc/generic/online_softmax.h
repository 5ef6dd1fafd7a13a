// The steps of the forward: score a row tile against a tile of keys, take the scores into the running softmax, multiply
// with the values (Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867).
#pragma once

#include "generic/attention.h"
#include "generic/single_query.h"

namespace fused_mha::FMHA_ISA {
namespace {

// Up to MR queries of one head, and what their softmax has come to.
template <class P>
struct RowTile {
    using T = typename P::Accumulator;
    int64_t n, h, first, rows;
    T* query;    // [panel of D][row][A_WIDTH]; where keys are read in place [D]
    T* output;   // [panel of D_v][row][COLUMNS], not yet divided by row_sum
    T* row_max;  // [row], of the scores as Masking::apply leaves them
    T* row_sum;  // [row], of exp(score - row_max)
};

// The scores of a row tile over a tile of keys, and what becomes of them.
template <class P>
struct Strip {
    using T = typename P::Accumulator;
    T* scores;        // [panel][row][COLUMNS]; after the softmax, exp(score - row_max), 0 where dropped
    T* weights;       // what is multiplied with the values: `scores`, or these rounded to pairs of bfloat16
    uint32_t* kept;   // [panel][MR], the columns that dropout keeps in each row
    T* row_max;       // [row], what was the largest so far, which `scores` are relative to
    int64_t* active;  // the panels that count, in order
    int64_t active_count;
};

// Single queries of neighbouring heads, which take their keys together, in the order in which these lie in memory.
template <class P>
struct HeadGroup {
    using T = typename P::Accumulator;
    const RowTile<P>* tiles;  // one for each head
    int64_t count;
    Strip<P>* strips;
    const T **queries, **weights;  // by heads, here and below
    T **scores, **outputs;
    int64_t* offsets[4];  // of their rows from those of the first head, in keys, values and the biases of both

    HeadGroup(Arena& arena, int64_t most)
        : queries(arena.take<const T*>(most)), weights(arena.take<const T*>(most)), scores(arena.take<T*>(most)),
          outputs(arena.take<T*>(most)) {
        for (int64_t*& of_tensor : offsets) of_tensor = arena.take<int64_t>(most);
    }
};

// The steps of attending from a row tile to a tile of keys.
template <class P>
class Attender {
public:
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>;

    Attender(const Attention<P>& attention, bool keeps_weights)
        : attention(attention), masking(attention.masking), seed(attention.seed()), keeps_weights(keeps_weights) {}

    void start(const RowTile<P>& tile) const {
        const void* rows[MR];
        for (int64_t r = 0; r < tile.rows; ++r) {
            rows[r] = row_of(attention.a.query, tile.n, tile.first + r, tile.h);
            tile.row_max[r] = Masking<T>::NEGATIVE_INFINITY;
            tile.row_sum[r] = 0;
        }
        if (attention.reads_in_place)
            SingleQuery<P>::unpack(attention.a.query.dtype, rows[0], attention.D, tile.query);
        else
            Panels<P>::pack_a(attention.a.query.dtype, rows, tile.rows, attention.D, tile.query);
    }

    // Takes a tile of keys, which has been packed, into the running softmax and the output.
    void attend(const RowTile<P>& tile, const KeyTile<P>& keys, Strip<P>& strip) const {
        score(tile, keys, strip);
        const bool accumulate = raise_maxima(tile, strip);
        add_exponentials(tile, strip);
        multiply_values(tile, keys, strip, accumulate);
    }

    // Makes a group of row tiles that have been started.
    void gather(HeadGroup<P>& group, const RowTile<P>* tiles, int64_t count, Strip<P>* strips) const {
        group.tiles = tiles;
        group.count = count;
        group.strips = strips;
        const fused_mha_attention& a = attention.a;
        const int64_t steps[] = {a.key.stride[2], a.value.stride[2], a.bias_k.stride[0], a.bias_v.stride[0]};
        for (int64_t t = 0; t < count; ++t) {
            group.queries[t] = tiles[t].query;
            group.outputs[t] = tiles[t].output;
            const int64_t head = tiles[t].h / attention.group - tiles[0].h / attention.group;
            for (int i = 0; i < 4; ++i) group.offsets[i][t] = head * steps[i] * item_size(a.key.dtype);
            for (int64_t c = 0; c < attention.D_v; c += COLUMNS)
                for (int v = 0; v < 2; ++v) store(tiles[t].output + c + v * W, Vec<T>{});
        }
    }

    // What `attend` does, for a group.
    void attend(const HeadGroup<P>& group, const KeyTile<P>& keys) const {
        const fused_mha_attention& a = attention.a;
        HeadRow rows[MOST_TILE_KEYS];
        rows_of_heads(a.key, a.bias_k, group, group.offsets[0], group.offsets[2], keys, rows);
        for (int64_t p = 0; p < keys.count; ++p) {
            for (int64_t t = 0; t < group.count; ++t) group.scores[t] = group.strips[t].scores + p * COLUMNS;
            SingleQuery<P>::score_heads(a.key.dtype, group.count, group.queries, rows + p * COLUMNS,
                                        known(keys, p), attention.D, group.scores);
        }
        for (int64_t t = 0; t < group.count; ++t) {
            Strip<P>& strip = group.strips[t];
            const RowTile<P>& tile = group.tiles[t];
            strip.active_count = 0;
            for (int64_t p = 0; p < keys.count; ++p) {
                const TileMask<T> mask = masking.look(tile.n, tile.h, tile.first, tile.rows, keys.panels[p]);
                if (mask.kind == mask.HIDDEN)
                    for (int v = 0; v < 2; ++v)
                        store(strip.scores + p * COLUMNS + v * W, splat(Masking<T>::NEGATIVE_INFINITY));
                take_scores(mask, tile, keys, p, strip);
            }
            raise_maxima(tile, strip);
            add_exponentials(tile, strip);
        }
        rows_of_heads(a.value, a.bias_v, group, group.offsets[1], group.offsets[3], keys, rows);
        for (int64_t p = 0; p < keys.count; ++p) {
            for (int64_t t = 0; t < group.count; ++t) group.weights[t] = group.strips[t].scores + p * COLUMNS;
            SingleQuery<P>::add_values_heads(a.value.dtype, group.count, group.weights, rows + p * COLUMNS,
                                             known(keys, p), attention.D_v, group.outputs);
        }
    }

    // What makes weights of row r of a strip.
    T weight_factor(const RowTile<P>& tile, const Strip<P>& strip, int64_t r) const {
        const T sum = tile.row_sum[r];
        return sum == 0 ? T(0) : rescaling(strip.row_max[r], tile.row_max[r]) * attention.kept_factor() / sum;
    }

    void finish(const RowTile<P>& tile, const fused_mha_forward_arguments& call) const {
        const fused_mha_attention& a = attention.a;
        for (int64_t r = 0; r < tile.rows; ++r) {
            const int64_t i = tile.first + r;
            const T share = take_sink(tile, r), sum = tile.row_sum[r];
            void* row = row_of(call.output, tile.n, i, tile.h);
            if (sum == 0)  // hidden everywhere
                zero(row, attention.D_v * item_size(call.output.dtype));
            else
                unpack_row(tile.output + r * COLUMNS, tile.rows * COLUMNS, attention.D_v, share * attention.kept_factor() / sum,
                           call.output.dtype, row);
            if (a.stats.data) {
                *element<T>(a.stats, 0, tile.n, tile.h, i) = tile.row_max[r];
                *element<T>(a.stats, 1, tile.n, tile.h, i) = sum;
            }
            if (call.lse.data)
                *element<T>(call.lse, tile.n, tile.h, i) =
                    sum == 0 ? masking.lse_of_hidden(tile.h) : tile.row_max[r] * masking.score_factor + std::log(sum);
        }
    }

private:
    static constexpr int W = LANES<T>;
    const Attention<P>& attention;
    const Masking<T>& masking;
    const DropoutSeed seed;
    const bool keeps_weights;

    void score(const RowTile<P>& tile, const KeyTile<P>& keys, Strip<P>& strip) const {
        const int64_t steps = Panels<P>::steps(attention.D), A_WIDTH = Panels<P>::A_WIDTH;
        strip.active_count = 0;
        const void* rows[MOST_TILE_KEYS];
        if (attention.reads_in_place) rows_of_tile(attention.a.key, attention.a.bias_k, tile, keys, rows);
        for (int64_t p = 0; p < keys.count; ++p) {
            const KeyPanel& panel = keys.panels[p];
            const TileMask<T> mask = masking.look(tile.n, tile.h, tile.first, tile.rows, panel);
            if (mask.kind == mask.HIDDEN) continue;
            T* at = strip.scores + p * tile.rows * COLUMNS;
            if (attention.reads_in_place)
                SingleQuery<P>::score(attention.a.key.dtype, tile.query, rows + p * COLUMNS, known(keys, p),
                                  attention.D, at);
            else
                gemm_in_blocks<P>(
                    int(tile.rows), COLUMNS,
                    {tile.query, A_WIDTH, tile.rows * A_WIDTH, keys.keys + p * steps * COLUMNS, COLUMNS, at, steps, false});
            take_scores(mask, tile, keys, p, strip);
        }
    }

    // Masks the scores of one panel, draws what dropout keeps of them, and counts them in.
    void take_scores(const TileMask<T>& mask, const RowTile<P>& tile, const KeyTile<P>& keys, int64_t p, Strip<P>& strip) const {
        const KeyPanel& panel = keys.panels[p];
        if (mask.kind == mask.MASKED)
            masking.apply(mask, tile.n, tile.h, tile.first, tile.rows, panel, keys.padding + p * COLUMNS,
                          strip.scores + p * tile.rows * COLUMNS);
        if (attention.drops())
            attention.draw(seed, tile.n, tile.h, tile.first, tile.rows, panel, strip.kept + p * MR);
        strip.active[strip.active_count++] = p;
    }

    void rows_of_heads(const fused_mha_tensor& tensor, const fused_mha_tensor& bias, const HeadGroup<P>& group,
                       const int64_t* offsets, const int64_t* bias_offsets, const KeyTile<P>& keys, HeadRow* rows) const {
        const void* first[MOST_TILE_KEYS];
        rows_of_tile(tensor, bias, group.tiles[0], keys, first);
        for (int64_t c = 0; c < keys.count * COLUMNS; ++c) {
            const bool is_real = keys.panels[c / COLUMNS].first + c % COLUMNS < tensor.size[1];
            rows[c] = {static_cast<const char*>(first[c]), is_real ? offsets : bias_offsets};
        }
    }

    void add_exponentials(const RowTile<P>& tile, const Strip<P>& strip) const {
        for (int64_t r = 0; r < tile.rows; ++r)
            tile.row_sum[r] += attention.drops() ? exponentials<true>(tile, strip, r) : exponentials<false>(tile, strip, r);
    }

    // Takes the strip into row_max, and rescales what was summed up before; false if that was nothing: then `output` is
    // not initialised.
    bool raise_maxima(const RowTile<P>& tile, const Strip<P>& strip) const {
        const int64_t stride = tile.rows * COLUMNS, count = strip.active_count;
        const int64_t* const active = strip.active;
        bool has_output = false;
        for (int64_t r = 0; r < tile.rows; ++r) {
            has_output = has_output || tile.row_sum[r] != 0;
            const T* row = strip.scores + r * COLUMNS;
            Vec<T> most[2] = {splat(tile.row_max[r]), splat(tile.row_max[r])};
            for (int64_t s = 0; s < count; ++s)
                for (int v = 0; v < 2; ++v) most[v] = max(load(row + active[s] * stride + v * W), most[v]);
            strip.row_max[r] = reduce_max(max(most[0], most[1]));
        }
        for (int64_t r = 0; r < tile.rows; ++r) {
            if (has_output && strip.row_max[r] != tile.row_max[r]) {
                const T ratio = rescaling(tile.row_max[r], strip.row_max[r]);
                tile.row_sum[r] *= ratio;
                T* output = tile.output + r * COLUMNS;
                for (int64_t c = 0; c < attention.D_v; c += COLUMNS, output += stride)
                    for (int v = 0; v < 2; ++v) store(output + v * W, load(output + v * W) * splat(ratio));
            }
            tile.row_max[r] = strip.row_max[r];
        }
        return has_output;
    }

    // Takes the head's sink into the softmax of a row that sees a key, as one more key, of a value of zeros; what the output
    // so far is to be multiplied with. A row that sees none keeps its sum of 0, which the backward knows it by.
    T take_sink(const RowTile<P>& tile, int64_t r) const {
        const T sink = masking.sink(tile.h), row_max = tile.row_max[r];
        if (sink == Masking<T>::NEGATIVE_INFINITY || tile.row_sum[r] == 0) return 1;
        const T later = sink > row_max ? sink : row_max, share = rescaling(row_max, later);
        tile.row_max[r] = later;
        tile.row_sum[r] = tile.row_sum[r] * share + rescaling(sink, later);
        return share;
    }

    // -inf - -inf = NaN where every key was hidden so far
    static T shift(T row_max) { return row_max == Masking<T>::NEGATIVE_INFINITY ? T(0) : row_max; }
    // From exponentials relative to one maximum to those relative to a later one.
    T rescaling(T row_max, T later) const {
        return row_max == later ? T(1) : exp2(splat((row_max - shift(later)) * masking.exponent_factor))[0];
    }

    // Replaces the scores of row r by exp(score - row_max), dropped ones by 0, and returns the sum before dropout.
    template <bool DROPS>
    FMHA_INLINE T exponentials(const RowTile<P>& tile, const Strip<P>& strip, int64_t r) const {
        const int64_t stride = tile.rows * COLUMNS, count = strip.active_count;
        const int64_t* const active = strip.active;
        const uint32_t* const kept = strip.kept + r;
        T *const row = strip.scores + r * COLUMNS, *const rounded = strip.weights + r * (COLUMNS / 2);
        const Vec<T> shifts = splat(shift(tile.row_max[r])), factors = splat(masking.exponent_factor);
        const bool stores_scores = P::KSTEP == 1 || keeps_weights || attention.reads_in_place;
        Vec<T> sums[2] = {};
        for (int64_t s = 0; s < count; ++s) {
            const int64_t p = active[s];
            T* at = row + p * stride;
            Vec<T> x[2];
            for (int v = 0; v < 2; ++v) {
                x[v] = exp2((load(at + v * W) - shifts) * factors);
                sums[v] = sums[v] + x[v];
            }
            if (DROPS)
                for (int v = 0; v < 2; ++v) x[v] = select(~kept[p * MR] >> (v * W), x[v], Vec<T>{});
            if constexpr (P::KSTEP == 2) store(rounded + p * stride / 2, to_bfloat16(x[0], x[1]));
            if (stores_scores)
                for (int v = 0; v < 2; ++v) store(at + v * W, x[v]);
        }
        return reduce_add(sums[0] + sums[1]);
    }

    void add_values_in_place(const RowTile<P>& tile, const KeyTile<P>& keys, const Strip<P>& strip, bool accumulate) const {
        const void* rows[MOST_TILE_KEYS];
        rows_of_tile(attention.a.value, attention.a.bias_v, tile, keys, rows);
        for (int64_t s = 0; s < strip.active_count; ++s) {
            const int64_t p = strip.active[s];
            SingleQuery<P>::add_values(attention.a.value.dtype, strip.scores + p * COLUMNS, rows + p * COLUMNS,
                                   known(keys, p), attention.D_v, tile.output, accumulate || s > 0);
        }
    }

    // The keys of a tile from panel p on.
    int64_t known(const KeyTile<P>& keys, int64_t p) const {
        const int64_t last = keys.count - 1;
        return (last - p) * COLUMNS + min(masking.keys - keys.panels[last].first, COLUMNS);
    }

    void rows_of_tile(const fused_mha_tensor& tensor, const fused_mha_tensor& bias, const RowTile<P>& tile,
                      const KeyTile<P>& keys, const void** rows) const {
        for (int64_t p = 0; p < keys.count; ++p)
            attention.rows_of_panel(tensor, bias, tile.n, tile.h / attention.group, keys.panels[p], rows + p * COLUMNS);
    }

    void multiply_values(const RowTile<P>& tile, const KeyTile<P>& keys, const Strip<P>& strip, bool accumulate) const {
        if (attention.reads_in_place) return add_values_in_place(tile, keys, strip, accumulate);
        constexpr int64_t A_WIDTH = Panels<P>::A_WIDTH;
        for (int64_t s = 0; s < strip.active_count;) {
            const int64_t p = strip.active[s];
            int64_t run = 1;
            while (s + run < strip.active_count && strip.active[s + run] == p + run) ++run;
            for (int64_t c = 0; c < attention.D_v; c += COLUMNS)
                gemm<P>(int(tile.rows), attention.D_v - c,
                        {strip.weights + p * tile.rows * A_WIDTH, A_WIDTH, tile.rows * A_WIDTH,
                         keys.values + c / COLUMNS * keys.value_panel_stride() + p * A_WIDTH * COLUMNS, COLUMNS,
                         tile.output + c * tile.rows, run * A_WIDTH, accumulate});
            accumulate = true;
            s += run;
        }
    }
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
