// The vector layer: the few operations that the kernels need beside + - *, on the compiler's vector types.
//
// isa/<name>.cpp includes it after defining FMHA_VECTOR_BYTES; a target's own header replaces what its instructions do
// better. Everything lives in an unnamed namespace inside the ISA's, so that no symbol leaves the object file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fused_mha::FMHA_ISA {
namespace {

#define FMHA_INLINE inline __attribute__((always_inline))

typedef float vfloat __attribute__((vector_size(FMHA_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(FMHA_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(FMHA_VECTOR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(FMHA_VECTOR_BYTES)));
typedef int64_t vlong __attribute__((vector_size(FMHA_VECTOR_BYTES)));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    using type = vfloat;
    using integer = vint;
};
template <>
struct VectorOf<double> {
    using type = vdouble;
    using integer = vlong;
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int LANES = FMHA_VECTOR_BYTES / int(sizeof(T));

template <class T>
FMHA_INLINE Vec<T> load(const T* p) {
    Vec<T> v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class T>
FMHA_INLINE void store(T* p, V v) {
    memcpy(p, &v, sizeof v);
}
template <class T>
FMHA_INLINE Vec<T> splat(T x) {
    return x - Vec<T>{};  // not {} + x: 0 + -0 = 0
}

// Lane i of the result is lane i of `v`, or of `other` where bit i is set.
template <class T>
FMHA_INLINE Vec<T> portable_select(uint32_t bits, Vec<T> v, Vec<T> other) {
    using I = typename VectorOf<T>::integer;
    using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    I lane_bit;
    for (int i = 0; i < LANES<T>; ++i) lane_bit[i] = Integer(1) << i;
    return ((I{} + Integer(bits)) & lane_bit) != 0 ? other : v;
}

template <class T>
FMHA_INLINE T portable_reduce_max(Vec<T> v) {
    T result = v[0];
    for (int i = 1; i < LANES<T>; ++i) result = v[i] > result ? v[i] : result;
    return result;
}
template <class T>
FMHA_INLINE T portable_reduce_add(Vec<T> v) {
    T lanes[LANES<T>];
    store(lanes, v);
    for (int width = LANES<T> / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

// 2^x takes two steps: `scalable` gives the x that can be rounded to n, and `scale` gives 2^n * p. Below the normal
// exponents the power is 0, and NaN stays NaN.
//
// The exponent whose bits are those of 0; -inf has no distance to n.
template <class T>
constexpr T ZERO_EXPONENT = sizeof(T) == 4 ? T(-127) : T(-1023);
// For an integral n from that exponent to 0 or a little above.
FMHA_INLINE vfloat portable_scale(vfloat p, vfloat n) {
    const vint exponent = (__builtin_convertvector(n, vint) + 127) << 23;
    vfloat power;
    memcpy(&power, &exponent, sizeof power);
    return p * power;
}
FMHA_INLINE vdouble portable_scale(vdouble p, vdouble n) {
    // n + 1.5 * 2^52 holds n in its low bits; a conversion of 64-bit integers is not everywhere one instruction.
    const vdouble shifted = n + 6755399441055744.0;
    vlong exponent;
    memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent + 1023) << 52;
    vdouble power;
    memcpy(&power, &exponent, sizeof power);
    return p * power;
}
// bfloat16 and half as they lie in memory: 16 bits.
FMHA_INLINE float bfloat16_to_float(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}
FMHA_INLINE uint16_t float_to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);  // a NaN must not round to inf
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
FMHA_INLINE float half_to_float(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = uint32_t(bits & 0x7fff) << 13;
    uint32_t wide = magnitude + (112u << 23);
    if (magnitude >= (31u << 23)) wide += 112u << 23;  // inf and NaN
    float x;
    if (magnitude < (1u << 23)) {  // zero and subnormals: the exponent of 2^-14 without the implicit bit
        wide = magnitude + (113u << 23);
        memcpy(&x, &wide, 4);
        x -= 6.103515625e-05f;
        memcpy(&wide, &x, 4);
    }
    wide |= sign;
    memcpy(&x, &wide, 4);
    return x;
}
FMHA_INLINE uint16_t float_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits & 0x80000000u;
    bits ^= sign;
    uint32_t half;
    if (bits >= (143u << 23)) {  // 2^16 and above: inf, or NaN
        half = bits > (255u << 23) ? 0x7e00 : 0x7c00;
    } else if (bits < (113u << 23)) {  // subnormal: the addition rounds to a multiple of 2^-24
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&half, &magnitude, 4);
        half -= 126u << 23;
    } else {
        half = (bits + ((15u - 127u) << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    }
    return uint16_t(half | (sign >> 16));
}

FMHA_INLINE void portable_store_bfloat16(uint16_t* p, vfloat v) {
    for (int i = 0; i < LANES<float>; ++i) p[i] = float_to_bfloat16(v[i]);
}

// Bit i is set where byte i of n <= 32 is not zero; nothing behind them is read.
FMHA_INLINE uint32_t portable_nonzero_bytes(const uint8_t* p, int n) {
    uint32_t bits = 0;
    for (int i = 0; i < n; ++i) bits |= uint32_t(p[i] != 0) << i;
    return bits;
}

// The two words of the products x * factor.
FMHA_INLINE void portable_multiply_words(vuint x, uint32_t factor, vuint& high, vuint& low) {
    for (int i = 0; i < LANES<float>; ++i) {
        const uint64_t product = uint64_t(x[i]) * factor;
        high[i] = uint32_t(product >> 32);
        low[i] = uint32_t(product);
    }
}

}  // namespace
}  // namespace fused_mha::FMHA_ISA
