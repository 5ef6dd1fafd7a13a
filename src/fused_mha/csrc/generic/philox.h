// Dropout's random bits: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// One counter (key / 8, query, batch * H + head, offset) gives 128 bits, 16 for each of eight neighbouring keys: what is
// kept depends on neither the tiling, the instruction set nor the number of threads.
#pragma once

#include "simd/vec.h"

namespace fused_mha::FMHA_ISA {
namespace {

struct DropoutSeed {
    uint32_t key[2];
    uint32_t offset;
    uint32_t threshold;  // an element is kept where its 16 bits reach it

    DropoutSeed(const int64_t* seed, double dropout_p) {
        key[0] = uint32_t(seed[0]);
        key[1] = uint32_t(uint64_t(seed[0]) >> 32);
        offset = uint32_t(seed[1]);
        threshold = uint32_t(dropout_p * 65536.0 + 0.5);
    }
};

constexpr int PHILOX_LANES = LANES<float>;
typedef uint16_t vhalfword __attribute__((vector_size(FMHA_VECTOR_BYTES)));

// keep[i], bit t: whether key 8 * group + t of lane i is kept.
FMHA_INLINE void keep_lanes(const DropoutSeed& seed, vuint group, vuint query, uint32_t head, uint8_t* keep) {
    vuint x[4] = {group, query, vuint{} + head, vuint{} + seed.offset};
    uint32_t key[2] = {seed.key[0], seed.key[1]};
    for (int round = 0; round < 10; ++round) {
        vuint high[2], low[2];
        multiply_words(x[0], 0xD2511F53u, high[0], low[0]);
        multiply_words(x[2], 0xCD9E8D57u, high[1], low[1]);
        x[0] = high[1] ^ x[1] ^ key[0];
        x[1] = low[1];
        x[2] = high[0] ^ x[3] ^ key[1];
        x[3] = low[0];
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    vhalfword bits{};
    if (seed.threshold <= 0xffff) {  // else nothing is kept
        vhalfword first;             // bit 0 for the low half of a word, bit 1 for the high one
        for (int i = 0; i < 2 * PHILOX_LANES; ++i) first[i] = uint16_t(1 << (i & 1));
        for (int word = 0; word < 4; ++word) {
            vhalfword halves;
            memcpy(&halves, &x[word], sizeof halves);
            bits |= (vhalfword)(halves >= vhalfword{} + uint16_t(seed.threshold)) & (first << (2 * word));
        }
    }
    uint32_t lanes[PHILOX_LANES];
    memcpy(lanes, &bits, sizeof lanes);
    for (int i = 0; i < PHILOX_LANES; ++i) keep[i] = uint8_t(lanes[i] | lanes[i] >> 16);
}

// kept[r], bit c: whether column c of `columns` <= 32 keys from `first_key`, a multiple of 8, is kept in row
// first_query + r.
template <int columns>
FMHA_INLINE void draw_kept(const DropoutSeed& seed, int64_t head, int64_t first_query, int64_t rows, int64_t first_key,
                           uint32_t* kept) {
    constexpr int GROUPS = columns / 8, ROWS = PHILOX_LANES / GROUPS;  // of one draw
    vuint group, query;
    for (int i = 0; i < PHILOX_LANES; ++i) {
        group[i] = uint32_t(first_key / 8) + i % GROUPS;
        query[i] = uint32_t(first_query) + i / GROUPS;
    }
    for (int64_t r = 0; r < rows; r += ROWS, query += ROWS) {
        uint8_t keep[PHILOX_LANES];
        keep_lanes(seed, group, query, uint32_t(head), keep);
        for (int i = 0; i < ROWS && r + i < rows; ++i) {
            kept[r + i] = 0;
            memcpy(&kept[r + i], keep + i * GROUPS, GROUPS);
        }
    }
}

}  // namespace
}  // namespace fused_mha::FMHA_ISA
