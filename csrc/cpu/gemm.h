// GEMM on the CPU: a micro-kernel that keeps a small tile of the result in registers, `gemm`, which covers up to 6 rows
// with it, and the packed layouts that both read. Callers block for the caches; a Policy chooses the instructions.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "vec.h"

namespace tinystory::cpu {

constexpr int64_t kPanel = 64;                  // columns per panel of a transposed matrix
constexpr int kMicroVectors = W == 16 ? 4 : 2;  // vectors per row of the tile: 6 * 4 sums + 4 columns fit 32 registers

// A Policy says how to multiply and add. A Pack is the unit along the reduced dimension: one element, or two bf16 for
// the processor's dot-product instruction. kPack is the number of elements in a Pack.
struct F32 {
  using Acc = float;
  using Pack = float;
  static constexpr int kPack = 1;
  static vf broadcast(const char* p) { return splat<vf>(load<float>(p)); }
  static vf dot(vf a, vf b, vf sum) { return fma(a, b, sum); }
};
struct F64 {
  using Acc = double;
  using Pack = double;
  static constexpr int kPack = 1;
  static vd broadcast(const char* p) { return splat<vd>(load<double>(p)); }
  static vd dot(vd a, vd b, vd sum) { return fma(a, b, sum); }
};
#if defined(__AVX512BF16__)
struct BF16 {
  using Acc = float;
  using Pack = uint32_t;
  static constexpr int kPack = 2;
  static vf broadcast(const char* p) { return (vf)(vu{} + load<uint32_t>(p)); }
  static vf dot(vf a, vf b, vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
};
#endif

// The micro-kernel: c[m][n] (+)= sum over k of a[m][k] * b[k][n] for an R x (C * lanes) tile held in registers. The
// strides am, ak and bk are in Packs.
template <class Policy, int R, int C>
void micro_kernel(int64_t n_k, const typename Policy::Pack* a, int64_t am, int64_t ak, const typename Policy::Pack* b,
                  int64_t bk, typename Policy::Acc* c, int64_t cm, bool add) {
  using Vec = VecOf<typename Policy::Acc>;
  constexpr int L = lanes<Vec>;
  if (add)  // prefetched while the sums are formed
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < C; ++j) __builtin_prefetch(c + r * cm + j * L, 1);
  Vec acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) acc[r][j] = Vec{};
  for (int64_t k = 0; k < n_k; ++k, a += ak, b += bk) {
    Vec col[C];
    for (int j = 0; j < C; ++j) col[j] = load<Vec>(b + j * L);
    for (int r = 0; r < R; ++r) {
      const Vec row = Policy::broadcast(reinterpret_cast<const char*>(a + r * am));
      for (int j = 0; j < C; ++j) acc[r][j] = Policy::dot(row, col[j], acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) {  // added last: sums of short sums round less than one long sum
      typename Policy::Acc* to = c + r * cm + j * L;
      store(to, add ? load<Vec>(to) + acc[r][j] : acc[r][j]);
    }
}

template <class Policy, int R>
void micro_row(int64_t vectors, int64_t n_k, const typename Policy::Pack* a, int64_t am, int64_t ak,
               const typename Policy::Pack* b, int64_t bk, typename Policy::Acc* c, int64_t cm, bool add) {
  constexpr int L = lanes<VecOf<typename Policy::Acc>>;
  for (; vectors >= kMicroVectors; vectors -= kMicroVectors, b += kMicroVectors * L, c += kMicroVectors * L)
    micro_kernel<Policy, R, kMicroVectors>(n_k, a, am, ak, b, bk, c, cm, add);
  if constexpr (kMicroVectors == 4)
    if (vectors == 3) return micro_kernel<Policy, R, 3>(n_k, a, am, ak, b, bk, c, cm, add);
  if constexpr (kMicroVectors == 4)
    if (vectors == 2) return micro_kernel<Policy, R, 2>(n_k, a, am, ak, b, bk, c, cm, add);
  if (vectors == 1) micro_kernel<Policy, R, 1>(n_k, a, am, ak, b, bk, c, cm, add);
}

// The same for rows <= 6 and any number of vectors per row.
template <class Policy>
void gemm(int64_t rows, int64_t vectors, int64_t n_k, const typename Policy::Pack* a, int64_t am, int64_t ak,
          const typename Policy::Pack* b, int64_t bk, typename Policy::Acc* c, int64_t cm, bool add = false) {
  if (rows == 6) return micro_row<Policy, 6>(vectors, n_k, a, am, ak, b, bk, c, cm, add);
  if (rows >= 4) {
    micro_row<Policy, 4>(vectors, n_k, a, am, ak, b, bk, c, cm, add);
    rows -= 4, a += 4 * am, c += 4 * cm;
  }
  if (rows >= 2) {
    micro_row<Policy, 2>(vectors, n_k, a, am, ak, b, bk, c, cm, add);
    rows -= 2, a += 2 * am, c += 2 * cm;
  }
  if (rows) micro_row<Policy, 1>(vectors, n_k, a, am, ak, b, bk, c, cm, add);
}

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Stores elements j, j + 1, ... of a row of Packs.
template <class Policy>
inline void store_elements(void* row, int64_t j, VecOf<typename Policy::Acc> v) {
  if constexpr (Policy::kPack == 2) store(static_cast<uint16_t*>(row) + j, to_bf16(v));
  else store(static_cast<typename Policy::Acc*>(row) + j, v);
}

// Two bf16 in each Pack, the first in the low half.
inline vu pair(vh a, vh b) { return __builtin_convertvector(a, vu) | __builtin_convertvector(b, vu) << 16; }

// --- layouts ---------------------------------------------------------------------------------------------------------
// Packs rows of D elements into rows of padded_D / kPack Packs; the padding, and the rows up to padded_rows, are zero.
template <class Policy>
void pack_rows(typename Policy::Pack* to, const void* from, DType type, int64_t stride, int64_t rows,
               int64_t padded_rows, int64_t D, int64_t padded_D) {
  using Vec = VecOf<typename Policy::Acc>;
  constexpr int64_t L = lanes<Vec>;
  const int64_t packs = padded_D / Policy::kPack;
  for (int64_t i = 0; i < rows; ++i, to += packs)
    for (int64_t d = 0; d < padded_D; d += L) {
      const void* p = at(from, type, i * stride + d);
      const Vec v = d + L <= D ? load_as<Vec>(p, type) : d < D ? load_tail<Vec>(p, type, D - d, 0) : Vec{};
      store_elements<Policy>(to, d, v);
    }
  std::memset(to, 0, (padded_rows - rows) * packs * sizeof *to);
}

// Interleaves the elements of a and b: those of their lower halves, or those of their upper halves.
template <bool kUpper, class Vec, int... I>
Vec zip(Vec a, Vec b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I), first = kUpper ? L / 2 : 0;
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (first + I / 2 + I % 2 * L)...);
#else  // GCC before 12
  using Index = std::conditional_t<sizeof(Vec()[0]) == 8, vu64, vu>;
  return __builtin_shuffle(a, b, Index{(first + I / 2 + I % 2 * L)...});
#endif
}
template <bool kUpper, class Vec>
Vec zip(Vec a, Vec b) {
  return zip<kUpper>(a, b, std::make_integer_sequence<int, lanes<Vec>>());
}

// Packs rows as the right operand of a GEMM that reduces over rows: kPack rows side by side in each Pack, in panels of
// `width` columns [D / width][panel_rows][width]. The number of rows is a multiple of kPack.
template <class Policy>
void pair_rows(typename Policy::Pack* to, const typename Policy::Pack* rows, int64_t n, int64_t D, int64_t width,
               int64_t panel_rows) {
  const auto place = [&](int64_t i, int64_t d) { return to + d / width * panel_rows * width + i * width + d % width; };
  if constexpr (Policy::kPack == 2) {
    for (int64_t i = 0; i < n / 2; ++i, rows += D)
      for (int64_t w = 0; w < D / 2; w += W) {
        const vu even = load<vu>(rows + w), odd = load<vu>(rows + D / 2 + w);
        const vu low = (even & 0xffff) | (odd << 16), high = (even >> 16) | (odd & 0xffff0000);
        store(place(i, 2 * w), zip<false>(low, high));
        store(place(i, 2 * w + W), zip<true>(low, high));
      }
  } else {
    for (int64_t i = 0; i < n; ++i, rows += D)
      for (int64_t d = 0; d < D; d += width) std::memcpy(place(i, d), rows + d, std::min(width, D - d) * sizeof *to);
  }
}

// L x L transpose by log2(L) perfect shuffles.
template <class Vec>
void transpose(Vec (&r)[lanes<Vec>]) {
  constexpr int L = lanes<Vec>;
  Vec t[L];
  for (int step = L; step > 1; step /= 2) {
    for (int i = 0; i < L / 2; ++i) {
      t[2 * i] = zip<false>(r[i], r[i + L / 2]);
      t[2 * i + 1] = zip<true>(r[i], r[i + L / 2]);
    }
    for (int i = 0; i < L; ++i) r[i] = t[i];
  }
}

// Transposes rows into panels [padded / 64][D / kPack][64], the right operand of a GEMM that reduces over D.
template <class Policy>
void transpose_rows(typename Policy::Pack* to, const typename Policy::Pack* rows, int64_t padded, int64_t D) {
  using Vec = std::conditional_t<sizeof(typename Policy::Pack) == 8, vd, vu>;
  constexpr int L = lanes<Vec>;
  const int64_t packs = D / Policy::kPack;
  for (int64_t j = 0; j < padded; j += L)
    for (int64_t w = 0; w < packs; w += L) {
      Vec block[L];
      for (int i = 0; i < L; ++i) block[i] = load<Vec>(rows + (j + i) * packs + w);
      transpose(block);
      auto* panel = to + (j / kPanel) * packs * kPanel + w * kPanel + j % kPanel;
      for (int i = 0; i < L; ++i) store(panel + i * kPanel, block[i]);
    }
}

// Hands out memory in 64-byte aligned pieces. Run twice: first to count the bytes, then over memory of that size.
struct Arena {
  char* base = nullptr;
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base + used);
    used += (n * sizeof(T) + 63) / 64 * 64;
    return base ? p : nullptr;
  }
};

}  // namespace tinystory::cpu
