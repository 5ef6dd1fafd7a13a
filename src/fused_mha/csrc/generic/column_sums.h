// The sums of a matrix's columns: the gradient of a bias is that of the rows which it was added to.
#pragma once

#include "generic/product.h"

namespace fused_mha::FMHA_ISA {
namespace {

// Sums the rows of `matrix`, (batch, length, columns). One task sums some columns of all rows, so that the order is one
// for any number of threads; sums of few rows are summed again, so that errors do not grow with their number.
template <class T>
class ColumnSums {
public:
    ColumnSums(const fused_mha_tensor& matrix, const fused_mha_tensor& sums)
        : rows(matrix), count(matrix.size[0] * matrix.size[1]), columns(matrix.size[2]), sums(sums) {}

    void run(int64_t threads) const {
        auto task = [&](int64_t index, int64_t) { sum(index * WIDTH, min(WIDTH, columns - index * WIDTH)); };
        fused_mha::run(ceil_div(columns, WIDTH), threads, task);
    }

private:
    static constexpr int64_t VECTORS = 4, WIDTH = VECTORS * LANES<T>, ROWS_OF_SUM = 32;
    const Rows rows;
    const int64_t count, columns;
    const fused_mha_tensor& sums;

    void sum(int64_t first_column, int64_t width) const {
        Vec<T> total[VECTORS] = {};
        with_data<T>(rows.dtype, [&](auto data) {
            using Data = decltype(data);
            for (int64_t first = 0; first < count; first += ROWS_OF_SUM) {
                Vec<T> some[VECTORS] = {};
                for (int64_t i = first; i < min(first + ROWS_OF_SUM, count); ++i) {
                    const auto* row = static_cast<const typename Data::Stored*>(rows(i, first_column));
                    for (int64_t v = 0; v < VECTORS; ++v)
                        if (v * LANES<T> < width)
                            some[v] = some[v] + load_some<T, Data>(row + v * LANES<T>, width - v * LANES<T>);
                }
                for (int64_t v = 0; v < VECTORS; ++v) total[v] = total[v] + some[v];
            }
        });
        with_data<T>(sums.dtype, [&](auto data) {
            using Data = decltype(data);
            auto* to = element<typename Data::Stored>(sums, first_column);
            for (int64_t v = 0; v < VECTORS && v * LANES<T> < width; ++v)
                store_some<T, Data>(to + v * LANES<T>, total[v], width - v * LANES<T>);
        });
    }
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
