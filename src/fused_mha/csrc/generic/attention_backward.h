// Backward attention (Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 2): P is computed again from the saved row
// maxima and sums, and dS = P * (dP - delta) gives dQ = dS K, dK = dS^T Q and dV = P^T dO. packed_sequences.h calls it.
//
// Here are the walk over the blocks of rows, dQ and the gradients of masks; backward_plan.h says how the work is divided,
// backward_rows.h has P and dS, backward_keys.h dK and dV.
#pragma once

#include "generic/backward_rows.h"

namespace fused_mha::FMHA_ISA {
namespace {

template <class P>
class Backward {
public:
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>;

    Backward(const fused_mha_backward_arguments& call, const Attention<P>& attention) : plan(call, attention) {
        Arena measure{0};
        Worker(plan, measure);
        own_bytes = max(measure.used, plan.needs_deltas ? plan.delta.worker_bytes() : 0);
        place(0);
    }

    int64_t tasks() const { return plan.lanes * plan.chunks; }
    int64_t shared_bytes() const { return common_bytes; }
    int64_t worker_bytes() const { return own_bytes; }

    void place(uintptr_t shared) {
        Arena arena{shared};
        plan.take_shared(arena);
        common_bytes = arena.used;
    }
    void prepare(uintptr_t own) const {
        if (plan.needs_deltas) plan.delta.run(plan.deltas, own);
        plan.reset_tickets();
    }
    // Chunk by chunk: a task waits for the chunk before, which most often is done.
    void run_tasks(int64_t begin, int64_t end, uintptr_t own) const {
        Arena arena{own};
        Worker worker(plan, arena);
        for (int64_t index = begin; index < end; ++index) worker.run(index % plan.lanes, index / plan.lanes);
    }

private:
    BackwardPlan<P> plan;
    int64_t own_bytes, common_bytes;

    class Worker {
    public:
        Worker(const BackwardPlan<P>& plan, Arena& arena)
            : plan(plan),
              attention(plan.attention),
              masking(attention.masking),
              chunk(plan, arena),
              block(plan, arena),
              active(arena.take<int64_t>(plan.chunk_panels)),
              query_block(arena.take<T>(plan.block_size())),
              column_sums(arena.take<T>(plan.call.grad_columns.data ? plan.chunk_rows() : 0)),
              distance_sums(arena.take<T>(plan.call.grad_distances.data ? plan.chunk_rows() : 0)) {}

        void run(int64_t lane, int64_t chunk_index) {
            const int64_t n = lane / attention.H_kv, head = lane % attention.H_kv;
            chunk.pack(n, head, chunk_index);
            for (int64_t h = head * attention.group; h < (head + 1) * attention.group; ++h) {
                const int64_t bytes = chunk.count * COLUMNS * int64_t(sizeof(T));
                if (plan.call.grad_columns.data) zero(column_sums, bytes);
                if (plan.call.grad_distances.data) zero(distance_sums, bytes);
                const bool sums_sink = plan.call.grad_sinks.data && chunk_index == 0;
                T of_sink = 0;
                for (int64_t index = 0; index < plan.blocks.parts; ++index) {
                    block.place(n, h, index);
                    active_count = 0;
                    const bool counts = sees_any();
                    if (counts || sums_sink) block.pack();
                    int32_t* const ticket = plan.mask_ticket(n, h, chunk_index, index);
                    const int32_t rank = plan.mask_rank(n, h);
                    if (ticket) wait_for(ticket, rank);
                    if (counts) go_back();
                    if (sums_sink) of_sink += block.grad_of_sink();
                    if (ticket) pass_on(ticket, rank + 1);
                    add_to_query();
                }
                if (sums_sink) *element<T>(plan.call.grad_sinks, n, h) = of_sink;
                if (plan.call.grad_columns.data) write_columns(column_sums, element<T>(plan.call.grad_columns, n, h));
                if (plan.call.grad_distances.data) write_columns(distance_sums, element<T>(plan.call.grad_distances, n, h));
            }
            chunk.write_gradients();
        }

    private:
        static constexpr int W = LANES<T>;
        const BackwardPlan<P>& plan;
        const Attention<P>& attention;
        const Masking<T>& masking;
        KeyChunk<P> chunk;
        RowBlock<P> block;
        int64_t* const active;  // the panels of the chunk that the block sees
        int64_t active_count;
        T* const query_block;  // dQ: [panel of D][row][COLUMNS]
        T* const column_sums;  // of dS: [panel][COLUMNS]
        T* const distance_sums;  // of dS times the distance of query and key, likewise

        // Whether any key of the chunk counts for any row of the block.
        bool sees_any() const {
            for (int64_t p = 0; p < chunk.count; ++p)
                if (masking.band_sees(block.first_row, block.rows, chunk.panels[p].first)) return true;
            return false;
        }

        void go_back() {
            for (int64_t p = 0; p < chunk.count; ++p) {
                const Parts next{block.rows, chunk.count};
                block.prefetch_next(next.begin(p), next.begin(p + 1));
                if (!block.score(chunk, p)) continue;
                active[active_count++] = p;
                if (!plan.sees_all_keys) add_panel(p);
            }
            if (plan.sees_all_keys) {
                block.sum_deltas();
                for (int64_t s = 0; s < active_count; ++s) add_panel(active[s]);
            }
            multiply_keys();
        }

        // Adds what a panel gives to dK, dV and the gradients of masks, and leaves its dS for `multiply_keys`.
        void add_panel(int64_t p) {
            block.differentiate(p);
            const T* const d_scores = block.grad_scores_of(p);
            if (plan.sums_mask) add_to_mask(chunk.panels[p], d_scores);
            if (plan.call.grad_columns.data) add_to_columns(d_scores, column_sums + p * COLUMNS);
            if (plan.call.grad_distances.data) add_to_distances(chunk.panels[p], d_scores, distance_sums + p * COLUMNS);
            block.add_to(chunk, p);
        }

        // dQ of the block: dS K over the chunk.
        void multiply_keys() const {
            constexpr int64_t A_WIDTH = Panels<P>::A_WIDTH;
            const Parts tiles = block.row_tiles();
            bool accumulate = false;
            for (int64_t s = 0; s < active_count;) {
                const int64_t p = active[s];
                int64_t run = 1;
                while (s + run < active_count && active[s + run] == p + run) ++run;
                for (int64_t c = 0; c < attention.D; c += COLUMNS)
                    for (int64_t t = 0; t < tiles.parts; ++t)
                        gemm<P>(int(tiles.size(t)), attention.D - c,
                                {block.grad_strip_of(p) + tiles.begin(t) * A_WIDTH, A_WIDTH, block.rows * A_WIDTH,
                                 chunk.keys + c / COLUMNS * chunk.key_panel_stride() + p * A_WIDTH * COLUMNS, COLUMNS,
                                 query_block + c * block.rows + tiles.begin(t) * COLUMNS, run * A_WIDTH, accumulate});
                accumulate = true;
                s += run;
            }
        }

        // Adds the block's dQ to that of the chunks before, and writes it after the last.
        void add_to_query() const {
            const int64_t n = block.n, h = block.h, rows = block.rows;
            const int64_t size = Panels<P>::panels(attention.D) * rows * COLUMNS;
            T* total = query_block;
            int32_t* const ticket = plan.query_ticket(n, h, block.index);
            if (plan.chunks > 1) {
                wait_for(ticket, int32_t(chunk.index));
                total = plan.query_sum(n, h, block.index);
                if (chunk.index == 0) memset(total, 0, size_t(size) * sizeof(T));
                if (active_count)
                    for (int64_t i = 0; i < size; i += W) store(total + i, load(total + i) + load(query_block + i));
            } else if (!active_count) {
                memset(total, 0, size_t(size) * sizeof(T));
            }
            if (chunk.index == plan.chunks - 1)
                for (int64_t r = 0; r < rows; ++r)
                    unpack_row(total + r * COLUMNS, rows * COLUMNS, attention.D, T(attention.a.scale),
                               plan.call.grad_query.dtype, row_of(plan.call.grad_query, n, block.first_row + r, h));
            if (plan.chunks > 1) pass_on(ticket, int32_t(chunk.index + 1));
        }

        // Adds dS to the gradient of the additive mask, after the heads and batch elements that share it and come before.
        void add_to_mask(const KeyPanel& panel, const T* d_scores) const {
            const fused_mha_tensor& grad = plan.call.grad_attn_mask;
            const int64_t real = min(masking.S - panel.first, COLUMNS);
            const int64_t mask_n = grad.size[0] > 1 ? block.n : 0, mask_h = grad.size[1] > 1 ? block.h : 0;
            for (int64_t r = 0; r < block.rows; ++r) {
                T* row = element<T>(grad, mask_n, mask_h, block.first_row + r, panel.first);
                for (int64_t c = 0; c < real; c += W)
                    store_some<T, OwnData<T>>(
                        row + c, load_some<T, OwnData<T>>(row + c, real - c) + load(d_scores + r * COLUMNS + c), real - c);
            }
        }

        void add_to_columns(const T* d_scores, T* sums) const {
            for (int v = 0; v < 2; ++v) {
                Vec<T> sum = load(sums + v * W);
                for (int64_t r = 0; r < block.rows; ++r) sum = sum + load(d_scores + r * COLUMNS + v * W);
                store(sums + v * W, sum);
            }
        }

        void add_to_distances(const KeyPanel& panel, const T* d_scores, T* sums) const {
            for (int64_t r = 0; r < block.rows; ++r) {
                Vec<T> d[2];
                masking.distances(block.first_row + r, panel.first, d);
                for (int v = 0; v < 2; ++v)
                    store(sums + v * W, load(d_scores + r * COLUMNS + v * W) * d[v] + load(sums + v * W));
            }
        }

        // The chunk's sums in a row of all keys.
        void write_columns(const T* sums, T* row) const {
            const int64_t first = chunk.index * plan.chunk_rows(), last = min(first + plan.chunk_rows(), masking.S);
            for (int64_t j = first; j < last; ++j) row[j] = 0;
            for (int64_t p = 0; p < chunk.count; ++p) {
                const int64_t panel = chunk.panels[p].first;
                for (int64_t c = 0; c < COLUMNS && panel + c < masking.S; ++c) row[panel + c] = sums[p * COLUMNS + c];
            }
        }
    };
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
