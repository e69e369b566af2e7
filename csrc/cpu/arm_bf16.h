// ARM's bf16 instructions (FEAT_BF16). BFDOT adds the products of a pair of bf16 to each of 4 sums. BFMMLA adds the
// products of two rows of 4 bf16 and two columns of 4 bf16 to 2 x 2 sums: twice as many products as BFDOT. No other
// header uses these instructions. With TINYSTORY_ARM_BF16_TWIN, a scalar emulation replaces them, so that every path is
// tested on machines without them.
//
// Rounding, with the default of Linux and macOS (FPCR.EBF = 0): the products of a pair are summed, then added to the
// sum. Both results are rounded to odd, and subnormals are flushed to zero. BFMMLA is two such steps in sequence (Arm
// Architecture Reference Manual, DDI 0487, BFDOT and BFMMLA). So both instructions give bit-identical sums.
#pragma once
#if defined(TINYSTORY_ARM_BF16_TWIN) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define TINYSTORY_ARM_BF16
#if defined(TINYSTORY_ARM_BF16_TWIN)
#include "arm_bf16_twin.h"  // of tests/native
#endif
#include "vec.h"

namespace tinystory::cpu::arm {

typedef float Sums __attribute__((vector_size(16)));
typedef uint32_t Pairs __attribute__((vector_size(16)));  // pairs of bf16, the first element in the low half
typedef uint64_t Halves __attribute__((vector_size(16)));

#if defined(TINYSTORY_ARM_BF16_TWIN)
inline Sums bfdot(Sums c, Pairs a, Pairs b) {
  for (int i = 0; i < 4; ++i) c[i] = arm_bf16_twin::dot(c[i], a[i], b[i]);
  return c;
}
inline Sums bfmmla(Sums c, Pairs a, Pairs b) {
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 2; ++k) c[i] = arm_bf16_twin::dot(c[i], a[i / 2 * 2 + k], b[i % 2 * 2 + k]);
  return c;
}
#else
inline Sums bfdot(Sums c, Pairs a, Pairs b) {
  return (Sums)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
inline Sums bfmmla(Sums c, Pairs a, Pairs b) {
  return (Sums)vbfmmlaq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
#endif

constexpr int64_t kPacks = 4;  // number of pairs of a row that are read at once
// number of columns of the right operand that are interleaved and stay in the L1 cache
constexpr int64_t kColumns = 16;

// BFDOT on vectors of 4 sums, or of a multiple of 4.
template <class Vec>
Vec dot(Vec a, Vec b, Vec sum) {
  Sums s[sizeof(Vec) / 16];
  Pairs x[sizeof(Vec) / 16], y[sizeof(Vec) / 16];
  std::memcpy(s, &sum, sizeof s), std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y);
  for (size_t i = 0; i < sizeof(Vec) / 16; ++i) s[i] = bfdot(s[i], x[i], y[i]);
  std::memcpy(&sum, s, sizeof s);
  return sum;
}

// The lower halves of a and b side by side, or with kUpper the upper halves.
template <bool kUpper, class Vec>
Vec halves(Vec a, Vec b) {
  return (Vec)zip<kUpper>((Halves)a, (Halves)b);
}

// Rearranges each two rows of a panel into right operands of BFMMLA: to[column][2].
inline void interleave(uint32_t* to, const uint32_t* b, int64_t bk, int64_t n_k, int64_t columns) {
  for (int64_t k = 0; k < n_k; k += 2, b += 2 * bk)
    for (int64_t j = 0; j < columns; j += 4, to += 8) {
      const Pairs first = load<Pairs>(b + j), second = load<Pairs>(b + bk + j);
      store(to, zip<false>(first, second)), store(to + 4, zip<true>(first, second));
    }
}

// The micro-kernel: c (R rows, 4 C columns) = a b, or with `add` c += a b, for an interleaved b. Strides are in
// elements of 4 bytes. A tile has 4 x 16 sums, not 6 x 16 as in gemm.h, because GCC reads 8 columns ahead and would
// spill some of more sums in the loop. With an odd R, the last row is multiplied twice and stored once.
template <int R, int C>
void block(int64_t n_k, const uint32_t* a, int64_t am, const uint32_t* b, float* c, int64_t cm, bool add) {
  constexpr int kHeight = (R + 1) / 2;
  Sums acc[kHeight][2 * C];
  for (auto& row : acc)
    for (Sums& sums : row) sums = Sums{};
  for (int64_t k = 0; k < n_k; k += kPacks) {
    Pairs rows[2][kHeight];
    for (int r = 0; r < kHeight; ++r) {
      const uint32_t* at = a + 2 * r * am + k;
      const Pairs above = load<Pairs>(at), below = load<Pairs>(at + (2 * r + 1 < R ? am : 0));
      rows[0][r] = halves<false>(above, below), rows[1][r] = halves<true>(above, below);
    }
    for (int half = 0; half < 2; ++half)
      for (int j = 0; j < 2 * C; ++j, b += 4) {
        const Pairs columns = load<Pairs>(b);
        for (int r = 0; r < kHeight; ++r) acc[r][j] = bfmmla(acc[r][j], rows[half][r], columns);
      }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) {  // c is added last, as in the micro-kernel of gemm.h
      const Sums left = acc[r / 2][2 * j], right = acc[r / 2][2 * j + 1];
      const Sums sums = r % 2 ? halves<true>(left, right) : halves<false>(left, right);
      float* to = c + r * cm + 4 * j;
      store(to, add ? load<Sums>(to) + sums : sums);
    }
}

// The same for any number of rows. Calls done(row, R) after each R rows.
template <int C, class Done>
void column(int64_t rows, int64_t n_k, const uint32_t* a, int64_t am, const uint32_t* b, float* c, int64_t cm, bool add,
            const Done& done) {
  int64_t row = 0;
  const auto take = [&]<int R>(std::integral_constant<int, R>) {
    block<R, C>(n_k, a + row * am, am, b, c + row * cm, cm, add);
    done(row, R);
    row += R;
  };
  while (rows - row >= 4) take(std::integral_constant<int, 4>());
  if (rows - row >= 2) take(std::integral_constant<int, 2>());
  if (rows > row) take(std::integral_constant<int, 1>());
}

// The same for columns in multiples of 4. n_k is a multiple of kPacks and at most kDepth.
template <int64_t kDepth, class Done>
void panel(int64_t rows, int64_t columns, int64_t n_k, const uint32_t* a, int64_t am, const uint32_t* b, int64_t bk,
           float* c, int64_t cm, bool add, const Done& done) {
  alignas(64) uint32_t right[kDepth * kColumns];
  for (int64_t j = 0, width; j < columns; j += width) {
    width = columns - j < kColumns ? 4 : kColumns;
    interleave(right, b + j, bk, n_k, width);
    const auto finish = [&, last = j + width == columns](int64_t row, int64_t n) {
      if (last) done(row, n);
    };
    if (width == 4) column<1>(rows, n_k, a, am, right, c + j, cm, add, finish);
    else column<kColumns / 4>(rows, n_k, a, am, right, c + j, cm, add, finish);
  }
}

}  // namespace tinystory::cpu::arm
#endif
