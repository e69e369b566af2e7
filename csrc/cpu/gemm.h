// The register tile behind every product on the CPU, and the layouts that feed it.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "vec.h"

namespace tinystory::cpu {

constexpr int64_t kPanel = 64;              // columns a panel of a transposed matrix
constexpr int kTileCols = W == 16 ? 4 : 2;  // vectors a row of the tile: 6 * 4 sums + 4 columns fit 32 registers

// How products are computed. A Word is the unit along the reduced dimension: one number, or two bf16 for the machine's
// dot product. kPair says how many numbers a Word holds.
struct F32 {
  using Acc = float;
  using Word = float;
  static constexpr int kPair = 1;
  static vf broadcast(const char* p) { return splat<vf>(load<float>(p)); }
  static vf dot(vf a, vf b, vf sum) { return fma(a, b, sum); }
};
struct F64 {
  using Acc = double;
  using Word = double;
  static constexpr int kPair = 1;
  static vd broadcast(const char* p) { return splat<vd>(load<double>(p)); }
  static vd dot(vd a, vd b, vd sum) { return fma(a, b, sum); }
};
#if defined(__AVX512BF16__)
struct BF16 {
  using Acc = float;
  using Word = uint32_t;
  static constexpr int kPair = 2;
  static vf broadcast(const char* p) { return (vf)(vu{} + load<uint32_t>(p)); }
  static vf dot(vf a, vf b, vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
};
#endif

// C[m][n] (+)= sum over k of A[m][k] * B[k][n] for an R x (C * lanes) tile held in registers. Strides are in Words.
template <class K, int R, int C>
void tile(int64_t n_k, const typename K::Word* a, int64_t am, int64_t ak, const typename K::Word* b, int64_t bk,
          typename K::Acc* c, int64_t cm, bool add) {
  using V = Vec<typename K::Acc>;
  constexpr int L = lanes<V>;
  if (add)  // what the sums are added to comes nearer while they are formed
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < C; ++j) __builtin_prefetch(c + r * cm + j * L, 1);
  V acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) acc[r][j] = V{};
  for (int64_t k = 0; k < n_k; ++k, a += ak, b += bk) {
    V col[C];
    for (int j = 0; j < C; ++j) col[j] = load<V>(b + j * L);
    for (int r = 0; r < R; ++r) {
      const V row = K::broadcast(reinterpret_cast<const char*>(a + r * am));
      for (int j = 0; j < C; ++j) acc[r][j] = K::dot(row, col[j], acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) {  // added last: sums of short sums round less than one long sum
      typename K::Acc* to = c + r * cm + j * L;
      store(to, add ? load<V>(to) + acc[r][j] : acc[r][j]);
    }
}

template <class K, int R>
void tile_row(int64_t vectors, int64_t n_k, const typename K::Word* a, int64_t am, int64_t ak,
              const typename K::Word* b, int64_t bk, typename K::Acc* c, int64_t cm, bool add) {
  constexpr int L = lanes<Vec<typename K::Acc>>;
  for (; vectors >= kTileCols; vectors -= kTileCols, b += kTileCols * L, c += kTileCols * L)
    tile<K, R, kTileCols>(n_k, a, am, ak, b, bk, c, cm, add);
  if constexpr (kTileCols == 4)
    if (vectors == 3) return tile<K, R, 3>(n_k, a, am, ak, b, bk, c, cm, add);
  if constexpr (kTileCols == 4)
    if (vectors == 2) return tile<K, R, 2>(n_k, a, am, ak, b, bk, c, cm, add);
  if (vectors == 1) tile<K, R, 1>(n_k, a, am, ak, b, bk, c, cm, add);
}

// The same for rows <= 6 rows and any number of vectors.
template <class K>
void product(int64_t rows, int64_t vectors, int64_t n_k, const typename K::Word* a, int64_t am, int64_t ak,
             const typename K::Word* b, int64_t bk, typename K::Acc* c, int64_t cm, bool add = false) {
  if (rows == 6) return tile_row<K, 6>(vectors, n_k, a, am, ak, b, bk, c, cm, add);
  if (rows >= 4) {
    tile_row<K, 4>(vectors, n_k, a, am, ak, b, bk, c, cm, add);
    rows -= 4, a += 4 * am, c += 4 * cm;
  }
  if (rows >= 2) {
    tile_row<K, 2>(vectors, n_k, a, am, ak, b, bk, c, cm, add);
    rows -= 2, a += 2 * am, c += 2 * cm;
  }
  if (rows) tile_row<K, 1>(vectors, n_k, a, am, ak, b, bk, c, cm, add);
}

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Numbers j .. of a row of Words.
template <class K>
inline void store_numbers(void* row, int64_t j, Vec<typename K::Acc> v) {
  if constexpr (K::kPair == 2) store(static_cast<uint16_t*>(row) + j, to_bf16(v));
  else store(static_cast<typename K::Acc*>(row) + j, v);
}

// Two halves side by side in each Word, the first one low.
inline vu pair(vh a, vh b) { return __builtin_convertvector(a, vu) | __builtin_convertvector(b, vu) << 16; }

// --- layouts ---------------------------------------------------------------------------------------------------------
// Rows of D numbers as rows of padded_D / kPair Words; the padding, and the rows up to padded_rows, are zero.
template <class K>
void pack_rows(typename K::Word* to, const void* from, DType type, int64_t stride, int64_t rows, int64_t padded_rows,
               int64_t D, int64_t padded_D) {
  using V = Vec<typename K::Acc>;
  constexpr int64_t L = lanes<V>;
  const int64_t words = padded_D / K::kPair;
  for (int64_t i = 0; i < rows; ++i, to += words)
    for (int64_t d = 0; d < padded_D; d += L) {
      const void* p = at(from, type, i * stride + d);
      store_numbers<K>(to, d, d + L <= D ? load_as<V>(p, type) : d < D ? load_tail<V>(p, type, D - d, 0) : V{});
    }
  std::memset(to, 0, (padded_rows - rows) * words * sizeof *to);
}

// The elements of a and b in turn: of their lower halves, or of their upper halves.
template <bool kUpper, class V, int... I>
V zip(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I), first = kUpper ? L / 2 : 0;
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (first + I / 2 + I % 2 * L)...);
#else  // GCC before 12
  using Index = std::conditional_t<sizeof(V()[0]) == 8, vu64, vu>;
  return __builtin_shuffle(a, b, Index{(first + I / 2 + I % 2 * L)...});
#endif
}
template <bool kUpper, class V>
V zip(V a, V b) {
  return zip<kUpper>(a, b, std::make_integer_sequence<int, lanes<V>>());
}

// Rows -> what stands on the right of a product that reduces over rows: kPair rows side by side in each Word, in panels
// of `width` columns [D / width][panel_rows][width]. The number of rows is a multiple of kPair.
template <class K>
void pair_rows(typename K::Word* to, const typename K::Word* rows, int64_t n, int64_t D, int64_t width,
               int64_t panel_rows) {
  const auto place = [&](int64_t i, int64_t d) { return to + d / width * panel_rows * width + i * width + d % width; };
  if constexpr (K::kPair == 2) {
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
template <class V>
void transpose(V (&r)[lanes<V>]) {
  constexpr int L = lanes<V>;
  V t[L];
  for (int step = L; step > 1; step /= 2) {
    for (int i = 0; i < L / 2; ++i) {
      t[2 * i] = zip<false>(r[i], r[i + L / 2]);
      t[2 * i + 1] = zip<true>(r[i], r[i + L / 2]);
    }
    for (int i = 0; i < L; ++i) r[i] = t[i];
  }
}

// Rows -> panels [padded / 64][D / kPair][64]: what stands on the right of a product that reduces over D.
template <class K>
void transpose_rows(typename K::Word* to, const typename K::Word* rows, int64_t padded, int64_t D) {
  using V = std::conditional_t<sizeof(typename K::Word) == 8, vd, vu>;
  constexpr int L = lanes<V>;
  const int64_t words = D / K::kPair;
  for (int64_t j = 0; j < padded; j += L)
    for (int64_t w = 0; w < words; w += L) {
      V block[L];
      for (int i = 0; i < L; ++i) block[i] = load<V>(rows + (j + i) * words + w);
      transpose(block);
      auto* panel = to + (j / kPanel) * words * kPanel + w * kPanel + j % kPanel;
      for (int i = 0; i < L; ++i) store(panel + i * kPanel, block[i]);
    }
}

// Scratch memory handed out in 64-byte aligned pieces: called twice, first to count, then to hand out.
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
