// Forward attention: softmax(Q K^T * scale + masks) V by an online softmax over tiles of keys (Dao, "FlashAttention-2",
// arXiv 2307.08691, algorithm 1), or over all keys at once where the weights are asked for.
//
// A task packs a tile of keys and values, and attends to it from row tiles of up to MR queries, whose running maximum,
// sum and output stay in the second-level cache. Without weights a task has one key/value head and all query heads
// that share it; with weights it has all heads of some rows, and keeps their scores over all keys, so that the softmax is
// done when the weights are written or added to their mean.
#pragma once

#include "generic/online_softmax.h"
#include "parallel.h"

namespace fused_mha::FMHA_ISA {
namespace {

constexpr int64_t TILE_BUDGET = 512 * 64;  // keys of a tile * head size; scores of a row tile stay in the first-level cache
constexpr int64_t MOST_TILE_KEYS = 512, FEWEST_TILE_KEYS = 128;
// Rows of a task: packing K and V costs as much as attending from about 5 rows, and the rows' queries and outputs share
// the second-level cache with a tile of keys and values.
constexpr int64_t ROW_BUDGET = 512 * 64;      // rows * head size
constexpr int64_t STRIP_BUDGET = 128 * 1024;  // rows * keys, where all scores of a row are kept
constexpr int64_t MOST_STRIP = 512 * 1024;    // the same, where FEWEST_TILES would have more
constexpr int64_t FEWEST_TILES = 4;           // of a task; below, packing shows

template <class P>
class Forward {
public:
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>;

    explicit Forward(const fused_mha_forward_arguments& call)
        : call(call),
          attention(call.attention),
          with_weights(call.weights.data != nullptr),
          averages(with_weights && call.attention.average_weights),
          all_panels(ceil_div(attention.masking.keys, COLUMNS)),
          tile_panels(max(1, min(all_panels, tile_keys(max(attention.D, attention.D_v)) / COLUMNS))),
          lanes(with_weights ? attention.N : attention.N * attention.H_kv) {
        const int64_t tiles = attention.row_tiles * (with_weights ? 1 : attention.group);
        const int64_t most = with_weights ? STRIP_BUDGET / max(all_panels * COLUMNS, 1)
                                          : ROW_BUDGET / max(max(attention.D, attention.D_v), 64);
        // Few lanes, many threads: smaller tasks, as long as packing stays cheap. No result depends on it.
        const int64_t tasks_of_lane = ceil_div(4 * call.attention.threads, max(lanes, 1));
        const int64_t fewest =
            with_weights ? min(max(MOST_STRIP / max(MR * all_panels * COLUMNS, 1), 1), FEWEST_TILES) : FEWEST_TILES;
        const int64_t tiles_of_task = max(min(ceil_div(most, MR), ceil_div(tiles, tasks_of_lane)), fewest);
        chunks = {tiles, ceil_div(tiles, tiles_of_task)};
        Arena measure{0};
        Worker(*this, measure);
        worker_bytes = measure.used;
    }

    int64_t workspace() const { return worker_bytes * call.attention.threads + CACHE_LINE; }

    void run() {
        const uintptr_t base = aligned(call.attention.workspace.data);
        auto task = [&](int64_t index, int64_t worker) {
            Arena arena{base + uintptr_t(worker * worker_bytes)};
            // The last rows first: causal attention gives them the most work.
            Worker(*this, arena).run(index % lanes, chunks.parts - 1 - index / lanes);
        };
        fused_mha::run(lanes * chunks.parts, call.attention.threads, task);
    }

private:
    const fused_mha_forward_arguments& call;
    const Attention<P> attention;
    const bool with_weights, averages;
    const int64_t all_panels, tile_panels;
    const int64_t lanes;  // heads of keys in the batch, or batch elements: tasks share no row between them
    Parts chunks;         // of the row tiles of a lane, one for each task
    int64_t worker_bytes;

    static int64_t tile_keys(int64_t widest) {
        return max(min(TILE_BUDGET / max(widest, 1), MOST_TILE_KEYS), FEWEST_TILE_KEYS);
    }

    class Worker {
    public:
        Worker(const Forward& forward, Arena& arena)
            : forward(forward),
              attention(forward.attention),
              attender(forward.attention, forward.with_weights),
              keys(forward.attention, forward.tile_panels, arena),
              panels(arena.take<KeyPanel>(forward.all_panels)),
              most_tiles(ceil_div(forward.chunks.count, max(forward.chunks.parts, 1))),
              rows(arena.take<RowTile<P>>(most_tiles)),
              query_size(MR * Panels<P>::A_WIDTH * Panels<P>::panels(attention.D)),
              output_size(MR * COLUMNS * Panels<P>::panels(attention.D_v)),
              queries(arena.take<T>(most_tiles * query_size)),
              outputs(arena.take<T>(most_tiles * output_size)),
              statistics(arena.take<T>(most_tiles * 2 * MR)),
              strip_count(forward.with_weights ? most_tiles : 1),
              strip_panels(forward.with_weights ? forward.all_panels : forward.tile_panels),
              strips(arena.take<Strip<P>>(strip_count)),
              scores(arena.take<T>(strip_count * strip_panels * MR * COLUMNS)),
              rounded(P::KSTEP == 1 ? scores : arena.take<T>(strip_count * strip_panels * MR * COLUMNS / P::KSTEP)),
              kept(arena.take<uint32_t>(attention.drops() ? strip_count * strip_panels * MR : 0)),
              active(arena.take<int64_t>(strip_count * strip_panels)),
              mean_width(forward.all_panels * COLUMNS),
              mean(forward.averages && forward.call.weights.dtype != OWN_DTYPE<T>
                       ? arena.take<T>(most_tiles * MR * mean_width)
                       : nullptr) {}

        void run(int64_t lane, int64_t chunk) {
            tiles = forward.chunks.size(chunk);
            for (int64_t t = 0; t < strip_count; ++t) {
                const int64_t at = t * strip_panels * MR;
                strips[t] = {scores + at * COLUMNS, rounded + at * COLUMNS / P::KSTEP, kept + at, active + t * strip_panels, 0};
            }
            if (forward.with_weights) {
                attend_with_weights(lane, forward.chunks.begin(chunk));
            } else {
                attend(lane / attention.H_kv, lane % attention.H_kv, forward.chunks.begin(chunk));
            }
        }

    private:
        const Forward& forward;
        const Attention<P>& attention;
        const Attender<P> attender;
        KeyTile<P> keys;
        KeyPanel* const panels;
        const int64_t most_tiles;
        RowTile<P>* const rows;
        const int64_t query_size, output_size;
        T *const queries, *const outputs, *const statistics;
        const int64_t strip_count, strip_panels;
        Strip<P>* const strips;
        T *const scores, *const rounded;
        uint32_t* const kept;
        int64_t* const active;
        const int64_t mean_width;
        T* const mean;  // [tile][row][mean_width], where the weights are of a narrower type
        int64_t tiles;  // of the task

        // Makes `rows` the row tiles of the task, which are those from `first` on of the heads from `first_head` on.
        void place_rows(int64_t n, int64_t first_head, int64_t first) {
            const Parts parts = attention.rows_of_head();
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t part = (first + t) % parts.parts;
                T* const s = statistics + t * 2 * MR;
                rows[t] = {n, first_head + (first + t) / parts.parts, parts.begin(part), parts.size(part),
                           queries + t * query_size, outputs + t * output_size, s, s + MR};
            }
        }

        void attend(int64_t n, int64_t head, int64_t first_tile) {
            place_rows(n, head * attention.group, first_tile);
            Strip<P>& strip = strips[0];
            const int64_t count = attention.masking.visible_panels(n, panels, 0, forward.all_panels);
            for (int64_t first = 0; first == 0 || first < count; first += forward.tile_panels) {
                keys.place(n, head, panels + first, panels + count, forward.tile_panels);
                bool is_packed = false;
                for (int64_t t = 0; t < tiles; ++t) {
                    const RowTile<P>& tile = rows[t];
                    if (first == 0) attender.start(tile);
                    if (sees_any(tile)) {
                        if (!is_packed) {
                            keys.pack_keys();
                            keys.pack_values();
                        }
                        is_packed = true;
                        keys.prefetch_next(tiles, t);
                        attend(tile, strip);
                    }
                    if (first + keys.count >= count) attender.finish(tile, forward.call);
                }
            }
        }

        void attend(const RowTile<P>& tile, Strip<P>& strip) const {
            strip.active_count = 0;
            attender.score(tile, keys, 0, strip);
            const bool accumulate = !Attender<P>::is_untouched(tile);
            attender.soften(tile, strip);
            attender.multiply_values(tile, keys, 0, strip, accumulate);
        }

        bool sees_any(const RowTile<P>& tile) const {
            for (int64_t p = 0; p < keys.count; ++p)
                if (attention.masking.band_sees(tile.first, tile.rows, keys.panels[p].first)) return true;
            return false;
        }

        void attend_with_weights(int64_t n, int64_t first_tile) {
            const int64_t count = attention.masking.visible_panels(n, panels, 0, forward.all_panels);
            for (int64_t h = 0; h < attention.H; ++h) {
                place_rows(n, h, first_tile);
                for (int64_t t = 0; t < tiles; ++t) {
                    attender.start(rows[t]);
                    strips[t].active_count = 0;
                }
                for (int64_t first = 0; first < count; first += forward.tile_panels) {
                    keys.place(n, h / attention.group, panels + first, panels + count, forward.tile_panels);
                    keys.pack_keys();
                    for (int64_t t = 0; t < tiles; ++t) attender.score(rows[t], keys, first, strips[t]);
                }
                for (int64_t t = 0; t < tiles; ++t) {
                    attender.soften(rows[t], strips[t]);
                    for (int64_t r = 0; r < rows[t].rows; ++r)
                        if (forward.averages)
                            add_to_mean(t, r);
                        else
                            write_weights(t, r);
                }
                for (int64_t first = 0; first < count; first += forward.tile_panels) {
                    keys.place(n, h / attention.group, panels + first, panels + count, forward.tile_panels);
                    keys.pack_values();
                    for (int64_t t = 0; t < tiles; ++t) attender.multiply_values(rows[t], keys, first, strips[t], false);
                }
                for (int64_t t = 0; t < tiles; ++t) attender.finish(rows[t], forward.call);
            }
            if (!mean) return;
            for (int64_t t = 0; t < tiles; ++t)
                for (int64_t r = 0; r < rows[t].rows; ++r)
                    unpack_row(mean_row(t, r), COLUMNS, attention.masking.keys, T(1), forward.call.weights.dtype,
                               row_of(forward.call.weights, n, rows[t].first + r, 0));
        }

        // Of the sums of exponentials, to weights.
        T weight_factor(int64_t t, int64_t r) const {
            const T sum = rows[t].row_sum[r] * T(forward.averages ? attention.H : 1);
            return sum == 0 ? T(0) : attention.kept_factor() / sum;
        }

        T* mean_row(int64_t t, int64_t r) const {
            return mean ? mean + (t * MR + r) * mean_width
                        : element<T>(forward.call.weights, rows[t].n, rows[t].first + r);
        }

        void add_to_mean(int64_t t, int64_t r) const {
            T* row = mean_row(t, r);
            const int64_t columns = attention.masking.keys;
            if (rows[t].h == 0) memset(row, 0, size_t(columns) * sizeof(T));
            const Vec<T> factor = splat(weight_factor(t, r));
            for (int64_t s = 0; s < strips[t].active_count; ++s) {
                const int64_t p = strips[t].active[s];
                const T* weights = strips[t].scores + (p * rows[t].rows + r) * COLUMNS;
                for (int64_t v = 0; v < COLUMNS; v += LANES<T>) {
                    const int64_t column = panels[p].first + v;
                    if (column >= columns) break;
                    const Vec<T> before = load_some<T, OwnData<T>>(row + column, columns - column);
                    store_some<T, OwnData<T>>(row + column, load(weights + v) * factor + before, columns - column);
                }
            }
        }

        void write_weights(int64_t t, int64_t r) const {
            const fused_mha_tensor& weights = forward.call.weights;
            const int64_t columns = attention.masking.keys, item = item_size(weights.dtype);
            char* row = static_cast<char*>(row_of(weights, rows[t].n, rows[t].h, rows[t].first + r));
            const T factor = weight_factor(t, r);
            int64_t written = 0;
            for (int64_t s = 0; s < strips[t].active_count; ++s) {
                const int64_t p = strips[t].active[s], first = panels[p].first;
                memset(row + written * item, 0, size_t((first - written) * item));
                written = min(first + COLUMNS, columns);
                unpack_row(strips[t].scores + (p * rows[t].rows + r) * COLUMNS, 0, written - first, factor, weights.dtype,
                           row + first * item);
            }
            memset(row + written * item, 0, size_t((columns - written) * item));
        }
    };
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
