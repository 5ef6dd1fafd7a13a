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
typedef uint16_t vuint16 __attribute__((vector_size(FMHA_VECTOR_BYTES / 2)));
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

// A number that no compiler fuses with what is computed of it.
template <class V>
FMHA_INLINE V unfused(V x) {
#if defined(__AVX__)
    asm("" : "+x"(x));
#else
    asm("" : "+m"(x));  // vectors may be wider than registers
#endif
    return x;
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

// 2^x takes two steps: `scalable` gives an x whose distance to the nearest integer n is a number, unless x is NaN, and
// `scale` gives 2^n * p: 0 from ZERO_EXPONENT on downwards, whose bits are those of 0.
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
template <class To, class From>
FMHA_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
// All bits where a < b, for numbers less than 2^31 apart. Of a comparison of vectors that are wider than the registers,
// GCC makes one for each lane: most of the code of an instruction set, and slow.
template <class Bits>
FMHA_INLINE Bits less(Bits a, Bits b) {
    return Bits{} - ((a - b) >> 31);
}
template <class Bits>
FMHA_INLINE Bits choose(Bits mask, Bits a, Bits b) {
    return b ^ ((a ^ b) & mask);
}
// bfloat16 and half, whose 16 bits take the lower part of 32. Bits is uint32_t with float, or a vector of both.
template <class Bits, class Float>
FMHA_INLINE Bits to_bfloat16_bits(Float x) {
    const Bits bits = bits_as<Bits>(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    const Bits is_nan = less(Bits{} + 0x7f800000u, bits & 0x7fffffffu);  // which must not round to inf
    return choose(is_nan, (bits >> 16) | 0x40, rounded);
}
template <class Float, class Bits>
FMHA_INLINE Float of_bfloat16_bits(Bits bits) {
    return bits_as<Float>(bits << 16);
}
template <class Bits, class Float>
FMHA_INLINE Bits to_half_bits(Float x) {
    const Bits all = bits_as<Bits>(x), bits = all & 0x7fffffffu;
    const Bits normal = (bits + ((15u - 127u) << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    const Bits subnormal = bits_as<Bits>(bits_as<Float>(bits) + 0.5f) - (126u << 23);  // rounds to a multiple of 2^-24
    const Bits finite = choose(less(bits, Bits{} + (113u << 23)), subnormal, normal);
    const Bits large = 0x7c00 | (less(Bits{} + (255u << 23), bits) & 0x200);  // 2^16 and above: inf, or NaN
    return choose(less(bits, Bits{} + (143u << 23)), finite, large) | (all ^ bits) >> 16;
}
template <class Float, class Bits>
FMHA_INLINE Float of_half_bits(Bits bits) {
    const Bits magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    // inf and NaN have the largest exponent in both.
    const Bits normal = magnitude + (112u << 23) + (~less(magnitude, Bits{} + (31u << 23)) & (112u << 23));
    // Zero and subnormals: the exponent of 2^-14 without the implicit bit.
    const Float subnormal = bits_as<Float>(magnitude + (113u << 23)) - 6.103515625e-05f;
    return bits_as<Float>(choose(less(magnitude, Bits{} + (1u << 23)), bits_as<Bits>(subnormal), normal) | sign);
}
FMHA_INLINE vuint load_16_bits(const uint16_t* p) {
    vuint16 narrow;
    memcpy(&narrow, p, sizeof narrow);
    return __builtin_convertvector(narrow, vuint);
}
FMHA_INLINE void store_16_bits(uint16_t* p, vuint x) {
    const vuint16 narrow = __builtin_convertvector(x, vuint16);
    memcpy(p, &narrow, sizeof narrow);
}
FMHA_INLINE void portable_store_bfloat16(uint16_t* p, vfloat v) { store_16_bits(p, to_bfloat16_bits<vuint>(v)); }
FMHA_INLINE vfloat portable_rounded_to_bfloat16(vfloat v) { return of_bfloat16_bits<vfloat>(to_bfloat16_bits<vuint>(v)); }

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
