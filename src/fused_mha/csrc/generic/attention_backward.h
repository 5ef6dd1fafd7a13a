// Backward attention (Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 2): P is computed again from the saved row
// maxima and sums, and dS = P * (dP - delta) gives dQ = dS K, dK = dS^T Q and dV = P^T dO.
//
// A task has one chunk of the keys of one key/value head, whose dK and dV it sums over all queries in order; its part of
// dQ it adds to that of the chunks before, in their order, so that no result depends on the number of threads.
//
// delta = rowsum(P * dP). Where one chunk has all keys it is summed as it stands, over the P and dP of a block of rows;
// where none has, it comes from attention_delta.h before any dP is there, and of half types from the output as it was
// rounded.
#pragma once

#include "generic/attention_delta.h"

namespace fused_mha::FMHA_ISA {
namespace {

// Rows whose P and dS are computed at once: the products over them load and store dK and dV that much less often.
constexpr int64_t BLOCK_ROWS = 70 / MR * MR;
static_assert(BLOCK_ROWS / MR <= 32, "hidden_tiles has a bit for each row tile of a block");
// Keys of a task times head size: K (twice), V, dK and dV of them stay in the second-level cache.
constexpr int64_t CHUNK_BUDGET = 512 * 64;

template <class P>
class Backward {
public:
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>;
    static constexpr int64_t A_WIDTH = Panels<P>::A_WIDTH;

    explicit Backward(const fused_mha_backward_arguments& call)
        : call(call),
          attention(call.attention),
          delta(attention, call),
          all_panels(ceil_div(attention.masking.keys, COLUMNS)),
          chunk_panels(max(CHUNK_BUDGET / max(max(attention.D, attention.D_v), 64) / COLUMNS, 1)),
          chunks(max(ceil_div(all_panels, chunk_panels), 1)),
          lanes(attention.N * attention.H_kv),
          blocks{attention.L, ceil_div(attention.L, BLOCK_ROWS)},
          query_panels(Panels<P>::panels(attention.D)),
          sees_all_keys(chunks == 1),
          needs_deltas(!sees_all_keys && call.grad_weights.data),
          sums_mask(call.grad_attn_mask.data != nullptr) {
        const fused_mha_tensor& mask = call.grad_attn_mask;
        mask_tickets = sums_mask ? chunks * mask.size[0] * mask.size[1] * blocks.parts : 0;
        Arena measure{0};
        Worker(*this, measure);
        worker_bytes = measure.used;
        Arena shared{0};
        take_shared(shared);
        shared_bytes = shared.used;
    }

    int64_t workspace() const {
        const int64_t of_worker = max(worker_bytes, needs_deltas ? delta.worker_bytes() : 0);
        return workspace_bytes(shared_bytes, of_worker, call.attention.threads);
    }

    void run() {
        Arena shared{aligned(call.attention.workspace.data)};
        take_shared(shared);
        const uintptr_t base = shared.base + uintptr_t(shared.used);
        if (needs_deltas) delta.run(deltas, base);
        memset(tickets, 0, size_t(ticket_count()) * sizeof *tickets);
        auto task = [&](int64_t index, int64_t worker) {
            Arena arena{base + uintptr_t(worker * worker_bytes)};
            // Chunk by chunk: a task waits for the chunk before, which most often is done.
            Worker(*this, arena).run(index % lanes, index / lanes);
            release_tiles();
        };
        fused_mha::run(lanes * chunks, call.attention.threads, task);
    }

private:
    const fused_mha_backward_arguments& call;
    const Attention<P> attention;
    const Delta<P> delta;
    const int64_t all_panels, chunk_panels, chunks, lanes;
    const Parts blocks;  // of the rows of a head
    const int64_t query_panels;
    const bool sees_all_keys, needs_deltas, sums_mask;
    int64_t mask_tickets, worker_bytes, shared_bytes;
    T* deltas;         // [n][h][i], with a gradient of the weights and more than one chunk
    T* query_sums;     // [n][h][block][panel of D][BLOCK_ROWS][COLUMNS], with more than one chunk
    int32_t* tickets;  // how many have added to a block: of dQ [n][h][block], then of the mask's gradient

    int64_t ticket_count() const { return attention.N * attention.H * blocks.parts + mask_tickets; }
    int64_t block_size() const { return query_panels * BLOCK_ROWS * COLUMNS; }
    void take_shared(Arena& arena) {
        const int64_t heads = attention.N * attention.H;
        deltas = arena.take<T>(needs_deltas ? heads * attention.L : 0);
        query_sums = arena.take<T>(chunks > 1 ? heads * blocks.parts * block_size() : 0);
        tickets = arena.take<int32_t>(ticket_count());
    }

    class Worker {
    public:
        Worker(const Backward& backward, Arena& arena)
            : backward(backward), attention(backward.attention), masking(attention.masking), seed(attention.seed()) {
            const int64_t panels_of_key = Panels<P>::panels(attention.D), panels_of_value = Panels<P>::panels(attention.D_v);
            const int64_t rows = backward.chunk_panels * COLUMNS;
            panels = arena.take<KeyPanel>(backward.chunk_panels);
            keys_transposed = arena.take<T>(rows * Panels<P>::steps(attention.D));
            values_transposed = arena.take<T>(rows * Panels<P>::steps(attention.D_v));
            keys = arena.take<T>(rows / P::KSTEP * panels_of_key * COLUMNS);
            key_sums = arena.take<T>(rows * panels_of_key * COLUMNS);
            value_sums = arena.take<T>(rows * panels_of_value * COLUMNS);
            padding = arena.take<T>(rows);
            query_a = arena.take<T>(BLOCK_ROWS * panels_of_key * A_WIDTH);
            query_row = arena.take<T>(attention.reads_in_place ? panels_of_key * COLUMNS : 0);
            grad_a = arena.take<T>(BLOCK_ROWS * panels_of_value * A_WIDTH);
            query_b = P::KSTEP == 1 ? query_a : arena.take<T>(BLOCK_ROWS / P::KSTEP * panels_of_key * COLUMNS);
            grad_b = P::KSTEP == 1 ? grad_a : arena.take<T>(BLOCK_ROWS / P::KSTEP * panels_of_value * COLUMNS);
            const int64_t panels_at_once = backward.sees_all_keys ? backward.chunk_panels : 1;
            weights = arena.take<T>(panels_at_once * BLOCK_ROWS * COLUMNS);
            grad_strip = arena.take<T>(backward.chunk_panels * BLOCK_ROWS * A_WIDTH);
            grad_scores = P::KSTEP == 1 ? grad_strip : arena.take<T>(panels_at_once * BLOCK_ROWS * COLUMNS);
            weights_pairs = P::KSTEP == 1 ? nullptr : arena.take<T>(BLOCK_ROWS / 2 * COLUMNS);
            grad_pairs = P::KSTEP == 1 ? nullptr : arena.take<T>(BLOCK_ROWS / 2 * COLUMNS);
            active = arena.take<int64_t>(backward.chunk_panels);
            hidden_tiles = arena.take<uint32_t>(backward.chunk_panels);
            is_summed = arena.take<bool>(backward.chunk_panels);
            query_block = arena.take<T>(backward.block_size());
            column_sums = arena.take<T>(backward.call.grad_columns.data ? rows : 0);
        }

        void run(int64_t lane, int64_t chunk_index) {
            n = lane / attention.H_kv;
            head = lane % attention.H_kv;
            chunk = chunk_index;
            pack();
            for (h = head * attention.group; h < (head + 1) * attention.group; ++h) {
                if (backward.call.grad_columns.data) memset(column_sums, 0, size_t(count * COLUMNS) * sizeof(T));
                for (block = 0; block < backward.blocks.parts; ++block) {
                    first_row = backward.blocks.begin(block);
                    rows = backward.blocks.size(block);
                    const bool counts = load_block();
                    int32_t* const ticket = mask_ticket();
                    if (ticket) wait_for(ticket, mask_rank());
                    if (counts) go_back();
                    if (ticket) pass_on(ticket, mask_rank() + 1);
                    add_to_query();
                }
                if (backward.call.grad_columns.data) write_columns();
            }
            write_keys();
        }

    private:
        static constexpr int W = LANES<T>;
        const Backward& backward;
        const Attention<P>& attention;
        const Masking<T>& masking;
        const DropoutSeed seed;

        // The chunk: `count` panels of keys that some query may see.
        KeyPanel* panels;
        int64_t n, head, chunk, count;
        T *keys_transposed, *values_transposed;  // [panel][step along D or D_v][COLUMNS]
        T* keys;                                 // [panel of D][step along keys][COLUMNS]
        T *key_sums, *value_sums;                // dK and dV: [panel of D or D_v][key][COLUMNS]
        bool* is_summed;                         // of each panel: whether the sums hold something
        T* padding;                              // [panel][COLUMNS]

        // A block of rows of head h.
        int64_t h, block, first_row, rows;
        T *query_a, *grad_a, *query_b, *grad_b;  // queries and dO, for products along D and along the rows
        T* query_row;                            // a single query as it lies
        T row_max[BLOCK_ROWS], inverse_sum[BLOCK_ROWS], delta[BLOCK_ROWS];
        Vec<T> delta_parts[BLOCK_ROWS];          // what its lanes sum to, where one chunk has all keys
        T *weights, *grad_scores;                // P, negative where dropped, and dP, then dS: [panel][row][COLUMNS]
        T *weights_pairs, *grad_pairs;           // of one panel as pairs along the rows, of bfloat16
        T* grad_strip;                           // dS of all panels: [panel][row][A_WIDTH]
        int64_t* active;                         // the panels in it
        int64_t active_count;
        uint32_t* hidden_tiles;                  // of each panel: a bit for each tile of rows that sees none of it
        T* query_block;                          // dQ: [panel of D][row][COLUMNS]
        T* column_sums;                          // of dS: [panel][COLUMNS]

        Parts row_tiles() const { return {rows, ceil_div(rows, MR)}; }
        int64_t chunk_rows() const { return backward.chunk_panels * COLUMNS; }

        void pack() {
            const fused_mha_attention& a = attention.a;
            const int64_t first = chunk * backward.chunk_panels;
            count = masking.visible_panels(n, panels, first, min(first + backward.chunk_panels, backward.all_panels));
            for (int64_t p = 0; p < count; ++p) {
                const void *pointers[COLUMNS], *key_pointers[COLUMNS];
                attention.rows_of_panel(a.value, a.bias_v, n, head, panels[p], pointers);
                attention.rows_of_panel(a.key, a.bias_k, n, head, panels[p], key_pointers);
                prefetch_rows(pointers, COLUMNS, attention.D_v * item_size(a.value.dtype));
                prefetch_rows(key_pointers, COLUMNS, attention.D * item_size(a.key.dtype));
                Panels<P>::pack_b_transposed(a.value.dtype, pointers, attention.D_v,
                                             values_transposed + p * Panels<P>::steps(attention.D_v) * COLUMNS);
                Panels<P>::pack_b_transposed(a.key.dtype, key_pointers, attention.D,
                                             keys_transposed + p * Panels<P>::steps(attention.D) * COLUMNS);
                Panels<P>::pack_b(a.key.dtype, key_pointers, COLUMNS, attention.D, keys + p * A_WIDTH * COLUMNS,
                                  key_panel_stride());
                if (masking.adds_padding()) masking.padding_values(n, panels[p].first, padding + p * COLUMNS);
            }
            for (int64_t p = 0; p < count; ++p) is_summed[p] = false;
        }
        int64_t key_panel_stride() const { return backward.chunk_panels * A_WIDTH * COLUMNS; }

        // Returns whether any key of the chunk counts for any row of the block.
        bool load_block() {
            bool sees_any = false;
            for (int64_t p = 0; p < count; ++p) sees_any = sees_any || masking.band_sees(first_row, rows, panels[p].first);
            active_count = 0;
            if (!sees_any) return false;
            const fused_mha_attention& a = attention.a;
            const fused_mha_tensor& grad = backward.call.grad_output;
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
                else if (backward.needs_deltas)
                    delta[r] = backward.deltas[(n * attention.H + h) * attention.L + i];
                else
                    delta[r] = (backward.sees_all_keys ? 0 : backward.delta.of_output(n, h, i)) - backward.delta.of_lse(n, h, i);
            }
            Panels<P>::pack_a(a.query.dtype, queries, rows, attention.D, query_a);
            if (attention.reads_in_place) SingleQuery<P>::unpack(a.query.dtype, queries[0], attention.D, query_row);
            Panels<P>::pack_a(grad.dtype, grads, rows, attention.D_v, grad_a);
            if (P::KSTEP > 1) {
                Panels<P>::pack_b(a.query.dtype, queries, rows, attention.D, query_b, Panels<P>::steps(rows) * COLUMNS);
                Panels<P>::pack_b(grad.dtype, grads, rows, attention.D_v, grad_b, Panels<P>::steps(rows) * COLUMNS);
            }
            return true;
        }

        void go_back() {
            for (int64_t p = 0; p < count; ++p) {
                const Parts next{rows, count};
                prefetch_queries(h, first_row + rows + next.begin(p), first_row + rows + next.begin(p + 1));
                if (!score(p)) continue;
                active[active_count++] = p;
                if (!backward.sees_all_keys) add_panel(p);
            }
            if (backward.sees_all_keys) {
                for (int64_t r = 0; r < rows; ++r) delta[r] += reduce_add(delta_parts[r]);
                for (int64_t s = 0; s < active_count; ++s) add_panel(active[s]);
            }
            multiply_keys();
        }

        T* weights_of(int64_t p) const { return weights + (backward.sees_all_keys ? p * rows * COLUMNS : 0); }
        T* grad_scores_of(int64_t p) const {
            return grad_scores + (backward.sees_all_keys || P::KSTEP == 1 ? p * rows * COLUMNS : 0);
        }

        // Adds what a panel gives to dK, dV and the gradients of masks, and leaves its dS for `multiply_keys`.
        void add_panel(int64_t p) {
            T *const s = weights_of(p), *const ds = grad_scores_of(p);
            const Parts tiles = row_tiles();
            for (int64_t t = 0; t < tiles.parts; ++t)
                if (!(hidden_tiles[p] >> t & 1))
                    attention.drops() ? differentiate<true>(tiles.begin(t), tiles.size(t), s, ds)
                                      : differentiate<false>(tiles.begin(t), tiles.size(t), s, ds);
            if constexpr (P::KSTEP == 2) round_to_pairs(s, ds, grad_strip + p * rows * A_WIDTH);
            const bool accumulate = is_summed[p];
            add_transposed(P::KSTEP == 1 ? s : weights_pairs, grad_b, attention.D_v, value_sums + p * COLUMNS * COLUMNS, accumulate);
            add_transposed(P::KSTEP == 1 ? ds : grad_pairs, query_b, attention.D, key_sums + p * COLUMNS * COLUMNS, accumulate);
            is_summed[p] = true;
            if (backward.sums_mask) add_to_mask(panels[p], ds);
            if (backward.call.grad_columns.data) add_to_columns(ds, column_sums + p * COLUMNS);
        }

        // Brings rows that `load_block` reads into the cache: they lie apart, one head among others.
        void prefetch_queries(int64_t of_head, int64_t begin, int64_t end) const {
            const fused_mha_backward_arguments& call = backward.call;
            for (int64_t i = begin; i < min(end, attention.L); ++i) {
                const void* rows[] = {row_of(attention.a.query, n, i, of_head), row_of(call.grad_output, n, i, of_head),
                                      row_of(call.output, n, i, of_head)};
                prefetch_rows(rows, 1, attention.D * item_size(attention.a.query.dtype));
                prefetch_rows(rows + 1, 2, attention.D_v * item_size(call.output.dtype));
            }
        }

        // P and dP of the block's rows and one panel; false if the panel is hidden from all rows.
        bool score(int64_t p) {
            const Parts tiles = row_tiles();
            const KeyPanel& panel = panels[p];
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
                                       keys_transposed + p * steps * COLUMNS, COLUMNS, s, steps, false});
                gemm_in_blocks<P>(int(size), COLUMNS,
                                  {grad_a + first * A_WIDTH, A_WIDTH, rows * A_WIDTH,
                                   values_transposed + p * value_steps * COLUMNS, COLUMNS, dp, value_steps, false});
                if (mask.kind == mask.MASKED)
                    masking.apply(mask, n, h, first_row + first, size, panel, padding + p * COLUMNS, s);
                if (attention.drops())
                    weigh<true>(first, size, panel, s, dp);
                else
                    weigh<false>(first, size, panel, s, dp);
            }
            return is_visible;
        }

        // Scores become P; dP is that of the weights after dropout, and becomes that before it.
        template <bool DROPS>
        void weigh(int64_t first, int64_t size, const KeyPanel& panel, T* s, T* dp) {
            const bool sums_deltas = backward.sees_all_keys, has_grad_weights = backward.call.grad_weights.data != nullptr;
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
                    if (has_grad_weights)
                        dx = dx + backward.delta.grad_of_weights(n, h, first_row + first + r, panel.first + v * W);
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

        // sums (keys of a panel x columns) += a^T b, over the rows of the block; = where `accumulate` is false.
        void add_transposed(const T* a, const T* b, int64_t columns, T* sums, bool accumulate) const {
            const int64_t steps = Panels<P>::steps(rows);
#if defined(FMHA_BFLOAT16_DOT)
            if (multiplies_by_tiles<P>()) {
                constexpr int64_t TILES = (BLOCK_ROWS / 2 + TILE_STEPS - 1) / TILE_STEPS, TILE = TILE_STEPS * TILE_STEPS;
                alignas(64) float a_tiles[TILES * TILE];
                for (int64_t key = 0; key < COLUMNS; key += TILE_STEPS) {
                    transpose_to_tiles(a, steps, key, a_tiles);
                    for (int64_t c = 0; c < columns; c += COLUMNS)
                        gemm<P>(TILE_STEPS, columns - c,
                                {a_tiles, TILE_STEPS, TILE, b + c * steps, COLUMNS, sums + c * chunk_rows() + key * COLUMNS,
                                 steps, accumulate});
                }
                return;
            }
#endif
            const Parts parts{COLUMNS, ceil_div(COLUMNS, MR)};
            for (int64_t c = 0; c < columns; c += COLUMNS)
                for (int64_t t = 0; t < parts.parts; ++t)
                    gemm<P, Layout::TRANSPOSED>(int(parts.size(t)), columns - c,
                                  {a + parts.begin(t), steps, 0, b + c * steps, COLUMNS,
                                   sums + c * chunk_rows() + parts.begin(t) * COLUMNS, steps, accumulate});
        }

        // dQ of the block: dS K over the chunk.
        void multiply_keys() const {
            const Parts tiles = row_tiles();
            bool accumulate = false;
            for (int64_t s = 0; s < active_count;) {
                const int64_t p = active[s];
                int64_t run = 1;
                while (s + run < active_count && active[s + run] == p + run) ++run;
                for (int64_t c = 0; c < attention.D; c += COLUMNS)
                    for (int64_t t = 0; t < tiles.parts; ++t)
                        gemm<P>(int(tiles.size(t)), attention.D - c,
                                {grad_strip + (p * rows + tiles.begin(t)) * A_WIDTH, A_WIDTH, rows * A_WIDTH,
                                 keys + c / COLUMNS * key_panel_stride() + p * A_WIDTH * COLUMNS, COLUMNS,
                                 query_block + c * rows + tiles.begin(t) * COLUMNS, run * A_WIDTH, accumulate});
                accumulate = true;
                s += run;
            }
        }

        // Adds the block's dQ to that of the chunks before, and writes it after the last.
        void add_to_query() const {
            const int64_t size = Panels<P>::panels(attention.D) * rows * COLUMNS;
            T* total = query_block;
            const int64_t index = (n * attention.H + h) * backward.blocks.parts + block;
            if (backward.chunks > 1) {
                wait_for(backward.tickets + index, int32_t(chunk));
                total = backward.query_sums + index * backward.block_size();
                if (chunk == 0) memset(total, 0, size_t(size) * sizeof(T));
                if (active_count)
                    for (int64_t i = 0; i < size; i += W) store(total + i, load(total + i) + load(query_block + i));
            } else if (!active_count) {
                memset(total, 0, size_t(size) * sizeof(T));
            }
            if (chunk == backward.chunks - 1)
                for (int64_t r = 0; r < rows; ++r)
                    unpack_row(total + r * COLUMNS, rows * COLUMNS, attention.D, T(attention.a.scale),
                               backward.call.grad_query.dtype, row_of(backward.call.grad_query, n, first_row + r, h));
            if (backward.chunks > 1) pass_on(backward.tickets + index, int32_t(chunk + 1));
        }

        void write_keys() const {
            const fused_mha_attention& a = attention.a;
            const int64_t first = chunk * chunk_rows(), last = min(first + chunk_rows(), masking.keys);
            int64_t p = 0;
            for (int64_t j = first; j < last; ++j) {
                while (p < count && panels[p].first + COLUMNS <= j) ++p;
                const bool is_visible = p < count && panels[p].first <= j && is_summed[p];
                const int64_t row = is_visible ? (p * COLUMNS + j - panels[p].first) * COLUMNS : 0;
                write_key(is_visible ? key_sums + row : nullptr, j, attention.D, T(a.scale), backward.call.grad_key,
                          backward.call.grad_bias_k);
                write_key(is_visible ? value_sums + row : nullptr, j, attention.D_v, attention.kept_factor(),
                          backward.call.grad_value, backward.call.grad_bias_v);
            }
        }

        void write_key(const T* sums, int64_t j, int64_t columns, T factor, const fused_mha_tensor& grad,
                       const fused_mha_tensor& grad_bias) const {
            const bool is_real = j < masking.S;
            if (!is_real && (!grad_bias.data || j != masking.S)) return;
            const fused_mha_tensor& to = is_real ? grad : grad_bias;
            void* row = is_real ? row_of(grad, n, j, head) : row_of(grad_bias, n, head, 0);
            if (sums)
                unpack_row(sums, chunk_rows() * COLUMNS, columns, factor, to.dtype, row);
            else
                zero(row, columns * item_size(to.dtype));
        }

        // Counts the heads and batch elements that have added to the mask's gradient in this block of rows and chunk of
        // keys; null where none share it.
        int32_t* mask_ticket() const {
            const fused_mha_tensor& grad = backward.call.grad_attn_mask;
            if (!backward.sums_mask || (grad.size[0] == attention.N && grad.size[1] == attention.H)) return nullptr;
            const int64_t mask_n = grad.size[0] > 1 ? n : 0, mask_h = grad.size[1] > 1 ? h : 0;
            return backward.tickets + attention.N * attention.H * backward.blocks.parts +
                   ((chunk * grad.size[0] + mask_n) * grad.size[1] + mask_h) * backward.blocks.parts + block;
        }
        int32_t mask_rank() const {
            const fused_mha_tensor& grad = backward.call.grad_attn_mask;
            const int64_t of_head = grad.size[1] == 1 ? h : 0, of_batch = grad.size[0] == 1 ? n : 0;
            return int32_t(of_batch * (grad.size[1] == 1 ? attention.H : 1) + of_head);
        }

        // Adds dS to the gradient of the additive mask, after the heads and batch elements that share it and come before.
        void add_to_mask(const KeyPanel& panel, const T* d_scores) const {
            const fused_mha_tensor& grad = backward.call.grad_attn_mask;
            const int64_t real = min(masking.S - panel.first, COLUMNS);
            const int64_t mask_n = grad.size[0] > 1 ? n : 0, mask_h = grad.size[1] > 1 ? h : 0;
            for (int64_t r = 0; r < rows; ++r) {
                T* row = element<T>(grad, mask_n, mask_h, first_row + r, panel.first);
                for (int64_t c = 0; c < real; c += W)
                    store_some<T, OwnData<T>>(
                        row + c, load_some<T, OwnData<T>>(row + c, real - c) + load(d_scores + r * COLUMNS + c), real - c);
            }
        }

        void add_to_columns(const T* d_scores, T* sums) const {
            for (int v = 0; v < 2; ++v) {
                Vec<T> sum = load(sums + v * W);
                for (int64_t r = 0; r < rows; ++r) sum = sum + load(d_scores + r * COLUMNS + v * W);
                store(sums + v * W, sum);
            }
        }

        void write_columns() const {
            const int64_t first = chunk * chunk_rows(), last = min(first + chunk_rows(), masking.S);
            T* row = element<T>(backward.call.grad_columns, n, h);
            for (int64_t j = first; j < last; ++j) row[j] = 0;
            for (int64_t p = 0; p < count; ++p)
                for (int64_t c = 0; c < COLUMNS && panels[p].first + c < masking.S; ++c)
                    row[panels[p].first + c] = column_sums[p * COLUMNS + c];
        }
    };
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
