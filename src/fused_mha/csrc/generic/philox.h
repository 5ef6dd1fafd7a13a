// Dropout's random bits: Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, where seven
// rounds are the fewest that pass every test of BigCrush).
//
// One counter (key / 8, query, batch * H + head, offset) gives 128 bits, 16 for each of eight neighbouring keys: what is
// kept depends on neither the tiling, the instruction set nor the number of threads. The seed of a call that is a part of
// a longer one, as on one of several processes, says where that part begins: it keeps what the longer call keeps there.
#pragma once

#include "c_api.h"
#include "simd/vec.h"

namespace fused_mha::FMHA_ISA {
namespace {

// The probability with which sixteen random bits drop an element: dropout_p as a multiple of 2^-16. Only dropout_p = 1
// drops everything; below it the factor 1 / (1 - probability) makes up for what is dropped.
inline double drawn_probability(double dropout_p) {
    const double steps = double(uint32_t(dropout_p * 65536.0 + 0.5)) / 65536.0;
    return steps < 1 || dropout_p == 1 ? steps : 65535.0 / 65536.0;
}

struct DropoutSeed {
    uint32_t key[2];
    uint32_t offset;
    uint32_t threshold;  // an element is kept where its 16 bits reach it
    uint32_t first_query = 0, first_key = 0, first_head = 0, heads;  // of the longer call; 8 divides first_key

    DropoutSeed(const int64_t* seed, int64_t numbers, int64_t H, double dropout_p) : heads(uint32_t(H)) {
        key[0] = uint32_t(seed[0]);
        key[1] = uint32_t(uint64_t(seed[0]) >> 32);
        offset = uint32_t(seed[1]);  // a counter has 32 bits for it
        threshold = uint32_t(drawn_probability(dropout_p) * 65536.0);
        if (numbers == FUSED_MHA_PLACED_SEED) {
            first_query = uint32_t(seed[2]);
            first_key = uint32_t(seed[3]);
            first_head = uint32_t(seed[4]);
            heads = uint32_t(seed[5]);
        }
    }
};

constexpr int PHILOX_LANES = LANES<float>;
typedef uint16_t vhalfword __attribute__((vector_size(FMHA_VECTOR_BYTES)));

typedef uint8_t vlanebyte __attribute__((vector_size(PHILOX_LANES)));

// Lane i of keep[d], bit t: whether key 8 * group + t of lane i of draw d is kept. Draws are computed side by side, since
// each is a long chain of products.
template <int DRAWS>
FMHA_INLINE void keep_lanes(const DropoutSeed& seed, vuint group, const vuint (&query)[DRAWS], uint32_t head,
                            vlanebyte (&keep)[DRAWS]) {
    vuint x[DRAWS][4];
    for (int d = 0; d < DRAWS; ++d) {
        x[d][0] = group;
        x[d][1] = query[d];
        x[d][2] = vuint{} + head;
        x[d][3] = vuint{} + seed.offset;
    }
    uint32_t key[2] = {seed.key[0], seed.key[1]};
    for (int round = 0; round < 7; ++round) {
#pragma GCC unroll 4
        for (int d = 0; d < DRAWS; ++d) {
            vuint high[2], low[2];
            multiply_words(x[d][0], 0xD2511F53u, high[0], low[0]);
            multiply_words(x[d][2], 0xCD9E8D57u, high[1], low[1]);
            x[d][0] = high[1] ^ x[d][1] ^ key[0];
            x[d][1] = low[1];
            x[d][2] = high[0] ^ x[d][3] ^ key[1];
            x[d][3] = low[0];
        }
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    vhalfword first;  // bit 0 for the low half of a word, bit 1 for the high one
    for (int i = 0; i < 2 * PHILOX_LANES; ++i) first[i] = uint16_t(1 << (i & 1));
    const vhalfword threshold = vhalfword{} + uint16_t(seed.threshold);
    const uint32_t any = seed.threshold <= 0xffff ? ~0u : 0;  // else nothing is kept
    for (int d = 0; d < DRAWS; ++d) {
        vhalfword bits{};
        for (int word = 0; word < 4; ++word) bits |= (vhalfword)((vhalfword)x[d][word] >= threshold) & (first << (2 * word));
        const vuint lanes = (vuint)bits & any;
        keep[d] = __builtin_convertvector(lanes | lanes >> 16, vlanebyte);
    }
}

// kept[r], bit c: whether column c of KEYS <= 32 keys from `first_key`, a multiple of 8, is kept in row
// first_query + r of one head.
template <int KEYS>
FMHA_INLINE void draw_kept(const DropoutSeed& seed, int64_t n, int64_t h, int64_t first_query, int64_t rows,
                           int64_t first_key, uint32_t* kept) {
    const uint32_t head = uint32_t(n) * seed.heads + seed.first_head + uint32_t(h);
    constexpr int GROUPS = KEYS / 8, ROWS = PHILOX_LANES / GROUPS;  // of one draw
    constexpr int DRAWS = (FMHA_MR + ROWS - 1) / ROWS;                  // of a row tile
    vuint group_of_lane, row_of_lane;
    for (int i = 0; i < PHILOX_LANES; ++i) {
        group_of_lane[i] = uint32_t(i % GROUPS);
        row_of_lane[i] = uint32_t(i / GROUPS);
    }
    const vuint group = group_of_lane + (seed.first_key / 8 + uint32_t(first_key / 8));
    for (int64_t r = 0; r < rows; r += DRAWS * ROWS) {
        vuint query[DRAWS];
        for (int d = 0; d < DRAWS; ++d) query[d] = row_of_lane + (seed.first_query + uint32_t(first_query + r + d * ROWS));
        vlanebyte keep[DRAWS];
        keep_lanes(seed, group, query, head, keep);
        uint8_t bytes[DRAWS * PHILOX_LANES];
        memcpy(bytes, keep, sizeof bytes);
        for (int i = 0; i < DRAWS * ROWS && r + i < rows; ++i) {
            kept[r + i] = 0;
            memcpy(&kept[r + i], bytes + i * GROUPS, GROUPS);
        }
    }
}

}  // namespace
}  // namespace fused_mha::FMHA_ISA
