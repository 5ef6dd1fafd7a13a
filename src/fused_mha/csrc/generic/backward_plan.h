// How backward attention is divided into tasks, and what its tasks share: attention_backward.h, backward_keys.h and
// backward_rows.h ask.
//
// A task has one chunk of the keys of one key/value head, whose dK and dV it sums over all queries in order, a block of
// rows at a time. What several tasks add to, dQ and the gradient of a mask, they add to in the order of tickets, so that
// no result depends on the number of threads.
#pragma once

#include "generic/attention_delta.h"

namespace fused_mha::FMHA_ISA {
namespace {

// Rows whose P and dS are computed at once: the products over them load and store dK and dV that much less often.
constexpr int64_t BLOCK_ROWS = 70 / MR * MR;
// Keys of a task times head size: K (twice), V, dK and dV of them stay in the second-level cache.
constexpr int64_t CHUNK_BUDGET = 512 * 64;

template <class P>
class BackwardPlan {
public:
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>;

    const fused_mha_backward_arguments& call;
    const Attention<P>& attention;
    const Delta<P> delta;
    const int64_t all_panels, chunk_panels, chunks, lanes;
    const Parts blocks;  // of the rows of a head
    const bool sees_all_keys, needs_deltas, sums_mask;
    T* deltas;  // [n][h][i], with a gradient of the weights and more than one chunk

    BackwardPlan(const fused_mha_backward_arguments& call, const Attention<P>& attention)
        : call(call),
          attention(attention),
          delta(attention, call),
          all_panels(ceil_div(attention.masking.keys, COLUMNS)),
          chunk_panels(max(CHUNK_BUDGET / max(max(attention.D, attention.D_v), 64) / COLUMNS, 1)),
          chunks(max(ceil_div(all_panels, chunk_panels), 1)),
          lanes(attention.N * attention.H_kv),
          blocks{attention.L, ceil_div(attention.L, BLOCK_ROWS)},
          // A log-sum-exp is used to merge rows whose other keys are in other calls: deltas come from the output then.
          sees_all_keys(chunks == 1 && !call.grad_lse.data),
          needs_deltas(!sees_all_keys && call.grad_weights.data),
          sums_mask(call.grad_attn_mask.data != nullptr) {}

    void take_shared(Arena& arena) {
        const int64_t heads = attention.N * attention.H;
        deltas = arena.take<T>(needs_deltas ? heads * attention.L : 0);
        query_sums = arena.take<T>(chunks > 1 ? heads * blocks.parts * block_size() : 0);
        tickets = arena.take<int32_t>(ticket_count());
    }
    void reset_tickets() const { memset(tickets, 0, size_t(ticket_count()) * sizeof *tickets); }

    int64_t chunk_rows() const { return chunk_panels * COLUMNS; }
    int64_t block_size() const { return Panels<P>::panels(attention.D) * BLOCK_ROWS * COLUMNS; }

    // A block's dQ so far, and how many chunks have added to it.
    T* query_sum(int64_t n, int64_t h, int64_t block) const { return query_sums + block_of_head(n, h, block) * block_size(); }
    int32_t* query_ticket(int64_t n, int64_t h, int64_t block) const { return tickets + block_of_head(n, h, block); }

    // Counts the heads and batch elements that have added to the mask's gradient in a block of rows and chunk of keys;
    // null where none share it.
    int32_t* mask_ticket(int64_t n, int64_t h, int64_t chunk, int64_t block) const {
        const fused_mha_tensor& grad = call.grad_attn_mask;
        if (!sums_mask || (grad.size[0] == attention.N && grad.size[1] == attention.H)) return nullptr;
        const int64_t mask_n = grad.size[0] > 1 ? n : 0, mask_h = grad.size[1] > 1 ? h : 0;
        return tickets + query_tickets() +
               ((chunk * grad.size[0] + mask_n) * grad.size[1] + mask_h) * blocks.parts + block;
    }
    // The place of a head among those that share an element of the mask.
    int32_t mask_rank(int64_t n, int64_t h) const {
        const fused_mha_tensor& grad = call.grad_attn_mask;
        const int64_t of_head = grad.size[1] == 1 ? h : 0, of_batch = grad.size[0] == 1 ? n : 0;
        return int32_t(of_batch * (grad.size[1] == 1 ? attention.H : 1) + of_head);
    }

private:
    T* query_sums;     // [n][h][block][panel of D][BLOCK_ROWS][COLUMNS], with more than one chunk
    int32_t* tickets;  // of dQ [n][h][block], then of the mask's gradient [chunk][n of the mask][h of the mask][block]

    int64_t block_of_head(int64_t n, int64_t h, int64_t block) const { return (n * attention.H + h) * blocks.parts + block; }
    int64_t query_tickets() const { return chunks > 1 ? attention.N * attention.H * blocks.parts : 0; }
    int64_t ticket_count() const {
        const fused_mha_tensor& grad = call.grad_attn_mask;
        return query_tickets() + (sums_mask ? chunks * grad.size[0] * grad.size[1] * blocks.parts : 0);
    }
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
