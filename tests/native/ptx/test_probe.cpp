// Every primitive: interpreted PTX against the twin on the SIMT machine, on which the kernels' other tests rely.
#include "../simt/check.h"
#include "probe.h"

using namespace test;

namespace {

constexpr int kBlocks = 40;

// Arbitrary bits; then floats of moderate size, with halves at ties of rounding; then pairs of special values.
std::vector<uint32_t> inputs() {
  std::mt19937_64 random(0);
  std::vector<uint32_t> words(size_t(kBlocks) * probe::kThreads * probe::kInputs);
  for (uint32_t& word : words) word = uint32_t(random());
  const auto set = [&](size_t thread, uint32_t a, uint32_t b) {
    words[thread * probe::kInputs] = a, words[thread * probe::kInputs + 1] = b;
  };
  std::normal_distribution<float> normal;
  const uint32_t ties[] = {0x0000, 0x7fff, 0x8000, 0x8001, 0x1000, 0x2000, 0x3000};
  size_t thread = 0;
  for (; thread < 1000; ++thread) {
    const auto number = [&] { return std::ldexp(normal(random), int(random() % 40) - 20); };
    const uint32_t a = tinystory::cuda::float_bits(number()), b = tinystory::cuda::float_bits(number());
    set(thread, thread % 2 ? a : (a & 0xffff0000u) | ties[thread / 2 % 7], b);
  }
  const uint32_t special[] = {0,          0x80000000, 0x7f800000, 0xff800000, 0x7fc00000, 0x7f7fffff,
                              0xff7fffff, 1,          0x007fffff, 0x00800000, 0x477fe000, 0x477ff000,
                              0x477fefff, 0x33000000, 0x33000001, 0x38800000, 0x387fe000, 0x3f800000};
  for (const uint32_t a : special)
    for (const uint32_t b : special) set(thread++, a, b);
  return words;
}

struct Results {
  std::vector<uint32_t> out, carry;
  std::vector<int> turns;
};
Results results(void (*probe)(const probe::Params&, int), uint64_t seed) {
  simt::set_seed(seed);
  const simt::Buffer<uint32_t> in(inputs());
  simt::Buffer<uint32_t> out(size_t(kBlocks) * probe::kThreads * probe::kWords), carry(probe::kThreads);
  simt::Buffer<uint32_t> scratch(size_t(kBlocks) * probe::kThreads * 8);
  simt::Buffer<int> turns(1 + kBlocks);
  std::fill_n(turns.data(), 1 + kBlocks, 0);
  std::fill_n(carry.data(), probe::kThreads, 0u);
  probe({in.data(), out.data(), scratch.data(), turns.data(), carry.data()}, kBlocks);
  return {out.read(), carry.read(), turns.read()};
}

bool same_half(uint32_t x, uint32_t y, int shift, uint32_t infinity) {
  x = x >> shift & 0xffff, y = y >> shift & 0xffff;
  const auto nan = [&](uint32_t h) { return (h & 0x7fff) > infinity; };
  return x == y || (nan(x) && nan(y));
}

bool same(uint32_t x, uint32_t y, probe::Tolerance tolerance) {
  const double a = tinystory::cuda::bits_float(x), b = tinystory::cuda::bits_float(y);
  switch (tolerance) {
    case probe::exact: return x == y;
    case probe::f32: return x == y || (std::isnan(a) && std::isnan(b));
    case probe::bf16x2: return same_half(x, y, 0, 0x7f80) && same_half(x, y, 16, 0x7f80);
    case probe::f16x2: return same_half(x, y, 0, 0x7c00) && same_half(x, y, 16, 0x7c00);
    case probe::ex2:  // which flushes subnormal results to 0
      return a == b || (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= std::fabs(b) * 0x1.8p-22 + 0x1p-126;
    case probe::lg2:  // and arguments with a logarithm of -infinity
      return a == b || (std::isnan(a) && std::isnan(b)) || (std::isinf(a) && b <= -126) ||
             std::fabs(a - b) <= std::max(1.0, std::fabs(b)) * 0x1.8p-22;
  }
  return false;
}

void compare(const Results& ptx, const Results& twin, uint64_t seed) {
  const auto& inputs_now = inputs();
  size_t first = 0;
  for (const probe::Result& result : probe::kResults) {
    std::string difference;
    for (size_t thread = 0; thread < inputs_now.size() / probe::kInputs && difference.empty(); ++thread)
      for (size_t at = first; at < first + size_t(result.words) && difference.empty(); ++at) {
        // The order of the blocks, and so this result, is another in each run.
        if (result.primitive[0] == 't' && result.primitive[1] == 'a') continue;
        const uint32_t x = ptx.out[thread * probe::kWords + at], y = twin.out[thread * probe::kWords + at];
        char line[160];
        std::snprintf(line, sizeof line, ": word %zu of thread %zu is %08x, its twin's %08x, of %08x and %08x",
                      at - first, thread, x, y, inputs_now[thread * probe::kInputs],
                      inputs_now[thread * probe::kInputs + 1]);
        if (!same(x, y, result.tolerance)) difference = line;
      }
    check(difference.empty(), std::string(result.primitive) + difference + ", seed " + std::to_string(seed));
    first += size_t(result.words);
  }
  check(ptx.turns == twin.turns && ptx.carry == twin.carry,
        "what blocks pass to each other, seed " + std::to_string(seed));
}

}  // namespace

int main() {
  const Results twin = results(probe_twin, 0);
  for (uint64_t seed = 0; seed < 12; ++seed)  // schedules
    run("seed " + std::to_string(seed), [&] { compare(results(probe_ptx, seed), twin, seed); });
  return report("ptx_probe");
}
