// Panels: how matrices lie for gemm.h, and the ways from and to tensors.
//
// A matrix [rows][columns] is cut into panels of NR columns; each panel lies row after row. Rows come as pointers, null
// for zeros, since keys that no query may see are never read.
#pragma once

#include <type_traits>
#include <utility>

#include "c_api.h"
#include "generic/gemm.h"

namespace fused_mha::FMHA_ISA {
namespace {

// What a row holds, and how it becomes a vector.
struct Float32Data {
    using Stored = float;
    static FMHA_INLINE vfloat load(const Stored* p) { return FMHA_ISA::load(p); }
    static FMHA_INLINE void store(Stored* p, vfloat v) { FMHA_ISA::store(p, v); }
};
struct Float64Data {
    using Stored = double;
    static FMHA_INLINE vdouble load(const Stored* p) { return FMHA_ISA::load(p); }
    static FMHA_INLINE void store(Stored* p, vdouble v) { FMHA_ISA::store(p, v); }
};
struct BFloat16Data {
    using Stored = uint16_t;
    static FMHA_INLINE vfloat load(const Stored* p) { return load_bfloat16(p); }
    static FMHA_INLINE void store(Stored* p, vfloat v) { store_bfloat16(p, v); }
};
struct HalfData {
    using Stored = uint16_t;
    static FMHA_INLINE vfloat load(const Stored* p) { return load_half(p); }
    static FMHA_INLINE void store(Stored* p, vfloat v) { store_half(p, v); }
};

// float32 that takes part as the bfloat16 it rounds to, as a module's weights under autocast.
constexpr int64_t ROUNDED_TO_BFLOAT16 = 7;  // beside the dtypes of c_api.h
struct RoundedData {
    using Stored = float;
    static FMHA_INLINE vfloat load(const Stored* p) { return rounded_to_bfloat16(FMHA_ISA::load(p)); }
};

template <class T>
using OwnData = std::conditional_t<sizeof(T) == 8, Float64Data, Float32Data>;
template <class T>
constexpr int64_t OWN_DTYPE = sizeof(T) == 8 ? FUSED_MHA_FLOAT64 : FUSED_MHA_FLOAT32;

// Calls f with the type of data for `dtype`; T is the accumulator type.
template <class T, class F>
FMHA_INLINE void with_data(int64_t dtype, F&& f) {
    if constexpr (sizeof(T) == 8) {
        f(Float64Data{});
    } else {
        switch (dtype) {
            case FUSED_MHA_BFLOAT16: return f(BFloat16Data{});
            case FUSED_MHA_FLOAT16: return f(HalfData{});
            default: return f(Float32Data{});
        }
    }
}

// The same for a matrix that is only read, a weight perhaps.
template <class T, class F>
FMHA_INLINE void with_weight(int64_t dtype, F&& f) {
    if constexpr (sizeof(T) == 4)
        if (dtype == ROUNDED_TO_BFLOAT16) return f(RoundedData{});
    with_data<T>(dtype, f);
}

// `n` elements from p, from 1 to a vector; zeros behind them, and nothing behind them is read.
template <class T, class Data>
FMHA_INLINE Vec<T> load_some(const typename Data::Stored* p, int64_t n) {
    if (n >= LANES<T>) return Data::load(p);
    typename Data::Stored padded[LANES<T>] = {};
    copy_some_bytes(padded, p, n * int64_t(sizeof *p));
    return Data::load(padded);
}
template <class T, class Data>
FMHA_INLINE void store_some(typename Data::Stored* p, Vec<T> v, int64_t n) {
    if (n >= LANES<T>) return Data::store(p, v);
    typename Data::Stored padded[LANES<T>];
    Data::store(padded, v);
    copy_some_bytes(p, padded, n * int64_t(sizeof *p));
}

// Rows as they are: to[panel][row][WIDTH], zeros behind the last column. WIDTH counts elements of T.
template <class T, class Data, int WIDTH>
void pack_rows_of(const void* const* rows, int64_t count, int64_t columns, T* to, int64_t panel_stride) {
    const int64_t whole = columns / WIDTH * WIDTH;
    for (int64_t r = 0; r < count; ++r) {
        const auto* row = static_cast<const typename Data::Stored*>(rows[r]);
        T* at = to + r * WIDTH;
        if (!row) {
            for (int64_t c = 0; c < columns; c += WIDTH, at += panel_stride) memset(at, 0, WIDTH * sizeof(T));
            continue;
        }
        for (int64_t c = 0; c < whole; c += WIDTH, at += panel_stride)
            for (int64_t v = 0; v < WIDTH; v += LANES<T>) store(at + v, Data::load(row + c + v));
        if (whole < columns)
            for (int64_t v = 0; v < WIDTH; v += LANES<T>) {
                const int64_t left = columns - whole - v;
                store(at + v, left > 0 ? load_some<T, Data>(row + whole + v, left) : Vec<T>{});
            }
    }
}

template <class V, int STEP, bool HIGH, size_t... I>
FMHA_INLINE V exchange(V a, V b, std::index_sequence<I...>) {
    // Of every 2 * STEP lanes, the first (or second) STEP of a and then those of b.
    constexpr auto lane = [](size_t i) {
        return int((i & STEP ? sizeof...(I) : 0) + (i & ~size_t(2 * STEP - 1)) + (i & (STEP - 1)) + (HIGH ? STEP : 0));
    };
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, lane(I)...);
#else  // GCC 11
    return __builtin_shuffle(a, b, decltype(a < b){lane(I)...});
#endif
}
template <class V, int WIDTH, int STEP>
FMHA_INLINE void transpose_steps(V* x) {
    if constexpr (STEP > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; ++i)
            if (!(i & STEP)) {
                const V a = x[i], b = x[i + STEP];
                x[i] = exchange<V, STEP, false>(a, b, std::make_index_sequence<WIDTH>{});
                x[i + STEP] = exchange<V, STEP, true>(a, b, std::make_index_sequence<WIDTH>{});
            }
        transpose_steps<V, WIDTH, STEP / 2>(x);
    }
}

// Lane i of the result is the sum of the lanes of x[i], of as many vectors as they have lanes; x is overwritten.
template <class T, int WIDTH = LANES<T> / 2>
FMHA_INLINE Vec<T> sum_lanes(Vec<T>* x) {
    if constexpr (WIDTH == 0) {
        return x[0];
    } else {
        constexpr auto all = std::make_index_sequence<LANES<T>>{};
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; ++i)
            x[i] = exchange<Vec<T>, WIDTH, false>(x[i], x[i + WIDTH], all) + exchange<Vec<T>, WIDTH, true>(x[i], x[i + WIDTH], all);
        return sum_lanes<T, WIDTH / 2>(x);
    }
}

// NR rows as the columns of one panel: to[column][NR]. Behind the first `count` of them, whole vectors may be left out.
template <class T, class Data>
void pack_transposed_of(const void* const* rows, int64_t count, int64_t columns, T* to) {
    constexpr int W = LANES<T>;
    for (int half = 0; half < count; half += W)
        for (int64_t c = 0; c < columns; c += W) {
            const int64_t left = columns - c;
            Vec<T> block[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) {
                const auto* row = static_cast<const typename Data::Stored*>(rows[half + i]);
                block[i] = row ? load_some<T, Data>(row + c, left) : Vec<T>{};
            }
            transpose_steps<Vec<T>, W, W / 2>(block);
            for (int i = 0; i < W && i < left; ++i) store(to + (c + i) * NR<T> + half, block[i]);
        }
}

#if defined(FMHA_BFLOAT16_DOT)
// Pairs of bfloat16 as 32-bit elements: a row of odd length is read as one with a zero behind it.
struct PairData {
    using Stored = float;
    static FMHA_INLINE vfloat load(const Stored* p) { return FMHA_ISA::load(p); }
};
// Pairs of float32, rounded.
struct RoundedPairData {
    struct Stored {
        float first, second;
    };
    static FMHA_INLINE vfloat load(const Stored* p) {
        return to_bfloat16(FMHA_ISA::load(&p->first), FMHA_ISA::load(&p[LANES<float> / 2].first));
    }
};
template <>
FMHA_INLINE vfloat load_some<float, RoundedPairData>(const RoundedPairData::Stored* p, int64_t n) {
    if (n >= LANES<float>) return RoundedPairData::load(p);
    RoundedPairData::Stored padded[LANES<float>] = {};
    memcpy(padded, p, size_t(n) * sizeof *p);
    return RoundedPairData::load(padded);
}
// Two rows of bfloat16 as pairs along the rows: lane i of the result is (first[i], second[i]).
FMHA_INLINE vfloat pair_rows(vfloat first, vfloat second) {
    vuint low, high;
    memcpy(&low, &first, sizeof low);
    memcpy(&high, &second, sizeof high);
    low = (low >> 16) | high;  // load_bfloat16 put both into the upper halves
    memcpy(&first, &low, sizeof low);
    return first;
}
#endif

// The operands of a policy, from rows of tensors of type `dtype`.
template <class P>
struct Panels {
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>;

    static int64_t panels(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; }
    // Steps along K for a matrix whose K dimension has `n` entries.
    static int64_t steps(int64_t n) { return (n + P::KSTEP - 1) / P::KSTEP; }
    static constexpr int A_WIDTH = COLUMNS / P::KSTEP;  // elements of a row of a panel of A

    // A operand: to[panel][row][A_WIDTH].
    static void pack_a(int64_t dtype, const void* const* rows, int64_t count, int64_t columns, T* to) {
        with_weight<T>(dtype, [&](auto data) {
            pack_rows_of<T, decltype(data), COLUMNS>(rows, count, columns, to, count * COLUMNS);
        });
    }
    // B operand from rows that run along K: to[panel][step][COLUMNS], `panel_stride` elements from panel to panel.
    static void pack_b(int64_t dtype, const void* const* rows, int64_t count, int64_t columns, T* to,
                       int64_t panel_stride) {
        with_data<T>(dtype, [&](auto data) {
            pack_rows_of<T, decltype(data), COLUMNS>(rows, count, columns, to, panel_stride);
        });
    }
    // B operand, one panel, from COLUMNS rows that run across K: to[step][COLUMNS]. Of columns from the vector behind the
    // first `count` on, nothing need be written.
    static void pack_b_transposed(int64_t dtype, const void* const* rows, int64_t columns, T* to, int64_t count = COLUMNS) {
        with_weight<T>(dtype, [&](auto data) { pack_transposed_of<T, decltype(data)>(rows, count, columns, to); });
    }
};

#if defined(FMHA_BFLOAT16_DOT)
template <>
struct Panels<BFloat16> {
    using T = float;
    static constexpr int COLUMNS = NR<T>, A_WIDTH = COLUMNS / 2;

    static int64_t panels(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; }
    static int64_t steps(int64_t n) { return (n + 1) / 2; }

    static void pack_a(int64_t dtype, const void* const* rows, int64_t count, int64_t columns, T* to) {
        with_pairs(dtype, [&](auto data) {
            pack_rows_of<T, decltype(data), A_WIDTH>(rows, count, columns / 2, to, count * A_WIDTH);
        });
        if (columns % 2) last_column(dtype, rows, count, columns, to, count * A_WIDTH);
    }
    // `count` columns of a matrix as rows: row_at(k) is where they start in its row k, in which `left` elements follow.
    template <class F>
    static void pack_a_transposed(const F& row_at, int64_t count, int64_t left, int64_t K, T* to) {
        const int64_t width = left < LANES<T> ? left : LANES<T>;  // what is read beside the columns is not stored
        auto load_row = [&](int64_t k) { return k < K ? load_some<T, BFloat16Data>(row_at(k), width) : vfloat{}; };
        for (int64_t k = 0; k < K; k += 2 * A_WIDTH, to += count * A_WIDTH) {
            vfloat block[A_WIDTH];
            for (int64_t i = 0; i < A_WIDTH; ++i) block[i] = pair_rows(load_row(k + 2 * i), load_row(k + 2 * i + 1));
            transpose_steps<vfloat, A_WIDTH, A_WIDTH / 2>(block);
            for (int64_t r = 0; r < count; ++r) store(to + r * A_WIDTH, block[r]);
        }
    }
    static void pack_b(int64_t, const void* const* rows, int64_t count, int64_t columns, T* to, int64_t panel_stride) {
        for (int64_t r = 0; r < count; r += 2) {
            const auto* first = static_cast<const uint16_t*>(rows[r]);
            const auto* second = r + 1 < count ? static_cast<const uint16_t*>(rows[r + 1]) : nullptr;
            T* at = to + r / 2 * COLUMNS;
            for (int64_t c = 0; c < columns; c += COLUMNS, at += panel_stride)
                for (int v = 0; v < COLUMNS; v += LANES<T>) {
                    const int64_t left = columns - c - v;
                    const vfloat a = first && left > 0 ? load_some<T, BFloat16Data>(first + c + v, left) : vfloat{};
                    const vfloat b = second && left > 0 ? load_some<T, BFloat16Data>(second + c + v, left) : vfloat{};
                    store(at + v, pair_rows(a, b));
                }
        }
    }
    static void pack_b_transposed(int64_t dtype, const void* const* rows, int64_t columns, T* to, int64_t count = COLUMNS) {
        with_pairs(dtype, [&](auto data) { pack_transposed_of<T, decltype(data)>(rows, count, columns / 2, to); });
        if (columns % 2)
            for (int i = 0; i < COLUMNS; ++i) to[columns / 2 * COLUMNS + i] = last_element(dtype, rows[i], columns);
    }

private:
    template <class F>
    static FMHA_INLINE void with_pairs(int64_t dtype, F&& f) {
        if (dtype == ROUNDED_TO_BFLOAT16) return f(RoundedPairData{});
        f(PairData{});
    }
    static float last_element(int64_t dtype, const void* row, int64_t columns) {
        uint32_t bits = 0;
        if (row)
            bits = dtype == ROUNDED_TO_BFLOAT16 ? to_bfloat16_bits<uint32_t>(static_cast<const float*>(row)[columns - 1])
                                                : static_cast<const uint16_t*>(row)[columns - 1];
        float pair;
        memcpy(&pair, &bits, sizeof pair);
        return pair;
    }
    static void last_column(int64_t dtype, const void* const* rows, int64_t count, int64_t columns, T* to,
                            int64_t panel_stride) {
        const int64_t pair = columns / 2;
        T* at = to + pair / A_WIDTH * panel_stride;
        for (int64_t r = 0; r < count; ++r, at += A_WIDTH) {
            if (pair % A_WIDTH == 0)
                for (int i = 0; i < A_WIDTH; ++i) at[i] = 0;
            at[pair % A_WIDTH] = last_element(dtype, rows[r], columns);
        }
    }
};
#endif

// A row of a panelled matrix [panel][rows][NR], times `factor`, to a row of a tensor.
template <class T>
void unpack_row(const T* from, int64_t panel_stride, int64_t columns, T factor, int64_t dtype, void* row) {
    with_data<T>(dtype, [&](auto data) {
        using Data = decltype(data);
        auto* to = static_cast<typename Data::Stored*>(row);
        for (int64_t c = 0; c < columns; c += NR<T>, from += panel_stride)
            for (int64_t v = 0; v < NR<T> && c + v < columns; v += LANES<T>)
                store_some<T, Data>(to + c + v, load(from + v) * splat(factor), columns - c - v);
    });
}

}  // namespace
}  // namespace fused_mha::FMHA_ISA
