// Which scores count: padding, causality and windows, boolean and additive masks, read where they lie.
//
// Scores come in tiles of some rows by one panel of keys. Before a tile is computed `look` tells whether anything in it is
// visible; afterwards `apply` puts -inf in the place of hidden scores and adds the additive masks. With an additive
// mask, a cap, ALiBi, or with a scale that is not positive, all scores of a call are scaled there ("natural"), else in
// the softmax.
#pragma once

#include <cmath>

#include "generic/exp2.h"
#include "generic/panels.h"

namespace fused_mha::FMHA_ISA {
namespace {

// A panel of keys that some query may see: its first key, and the columns that none may see.
struct KeyPanel {
    int64_t first;
    uint32_t hidden;
};

// The columns from..to of a panel as bits; none where to < from.
FMHA_INLINE uint32_t column_bits(int64_t from, int64_t to, int64_t width) {
    from = from < 0 ? 0 : from;
    to = to >= width ? width - 1 : to;
    return from > to ? 0 : uint32_t(((uint64_t(2) << to) - 1) & ~((uint64_t(1) << from) - 1));
}

template <class T>
FMHA_INLINE T element_as(int64_t dtype, const void* data, int64_t index) {
    switch (dtype) {
        case FUSED_MHA_FLOAT64: return T(static_cast<const double*>(data)[index]);
        case FUSED_MHA_BFLOAT16: return T(of_bfloat16_bits<float>(uint32_t(static_cast<const uint16_t*>(data)[index])));
        case FUSED_MHA_FLOAT16: return T(of_half_bits<float>(uint32_t(static_cast<const uint16_t*>(data)[index])));
        default: return T(static_cast<const float*>(data)[index]);
    }
}

// `count` <= NR elements of an additive mask from `index` on; zeros behind.
template <class T>
FMHA_INLINE void load_mask(const fused_mha_tensor& mask, int64_t index, int64_t stride, int64_t count, Vec<T> (&values)[2]) {
    const bool has_lanes_of_T = (mask.dtype == FUSED_MHA_FLOAT64) == (sizeof(T) == 8);
    if (stride == 1 && has_lanes_of_T)
        return with_data<T>(mask.dtype, [&](auto data) {
            using Data = decltype(data);
            const auto* row = static_cast<const typename Data::Stored*>(mask.data) + index;
            for (int v = 0; v < 2; ++v) {
                const int64_t left = count - v * LANES<T>;
                values[v] = left > 0 ? load_some<T, Data>(row + v * LANES<T>, left) : Vec<T>{};
            }
        });
    T elements[NR<T>] = {};
    for (int64_t c = 0; c < count; ++c) elements[c] = element_as<T>(mask.dtype, mask.data, index + c * stride);
    for (int v = 0; v < 2; ++v) values[v] = load(elements + v * LANES<T>);
}

template <class T>
struct TileMask {
    enum { HIDDEN, PLAIN, MASKED } kind;
    bool hides;           // whether any of `hidden` is set
    uint32_t hidden[MR];  // of each row
};

template <class T>
class Masking {
public:
    static constexpr int COLUMNS = NR<T>;
    static constexpr T NEGATIVE_INFINITY = -T(INFINITY);
    static constexpr T LOG2_E = T(1.44269504088896340736);

    const int64_t L, S, keys;  // `keys` counts the virtual ones too
    const bool natural;
    const T score_factor;  // of the scores as `apply` leaves them, to natural units
    const T exponent_factor;  // to exponents of 2
    const T cap;              // of scaled scores; 0 for none

    explicit Masking(const fused_mha_attention& a)
        : L(a.query.size[1]),
          S(a.key.size[1]),
          keys(S + (a.bias_k.data != nullptr) + (a.add_zero_attn != 0)),
          natural((a.attn_mask.data && a.attn_mask.dtype != FUSED_MHA_BOOL) ||
                  (a.key_padding_mask.data && a.key_padding_mask.dtype != FUSED_MHA_BOOL) || a.alibi_slopes.data ||
                  a.softcap > 0 || !(T(a.scale) > 0)),
          score_factor(natural ? T(1) : T(a.scale)),
          exponent_factor(score_factor * LOG2_E),
          cap(T(a.softcap)),
          a(a),
          to_cap(a.softcap > 0 ? T(a.scale / a.softcap * OF_TANH_BY_EXP2) : T(0)),
          scale(a.softcap > 0 ? T(1) : T(a.scale)) {}

    // Writes those of the panels from..to that some query of batch element n may see, in order; returns how many.
    int64_t visible_panels(int64_t n, KeyPanel* panels, int64_t from, int64_t to) const {
        int64_t count = 0;
        for (int64_t first = from * COLUMNS; first < to * COLUMNS; first += COLUMNS) {
            const uint32_t hidden = ~column_bits(0, keys - 1 - first, COLUMNS) | padded_columns(n, first);
            if ((hidden & ALL) != ALL) panels[count++] = {first, hidden & ALL};
        }
        return count;
    }

    // The additive key_padding_mask over a panel.
    void padding_values(int64_t n, int64_t first, T* values) const {
        const fused_mha_tensor& mask = a.key_padding_mask;
        Vec<T> x[2];
        load_mask<T>(mask, n * mask.stride[0] + first * mask.stride[1], mask.stride[1], real_columns(first), x);
        for (int v = 0; v < 2; ++v) store(values + v * LANES<T>, x[v]);
    }
    // What the additive attn_mask and ALiBi add to the score of query i and the real key j.
    T added(int64_t n, int64_t h, int64_t i, int64_t j) const {
        const T of_mask = adds_mask() ? element_as<T>(a.attn_mask.dtype, a.attn_mask.data, mask_index(n, h, i, j)) : T(0);
        return has_alibi() ? of_mask - unfused(splat(slope(h) * T(std::abs(position(i) - j))))[0] : of_mask;
    }
    // A score in natural units, in one expression, so that compilers round it alike in the forward and the backward.
    // Where there is a cap, `score` is what `capped` gives.
    FMHA_INLINE Vec<T> scaled(Vec<T> score, Vec<T> mask, Vec<T> padding) const { return (score * splat(scale) + mask) + padding; }
    // A score that is scaled and capped, and the derivative of that but for the scale.
    FMHA_INLINE Vec<T> capped(Vec<T> score, Vec<T>& derivative) const {
        const Vec<T> t = tanh_by_exp2<T>(score * splat(to_cap));
        derivative = 1 - t * t;
        return unfused(t * splat(cap));
    }
    bool caps() const { return cap > 0; }
    bool has_alibi() const { return a.alibi_slopes.data != nullptr; }
    bool adds_mask() const { return a.attn_mask.data && a.attn_mask.dtype != FUSED_MHA_BOOL; }
    // How far the keys of a panel are from query i.
    FMHA_INLINE void distances(int64_t i, int64_t first, Vec<T> (&d)[2]) const {
        for (int v = 0; v < 2; ++v) {
            const Vec<T> ahead = splat(T(first + v * LANES<T> - position(i))) + counted();
            d[v] = absolute(ahead);
        }
    }
    // A head's logit beside those of its keys, in the units of scores as `apply` leaves them; -inf without.
    T sink(int64_t h) const { return lse_of_hidden(h) / score_factor; }
    // Of a row that sees no key: the sink.
    T lse_of_hidden(int64_t h) const {
        return a.sinks.data ? element_as<T>(a.sinks.dtype, a.sinks.data, h) : NEGATIVE_INFINITY;
    }
    bool adds_padding() const { return a.key_padding_mask.data && a.key_padding_mask.dtype != FUSED_MHA_BOOL; }

    // Whether causality and the window let any of the rows see any key of the panel.
    bool band_sees(int64_t row, int64_t rows, int64_t first) const {
        if (first + COLUMNS > S && keys > S) return true;
        return first <= row + rows - 1 + a.last_visible && first + COLUMNS - 1 >= row + a.first_visible;
    }

    TileMask<T> look(int64_t n, int64_t h, int64_t row, int64_t rows, const KeyPanel& panel) const {
        TileMask<T> mask;
        if (!band_sees(row, rows, panel.first)) {
            mask.kind = mask.HIDDEN;
            return mask;
        }
        const bool tests_keys = a.attn_mask.data && a.attn_mask.dtype == FUSED_MHA_BOOL;
        if (!tests_keys && !natural && !panel.hidden && panel.first + COLUMNS - 1 <= row + a.last_visible &&
            panel.first >= row + rows - 1 + a.first_visible) {
            mask.kind = mask.PLAIN;
            return mask;
        }
        uint32_t some = panel.hidden, all = ALL;
        const uint32_t is_virtual = keys > S ? column_bits(S - panel.first, keys - 1 - panel.first, COLUMNS) : 0;
        const int64_t real = real_columns(panel.first);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t position = row + r - panel.first;
            uint32_t hidden = ~column_bits(position + a.first_visible, position + a.last_visible, COLUMNS);
            if (tests_keys && real > 0)
                hidden |= nonzero_bytes(static_cast<const uint8_t*>(a.attn_mask.data) + mask_index(n, h, row + r, panel.first),
                                        int(real));
            hidden = ((hidden & ~is_virtual) | panel.hidden) & ALL;
            mask.hidden[r] = hidden;
            some |= hidden;
            all &= hidden;
        }
        mask.hides = some != 0;
        mask.kind = all == ALL ? mask.HIDDEN : some ? mask.MASKED : mask.PLAIN;
        if (adds_mask() && mask.kind != mask.HIDDEN && !is_virtual && additive_hides_all(n, h, row, rows, panel.first, real))
            mask.kind = mask.HIDDEN;
        if (natural && mask.kind == mask.PLAIN) mask.kind = mask.MASKED;
        return mask;
    }

    // `scores` are rows of one panel, `padding` the panel's padding_values. Where scores are capped, `cap_slopes` gets the
    // derivative of that, if it is given.
    void apply(const TileMask<T>& mask, int64_t n, int64_t h, int64_t row, int64_t rows, const KeyPanel& panel,
               const T* padding, T* scores, T* cap_slopes = nullptr) const {
        if (caps()) cap_scores(rows * COLUMNS, scores, cap_slopes);
        if (!mask.hides && !adds_mask() && !adds_padding() && !has_alibi() && scale == 1) return;
        const int64_t real = real_columns(panel.first);
        const Vec<T> slopes = splat(has_alibi() ? slope(h) : T(0));
        for (int64_t r = 0; r < rows; ++r, scores += COLUMNS) {
            Vec<T> x[2] = {load(scores), load(scores + LANES<T>)};
            if (natural) {
                Vec<T> added[2] = {};
                if (adds_mask() && real > 0)
                    load_mask<T>(a.attn_mask, mask_index(n, h, row + r, panel.first), 1, real, added);
                if (has_alibi() && real > 0) {
                    Vec<T> d[2];
                    distances(row + r, panel.first, d);
                    for (int v = 0; v < 2; ++v) added[v] = added[v] - unfused(slopes * d[v]);
                    const uint32_t is_virtual = ~column_bits(0, real - 1, COLUMNS);
                    for (int v = 0; real < COLUMNS && v < 2; ++v) added[v] = select(is_virtual >> (v * LANES<T>), added[v], Vec<T>{});
                }
                for (int v = 0; v < 2; ++v)
                    x[v] = scaled(x[v], added[v], adds_padding() ? load(padding + v * LANES<T>) : Vec<T>{});
            }
            for (int v = 0; v < 2; ++v)
                store(scores + v * LANES<T>,
                      select(mask.hidden[r] >> (v * LANES<T>), x[v], splat(NEGATIVE_INFINITY)));
        }
    }

    int64_t mask_index(int64_t n, int64_t h, int64_t i, int64_t j) const {
        const fused_mha_tensor& mask = a.attn_mask;
        return (mask.size[0] > 1 ? n * mask.stride[0] : 0) + (mask.size[1] > 1 ? h * mask.stride[1] : 0) +
               (mask.size[2] > 1 ? i * mask.stride[2] : 0) + j;
    }

private:
    static constexpr uint32_t ALL = uint32_t((uint64_t(1) << COLUMNS) - 1);
    const fused_mha_attention& a;
    const T to_cap, scale;  // of scores to what the cap takes, and of what it gives

    void cap_scores(int64_t count, T* scores, T* slopes) const {
        Vec<T> slope;
        for (int64_t i = 0; !slopes && i < count; i += LANES<T>) store(scores + i, capped(load(scores + i), slope));
        for (int64_t i = 0; slopes && i < count; i += LANES<T>) {
            store(scores + i, capped(load(scores + i), slope));
            store(slopes + i, slope);
        }
    }

    T slope(int64_t h) const { return element_as<T>(a.alibi_slopes.dtype, a.alibi_slopes.data, h); }
    // Of query i among the keys.
    int64_t position(int64_t i) const { return a.bottom_right ? i + S - L : i; }
    static Vec<T> counted() {
        Vec<T> lanes;
        for (int i = 0; i < LANES<T>; ++i) lanes[i] = T(i);
        return lanes;
    }

    // Of the panel from key `first` on, as many as there are real keys; not positive where all are virtual.
    int64_t real_columns(int64_t first) const { return S - first < COLUMNS ? S - first : COLUMNS; }

    // The columns from `first` on that the key_padding_mask hides from every query.
    uint32_t padded_columns(int64_t n, int64_t first) const {
        const fused_mha_tensor& mask = a.key_padding_mask;
        const int64_t real = real_columns(first);
        if (!mask.data || real <= 0) return 0;
        const int64_t index = n * mask.stride[0] + first * mask.stride[1];
        if (mask.dtype == FUSED_MHA_BOOL && mask.stride[1] == 1)
            return nonzero_bytes(static_cast<const uint8_t*>(mask.data) + index, int(real));
        uint32_t hidden = 0;
        for (int64_t c = 0; c < real; ++c) {
            const int64_t at = index + c * mask.stride[1];
            const bool hides = mask.dtype == FUSED_MHA_BOOL ? static_cast<const uint8_t*>(mask.data)[at] != 0
                                                            : element_as<T>(mask.dtype, mask.data, at) == NEGATIVE_INFINITY;
            hidden |= uint32_t(hides) << c;
        }
        return hidden;
    }

    bool additive_hides_all(int64_t n, int64_t h, int64_t row, int64_t rows, int64_t first, int64_t real) const {
        for (int64_t r = 0; r < (a.attn_mask.size[2] > 1 ? rows : 1); ++r) {
            const int64_t index = mask_index(n, h, row + r, first);
            auto is_hidden = [&](int64_t c) {
                return element_as<T>(a.attn_mask.dtype, a.attn_mask.data, index + c) == NEGATIVE_INFINITY;
            };
            if (!is_hidden(0)) return false;  // most often
            if (real == COLUMNS) {
                Vec<T> x[2], visible[2];
                load_mask<T>(a.attn_mask, index, 1, real, x);
                for (int v = 0; v < 2; ++v) visible[v] = x[v] == splat(NEGATIVE_INFINITY) ? Vec<T>{} : splat(T(1));
                if (reduce_max(max(visible[0], visible[1])) > 0) return false;
                continue;
            }
            for (int64_t c = 1; c < real; ++c)
                if (!is_hidden(c)) return false;
        }
        return true;
    }
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
