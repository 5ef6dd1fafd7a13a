// Products of a few rows with a large matrix, which is read once and where it lies. Memory sets their pace, as for one token
// at a time: packing would write the matrix and read it again. product.h asks here first.
//
// The three products of a linear layer have loops of their own: the dot products of y = x W^T, whose operands both run
// along K; the sums of rows dx = dy W; and the outer products dW = dy^T x, whose K is the few rows.
#pragma once

#include "generic/matrices.h"

namespace fused_mha::FMHA_ISA {
namespace {

// One vector of operands of dot products: COUNT elements along K.
template <class P, class Data>
struct Terms {
    using T = typename P::Accumulator;
    static constexpr int64_t COUNT = LANES<T>;
    static FMHA_INLINE Vec<T> load(const typename Data::Stored* p) { return Data::load(p); }
    static FMHA_INLINE Vec<T> load_some(const typename Data::Stored* p, int64_t n) { return FMHA_ISA::load_some<T, Data>(p, n); }
};
#if defined(FMHA_BFLOAT16_DOT)
template <>
struct Terms<BFloat16, BFloat16Data> {
    static constexpr int64_t COUNT = 2 * LANES<float>;
    static FMHA_INLINE vfloat load(const uint16_t* p) {
        vfloat pairs;
        memcpy(&pairs, p, sizeof pairs);
        return pairs;
    }
    static FMHA_INLINE vfloat load_some(const uint16_t* p, int64_t n) {
        uint16_t padded[COUNT] = {};
        copy_some_bytes(padded, p, n * 2);
        return load(padded);
    }
};
template <>
struct Terms<BFloat16, RoundedData> {
    static constexpr int64_t COUNT = 2 * LANES<float>;
    static FMHA_INLINE vfloat load(const float* p) {
        return to_bfloat16(FMHA_ISA::load(p), FMHA_ISA::load(p + LANES<float>));
    }
    static FMHA_INLINE vfloat load_some(const float* p, int64_t n) {
        float padded[COUNT] = {};
        memcpy(padded, p, size_t(n) * sizeof *p);
        return load(padded);
    }
};
#endif

template <class P>
class FewRows {
public:
    using T = typename P::Accumulator;

    explicit FewRows(const Matrices& of)
        : of(of),
          is_outer(of.left_is_transposed),
          is_dots(of.right_is_transposed),
          count(is_outer ? of.K : of.M),
          rows(ceil_div(count, rows_at_once()) * rows_at_once()),
          few_size(is_dots ? ceil_div(of.K, terms()) * W : is_outer ? ceil_div(max(of.M, of.N), W) * W : 0) {
        // The large matrix is the right operand, or the result of outer products.
        const int64_t row = (is_dots ? of.K : of.N) * item_size(is_outer ? of.output.dtype : of.right.dtype);
        const int64_t large_rows = is_dots ? of.N : is_outer ? of.M : of.K;
        const bool is_serial = row * large_rows < SERIAL_BYTES && double(of.M) * double(of.N) * double(of.K) < SERIAL_WORK;
        threads = is_serial ? 1 : of.threads;
        // A task has some rows of the large matrix; for sums of rows, some columns of all of them, as many as come at once.
        if (!is_dots && !is_outer) {
            unit = min(2 * MR / rows_at_once(), MOST_VECTORS) * W;
            const int64_t most = max(MOST_SUMS / max(rows, 1), unit);
            const int64_t wanted = threads > 1 ? min(2 * threads, of.N / FEWEST_COLUMNS) : 1;
            tasks = {ceil_div(of.N, unit), max(wanted, max(ceil_div(of.N, most), 1))};
        } else {
            unit = W;
            const int64_t all = is_outer ? of.M : of.N, most = max(min(BYTES_OF_TASK / max(row, 1), MOST_OF_TASK) / W, 1);
            tasks = {ceil_div(all, unit), max(ceil_div(ceil_div(all, unit), most), 1)};
        }
        step = ceil_div(tasks.count, tasks.parts) * unit;
    }

    // Bytes of what is the same for all tasks, and of what each thread needs beside it.
    int64_t packed_bytes() const {
        Arena shared{0};
        take_few(shared);
        return shared.used;
    }
    int64_t worker_bytes() const {
        Arena arena{0};
        arena.take<T>(is_outer ? 0 : rows * step);
        return arena.used;
    }

    void pack(uintptr_t packed) const {
        Arena shared{packed};
        const Few few = take_few(shared);
        if (is_dots) {
            with_terms(of.left.dtype, [&](auto data) {
                using Data = decltype(data);
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t k = 0; k < of.K; k += Terms<P, Data>::COUNT)
                        store(few.left + r * few_size + k / Terms<P, Data>::COUNT * W,
                              r < count ? terms_at<Data>(static_cast<const typename Data::Stored*>(of.left(r)) + k, of.K - k)
                                        : Vec<T>{});
            });
            return;
        }
        if (!is_outer) return;
        unpack(of.left, of.M, few.left);
        unpack(of.right, of.N, few.right);
    }

    void multiply(uintptr_t packed, uintptr_t workers) const {
        Arena shared{packed};
        const Few few = take_few(shared);
        const int64_t all = is_outer ? of.M : of.N;
        auto task = [&](int64_t index, int64_t worker) {
            Arena arena{workers + uintptr_t(worker * worker_bytes())};
            T* const sums = arena.take<T>(is_outer ? 0 : rows * step);
            const int64_t first = tasks.begin(index) * unit, end = min(tasks.begin(index + 1) * unit, all);
            if (is_outer) return write_outer(few, first, end);
            if (is_dots)
                sum_dots(few.left, first, end, sums);
            else
                sum_rows(first, end, sums);
            for (int64_t r = 0; r < count; ++r) write(sums + r * step, first, end - first, r);
        };
        fused_mha::run<Order::IN_SHARES>(all > 0 ? tasks.parts : 0, threads, task);
    }

private:
    static constexpr int W = LANES<T>, ROWS = 4, BLOCK = 4;  // of the few rows, and of the large matrix's, at once
    // Sums of rows: most of the few rows and vectors of the large matrix's at once, and how many of its rows. More would not
    // stay in the first-level cache where they are a multiple of 4 KB from each other.
    static constexpr int MOST_AT_ONCE = MR < 8 ? 4 : 8, MOST_VECTORS = 8, DEPTH = 32;
    // Bytes of a matrix that are read, and multiply-adds that are done, while another thread would wake.
    static constexpr int64_t SERIAL_BYTES = 1 << 20;
    static constexpr double SERIAL_WORK = 1 << 20;
    static constexpr int64_t BYTES_OF_TASK = 128 * 1024, MOST_OF_TASK = 256;
    static constexpr int64_t FEWEST_COLUMNS = 128, MOST_SUMS = 64 * 1024;  // of a task, in the second-level cache
    const Matrices of;
    const bool is_outer, is_dots;
    const int64_t count, rows;  // of the few; rows of zeros fill the last block
    const int64_t few_size;     // accumulators of a row of theirs
    int64_t threads, unit;      // `unit` rows, or columns, of the large matrix are done at once
    Parts tasks;                // of units
    int64_t step;               // rows, or columns, of the largest task

    struct Few {
        T *left, *right;
    };
    Few take_few(Arena& shared) const {
        T* const left = shared.take<T>(rows * few_size);
        return {left, shared.take<T>(is_outer ? rows * few_size : 0)};
    }

    int64_t rows_at_once() const {
        if (is_outer || count <= 2) return max(count, 1);
        return is_dots || count <= ROWS ? ROWS : MOST_AT_ONCE;
    }

    static constexpr int64_t terms() { return W * P::KSTEP; }
    // Calls f with the type of data of an operand of dot products.
    template <class F>
    static FMHA_INLINE void with_terms(int64_t dtype, F&& f) {
        if constexpr (P::KSTEP == 1) {
            with_weight<T>(dtype, f);
        } else {
            if (dtype == ROUNDED_TO_BFLOAT16) return f(RoundedData{});
            f(BFloat16Data{});
        }
    }
    template <class Data>
    static FMHA_INLINE Vec<T> terms_at(const typename Data::Stored* p, int64_t n) {
        return n >= terms() ? Terms<P, Data>::load(p) : Terms<P, Data>::load_some(p, n);
    }

    void unpack(const Rows& matrix, int64_t columns, T* to) const {
        for (int64_t r = 0; r < rows; ++r) {
            const void* row = r < count ? matrix(r) : nullptr;
            with_data<T>(matrix.dtype, [&](auto data) {
                pack_rows_of<T, decltype(data), W>(&row, 1, columns, to + r * few_size, W);
            });
        }
    }

    // Sums of `columns` from `first` on, with the bias, to a row of the output.
    void write(const T* sums, int64_t first, int64_t columns, int64_t row) const {
        with_data<T>(of.output.dtype, [&](auto data) {
            using Data = decltype(data);
            auto* to = static_cast<typename Data::Stored*>(of.output(row, first));
            for (int64_t c = 0; c < columns; c += W)
                store_some<T, Data>(to + c, load(sums + c) + bias_at<Data>(first + c, columns - c), columns - c);
        });
    }
    template <class Data>
    FMHA_INLINE Vec<T> bias_at(int64_t column, int64_t n) const {
        return of.bias ? load_some<T, Data>(static_cast<const typename Data::Stored*>(of.bias) + column, n) : Vec<T>{};
    }

    // y = x W^T: sums[r][j] for the columns from `first` to `end`.
    void sum_dots(const T* x, int64_t first, int64_t end, T* sums) const {
        with_terms(of.right.dtype, [&](auto data) {
            using Data = decltype(data);
            if (rows == 1) return sum_dots_by<Data, 1>(x, first, end, sums);
            if (rows == 2) return sum_dots_by<Data, 2>(x, first, end, sums);
            sum_dots_by<Data, ROWS>(x, first, end, sums);
        });
    }
    // R rows by so many columns at once that their sums fill a vector. The rows of W that come next are fetched meanwhile,
    // by each block of rows a part: the processor's own prefetching does not keep up with the sums.
    template <class Data, int R>
    void sum_dots_by(const T* x, int64_t first, int64_t end, T* sums) const {
        constexpr int COLUMNS = W > R ? W / R : 1;
        const int64_t blocks = rows / R;
        for (int64_t j = first; j < end; j += COLUMNS) {
            const typename Data::Stored* weights[COLUMNS];
            for (int c = 0; c < COLUMNS; ++c)
                weights[c] = static_cast<const typename Data::Stored*>(of.right(min(j + c, end - 1)));
            for (int64_t block = 0; block < blocks; ++block) {
                T found[R * COLUMNS];
                const int64_t ahead = COLUMNS * block / blocks, ahead_end = R < ROWS ? 0 : COLUMNS * (block + 1) / blocks;
                const auto* next = static_cast<const char*>(of.right(min(j + COLUMNS + ahead, of.N - 1)));
                dots<Data, R, COLUMNS>(x + block * R * few_size, weights, next,
                                       min(ahead_end - ahead, of.N - j - COLUMNS - ahead), found);
                for (int64_t c = 0; c < min(end - j, COLUMNS); ++c)
                    for (int r = 0; r < R; ++r) sums[(block * R + r) * step + j - first + c] = found[r * COLUMNS + c];
            }
        }
    }
    template <class Data, int R, int COLUMNS>
    FMHA_INLINE void dots(const T* x, const typename Data::Stored* const* weights, const char* next, int64_t next_rows,
                          T* found) const {
        constexpr int ALL = R * COLUMNS;
        static_assert(ALL % W == 0);
        Vec<T> acc[ALL] = {};
        const int64_t next_stride = of.right.stride();
        int64_t k = 0;
        for (; k + terms() <= of.K; k += terms(), x += W) {
            for (int64_t i = 0; i < next_rows; ++i)
                __builtin_prefetch(next + i * next_stride + k * int64_t(sizeof(typename Data::Stored)));
            multiply_terms<R, COLUMNS>(x, acc, [&](int c) { return Terms<P, Data>::load(weights[c] + k); });
        }
        if (k < of.K)
            multiply_terms<R, COLUMNS>(x, acc, [&](int c) { return Terms<P, Data>::load_some(weights[c] + k, of.K - k); });
#pragma GCC unroll 4
        for (int i = 0; i < ALL; i += W) store(found + i, sum_lanes<T>(acc + i));
    }
    template <int R, int COLUMNS, class F>
    FMHA_INLINE void multiply_terms(const T* x, Vec<T>* acc, const F& weight_of) const {
        Vec<T> weight[COLUMNS];
#pragma GCC unroll 16
        for (int c = 0; c < COLUMNS; ++c) weight[c] = weight_of(c);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec<T> terms_of_x = load(x + r * few_size);
#pragma GCC unroll 16
            for (int c = 0; c < COLUMNS; ++c)
                acc[r * COLUMNS + c] = P::multiply_add(acc[r * COLUMNS + c], terms_of_x, weight[c]);
        }
    }

    // dx = dy W: sums[r][j] for the columns from `first` to `end`. Some rows of W at a time are added to the sums.
    void sum_rows(int64_t first, int64_t end, T* sums) const {
        zero(sums, rows * step * int64_t(sizeof(T)));
        with_data<T>(of.right.dtype, [&](auto data) {
            using Data = decltype(data);
            for (int64_t k = 0; k < of.K; k += DEPTH) {
                const int64_t depth = min(of.K - k, DEPTH);
                const typename Data::Stored* weights[DEPTH];
                for (int64_t i = 0; i < depth; ++i) weights[i] = static_cast<const typename Data::Stored*>(of.right(k + i, first));
                if (count == 1) add_rows<Data, 1>(k, weights, depth, end - first, sums);
                else if (count == 2) add_rows<Data, 2>(k, weights, depth, end - first, sums);
                else if (count <= ROWS) add_rows<Data, ROWS>(k, weights, depth, end - first, sums);
                else add_rows<Data, MOST_AT_ONCE>(k, weights, depth, end - first, sums);
            }
        });
    }
    template <class Data, int R>
    void add_rows(int64_t k, const typename Data::Stored* const* weights, int64_t depth, int64_t columns, T* sums) const {
        constexpr int VECTORS = 2 * MR / R < MOST_VECTORS ? 2 * MR / R : MOST_VECTORS;
        for (int64_t r = 0; r < rows; r += R) {
            T factors[R][DEPTH];
            for (int i = 0; i < R; ++i) {  // rows behind the last are the last once more
                const auto* dy = static_cast<const typename Data::Stored*>(of.left(min(r + i, count - 1), k));
                for (int64_t v = 0; v < depth; v += W) store(factors[i] + v, load_some<T, Data>(dy + v, depth - v));
            }
            T* const to = sums + r * step;
            int64_t c = 0;
            for (; c + VECTORS * W <= columns; c += VECTORS * W)
                add_columns<Data, R, VECTORS>(factors, weights, depth, c, to, [](auto* p) { return Data::load(p); });
            for (; c + W <= columns; c += W)
                add_columns<Data, R, 1>(factors, weights, depth, c, to, [](auto* p) { return Data::load(p); });
            if (c < columns)
                add_columns<Data, R, 1>(factors, weights, depth, c, to, [&](auto* p) { return load_some<T, Data>(p, columns - c); });
        }
    }
    template <class Data, int R, int VECTORS, class F>
    FMHA_INLINE void add_columns(const T (&factors)[R][DEPTH], const typename Data::Stored* const* weights, int64_t depth,
                                 int64_t first, T* sums, const F& load_vector) const {
        Vec<T> acc[R][VECTORS];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) acc[r][v] = Vec<T>{};
        for (int64_t k = 0; k < depth; ++k) {
            Vec<T> weight[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) weight[v] = load_vector(weights[k] + first + v * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec<T> factor = splat(factors[r][k]);
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) acc[r][v] = factor * weight[v] + acc[r][v];
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) {
                T* const at = sums + r * step + first + v * W;
                store(at, load(at) + acc[r][v]);
            }
    }

    // dW = dy^T x: the rows from `first` to `end`.
    void write_outer(const Few& few, int64_t first, int64_t end) const {
        with_data<T>(of.output.dtype, [&](auto data) {
            using Data = decltype(data);
            for (int64_t m = first; m < end; m += BLOCK) {
                const T* dy[BLOCK];
                typename Data::Stored* to[BLOCK];
                for (int64_t b = 0; b < BLOCK; ++b) {  // rows behind the last are the last once more
                    dy[b] = few.left + min(m + b, end - 1);
                    to[b] = static_cast<typename Data::Stored*>(of.output(min(m + b, end - 1)));
                }
                int64_t j = 0;
                for (; j + BLOCK * W <= of.N; j += BLOCK * W)
                    write_block<Data, BLOCK>(dy, few.right + j, j, to, [](auto* p, Vec<T> x) { Data::store(p, x); });
                for (; j < of.N; j += W)
                    write_block<Data, 1>(dy, few.right + j, j, to,
                                         [&](auto* p, Vec<T> x) { store_some<T, Data>(p, x, of.N - j); });
            }
        });
    }
    template <class Data, int VECTORS, class F>
    FMHA_INLINE void write_block(const T* const* dy, const T* x, int64_t column, typename Data::Stored* const* to,
                                 const F& store_vector) const {
        Vec<T> acc[BLOCK][VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            const Vec<T> bias = bias_at<Data>(column + v * W, of.N - column - v * W);
#pragma GCC unroll 4
            for (int b = 0; b < BLOCK; ++b) acc[b][v] = bias;
        }
        for (int64_t r = 0; r < count; ++r, x += few_size) {
            Vec<T> columns[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) columns[v] = load(x + v * W);
#pragma GCC unroll 4
            for (int b = 0; b < BLOCK; ++b) {
                const Vec<T> factor = splat(dy[b][r * few_size]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) acc[b][v] = factor * columns[v] + acc[b][v];
            }
        }
#pragma GCC unroll 4
        for (int b = 0; b < BLOCK; ++b)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) store_vector(to[b] + column + v * W, acc[b][v]);
    }
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
