#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_mha {

void advise_huge_pages([[maybe_unused]] const fused_mha_tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t HUGE_PAGE = 2 << 20;
    const uintptr_t data = reinterpret_cast<uintptr_t>(tensor.data);
    const uintptr_t begin = (data + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t end = (data + uintptr_t(tensor.bytes)) / HUGE_PAGE * HUGE_PAGE;
    if (tensor.data && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fused_mha
