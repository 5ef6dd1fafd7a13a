// AVX2 with FMA and F16C: what its instructions do better than the portable forms of vec.h.
#pragma once

#include <immintrin.h>

#include "simd/vec.h"

namespace fused_mha::FMHA_ISA {
namespace {

FMHA_INLINE vfloat max(vfloat a, vfloat b) { return _mm256_max_ps(a, b); }
FMHA_INLINE vdouble max(vdouble a, vdouble b) { return _mm256_max_pd(a, b); }
FMHA_INLINE vfloat min(vfloat a, vfloat b) { return _mm256_min_ps(a, b); }
FMHA_INLINE vdouble min(vdouble a, vdouble b) { return _mm256_min_pd(a, b); }
FMHA_INLINE vfloat absolute(vfloat x) { return _mm256_andnot_ps(splat(-0.0f), x); }
FMHA_INLINE vdouble absolute(vdouble x) { return _mm256_andnot_pd(splat(-0.0), x); }
FMHA_INLINE vfloat quotient(vfloat a, vfloat b) { return a / b; }
FMHA_INLINE vdouble quotient(vdouble a, vdouble b) { return a / b; }
FMHA_INLINE void copy_some_bytes(void* to, const void* from, int64_t bytes) { memcpy(to, from, size_t(bytes)); }

FMHA_INLINE vfloat select(uint32_t bits, vfloat v, vfloat other) { return portable_select<float>(bits, v, other); }
FMHA_INLINE vdouble select(uint32_t bits, vdouble v, vdouble other) { return portable_select<double>(bits, v, other); }

FMHA_INLINE float reduce_max(vfloat v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
FMHA_INLINE double reduce_max(vdouble v) { return portable_reduce_max<double>(v); }
FMHA_INLINE float reduce_add(vfloat v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
FMHA_INLINE double reduce_add(vdouble v) { return portable_reduce_add<double>(v); }

FMHA_INLINE vfloat round(vfloat x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FMHA_INLINE vdouble round(vdouble x) { return _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FMHA_INLINE vfloat scalable(vfloat x) { return max(splat(ZERO_EXPONENT<float>), x); }
FMHA_INLINE vdouble scalable(vdouble x) { return max(splat(ZERO_EXPONENT<double>), x); }
FMHA_INLINE vfloat scale(vfloat p, vfloat n) { return portable_scale(p, n); }
FMHA_INLINE vdouble scale(vdouble p, vdouble n) { return portable_scale(p, n); }

FMHA_INLINE vfloat load_bfloat16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FMHA_INLINE void store_bfloat16(uint16_t* p, vfloat v) { portable_store_bfloat16(p, v); }
FMHA_INLINE vfloat rounded_to_bfloat16(vfloat v) { return portable_rounded_to_bfloat16(v); }
FMHA_INLINE vfloat load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FMHA_INLINE void store_half(uint16_t* p, vfloat v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

FMHA_INLINE uint32_t nonzero_bytes(const uint8_t* p, int n) { return portable_nonzero_bytes(p, n); }

FMHA_INLINE void multiply_words(vuint x, uint32_t factor, vuint& high, vuint& low) {
    const __m256i factors = _mm256_set1_epi32(int(factor));
    const __m256i even = _mm256_mul_epu32((__m256i)x, factors);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), factors);
    high = (vuint)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = (vuint)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}

}  // namespace
}  // namespace fused_mha::FMHA_ISA
