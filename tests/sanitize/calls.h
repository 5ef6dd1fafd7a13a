// Random calls of the library. Every tensor lies on the heap in exactly the bytes that its sizes and strides reach, and
// what the library has to write is NaN before, so that a sanitizer or a comparison shows any access beyond a tensor
// and any element that was not written. driver.cpp runs them, reference.h says what they must give.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "c_api.h"

class Random {
public:
    explicit Random(uint64_t seed) : engine(seed) {}

    int64_t integer(int64_t low, int64_t high) { return low + int64_t(engine() % uint64_t(high - low + 1)); }
    int64_t bits() { return int64_t(engine()); }
    bool chance(double p) { return double(engine() >> 11) * 0x1p-53 < p; }
    template <class T>
    T pick(std::initializer_list<T> values) {
        return values.begin()[integer(0, int64_t(values.size()) - 1)];
    }
    // Roughly normal; a number that every dtype holds exactly.
    double number() { return double(integer(-31, 31) + integer(-31, 31) + integer(-31, 31)) / 32; }

private:
    std::mt19937_64 engine;
};

constexpr double HIDES = -std::numeric_limits<double>::infinity();

inline int64_t item_size(int64_t dtype) { return std::initializer_list<int64_t>{4, 8, 2, 2, 1, 8, 1}.begin()[dtype]; }
inline int64_t accumulator(int64_t dtype) { return dtype == FUSED_MHA_FLOAT64 ? FUSED_MHA_FLOAT64 : FUSED_MHA_FLOAT32; }

inline double decode(int64_t dtype, const char* p) {
    uint16_t half;
    uint32_t wide;
    float single;
    double result;
    switch (dtype) {
        case FUSED_MHA_FLOAT64: memcpy(&result, p, 8); return result;
        case FUSED_MHA_FLOAT32: memcpy(&single, p, 4); return single;
        case FUSED_MHA_BFLOAT16:
            memcpy(&half, p, 2);
            wide = uint32_t(half) << 16;
            memcpy(&single, &wide, 4);
            return single;
        case FUSED_MHA_FLOAT16: {
            memcpy(&half, p, 2);
            const int exponent = half >> 10 & 31, mantissa = half & 1023;
            const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                                     : exponent == 0 ? std::ldexp(mantissa, -24)
                                                     : std::ldexp(mantissa + 1024, exponent - 25);
            return half >> 15 ? -magnitude : magnitude;
        }
        default: return *p;
    }
}

// Exact for NaN, -inf and what Random::number gives.
inline void encode(int64_t dtype, char* p, double x) {
    const float single = float(x);
    uint32_t wide;
    memcpy(&wide, &single, 4);
    uint16_t half = uint16_t(wide >> 16);
    if (dtype == FUSED_MHA_FLOAT16) {
        const int exponent = x == 0 || !std::isfinite(x) ? 0 : std::ilogb(x) + 15;
        half = std::isnan(x)   ? 0x7e00
               : std::isinf(x) ? 0x7c00
               : x == 0        ? 0
                               : uint16_t(exponent << 10 | (int(std::ldexp(std::fabs(x), 25 - exponent)) & 1023));
        half = uint16_t(half | (std::signbit(x) << 15));
    }
    switch (dtype) {
        case FUSED_MHA_FLOAT64: memcpy(p, &x, 8); break;
        case FUSED_MHA_FLOAT32: memcpy(p, &single, 4); break;
        case FUSED_MHA_BFLOAT16:
        case FUSED_MHA_FLOAT16: memcpy(p, &half, 2); break;
        default: *p = char(x);
    }
}

enum class Layout { ROWS, PERMUTED, EXPANDED };  // EXPANDED: permuted, and some dimensions may have stride 0

class Tensor {
public:
    fused_mha_tensor c{};  // absent until `allocate`
    std::unique_ptr<char[]> storage;

    void allocate(Random& random, int64_t dtype, std::vector<int64_t> size, Layout layout) {
        const int dims = int(size.size()), last = dims - 1;
        c.dtype = dtype;
        std::vector<int> order(size_t(dims - 1));  // of the dimensions before the last, innermost first
        std::iota(order.rbegin(), order.rend(), 0);
        if (layout != Layout::ROWS)
            for (int d = 0; d < dims - 1; ++d) std::swap(order[size_t(d)], order[size_t(random.integer(d, dims - 2))]);
        int64_t step = size[size_t(last)] + (layout == Layout::ROWS ? 0 : random.integer(0, 3)), elements = 1, reach = 1;
        for (int d = 0; d < 4; ++d) c.size[d] = d < dims ? size[size_t(d)] : 1;
        c.stride[last] = 1;
        for (const int d : order) {
            const bool is_expanded = layout == Layout::EXPANDED && random.chance(0.1);
            c.stride[d] = is_expanded ? 0 : step;
            if (!is_expanded) step *= c.size[d] > 0 ? c.size[d] : 1;
        }
        for (int d = 0; d < dims; ++d) {
            elements *= c.size[d];
            if (c.size[d] == 1 && layout != Layout::ROWS) c.stride[d] = random.integer(0, 99);  // means nothing
            reach += (c.size[d] - 1) * c.stride[d];
        }
        c.bytes = elements ? reach * item_size(dtype) : 0;
        storage.reset(new char[size_t(c.bytes)]);
        memset(storage.get(), 0xff, size_t(c.bytes));  // NaN in every floating dtype
        c.data = elements || random.chance(0.5) ? storage.get() : nullptr;  // torch's is null without elements
    }
    void swap_last_dimensions() {  // of two
        std::swap(c.size[0], c.size[1]);
        std::swap(c.stride[0], c.stride[1]);
    }

    explicit operator bool() const { return c.data != nullptr; }
    int64_t elements() const { return c.size[0] * c.size[1] * c.size[2] * c.size[3]; }
    char* at(int64_t i, int64_t j, int64_t k, int64_t l) const {
        return static_cast<char*>(c.data) +
               (i * c.stride[0] + j * c.stride[1] + k * c.stride[2] + l * c.stride[3]) * item_size(c.dtype);
    }
    template <class F>
    void for_each(F&& f) const {
        for (int64_t i = 0; i < c.size[0]; ++i)
            for (int64_t j = 0; j < c.size[1]; ++j)
                for (int64_t k = 0; k < c.size[2]; ++k)
                    for (int64_t l = 0; l < c.size[3]; ++l) f(at(i, j, k, l));
    }
    template <class F>
    void fill(F&& value) {
        for_each([&](char* p) { encode(c.dtype, p, value()); });
    }
    // Whether what lies between the elements is as `allocate` left it.
    bool has_intact_gaps() const {
        std::vector<char> bytes(storage.get(), storage.get() + c.bytes);
        for_each([&](const char* p) { memset(&bytes[size_t(p - storage.get())], 0xff, size_t(item_size(c.dtype))); });
        return std::count(bytes.begin(), bytes.end(), char(0xff)) == c.bytes;
    }
    std::vector<double> values() const {
        std::vector<double> result;
        if (c.data) for_each([&](const char* p) { result.push_back(decode(c.dtype, p)); });
        return result;
    }
};

// The inputs of forward and backward.
struct Call {
    int64_t N, H, H_kv, L, S, D, D_v, dtype, columns, first_visible, last_visible;
    bool add_zero_attn, needs_weights, average_weights;
    double dropout_p, scale, softcap = 0;
    std::vector<int64_t> heads;  // whose weights are given
    Tensor query, key, value, attn_mask, key_padding_mask, bias_k, bias_v, seed, sinks, alibi_slopes, weights_of_heads;
    Tensor cu_seqlens_q, cu_seqlens_k;  // the rows are those of packed sequences
    bool bottom_right = false;
    Tensor grad_output, grad_weights, grad_lse;
    bool needs_mask_gradient, needs_column_gradient, needs_bias_gradient, is_packed;

    explicit Call(uint64_t index) : random(index) {
        draw_sizes(index);
        is_packed = index % 4 == 2;
        if (is_packed) draw_sequences();
        draw_numbers();
        draw_tensors();
        draw_masks();
        draw_gradients();
        draw_score_options();
    }

    // How many batch elements dropout tells apart.
    int64_t elements() const { return is_packed ? cu_seqlens_q.c.size[0] - 1 : N; }

    // The sequence that a query is of, and where that begins and ends; `number` is -1 behind the last one.
    struct Sequence {
        int64_t number, first_query, queries, first_key, keys;
    };
    Sequence sequence_of(int64_t query) const {
        const auto offset = [](const Tensor& t, int64_t n) {
            int64_t x;
            memcpy(&x, t.at(n, 0, 0, 0), 8);
            return x;
        };
        for (int64_t n = 0; n < elements(); ++n)
            if (query < offset(cu_seqlens_q, n + 1)) {
                const int64_t q = offset(cu_seqlens_q, n), k = offset(cu_seqlens_k, n);
                return {n, q, offset(cu_seqlens_q, n + 1) - q, k, offset(cu_seqlens_k, n + 1) - k};
            }
        return {-1, 0, 0, 0, 0};
    }

    // The (N, n, L, S') sizes of the weights of n heads, without n where they are averaged.
    std::vector<int64_t> weights_size() const {
        if (average_weights) return {N, L, columns};
        return {N, int64_t(heads.size()), L, columns};
    }
    // Of a head's weights among those; -1 for none.
    int64_t index_of_weights(int64_t head) const {
        const auto found = std::find(heads.begin(), heads.end(), head);
        return found == heads.end() ? -1 : found - heads.begin();
    }

private:
    Random random;
    bool shares_mask = false;

    void draw_sizes(uint64_t index) {
        dtype = random.pick<int64_t>({FUSED_MHA_FLOAT32, FUSED_MHA_FLOAT64, FUSED_MHA_BFLOAT16, FUSED_MHA_FLOAT16});
        N = random.chance(0.03) ? 0 : random.integer(1, 2);
        H_kv = random.integer(1, 2);
        H = H_kv * random.integer(1, 3);
        L = random.integer(0, random.pick({3, 20, 70, 130}));
        S = random.integer(0, random.pick({3, 40, 130}));
        D = random.integer(1, random.pick({8, 33, 80}));
        D_v = random.chance(0.5) ? D : random.chance(0.05) ? 0 : random.integer(1, 80);
        if (index % 16 == 3) {  // several chunks of keys in the backward, several tiles in the forward
            D = D_v = 64;
            S = random.integer(1100, 1400);
            L = random.integer(1, 30);
            N = 1;
        } else if (index % 16 == 11) {  // many rows, or wide heads
            N = 1;
            H = H_kv = 1;
            if (random.chance(0.5)) {
                L = random.integer(500, 1200);
                S = random.integer(1, 20);
                D = D_v = random.integer(1, 16);
            } else {
                L = S = random.integer(1, 20);
                D = random.integer(200, 600);
            }
        } else if (index % 16 == 5) {  // more than one group of batch elements of a module
            N = random.integer(15, 40);
            H = H_kv = random.integer(1, 2);
            L = random.integer(1, 50);
            S = random.chance(0.5) ? L : random.integer(20, 60);
            D = D_v = random.integer(1, 24);
        } else if (index % 16 == 7) {  // long tasks that add to one mask's gradient
            N = H_kv = 2;
            H = 4;
            L = S = 130;
            D = D_v = 64;
            shares_mask = true;
        }
    }

    void draw_sequences() {
        N = 1;
        bottom_right = random.chance(0.5);
        const int64_t count = random.integer(0, 6);
        const std::pair<Tensor*, int64_t> all[] = {{&cu_seqlens_q, L}, {&cu_seqlens_k, S}};
        for (const auto& [tensor, rows] : all) {
            tensor->allocate(random, FUSED_MHA_INT64, {count + 1}, Layout::ROWS);
            std::vector<int64_t> offsets(size_t(count), 0);
            for (int64_t& x : offsets) x = random.chance(0.2) ? rows : random.integer(0, rows);
            offsets.push_back(0);
            std::sort(offsets.begin(), offsets.end());
            for (int64_t n = 0; n <= count; ++n) memcpy(tensor->at(n, 0, 0, 0), &offsets[size_t(n)], 8);
        }
    }

    void draw_numbers() {
        const int64_t far = int64_t(1) << 60, diagonal = !is_packed && random.chance(0.5) ? S - L : 0;
        first_visible = random.chance(0.7) ? -far : diagonal - random.integer(0, 40);
        last_visible = random.chance(0.5) ? far : diagonal + (random.chance(0.6) ? 0 : random.integer(-30, 40));
        add_zero_attn = !is_packed && random.chance(0.2);
        needs_weights = !is_packed && random.chance(0.4);
        average_weights = random.chance(0.5);
        draw_heads();
        dropout_p = random.chance(0.7) ? 0 : random.pick({0.1, 0.5, 0.9, 1.0});
        scale = random.chance(0.8) ? 1 / std::sqrt(double(D)) : random.pick({0.25, 0.0, -0.25});
    }

    void draw_heads() {
        for (int64_t h = 0; h < H; ++h) heads.push_back(h);
        if (average_weights || random.chance(0.5)) return;
        for (int64_t h = 0; h < H; ++h) std::swap(heads[size_t(h)], heads[size_t(random.integer(h, H - 1))]);
        heads.resize(size_t(random.integer(1, H)));
        weights_of_heads.allocate(random, FUSED_MHA_INT64, {int64_t(heads.size())}, Layout::ROWS);
        for (size_t i = 0; i < heads.size(); ++i) memcpy(weights_of_heads.at(int64_t(i), 0, 0, 0), &heads[i], 8);
    }

    void draw_tensors() {
        const auto draw = [&](Tensor& tensor, std::vector<int64_t> size) {
            tensor.allocate(random, dtype, size, random.pick({Layout::ROWS, Layout::PERMUTED, Layout::EXPANDED}));
            tensor.fill([&] { return random.number(); });
        };
        draw(query, {N, L, H, D});
        draw(key, {N, S, H_kv, D});
        draw(value, {N, S, H_kv, D_v});
        if (!is_packed && random.chance(0.2)) {
            draw(bias_k, {H_kv, D});
            draw(bias_v, {H_kv, D_v});
        }
        columns = S + bool(bias_k) + add_zero_attn;
        if (dropout_p > 0) {
            const int64_t numbers = random.pick({2, FUSED_MHA_PLACED_SEED});
            seed.allocate(random, FUSED_MHA_INT64, {numbers}, Layout::ROWS);
            for (int64_t i = 0; i < numbers; ++i) {
                const int64_t bits = random.bits();
                memcpy(seed.at(i, 0, 0, 0), &bits, 8);
            }
        }
    }

    void draw_masks() {
        const auto mask_dtype = [&] {
            return random.pick<int64_t>({FUSED_MHA_BOOL, FUSED_MHA_BOOL, FUSED_MHA_BOOL, FUSED_MHA_FLOAT32, FUSED_MHA_FLOAT64,
                                         FUSED_MHA_BFLOAT16, FUSED_MHA_FLOAT16, dtype});
        };
        const auto fill = [&](Tensor& mask) {
            const double hidden = random.pick({0.0, 0.2, 0.8, 1.0});
            const bool is_bool = mask.c.dtype == FUSED_MHA_BOOL;
            mask.fill([&] { return random.chance(hidden) ? (is_bool ? 1 : HIDES) : is_bool ? 0 : random.number(); });
        };
        if (shares_mask || (!is_packed && random.chance(0.5))) {
            const auto one_of = [&](int64_t n) { return random.chance(0.5) ? 1 : n; };
            attn_mask.allocate(random, shares_mask ? dtype : mask_dtype(), {one_of(N), shares_mask ? 1 : one_of(H), one_of(L), S},
                               random.pick({Layout::ROWS, Layout::PERMUTED, Layout::EXPANDED}));
            fill(attn_mask);
        }
        if (random.chance(0.4)) {
            const bool is_transposed = random.chance(0.3);
            key_padding_mask.allocate(random, mask_dtype(), is_transposed ? std::vector<int64_t>{S, N} : std::vector<int64_t>{N, S},
                                      random.pick({Layout::ROWS, Layout::PERMUTED, Layout::EXPANDED}));
            if (is_transposed) key_padding_mask.swap_last_dimensions();
            fill(key_padding_mask);
            if (random.chance(0.5)) poison_hidden_keys();
        }
    }

    // The library must never read a key or a value that key_padding_mask hides.
    void poison_hidden_keys() {
        for (Tensor* tensor : {&key, &value})
            for (int64_t n = 0; n < N; ++n)
                for (int64_t j = 0; j < S; ++j) {
                    const bool is_own = (N == 1 || tensor->c.stride[0]) && (S == 1 || tensor->c.stride[1]);
                    const double mask = decode(key_padding_mask.c.dtype, key_padding_mask.at(n, j, 0, 0));
                    if (!is_own || (key_padding_mask.c.dtype == FUSED_MHA_BOOL ? mask == 0 : mask != HIDES)) continue;
                    for (int64_t h = 0; h < H_kv; ++h)
                        for (int64_t d = 0; d < tensor->c.size[3]; ++d) encode(dtype, tensor->at(n, j, h, d), NAN);
                }
    }

    void draw_gradients() {
        const auto draw = [&](Tensor& tensor, int64_t type, std::vector<int64_t> size) {
            tensor.allocate(random, type, size, random.pick({Layout::ROWS, Layout::PERMUTED, Layout::EXPANDED}));
            tensor.fill([&] { return random.number(); });
        };
        draw(grad_output, dtype, {N, L, H, D_v});
        if (needs_weights && random.chance(0.7)) draw(grad_weights, dtype, weights_size());
        if (random.chance(0.3)) draw(grad_lse, accumulator(dtype), {N, H, L});
        needs_mask_gradient = attn_mask && attn_mask.c.dtype != FUSED_MHA_BOOL && (shares_mask || random.chance(0.7));
        needs_column_gradient = random.chance(0.3);
        needs_bias_gradient = random.chance(0.7);
    }

    void draw_score_options() {
        const auto draw = [&](Tensor& of_heads, double factor) {
            of_heads.allocate(random, random.pick<int64_t>({dtype, FUSED_MHA_FLOAT32, FUSED_MHA_BFLOAT16}), {H}, Layout::ROWS);
            of_heads.fill([&] { return random.number() * factor; });
        };
        if (random.chance(0.2)) draw(sinks, 1);
        if (random.chance(0.2)) draw(alibi_slopes, 1.0 / 256);  // far keys' scores are as exact as the others'
        if (random.chance(0.2)) softcap = random.pick({0.5, 2.0, 8.0});
        if (!is_packed) bottom_right = random.chance(0.5);
    }
};
