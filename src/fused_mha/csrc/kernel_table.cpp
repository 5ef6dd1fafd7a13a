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

struct Variants {
    const KernelTable* tables[5] = {};
    int64_t count = 0;

    Variants() {
#if defined(__aarch64__)
        add(neon::kernels);
#else
        add(scalar::kernels);
#endif
#if defined(FUSED_MHA_X86_VARIANTS)
        if (cpu_has_avx2()) add(avx2::kernels);
        if (cpu_has_avx512()) add(avx512::kernels);
        if (cpu_has_avx512_bf16()) add(avx512_bf16::kernels);
#endif
    }
    void add(const KernelTable& kernels) { tables[count++] = &kernels; }
};

const Variants& variants() {
    static const Variants found;
    return found;
}

std::atomic<const KernelTable*> chosen{nullptr};

}  // namespace

const KernelTable* available_kernels(int64_t index) {
    return index >= 0 && index < variants().count ? variants().tables[index] : nullptr;
}

const KernelTable& current_kernels() {
    const KernelTable* kernels = chosen.load(std::memory_order_relaxed);
    return kernels ? *kernels : *variants().tables[variants().count - 1];
}

bool choose_kernels(const char* name) {
    for (int64_t i = 0; const KernelTable* kernels = available_kernels(i); ++i)
        if (strcmp(kernels->name, name) == 0) {
            chosen.store(kernels, std::memory_order_relaxed);
            return true;
        }
    return false;
}

}  // namespace fused_mha
