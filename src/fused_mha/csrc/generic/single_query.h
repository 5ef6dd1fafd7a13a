// Products of a single query with keys and values where they lie: in decoding memory sets the pace, and packing costs as
// much as attending from some rows. Forward, backward and delta call this, and all three must: the backward computes P from
// the scores and from the forward's maximum and sum, which fit no other rounding.
#pragma once

#include "generic/attention.h"

namespace fused_mha::FMHA_ISA {
namespace {

template <class P>
struct SingleQuery {
    using T = typename P::Accumulator;
    static constexpr int W = LANES<T>, COLUMNS = NR<T>;

    // The query as accumulators, zeros up to the end of its last panel.
    static void unpack(int64_t dtype, const void* row, int64_t columns, T* to) {
        with_data<T>(dtype, [&](auto data) { pack_rows_of<T, decltype(data), COLUMNS>(&row, 1, columns, to, COLUMNS); });
    }

    // scores[j] = query . keys[j] for a panel of keys; 0 where there is none. `known` counts these keys and those
    // of the panels behind.
    static void score(int64_t dtype, const T* query, const void* const* keys, int64_t known, int64_t columns, T* scores) {
        with_data<T>(dtype, [&](auto data) {
            using Data = decltype(data);
            for (int64_t j = 0; j < COLUMNS; ++j) {
                const auto* key = static_cast<const typename Data::Stored*>(keys[j]);
                prefetch_ahead<Data>(keys, known, j, columns);
                Vec<T> sums[2] = {};
                if (key)
                    for (int64_t c = 0; c < columns; c += COLUMNS) {
                        sums[0] = sums[0] + load(query + c) * load_some<T, Data>(key + c, columns - c);
                        if (c + W < columns)
                            sums[1] = sums[1] + load(query + c + W) * load_some<T, Data>(key + c + W, columns - c - W);
                    }
                scores[j] = reduce_add(sums[0] + sums[1]);
            }
        });
    }

    // output (+)= the sum of weights[j] * values[j] over a panel; `columns` rounded up to whole panels are written.
    static void add_values(int64_t dtype, const T* weights, const void* const* values, int64_t known, int64_t columns,
                           T* output, bool accumulate) {
        with_data<T>(dtype, [&](auto data) {
            using Data = decltype(data);
            for (int64_t j = 0; j < COLUMNS; ++j) prefetch_ahead<Data>(values, known, j, columns);
            const int64_t whole = columns / (MOST_VECTORS * W) * (MOST_VECTORS * W);
            for (int64_t c = 0; c < whole; c += MOST_VECTORS * W)
                add_columns<Data, MOST_VECTORS>(weights, values, c, columns, output, accumulate);
            for (int64_t c = whole; c < columns; c += COLUMNS)
                add_columns<Data, 2>(weights, values, c, columns, output, accumulate);
        });
    }

private:
    static constexpr int MOST_VECTORS = 8, AHEAD = 32;

    template <class Data>
    static FMHA_INLINE void prefetch_ahead(const void* const* rows, int64_t known, int64_t j, int64_t columns) {
        if (j + AHEAD >= known) return;
        prefetch_rows<TO_FIRST_LEVEL>(rows + j + AHEAD, 1, columns * int64_t(sizeof(typename Data::Stored)));
    }

    template <class Data, int VECTORS>
    static FMHA_INLINE void add_columns(const T* weights, const void* const* values, int64_t first, int64_t columns,
                                        T* output, bool accumulate) {
        Vec<T> sums[VECTORS] = {};
        for (int64_t j = 0; j < COLUMNS; ++j) {
            const auto* value = static_cast<const typename Data::Stored*>(values[j]);
            if (!value) continue;
            const Vec<T> weight = splat(weights[j]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) {
                const int64_t c = first + v * W;
                if (VECTORS == MOST_VECTORS)
                    sums[v] = sums[v] + weight * Data::load(value + c);
                else if (c < columns)
                    sums[v] = sums[v] + weight * load_some<T, Data>(value + c, columns - c);
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            T* const at = output + first + v * W;
            store(at, accumulate ? load(at) + sums[v] : sums[v]);
        }
    }
};

// The scores of one panel of keys, for a query that `SingleQuery::unpack` made.
template <class P>
void score_in_place(const Attention<P>& attention, int64_t n, int64_t h, const KeyPanel& panel,
                    const typename P::Accumulator* query, typename P::Accumulator* scores) {
    const fused_mha_attention& a = attention.a;
    const void* keys[NR<typename P::Accumulator>];
    attention.rows_of_panel(a.key, a.bias_k, n, h / attention.group, panel, keys);
    SingleQuery<P>::score(a.key.dtype, query, keys, NR<typename P::Accumulator>, attention.D, scores);
}

}  // namespace
}  // namespace fused_mha::FMHA_ISA
