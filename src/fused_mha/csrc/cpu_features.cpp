#include "cpu_features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstring>
#endif

namespace fused_mha {

#if defined(__x86_64__)

namespace {

// Asked of the processor itself: behind __builtin_cpu_supports stands the compiler's run-time library, and Zig's says no
// to everything.
struct Processor {
    unsigned basic = 0, extended = 0, tiles = 0, further = 0;  // CPUID 1 ECX, 7.0 EBX, 7.0 EDX, 7.1 EAX
    uint64_t saved = 0;                                        // the registers that the operating system saves: XCR0
    bool is_of_intel = false;
    char name[49] = "";

    Processor() {
        unsigned a, b, c, d;
        if (__get_cpuid(0, &a, &b, &c, &d)) is_of_intel = b == signature_INTEL_ebx && c == signature_INTEL_ecx;
        for (unsigned leaf = 0; leaf < 3; ++leaf)
            if (__get_cpuid(0x80000002 + leaf, &a, &b, &c, &d)) {
                const unsigned text[] = {a, b, c, d};
                memcpy(name + 16 * leaf, text, sizeof text);
            }
        if (!__get_cpuid(1, &a, &b, &basic, &d) || !(basic & bit_OSXSAVE)) return;
        uint32_t low, high;
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        saved = uint64_t(high) << 32 | low;
        unsigned last_subleaf;
        if (__get_cpuid_count(7, 0, &last_subleaf, &extended, &c, &tiles) && last_subleaf >= 1)
            __get_cpuid_count(7, 1, &further, &b, &c, &d);
    }
};

const Processor& processor() {
    static const Processor found;
    return found;
}

bool has_all(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

constexpr uint64_t AVX_STATE = 0x6, AVX512_STATE = 0xe6, TILE_STATE = 0x60000;
// Which old compilers do not name.
constexpr unsigned AMX_BF16 = 1u << 22, AVX512_FP16 = 1u << 23, AMX_TILE = 1u << 24, AMX_FP16 = 1u << 21;

bool has_tiles() { return has_all(processor().saved, TILE_STATE) && has_all(processor().tiles, AMX_TILE); }

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
bool cpu_has_slow_bf16_dots() { return processor().is_of_intel && has_all(processor().tiles, AVX512_FP16); }
bool cpu_has_amx_bf16() { return has_tiles() && has_all(processor().tiles, AMX_BF16); }
bool cpu_has_amx_fp16() { return has_tiles() && has_all(processor().further, AMX_FP16); }
bool system_lends_tiles() {
#if defined(__linux__)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl(2): ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
const char* cpu_name() { return processor().name; }

#else

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_avx512_bf16() { return false; }
bool cpu_has_slow_bf16_dots() { return false; }
bool cpu_has_amx_bf16() { return false; }
bool cpu_has_amx_fp16() { return false; }
bool system_lends_tiles() { return false; }
const char* cpu_name() { return ""; }

#endif

}  // namespace fused_mha
