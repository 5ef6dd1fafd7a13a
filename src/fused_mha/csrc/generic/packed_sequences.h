// One call of attention, or one for each of packed sequences (cu_seqlens): instantiate.h and module.h come here.
//
// What computes a call, FewKeys, Forward or Backward, has
//   tasks()                          how many there are
//   shared_bytes(), worker_bytes()   of memory, for all tasks and for each worker
//   place(shared), prepare(own)      say where the former is, and fill it with the help of the workers' memory
//   run_tasks(begin, end, own)       some tasks with the memory of one worker
// Packed sequences are calls of their own on parts of the tensors, whose tasks make one list, that of the longest sequence
// first: the threads meet once. Short sequences are one piece of the list each, so that they are set up once.
#pragma once

#include "generic/attention_backward.h"
#include "generic/attention_forward.h"
#include "generic/few_keys.h"

namespace fused_mha::FMHA_ISA {
namespace {

template <class P, class F>
auto with_computation(const fused_mha_forward_arguments& call, int64_t first_batch, F&& f) {
    const Attention<P> attention(call.attention, first_batch);
    if (FewKeys<P>::serves(attention)) return f(FewKeys<P>(call, attention));
    return f(Forward<P>(call, attention));
}
template <class P, class F>
auto with_computation(const fused_mha_backward_arguments& call, int64_t first_batch, F&& f) {
    const Attention<P> attention(call.attention, first_batch);
    return f(Backward<P>(call, attention));
}

template <class Computation>
void run_tasks(const Computation& computation, const fused_mha_attention& a, int64_t begin, int64_t end, uintptr_t own) {
    const unsigned before = flush_subnormals(a);
    computation.run_tasks(begin, end, own);
    keep_subnormals(a, before);
    release_tiles();
}

// The rows of one sequence, and how a call goes on about them.
struct Sequence {
    int64_t number, first_query, queries, first_key, keys;
    bool is_rest;  // the rows behind the last sequence
};

inline void take_part(fused_mha_attention& a, const Sequence& s) {
    a.query = narrowed(a.query, 1, s.first_query, s.queries);
    a.key = narrowed(a.key, 1, s.first_key, s.keys);
    a.value = narrowed(a.value, 1, s.first_key, s.keys);
    a.key_padding_mask = narrowed(a.key_padding_mask, 1, s.first_key, s.keys);
    a.stats = narrowed(a.stats, 3, s.first_query, s.queries);
    constexpr int64_t NONE = -(int64_t(1) << 60);
    const int64_t diagonal = a.bottom_right ? s.keys - s.queries : 0;
    a.first_visible += diagonal;
    a.last_visible = s.is_rest ? NONE : a.last_visible + diagonal;
}
inline fused_mha_forward_arguments part_of(fused_mha_forward_arguments call, const Sequence& s) {
    take_part(call.attention, s);
    call.output = narrowed(call.output, 1, s.first_query, s.queries);
    call.lse = narrowed(call.lse, 2, s.first_query, s.queries);
    return call;
}
inline fused_mha_backward_arguments part_of(fused_mha_backward_arguments call, const Sequence& s) {
    take_part(call.attention, s);
    for (fused_mha_tensor* t : {&call.output, &call.grad_output, &call.grad_query}) *t = narrowed(*t, 1, s.first_query, s.queries);
    for (fused_mha_tensor* t : {&call.grad_key, &call.grad_value}) *t = narrowed(*t, 1, s.first_key, s.keys);
    for (fused_mha_tensor* t : {&call.grad_columns, &call.grad_distances}) *t = narrowed(*t, 2, s.first_key, s.keys);
    call.grad_lse = narrowed(call.grad_lse, 2, s.first_query, s.queries);
    for (fused_mha_tensor* t : {&call.grad_bias_k, &call.grad_bias_v, &call.grad_sinks}) *t = narrowed(*t, 0, s.number, 1);
    return call;
}

template <class P, class Call>
class PackedSequences {
public:
    explicit PackedSequences(const Call& call) : call(call), a(call.attention), count(a.cu_seqlens_q.size[0]) {
        for (int64_t n = 0; n < count; ++n) all_work += work(sequence(n));
        for (int64_t n = 0; n < count; ++n) {
            const Cost& of_sequence = cost(sequence(n));
            shared_bytes += of_sequence.shared;
            worker_bytes = max(worker_bytes, of_sequence.own);
        }
    }

    int64_t workspace() const { return workspace_bytes(list_bytes() + shared_bytes, worker_bytes, a.threads); }

    void run() {
        const uintptr_t base = aligned(a.workspace.data);
        Piece* const list = reinterpret_cast<Piece*>(base);
        const uintptr_t shared = base + uintptr_t(list_bytes()), own = shared + uintptr_t(shared_bytes);
        const int64_t pieces = place(list, shared, own);
        auto task = [&](int64_t index, int64_t worker) {
            int64_t first = 0;  // of the pieces of this sequence in the list
            for (int64_t end = count; end - first > 1;) {
                const int64_t middle = first + (end - first) / 2;
                (list[middle].first <= index ? first : end) = middle;
            }
            const Piece& piece = list[first];
            with_sequence(piece.number, [&](auto&& computation, const fused_mha_attention& of_sequence) {
                computation.place(shared + uintptr_t(piece.shared));
                const Parts runs{computation.tasks(), piece.count};
                run_tasks(computation, of_sequence, runs.begin(index - piece.first), runs.begin(index - piece.first + 1),
                          own + uintptr_t(worker * worker_bytes));
            });
        };
        fused_mha::run(pieces, a.threads, task);
    }

private:
    static constexpr double WORK_OF_PIECE = 1 << 18;  // multiply-adds
    static constexpr int64_t BUCKETS = 512;           // of sequences whose work is about the same: four for each power of two
    static constexpr int64_t KNOWN = 64;

    // The pieces of one sequence in the list of tasks.
    struct Piece {
        int64_t first, count, number, shared;
    };
    struct Cost {
        int64_t queries, keys, tasks, shared, own;
    };

    const Call& call;
    const fused_mha_attention& a;
    const int64_t count;  // of sequences, and one more for the rows behind them
    double all_work = 0;
    int64_t shared_bytes = 0, worker_bytes = 0;
    Cost known[KNOWN] = {};

    int64_t list_bytes() const { return ceil_div(count * int64_t(sizeof(Piece)), CACHE_LINE) * CACHE_LINE; }

    Sequence sequence(int64_t number) const {
        const int64_t *q = element<int64_t>(a.cu_seqlens_q, number), *k = element<int64_t>(a.cu_seqlens_k, number);
        const bool is_rest = number == count - 1;
        const int64_t q_end = is_rest ? a.query.size[1] : q[1], k_end = is_rest ? a.key.size[1] : k[1];
        return {number, *q, q_end - *q, *k, k_end - *k, is_rest};
    }
    double work(const Sequence& s) const {
        const double of_score = double(max(a.query.size[2], 1)) * double(a.query.size[3] + a.value.size[3]);
        return double(s.queries + 1) * double(s.keys + 1) * of_score;  // at least 1
    }

    template <class F>
    auto with_sequence(int64_t number, F&& f) const {
        const Sequence s = sequence(number);
        Call part = part_of(call, s);
        part.attention.threads = max(int64_t(double(a.threads) * (work(s) / all_work) + 0.5), 1);
        return with_computation<P>(part, number, [&](auto&& computation) { return f(computation, part.attention); });
    }

    const Cost& cost(const Sequence& s) {
        Cost& c = known[uint64_t(s.queries * 31 + s.keys) % KNOWN];
        if (c.own == 0 || c.queries != s.queries || c.keys != s.keys)
            with_sequence(s.number, [&](auto&& computation, const fused_mha_attention&) {
                c = {s.queries, s.keys, computation.tasks(), computation.shared_bytes(), computation.worker_bytes()};
            });
        return c;
    }

    static int64_t bucket(double work) {
        uint64_t bits;
        memcpy(&bits, &work, sizeof bits);  // the exponent and two bits of the fraction
        return BUCKETS - 1 - min(int64_t(bits >> 50) - (1023 << 2), BUCKETS - 1);
    }

    // Writes the list, and prepares what the tasks of long sequences share; returns how many pieces there are.
    int64_t place(Piece* list, uintptr_t shared, uintptr_t own) {
        int64_t next[BUCKETS + 1] = {};
        for (int64_t n = 0; n < count; ++n) ++next[bucket(work(sequence(n))) + 1];
        for (int64_t b = 0; b < BUCKETS; ++b) next[b + 1] += next[b];
        for (int64_t n = 0; n < count; ++n) list[next[bucket(work(sequence(n)))]++].number = n;
        int64_t pieces = 0, used = 0;
        for (int64_t i = 0; i < count; ++i) {
            const Sequence s = sequence(list[i].number);
            const Cost c = cost(s);
            const int64_t of_sequence = max(min(int64_t(work(s) / WORK_OF_PIECE), c.tasks), c.tasks > 0 ? 1 : 0);
            list[i] = {pieces, of_sequence, s.number, used};
            if (c.shared > 0)
                with_sequence(s.number, [&](auto&& computation, const fused_mha_attention&) {
                    computation.place(shared + uintptr_t(used));
                    computation.prepare(own);
                });
            pieces += of_sequence;
            used += c.shared;
        }
        return pieces;
    }
};

template <class P, class Call>
int64_t attention_workspace(const Call& call) {
    if (call.attention.cu_seqlens_q.data) return PackedSequences<P, Call>(call).workspace();
    return with_computation<P>(call, 0, [&](const auto& computation) {
        return workspace_bytes(computation.shared_bytes(), computation.worker_bytes(), call.attention.threads);
    });
}

// `first_batch` is the call's place in a larger one.
template <class P, class Call>
void run_attention(const Call& call, int64_t first_batch = 0) {
    if (call.attention.cu_seqlens_q.data) return PackedSequences<P, Call>(call).run();
    with_computation<P>(call, first_batch, [&](auto&& computation) {
        const uintptr_t shared = aligned(call.attention.workspace.data), own = shared + uintptr_t(computation.shared_bytes());
        const int64_t worker_bytes = computation.worker_bytes();
        computation.place(shared);
        computation.prepare(own);
        auto task = [&](int64_t index, int64_t worker) {
            run_tasks(computation, call.attention, index, index + 1, own + uintptr_t(worker * worker_bytes));
        };
        fused_mha::run(computation.tasks(), call.attention.threads, task);
    });
}

}  // namespace
}  // namespace fused_mha::FMHA_ISA
