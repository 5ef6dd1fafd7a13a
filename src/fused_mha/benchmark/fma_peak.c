/* The machine's peak of fused multiply-adds in fp32, one thread: independent chains that never leave the registers.
 * Compiled at run time by `yardsticks.py`, with -march=native. */
#include <stdint.h>

#if defined(__AVX512F__)
enum { BYTES = 64, CHAINS = 24 }; /* 32 registers, two of them constants; 2 ports x 4 cycles of latency need 8 chains */
#elif defined(__aarch64__)
enum { BYTES = 16, CHAINS = 24 }; /* 32 registers; 4 ports x 4 cycles need 16 */
#else
enum { BYTES = 32, CHAINS = 12 }; /* 16 registers; 2 ports x 5 cycles need 10 */
#endif

typedef float vector __attribute__((vector_size(BYTES)));

int64_t flops_per_step(void) { return (int64_t)CHAINS * (BYTES / 4) * 2; }

/* Returns a number that depends on every chain, so that none is left out. */
float multiply_add(int64_t steps) {
  vector chains[CHAINS], factor, summand;
  for (int lane = 0; lane < BYTES / 4; lane++) {
    factor[lane] = 0.5f; /* x -> x / 2 + 1 goes to 2: neither overflow nor denormals, which are slow */
    summand[lane] = 1.0f;
  }
  for (int chain = 0; chain < CHAINS; chain++) chains[chain] = summand * (float)chain;
  for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 24
    for (int chain = 0; chain < CHAINS; chain++) chains[chain] = chains[chain] * factor + summand;
  }
  float sum = 0.0f;
  for (int chain = 0; chain < CHAINS; chain++)
    for (int lane = 0; lane < BYTES / 4; lane++) sum += chains[chain][lane];
  return sum;
}
