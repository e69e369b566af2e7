// Divides a kernel's range of items among PyTorch's threads, or, without OpenMP, among as many threads of our own.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/thread_pool.h"

namespace tinystory {

inline int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// RAII guard: flush-to-zero and denormals-are-zero (FTZ and DAZ) on this thread. An x86 core needs some hundred cycles
// for an instruction with a subnormal operand or result, and sharp attention has subnormal gradients.
class SubnormalsAsZero {
#if defined(__x86_64__)
 public:
  SubnormalsAsZero() { _mm_setcsr(before_ | 0x8040); }  // FTZ 0x8000, DAZ 0x0040
  ~SubnormalsAsZero() { _mm_setcsr(before_); }

 private:
  const unsigned before_ = _mm_getcsr();
#endif
};

// Calls f(begin, end) on parts that cover [0, items). A thread that becomes free takes the next part: half of an equal
// share of the remaining items. So all threads finish at about the same time, even if a core is slower or busy with
// other programs. The result of an item must not depend on the part or the thread.
template <class F>
void parallel(int64_t items, const F& f) {
  const int64_t threads = at::get_num_threads();
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    [[maybe_unused]] const SubnormalsAsZero mode;
    for (int64_t begin = next; begin < items;) {
      const int64_t end = begin + std::max<int64_t>(1, (items - begin) / (2 * threads));
      if (!next.compare_exchange_weak(begin, end)) continue;  // begin is now the first item that no thread has taken
      f(begin, end);
      begin = next;
    }
  };
  const int64_t useful = std::min(threads, items);
#ifdef _OPENMP
  at::parallel_for(0, useful, 1, [&](int64_t, int64_t) { work(); });
#else
  cpu::ThreadPool::shared().run(useful, work);
#endif
}

}  // namespace tinystory
