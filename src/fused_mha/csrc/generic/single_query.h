// Products of a single query with keys and values where they lie: in decoding memory sets the pace, and packing costs as
// much as attending from some rows. Forward, backward and delta call this, and all three must: the backward computes P from
// the scores and from the forward's maximum and sum, which fit no other rounding.
#pragma once

#include "generic/attention.h"

namespace fused_mha::FMHA_ISA {
namespace {

// The rows of one key (or value) of several heads; none where it is hidden, or of zeros.
struct HeadRow {
    const char* first;
    const int64_t* offsets;  // in bytes, by heads
    FMHA_INLINE const void* of(int64_t h) const { return first ? first + offsets[h] : nullptr; }
};

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
            for (int64_t j = 0; j < COLUMNS; ++j) prefetch_ahead<Data>(keys, known, j, columns);
            for (int64_t j = 0; j < COLUMNS; j += W) {
                const auto query_of = [&](int) { return query; };
                const auto key_of = [&](int i) { return keys[j + i]; };
                store(scores + j, dots<Data>(columns, query_of, key_of));
            }
        });
    }

    // The same for W pairs of a query and a key: scores[i] = queries[i] . keys[i].
    static void score_each(int64_t dtype, const T* const* queries, const void* const* keys, int64_t columns, T* scores) {
        with_data<T>(dtype, [&](auto data) {
            const auto query_of = [&](int i) { return queries[i]; };
            const auto key_of = [&](int i) { return keys[i]; };
            store(scores, dots<decltype(data)>(columns, query_of, key_of));
        });
    }

    // The same for many heads at once, in the order in which their keys lie: scores[h][j] = queries[h] . keys[j][h].
    static void score_heads(int64_t dtype, int64_t heads, const T* const* queries, const HeadRow* keys, int64_t known,
                            int64_t columns, T* const* scores) {
        const int64_t ahead = rows_ahead(dtype, heads, columns);
        with_data<T>(dtype, [&](auto data) {
            using Data = decltype(data);
            for (int64_t j = 0; j < COLUMNS; j += W)
                for (int64_t first = 0; first < heads; first += W) {
                    const int64_t some = min(heads - first, W);
                    const auto query_of = [&](int i) { return queries[first + min(i, some - 1)]; };
                    Vec<T> block[W] = {};
                    for (int64_t k = 0; k < min(W, known - j); ++k) {
                        const HeadRow key = keys[j + k];
                        if (first == 0 && j + k + ahead < known) prefetch_heads<Data>(keys[j + k + ahead], heads, columns);
                        block[k] = dots<Data>(columns, query_of, [&](int i) { return i < some ? key.of(first + i) : nullptr; });
                    }
                    transpose_steps<Vec<T>, W, W / 2>(block);
                    for (int64_t h = 0; h < some; ++h) store(scores[first + h] + j, block[h]);
                }
        });
    }

    // output (+)= the sum of weights[j] * values[j] over a panel; `columns` rounded up to whole panels are written.
    static void add_values(int64_t dtype, const T* weights, const void* const* values, int64_t known, int64_t columns,
                           T* output, bool accumulate) {
        with_data<T>(dtype, [&](auto data) {
            using Data = decltype(data);
            for (int64_t j = 0; j < COLUMNS; ++j) prefetch_ahead<Data>(values, known, j, columns);
            add_rows<Data, COLUMNS>(weights, values, columns, output, accumulate);
        });
    }

    // The same for many heads at once: outputs[h] += the sum of weights[h][j] * values[j][h].
    static void add_values_heads(int64_t dtype, int64_t heads, const T* const* weights, const HeadRow* values, int64_t known,
                                 int64_t columns, T* const* outputs) {
        const int64_t ahead = rows_ahead(dtype, heads, columns);
        with_data<T>(dtype, [&](auto data) {
            using Data = decltype(data);
            for (int64_t j = 0; j < min(COLUMNS, known); j += ROWS_AT_ONCE)
                for (int64_t h = 0; h < heads; ++h) {
                    const void* rows[ROWS_AT_ONCE];
                    for (int i = 0; i < ROWS_AT_ONCE; ++i) {
                        rows[i] = values[j + i].of(h);
                        if (j + i + ahead < known) prefetch<Data>(values[j + i + ahead].of(h), columns);
                    }
                    add_rows<Data, ROWS_AT_ONCE>(weights[h] + j, rows, columns, outputs[h], true);
                }
        });
    }

private:
    static constexpr int MOST_VECTORS = 8, AHEAD = 32, ROWS_AT_ONCE = 4;
    static constexpr int64_t BYTES_AHEAD = 12 * 1024;

    // How many rows of all heads before its turn one is fetched: the processor's own prefetching does not follow them.
    static int64_t rows_ahead(int64_t dtype, int64_t heads, int64_t columns) {
        return max(BYTES_AHEAD / max(heads * columns * item_size(dtype), 1), 1);
    }
    template <class Data>
    static FMHA_INLINE void prefetch(const void* row, int64_t columns) {
        prefetch_rows<TO_FIRST_LEVEL>(&row, 1, columns * int64_t(sizeof(typename Data::Stored)));
    }
    template <class Data>
    static FMHA_INLINE void prefetch_heads(const HeadRow& row, int64_t heads, int64_t columns) {
        const void* before = nullptr;
        for (int64_t h = 0; h < heads; ++h)
            if (const void* at = row.of(h); at != before) {
                prefetch<Data>(at, columns);
                before = at;
            }
    }

    template <class Data>
    static FMHA_INLINE void prefetch_ahead(const void* const* rows, int64_t known, int64_t j, int64_t columns) {
        if (j + AHEAD < known) prefetch<Data>(rows[j + AHEAD], columns);
    }

    // W dot products; 0 where there is no key.
    template <class Data, class Q, class K>
    static FMHA_INLINE Vec<T> dots(int64_t columns, const Q& query_of, const K& key_of) {
        switch (columns) {
            case 2 * W: return dots_of<Data, 2>(query_of, key_of);
            case 4 * W: return dots_of<Data, 4>(query_of, key_of);
            case 8 * W: return dots_of<Data, 8>(query_of, key_of);
        }
        Vec<T> sums[W];
        for (int i = 0; i < W; ++i) {
            const auto* key = static_cast<const typename Data::Stored*>(key_of(i));
            sums[i] = Vec<T>{};
            for (int64_t c = 0; key && c < columns; c += W)
                sums[i] = sums[i] + load(query_of(i) + c) * load_some<T, Data>(key + c, columns - c);
        }
        return sum_lanes<T>(sums);
    }
    template <class Data, int VECTORS, class Q, class K>
    static FMHA_INLINE Vec<T> dots_of(const Q& query_of, const K& key_of) {
        Vec<T> sums[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
            const auto* key = static_cast<const typename Data::Stored*>(key_of(i));
            sums[i] = Vec<T>{};
            if (key)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v)
                    sums[i] = sums[i] + load(query_of(i) + v * W) * Data::load(key + v * W);
        }
        return sum_lanes<T>(sums);
    }
    template <class Data, int ROWS>
    static FMHA_INLINE void add_rows(const T* weights, const void* const* values, int64_t columns, T* output,
                                     bool accumulate) {
        int64_t c = 0;
        for (; c + MOST_VECTORS * W <= columns; c += MOST_VECTORS * W)
            add_columns<Data, ROWS, MOST_VECTORS>(weights, values, c, columns, output, accumulate);
        for (; c + 4 * W <= columns; c += 4 * W)
            add_columns<Data, ROWS, 4>(weights, values, c, columns, output, accumulate);
        for (; c < columns; c += COLUMNS) add_columns<Data, ROWS, 2>(weights, values, c, columns, output, accumulate);
    }

    template <class Data, int ROWS, int VECTORS>
    static FMHA_INLINE void add_columns(const T* weights, const void* const* values, int64_t first, int64_t columns,
                                        T* output, bool accumulate) {
        Vec<T> sums[VECTORS] = {};
        if (accumulate)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sums[v] = load(output + first + v * W);
        for (int64_t j = 0; j < ROWS; ++j) {
            const auto* value = static_cast<const typename Data::Stored*>(values[j]);
            if (!value) continue;
            const Vec<T> weight = splat(weights[j]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) {
                const int64_t c = first + v * W;
                if (VECTORS > 2)
                    sums[v] = sums[v] + weight * Data::load(value + c);
                else if (c < columns)
                    sums[v] = sums[v] + weight * load_some<T, Data>(value + c, columns - c);
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) store(output + first + v * W, sums[v]);
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
