// exp2 on vectors: 2^x = 2^n * 2^f with n = round(x) and a polynomial for 2^f, f in [-1/2, 1/2].
//
// The attention kernels call it with x <= 0 up to rounding. -inf gives 0, and so do numbers whose n is below the normal
// exponents; NaN gives NaN. Minimax polynomials through 1 at f = 0: the largest relative errors are 2.6e-9 (fp32, beside
// a rounding of 6e-8) and 1.8e-17 (fp64).
#pragma once

#include "simd/vec.h"

namespace fused_mha::FMHA_ISA {
namespace {

FMHA_INLINE vfloat exp2(vfloat x) {
    x = scalable(x);
    const vfloat n = round(x), f = x - n;
    vfloat p = 0.00015594677f * f + 0.0013406644f;
    p = p * f + 0.0096176930f;
    p = p * f + 0.055503105f;
    p = p * f + 0.24022653f;
    p = p * f + 0.69314721f;
    p = p * f + 1.0f;
    return scale(p, n);
}

FMHA_INLINE vdouble exp2(vdouble x) {
    x = scalable(x);
    const vdouble n = round(x), f = x - n;
    vdouble p = 4.0780717860928704165e-10 * f + 7.0725703945407994337e-9;
    p = p * f + 1.0180647660573069343e-7;
    p = p * f + 1.3215442675452855182e-6;
    p = p * f + 0.00001525272738518977478;
    p = p * f + 0.00015403530441571850099;
    p = p * f + 0.001333355815343996974;
    p = p * f + 0.0096181291076070026171;
    p = p * f + 0.055504108664790394528;
    p = p * f + 0.24022650695910098006;
    p = p * f + 0.69314718055994569675;
    p = p * f + 1.0;
    return scale(p, n);
}

}  // namespace
}  // namespace fused_mha::FMHA_ISA
