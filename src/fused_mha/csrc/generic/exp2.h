// exp2 on vectors: 2^x = 2^n * 2^f with n = round(x) and a polynomial for 2^f, f in [-1/2, 1/2]; and tanh by the same.
//
// The attention kernels call it with x <= 0 up to rounding. -inf gives 0, and so do numbers whose n is below the normal
// exponents; NaN gives NaN. Minimax polynomials through 1 at f = 0: the largest relative errors are 2.6e-9 (fp32, beside
// a rounding of 6e-8) and 1.8e-17 (fp64).
#pragma once

#include "simd/vec.h"

namespace fused_mha::FMHA_ISA {
namespace {

// (2^f - 1) / f.
FMHA_INLINE vfloat exp2_quotient(vfloat f) {
    vfloat p = 0.00015594677f * f + 0.0013406644f;
    p = p * f + 0.0096176930f;
    p = p * f + 0.055503105f;
    p = p * f + 0.24022653f;
    return p * f + 0.69314721f;
}

FMHA_INLINE vdouble exp2_quotient(vdouble f) {
    vdouble p = 4.0780717860928704165e-10 * f + 7.0725703945407994337e-9;
    p = p * f + 1.0180647660573069343e-7;
    p = p * f + 1.3215442675452855182e-6;
    p = p * f + 0.00001525272738518977478;
    p = p * f + 0.00015403530441571850099;
    p = p * f + 0.001333355815343996974;
    p = p * f + 0.0096181291076070026171;
    p = p * f + 0.055504108664790394528;
    p = p * f + 0.24022650695910098006;
    return p * f + 0.69314718055994569675;
}

template <class V>
FMHA_INLINE V exp2(V x) {
    x = scalable(x);
    const V n = round(x), f = x - n;
    return scale(exp2_quotient(f) * f + 1, n);
}

// tanh(x ln 2 / 2) = (2^x - 1) / (2^x + 1), whose numerator is computed as such: small numbers keep their digits. NaN
// gives NaN.
constexpr double OF_TANH_BY_EXP2 = 2.88539008177792681472;  // 2 / ln 2
template <class T>
FMHA_INLINE Vec<T> tanh_by_exp2(Vec<T> x) {
    constexpr T ONE_FROM = sizeof(T) == 4 ? T(28) : T(57);  // 1 to the last bit
    x = min(splat(ONE_FROM), max(splat(-ONE_FROM), x));
    const Vec<T> n = round(x), f = x - n, power = scale(splat(T(1)), n);
    const Vec<T> less_one = power * (exp2_quotient(f) * f) + (power - 1);
    return quotient(less_one, less_one + 2);
}

}  // namespace
}  // namespace fused_mha::FMHA_ISA
