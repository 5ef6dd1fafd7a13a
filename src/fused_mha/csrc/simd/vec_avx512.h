// AVX-512 (F, BW, DQ, VL): what its instructions do better than the portable forms of vec.h.
#pragma once

#include <immintrin.h>

#include "simd/vec.h"

namespace fused_mha::FMHA_ISA {
namespace {

FMHA_INLINE vfloat max(vfloat a, vfloat b) { return _mm512_max_ps(a, b); }
FMHA_INLINE vdouble max(vdouble a, vdouble b) { return _mm512_max_pd(a, b); }
FMHA_INLINE vfloat min(vfloat a, vfloat b) { return _mm512_min_ps(a, b); }
FMHA_INLINE vdouble min(vdouble a, vdouble b) { return _mm512_min_pd(a, b); }
FMHA_INLINE vfloat absolute(vfloat x) { return _mm512_abs_ps(x); }
FMHA_INLINE vdouble absolute(vdouble x) { return _mm512_abs_pd(x); }
// a / b for a b from 1 to 2^30, to two units in the last place, without the divider: 16 cycles of an Intel processor.
FMHA_INLINE vfloat quotient(vfloat a, vfloat b) {
    const vfloat estimate = _mm512_rcp14_ps(b);
    return a * (estimate * (2 - b * estimate));
}
FMHA_INLINE vdouble quotient(vdouble a, vdouble b) { return a / b; }

// Fewer bytes than a vector has; nothing behind them is read or written.
FMHA_INLINE void copy_some_bytes(void* to, const void* from, int64_t bytes) {
    const __mmask64 these = (__mmask64(1) << bytes) - 1;
    _mm512_mask_storeu_epi8(to, these, _mm512_maskz_loadu_epi8(these, from));
}

FMHA_INLINE vfloat select(uint32_t bits, vfloat v, vfloat other) {
    return _mm512_mask_mov_ps(v, __mmask16(bits), other);
}
FMHA_INLINE vdouble select(uint32_t bits, vdouble v, vdouble other) {
    return _mm512_mask_mov_pd(v, __mmask8(bits), other);
}

FMHA_INLINE float reduce_max(vfloat v) { return _mm512_reduce_max_ps(v); }
FMHA_INLINE double reduce_max(vdouble v) { return _mm512_reduce_max_pd(v); }
FMHA_INLINE float reduce_add(vfloat v) { return _mm512_reduce_add_ps(v); }
FMHA_INLINE double reduce_add(vdouble v) { return _mm512_reduce_add_pd(v); }

FMHA_INLINE vfloat round(vfloat x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FMHA_INLINE vdouble round(vdouble x) { return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Zeros by a mask: an instruction whose result underflows costs an Intel processor over a hundred cycles, and each hidden
// key's would.
FMHA_INLINE vfloat scalable(vfloat x) { return x; }
FMHA_INLINE vdouble scalable(vdouble x) { return x; }
FMHA_INLINE vfloat scale(vfloat p, vfloat n) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, splat(ZERO_EXPONENT<float>), _CMP_NLE_UQ), p, n);
}
FMHA_INLINE vdouble scale(vdouble p, vdouble n) {
    return _mm512_maskz_scalef_pd(_mm512_cmp_pd_mask(n, splat(ZERO_EXPONENT<double>), _CMP_NLE_UQ), p, n);
}

FMHA_INLINE vfloat load_bfloat16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
FMHA_INLINE vfloat load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FMHA_INLINE void store_half(uint16_t* p, vfloat v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#if defined(__AVX512BF16__)
#define FMHA_BFLOAT16_DOT 1
// a += x[2i] * y[2i] + x[2i + 1] * y[2i + 1] in fp32, for pairs of bfloat16 in each 32-bit lane.
FMHA_INLINE vfloat dot_bfloat16(vfloat a, vfloat x, vfloat y) {
    return _mm512_dpbf16_ps(a, (__m512bh)x, (__m512bh)y);
}
// Two vectors of consecutive elements as one of bfloat16.
FMHA_INLINE vfloat to_bfloat16(vfloat low, vfloat high) { return (vfloat)_mm512_cvtne2ps_pbh(high, low); }
// Lane i of both vectors as the pair in 32-bit lane i.
FMHA_INLINE vfloat interleave_bfloat16(vfloat low, vfloat high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vfloat)_mm512_permutexvar_epi16(order, (__m512i)to_bfloat16(low, high));
}
FMHA_INLINE void store_bfloat16(uint16_t* p, vfloat v) {
    const __m256bh narrow = _mm512_cvtneps_pbh(v);
    memcpy(p, &narrow, sizeof narrow);
}
FMHA_INLINE vfloat rounded_to_bfloat16(vfloat v) {
    uint16_t narrow[16];
    store_bfloat16(narrow, v);
    return load_bfloat16(narrow);
}
#else
FMHA_INLINE vfloat rounded_to_bfloat16(vfloat v) {
    const __m512i bits = (__m512i)v;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    return (vfloat)_mm512_and_si512(rounded, _mm512_set1_epi32(int(0xffff0000u)));
}
FMHA_INLINE void store_bfloat16(uint16_t* p, vfloat v) {
    const __m512i rounded = (__m512i)rounded_to_bfloat16(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
#endif

// Bit i is set where byte i of n <= 32 is not zero.
FMHA_INLINE uint32_t nonzero_bytes(const uint8_t* p, int n) {
    const __mmask32 first = n == 32 ? ~0u : (1u << n) - 1;
    return _mm256_mask_test_epi8_mask(first, _mm256_maskz_loadu_epi8(first, p), _mm256_set1_epi8(-1));
}

FMHA_INLINE void multiply_words(vuint x, uint32_t factor, vuint& high, vuint& low) {
    const __m512i factors = _mm512_set1_epi32(int(factor));
    const __m512i even = _mm512_mul_epu32((__m512i)x, factors);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), factors);
    high = (vuint)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    low = (vuint)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}

}  // namespace
}  // namespace fused_mha::FMHA_ISA
