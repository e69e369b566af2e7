// The functions that code compiled with -fsanitize=thread calls, in place of ThreadSanitizer's runtime.
#include <cstring>

#include "trace.h"

namespace {

void see(const void* p, size_t bytes, bool write, const void* return_address) {
  if (simt::trace::on() && simt::in_kernel())
    simt::trace::access(p, bytes, write ? simt::trace::Access::write : simt::trace::Access::read, return_address);
}

}  // namespace

#define ACCESS(name, bytes, write) \
  void __tsan_##name(void* p) { see(p, bytes, write, __builtin_return_address(0)); }
#define SIZE(n)             \
  ACCESS(read##n, n, false) \
  ACCESS(write##n, n, true) ACCESS(unaligned_read##n, n, false) ACCESS(unaligned_write##n, n, true)

extern "C" {
SIZE(1) SIZE(2) SIZE(4) SIZE(8) SIZE(16) void __tsan_read_range(void* p, size_t n) {
  see(p, n, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) { see(p, n, true, __builtin_return_address(0)); }
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  see(from, n, false, __builtin_return_address(0));
  see(to, n, true, __builtin_return_address(0));
  return std::memcpy(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  see(to, n, true, __builtin_return_address(0));
  return std::memset(to, value, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
// Only the guards of host-side statics are atomic; the kernels' own atomics are a primitive.
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return *p; }
uint32_t __tsan_atomic32_load(const volatile uint32_t* p, int) { return *p; }
}
