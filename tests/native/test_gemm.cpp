// The GEMM driver against plain loops that round as it does, bit for bit: every path of gemm.h, among them AMX's tiles
// and ARM's BFMMLA (or their scalar twins, where this is built with those). Guards lie around every output.
#include "arm_bf16_twin.h"
#include "cpu/gemm.h"
#include "harness.h"

using namespace tinystory::cpu;

struct Size {
  int64_t rows, columns, n_k;
};

float half(uint32_t pair, int which) {
  const uint32_t bits = which ? pair & 0xffff0000 : pair << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// One partial sum over `n` Packs a[k * ak] b[k * bk], added to c, as the policy's instructions form it.
template <class Policy>
float partial(const typename Policy::Pack* a, int64_t ak, const typename Policy::Pack* b, int64_t bk, int64_t n,
              float c, bool add) {
#if defined(TINYSTORY_AMX)
  if constexpr (Policy::kPack == 2) {
    float sum = add ? c : 0;
    for (int64_t k = 0; k < n; k += 16) {  // TDPBF16PS, by Intel's description
      float part[2]{};
      for (int64_t i = k; i < k + 16; ++i)
        for (int e = 0; e < 2; ++e) part[e] = std::fma(half(a[i * ak], e), half(b[i * bk], e), part[e]);
      sum += part[0] + part[1];
    }
    return sum;
  }
#endif
  float sum = 0;
#if defined(TINYSTORY_ARM_BF16)
  if constexpr (Policy::kPack == 2) {
    for (int64_t k = 0; k < n; ++k) sum = arm_bf16_twin::dot(sum, a[k * ak], b[k * bk]);
    return add ? c + sum : sum;
  }
#endif
  for (int64_t k = 0; k < n; ++k) {
    const vf s = fma(splat<vf>(float(a[k * ak])), splat<vf>(float(b[k * bk])), splat<vf>(sum));
    sum = s[0];
  }
  return add ? c + sum : sum;
}

template <class Policy>
std::vector<typename Policy::Pack> random_packs(int64_t n, unsigned seed) {
  std::vector<typename Policy::Pack> packs(n);
  const std::vector<float> values = normal(n * Policy::kPack, seed);
  for (int64_t i = 0; i < n; ++i) {
    uint32_t pair = 0;
    for (int e = 0; e < Policy::kPack; ++e) {
      uint32_t bits;
      std::memcpy(&bits, &values[i * Policy::kPack + e], 4);
      pair |= e ? bits & 0xffff0000 : bits >> 16;
    }
    if constexpr (Policy::kPack == 2) packs[i] = pair;
    else packs[i] = values[i];
  }
  return packs;
}

template <class Policy>
void test(const Size& s, bool transposed) {
  constexpr int64_t kWidth = kPanel<Policy>, kGuard = 3;
  constexpr float kUntouched = 777;
  const int64_t panels = (s.columns + kWidth - 1) / kWidth, cm = s.columns + kGuard;
  const auto a = random_packs<Policy>(s.rows * s.n_k, 1), b = random_packs<Policy>(panels * s.n_k * kWidth, 2);
  const Left<Policy> left{a.data(), transposed ? 1 : s.n_k, transposed ? s.rows : 1};
  const Right<Policy> right{b.data(), kWidth, s.n_k * kWidth};
  std::vector<float> c(s.rows * cm + kGuard, kUntouched), sums(s.rows * s.columns), before = normal(c.size(), 3);
  gemm<Policy>(s.rows, s.columns, s.n_k, left, right, c.data(), cm);
  std::vector<float> added = before;
  gemm<Policy>(s.rows, s.columns, s.n_k, left, right, added.data(), cm, true);
  std::vector<int> finished(sums.size());
  const int64_t middle = s.rows / 2;  // two calls: a row does not depend on its neighbours
  for (auto [first, last] : {std::pair<int64_t, int64_t>{0, middle}, {middle, s.rows}})
    gemm_tile<Policy>(first, last, 0, s.columns, s.n_k, left, right, [&](int64_t row, int64_t column, vf sum) {
      for (int i = 0; i < W; ++i) sums[row * s.columns + column + i] = sum[i], ++finished[row * s.columns + column + i];
    });

  for (int64_t i = 0; i < int64_t(c.size()); ++i) {
    const int64_t row = i / cm, column = i % cm;
    if (row >= s.rows || column >= s.columns) {
      CHECK(c[i] == kUntouched && added[i] == before[i], "beyond the matrix");
      continue;
    }
    float want = 0, want_added = before[i];
    for (int64_t k = 0; k < s.n_k; k += Policy::kReduce) {
      const int64_t n = std::min(Policy::kReduce, s.n_k - k);
      const auto* from_a = left.at + row * left.row_stride + k * left.k_stride;
      const auto* from_b = right.at + column / kWidth * right.panel_stride + k * kWidth + column % kWidth;
      if (kForAmx<Policy>) {  // its sums go on from the last
        want = partial<Policy>(from_a, left.k_stride, from_b, kWidth, n, want, k > 0);
        want_added = partial<Policy>(from_a, left.k_stride, from_b, kWidth, n, want_added, true);
        continue;
      }
      float sum = 0;
      for (int64_t i = 0; i < n; i += Policy::kSum)
        sum = partial<Policy>(from_a + i * left.k_stride, left.k_stride, from_b + i * kWidth, kWidth,
                              std::min(Policy::kSum, n - i), sum, i > 0);
      want = k > 0 ? want + sum : sum;
      want_added += sum;
    }
    if (kForAmx<Policy> && s.n_k > Policy::kReduce) want_added = before[i] + want;  // of more than one part: added last
    const int64_t j = row * s.columns + column;
    CHECK(c[i] == want && sums[j] == want && finished[j] == 1, "%g, %g, not %g", c[i], sums[j], want);
    CHECK(added[i] == want_added, "added: %g, not %g", added[i], want_added);
  }
}

#if defined(TINYSTORY_AMX_TWIN)
// A block of 32 x 32 sums takes four loads for four dots, and of whole ones there are as many as can be.
void test_tile_loads() {
  constexpr int64_t kRows = 96, kPacks = BF16Tiles::kReduce;
  const auto a = random_packs<BF16Tiles>(kRows * kPacks, 1), b = random_packs<BF16Tiles>(kPacks * kColumns, 2);
  std::vector<float> c(kRows * kColumns);
  auto& twin = amx_twin::Twin::own();
  twin.loads = twin.dots = 0;
  gemm<BF16Tiles>(kRows, kColumns, kPacks, {a.data(), kPacks, 1}, {b.data(), kColumns, 0}, c.data(), kColumns);
  CHECK(twin.loads == twin.dots, "%g loads per dot", double(twin.loads) / twin.dots);
}
#endif

int main() {
#if defined(TINYSTORY_AMX_TWIN)
  test_tile_loads();
#endif
  for (int64_t rows : {1, 2, 5, 6, 7, 15, 16, 17, 31, 32, 33, 48, 97, 130})
    for (int64_t columns : {16, 32, 48, 64, 80, 128})
      for (int64_t n_k : {16, 48, 128, 400}) {
        test<F32>({rows, columns, n_k}, false);
        test<F32>({rows, columns, n_k - 3}, true);
#if defined(TINYSTORY_AMX)
        if (amx::permitted()) test<BF16Tiles>({rows, columns, n_k}, false);
        if (amx::permitted() && rows == 97 && n_k == 48) test<BF16Tiles>({kMostRows<BF16Tiles> + rows, 32, n_k}, false);
#endif
      }
  test<F32>({601, 80, 250}, true);  // a left operand that is copied
#if defined(TINYSTORY_ARM_BF16) && !defined(TINYSTORY_AMX)
  for (int64_t rows : {1, 2, 3, 5, 6, 7, 13, 97})
    for (int64_t columns : {W, 16, 16 + W, 64, 80})
      for (int64_t n_k : {4, 36, 388}) {
        test<BF16Tiles>({rows, columns, n_k}, false);
        if (n_k == 36) test<BF16>({rows, columns, n_k}, false);  // BFDOT: the same sums
      }
#endif
#if defined(TINYSTORY_AMX)
  std::puts(amx::permitted() ? "AMX's tiles were tested" : "Linux does not permit AMX here: its tiles were not tested");
#endif
}
