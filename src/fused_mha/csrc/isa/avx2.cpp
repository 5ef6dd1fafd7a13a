// AVX2, FMA, F16C: 16 registers of 32 bytes. 6 x 2 of C, 2 of B and 1 broadcast of A.
#define FMHA_ISA avx2
#define FMHA_ISA_NAME "avx2"
#define FMHA_VECTOR_BYTES 32
#define FMHA_MR 6

#include "isa/standard_headers.h"
#include "simd/vec_avx2.h"
#include "generic/instantiate.h"
