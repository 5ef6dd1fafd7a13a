// The forward of a whole multi-head attention module: project, attend, project back (torch.nn.MultiheadAttention).
//
// The weights are packed once. Then some batch elements at a time, a group, go through all three steps, so that what one
// step writes is still in the cache for the next. Many short sequences make groups that are tasks: the threads meet once,
// whatever the batch, which is what a busy machine asks for. Else all threads share the steps of a group. In training the
// projections and the heads are kept for the backward.
#pragma once

#include "generic/packed_sequences.h"
#include "generic/product.h"

namespace fused_mha::FMHA_ISA {
namespace {

// A tensor's part for `count` batch elements; one that broadcasts over them, or is absent, stays.
FMHA_INLINE fused_mha_tensor of_batch(fused_mha_tensor t, int64_t first, int64_t count, int dim = 0) {
    if (!t.data || t.size[dim] == 1) return t;
    return narrowed(t, dim, first, count);
}

// y = x W^T + b of one of query, key and value, or of neighbours that are joined; y is (N, L, columns).
struct Projection {
    fused_mha_tensor x, weight, bias, y;

    bool shares_input(const Projection& other) const {
        return x.data == other.x.data && x.size[1] == other.x.size[1] && x.size[2] == other.x.size[2] &&
               x.stride[0] == other.x.stride[0] && x.stride[1] == other.x.stride[1];
    }

    // Takes in the next projection where all of it lies behind this one.
    bool join(const Projection& next) {
        const int64_t columns = weight.size[0];
        const bool fits = shares_input(next) && next.weight.stride[0] == weight.stride[0] &&
                          next.weight.data == element_at(weight, columns * weight.stride[0]) &&
                          next.bias.data == (bias.data ? element_at(bias, columns) : nullptr) &&
                          next.y.stride[0] == y.stride[0] && next.y.stride[1] == y.stride[1] &&
                          next.y.data == element_at(y, columns);
        if (fits) weight.size[0] += next.weight.size[0];
        return fits;
    }

    Matrices matrices(int64_t threads) const {
        fused_mha_tensor rows = as_sequence(weight);
        if (weight.dtype != x.dtype) rows.dtype = ROUNDED_TO_BFLOAT16;
        return {Rows(x), Rows(rows), Rows(y), bias.data, x.size[0] * x.size[1], weight.size[0],
                weight.size[1], false, true, threads};
    }

private:
    static void* element_at(const fused_mha_tensor& t, int64_t index) {
        return static_cast<char*>(t.data) + index * item_size(t.dtype);
    }
    // A matrix as the sequence of a single batch element.
    static fused_mha_tensor as_sequence(fused_mha_tensor t) {
        for (int d = 3; d > 0; --d) {
            t.size[d] = t.size[d - 1];
            t.stride[d] = t.stride[d - 1];
        }
        t.size[0] = 1;
        return t;
    }
};

// Some batch elements: the core's call, and the projections before and behind it.
struct Group {
    fused_mha_forward_arguments core;
    Projection in[3], out;
    int64_t in_count, own_bytes;

    uintptr_t stage() const { return reinterpret_cast<uintptr_t>(core.attention.workspace.data); }
};

template <class P>
class Module {
public:
    explicit Module(const fused_mha_module_arguments& call)
        : call(call),
          N(call.query.size[0]),
          threads(work() < SERIAL_WORK ? 1 : call.core.attention.threads),
          groups{N, groups_in_tasks() > 0 ? groups_in_tasks() : ceil_div(N, most_of_group())},
          workers(groups_in_tasks() > 0 ? threads : 1) {
        void* const workspace = call.core.attention.workspace.data;
        Arena arena{workspace ? aligned(workspace) : CACHE_LINE};
        const uintptr_t begin = arena.base;
        const Group first = group(0, begin);
        for (int64_t i = 0; i <= first.in_count; ++i) {
            const Product<P> projection = product(first, i);
            packed[i] = uintptr_t(arena.take<char>(projection.packs_right_alone() ? projection.packed_bytes() : 0));
        }
        of_workers = arena.base + uintptr_t(arena.used);
        // The last group may be smaller, and divide its work otherwise.
        of_worker = max(bytes_of(first), bytes_of(group(groups.parts - 1, begin)));
        bytes = workspace_bytes(arena.used, of_worker, workers);
    }

    int64_t workspace() const { return bytes; }

    void run() {
        const Group first = group(0, of_workers);
        for (int64_t i = 0; i <= first.in_count; ++i)
            if (Product<P> projection = product(first, i, threads); projection.packs_right_alone()) projection.pack(packed[i]);
        auto task = [&](int64_t index, int64_t worker) {
            const Group g = group(index, of_workers + uintptr_t(worker * of_worker));
            for (int64_t i = 0; i < g.in_count; ++i) project(g, i);
            run_attention<P>(g.core, groups.begin(index));
            project(g, g.in_count);
        };
        fused_mha::run(groups.parts, workers, task);
    }

private:
    static constexpr int64_t FEWEST_ROWS = 512, ROWS_OF_THREAD = 256;  // of a group
    static constexpr int64_t LONGEST_OF_TASK = 1024;  // rows of a sequence that one thread attends to alone
    static constexpr int64_t LEAST_OF_TASK = 64;      // rows that make up for reading large weights once more
    static constexpr int64_t SMALL_WEIGHT = 512 * 1024;  // bytes that stay in the second-level cache
    static constexpr double SERIAL_WORK = 1 << 21;    // multiply-adds, 30 us, that are not worth sharing three times
    // Rows whose products take as long as the weights take to be read, from the second-level cache or from farther away.
    static constexpr int64_t READ_ROWS = 4, READ_ROWS_FAR = 16, NEAR_BYTES = 3 << 19;
    const fused_mha_module_arguments& call;
    const int64_t N, threads;
    const Parts groups;
    const int64_t workers;  // that take groups; each has the other threads for its steps where it is the only one
    uintptr_t packed[4];    // the weights in, joined, and out, where they are packed
    uintptr_t of_workers;   // what each has beside them: projections and heads, where the caller keeps none, and a workspace
    int64_t of_worker, bytes;

    int64_t longest() const { return max(call.query.size[1], call.key.size[1]); }
    int64_t most_of_group() const { return max(min(max(FEWEST_ROWS, ROWS_OF_THREAD * threads) / longest(), N), 1); }

    // How many groups are tasks; 0 where the sequences are long, or too few to keep all threads busy to the end.
    int64_t groups_in_tasks() const {
        if (threads == 1 || longest() > LONGEST_OF_TASK) return 0;
        const int64_t most = max(ROWS_OF_THREAD / longest(), 1);
        const int64_t rounds = ceil_div(ceil_div(N, most), threads), tasks = min(rounds * threads, N);
        const fused_mha_tensor& weight = call.query_weight;
        const bool is_small = weight.size[0] * weight.size[1] * item_size(weight.dtype) <= SMALL_WEIGHT;
        if (!is_small && N * longest() < LEAST_OF_TASK * tasks) return 0;
        return tasks >= threads && ceil_div(tasks, threads) * threads * 10 <= tasks * 11 ? tasks : 0;
    }

    double work() const {
        const fused_mha_tensor& out = call.out_weight;
        const bool is_near = 4 * out.size[0] * out.size[1] * item_size(out.dtype) <= NEAR_BYTES;
        const auto of = [&](const fused_mha_tensor& x, const fused_mha_tensor& weight) {
            const double rows = double(max(x.size[0] * x.size[1], is_near ? READ_ROWS : READ_ROWS_FAR));
            return rows * double(weight.size[0]) * double(weight.size[1]);
        };
        return of(call.query, call.query_weight) + of(call.key, call.key_weight) + of(call.value, call.value_weight) +
               of(call.query, call.out_weight) +
               attention_work(N);
    }
    double attention_work(int64_t count) const {
        const fused_mha_tensor& query = call.core.attention.query;
        return double(count * call.query.size[1]) * double(call.key.size[1]) * double(query.size[2] * 2 * query.size[3]);
    }

    int64_t threads_of_group() const { return workers > 1 ? 1 : threads; }

    Product<P> product(const Group& g, int64_t i, int64_t with_threads) const {
        const Projection& projection = i < g.in_count ? g.in[i] : g.out;
        return Product<P>(projection.matrices(with_threads).template with_least_to_pack<P>(N * projection.x.size[1]));
    }
    Product<P> product(const Group& g, int64_t i) const { return product(g, i, threads_of_group()); }

    void project(const Group& g, int64_t i) const {
        Product<P> projection = product(g, i);
        if (projection.packs_right_alone()) return projection.multiply(packed[i], g.stage());
        projection.pack(g.stage());
        projection.multiply(g.stage(), g.stage() + uintptr_t(projection.packed_bytes()));
    }

    // Of one group: its own projections and heads, and the workspace of one step at a time.
    int64_t bytes_of(const Group& g) const {
        int64_t most = attention_workspace<P>(g.core);
        for (int64_t i = 0; i <= g.in_count; ++i) {
            const Product<P> projection = product(g, i);
            const int64_t own = projection.packs_right_alone() ? 0 : projection.packed_bytes();
            most = max(most, workspace_bytes(own, projection.worker_bytes(), threads_of_group()));
        }
        return workspace_bytes(g.own_bytes, most, 1);
    }

    // Those of one input lie side by side, so that one product makes them.
    void place_projections(Arena& arena, int64_t count, fused_mha_tensor (&projections)[3]) const {
        const fused_mha_attention& a = call.core.attention;
        const fused_mha_tensor* const inputs[] = {&call.query, &call.key, &call.value};
        const fused_mha_tensor* const results[] = {&a.query, &a.key, &a.value};
        for (int i = 0; i < 3;) {
            int end = i;
            int64_t width = 0;
            do width += results[end]->size[2] * results[end]->size[3];
            while (++end < 3 && inputs[end]->data == inputs[i]->data && inputs[end]->size[1] == inputs[i]->size[1]);
            const int64_t rows = inputs[i]->size[1];
            char* at = arena.take<char>(count * rows * width * item_size(a.query.dtype));
            for (; i < end; ++i) {
                projections[i] = sequences(at, *results[i], count, rows, width);
                at += results[i]->size[2] * results[i]->size[3] * item_size(a.query.dtype);
            }
        }
    }

    // A tensor (count, rows, H, D) like `of`, in rows of `width`.
    static fused_mha_tensor sequences(char* data, const fused_mha_tensor& of, int64_t count, int64_t rows, int64_t width) {
        const int64_t D = of.size[3];
        return {data, of.dtype, 0, {count, rows, of.size[2], D}, {rows * width, width, D, 1}};
    }

    // With what it has of its own from `base` on.
    Group group(int64_t index, uintptr_t base) const {
        const int64_t first = groups.begin(index), count = groups.size(index);
        const auto part = [&](const fused_mha_tensor& t, int dim = 0) { return of_batch(t, first, count, dim); };
        Group g{call.core, {}, {{}, call.out_weight, call.out_bias, part(call.output)}, 0, 0};
        fused_mha_attention& a = g.core.attention;
        if (a.query.data) {
            a.query = part(a.query);
            a.key = part(a.key);
            a.value = part(a.value);
            g.core.output = part(g.core.output);
        } else {
            Arena arena{base};
            fused_mha_tensor projections[3];
            place_projections(arena, count, projections);
            a.query = projections[0];
            a.key = projections[1];
            a.value = projections[2];
            const int64_t L = call.query.size[1], width = call.core.output.size[2] * call.core.output.size[3];
            char* const heads = arena.take<char>(count * L * width * item_size(a.query.dtype));
            g.core.output = sequences(heads, call.core.output, count, L, width);
            g.own_bytes = arena.used;
        }
        g.out.x = g.core.output;
        a.attn_mask = part(a.attn_mask);
        a.key_padding_mask = part(a.key_padding_mask);
        a.stats = part(a.stats, 1);
        g.core.weights = part(g.core.weights);
        g.core.lse = part(g.core.lse);
        a.workspace.data = reinterpret_cast<void*>(base + uintptr_t(g.own_bytes));
        a.threads = attention_work(count) < SERIAL_WORK ? 1 : threads_of_group();
        const Projection all[] = {{part(call.query), call.query_weight, call.query_bias, a.query},
                                  {part(call.key), call.key_weight, call.key_bias, a.key},
                                  {part(call.value), call.value_weight, call.value_bias, a.value}};
        for (const Projection& projection : all)
            if (g.in_count == 0 || !g.in[g.in_count - 1].join(projection)) g.in[g.in_count++] = projection;
        return g;
    }
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
