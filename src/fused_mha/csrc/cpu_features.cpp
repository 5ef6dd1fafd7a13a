#include "cpu_features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_mha {

#if defined(__x86_64__)

namespace {

// Asked of the processor itself: behind __builtin_cpu_supports stands the compiler's run-time library, and Zig's says no
// to everything.
struct Processor {
    unsigned basic = 0, extended = 0, further = 0;  // CPUID 1 ECX, 7.0 EBX, 7.1 EAX
    uint64_t saved = 0;                             // the registers that the operating system saves: XCR0

    char vendor[13] = "";

    Processor() {
        unsigned a, b, c, d;
        if (__get_cpuid(0, &a, &b, &c, &d))
            for (int i = 0; i < 4; ++i) {
                vendor[i] = char(b >> 8 * i);
                vendor[4 + i] = char(d >> 8 * i);
                vendor[8 + i] = char(c >> 8 * i);
            }
        if (!__get_cpuid(1, &a, &b, &basic, &d) || !(basic & bit_OSXSAVE)) return;
        uint32_t low, high;
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        saved = uint64_t(high) << 32 | low;
        unsigned last_subleaf;
        if (__get_cpuid_count(7, 0, &last_subleaf, &extended, &c, &d) && last_subleaf >= 1)
            __get_cpuid_count(7, 1, &further, &b, &c, &d);
    }
};

const Processor& processor() {
    static const Processor found;
    return found;
}

bool has_all(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

constexpr uint64_t AVX_STATE = 0x6, AVX512_STATE = 0xe6;

}  // namespace

bool cpu_has_avx2() {
    const Processor& p = processor();
    return has_all(p.saved, AVX_STATE) && has_all(p.basic, bit_AVX | bit_FMA | bit_F16C) &&
           has_all(p.extended, bit_AVX2 | bit_BMI2);
}
bool cpu_has_avx512() {
    const Processor& p = processor();
    return cpu_has_avx2() && has_all(p.saved, AVX512_STATE) &&
           has_all(p.extended, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL);
}
bool cpu_has_avx512_bf16() { return cpu_has_avx512() && has_all(processor().further, bit_AVX512BF16); }
const char* cpu_vendor() { return processor().vendor; }

#else

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_avx512_bf16() { return false; }
const char* cpu_vendor() { return ""; }

#endif

}  // namespace fused_mha
