// Matrix products of whole tensors, for the projections and their gradients: C = A B, plus a bias on every row.
//
// B is packed once for all tasks; a task packs some rows of A and multiplies them with some panels of B. The three
// products of a linear layer differ in which operands lie transposed: y = x W^T, dx = dy W, dW = dy^T x.
#pragma once

#include "generic/attention.h"
#include "parallel.h"

namespace fused_mha::FMHA_ISA {
namespace {

template <class P>
class Product {
public:
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>, W = LANES<T>;
    static constexpr int64_t A_WIDTH = Panels<P>::A_WIDTH;

    explicit Product(const fused_mha_product_arguments& call)
        : call(call),
          M(call.output.size[0]),
          N(call.output.size[1]),
          K(call.left.size[call.left_is_transposed ? 0 : 1]),
          column_panels(ceil_div(N, COLUMNS)),
          row_panels(call.left_is_transposed ? ceil_div(M, COLUMNS) : 0),
          panel_size(Panels<P>::steps(K) * COLUMNS),
          row_tiles(call.left_is_transposed ? Parts{row_panels * TILES_OF_PANEL, row_panels * TILES_OF_PANEL}
                                            : Parts{M, ceil_div(M, MR)}) {
        // Tasks of some row tiles by some panels of columns: enough for the threads, as long as packing A stays cheap.
        row_chunks = {row_tiles.parts, ceil_div(row_tiles.parts, TILES_OF_TASK)};
        const int64_t wanted = ceil_div(4 * call.threads, max(row_chunks.parts, 1));
        column_chunks = {column_panels, max(min(wanted, column_panels / FEWEST_PANELS), 1)};
        Arena measure{0};
        Worker(*this, measure);
        worker_bytes = measure.used;
    }

    int64_t workspace() const { return workspace_bytes(packed_bytes(), worker_bytes, call.threads); }

    void run() {
        Arena shared{aligned(call.workspace.data)};
        right = shared.take<T>(column_panels * panel_size);
        left = shared.take<T>(row_panels * panel_size);
        const uintptr_t base = shared.base + uintptr_t(shared.used);
        const int64_t blocks = max(ceil_div(K, PACKED_ROWS), 1);
        const int64_t of_right = call.right_is_transposed ? column_panels : blocks;
        auto pack = [&](int64_t index, int64_t) {
            if (index >= of_right)
                pack_rows(call.left, index - of_right, M, left);
            else if (call.right_is_transposed)
                pack_panel(index);
            else
                pack_rows(call.right, index, N, right);
        };
        fused_mha::run(of_right + (call.left_is_transposed ? blocks : 0), call.threads, pack);
        auto multiply = [&](int64_t index, int64_t worker) {
            Arena arena{base + uintptr_t(worker * worker_bytes)};
            Worker(*this, arena).run(index / column_chunks.parts, index % column_chunks.parts);
        };
        fused_mha::run(row_chunks.parts * column_chunks.parts, call.threads, multiply);
    }

private:
    static constexpr int64_t TILES_OF_TASK = 8, FEWEST_PANELS = 8, PACKED_ROWS = 128;
    static constexpr int64_t TILES_OF_PANEL = (COLUMNS + MR - 1) / MR;
    const fused_mha_product_arguments& call;
    const int64_t M, N, K;
    const int64_t column_panels, row_panels, panel_size;
    const Parts row_tiles;
    Parts row_chunks, column_chunks;
    int64_t worker_bytes;
    T *right, *left;  // packed: [panel of N or M][step along K][COLUMNS]

    int64_t packed_bytes() const {
        Arena shared{0};
        shared.take<T>(column_panels * panel_size);
        shared.take<T>(row_panels * panel_size);
        return shared.used;
    }

    static const void* row(const fused_mha_tensor& t, int64_t i, int64_t first = 0) {
        return static_cast<const char*>(t.data) + (i * t.stride[0] + first) * item_size(t.dtype);
    }

    // One panel of B^T as it lies.
    void pack_panel(int64_t panel) const {
        const void* rows[COLUMNS];
        for (int64_t c = 0; c < COLUMNS; ++c) {
            const int64_t j = panel * COLUMNS + c;
            rows[c] = j < N ? row(call.right, j) : nullptr;
        }
        Panels<P>::pack_b_transposed(call.right.dtype, rows, K, right + panel * panel_size);
    }

    // One block of the rows of a matrix that lies along K.
    void pack_rows(const fused_mha_tensor& matrix, int64_t block, int64_t columns, T* to) const {
        const int64_t first = block * PACKED_ROWS, count = min(PACKED_ROWS, K - first);
        const void* rows[PACKED_ROWS];
        for (int64_t r = 0; r < count; ++r) rows[r] = row(matrix, first + r);
        Panels<P>::pack_b(matrix.dtype, rows, count, columns, to + first / P::KSTEP * COLUMNS, panel_size);
    }

    class Worker {
    public:
        Worker(const Product& product, Arena& arena)
            : product(product),
              tile_size(product.call.left_is_transposed ? 0 : MR * A_WIDTH * Panels<P>::panels(product.K)),
              tiles(arena.take<T>(TILES_OF_TASK * tile_size)),
              result(arena.take<T>(MR * COLUMNS)) {}

        void run(int64_t row_chunk, int64_t column_chunk) {
            const int64_t begin = product.row_chunks.begin(row_chunk), end = product.row_chunks.begin(row_chunk + 1);
            if (!product.call.left_is_transposed)
                for (int64_t t = begin; t < end; ++t) pack_tile(t, tiles + (t - begin) * tile_size);
            const Parts& columns = product.column_chunks;
            for (int64_t p = columns.begin(column_chunk); p < columns.begin(column_chunk + 1); ++p)
                for (int64_t t = begin; t < end; ++t) multiply(t, tiles + (t - begin) * tile_size, p);
        }

    private:
        const Product& product;
        const int64_t tile_size;
        T *const tiles, *const result;

        void pack_tile(int64_t t, T* to) const {
            const Parts& parts = product.row_tiles;
            const void* rows[MR];
            for (int64_t r = 0; r < parts.size(t); ++r) rows[r] = row(product.call.left, parts.begin(t) + r);
            Panels<P>::pack_a(product.call.left.dtype, rows, parts.size(t), product.K, to);
        }

        void multiply(int64_t t, const T* tile, int64_t panel) const {
            const int64_t K = product.K, steps = Panels<P>::steps(K);
            const T* const b = product.right + panel * product.panel_size;
            const int64_t columns = min(product.N - panel * COLUMNS, COLUMNS);
            int64_t first, rows;
            if (product.call.left_is_transposed) {
                const Parts of_panel{COLUMNS, TILES_OF_PANEL};
                const int64_t m = t / TILES_OF_PANEL, part = t % TILES_OF_PANEL;
                first = m * COLUMNS + of_panel.begin(part);
                rows = min(of_panel.size(part), product.M - first);
                if (rows <= 0) return;
                gemm_in_blocks<P, true>(int(rows), columns,
                                        {product.left + m * product.panel_size + of_panel.begin(part), COLUMNS,
                                         COLUMNS * COLUMNS, b, COLUMNS, result, steps, false});
            } else {
                first = product.row_tiles.begin(t);
                rows = product.row_tiles.size(t);
                gemm_in_blocks<P>(int(rows), columns,
                                  {tile, A_WIDTH, rows * A_WIDTH, b, COLUMNS, result, steps, false});
            }
            write(first, rows, panel * COLUMNS, columns);
        }

        void write(int64_t first, int64_t rows, int64_t first_column, int64_t columns) const {
            const fused_mha_tensor &output = product.call.output, &bias = product.call.bias;
            with_data<T>(output.dtype, [&](auto data) {
                using Data = decltype(data);
                using Stored = typename Data::Stored;
                for (int64_t v = 0; v < columns; v += W) {
                    Vec<T> added{};
                    if (bias.data)
                        added = load_some<T, Data>(static_cast<const Stored*>(row(bias, 0, first_column + v)), columns - v);
                    for (int64_t r = 0; r < rows; ++r)
                        store_some<T, Data>(
                            static_cast<Stored*>(const_cast<void*>(row(output, first + r, first_column + v))),
                            load(result + r * COLUMNS + v) + added, columns - v);
                }
            });
        }
    };
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
