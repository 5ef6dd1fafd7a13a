// Any target with a compiler that knows vector types: the portable forms of vec.h (SSE2 on x86-64, NEON on aarch64).
#pragma once

#include "simd/vec.h"

namespace fused_mha::FMHA_ISA {
namespace {

FMHA_INLINE vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }
FMHA_INLINE vdouble max(vdouble a, vdouble b) { return a > b ? a : b; }
FMHA_INLINE vfloat min(vfloat a, vfloat b) { return a < b ? a : b; }
FMHA_INLINE vdouble min(vdouble a, vdouble b) { return a < b ? a : b; }
FMHA_INLINE vfloat absolute(vfloat x) { return max(x, -x); }
FMHA_INLINE vdouble absolute(vdouble x) { return max(x, -x); }
FMHA_INLINE vfloat quotient(vfloat a, vfloat b) { return a / b; }
FMHA_INLINE vdouble quotient(vdouble a, vdouble b) { return a / b; }
FMHA_INLINE void copy_some_bytes(void* to, const void* from, int64_t bytes) { memcpy(to, from, size_t(bytes)); }

FMHA_INLINE vfloat select(uint32_t bits, vfloat v, vfloat other) { return portable_select<float>(bits, v, other); }
FMHA_INLINE vdouble select(uint32_t bits, vdouble v, vdouble other) { return portable_select<double>(bits, v, other); }
FMHA_INLINE float reduce_max(vfloat v) { return portable_reduce_max<float>(v); }
FMHA_INLINE double reduce_max(vdouble v) { return portable_reduce_max<double>(v); }
FMHA_INLINE float reduce_add(vfloat v) { return portable_reduce_add<float>(v); }
FMHA_INLINE double reduce_add(vdouble v) { return portable_reduce_add<double>(v); }

// Adding 1.5 * 2^(mantissa bits) leaves no place for a fraction.
FMHA_INLINE vfloat round(vfloat x) { return (x + 12582912.0f) - 12582912.0f; }
FMHA_INLINE vdouble round(vdouble x) { return (x + 6755399441055744.0) - 6755399441055744.0; }
FMHA_INLINE vfloat scalable(vfloat x) { return max(splat(ZERO_EXPONENT<float>), x); }
FMHA_INLINE vdouble scalable(vdouble x) { return max(splat(ZERO_EXPONENT<double>), x); }
FMHA_INLINE vfloat scale(vfloat p, vfloat n) { return portable_scale(p, n); }
FMHA_INLINE vdouble scale(vdouble p, vdouble n) { return portable_scale(p, n); }

FMHA_INLINE vfloat load_bfloat16(const uint16_t* p) { return of_bfloat16_bits<vfloat>(load_16_bits(p)); }
FMHA_INLINE void store_bfloat16(uint16_t* p, vfloat v) { portable_store_bfloat16(p, v); }
FMHA_INLINE vfloat rounded_to_bfloat16(vfloat v) { return portable_rounded_to_bfloat16(v); }
FMHA_INLINE vfloat load_half(const uint16_t* p) { return of_half_bits<vfloat>(load_16_bits(p)); }
FMHA_INLINE void store_half(uint16_t* p, vfloat v) { store_16_bits(p, to_half_bits<vuint>(v)); }

FMHA_INLINE uint32_t nonzero_bytes(const uint8_t* p, int n) { return portable_nonzero_bytes(p, n); }

FMHA_INLINE void multiply_words(vuint x, uint32_t factor, vuint& high, vuint& low) {
    portable_multiply_words(x, factor, high, low);
}

}  // namespace
}  // namespace fused_mha::FMHA_ISA
