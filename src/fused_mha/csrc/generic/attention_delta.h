// delta = rowsum(P * dP), which the backward subtracts from dP: rowsum(dO * O), less the gradient of the log-sum-exp.
//
// A gradient that arrives through the returned weights W adds rowsum(G * W), G being it, or its share of a head for
// averaged weights; for that alone the weights are computed a second time, in a pass of its own.
#pragma once

#include "generic/single_query.h"
#include "parallel.h"

namespace fused_mha::FMHA_ISA {
namespace {

template <class P>
class Delta {
public:
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>;

    Delta(const Attention<P>& attention, const fused_mha_backward_arguments& call)
        : attention(attention), call(call), all_panels(ceil_div(attention.masking.keys, COLUMNS)) {}

    int64_t worker_bytes() const {
        Arena measure{0};
        Worker(*this, measure);
        return measure.used;
    }

    // deltas: [n][h][i].
    void run(T* deltas, uintptr_t workspace) const {
        const int64_t bytes = worker_bytes(), chunks = ceil_div(attention.row_tiles, TILES_OF_TASK);
        const Parts parts{attention.row_tiles, max(chunks, 1)};
        auto task = [&](int64_t index, int64_t worker) {
            const unsigned before = flush_subnormals(call.attention);
            Arena arena{workspace + uintptr_t(worker * bytes)};
            const int64_t nh = index % (attention.N * attention.H), part = index / (attention.N * attention.H);
            Worker(*this, arena).run(nh / attention.H, nh % attention.H, parts.begin(part), parts.begin(part + 1),
                                     deltas + nh * attention.L);
            keep_subnormals(call.attention, before);
            release_tiles();
        };
        fused_mha::run(attention.N * attention.H * chunks, call.attention.threads, task);
    }

    // The part that needs no weights.
    T of_output(int64_t n, int64_t h, int64_t i) const {
        Vec<T> sum{};
        const void *output = row_of(call.output, n, i, h), *grad = row_of(call.grad_output, n, i, h);
        with_data<T>(call.output.dtype, [&](auto data) {
            using Data = decltype(data);
            const auto *o = static_cast<const typename Data::Stored*>(output),
                       *g = static_cast<const typename Data::Stored*>(grad);
            for (int64_t c = 0; c < attention.D_v; c += LANES<T>)
                sum = sum + load_some<T, Data>(o + c, attention.D_v - c) * load_some<T, Data>(g + c, attention.D_v - c);
        });
        return reduce_add(sum);
    }

    // The gradient of the log-sum-exp, which delta is less.
    T of_lse(int64_t n, int64_t h, int64_t i) const {
        return call.grad_lse.data ? *element<T>(call.grad_lse, n, h, i) : T(0);
    }

    // The gradient of the weights of one row from column j on, a vector with zeros behind the last column; `index` is that
    // of the head's weights.
    FMHA_INLINE Vec<T> grad_of_weights(int64_t n, int64_t index, int64_t i, int64_t j) const {
        const fused_mha_tensor& grad = call.grad_weights;
        const int64_t left = attention.masking.keys - j;
        if (left <= 0) return Vec<T>{};
        const bool averages = attention.a.average_weights != 0;
        const char* row = static_cast<const char*>(averages ? row_of(grad, n, i, 0) : row_of(grad, n, index, i));
        Vec<T> values{};
        with_data<T>(grad.dtype, [&](auto data) {
            using Data = decltype(data);
            values = load_some<T, Data>(reinterpret_cast<const typename Data::Stored*>(row) + j, left);
        });
        return averages ? values * splat(T(1) / T(attention.H)) : values;
    }

private:
    static constexpr int64_t TILES_OF_TASK = 16;
    const Attention<P>& attention;
    const fused_mha_backward_arguments& call;
    const int64_t all_panels;

    class Worker {
    public:
        Worker(const Delta& delta, Arena& arena)
            : delta(delta), attention(delta.attention), seed(attention.seed()) {
            panels = arena.take<KeyPanel>(delta.all_panels);
            keys = arena.take<T>(Panels<P>::steps(attention.D) * COLUMNS);
            queries = arena.take<T>(TILES_OF_TASK * query_size());
            scores = arena.take<T>(MR * COLUMNS);
        }

        void run(int64_t n, int64_t h, int64_t first_tile, int64_t last_tile, T* deltas) {
            const Parts rows = attention.rows_of_head();
            for (int64_t i = rows.begin(first_tile); i < rows.begin(last_tile); ++i)
                deltas[i] = delta.of_output(n, h, i) - delta.of_lse(n, h, i);
            index = index_of_weights(attention.a, h);
            if (index >= 0) add_weights(n, h, first_tile, last_tile, deltas);
        }

    private:
        static constexpr int W = LANES<T>;
        const Delta& delta;
        const Attention<P>& attention;
        const DropoutSeed seed;
        int64_t index;  // of the head's weights
        KeyPanel* panels;
        T *keys, *queries, *scores;

        int64_t query_size() const { return MR * Panels<P>::A_WIDTH * Panels<P>::panels(attention.D); }

        void add_weights(int64_t n, int64_t h, int64_t first_tile, int64_t last_tile, T* deltas) {
            const fused_mha_attention& a = attention.a;
            const Parts parts = attention.rows_of_head();
            for (int64_t t = first_tile; t < last_tile; ++t) {
                const void* rows[MR];
                for (int64_t r = 0; r < parts.size(t); ++r) rows[r] = row_of(a.query, n, parts.begin(t) + r, h);
                if (attention.reads_in_place)
                    SingleQuery<P>::unpack(a.query.dtype, rows[0], attention.D, query_of(t - first_tile));
                else
                    Panels<P>::pack_a(a.query.dtype, rows, parts.size(t), attention.D, query_of(t - first_tile));
            }
            const int64_t count = attention.masking.visible_panels(n, panels, 0, delta.all_panels);
            for (int64_t p = 0; p < count; ++p) {
                const void* rows[COLUMNS];
                attention.rows_of_panel(a.key, a.bias_k, n, h / attention.group, panels[p], rows);
                if (!attention.reads_in_place) Panels<P>::pack_b_transposed(a.key.dtype, rows, attention.D, keys);
                T padding[COLUMNS];
                if (attention.masking.adds_padding()) attention.masking.padding_values(n, panels[p].first, padding);
                for (int64_t t = first_tile; t < last_tile; ++t)
                    add_weights_of(n, h, parts.begin(t), parts.size(t), query_of(t - first_tile), panels[p], padding, deltas);
            }
        }
        T* query_of(int64_t tile) const { return queries + tile * query_size(); }

        void add_weights_of(int64_t n, int64_t h, int64_t first, int64_t rows, const T* query, const KeyPanel& panel,
                            const T* padding, T* deltas) {
            const TileMask<T> mask = attention.masking.look(n, h, first, rows, panel);
            if (mask.kind == mask.HIDDEN) return;
            constexpr int64_t A_WIDTH = Panels<P>::A_WIDTH;
            if (attention.reads_in_place)
                score_in_place(attention, n, h, panel, query, scores);
            else
                gemm_in_blocks<P>(
                    int(rows), COLUMNS,
                    {query, A_WIDTH, rows * A_WIDTH, keys, COLUMNS, scores, Panels<P>::steps(attention.D), false});
            if (mask.kind == mask.MASKED) attention.masking.apply(mask, n, h, first, rows, panel, padding, scores);
            uint32_t kept[MR];
            for (uint32_t& columns : kept) columns = ~0u;
            if (attention.drops()) attention.draw(seed, n, h, first, rows, panel, kept);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t i = first + r;
                const T sum = *element<T>(attention.a.stats, 1, n, h, i);
                if (sum == 0) continue;
                const Vec<T> shift = splat(*element<T>(attention.a.stats, 0, n, h, i));
                Vec<T> total{};
                for (int v = 0; v < 2; ++v) {
                    const Vec<T> x = exp2((load(scores + r * COLUMNS + v * W) - shift) * splat(attention.masking.exponent_factor));
                    total = total + select(~kept[r] >> (v * W), x * delta.grad_of_weights(n, index, i, panel.first + v * W), Vec<T>{});
                }
                deltas[i] += reduce_add(total) * (attention.kept_factor() / sum);
            }
        }
    };
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
