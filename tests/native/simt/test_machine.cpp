// The SIMT machine itself: each kind of mistake is caught and named. That the primitives compute what the hardware
// does, the probe shows (../ptx).
#include "check.h"

using namespace tinystory::cuda;
using namespace test;

namespace {

struct Params {
  float *in, *out;
  int mode;
};

float* shared() { return reinterpret_cast<float*>(shared_memory()); }

void run_kernel(void (*kernel)(Params), int threads, size_t shared_bytes, const Params& p, int blocks = 1) {
  launch(kernel, blocks, threads, shared_bytes, nullptr, p);
}

// The error that ends the launch, or "".
std::string error_of(void (*kernel)(Params), int threads, size_t shared_bytes, const Params& p) {
  try {
    run_kernel(kernel, threads, shared_bytes, p);
  } catch (const simt::Error& e) {
    return e.what();
  }
  return "";
}
void expect_error(const std::string& part, void (*kernel)(Params), int threads, size_t shared_bytes, const Params& p) {
  const std::string got = error_of(kernel, threads, shared_bytes, p);
  check(got.find(part) != std::string::npos,
        "mode " + std::to_string(p.mode) + ": expected '" + part + "', got '" + got + "'");
}

// --- results ---------------------------------------------------------------------------------------------------------
// Reverses 256 elements through shared memory; mode 1 omits the barrier.
void reverse(Params p) {
  const int i = int(threadIdx.x);
  shared()[i] = p.in[i];
  if (p.mode == 0) sync_block();
  p.out[i] = shared()[255 - i];
}

void test_results() {
  std::mt19937_64 random(0);
  const auto numbers = normal<float>(random, 256);
  const simt::Buffer<float> in(numbers);
  for (int seed = 0; seed < 10; ++seed) {
    simt::set_seed(seed);
    simt::Buffer<float> out(256);
    run_kernel(reverse, 256, 1024, {in.data(), out.data(), 0});
    const auto got = out.read();
    bool same = true;
    for (int i = 0; i < 256; ++i) same &= got[i] == numbers[255 - i];
    check(same, "reverse");
  }
}

// --- mistakes --------------------------------------------------------------------------------------------------------
void test_missing_barrier() {
  std::mt19937_64 random(0);
  const simt::Buffer<float> in(normal<float>(random, 256));
  for (int seed = 0; seed < 10; ++seed) {
    simt::set_seed(seed);
    simt::Buffer<float> out(256);
    run_kernel(reverse, 256, 1024, {in.data(), out.data(), 1});
    bool nan = false;
    for (float x : out.read()) nan |= std::isnan(x);
    check(nan, "a missing barrier lets poison through");
  }
}

// The mode selects the mistake.
void copies(Params p) {
  const int i = int(threadIdx.x);
  copy_async16(shared() + 4 * i, p.in + 4 * i, p.mode != 2);
  copy_commit();
  copy_async16(shared() + 128 + 4 * i, p.in + 4 * i, true);
  copy_commit();
  if (p.mode == 0 || p.mode == 2) copy_wait<0>();
  if (p.mode == 1) copy_wait<1>();  // for the first group only
  for (int k = 0; k < 4; ++k) p.out[8 * i + k] = shared()[4 * i + k], p.out[8 * i + 4 + k] = shared()[128 + 4 * i + k];
}

void test_copies() {
  std::vector<float> numbers(128);
  for (int i = 0; i < 128; ++i) numbers[i] = float(i + 1);
  const simt::Buffer<float> in(numbers);
  for (int mode = 0; mode < 4; ++mode) {
    simt::Buffer<float> out(256);
    run_kernel(copies, 32, 1024, {in.data(), out.data(), mode});
    const auto got = out.read();
    for (int i = 0; i < 256; ++i) {
      const bool second = i % 8 >= 4;
      const float want = mode == 3 || (mode == 1 && second) ? NAN
                         : mode == 2 && !second             ? 0.0f
                                                            : numbers[i / 8 * 4 + i % 4];
      check(std::isnan(want) ? std::isnan(got[i]) : got[i] == want, "cp.async, mode " + std::to_string(mode));
    }
  }
}

void meet_at_equal_lines(bool other);

void diverge(Params p) {
  const int i = int(threadIdx.x);
  if (p.mode == 0) {
    if (i < 40) sync_block();
    else sync_block();
  } else if (p.mode == 1) {
    if (i == 7) return;
    sync_block();
  } else if (p.mode == 2) {
    if (i % 2) p.out[i] = shuffle(1.0f, 0);
    else p.out[i] = shuffle(2.0f, 1);
  } else if (p.mode == 3) {
    if (i != 3) p.out[i] = warp_sum(1.0f);
  } else if (p.mode == 4) {
    meet_at_equal_lines(i % 2);
  }
}

void stray(Params p) {
  const int i = int(threadIdx.x);
  switch (p.mode) {
    case 0: p.out[i] = p.in[100 + i]; break;                                     // past the end, by the page
    case 1: store16(p.out + 4 * i, load16(p.in + 100 - 4 * 31 + 4 * i)); break;  // by the byte
    case 2: p.in[i] = 1; break;                                                  // read-only
    case 3: store16(p.out + 1, load16(p.in)); break;                             // misaligned
    case 4: shared()[256 + i] = 1; break;                                        // past shared memory
    case 5: copy_async16(shared() + 256, p.in, true); break;
    case 6: copy_async16(shared() + 2, p.in, true); break;
    case 7: {
      uint32_t r[4];
      ldmatrix(r, shared() + 252 + 4 * (i / 31));
      break;
    }
  }
}

void test_errors() {
  for (int seed = 0; seed < 10; ++seed) {
    simt::set_seed(seed);
    const simt::Buffer<float> in(std::vector<float>(100, 1.0f));
    simt::Buffer<float> out(128);
    const auto expect = [&](const std::string& part, void (*kernel)(Params), int threads, int mode) {
      expect_error(part, kernel, threads, 1024, {in.data(), out.data(), mode});
    };
    expect("divergent barrier", diverge, 64, 0);
    expect("waits for ever at sync_block", diverge, 64, 1);
    expect("divergent warp", diverge, 32, 2);
    expect("waits for ever at shuffle", diverge, 32, 3);
    expect("divergent warp", diverge, 32, 4);
    expect(seed % 2 ? "" : "touched memory that is not its own", stray, 32, 0);  // odd seeds leave room after a buffer
    expect("read outside every global buffer", stray, 32, 1);
    expect("touched memory that is not its own", stray, 32, 2);
    expect("not a multiple of 16", stray, 32, 3);
    expect("touched memory that is not its own", stray, 32, 4);
    expect("outside the 1024 bytes of shared memory", stray, 32, 5);
    expect("not a multiple of 16", stray, 32, 6);
    expect("outside the 1024 bytes of shared memory", stray, 32, 7);
  }
  expect_error("are too many", reverse, 256, 164 << 10, {});
  expect_error("whole warps", reverse, 33, 0, {});

  simt::set_seed(0);
  simt::Buffer<float> odd(101);  // the 12 bytes after it cannot be protected, but a change is detected
  run_kernel([](Params p) { p.out[100 + threadIdx.x / 31] = 1; }, 32, 0, {nullptr, odd.data(), 0});
  try {
    odd.read();
    check(false, "a write beside a buffer is seen");
  } catch (const simt::Error&) {
    check(true, "");
  }
}

}  // namespace

int main() {
  test_results();
  test_missing_barrier();
  test_copies();
  test_errors();
  return report("simt_machine");
}

// Last in this file, because of #line: two calls on lines of the same number, in different files.
namespace {
void meet_at_equal_lines(bool other) {
  if (other) {
#line 1 "one.cuh"
    sync_warp();
  } else {
#line 1 "other.cuh"
    sync_warp();
  }
}
}  // namespace
