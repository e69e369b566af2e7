// Splits the kernels' ranges of items over torch's threads, or, without OpenMP, over as many of our own.
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

// While it lives, this thread takes subnormal floats for zero: an x86 core needs some hundred cycles for an instruction
// that meets one, and sharp attention has subnormal gradients.
class SubnormalsAsZero {
#if defined(__x86_64__)
 public:
  SubnormalsAsZero() { _mm_setcsr(before_ | 0x8040); }  // results, and operands
  ~SubnormalsAsZero() { _mm_setcsr(before_); }

 private:
  const unsigned before_ = _mm_getcsr();
#endif
};

// Calls f(begin, end) on parts that cover [0, items), each taken by the thread that is free next: half of an equal share
// of what is left, so that the threads end together, even if a core is slower or busy with other programs. An item's
// result depends on neither part nor thread.
template <class F>
void parallel(int64_t items, const F& f) {
  const int64_t threads = at::get_num_threads();
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    [[maybe_unused]] const SubnormalsAsZero mode;
    for (int64_t begin = next; begin < items;) {
      const int64_t end = begin + std::max<int64_t>(1, (items - begin) / (2 * threads));
      if (!next.compare_exchange_weak(begin, end)) continue;  // begin is now what another thread has left
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
