// defines: HUGE_PAGE, advise_huge_pages
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace minillm::cpu {

constexpr size_t HUGE_PAGE = 2 << 20;

// Faulting in a fresh tensor 4 KiB at a time costs more than computing it, so ask for huge pages before the first write.
// Advice only: harmless where the pages are there already (a gradient in place) or where the kernel does not follow it.
inline void advise_huge_pages(const char* first, const char* last) {
#ifdef __linux__
    constexpr uintptr_t small = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(first) + small - 1) & ~(small - 1);
    const uintptr_t end = reinterpret_cast<uintptr_t>(last) & ~(small - 1);
    if (end >= begin + 2 * HUGE_PAGE) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace minillm::cpu
