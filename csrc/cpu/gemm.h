// GEMM on the CPU. The driver `gemm` blocks for the caches. The micro-kernel keeps a small tile of the result in
// registers. The driver `gemm_tile` passes each finished vector of sums to an epilogue of the caller. The last part has
// the packed layouts of the operands. A Policy chooses the instructions. The order of the terms in a sum does not
// depend on the other rows and columns or on threads.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "amx.h"
#include "arm_bf16.h"
#include "vec.h"

namespace tinystory::cpu {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

constexpr int64_t kColumns = 64;                   // columns per item of work; callers pad columns to a multiple
constexpr int64_t kMicroRows = 6;                  // rows of the micro-kernel's tile
constexpr int64_t kTileRows = W == 16 ? 48 : 132;  // rows multiplied with a panel while panel and sums stay in L1
#if defined(TINYSTORY_AVX512) || defined(__aarch64__)
constexpr int kMicroVectors = 4;  // vectors per row of the tile: 6 * 4 sums and 4 columns fit 32 registers
#else
constexpr int kMicroVectors = 2;
#endif

// A Policy defines how to multiply and add. A Pack is the unit along the reduced dimension: one element, or two bf16
// for the processor's dot-product instruction. kPack: number of elements in a Pack. kReduce: number of Packs that are
// reduced at a time; a panel of this depth takes up to half of the L1 cache. kSum: number of Packs per partial sum. A
// sum of short sums has a smaller rounding error than one long sum; for bf16 this matters less, because the operands
// are rounded more.
constexpr int64_t kSumWide = W == 16 ? 128 : 192, kReduceWide = W == 16 ? 128 : 384;  // for elements of 4 and 8 bytes
struct F32 {
  using Acc = float;
  using Pack = float;
  static constexpr int kPack = 1;
  static constexpr int64_t kSum = kSumWide, kReduce = kReduceWide;
  static vf broadcast(const char* p) { return splat<vf>(load<float>(p)); }
  static vf dot(vf a, vf b, vf sum) { return fma(a, b, sum); }
};
struct F64 {
  using Acc = double;
  using Pack = double;
  static constexpr int kPack = 1;
  static constexpr int64_t kSum = kSumWide, kReduce = kReduceWide;
  static vd broadcast(const char* p) { return splat<vd>(load<double>(p)); }
  static vd dot(vd a, vd b, vd sum) { return fma(a, b, sum); }
};
#if defined(__AVX512BF16__) || defined(TINYSTORY_AMX) || defined(TINYSTORY_ARM_BF16)
#define TINYSTORY_BF16
struct BF16 {
  using Acc = float;
  using Pack = uint32_t;
  static constexpr int kPack = 2;
  static constexpr int64_t kSum = 384, kReduce = 384;
  static vf broadcast(const char* p) { return (vf)(vu{} + load<uint32_t>(p)); }
#if defined(TINYSTORY_ARM_BF16)
  static vf dot(vf a, vf b, vf sum) { return arm::dot(a, b, sum); }
#elif defined(__AVX512BF16__)
  static vf dot(vf a, vf b, vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#else  // AMX without AVX-512, which occurs only in tests
  static vf dot(vf a, vf b, vf sum) {
    sum = fma((vf)((vu)a & 0xffff0000), (vf)((vu)b & 0xffff0000), sum);
    return fma((vf)((vu)a << 16), (vf)((vu)b << 16), sum);
  }
#endif
};
// The same with instructions that multiply small matrices (AMX tiles or ARM's BFMMLA) if the machine has them, for a
// left operand with k_stride 1 or in LeftLayout. The choice depends only on machine and n_k, never on the number of
// rows, because the choice changes the results.
struct BF16Tiles : BF16 {
#if defined(TINYSTORY_AMX)
  static constexpr int64_t kReduce = 128;  // 32 columns of this depth take a third of the L1 cache; tiles continue sums
#endif
};
#endif

// Whether a GEMM of this policy uses AMX tiles if the machine has them.
#if defined(TINYSTORY_AMX)
template <class Policy>
constexpr bool kForAmx = std::is_same_v<Policy, BF16Tiles>;
#else
template <class Policy>
constexpr bool kForAmx = false;
#endif

// The rows of a right operand, and so k, are zero-padded to a multiple of this number of Packs.
template <class Policy>
constexpr int64_t kPadding = Policy::kPack == 2 ? 16 : 1;

// Columns per panel of a packed right operand: as many as the micro-kernel reads at once, so that it reads memory in
// order.
template <class Policy>
constexpr int64_t kPanel = kForAmx<Policy>      ? 32
                           : Policy::kPack == 2 ? kColumns
                                                : kMicroVectors * lanes<VecOf<typename Policy::Acc>>;

// Operands, in Packs. Element (row, k) of the left operand is at[row * row_stride + k * k_stride]. The right operand
// consists of panels of kPanel columns; element (k, column) of a panel is at[k * k_stride + column]. For AMX, the left
// operand may be stored in tiles (LeftLayout). Then k_stride is 16, and the formula holds for the first element of a
// tile.
template <class Policy>
struct Left {
  const typename Policy::Pack* at;
  int64_t row_stride, k_stride;
  Left part(int64_t row, int64_t k) const { return {at + row * row_stride + k * k_stride, row_stride, k_stride}; }
};
template <class Policy>
struct Right {
  const typename Policy::Pack* at;
  int64_t k_stride, panel_stride;
};

// The micro-kernel: c[m][n] (+)= sum over k of a[m][k] * b[k][n] for an R x (C * lanes) tile in registers. No argument
// is a struct: a struct would be passed on the stack, and loading it would wait for the stores before the call.
template <class Policy, int R, int C>
void micro_kernel(int64_t n_k, const typename Policy::Pack* a, int64_t am, int64_t ak, const typename Policy::Pack* b,
                  int64_t bk, typename Policy::Acc* c, int64_t cm, bool add) {
  using Vec = VecOf<typename Policy::Acc>;
  constexpr int L = lanes<Vec>;
  for (int r = 0; r < R; ++r)  // c arrives while the sums are computed
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
    for (int j = 0; j < C; ++j) {  // c is added last: a sum of short sums has a smaller rounding error than a long sum
      typename Policy::Acc* to = c + r * cm + j * L;
      store(to, add ? load<Vec>(to) + acc[r][j] : acc[r][j]);
    }
}

// The same for any number of rows. Calls done(row, R) after each R rows.
template <class Policy, int C, class Done>
void micro_column(int64_t rows, int64_t n_k, Left<Policy> a, const typename Policy::Pack* b, int64_t bk,
                  typename Policy::Acc* c, int64_t cm, bool add, const Done& done) {
  using Vec = VecOf<typename Policy::Acc>;
  constexpr int64_t L = lanes<Vec>, kWidth = C * L;
  int64_t row = 0;
  const auto take = [&]<int R>(std::integral_constant<int, R>) {
    typename Policy::Acc sums[R * kWidth], *to = c + row * cm;
    const bool apart = add && n_k > Policy::kSum;
    for (int64_t k = 0; k < n_k; k += Policy::kSum)
      micro_kernel<Policy, R, C>(std::min(Policy::kSum, n_k - k), a.part(row, k).at, a.row_stride, a.k_stride,
                                 b + k * bk, bk, apart ? sums : to, apart ? kWidth : cm, k > 0 || (add && !apart));
    if (apart)
      for (int r = 0; r < R; ++r)
        for (int64_t j = 0; j < kWidth; j += L)
          store(to + r * cm + j, load<Vec>(to + r * cm + j) + load<Vec>(sums + r * kWidth + j));
    done(row, R);
    row += R;
  };
  while (rows - row >= kMicroRows) take(std::integral_constant<int, kMicroRows>());
  if (rows - row >= 4) take(std::integral_constant<int, 4>());
  if (rows - row >= 2) take(std::integral_constant<int, 2>());
  if (rows > row) take(std::integral_constant<int, 1>());
}

// Whether AMX tiles or BFMMLA run a GEMM of this policy, provided that n_k is a multiple of kPadding.
template <class Policy>
bool on_tiles() {
#if defined(TINYSTORY_AMX)
  return kForAmx<Policy> && amx::permitted();
#elif defined(TINYSTORY_ARM_BF16)
  return std::is_same_v<Policy, BF16Tiles>;
#else
  return false;
#endif
}

// Multiplies rows with one panel, over one part of the reduced dimension. Calls done(row, n) when n more rows are
// complete.
template <class Policy, class Done>
void gemm_panel(int64_t rows, int64_t vectors, int64_t n_k, Left<Policy> a, const typename Policy::Pack* b, int64_t bk,
                typename Policy::Acc* c, int64_t cm, bool add, const Done& done) {
  constexpr int64_t L = lanes<VecOf<typename Policy::Acc>>;
#if defined(TINYSTORY_AMX)
  if constexpr (kForAmx<Policy>)
    if (on_tiles<Policy>() && n_k % amx::kPacks == 0 && vectors * L % amx::kPacks == 0)
      return amx::panel(rows, vectors * L, n_k, a.at, a.row_stride, a.k_stride, b, bk, c, cm, add, done);
#elif defined(TINYSTORY_ARM_BF16)
  if constexpr (std::is_same_v<Policy, BF16Tiles>)
    if (n_k % arm::kPacks == 0)
      return arm::panel<Policy::kReduce>(rows, vectors * L, n_k, a.at, a.row_stride, b, bk, c, cm, add, done);
#endif
  for (; vectors > kMicroVectors; vectors -= kMicroVectors, b += kMicroVectors * L, c += kMicroVectors * L)
    micro_column<Policy, kMicroVectors>(rows, n_k, a, b, bk, c, cm, add, [](int64_t, int64_t) {});
  const auto run = [&]<int C>(std::integral_constant<int, C>) {
    micro_column<Policy, C>(rows, n_k, a, b, bk, c, cm, add, done);
  };
  if (vectors == kMicroVectors) return run(std::integral_constant<int, kMicroVectors>());
  if constexpr (kMicroVectors == 4) {
    if (vectors == 3) return run(std::integral_constant<int, 3>());
    if (vectors == 2) return run(std::integral_constant<int, 2>());
  }
  if (vectors == 1) run(std::integral_constant<int, 1>());
}

// Number of rows of a left operand per block; a block is multiplied with one panel after another. With AMX, the panels
// are not in the L2 cache, so a block fills half of the L2 cache, rounded to whole pairs of tiles.
template <class Policy>
constexpr int64_t kMostRows = kForAmx<Policy> ? 256 : kTileRows;
template <class Policy>
int64_t block_rows(int64_t rows, int64_t n_k) {
  if (!kForAmx<Policy> || !on_tiles<Policy>()) return kTileRows;
  const int64_t most = std::clamp<int64_t>((1 << 18) / n_k / 32 * 32, 32, kMostRows<Policy>);
  const int64_t pairs = (rows + 31) / 32, blocks = std::max<int64_t>(1, (rows + most - 1) / most);
  return (pairs + blocks - 1) / blocks * 32;
}

// Prefetches into L2 the memory that is read after a panel: an equal share with each row of the panel.
template <class Pack>
struct Prefetch {
  const Pack* at;
  int64_t packs, share;
  Prefetch(const Pack* at, int64_t packs, int64_t rows) : at(at), packs(packs), share((packs + rows - 1) / rows) {}
  void rows(int64_t row, int64_t n) const {
    constexpr int64_t kLine = 64 / sizeof(Pack);
    for (int64_t i = row * share / kLine * kLine; i < std::min(packs, (row + n) * share); i += kLine)
      __builtin_prefetch(at + i, 0, 2);
  }
};

// The driver for sums that are not stored. Calls finish(row, column, sum) for each vector of rows [first, last) and
// columns [column, end) of a b as soon as the sum is complete, so that computing the next sums hides the latency of
// `finish`. column: the first column of a panel. later, packs: memory that the caller reads next, which is prefetched.
template <class Policy, class Finish>
void gemm_tile(int64_t first, int64_t last, int64_t column, int64_t end, int64_t n_k, Left<Policy> a, Right<Policy> b,
               const Finish& finish, const typename Policy::Pack* later = nullptr, int64_t packs = 0) {
  using Vec = VecOf<typename Policy::Acc>;
  constexpr int64_t L = lanes<Vec>, kWidth = kPanel<Policy>;
  const int64_t together = block_rows<Policy>(last - first, n_k);
  alignas(64) typename Policy::Acc sums[kMostRows<Policy> * kWidth];
  const int64_t parts = (end - column + kWidth - 1) / kWidth * ((n_k + Policy::kReduce - 1) / Policy::kReduce);
  for (; first < last; first += together)
    for (int64_t j = column; j < end; j += kWidth)
      for (int64_t k = 0; k < n_k; k += Policy::kReduce) {
        const int64_t rows = std::min(together, last - first), width = std::min(kWidth, end - j);
        const int64_t depth = std::min(Policy::kReduce, n_k - k);
        const auto* part = b.at + j / kWidth * b.panel_stride + k * b.k_stride;
        // the next part of this panel, or the next panel
        const Prefetch next(part + depth * b.k_stride, depth * b.k_stride, rows);
        const Prefetch after(later, packs / parts, rows);
        later += packs / parts;
        gemm_panel<Policy>(rows, width / L, depth, a.part(first, k), part, b.k_stride, sums, kWidth, k > 0,
                           [&](int64_t row, int64_t n) {
                             if constexpr (!kForAmx<Policy>) next.rows(row, n), after.rows(row, n);
                             if (k + Policy::kReduce < n_k) return;
                             for (int64_t r = row; r < row + n; ++r)
                               for (int64_t v = 0; v < width; v += L)
                                 finish(first + r, j + v, load<Vec>(sums + r * kWidth + v));
                           });
      }
}

// Copies `rows` rows of a left operand stored by columns into blocks [rows / kMicroRows][depth][kMicroRows], which the
// micro-kernel reads in order.
template <class Pack>
void copy_columns(Pack* to, const Pack* from, int64_t k_stride, int64_t rows, int64_t depth) {
  constexpr int64_t kAhead = 16, kLine = 64 / sizeof(Pack);  // prefetched, because each column may be in another page
  for (int64_t k = 0; k < depth; ++k, from += k_stride, to += kMicroRows) {
    for (int64_t row = 0; row < rows; row += kLine) __builtin_prefetch(from + kAhead * k_stride + row);
    int64_t row = 0;
    for (; row + kMicroRows <= rows; row += kMicroRows)
      std::memcpy(to + row * depth, from + row, kMicroRows * sizeof(Pack));
    std::memcpy(to + row * depth, from + row, (rows - row) * sizeof(Pack));
  }
}

// The driver: c (rows, columns) = a b, or with `add` c += a b, reduced over n_k Packs. The number of columns is a
// multiple of the vector length. A left operand that is stored by columns and covers more pages than the first-level
// TLB maps is copied, a part at a time.
template <class Policy>
void gemm(int64_t rows, int64_t columns, int64_t n_k, Left<Policy> a, Right<Policy> b, typename Policy::Acc* c,
          int64_t cm, bool add = false) {
  using Pack = typename Policy::Pack;
  constexpr int64_t L = lanes<VecOf<typename Policy::Acc>>, kWidth = kPanel<Policy>, kMapped = 64 * 4096;
  const int64_t together = block_rows<Policy>(rows, n_k);
  if (kForAmx<Policy> && on_tiles<Policy>() && n_k > Policy::kReduce) {  // keeps sums out of c until they are complete
    gemm_tile<Policy>(0, rows, 0, columns, n_k, a, b, [&](int64_t row, int64_t j, auto sum) {
      auto* to = c + row * cm + j;
      __builtin_prefetch(to + 32 * cm, 1, 2);
      store(to, add ? load<decltype(sum)>(to) + sum : sum);
    });
    return;
  }
  const int64_t span = std::min(Policy::kReduce, n_k) * a.k_stride * int64_t(sizeof(Pack));
  const bool copies = Policy::kPack == 1 && a.row_stride == 1 && span > kMapped;
  Pack* copy =
      copies ? reinterpret_cast<Pack*>(scratch<1>(Policy::kReduce * round_up(together, kMicroRows) * sizeof(Pack)))
             : nullptr;
  for (int64_t k = 0; k < n_k; k += Policy::kReduce, add = true)
    for (int64_t first = 0; first < rows; first += together) {
      const int64_t n = std::min(together, rows - first), depth = std::min(Policy::kReduce, n_k - k);
      const Left<Policy> part = a.part(first, k);
      if (copies) copy_columns(copy, part.at, a.k_stride, n, depth);
      for (int64_t j = 0; j < columns; j += kWidth)
        for (int64_t row = 0, m; row < n; row += m) {
          m = copies ? std::min(kMicroRows, n - row) : n;
          gemm_panel<Policy>(m, std::min(kWidth, columns - j) / L, depth,
                             copies ? Left<Policy>{copy + row * depth, 1, kMicroRows} : part,
                             b.at + j / kWidth * b.panel_stride + k * b.k_stride, b.k_stride,
                             c + (first + row) * cm + j, cm, add, [](int64_t, int64_t) {});
        }
    }
}

// Stores elements j, j + 1, ... of a row of Packs.
template <class Policy>
inline void store_elements(void* row, int64_t j, VecOf<typename Policy::Acc> v) {
  if constexpr (Policy::kPack == 2) store(static_cast<uint16_t*>(row) + j, to_bf16(v));
  else store(static_cast<typename Policy::Acc*>(row) + j, v);
}

// Packs of two bf16: a in the low halves, b in the high halves.
inline vu pair(vh a, vh b) { return __builtin_convertvector(a, vu) | __builtin_convertvector(b, vu) << 16; }

// --- layouts ---------------------------------------------------------------------------------------------------------
// Packs rows of D elements into rows of padded_D / kPack Packs. The padding and the rows up to padded_rows are zeros.
template <class Policy>
void pack_rows(typename Policy::Pack* to, const void* from, DType type, int64_t stride, int64_t rows,
               int64_t padded_rows, int64_t D, int64_t padded_D) {
  using Vec = VecOf<typename Policy::Acc>;
  constexpr int64_t L = lanes<Vec>;
  constexpr int64_t kAhead =
      12;  // rows to prefetch ahead; rows of a head are too far apart for the hardware prefetcher
  const int64_t packs = padded_D / Policy::kPack;
  for (int64_t i = 0; i < rows; ++i, to += packs) {
    const char* row = static_cast<const char*>(at(from, type, i * stride));
    const int64_t ahead = i + kAhead < rows ? kAhead * stride * size_of(type) : 0;
    for (int64_t d = 0; d < padded_D; d += L) {
      const void* p = at(row, type, d);
      __builtin_prefetch(static_cast<const char*>(p) + ahead);
      const Vec v = d + L <= D ? load_as<Vec>(p, type) : d < D ? load_tail<Vec>(p, type, D - d, 0) : Vec{};
      store_elements<Policy>(to, d, v);
    }
  }
  std::memset(to, 0, (padded_rows - rows) * packs * sizeof *to);
}

// Packs rows as the right operand of a GEMM that reduces over rows. A Pack holds the same column of kPack rows. Panels
// have `width` columns: [D / width][panel_rows][width]. The number of rows is a multiple of kPack.
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
      for (int64_t d = 0; d < D; d += lanes<VecOf<typename Policy::Acc>>)
        store(place(i, d), load<VecOf<typename Policy::Acc>>(rows + d));
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

// to[column * to_stride + row] = from[row * from_stride + column]. Rows and columns are multiples of the vector length.
template <class Pack>
void transpose_packs(Pack* to, int64_t to_stride, const Pack* from, int64_t from_stride, int64_t rows,
                     int64_t columns) {
  using Vec = std::conditional_t<sizeof(Pack) == 8, vd, vu>;
  constexpr int L = lanes<Vec>;
  for (int64_t i = 0; i < rows; i += L)
    for (int64_t j = 0; j < columns; j += L) {
      Vec block[L];
      for (int r = 0; r < L; ++r) block[r] = load<Vec>(from + (i + r) * from_stride + j);
      transpose(block);
      for (int r = 0; r < L; ++r) store(to + (j + r) * to_stride + i, block[r]);
    }
}

// Layout of a left operand with rows of `packs` Packs. For AMX, tiles [rows / 16][packs / 16][16][16], so that a tile
// is loaded from 16 consecutive cache lines; else one row after another.
template <class Policy>
struct LeftLayout {
  int64_t packs;
  int64_t apart = kForAmx<Policy> && on_tiles<Policy>() ? 16 : 1;  // k_stride, and number of rows of a tile
  int64_t stride() const { return apart == 1 ? packs : apart; }    // distance between two rows of a tile
  int64_t at(int64_t row, int64_t k) const {
    return row / apart * apart * packs + k / apart * apart * apart + row % apart * apart + k % apart;
  }
  Left<Policy> operator()(const typename Policy::Pack* p) const { return {p, packs, apart}; }
};

// Transposes rows into panels [padded / kPanel][D / kPack][kPanel]: the right operand of a GEMM that reduces over D.
template <class Policy>
void transpose_rows(typename Policy::Pack* to, const typename Policy::Pack* rows, int64_t padded, int64_t D) {
  constexpr int64_t kWidth = kPanel<Policy>;
  const int64_t packs = D / Policy::kPack;
  for (int64_t j = 0; j < padded; j += kWidth)
    transpose_packs(to + j * packs, kWidth, rows + j * packs, packs, std::min(kWidth, padded - j), packs);
}

// Allocator of 64-byte aligned pieces. Use it twice: first with base null, to count the bytes, then with memory of this
// size.
struct Arena {
  char* base = nullptr;
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

}  // namespace tinystory::cpu
