// What forward and backward attention share: the sizes of a call, its workspaces, and packed tiles of keys and values.
#pragma once

#include "generic/exp2.h"
#include "generic/masking.h"
#include "generic/philox.h"
#include "generic/tiles.h"

namespace fused_mha::FMHA_ISA {
namespace {

FMHA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FMHA_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FMHA_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// `count` things in `parts` parts whose sizes differ by one at most.
struct Parts {
    int64_t count, parts;
    int64_t begin(int64_t part) const { return part * (count / parts) + min(part, count % parts); }
    int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }
};

constexpr int64_t CACHE_LINE = 64;
FMHA_INLINE uintptr_t aligned(void* workspace) {
    return (reinterpret_cast<uintptr_t>(workspace) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
}

// Consecutive pieces of a workspace, each on a cache line of its own; with a base of 0 it only measures.
struct Arena {
    uintptr_t base;
    int64_t used = 0;
    template <class T>
    T* take(int64_t count) {
        T* at = reinterpret_cast<T*>(base + uintptr_t(used));
        used += ceil_div(count * int64_t(sizeof(T)), CACHE_LINE) * CACHE_LINE;
        return at;
    }
};

// In a call with ALiBi a thread gives zero where a result is below the normal numbers: far keys have such weights in every
// row, and each instruction that meets one costs an Intel processor over a hundred cycles. A task begins with
// `flush_subnormals` and ends with `keep_subnormals`, which takes what that has given.
#if defined(__SSE2__)
FMHA_INLINE unsigned flush_subnormals(const fused_mha_attention& a) {
    constexpr unsigned FLUSH_RESULTS = 0x8000;
    const unsigned before = __builtin_ia32_stmxcsr();
    if (a.alibi_slopes.data) __builtin_ia32_ldmxcsr(before | FLUSH_RESULTS);
    return before;
}
FMHA_INLINE void keep_subnormals(const fused_mha_attention& a, unsigned before) {
    if (a.alibi_slopes.data) __builtin_ia32_ldmxcsr(before);
}
#else
FMHA_INLINE unsigned flush_subnormals(const fused_mha_attention&) { return 0; }
FMHA_INLINE void keep_subnormals(const fused_mha_attention&, unsigned) {}
#endif

// Null rows of no columns are fine, as they are not for memset.
FMHA_INLINE void zero(void* at, int64_t bytes) {
    if (bytes > 0) memset(at, 0, size_t(bytes));
}

// A workspace with a part for each thread; more than there can be where that overflows.
FMHA_INLINE int64_t workspace_bytes(int64_t shared, int64_t of_worker, int64_t threads) {
    int64_t bytes;
    const bool overflows = __builtin_mul_overflow(of_worker, threads, &bytes) ||
                           __builtin_add_overflow(bytes, shared + CACHE_LINE, &bytes);
    return overflows ? INT64_MAX : bytes;
}

template <class T>
FMHA_INLINE T* element(const fused_mha_tensor& t, int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) {
    return static_cast<T*>(t.data) + i * t.stride[0] + j * t.stride[1] + k * t.stride[2] + l * t.stride[3];
}
FMHA_INLINE int64_t item_size(int64_t dtype) {
    constexpr int64_t SIZES[] = {4, 8, 2, 2, 1, 8, 1, 4};
    return SIZES[dtype];
}
FMHA_INLINE void* row_of(const fused_mha_tensor& t, int64_t i, int64_t j, int64_t k) {
    return static_cast<char*>(t.data) + (i * t.stride[0] + j * t.stride[1] + k * t.stride[2]) * item_size(t.dtype);
}

// `count` places of a dimension from `first` on; an absent tensor stays.
FMHA_INLINE fused_mha_tensor narrowed(fused_mha_tensor t, int dim, int64_t first, int64_t count) {
    if (!t.data) return t;
    t.data = static_cast<char*>(t.data) + first * t.stride[dim] * item_size(t.dtype);
    t.size[dim] = count;
    return t;
}

constexpr int TO_FIRST_LEVEL = 3, TO_SECOND_LEVEL = 2;  // of the caches
template <int LEVEL = TO_SECOND_LEVEL>
FMHA_INLINE void prefetch_rows(const void* const* rows, int64_t count, int64_t bytes) {
    for (int64_t r = 0; r < count; ++r)
        if (rows[r])
            for (int64_t at = 0; at < bytes; at += CACHE_LINE)
                __builtin_prefetch(static_cast<const char*>(rows[r]) + at, 0, LEVEL);
}

// Key (or value) `j` of a head: a real one, the bias, or null for the zero key.
FMHA_INLINE const void* key_row(const fused_mha_tensor& keys, const fused_mha_tensor& bias, int64_t n, int64_t j,
                                int64_t head) {
    if (j < keys.size[1]) return row_of(keys, n, j, head);
    return bias.data && j == keys.size[1] ? row_of(bias, head, 0, 0) : nullptr;
}

// Where a head's weights are among those that are given, and so their gradient; -1 for a head whose are not.
FMHA_INLINE int64_t index_of_weights(const fused_mha_attention& a, int64_t head) {
    if (!a.weights_of_heads.data) return head;
    for (int64_t i = 0; i < a.weights_of_heads.size[0]; ++i)
        if (*element<int64_t>(a.weights_of_heads, i) == head) return i;
    return -1;
}

// What forward and backward share: sizes, masks, and the pointers to the rows of a panel of keys.
template <class P>
struct Attention {
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>;

    const fused_mha_attention& a;
    const Masking<T> masking;
    const int64_t N, L, H, D, H_kv, D_v, group;
    const bool reads_in_place;  // keys and values, for a single query
    const int64_t row_tiles;    // of the queries of one head
    const int64_t first_batch;  // in the whole call, of which this may be a part: dropout draws by it

    explicit Attention(const fused_mha_attention& a, int64_t first_batch = 0)
        : a(a), masking(a), N(a.query.size[0]), L(a.query.size[1]), H(a.query.size[2]), D(a.query.size[3]),
          H_kv(a.key.size[2]), D_v(a.value.size[3]), group(H / H_kv), reads_in_place(L == 1),
          row_tiles(ceil_div(L, MR)), first_batch(first_batch) {}

    Parts rows_of_head() const { return {L, row_tiles}; }
    bool drops() const { return a.dropout_p > 0; }
    T kept_factor() const {
        const double p = drawn_probability(a.dropout_p);
        return p < 1 ? T(1 / (1 - p)) : T(0);
    }
    DropoutSeed seed() const {
        return {drops() ? static_cast<const int64_t*>(a.seed.data) : NO_SEED, drops() ? a.seed.size[0] : 2, H, a.dropout_p};
    }

    // Which columns of a panel dropout keeps in each row.
    FMHA_INLINE void draw(const DropoutSeed& seed, int64_t n, int64_t h, int64_t row, int64_t rows, const KeyPanel& panel,
                          uint32_t* kept) const {
        draw_kept<COLUMNS>(seed, first_batch + n, h, row, rows, panel.first, kept);
    }

    void rows_of_panel(const fused_mha_tensor& keys, const fused_mha_tensor& bias, int64_t n, int64_t head,
                       const KeyPanel& panel, const void** rows) const {
        for (int64_t c = 0; c < COLUMNS; ++c)
            rows[c] = panel.hidden >> c & 1 ? nullptr : key_row(keys, bias, n, panel.first + c, head);
    }

private:
    static constexpr int64_t NO_SEED[2] = {0, 0};
};

constexpr int64_t MOST_TILE_KEYS = 512;

// A tile of keys and values of one head: up to some number of panels, packed unless they are read in place.
template <class P>
class KeyTile {
public:
    using T = typename P::Accumulator;
    static constexpr int COLUMNS = NR<T>;

    const KeyPanel* panels;
    int64_t count;
    T* keys;     // [panel][step along D][COLUMNS]
    T* values;   // [panel of D_v][step along the tile's keys][COLUMNS]
    T* padding;  // [panel][COLUMNS], the additive key_padding_mask

    KeyTile(const Attention<P>& attention, int64_t most) : attention(attention), most(most) {}

    // Elements that hold a tile.
    int64_t size() const {
        return keys_size() + values_size() + most * COLUMNS;
    }

    // Takes at most `most` of the panels first..end of one head, which lie packed at `storage`, or will.
    void place(int64_t batch, int64_t of_head, const KeyPanel* first, const KeyPanel* end, T* storage) {
        n = batch;
        head = of_head;
        panels = first;
        count = min(most, end - first);
        left = end - first;
        keys = storage;
        values = keys + keys_size();
        padding = values + values_size();
    }

    void pack() const {
        if (attention.masking.adds_padding())
            for (int64_t p = 0; p < count; ++p) attention.masking.padding_values(n, panels[p].first, padding + p * COLUMNS);
        if (attention.reads_in_place) return;
        pack_keys();
        pack_values();
    }

    int64_t value_panel_stride() const { return count * COLUMNS * value_steps(); }

    // Brings one of `parts` of the rows of the panels behind into the cache, while a row tile attends to these.
    void prefetch_next(int64_t parts, int64_t part) const {
        const Parts rows{min(left - count, count) * COLUMNS, parts};
        for (int64_t i = rows.begin(part); i < rows.begin(part + 1); ++i)
            for (const fused_mha_tensor* tensor : {&attention.a.key, &attention.a.value})
                prefetch_row(*tensor, panels[count + i / COLUMNS], i % COLUMNS);
    }

private:
    const Attention<P>& attention;
    const int64_t most;
    int64_t n, head, left;  // `left` counts the panels behind too

    int64_t keys_size() const { return attention.reads_in_place ? 0 : most * COLUMNS * Panels<P>::steps(attention.D); }
    int64_t values_size() const {
        return attention.reads_in_place ? 0 : most * COLUMNS * value_steps() * Panels<P>::panels(attention.D_v);
    }
    static int64_t value_steps() { return COLUMNS / P::KSTEP; }  // along the keys of a panel

    void pack_keys() const {
        const fused_mha_attention& a = attention.a;
        const int64_t stride = Panels<P>::steps(attention.D) * COLUMNS;
        for_rows_of_panels(a.key, a.bias_k, [&](int64_t p, const void* const* rows) {
            Panels<P>::pack_b_transposed(a.key.dtype, rows, attention.D, keys + p * stride);
        });
    }

    void pack_values() const {
        const fused_mha_attention& a = attention.a;
        for_rows_of_panels(a.value, a.bias_v, [&](int64_t p, const void* const* rows) {
            Panels<P>::pack_b(a.value.dtype, rows, COLUMNS, attention.D_v, values + p * COLUMNS * value_steps(),
                              value_panel_stride());
        });
    }

    void prefetch_row(const fused_mha_tensor& tensor, const KeyPanel& panel, int64_t column) const {
        const int64_t j = panel.first + column;
        if (j >= tensor.size[1] || panel.hidden >> column & 1) return;
        const void* row = row_of(tensor, n, j, head);
        prefetch_rows(&row, 1, tensor.size[3] * item_size(tensor.dtype));
    }

    // Calls f(panel, its rows). Rows of other heads lie between those of one, so the processor's own prefetching is of
    // little use: the next panel's rows are fetched meanwhile.
    template <class F>
    void for_rows_of_panels(const fused_mha_tensor& tensor, const fused_mha_tensor& bias, F&& f) const {
        const void* rows[2][COLUMNS];
        const int64_t bytes = tensor.size[3] * item_size(tensor.dtype);
        for (int64_t p = 0; p < count; ++p) {
            if (p == 0) attention.rows_of_panel(tensor, bias, n, head, panels[p], rows[p % 2]);
            if (p + 1 < count) {
                attention.rows_of_panel(tensor, bias, n, head, panels[p + 1], rows[(p + 1) % 2]);
                prefetch_rows(rows[(p + 1) % 2], COLUMNS, bytes);
            }
            f(p, rows[p % 2]);
        }
    }
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
