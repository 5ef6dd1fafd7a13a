// Forward attention: softmax(Q K^T * scale + masks) V by an online softmax over tiles of keys (Dao, "FlashAttention-2",
// arXiv 2307.08691, algorithm 1), or over all keys at once where the weights are asked for.
//
// A task attends to a tile of keys and values, packed, from row tiles of up to MR queries, whose running maximum, sum and
// output stay in the second-level cache. Without weights a task has one key/value head and all query heads that share
// it, and packs what it reads. With weights it has all heads of a few rows, which is why keys and values are packed
// beforehand, and keeps the exponentials of a head over all keys, until their sum makes them weights: these are written, or
// added to their mean over the heads. Where the weights of some heads are asked for, the others have tasks without weights
// beside theirs, and a task packs what it reads in both: the threads meet once.
#pragma once

#include "generic/online_softmax.h"
#include "parallel.h"

namespace fused_mha::FMHA_ISA {
namespace {

constexpr int64_t TILE_BUDGET = 512 * 64;  // keys of a tile * head size; scores of a row tile stay in the first-level cache
constexpr int64_t FEWEST_TILE_KEYS = 128;
constexpr int64_t SCORES_BUDGET = 16 * 1024;  // heads * keys of a tile, for single queries
// Rows of a task: packing K and V costs as much as attending from about 5 rows, and the rows' queries and outputs share
// the second-level cache with a tile of keys and values.
constexpr int64_t ROW_BUDGET = 512 * 64;      // rows * head size
constexpr int64_t STRIP_BUDGET = 256 * 1024;  // rows * keys, where all scores of a row are kept
constexpr int64_t MOST_STRIP = 512 * 1024;    // the same, where FEWEST_TILES would have more
constexpr int64_t FEWEST_TILES = 4;           // of a task; below, packing shows

enum class Heads { ALL, NAMED, OTHERS };  // by weights_of_heads

template <class P>
class Forward {
public:
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>;

    Forward(const fused_mha_forward_arguments& call, const Attention<P>& attention)
        : Forward(call, attention, call.weights.data && call.attention.weights_of_heads.data ? Heads::NAMED : Heads::ALL) {}

    Forward(const fused_mha_forward_arguments& call, const Attention<P>& attention, Heads heads)
        : call(call),
          attention(attention),
          heads(heads),
          with_weights(call.weights.data && heads != Heads::OTHERS),
          averages(with_weights && call.attention.average_weights),
          all_panels(ceil_div(attention.masking.keys, COLUMNS)),
          takes_heads(attention.reads_in_place && !with_weights),
          tile_panels(max(1, min(all_panels, tile_keys() / COLUMNS))),
          key_tiles(ceil_div(all_panels, tile_panels)),
          lanes(with_weights || takes_heads ? attention.N : attention.N * attention.H_kv) {
        const int64_t tiles = attention.row_tiles * (with_weights ? 1 : takes_heads ? attention.H : attention.group);
        int64_t most = ROW_BUDGET / max(max(attention.D, attention.D_v), 64);
        if (with_weights) most = min(most, STRIP_BUDGET / max(all_panels * COLUMNS, 1));
        // Few lanes, many threads: smaller tasks, as long as packing stays cheap. No result depends on it.
        const int64_t tasks_of_lane = ceil_div(4 * call.attention.threads, max(lanes, 1));
        const int64_t fewest =
            with_weights ? min(max(MOST_STRIP / max(MR * all_panels * COLUMNS, 1), 1), FEWEST_TILES) : FEWEST_TILES;
        const int64_t tiles_of_task = max(min(ceil_div(most, MR), ceil_div(tiles, tasks_of_lane)), fewest);
        chunks = {tiles, takes_heads ? min(ceil_div(call.attention.threads, max(attention.N, 1)), tiles)
                                     : ceil_div(tiles, tiles_of_task)};
        packs_first = with_weights && heads == Heads::ALL && chunks.parts > 1;
        Arena measure{0};
        Worker(*this, measure);
        own_bytes = measure.used;
    }

    int64_t tasks() const { return own_tasks() + (heads == Heads::NAMED ? others().own_tasks() : 0); }
    int64_t shared_bytes() const {
        const int64_t tile = KeyTile<P>(attention, tile_panels).size() * int64_t(sizeof(T));
        return packs_first ? attention.N * attention.H_kv * key_tiles * tile : 0;
    }
    int64_t worker_bytes() const { return heads == Heads::NAMED ? max(own_bytes, others().own_bytes) : own_bytes; }

    void place(uintptr_t shared) { packed = reinterpret_cast<T*>(shared); }
    // Neighbours in memory are packed one after the other: the heads of the same keys.
    void prepare(uintptr_t own) const {
        if (!packs_first) return;
        auto pack = [&](int64_t index, int64_t worker) {
            const int64_t of_batch = attention.H_kv * key_tiles, in_batch = index % of_batch;
            Arena arena{own + uintptr_t(worker * own_bytes)};
            Worker(*this, arena).pack(index / of_batch, in_batch % attention.H_kv, in_batch / attention.H_kv);
        };
        fused_mha::run(attention.N * attention.H_kv * key_tiles, call.attention.threads, pack);
    }
    void run_tasks(int64_t begin, int64_t end, uintptr_t own) const {
        const int64_t count = own_tasks();
        if (begin < count) run_own_tasks(begin, min(end, count), own);
        if (end > count) others().run_own_tasks(max(begin, count) - count, end - count, own);
    }

private:
    const fused_mha_forward_arguments& call;
    const Attention<P>& attention;
    const Heads heads;
    const bool with_weights, averages;
    const int64_t all_panels;
    const bool takes_heads;  // a task has single queries of many heads, whose keys lie side by side
    const int64_t tile_panels, key_tiles;
    const int64_t lanes;  // heads of keys in the batch, or batch elements: tasks share no row between them
    Parts chunks;         // of the row tiles of a lane, one for each task
    bool packs_first;     // all keys and values, since many tasks will read them
    T* packed = nullptr;
    int64_t own_bytes;

    Forward others() const { return Forward(call, attention, Heads::OTHERS); }
    bool takes(int64_t head) const {
        return heads == Heads::ALL || (index_of_weights(call.attention, head) >= 0) == (heads == Heads::NAMED);
    }
    int64_t own_tasks() const { return lanes * chunks.parts; }
    // The last rows first: causal attention gives them the most work.
    void run_own_tasks(int64_t begin, int64_t end, uintptr_t own) const {
        Arena arena{own};
        Worker worker(*this, arena);
        for (int64_t index = begin; index < end; ++index) worker.run(index % lanes, chunks.parts - 1 - index / lanes);
    }

    int64_t tile_keys() const {
        if (attention.reads_in_place) return max(min(SCORES_BUDGET / max(attention.H, 1), MOST_TILE_KEYS), COLUMNS);
        return max(min(TILE_BUDGET / max(max(attention.D, attention.D_v), 1), MOST_TILE_KEYS), FEWEST_TILE_KEYS);
    }

    class Worker {
    public:
        Worker(const Forward& forward, Arena& arena)
            : forward(forward),
              attention(forward.attention),
              attender(forward.attention, forward.with_weights),
              keys(forward.attention, forward.tile_panels),
              heads(arena, forward.takes_heads ? attention.H : 0),
              storage(forward.packs_first ? forward.packed : arena.take<T>(keys.size())),
              panels(arena.take<KeyPanel>(forward.all_panels)),
              most_tiles(ceil_div(forward.chunks.count, max(forward.chunks.parts, 1))),
              rows(arena.take<RowTile<P>>(most_tiles)),
              most_rows(max(min(attention.L, MR), 1)),
              query_size(most_rows * (attention.reads_in_place ? COLUMNS : Panels<P>::A_WIDTH) * Panels<P>::panels(attention.D)),
              output_size(most_rows * COLUMNS * Panels<P>::panels(attention.D_v)),
              queries(arena.take<T>(most_tiles * query_size)),
              outputs(arena.take<T>(most_tiles * output_size)),
              statistics(arena.take<T>(most_tiles * 2 * MR)),
              strip_count(forward.with_weights  ? most_tiles * forward.key_tiles
                          : forward.takes_heads ? most_tiles
                                                : 1),
              strip_size(forward.tile_panels * most_rows * COLUMNS),
              strips(arena.take<Strip<P>>(strip_count)),
              scores(arena.take<T>(strip_count * strip_size)),
              rounded(arena.take<T>(P::KSTEP == 1 ? 0 : strip_size / P::KSTEP)),
              kept(arena.take<uint32_t>(attention.drops() ? forward.tile_panels * MR : 0)),
              maxima(arena.take<T>(strip_count * MR)),
              active(arena.take<int64_t>(strip_count * forward.tile_panels)),
              mean_width(forward.all_panels * COLUMNS),
              mean(forward.averages && forward.call.weights.dtype != OWN_DTYPE<T>
                       ? arena.take<T>(most_tiles * MR * mean_width)
                       : nullptr) {}

        void pack(int64_t n, int64_t head, int64_t tile) {
            const int64_t count = attention.masking.visible_panels(n, panels, 0, forward.all_panels);
            if (tile * forward.tile_panels >= count) return;
            place_keys(n, head, tile, count);
            keys.pack();
        }

        void run(int64_t lane, int64_t chunk) {
            for (int64_t i = 0; i < strip_count; ++i) {
                T* const s = scores + i * strip_size;
                strips[i] = {s, P::KSTEP == 1 ? s : rounded, kept, maxima + i * MR, active + i * forward.tile_panels, 0};
            }
            const int64_t n = forward.lanes == attention.N ? lane : lane / attention.H_kv;
            const int64_t count = attention.masking.visible_panels(n, panels, 0, forward.all_panels);
            if (forward.with_weights) {
                attend_with_weights(n, chunk, count);
            } else if (forward.takes_heads) {
                place_rows(n, 0, chunk);
                if (tiles > 0) attend_heads(n, count);
            } else {
                place_rows(n, lane % attention.H_kv * attention.group, chunk);
                if (tiles > 0) attend(n, lane % attention.H_kv, count);
            }
        }

    private:
        const Forward& forward;
        const Attention<P>& attention;
        const Attender<P> attender;
        KeyTile<P> keys;
        HeadGroup<P> heads;
        T* const storage;  // of packed keys and values: one tile, or [n][head][tile]
        KeyPanel* const panels;
        const int64_t most_tiles;
        RowTile<P>* const rows;
        const int64_t most_rows, query_size, output_size;  // of a row tile
        T *const queries, *const outputs, *const statistics;
        const int64_t strip_count, strip_size;
        Strip<P>* const strips;  // with weights [row tile][tile of keys], else [head], or one for all
        T *const scores, *const rounded;
        uint32_t* const kept;
        T* const maxima;
        int64_t* const active;
        const int64_t mean_width;
        T* const mean;  // [tile][row][mean_width], where the weights are of a narrower type
        int64_t tiles;  // of the task

        // Makes `rows` the row tiles of the task, which are a chunk of those of the heads from `first_head` on.
        void place_rows(int64_t n, int64_t first_head, int64_t chunk) {
            const Parts parts = attention.rows_of_head();
            tiles = 0;
            for (int64_t i = forward.chunks.begin(chunk); i < forward.chunks.begin(chunk + 1); ++i) {
                const int64_t head = first_head + i / parts.parts, part = i % parts.parts, t = tiles;
                if (!forward.takes(head)) continue;
                T* const s = statistics + t * 2 * MR;
                rows[tiles++] = {n, head, parts.begin(part), parts.size(part), queries + t * query_size,
                                 outputs + t * output_size, s, s + MR};
            }
        }

        void place_keys(int64_t n, int64_t head, int64_t tile, int64_t count) {
            const int64_t index = forward.packs_first ? (n * attention.H_kv + head) * forward.key_tiles + tile : 0;
            keys.place(n, head, panels + tile * forward.tile_panels, panels + count, storage + index * keys.size());
        }

        // From the rows of the task, which `place_rows` has set, to a key/value head.
        void attend(int64_t n, int64_t head, int64_t count) {
            for (int64_t t = 0; t < tiles; ++t) attender.start(rows[t]);
            for (int64_t k = 0; k * forward.tile_panels < count; ++k) {
                place_keys(n, head, k, count);
                bool is_packed = forward.packs_first;
                for (int64_t t = 0; t < tiles; ++t) {
                    Strip<P>& strip = strips[forward.with_weights ? t * forward.key_tiles + k : 0];
                    strip.active_count = 0;
                    if (!sees_any(rows[t])) continue;
                    if (!is_packed) keys.pack();
                    is_packed = true;
                    if (!forward.packs_first && !attention.reads_in_place) keys.prefetch_next(tiles, t);
                    attender.attend(rows[t], keys, strip);
                }
            }
            for (int64_t t = 0; t < tiles; ++t) attender.finish(rows[t], forward.call);
        }

        void attend_heads(int64_t n, int64_t count) {
            for (int64_t t = 0; t < tiles; ++t) attender.start(rows[t]);
            attender.gather(heads, rows, tiles, strips);
            for (int64_t k = 0; k * forward.tile_panels < count; ++k) {
                place_keys(n, 0, k, count);
                keys.pack();  // the padding's values
                attender.attend(heads, keys);
            }
            for (int64_t t = 0; t < tiles; ++t) attender.finish(rows[t], forward.call);
        }

        bool sees_any(const RowTile<P>& tile) const {
            for (int64_t p = 0; p < keys.count; ++p)
                if (attention.masking.band_sees(tile.first, tile.rows, keys.panels[p].first)) return true;
            return false;
        }

        void attend_with_weights(int64_t n, int64_t chunk, int64_t count) {
            const int64_t used = ceil_div(count, forward.tile_panels);
            if (forward.averages) {
                place_rows(n, 0, chunk);
                for (int64_t t = 0; t < tiles; ++t)
                    for (int64_t r = 0; r < rows[t].rows; ++r)
                        zero(mean_row(t, r), attention.masking.keys * int64_t(sizeof(T)));
            }
            for (int64_t h = 0; h < attention.H; ++h) {
                if (!forward.takes(h)) continue;
                place_rows(n, h, chunk);
                attend(n, h / attention.group, count);
                for (int64_t t = 0; t < tiles; ++t)
                    for (int64_t r = 0; r < rows[t].rows; ++r)
                        if (forward.averages)
                            add_to_mean(t, r, used);
                        else
                            write_weights(t, r, used);
            }
            if (!mean) return;
            for (int64_t t = 0; t < tiles; ++t)
                for (int64_t r = 0; r < rows[t].rows; ++r)
                    unpack_row(mean_row(t, r), COLUMNS, attention.masking.keys, T(1), forward.call.weights.dtype,
                               row_of(forward.call.weights, n, rows[t].first + r, 0));
        }

        T* mean_row(int64_t t, int64_t r) const {
            return mean ? mean + (t * MR + r) * mean_width
                        : element<T>(forward.call.weights, rows[t].n, rows[t].first + r);
        }

        // Calls f(first key, panels, weights of the first before the factor, factor) for what a row sees, in the first `used`
        // strips: panels whose keys follow each other, of which the weights are rows[t].rows * COLUMNS apart.
        template <class F>
        void for_weights_of_row(int64_t t, int64_t r, int64_t used, F&& f) const {
            for (int64_t k = 0; k < used; ++k) {
                const Strip<P>& strip = strips[t * forward.key_tiles + k];
                const KeyPanel* const of_strip = panels + k * forward.tile_panels;
                const T factor = attender.weight_factor(rows[t], strip, r);
                for (int64_t s = 0, run; s < strip.active_count; s += run) {
                    const int64_t p = strip.active[s], first = of_strip[p].first;
                    for (run = 1; s + run < strip.active_count && strip.active[s + run] == p + run; ++run)
                        if (of_strip[p + run].first != first + run * COLUMNS) break;
                    f(first, run, strip.scores + (p * rows[t].rows + r) * COLUMNS, factor);
                }
            }
        }

        void add_to_mean(int64_t t, int64_t r, int64_t used) const {
            T* row = mean_row(t, r);
            const int64_t columns = attention.masking.keys, stride = rows[t].rows * COLUMNS;
            for_weights_of_row(t, r, used, [&](int64_t first, int64_t run, const T* weights, T factor) {
                const Vec<T> share = splat(factor / T(attention.H));
                for (int64_t p = 0; p < run; ++p, first += COLUMNS, weights += stride)
                    for (int64_t v = 0; v < COLUMNS; v += LANES<T>) {
                        const int64_t column = first + v;
                        if (column >= columns) break;
                        const Vec<T> before = load_some<T, OwnData<T>>(row + column, columns - column);
                        store_some<T, OwnData<T>>(row + column, load(weights + v) * share + before, columns - column);
                    }
            });
        }

        void write_weights(int64_t t, int64_t r, int64_t used) const {
            const fused_mha_tensor& weights = forward.call.weights;
            const int64_t columns = attention.masking.keys, item = item_size(weights.dtype);
            const int64_t index = index_of_weights(attention.a, rows[t].h);
            char* row = static_cast<char*>(row_of(weights, rows[t].n, index, rows[t].first + r));
            int64_t written = 0;
            for_weights_of_row(t, r, used, [&](int64_t first, int64_t run, const T* of_run, T factor) {
                zero(row + written * item, (first - written) * item);
                written = min(first + run * COLUMNS, columns);
                unpack_row(of_run, rows[t].rows * COLUMNS, written - first, factor, weights.dtype, row + first * item);
            });
            zero(row + written * item, (columns - written) * item);
        }
    };
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
