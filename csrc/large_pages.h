// Fresh memory in large pages, where the system leaves the choice to the program. Getting a large output in pages
// of 4 KiB can cost more than the search that fills it, and scattered additions to many small pages miss the
// address cache.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace diffnl {

inline void prefer_large_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(page - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace diffnl
