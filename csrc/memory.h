// Memory from the system: huge pages, and a heap that keeps what is freed.
#pragma once
#if defined(__linux__)
#include <malloc.h>
#include <sys/mman.h>
#endif
#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace tinystory {

// Asks for huge pages in [p, p + bytes): walking the tables of small ones costs 4 % of a pretraining step.
inline void use_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = (begin + bytes) / kPage * kPage;
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// Changes glibc's malloc for the whole process, so that memory which is freed stays with it; elsewhere it does nothing.
// A step's activations are freed, and allocated again in the next step: returning the memory to the system in between
// costs page faults each time (8 % of a pretraining step). 32 MiB is glibc's maximum for the first threshold. The heap
// grows once, by what it may keep: until it is used, that takes no memory.
inline void keep_freed_memory() {
#if defined(__GLIBC__)
  constexpr size_t kKept = 1 << 30, kHeap = kKept / 8 * 7;
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, kKept);
  mallopt(M_MMAP_MAX, 0);
  void* heap = std::malloc(kHeap);
  mallopt(M_MMAP_MAX, 65536);  // glibc's default
  if (heap) use_huge_pages(heap, kHeap);
  std::free(heap);
#endif
}

}  // namespace tinystory
