// Matrix products of whole tensors: C = A B, plus a bias on every row. The projections and their gradients are such.
//
// B is packed once for all tasks; a task packs some rows of A and multiplies them with some panels of B. The three
// products of a linear layer differ in which operands lie transposed: y = x W^T, dx = dy W, dW = dy^T x. Where x has less
// to pack than W, y^T = W x^T takes its place, with the same sums; where it has a few rows, few_rows.h packs nothing. A
// small x^T each thread packs for itself: then none waits for another, nor reads what lies in another's cache.
#pragma once

#include "generic/few_rows.h"

namespace fused_mha::FMHA_ISA {
namespace {

template <class P>
class TiledProduct {
public:
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>, W = LANES<T>;
    static constexpr int64_t A_WIDTH = Panels<P>::A_WIDTH;

    explicit TiledProduct(const Matrices& matrices)
        : of(matrices),
          column_panels(ceil_div(of.N, COLUMNS)),
          left_in_panels(of.left_is_transposed && !multiplies_by_tiles<P>()),
          row_panels(left_in_panels ? ceil_div(of.M, COLUMNS) : 0),
          panel_size(Panels<P>::steps(of.K) * COLUMNS),
          reads_left_in_place((of.output_is_transposed || (P::KSTEP == 1 && !of.left_is_transposed)) &&
                              of.left.dtype == P::OPERAND && of.K % P::KSTEP == 0 && of.left.stride() != 0),
          row_tiles(left_in_panels ? Parts{row_panels * TILES_OF_PANEL, row_panels * TILES_OF_PANEL}
                                   : Parts{of.M, ceil_div(of.M, MR)}),
          each_packs(of.output_is_transposed && of.threads > 1 && right_size() * int64_t(sizeof(T)) < SERIAL_BYTES) {
        // Tasks of some row tiles by some panels of columns: enough for the threads, as long as packing A stays cheap.
        const int64_t wanted = of.threads > 1 ? TASKS_OF_THREAD * of.threads : 1;
        row_chunks = {row_tiles.parts, ceil_div(row_tiles.parts, TILES_OF_TASK)};
        if (of.output_is_transposed) row_chunks.parts = max(row_chunks.parts, min(wanted, row_tiles.parts));
        const int64_t columns = ceil_div(wanted, max(row_chunks.parts, 1));
        const int64_t bytes = COLUMNS * max(min(Panels<P>::steps(of.K), CHUNK_STEPS), 1) * int64_t(sizeof(T));
        const int64_t most_panels = packs_tiles() ? MOST_PANELS : min(max(BYTES_OF_CHUNK / bytes, 1), MOST_PANELS);
        column_chunks = {column_panels, max(max(min(columns, column_panels / FEWEST_PANELS), ceil_div(column_panels, most_panels)), 1)};
        Arena measure{0};
        Worker(*this, measure);
        worker_size = measure.used;
    }

    // Bytes of what is packed for all tasks, and of what each thread needs beside it.
    int64_t packed_bytes() const {
        Arena shared{0};
        shared.take<char>(each_packs ? of.threads * CACHE_LINE : 0);
        shared.take<T>(each_packs ? 0 : right_size());
        shared.take<T>(row_panels * panel_size);
        return shared.used;
    }
    int64_t worker_bytes() const { return worker_size; }
    // Whether that is the right operand, as given, and may be packed before the left one is there.
    bool packs_right_alone() const { return !of.left_is_transposed && !of.output_is_transposed; }

    // Makes `packed` of B, and of A where it lies transposed.
    void pack(uintptr_t packed) {
        place(packed);
        if (each_packs) return zero(has_packed, of.threads * CACHE_LINE);
        const int64_t blocks = max(ceil_div(of.K, PACKED_ROWS), 1);
        const int64_t of_right = of.right_is_transposed ? column_panels : blocks;
        auto pack = [&](int64_t index, int64_t) {
            if (index >= of_right)
                pack_rows(of.left, index - of_right, of.M, left);
            else if (of.right_is_transposed)
                pack_panel(index, right);
            else
                pack_rows(of.right, index, of.N, right);
        };
        const int64_t threads = packed_bytes() < SERIAL_BYTES ? 1 : of.threads;
        fused_mha::run<Order::IN_SHARES>(of_right + (left_in_panels ? blocks : 0), threads, pack);
    }

    void multiply(uintptr_t packed, uintptr_t workers) {
        place(packed);
        auto multiply = [&](int64_t index, int64_t worker) {
            Arena arena{workers + uintptr_t(worker * worker_size)};
            Worker of_thread(*this, arena);
            if (each_packs) of_thread.pack_once(has_packed[worker * CACHE_LINE]);
            if (of.M <= of.N)  // each thread its share of the larger operand
                of_thread.run(index % row_chunks.parts, index / row_chunks.parts);
            else
                of_thread.run(index / column_chunks.parts, index % column_chunks.parts);
            release_tiles();
        };
        fused_mha::run<Order::IN_SHARES>(row_chunks.parts * column_chunks.parts, of.threads, multiply);
    }

private:
    static constexpr int64_t TILES_OF_TASK = 12, TASKS_OF_THREAD = 8, FEWEST_PANELS = 2, MOST_PANELS = 12, PACKED_ROWS = 128;
    static constexpr int64_t TILES_OF_PANEL = (COLUMNS + MR - 1) / MR;
    static constexpr int64_t BLOCK_STEPS = 4 * COLUMNS;  // along K, whose sums fall into one block
    // While a tile of A meets all panels of B of a task, these stay in the second-level cache, and a tile of C in the first.
    // bfloat16 multiplies too fast for that: a block of one panel of B stays in the first-level cache for all tiles of A.
    static constexpr int64_t CHUNK_STEPS = (P::KSTEP == 2 ? 1 : 8) * BLOCK_STEPS, BYTES_OF_CHUNK = 512 * 1024;
    static constexpr int64_t TILES_AT_ONCE = P::KSTEP == 2 ? TILES_OF_TASK : 1;
    static constexpr int64_t SERIAL_BYTES = 256 * 1024;  // that are packed before another thread has woken
    const Matrices of;
    const int64_t column_panels;
    const bool left_in_panels;  // packed once for all tasks, where it lies transposed and the kernel takes it so
    const int64_t row_panels, panel_size;
    const bool reads_left_in_place;  // the few rows of the other operand do not pay for packing
    const Parts row_tiles;
    const bool each_packs;  // thread its own copy of B
    Parts row_chunks, column_chunks;
    int64_t worker_size;
    char* has_packed;           // of each thread, a cache line apart
    T *right = nullptr, *left;  // packed: [panel of N or M][step along K][COLUMNS]

    bool packs_tiles() const { return !left_in_panels && !reads_left_in_place; }
    int64_t most_panels() const { return ceil_div(column_panels, column_chunks.parts); }  // of a task
    int64_t right_size() const { return column_panels * panel_size; }

    void place(uintptr_t packed) {
        Arena shared{packed};
        has_packed = shared.take<char>(each_packs ? of.threads * CACHE_LINE : 0);
        right = shared.take<T>(each_packs ? 0 : right_size());
        left = shared.take<T>(row_panels * panel_size);
    }

    // One panel of B^T as it lies.
    void pack_panel(int64_t panel, T* to) const {
        const void* rows[COLUMNS];
        for (int64_t c = 0; c < COLUMNS; ++c) {
            const int64_t j = panel * COLUMNS + c;
            rows[c] = j < of.N ? of.right(j) : nullptr;
        }
        Panels<P>::pack_b_transposed(of.right.dtype, rows, of.K, to + panel * panel_size);
    }

    // One block of the rows of a matrix that lies along K.
    void pack_rows(const Rows& matrix, int64_t block, int64_t columns, T* to) const {
        const int64_t first = block * PACKED_ROWS, count = min(PACKED_ROWS, of.K - first);
        const void* rows[PACKED_ROWS];
        for (int64_t r = 0; r < count; ++r) rows[r] = matrix(first + r);
        Panels<P>::pack_b(matrix.dtype, rows, count, columns, to + first / P::KSTEP * COLUMNS, panel_size);
    }

    class Worker {
    public:
        Worker(const TiledProduct& product, Arena& arena)
            : product(product),
              of(product.of),
              tile_size(product.packs_tiles() ? MR * min(CHUNK_STEPS, A_WIDTH * Panels<P>::panels(of.K)) : 0),
              keeps_results(Panels<P>::steps(of.K) > CHUNK_STEPS),
              right(product.each_packs ? arena.take<T>(product.right_size()) : product.right),
              tiles(arena.take<T>(TILES_AT_ONCE * tile_size)),
              results(arena.take<T>(RESULT_SIZE * (keeps_results ? TILES_OF_TASK * product.most_panels() : 1))) {}

        // B for this thread, with its first task.
        void pack_once(char& is_packed) {
            for (int64_t panel = 0; !is_packed && panel < product.column_panels; ++panel) product.pack_panel(panel, right);
            is_packed = 1;
        }

        void run(int64_t row_chunk, int64_t column_chunk) {
            const int64_t begin = product.row_chunks.begin(row_chunk), end = product.row_chunks.begin(row_chunk + 1);
            const Parts& columns = product.column_chunks;
            const int64_t first = columns.begin(column_chunk), last = columns.begin(column_chunk + 1);
            const int64_t steps = Panels<P>::steps(of.K);
            int64_t k = 0;
            do {  // also with nothing to sum: C is written
                const int64_t chunk = min(CHUNK_STEPS, steps - k);
                T* result = results;
                for (int64_t t = begin; t < end; t += TILES_AT_ONCE) {
                    const int64_t after = min(t + TILES_AT_ONCE, end);
                    for (int64_t i = t; i < after && tile_size > 0; ++i) pack_tile(i, k, chunk, tiles + (i - t) * tile_size);
                    for (int64_t p = first; p < last; ++p)
                        for (int64_t i = t; i < after; ++i, result += keeps_results ? RESULT_SIZE : 0)
                            multiply(i, tiles + (i - t) * tile_size, p, k, chunk, k + chunk >= steps, result);
                }
                k += CHUNK_STEPS;
            } while (k < steps);
        }

    private:
        static constexpr int64_t RESULT_SIZE = MR * COLUMNS;
        const TiledProduct& product;
        const Matrices& of;
        const int64_t tile_size;
        const bool keeps_results;  // of a chunk of K for the next
        T *const right, *const tiles, *const results;

        // `steps` along K of a row tile, from k on.
        void pack_tile(int64_t t, int64_t k, int64_t steps, T* to) const {
            const Parts& parts = product.row_tiles;
            const int64_t first = k * P::KSTEP, count = min(of.K - first, steps * P::KSTEP);
            if constexpr (P::KSTEP == 2)
                if (of.left_is_transposed) {
                    auto row_at = [&](int64_t i) { return static_cast<const uint16_t*>(of.left(first + i, parts.begin(t))); };
                    return Panels<P>::pack_a_transposed(row_at, parts.size(t), of.M - parts.begin(t), count, to);
                }
            const void* rows[MR];
            for (int64_t r = 0; r < parts.size(t); ++r) rows[r] = of.left(parts.begin(t) + r, first);
            Panels<P>::pack_a(of.left.dtype, rows, parts.size(t), count, to);
        }

        // A row tile by a panel for `steps` along K from `k` on, added to `result`; with the last of them, C is written.
        void multiply(int64_t t, const T* tile, int64_t panel, int64_t k, int64_t steps, bool is_last, T* result) const {
            const int64_t columns = min(of.N - panel * COLUMNS, COLUMNS);
            const Parts of_panel{COLUMNS, TILES_OF_PANEL};
            const int64_t m = t / TILES_OF_PANEL, part = t % TILES_OF_PANEL;
            const bool is_transposed = product.left_in_panels;
            const int64_t first = is_transposed ? m * COLUMNS + of_panel.begin(part) : product.row_tiles.begin(t);
            const int64_t rows = is_transposed ? min(of_panel.size(part), of.M - first) : product.row_tiles.size(t);
            if (rows <= 0) return;
            void* to[MR];
            if (is_last && !of.output_is_transposed) {
                for (int64_t r = 0; r < rows; ++r) to[r] = of.output(first + r, panel * COLUMNS);
                prefetch_output(to, rows, columns * item_size(of.output.dtype));
            }
            using E = typename P::Element;
            const T* const panel_of_left = product.left + m * product.panel_size + of_panel.begin(part);
            const T* const b = right + panel * product.panel_size;
            int64_t done = 0;
            do {
                const int64_t block = min(BLOCK_STEPS, steps - done), at = k + done;
                GemmArguments g{tile + done * rows, A_WIDTH, rows * A_WIDTH, b + at * COLUMNS, COLUMNS, result, block, at > 0};
                if (is_transposed) {
                    g.a = panel_of_left + at * COLUMNS;
                    g.a_panel_steps = COLUMNS;
                    g.a_panel_stride = COLUMNS * COLUMNS;
                    gemm<P, Layout::TRANSPOSED>(int(rows), columns, g);
                } else if (product.reads_left_in_place) {
                    g.a = static_cast<const E*>(of.left(first)) + at;
                    g.a_panel_stride = A_WIDTH;
                    g.a_row_bytes = of.left.stride();
                    gemm<P, Layout::ROWS>(int(rows), columns, g);
                } else {
                    gemm<P>(int(rows), columns, g);
                }
                done += BLOCK_STEPS;
            } while (done < steps);
            if (!is_last) return;
            if (of.output_is_transposed)
                write_transposed(result, first, rows, panel * COLUMNS, columns);
            else
                write(result, to, rows, panel * COLUMNS, columns);
        }

        // The rows of a tile of C are far from each other: each would miss its page and its cache lines at `write`.
        static void prefetch_output(void* const* to, int64_t rows, int64_t bytes) {
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t at = 0; at < bytes; at += CACHE_LINE) __builtin_prefetch(static_cast<const char*>(to[r]) + at, 1);
        }

        void write(const T* result, void* const* to, int64_t rows, int64_t first_column, int64_t columns) const {
            with_data<T>(of.output.dtype, [&](auto data) {
                using Data = decltype(data);
                using Stored = typename Data::Stored;
                Vec<T> added[COLUMNS / W] = {};
                for (int64_t v = 0; of.bias && v < columns; v += W)
                    added[v / W] = load_some<T, Data>(static_cast<const Stored*>(of.bias) + first_column + v, columns - v);
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t v = 0; v < columns; v += W)
                        store_some<T, Data>(static_cast<Stored*>(to[r]) + v, load(result + r * COLUMNS + v) + added[v / W],
                                            columns - v);
            });
        }

        void write_transposed(const T* result, int64_t first, int64_t rows, int64_t first_column, int64_t columns) const {
            with_data<T>(of.output.dtype, [&](auto data) {
                using Data = decltype(data);
                using Stored = typename Data::Stored;
                for (int64_t r = 0; r < rows; r += W) {
                    Vec<T> added{};
                    if (of.bias) added = load_some<T, Data>(static_cast<const Stored*>(of.bias) + first + r, rows - r);
                    for (int64_t v = 0; v < columns; v += W) {
                        Vec<T> block[W];
#pragma GCC unroll 16
                        for (int i = 0; i < W; ++i)
                            block[i] = load(result + min(r + i, rows - 1) * COLUMNS + v);
                        transpose_steps<Vec<T>, W, W / 2>(block);
                        for (int64_t i = 0; i < min(columns - v, W); ++i)
                            store_some<T, Data>(static_cast<Stored*>(of.output(first_column + v + i, first + r)),
                                                block[i] + added, rows - r);
                    }
                }
            });
        }
    };
};

// A product in the way that its matrices ask for.
template <class P>
class Product {
public:
    explicit Product(const Matrices& matrices) : is_few(matrices.has_few_rows), few(matrices), tiled(matrices) {}

    // Bytes of what is packed for all tasks, and of what each thread needs beside it.
    int64_t packed_bytes() const { return is_few ? few.packed_bytes() : tiled.packed_bytes(); }
    int64_t worker_bytes() const { return is_few ? few.worker_bytes() : tiled.worker_bytes(); }
    // Whether that is the right operand, as given, and may be packed before the left one is there.
    bool packs_right_alone() const { return !is_few && tiled.packs_right_alone(); }

    void pack(uintptr_t packed) { is_few ? few.pack(packed) : tiled.pack(packed); }
    void multiply(uintptr_t packed, uintptr_t workers) {
        is_few ? few.multiply(packed, workers) : tiled.multiply(packed, workers);
    }

private:
    const bool is_few;
    const FewRows<P> few;
    TiledProduct<P> tiled;
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
