// AVX-512 with BF16: 32 registers of 64 bytes. 14 x 2 of C, 2 of B and 1 broadcast of A leave none unused.
#define FMHA_ISA avx512_bf16
#define FMHA_BASE avx512
#define FMHA_ISA_NAME "avx512_bf16"
#define FMHA_VECTOR_BYTES 64
#define FMHA_MR 14

#include "isa/standard_headers.h"
#include "simd/vec_avx512.h"
#include "generic/instantiate.h"
