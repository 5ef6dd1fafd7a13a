// The base instruction set of the target: SSE2 on x86-64 (16 registers of 16 bytes), NEON on aarch64 (32).
//
// Vectors of 32 bytes, two registers each, so that a panel has eight columns of doubles: one dropout counter's.
#if defined(__aarch64__)
#define FMHA_ISA neon
#define FMHA_ISA_NAME "neon"
#define FMHA_MR 6
#else
#define FMHA_ISA scalar
#define FMHA_ISA_NAME "scalar"
#define FMHA_MR 3
#endif
#define FMHA_VECTOR_BYTES 32

#include "isa/standard_headers.h"
#include "simd/vec_portable.h"
#include "generic/instantiate.h"
