// ARM's bf16 instructions (FEAT_BF16). BFDOT adds to each of 4 sums the products of a pair of bf16; BFMMLA adds to 2 x 2
// sums those of two rows of 4 bf16 and two columns of 4: twice as many products as BFDOT. They are in this header and
// nowhere else. With TINYSTORY_ARM_BF16_TWIN a scalar twin of them takes their place, so that every path is tested on
// machines without them.
//
// Their rounding, where Linux and macOS leave it (FPCR.EBF = 0): the products of a pair are summed, then added to the
// sum, each rounded to odd, subnormals flushed to zero; BFMMLA is two such steps, one after the other (Arm Architecture
// Reference Manual, DDI 0487, BFDOT and BFMMLA). So both give the same sums, bit for bit.
#pragma once
#if defined(TINYSTORY_ARM_BF16_TWIN) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define TINYSTORY_ARM_BF16
#if defined(TINYSTORY_ARM_BF16_TWIN)
#include "arm_bf16_twin.h"  // of tests/native
#endif
#include "vec.h"

namespace tinystory::cpu::arm {

typedef float Sums __attribute__((vector_size(16)));
typedef uint32_t Pairs __attribute__((vector_size(16)));  // of bf16, the first in the low half
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

constexpr int64_t kPacks = 4;     // pairs of a row that are read at once
constexpr int64_t kColumns = 16;  // columns whose right operand is interleaved, and stays in the L1 cache

// BFDOT on vectors of any whole number of 4 sums.
template <class Vec>
Vec dot(Vec a, Vec b, Vec sum) {
  Sums s[sizeof(Vec) / 16];
  Pairs x[sizeof(Vec) / 16], y[sizeof(Vec) / 16];
  std::memcpy(s, &sum, sizeof s), std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y);
  for (size_t i = 0; i < sizeof(Vec) / 16; ++i) s[i] = bfdot(s[i], x[i], y[i]);
  std::memcpy(&sum, s, sizeof s);
  return sum;
}

// The lower halves of a and b, side by side, or the upper ones.
template <bool kUpper, class Vec>
Vec halves(Vec a, Vec b) {
  return (Vec)zip<kUpper>((Halves)a, (Halves)b);
}

// Right operands of BFMMLA from two rows of a panel: to[column][2].
inline void interleave(uint32_t* to, const uint32_t* b, int64_t bk, int64_t n_k, int64_t columns) {
  for (int64_t k = 0; k < n_k; k += 2, b += 2 * bk)
    for (int64_t j = 0; j < columns; j += 4, to += 8) {
      const Pairs first = load<Pairs>(b + j), second = load<Pairs>(b + bk + j);
      store(to, zip<false>(first, second)), store(to + 4, zip<true>(first, second));
    }
}

// The micro-kernel: c (R rows, 4 C columns) = a b, or with `add` c += a b, of an interleaved b. Strides in elements of 4
// bytes. 4 x 16 sums, not 6 x 16 as in gemm.h: GCC reads 8 columns ahead, and of more sums spills some in the loop. Of an
// odd R the last row is multiplied twice and stored once.
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
    for (int j = 0; j < C; ++j) {  // added last, as by gemm.h's micro-kernel
      const Sums left = acc[r / 2][2 * j], right = acc[r / 2][2 * j + 1];
      const Sums sums = r % 2 ? halves<true>(left, right) : halves<false>(left, right);
      float* to = c + r * cm + 4 * j;
      store(to, add ? load<Sums>(to) + sums : sums);
    }
}

// The same for any number of rows; calls done(row, R) after each R of them.
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

// The same for columns in multiples of 4; n_k is a multiple of kPacks, at most kDepth.
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
