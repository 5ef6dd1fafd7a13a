#include "kernel_table.h"

#include <atomic>
#include <cstring>

#include "cpu_features.h"

namespace fused_mha {

#if defined(__aarch64__)
namespace neon {
extern const KernelTable kernels;
}
#else
namespace scalar {
extern const KernelTable kernels;
}
#endif
#if defined(FUSED_MHA_X86_VARIANTS)
namespace avx2 {
extern const KernelTable kernels;
}
namespace avx512 {
extern const KernelTable kernels;
}
namespace avx512_bf16 {
extern const KernelTable kernels;
}
#endif

namespace {

struct Variant {
    const char* name;
    const KernelTable* kernels;
    bool uses_tiles;
};

struct Variants {
    Variant all[6] = {};
    int64_t count = 0;

    Variants() {
#if defined(__aarch64__)
        add(neon::kernels);
#else
        add(scalar::kernels);
#endif
#if defined(FUSED_MHA_X86_VARIANTS)
        if (cpu_has_avx2()) add(avx2::kernels);
        const bool are_dots_slow = cpu_has_slow_bf16_dots();
        if (cpu_has_avx512_bf16() && are_dots_slow) add(avx512_bf16::kernels);
        if (cpu_has_avx512()) add(avx512::kernels);
        if (cpu_has_avx512_bf16() && !are_dots_slow) add(avx512_bf16::kernels);
        // The same code, with another product of bfloat16.
        if (cpu_has_avx512_bf16() && cpu_has_amx_bf16() && system_lends_tiles())
            all[count++] = {"avx512_amx", &avx512_bf16::kernels, true};
#endif
    }
    void add(const KernelTable& kernels) { all[count++] = {kernels.name, &kernels, false}; }
};

const Variants& variants() {
    static const Variants found;
    return found;
}

std::atomic<int64_t> chosen{-1};

int64_t current() {
    const int64_t index = chosen.load(std::memory_order_relaxed);
    return index >= 0 ? index : variants().count - 1;
}

}  // namespace

std::atomic<bool> tiles_in_use{variants().all[current()].uses_tiles};

const char* available_kernels(int64_t index) {
    return index >= 0 && index < variants().count ? variants().all[index].name : nullptr;
}

const char* current_name() { return variants().all[current()].name; }

const KernelTable& kernels_of(int64_t dtype) {
    const KernelTable& kernels = *variants().all[current()].kernels;
    return kernels.base && dtype != FUSED_MHA_BFLOAT16 ? *kernels.base : kernels;
}
const char* name_of_kernels_of(int64_t dtype) {
    const KernelTable& kernels = kernels_of(dtype);
    return &kernels == variants().all[current()].kernels ? current_name() : kernels.name;
}

bool choose_kernels(const char* name) {
    for (int64_t i = 0; i < variants().count; ++i)
        if (strcmp(variants().all[i].name, name) == 0) {
            chosen.store(i, std::memory_order_relaxed);
            tiles_in_use.store(variants().all[i].uses_tiles, std::memory_order_relaxed);
            return true;
        }
    return false;
}

}  // namespace fused_mha
