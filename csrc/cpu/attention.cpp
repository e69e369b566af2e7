// Causal attention, forward and backward, one (batch, head) at a time.
//
// Queries are processed in strips of 48 or 64 rows. The scores of a strip against all earlier keys fit in the L2 cache,
// so each strip computes the whole softmax at once. The passes and the names m, l, S, P, dP and dS are those of
// FlashAttention-2 (Dao 2023, arXiv 2307.08691), without the rescaling that the small shared memory of a GPU requires.
// No (T, T) matrix is stored. The backward pass recomputes P from the log-sum-exp, and computes delta, the sum of P *
// dP of each row, from the strip, so the backward pass does not need the output. All seven matmuls use gemm.h.
#include <algorithm>

#include "../philox.h"
#include "gemm.h"

namespace tinystory::cpu {
namespace {

constexpr double kLog2e = 1.4426950408889634;

// Sets `keep` to 1 for each element of the tile that dropout keeps, and to 0 for the others.
void dropout_tile(float (&keep)[32][32], const Attention& x, int64_t head, int64_t i, int64_t j) {
  const uint32_t threshold = dropout_threshold(x.dropout);
  const DropoutKeys keys = dropout_keys(x.seed);
  uint32_t word[4][8][8];
  for (uint32_t r = 0; r < 8; ++r)
    for (uint32_t c = 0; c < 8; ++c) {
      const Words4 w = dropout_words(keys, uint32_t(head), uint32_t(i) + r, uint32_t(j) + c);
      word[0][r][c] = w.x, word[1][r][c] = w.y, word[2][r][c] = w.z, word[3][r][c] = w.w;
    }
  for (int r = 0; r < 32; ++r)
    for (int block = 0; block < 4; ++block)
      for (int c = 0; c < 8; ++c) keep[r][8 * block + c] = (word[r / 8][r % 8][c] >> (8 * block) & 0xff) >= threshold;
}

template <class Policy>
struct Head {
  using Acc = typename Policy::Acc;
  using Pack = typename Policy::Pack;
  using Vec = VecOf<Acc>;
  static constexpr int L = lanes<Vec>;
  static constexpr int64_t kWidth = kPanel<Policy>;
  // Query rows per strip: a multiple of 6, the rows of the micro-kernel, or for bf16 of 16 pairs, the rows of an AMX
  // tile.
  static constexpr int64_t kStrip = Policy::kPack == 2 ? 64 : 48;
  static constexpr int64_t kKeys = Policy::kPack * kPadding<Policy>;  // keys of a strip are zero-padded to a multiple

  // A (T, D) matrix in the layouts of the GEMMs' operands.
  struct Matrix {
    Pack* rows;    // left operand, by rows
    Pack* panels;  // right operand for a reduction over D, or null
    Pack* pairs;   // right operand for a reduction over rows, or null; with one element per Pack equal to `rows`
  };
  // The rows of a strip, (kStrip, padded): S, overwritten by P; or dP, overwritten by dS.
  struct Scores {
    Acc* rows;    // sums, then left operand for a reduction over keys
    Pack* pairs;  // left operand for a reduction over queries; with one element per Pack equal to `rows`
  };

  const Attention& x;
  // padded: T rounded up to whole panels; also the row stride of a strip
  const int64_t T, D, padded, packs, row_stride;
  const Acc scale, drop_scale;
  const bool tiles = on_tiles<Policy>();
  Matrix Q, K, V, dO;
  Scores S, dS;
  Acc* factors;   // (kStrip, padded), with dropout: the factor of each weight, 0 or drop_scale
  Pack* columns;  // P or dS by columns, for AMX tiles
  Acc* mixed;     // (kStrip, D): l times O, or dQ
  Acc *dK, *dV;   // (padded, D)

  Head(const Attention& x, bool backward)
      : x(x), T(x.T), D(x.D), padded(round_up(x.T, kColumns)), packs(x.D / Policy::kPack), row_stride(3 * x.H * x.D),
        scale(Acc(1 / std::sqrt(double(x.D)))), drop_scale(Acc(dropout_scale(dropout_threshold(x.dropout)))) {
    Arena arena;
    allocate(arena, backward);
    arena = {scratch(arena.used), 0};
    allocate(arena, backward);
  }

  void allocate(Arena& m, bool backward) {
    Q = matrix(m, false, backward);
    K = matrix(m, true, backward);
    V = matrix(m, backward, !backward);
    S = score_rows(m, backward);
    mixed = m.take<Acc>(kStrip * D);
    factors = m.take<Acc>(x.dropout > 0 ? kStrip * padded : 0);
    if (!backward) return;
    dO = matrix(m, false, true);
    dS = score_rows(m, true);
    columns = m.take<Pack>(Policy::kPack == 2 ? kStrip / 2 * padded : 0);
    dK = m.take<Acc>(padded * D);
    dV = m.take<Acc>(padded * D);
  }
  Matrix matrix(Arena& m, bool panels, bool pairs) const {
    Matrix to{};
    to.rows = m.take<Pack>(padded * packs);
    if (panels) to.panels = m.take<Pack>(padded * packs);
    if (pairs) to.pairs = Policy::kPack == 2 ? m.take<Pack>(padded * packs) : to.rows;
    return to;
  }
  Scores score_rows(Arena& m, bool pairs) const {
    Scores to{};
    to.rows = m.take<Acc>(kStrip * padded);
    if (pairs) to.pairs = Policy::kPack == 2 ? m.take<Pack>(kStrip / 2 * padded) : reinterpret_cast<Pack*>(to.rows);
    return to;
  }

  // Packs a matrix. stride: distance between rows in `from`, in elements.
  void load_matrix(const Matrix& to, const void* from, int64_t stride) const {
    pack_rows<Policy>(to.rows, from, x.dtype, stride, T, padded, D, D);
    if (to.panels) transpose_rows<Policy>(to.panels, to.rows, padded, D);
    if (to.pairs && to.pairs != to.rows) pair_rows<Policy>(to.pairs, to.rows, padded, D, D, padded / Policy::kPack);
  }
  void load_input(int64_t b, int64_t h) const {
    load_matrix(Q, input(0, b, h), row_stride);
    load_matrix(K, input(1, b, h), row_stride);
    load_matrix(V, input(2, b, h), row_stride);
  }

  const void* input(int which, int64_t b, int64_t h) const {
    return at(x.qkv, x.dtype, b * T * row_stride + which * x.H * D + h * D);
  }
  Acc& lse(int64_t head, int64_t i) const { return static_cast<Acc*>(x.lse)[head * T + i]; }

  // to[rows of the strip][keys up to the diagonal] = left right^T: S = Q K^T, or dP = dO V^T.
  void scores(const Scores& to, const Matrix& left, const Matrix& right, int64_t i0, int64_t rows) const {
    constexpr int64_t kDiagonal = std::min<int64_t>(kWidth, 16);  // columns per GEMM on the diagonal
    for (int64_t j = 0, width; j < i0 + rows; j += width) {
      width = j + kWidth <= i0 ? kWidth : kDiagonal;
      const int64_t r = std::max<int64_t>(0, j - i0) / 6 * 6;
      gemm<Policy>(rows - r, width, packs, {left.rows + (i0 + r) * packs, packs, 1},
                   {right.panels + j / kWidth * kWidth * packs + j % kWidth, kWidth, kWidth * packs},
                   to.rows + r * padded + j, padded);
    }
  }

  // mixed[rows of the strip][D] = left[strip][keys] * right, with kPack keys per Pack: l times O = P V, or dQ = dS K.
  void mix(const Scores& left, const Matrix& right, int64_t i0, int64_t rows) const {
    const Pack* weights = reinterpret_cast<const Pack*>(left.rows);
    const int64_t stride = padded * sizeof(Acc) / sizeof(Pack), together = tiles ? 32 : 6;
    for (int64_t r = 0; r < rows; r += together) {
      const int64_t m = std::min(together, rows - r), keys = round_up(i0 + r + m, tiles ? kKeys : Policy::kPack);
      gemm<Policy>(m, D, keys / Policy::kPack, {weights + r * stride, stride, 1}, {right.pairs, D, kWidth},
                   mixed + r * D, D);
    }
  }

  // to[keys up to the diagonal][D] += left^T * right, reduced over the rows of the strip: dV = P^T dO, or dK = dS^T Q.
  // On the diagonal, the first row with a nonzero element differs between keys, so each GEMM takes only few keys there.
  void scatter(Acc* to, const Scores& scores, const Matrix& matrix, int64_t i0, int64_t rows) const {
    Pack* left = scores.pairs;
    const Pack* right = matrix.pairs + i0 / Policy::kPack * D;
    if (tiles) {
      constexpr int64_t n = kStrip / Policy::kPack;
      const int64_t last = round_up(rows, Policy::kPack) / Policy::kPack, end = round_up(i0 + rows, kKeys);
      for (int64_t k = last; k < n; ++k) std::memset(left + k * padded, 0, end * sizeof(Pack));
      transpose_packs(columns, n, left, padded, n, end);
      for (int64_t j = 0, m; j < i0 + rows; j += m) {
        m = j < i0 ? i0 : std::min(kKeys, i0 + rows - j);
        const int64_t first = std::max<int64_t>(0, j - i0) / kKeys * kPadding<Policy>;
        gemm<Policy>(m, D, n - first, {columns + j * n + first, n, 1}, {right + first * D, D, kWidth}, to + j * D, D,
                     true);
      }
      return;
    }
    const int64_t last = round_up(rows, Policy::kPack) / Policy::kPack;
    for (int64_t j = 0, m; j < i0 + rows; j += m) {
      m = j < i0 ? i0 : std::min<int64_t>(6, i0 + rows - j);
      const int64_t first = std::max<int64_t>(0, j - i0) / Policy::kPack;
      gemm<Policy>(m, D, last - first, {left + first * padded + j, 1, padded}, {right + first * D, D, kWidth},
                   to + j * D, D, true);
    }
  }

  // Fills a row from element n to the end of its vector.
  static void fill_tail(Acc* row, int64_t n, Acc fill) {
    for (; n % L; ++n) row[n] = fill;
  }

  void forward(int64_t head) {
    const int64_t b = head / x.H, h = head % x.H;
    load_input(b, h);
    for (int64_t i0 = 0; i0 < T; i0 += kStrip) {
      const int64_t rows = std::min(kStrip, T - i0);
      Acc l[kStrip];
      scores(S, Q, K, i0, rows);
      if (x.dropout > 0) draw_factors(head, i0, rows);
      softmax(l, head, i0, rows);
      mix(S, V, i0, rows);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < D; d += L)
          store_as(at(x.out, x.dtype, ((b * T + i0 + r) * x.H + h) * D + d), x.dtype,
                   load<Vec>(mixed + r * D + d) / l[r]);
    }
  }

  // Draws the factors of a strip. Beyond the 32 x 32 tiles of the diagonal they are 0.
  void draw_factors(int64_t head, int64_t i0, int64_t rows) const {
    float keep[32][32];
    const int64_t end = round_up(i0 + rows, kKeys);
    for (int64_t i = i0 / 32 * 32; i < i0 + rows; i += 32)
      for (int64_t j = 0; j < end; j += 32) {
        if (j <= i + 31) dropout_tile(keep, x, head, i, j);
        else std::memset(keep, 0, sizeof keep);
        for (int64_t r = std::max(i, i0); r < std::min(i + 32, i0 + rows); ++r)
          for (int64_t c = j; c < std::min(j + 32, end); ++c)
            factors[(r - i0) * padded + c] = drop_scale * Acc(keep[r - i][c - j]);
      }
  }

  // Overwrites S by P = exp(S - m) after dropout, and sets l to the sum of each row before dropout.
  void softmax(Acc (&l)[kStrip], int64_t head, int64_t i0, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      Acc* row = S.rows + r * padded;
      const int64_t n = i0 + r + 1;
      fill_tail(row, n, Acc(-INFINITY));
      Vec top = splat<Vec>(Acc(-INFINITY));
      for (int64_t j = 0; j < n; j += L) top = max(load<Vec>(row + j), top);
      const Acc m = highest(top) * scale;
      Vec sums{};
      for (int64_t j = 0; j < n; j += L) {
        Vec p = exp2(fma(load<Vec>(row + j), splat<Vec>(scale), splat<Vec>(-m)) * Acc(kLog2e));
        sums += p;
        if (x.dropout > 0) p *= load<Vec>(factors + r * padded + j);
        store_elements<Policy>(row, j, p);
      }
      l[r] = sum(sums);
      lse(head, i0 + r) = m + Acc(std::log(l[r]));
      // zeros beyond the diagonal, up to the padded end of the longest row of the strip
      for (int64_t j = round_up(n, L); j < round_up(i0 + rows, kKeys); j += L) store_elements<Policy>(row, j, Vec{});
    }
  }

  void backward(int64_t head) {
    const int64_t b = head / x.H, h = head % x.H;
    load_input(b, h);
    load_matrix(dO, at(x.grad_out, x.dtype, (b * T * x.H + h) * D), x.H * D);
    std::memset(dK, 0, padded * D * sizeof *dK);
    std::memset(dV, 0, padded * D * sizeof *dV);

    for (int64_t i0 = 0; i0 < T; i0 += kStrip) {
      const int64_t rows = std::min(kStrip, T - i0);
      Acc norm[kStrip], delta[kStrip];
      scores(S, Q, K, i0, rows);
      scores(dS, dO, V, i0, rows);
      if (x.dropout > 0) draw_factors(head, i0, rows);
      recompute_weights(norm, delta, head, i0, rows);
      score_grads(norm, delta, i0, rows);
      mix(dS, K, i0, rows);
      scatter(dV, S, dO, i0, rows);
      scatter(dK, dS, Q, i0, rows);
      unpack(0, b, h, i0, rows, mixed);
    }
    unpack(1, b, h, 0, T, dK);
    unpack(2, b, h, 0, T, dV);
  }

  void unpack(int which, int64_t b, int64_t h, int64_t i0, int64_t rows, const Acc* from) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < D; d += L)
        store_as(at(x.grad_qkv, x.dtype, (b * T + i0 + r) * row_stride + which * x.H * D + h * D + d), x.dtype,
                 load<Vec>(from + r * D + d));
  }

  // Overwrites S by P before dropout, and dP by dP after dropout. The rows of P sum to 1 except for the rounding of lse,
  // which the factor `norm` corrects. delta: the sum of P * dP of each row. P and dP are set to zero beyond the diagonal.
  void recompute_weights(Acc (&norm)[kStrip], Acc (&delta)[kStrip], int64_t head, int64_t i0, int64_t rows) const {
    const int64_t end = round_up(i0 + rows, kKeys);
    for (int64_t r = 0; r < rows; ++r) {
      Acc *s = S.rows + r * padded, *d = dS.rows + r * padded;
      const int64_t n = i0 + r + 1;
      fill_tail(s, n, Acc(-INFINITY));
      fill_tail(d, n, Acc(0));
      Vec sums{}, deltas{};
      for (int64_t j = 0; j < n; j += L) {
        // fma rounds the difference once, so that the change of base loses no accuracy if p is large.
        const Vec log_p = fma(load<Vec>(s + j), splat<Vec>(scale), splat<Vec>(-lse(head, i0 + r)));
        const Vec p = exp2(log_p * Acc(kLog2e));
        Vec dP = load<Vec>(d + j);
        if (x.dropout > 0) dP *= load<Vec>(factors + r * padded + j);
        sums += p;
        deltas = fma(p, dP, deltas);
        store(s + j, p);
        store(d + j, dP);
      }
      fill_tail(s, n, Acc(0));  // in a row of NaN they are NaN
      for (int64_t j = round_up(n, L); j < end; j += L) store(s + j, Vec{}), store(d + j, Vec{});
      norm[r] = 1 / sum(sums);
      delta[r] = sum(deltas) * norm[r];
    }
  }

  // Overwrites dP by dS = P * (dP - delta) * scale, and P by P after dropout. Processes two rows at a time, so that
  // pairs of bf16 can be written; if the last row has no partner, zeros replace the partner.
  void score_grads(const Acc (&norm)[kStrip], const Acc (&delta)[kStrip], int64_t i0, int64_t rows) const {
    const int64_t end = round_up(i0 + rows, kKeys);
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t j = 0; j < end; j += L) {
        Vec p[2]{}, d[2]{};
        for (int64_t e = 0; e < 2 && r + e < rows; ++e) {
          const int64_t at = (r + e) * padded + j;
          p[e] = load<Vec>(S.rows + at) * norm[r + e];
          d[e] = p[e] * (load<Vec>(dS.rows + at) - delta[r + e]) * scale;
          if (x.dropout > 0) p[e] *= load<Vec>(factors + at);
        }
        put(r, j, rows, p, d);
      }
  }

  void put(int64_t r, int64_t j, int64_t rows, Vec (&p)[2], Vec (&d)[2]) const {
#if defined(TINYSTORY_BF16)
    if constexpr (Policy::kPack == 2) {
      const vh p0 = to_bf16(p[0]), p1 = to_bf16(p[1]), d0 = to_bf16(d[0]), d1 = to_bf16(d[1]);
      store(S.pairs + r / 2 * padded + j, pair(p0, p1));
      store(dS.pairs + r / 2 * padded + j, pair(d0, d1));
      store(reinterpret_cast<uint16_t*>(dS.rows + r * padded) + j, d0);
      if (r + 1 < rows) store(reinterpret_cast<uint16_t*>(dS.rows + (r + 1) * padded) + j, d1);
      return;
    }
#endif
    for (int64_t e = 0; e < 2 && r + e < rows; ++e) {
      store(S.rows + (r + e) * padded + j, p[e]);
      store(dS.rows + (r + e) * padded + j, d[e]);
    }
  }
};

template <class Policy>
void run(const Attention& x, bool backward, int64_t begin, int64_t end) {
  Head<Policy> head(x, backward);
  for (int64_t i = begin; i < end; ++i) backward ? head.backward(i) : head.forward(i);
}

void dispatch(const Attention& x, bool backward, int64_t begin, int64_t end) {
  if (x.dtype == DType::f64) return run<F64>(x, backward, begin, end);
#if defined(TINYSTORY_BF16)
  if (x.dtype == DType::bf16 && x.D % 32 == 0) return run<BF16Tiles>(x, backward, begin, end);
#endif
  run<F32>(x, backward, begin, end);
}

}  // namespace

void attention_forward(const Attention& x, int64_t begin, int64_t end) { dispatch(x, false, begin, end); }
void attention_backward(const Attention& x, int64_t begin, int64_t end) { dispatch(x, true, begin, end); }

}  // namespace tinystory::cpu
