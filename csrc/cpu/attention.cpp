// Causal attention, forward and backward, one (batch, head) at a time.
//
// Queries are taken in strips of 48 rows. A strip's scores against all the keys before it fit in the second-level cache
// (48 x T numbers), so each strip sees its whole softmax at once: the blocked passes of FlashAttention-2 (Dao 2023,
// arXiv 2307.08691), without the rescaling that a GPU's small shared memory forces. Nothing of size (T, T) is stored:
// the backward pass computes the weights again from the log-sum-exp, and each row's sum of weight times gradient from
// the strip itself, so it has no use for the output. All seven products run through one register tile.
#include <algorithm>

#include "../philox.h"
#include "gemm.h"

namespace tinystory::cpu {
namespace {

constexpr int64_t kStrip = 48;  // query rows at once: whole dropout tiles (16 rows) and register tiles (6 rows)
constexpr double kLog2e = 1.4426950408889634;

// 1 where dropout keeps a tile's weight, 0 where it does not.
void dropout_tile(float (&keep)[16][16], const Attention& x, int64_t head, int64_t i, int64_t j) {
  const uint32_t threshold = dropout_threshold(x.dropout);
  uint32_t word[4][32];
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const Words4 r = dropout_words(x.seed, uint32_t(head), uint32_t(i / 16), uint32_t(j / 16), lane);
    word[0][lane] = r.x, word[1][lane] = r.y, word[2][lane] = r.z, word[3][lane] = r.w;
  }
  for (int r = 0; r < 16; ++r)
    for (int half = 0; half < 2; ++half) {
      const uint32_t* w = &word[half * 2 + r / 8][r % 8 * 4];
      for (int t = 0; t < 4; ++t) {
        keep[r][half * 8 + 2 * t] = (w[t] & 0xffff) >= threshold;
        keep[r][half * 8 + 2 * t + 1] = (w[t] >> 16) >= threshold;
      }
    }
}

template <class K>
struct Head {
  using Acc = typename K::Acc;
  using Word = typename K::Word;
  using V = Vec<Acc>;
  static constexpr int L = lanes<V>;

  const Attention& x;
  const int64_t T, D, padded, words, row_stride;   // padded: T up to whole panels, and the leading dimension of a strip
  const Acc scale, drop_scale;
  Word *q, *k, *v, *o, *k_panels, *v_panels, *q_pairs, *k_pairs, *v_pairs, *o_pairs, *p_pairs, *s_pairs;
  Acc *s, *ds, *out, *dk, *dv;

  Head(const Attention& x, bool backward)
      : x(x), T(x.T), D(x.D), padded(round_up(x.T, kPanel)), words(x.D / K::kPair), row_stride(3 * x.H * x.D),
        scale(Acc(1 / std::sqrt(double(x.D)))), drop_scale(Acc(dropout_scale(dropout_threshold(x.dropout)))) {
    Arena arena;
    allocate(arena, backward);
    arena = {scratch(arena.used), 0};
    allocate(arena, backward);
  }

  void allocate(Arena& m, bool backward) {
    const int64_t rows = padded * words, pairs = K::kPair == 2 ? rows : 0;
    for (Word** p : {&q, &k, &v, &k_panels}) *p = m.take<Word>(rows);
    v_pairs = m.take<Word>(pairs);
    s = m.take<Acc>(kStrip * padded);
    out = m.take<Acc>(kStrip * D);
    if (!backward) return;
    for (Word** p : {&o, &v_panels}) *p = m.take<Word>(rows);
    for (Word** p : {&q_pairs, &k_pairs, &o_pairs}) *p = m.take<Word>(pairs);
    ds = m.take<Acc>(kStrip * padded);
    p_pairs = m.take<Word>(K::kPair == 2 ? kStrip / 2 * padded : 0);
    s_pairs = m.take<Word>(K::kPair == 2 ? kStrip / 2 * padded : 0);
    dk = m.take<Acc>(padded * D);
    dv = m.take<Acc>(padded * D);
  }

  // Rows side by side for a product that reduces over them; a single number a Word needs no rearranging.
  const Word* pairs(Word* to, const Word* rows) const {
    if (K::kPair == 1) return rows;
    pair_rows<K>(to, rows, padded, D, D, padded / K::kPair);
    return to;
  }

  const void* input(int which, int64_t b, int64_t h) const {
    return at(x.qkv, x.dtype, b * T * row_stride + which * x.H * D + h * D);
  }
  Acc& lse(int64_t head, int64_t i) const { return static_cast<Acc*>(x.lse)[head * T + i]; }

  // to[rows of the strip][keys up to the diagonal] = left rows times right panels.
  void scores(Acc* to, const Word* left, const Word* panels, int64_t i0, int64_t rows) const {
    for (int64_t j = 0; j < i0 + rows; j += kPanel)
      for (int64_t r = 0; r < rows; r += 6) {
        const int64_t m = std::min<int64_t>(6, rows - r), keys = std::min(kPanel, i0 + r + m - j);
        if (keys > 0)
          product<K>(m, (keys + L - 1) / L, words, left + (i0 + r) * words, words, 1, panels + j * words, kPanel,
                     to + r * padded + j, padded);
      }
  }

  // out[rows of the strip][D] = weights[strip][keys] times right (kPair keys a Word).
  void mix(const Word* weights, const Word* right, int64_t i0, int64_t rows) const {
    const int64_t stride = padded * sizeof(Acc) / sizeof(Word);
    for (int64_t r = 0; r < rows; r += 6) {
      const int64_t m = std::min<int64_t>(6, rows - r);
      product<K>(m, D / L, (i0 + r + m + K::kPair - 1) / K::kPair, weights + r * stride, stride, 1, right, D,
                 out + r * D, D);
    }
  }

  // to[keys up to the diagonal][D] += weights^T times right, reduced over the strip's rows.
  void scatter(Acc* to, const Word* weights, const Word* right, int64_t i0, int64_t rows) const {
    for (int64_t j = 0; j < i0 + rows; j += 6) {
      const int64_t first = std::max<int64_t>(0, j - i0) / K::kPair, last = (rows + K::kPair - 1) / K::kPair;
      product<K>(std::min<int64_t>(6, i0 + rows - j), D / L, last - first, weights + first * padded + j, 1, padded,
                 right + (i0 / K::kPair + first) * D, D, to + j * D, D, true);
    }
  }

  static void keep_first(Acc* row, int64_t n, Acc fill) {
    for (; n % L; ++n) row[n] = fill;
  }

  void forward(int64_t head) {
    const int64_t b = head / x.H, h = head % x.H;
    pack_rows<K>(q, input(0, b, h), x.dtype, row_stride, T, padded, D, D);
    pack_rows<K>(k, input(1, b, h), x.dtype, row_stride, T, padded, D, D);
    pack_rows<K>(v, input(2, b, h), x.dtype, row_stride, T, padded, D, D);
    transpose_rows<K>(k_panels, k, padded, D);
    const Word* values = pairs(v_pairs, v);

    for (int64_t i0 = 0; i0 < T; i0 += kStrip) {
      const int64_t rows = std::min(kStrip, T - i0);
      scores(s, q, k_panels, i0, rows);
      Acc total[kStrip];
      for (int64_t r = 0; r < rows; ++r) {
        Acc* row = s + r * padded;
        const int64_t n = i0 + r + 1;
        keep_first(row, n, Acc(-INFINITY));
        V top = splat<V>(Acc(-INFINITY));
        for (int64_t j = 0; j < n; j += L) top = max(load<V>(row + j), top);
        const Acc m = highest(top) * scale;
        V sums{};
        for (int64_t j = 0; j < n; j += L) {
          const V p = exp2(fma(load<V>(row + j), splat<V>(scale), splat<V>(-m)) * Acc(kLog2e));
          sums += p;
          if (x.dropout > 0) store(row + j, p);
          else store_numbers<K>(row, j, p);
        }
        total[r] = sum(sums);
        lse(head, i0 + r) = m + Acc(std::log(total[r]));
        zero_rest(row, round_up(n, L), i0 + rows, x.dropout > 0);
      }
      if (x.dropout > 0) drop(head, i0, rows);
      mix(reinterpret_cast<const Word*>(s), values, i0, rows);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < D; d += L)
          store_as(at(x.out, x.dtype, ((b * T + i0 + r) * x.H + h) * D + d), x.dtype,
                   load<V>(out + r * D + d) / total[r]);
    }
  }

  // Weights beyond the diagonal that a register tile's longest row makes its other rows read.
  static void zero_rest(Acc* row, int64_t j, int64_t end, bool numbers) {
    for (; j < end; j += L) {
      if (numbers) store(row + j, V{});
      else store_numbers<K>(row, j, V{});
    }
  }

  void drop(int64_t head, int64_t i0, int64_t rows) {
    float keep[16][16];
    for (int64_t r0 = 0; r0 < rows; r0 += 16)
      for (int64_t j = 0; j < i0 + rows; j += 16) {
        if (j <= i0 + r0 + 15) dropout_tile(keep, x, head, i0 + r0, j);
        for (int64_t r = r0; r < std::min(r0 + 16, rows); ++r)
          for (int64_t c = 0; c < 16; c += L) {
            V p = load<V>(s + r * padded + j + c);
            for (int l = 0; l < L; ++l) p[l] *= drop_scale * Acc(keep[r - r0][c + l]);
            store_numbers<K>(s + r * padded, j + c, p);
          }
      }
  }

  void backward(int64_t head) {
    const int64_t b = head / x.H, h = head % x.H;
    pack_rows<K>(q, input(0, b, h), x.dtype, row_stride, T, padded, D, D);
    pack_rows<K>(k, input(1, b, h), x.dtype, row_stride, T, padded, D, D);
    pack_rows<K>(v, input(2, b, h), x.dtype, row_stride, T, padded, D, D);
    pack_rows<K>(o, at(x.grad_out, x.dtype, (b * T * x.H + h) * D), x.dtype, x.H * D, T, padded, D, D);
    transpose_rows<K>(k_panels, k, padded, D);
    transpose_rows<K>(v_panels, v, padded, D);
    const Word* queries = pairs(q_pairs, q);
    const Word* keys = pairs(k_pairs, k);
    const Word* grads = pairs(o_pairs, o);
    std::memset(dk, 0, padded * D * sizeof *dk);
    std::memset(dv, 0, padded * D * sizeof *dv);

    for (int64_t i0 = 0; i0 < T; i0 += kStrip) {
      const int64_t rows = std::min(kStrip, T - i0);
      scores(s, q, k_panels, i0, rows);
      scores(ds, o, v_panels, i0, rows);
      weight_grads(head, i0, rows);
      mix(reinterpret_cast<const Word*>(ds), keys, i0, rows);
      scatter(dv, K::kPair == 2 ? p_pairs : reinterpret_cast<const Word*>(s), grads, i0, rows);
      scatter(dk, K::kPair == 2 ? s_pairs : reinterpret_cast<const Word*>(ds), queries, i0, rows);
      unpack(0, b, h, i0, rows, out);
    }
    unpack(1, b, h, 0, T, dk);
    unpack(2, b, h, 0, T, dv);
  }

  void unpack(int which, int64_t b, int64_t h, int64_t i0, int64_t rows, const Acc* from) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < D; d += L)
        store_as(at(x.grad_qkv, x.dtype, (b * T + i0 + r) * row_stride + which * x.H * D + h * D + d), x.dtype,
                 load<V>(from + r * D + d));
  }

  // Scores s and gradients ds of the weights -> weights (with dropout) and gradients of the scores.
  void weight_grads(int64_t head, int64_t i0, int64_t rows) {
    V index, sums[kStrip]{}, deltas[kStrip]{};
    for (int l = 0; l < L; ++l) index[l] = Acc(l);
    float keep[16][16];
    // First the weights and each row's delta = sum of weight * gradient. A weight that dropout zeroes is kept negated.
    for (int64_t r0 = 0; r0 < rows; r0 += 16)
      for (int64_t j0 = 0; j0 < i0 + rows; j0 += 16) {
        if (x.dropout > 0 && j0 <= i0 + r0 + 15) dropout_tile(keep, x, head, i0 + r0, j0);
        for (int64_t r = r0; r < std::min(r0 + 16, rows); ++r)
          for (int64_t j = j0; j < j0 + 16; j += L) {
            const int64_t valid = i0 + r + 1 - j;
            V p{};
            if (valid > 0) {
              // The difference in one rounding: the logarithm's base then costs nothing where p is large.
              const V log_p = fma(load<V>(s + r * padded + j), splat<V>(scale), splat<V>(-lse(head, i0 + r)));
              p = exp2(log_p * Acc(kLog2e));
              if (valid < L) p = select<V>(index < splat<V>(Acc(valid)), p, V{});
              sums[r] += p;
              V dp = load<V>(ds + r * padded + j);
              if (valid < L) dp = select<V>(index < splat<V>(Acc(valid)), dp, V{});
              store(ds + r * padded + j, dp);
              if (x.dropout > 0) {
                V kept;
                for (int l = 0; l < L; ++l) kept[l] = Acc(keep[r - r0][j - j0 + l]);
                dp *= kept * drop_scale;
                p = select<V>(kept > V{}, p, -p);
                deltas[r] = fma(max(p, V{}), dp, deltas[r]);
              } else {
                deltas[r] = fma(p, dp, deltas[r]);
              }
            } else {
              store(ds + r * padded + j, V{});
            }
            store(s + r * padded + j, p);
          }
      }
    // The weights sum to 1 but for the rounding of lse: what is missing is made up here.
    Acc delta[kStrip], norm[kStrip];
    for (int64_t r = 0; r < rows; ++r) {
      norm[r] = 1 / sum(sums[r]);
      delta[r] = sum(deltas[r]) * norm[r];
    }
    // Then the gradients, two rows at a time, so that bf16 pairs can be written; a missing last row is all zeros.
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t j = 0; j < i0 + rows; j += L) {
        V p[2]{}, d[2]{};
        for (int64_t e = 0; e < 2 && r + e < rows; ++e) {
          p[e] = load<V>(s + (r + e) * padded + j) * norm[r + e];
          V dp = load<V>(ds + (r + e) * padded + j);
          if (x.dropout > 0) {
            const V size = max(p[e], -p[e]);
            dp = select<V>(p[e] > V{}, dp * drop_scale, V{});
            p[e] = max(p[e], V{}) * drop_scale;
            d[e] = size * (dp - delta[r + e]) * scale;
          } else {
            d[e] = p[e] * (dp - delta[r + e]) * scale;
          }
        }
        put(r, j, rows, p, d);
      }
  }

  void put(int64_t r, int64_t j, int64_t rows, V (&p)[2], V (&d)[2]) {
#if defined(__AVX512BF16__)
    if constexpr (K::kPair == 2) {
      const vh p0 = to_bf16(p[0]), p1 = to_bf16(p[1]), d0 = to_bf16(d[0]), d1 = to_bf16(d[1]);
      store(p_pairs + r / 2 * padded + j, pair(p0, p1));
      store(s_pairs + r / 2 * padded + j, pair(d0, d1));
      store(reinterpret_cast<uint16_t*>(ds + r * padded) + j, d0);
      if (r + 1 < rows) store(reinterpret_cast<uint16_t*>(ds + (r + 1) * padded) + j, d1);
      return;
    }
#endif
    for (int64_t e = 0; e < 2 && r + e < rows; ++e) {
      store(s + (r + e) * padded + j, p[e]);
      store(ds + (r + e) * padded + j, d[e]);
    }
  }
};

template <class K>
void run(const Attention& x, bool backward, int64_t begin, int64_t end) {
  Head<K> head(x, backward);
  for (int64_t i = begin; i < end; ++i) backward ? head.backward(i) : head.forward(i);
}

void dispatch(const Attention& x, bool backward, int64_t begin, int64_t end) {
  if (x.dtype == DType::f64) return run<F64>(x, backward, begin, end);
#if defined(__AVX512BF16__)
  if (x.dtype == DType::bf16 && x.D % (2 * W) == 0) return run<BF16>(x, backward, begin, end);
#endif
  run<F32>(x, backward, begin, end);
}

}  // namespace

void attention_forward(const Attention& x, int64_t begin, int64_t end) { dispatch(x, false, begin, end); }
void attention_backward(const Attention& x, int64_t begin, int64_t end) { dispatch(x, true, begin, end); }

}  // namespace tinystory::cpu
