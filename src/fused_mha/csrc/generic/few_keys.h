// Forward attention to a few keys, as pooling, cross-attention to a summary and very short sequences have them. A panel of
// keys would be all but empty: here the lanes of a vector are queries, up to COLUMNS of one head, or single queries of
// neighbouring heads. packed_sequences.h asks here first.
//
// S^T = K Q^T has the bits of the other path's Q K^T: both sum along D in one order, and Masking::scaled is one for both.
// So the backward, which computes the scores anew, fits the maxima and sums that are kept here.
#pragma once

#include "generic/attention.h"
#include "generic/single_query.h"

namespace fused_mha::FMHA_ISA {
namespace {

template <class P>
class FewKeys {
public:
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>;

    static bool serves(const Attention<P>& attention) { return attention.masking.keys > 0 && attention.masking.keys <= MOST; }

    FewKeys(const fused_mha_forward_arguments& call, const Attention<P>& attention)
        : call(call),
          attention(attention),
          keys(attention.masking.keys),
          takes_heads(attention.L == 1),
          averages(call.weights.data && call.attention.average_weights),
          tiles(ceil_div(attention.L, COLUMNS)),
          chunks{tiles, ceil_div(tiles, TILES_OF_TASK)} {
        Arena measure{0};
        Worker(*this, measure);
        own_bytes = measure.used;
    }

    int64_t tasks() const { return attention.N * chunks.parts; }
    int64_t shared_bytes() const { return 0; }
    int64_t worker_bytes() const { return own_bytes; }

    void place(uintptr_t) {}
    void prepare(uintptr_t) const {}
    void run_tasks(int64_t begin, int64_t end, uintptr_t own) const {
        Arena arena{own};
        Worker worker(*this, arena);
        for (int64_t index = begin; index < end; ++index)
            if (takes_heads)
                worker.attend_heads(index);
            else
                worker.attend(index % attention.N, chunks.begin(index / attention.N), chunks.size(index / attention.N));
    }

private:
    static constexpr int64_t TILES_OF_TASK = 8;  // whose rows stay in the second-level cache from head to head
    static constexpr int W = LANES<T>;
    static constexpr int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }
    static constexpr int64_t MOST = smallest(8, smallest(MR, COLUMNS));  // from 12 on, heads of 128 take a fifth longer
    const fused_mha_forward_arguments& call;
    const Attention<P>& attention;
    const int64_t keys;
    const bool takes_heads, averages;
    const int64_t tiles;  // of the queries of a head
    const Parts chunks;   // of tiles, one for each task
    int64_t own_bytes;

    // Which query a lane is.
    struct Lane {
        int64_t head, row;
    };

    class Worker {
    public:
        Worker(const FewKeys& few, Arena& arena)
            : few(few),
              attention(few.attention),
              a(attention.a),
              keys(few.keys),
              query_size(ceil_div(attention.D, COLUMNS) * COLUMNS),
              queries(arena.take<T>(COLUMNS * (few.takes_heads ? query_size : Panels<P>::steps(attention.D)))),
              packed_keys(arena.take<T>(few.takes_heads ? 0 : keys * Panels<P>::A_WIDTH * Panels<P>::panels(attention.D))),
              values(arena.take<T>(keys * ceil_div(attention.D_v, W) * W)),
              mean(arena.take<T>(few.averages ? min(few.tiles, TILES_OF_TASK) * keys * COLUMNS : 0)) {}

        // Some tiles of queries to the keys of every head.
        void attend(int64_t batch, int64_t first_tile, int64_t tiles) {
            start(batch, tiles);
            for (int64_t h = 0; h < attention.H; ++h) {
                if (h % attention.group == 0) pack(h / attention.group);
                for (int64_t t = 0; t < tiles; ++t) {
                    const int64_t row = (first_tile + t) * COLUMNS;
                    lanes = min(attention.L - row, COLUMNS);
                    for (int64_t i = 0; i < lanes; ++i) lane[i] = {h, row + i};
                    score(h, row);
                    take_softmax();
                    write_output(0, lanes);
                    write_statistics();
                    if (few.averages)
                        add_to_mean(mean + t * keys * COLUMNS);
                    else if (few.call.weights.data)
                        write_weights(scores);
                }
            }
            for (int64_t t = 0; few.averages && t < tiles; ++t) {
                const int64_t row = (first_tile + t) * COLUMNS;
                lanes = min(attention.L - row, COLUMNS);
                for (int64_t i = 0; i < lanes; ++i) lane[i] = {0, row + i};
                write_weights(mean + t * keys * COLUMNS);
            }
        }

        // The only query of every head to its keys.
        void attend_heads(int64_t batch) {
            start(batch, 1);
            for (int64_t first = 0; first < attention.H; first += COLUMNS) {
                lanes = min(attention.H - first, COLUMNS);
                for (int64_t i = 0; i < lanes; ++i) lane[i] = {first + i, 0};
                score_heads();
                take_softmax();
                for (int64_t i = 0; i < lanes; ++i) {
                    if (i == 0 || lane[i].head % attention.group == 0) pack_values(lane[i].head / attention.group);
                    write_output(i, i + 1);
                }
                write_statistics();
                if (few.averages)
                    add_to_mean(mean);
                else if (few.call.weights.data)
                    write_weights(scores);
            }
            if (!few.averages) return;
            for (int64_t j = 0; j < keys; ++j) {
                T* const of_key = mean + j * COLUMNS;
                of_key[0] = reduce_add(load(of_key) + load(of_key + W));
            }
            lanes = 1;
            write_weights(mean);
        }

    private:
        const FewKeys& few;
        const Attention<P>& attention;
        const fused_mha_attention& a;
        const int64_t keys, query_size;
        T *const queries, *const packed_keys;  // [step along D][COLUMNS], [panel of D][key][A_WIDTH]; or [lane][query_size]
        T* const values;                       // [vector of D_v][key][W]
        T* const mean;                         // [tile][key][COLUMNS]
        int64_t n, lanes;
        KeyPanel panel;
        Lane lane[COLUMNS];
        T padding[COLUMNS], scores[MOST * COLUMNS];  // [key][lane]; after the softmax, the weights
        T maxima[COLUMNS], sums[COLUMNS];

        int64_t vectors() const { return lanes > W ? 2 : 1; }

        void start(int64_t batch, int64_t tiles) {
            n = batch;
            if (attention.masking.visible_panels(n, &panel, 0, 1) == 0) panel = {0, ~uint32_t(0)};
            if (attention.masking.adds_padding()) attention.masking.padding_values(n, 0, padding);
            if (few.averages) zero(mean, tiles * keys * COLUMNS * int64_t(sizeof(T)));
        }

        void pack(int64_t head) {
            const void* rows[COLUMNS];
            attention.rows_of_panel(a.key, a.bias_k, n, head, panel, rows);
            Panels<P>::pack_a(a.key.dtype, rows, keys, attention.D, packed_keys);
            pack_values(head);
        }
        void pack_values(int64_t head) {
            const void* rows[COLUMNS];
            attention.rows_of_panel(a.value, a.bias_v, n, head, panel, rows);
            with_data<T>(a.value.dtype, [&](auto data) {
                pack_rows_of<T, decltype(data), W>(rows, keys, attention.D_v, values, keys * W);
            });
        }

        void score(int64_t head, int64_t row) {
            const void* rows[COLUMNS];
            for (int64_t i = 0; i < COLUMNS; ++i) rows[i] = i < lanes ? row_of(a.query, n, row + i, head) : nullptr;
            Panels<P>::pack_b_transposed(a.query.dtype, rows, attention.D, queries, lanes);
            constexpr int64_t A_WIDTH = Panels<P>::A_WIDTH;
            gemm_in_blocks<P>(int(keys), vectors() * W, {packed_keys, A_WIDTH, keys * A_WIDTH, queries, COLUMNS, scores,
                                                         Panels<P>::steps(attention.D), false});
        }

        void score_heads() {
            const T* of_lanes[COLUMNS];
            const void* rows[MOST][COLUMNS] = {};
            for (int64_t i = 0; i < COLUMNS; ++i) {
                T* const query = queries + min(i, lanes - 1) * query_size;
                of_lanes[i] = query;
                if (i >= lanes) continue;
                const int64_t head = lane[i].head;
                SingleQuery<P>::unpack(a.query.dtype, row_of(a.query, n, 0, head), attention.D, query);
                for (int64_t j = 0; j < keys; ++j)
                    if (!(panel.hidden >> j & 1)) rows[j][i] = key_row(a.key, a.bias_k, n, j, head / attention.group);
            }
            for (int64_t j = 0; j < keys; ++j)
                for (int64_t v = 0; v < vectors(); ++v)
                    SingleQuery<P>::score_each(a.key.dtype, of_lanes + v * W, rows[j] + v * W, attention.D,
                                               scores + j * COLUMNS + v * W);
        }

        // For each key the lanes that do not see it, and those where dropout takes its weight, as bits.
        void look(uint32_t (&hidden)[MOST], uint32_t (&dropped)[MOST]) const {
            for (uint32_t& of_key : hidden) of_key = ~column_bits(0, lanes - 1, COLUMNS);
            for (uint32_t& of_key : dropped) of_key = 0;
            for (int64_t i = 0, count; i < lanes; i += count) {
                count = few.takes_heads ? 1 : min(lanes - i, MR);
                const TileMask<T> mask = attention.masking.look(n, lane[i].head, lane[i].row, count, panel);
                const auto mark = [&](uint32_t (&of_keys)[MOST], int64_t r, uint32_t bits) {
                    for (int64_t j = 0; j < keys; ++j) of_keys[j] |= (bits >> j & 1) << (i + r);
                };
                for (int64_t r = 0; mask.kind != mask.PLAIN && r < count; ++r)
                    mark(hidden, r, mask.kind == mask.HIDDEN ? ~uint32_t(0) : mask.hidden[r]);
                if (!attention.drops()) continue;
                uint32_t kept[MR];
                attention.draw(attention.seed(), n, lane[i].head, lane[i].row, count, panel, kept);
                for (int64_t r = 0; r < count; ++r) mark(dropped, r, ~kept[r]);
            }
        }

        void take_softmax() {
            const Masking<T>& masking = attention.masking;
            uint32_t hidden[MOST], dropped[MOST];
            look(hidden, dropped);
            T sinks[COLUMNS];
            for (int64_t i = 0; i < COLUMNS; ++i) sinks[i] = masking.sink(lane[min(i, lanes - 1)].head);
            for (int64_t j = 0; j < keys; ++j) {
                T added[COLUMNS] = {};
                if ((masking.adds_mask() || masking.has_alibi()) && j < masking.S)
                    for (int64_t i = 0; i < lanes; ++i) added[i] = masking.added(n, lane[i].head, lane[i].row, j);
                for (int64_t v = 0; v < vectors(); ++v) {
                    T* const at = scores + j * COLUMNS + v * W;
                    Vec<T> x = load(at), derivative;
                    if (masking.caps()) x = masking.capped(x, derivative);
                    if (masking.natural)
                        x = masking.scaled(x, load(added + v * W), masking.adds_padding() ? splat(padding[j]) : Vec<T>{});
                    store(at, select(hidden[j] >> (v * W), x, splat(Masking<T>::NEGATIVE_INFINITY)));
                }
            }
            for (int64_t v = 0; v < vectors(); ++v) {
                T* const of_vector = scores + v * W;
                const Vec<T> sink = load(sinks + v * W);
                Vec<T> most = splat(Masking<T>::NEGATIVE_INFINITY);
                for (int64_t j = 0; j < keys; ++j) most = max(load(of_vector + j * COLUMNS), most);
                // -inf - -inf = NaN where every key is hidden; the backward knows such a row by a sum of 0, also with a sink
                const auto is_hidden = most == splat(Masking<T>::NEGATIVE_INFINITY);
                most = is_hidden ? most : max(most, sink);
                const Vec<T> shift = is_hidden ? Vec<T>{} : most;
                Vec<T> sum = is_hidden ? Vec<T>{} : exp2((sink - shift) * splat(masking.exponent_factor));
                for (int64_t j = 0; j < keys; ++j) {
                    T* const at = of_vector + j * COLUMNS;
                    const Vec<T> x = exp2((load(at) - shift) * splat(masking.exponent_factor));
                    sum = sum + x;
                    store(at, x);
                }
                const Vec<T> factor = sum == Vec<T>{} ? Vec<T>{} : splat(attention.kept_factor()) / sum;
                for (int64_t j = 0; j < keys; ++j) {
                    T* const at = of_vector + j * COLUMNS;
                    store(at, select(dropped[j] >> (v * W), load(at) * factor, Vec<T>{}));
                }
                store(maxima + v * W, most);
                store(sums + v * W, sum);
            }
        }

        // Rows of the output of some lanes, whose values are packed.
        void write_output(int64_t first, int64_t end) const {
            with_data<T>(few.call.output.dtype, [&](auto data) {
                using Data = decltype(data);
                for (int64_t i = first; i < end; ++i) {
                    void* const row = row_of(few.call.output, n, lane[i].row, lane[i].head);
                    if (sums[i] == 0) {  // also where a value is NaN
                        zero(row, attention.D_v * item_size(few.call.output.dtype));
                        continue;
                    }
                    const T* value = values;
                    for (int64_t c = 0; c < attention.D_v; c += W) {
                        Vec<T> x = {};
                        for (int64_t j = 0; j < keys; ++j, value += W) x = splat(scores[j * COLUMNS + i]) * load(value) + x;
                        store_some<T, Data>(static_cast<typename Data::Stored*>(row) + c, x, attention.D_v - c);
                    }
                }
            });
        }

        void write_statistics() const {
            for (int64_t i = 0; a.stats.data && i < lanes; ++i) {
                *element<T>(a.stats, 0, n, lane[i].head, lane[i].row) = maxima[i];
                *element<T>(a.stats, 1, n, lane[i].head, lane[i].row) = sums[i];
            }
            for (int64_t i = 0; few.call.lse.data && i < lanes; ++i)
                *element<T>(few.call.lse, n, lane[i].head, lane[i].row) =
                    sums[i] == 0 ? attention.masking.lse_of_hidden(lane[i].head)
                                 : maxima[i] * attention.masking.score_factor + std::log(sums[i]);
        }

        void add_to_mean(T* of_tile) const {
            const Vec<T> share = splat(T(1) / T(attention.H));
            for (int64_t j = 0; j < keys; ++j)
                for (int64_t v = 0; v < vectors(); ++v) {
                    T* const at = of_tile + j * COLUMNS + v * W;
                    store(at, load(scores + j * COLUMNS + v * W) * share + load(at));
                }
        }

        // The weights of the lanes, or their means over heads.
        void write_weights(const T* from) const {
            const fused_mha_tensor& weights = few.call.weights;
            with_data<T>(weights.dtype, [&](auto data) {
                using Data = decltype(data);
                for (int64_t i = 0; i < lanes; ++i) {
                    const int64_t index = few.averages ? 0 : index_of_weights(a, lane[i].head);
                    if (index < 0) continue;
                    void* const row = few.averages ? row_of(weights, n, lane[i].row, 0)
                                                   : row_of(weights, n, index, lane[i].row);
                    for (int64_t first = 0; first < keys; first += W) {
                        T of_row[W] = {};
                        for (int64_t j = first; j < min(first + W, keys); ++j) of_row[j - first] = from[j * COLUMNS + i];
                        store_some<T, Data>(static_cast<typename Data::Stored*>(row) + first, load(of_row), keys - first);
                    }
                }
            });
        }
    };
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
