/* How fast one thread reads: the sum of a buffer. Compiled at run time by `yardsticks.py`, with -march=native. */
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__aarch64__)
enum { BYTES = 16 };
#else
enum { BYTES = 32 };
#endif
enum { CHAINS = 8, LANES = BYTES / 4 }; /* 4 cycles of latency x 2 loads of a cycle: no sum waits for another */

typedef float vector __attribute__((vector_size(BYTES)));

/* Reads the buffer `passes` times; whole blocks of chains only. Returns a number that depends on all of it. */
float sum(const float *buffer, int64_t count, int64_t passes) {
  vector chains[CHAINS] = {0};
  for (int64_t pass = 0; pass < passes; pass++)
    for (int64_t first = 0; first + CHAINS * LANES <= count; first += CHAINS * LANES) {
#pragma GCC unroll 8
      for (int chain = 0; chain < CHAINS; chain++) {
        vector read;
        memcpy(&read, buffer + first + chain * LANES, BYTES); /* a load that asks for no alignment */
        chains[chain] += read;
      }
    }
  float total = 0.0f;
  for (int chain = 0; chain < CHAINS; chain++)
    for (int lane = 0; lane < LANES; lane++) total += chains[chain][lane];
  return total;
}
