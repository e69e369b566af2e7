// Log-probabilities and entropies of targets under softmax(hidden weight^T), and their gradients.
//
// The logits of one chunk exist at a time, in f32 (f64), in groups of kGroup columns [group][row][kStride]. Each is
// computed by the register tile of product.h and turned into its own gradient in place; for bf16 the gradients are
// stored twice as bf16, by rows over the logits themselves and, while they are in use, as pairs of rows.
#include <algorithm>

#include "product.h"

namespace tinystory::cpu {
namespace {

constexpr int64_t kGroup = kLogprobGroup;
constexpr int64_t kStride = kGroup + 16;  // rows a power of two apart would share a few lines of the first cache
// Words summed in one go: a sum of short sums rounds less than one long sum. bf16 has rounded far more already.
template <class K>
constexpr int64_t kReduce = K::kPair == 2 ? 384 : 128;
constexpr int64_t kBlock = 96;    // rows that meet a panel: they and their results stay in the second-level cache
constexpr double kLog2e = 1.4426950408889634;

template <class K>
struct Chunk {
  using Acc = typename K::Acc;
  using Word = typename K::Word;
  using V = Vec<Acc>;
  static constexpr int64_t L = lanes<V>;

  const TokenLogprob& x;
  const int64_t rows, C, words;           // rows and C padded: to whole pairs, to whole panels
  Word *weight_pairs, *hidden, *hidden_panels;
  Acc* logits;
  size_t bytes;

  explicit Chunk(const TokenLogprob& x)
      : x(x), rows(round_up(x.rows, 2)), C(round_up(x.C, kPanel)), words(C / K::kPair) {
    Arena m{static_cast<char*>(x.workspace), 0};
    weight_pairs = m.take<Word>(x.grad_hidden ? x.groups * kGroup * words : 0);  // first: all chunks of rows find it
    hidden = m.take<Word>(rows * words);
    hidden_panels = m.take<Word>(rows * words);
    logits = m.take<Acc>(x.groups * rows * kStride);
    bytes = m.used;
  }

  int64_t column(int64_t group) const { return (x.first_group + group) * kGroup; }  // the group's first
  int64_t width(int64_t group) const { return std::min(kGroup, x.V - column(group)); }
  Acc* logits_at(int64_t group, int64_t row) const { return logits + (group * rows + row) * kStride; }
  // The group's rows of the weight, as words; zero up to a whole panel.
  void weight_rows(Word* to, int64_t group) const {
    pack_rows<K>(to, at(x.weight, x.weight_dtype, column(group) * x.C), x.weight_dtype, x.C, width(group),
                 round_up(width(group), kPanel), x.C, C);
  }

  void pack(int64_t begin, int64_t end) {
    const int64_t first = 2 * begin, n = std::min(2 * end, x.rows) - first;
    pack_rows<K>(hidden + first * words, at(x.hidden, x.dtype, (x.first + first) * x.C), x.dtype, x.C, n,
                 2 * end - first, x.C, C);
    pair_rows<K>(hidden_panels + first / K::kPair * kPanel, hidden + first * words, 2 * end - first, C, kPanel,
                 rows / K::kPair);
  }

  void compute(int64_t begin, int64_t end) {
    Word* w = reinterpret_cast<Word*>(scratch(2 * kGroup * words * sizeof(Word)));
    Word* panels = w + kGroup * words;
    for (int64_t g = begin; g < end; ++g) {
      weight_rows(w, g);
      const int64_t n = round_up(width(g), kPanel);
      transpose_rows<K>(panels, w, n, C);
      if (x.grad_hidden && x.first == 0)
        pair_rows<K>(weight_pairs + g * kGroup * words, w, n, C, kPanel, n / K::kPair);
      for (int64_t first = 0; first < x.rows; first += kBlock)
        for (int64_t v = 0; v < width(g); v += kPanel)
          for (int64_t r = first; r < std::min(first + kBlock, x.rows); r += 6)
            for (int64_t k = 0; k < words; k += kReduce<K>)
              product<K>(std::min<int64_t>(6, x.rows - r), kPanel / L, std::min(kReduce<K>, words - k),
                         hidden + r * words + k, words, 1, panels + v * words + k * kPanel, kPanel, logits_at(g, r) + v,
                         kStride, k > 0);
    }
  }

  void stats(int64_t row) {
    V tops = splat<V>(Acc(-INFINITY));
    each_vector(row, [&](V logit) { tops = max(logit, tops); });
    const Acc top = highest(tops);
    // With z = log2(e) (logit - top): total = sum of 2^z, weighted = sum of z 2^z; only a group's share in V's type.
    double total = 0, weighted = 0;
    V sums{}, products{};
    const auto flush = [&] {
      total += sum(sums), weighted += sum(products);
      sums = products = V{};
    };
    each_vector(row, [&](V logit) {
      const V z = (logit - top) * Acc(kLog2e), p = exp2(z);
      sums += p;
      products = fma(max(z, splat<V>(Acc(-1000))), p, products);  // 0 times -inf would be NaN
    }, flush);
    const double log_total = std::log(total);
    const int64_t i = x.first + row, target = x.targets[i];
    x.lse[i] = top + log_total;
    static_cast<Acc*>(x.logprob)[i] = Acc(double(logits_at(target / kGroup, row)[target % kGroup]) - top - log_total);
    static_cast<Acc*>(x.entropy)[i] = Acc(log_total - weighted / total / kLog2e);
  }

  // f on the row's logits, a vector at a time, -inf beyond the last; then `after` at the end of each group.
  template <class F>
  void each_vector(int64_t row, const F& f) {
    each_vector(row, f, [] {});
  }
  template <class F, class G>
  void each_vector(int64_t row, const F& f, const G& after) {
    for (int64_t g = 0; g < x.groups; ++g) {
      const Acc* p = logits_at(g, row);
      int64_t v = 0;
      for (; v + L <= width(g); v += L) f(load<V>(p + v));
      if (v < width(g)) {
        V last = load<V>(p + v);
        for (int64_t l = width(g) - v; l < L; ++l) last[l] = Acc(-INFINITY);
        f(last);
      }
      after();
    }
  }

  // d logprob / d logit = [target] - p;  d entropy / d logit = -p (log p + entropy).
  struct RowGrad {
    Acc lse, rest, g, ge, entropy, at_target;
    int64_t target;
    V operator()(V logit) const {
      const V log_p = (logit - lse) - rest, p = exp2(log_p * Acc(kLog2e));
      return ge != 0 ? p * (-g - ge * (max(log_p, splat<V>(Acc(-1000))) + entropy)) : -g * p;
    }
  };
  RowGrad row_grad(int64_t group, int64_t row) const {
    const int64_t i = x.first + row;
    RowGrad r{};
    r.lse = Acc(x.lse[i]);
    r.rest = Acc(x.lse[i] - r.lse);
    r.g = x.grad_logprob ? static_cast<const Acc*>(x.grad_logprob)[i] : Acc(x.grad_everywhere);
    r.ge = x.grad_entropy ? static_cast<const Acc*>(x.grad_entropy)[i] : Acc(0);
    r.entropy = r.ge != 0 ? static_cast<const Acc*>(x.entropy)[i] : Acc(0);
    r.target = x.targets[i] - column(group);
    if (r.target >= 0 && r.target < kGroup) {
      const double log_p = double(logits_at(group, row)[r.target]) - x.lse[i];
      r.at_target = Acc(-r.g * std::expm1(log_p) - r.ge * std::exp(log_p) * (log_p + r.entropy));
    }
    return r;
  }

  void grad_weight(int64_t g) {
    const int64_t n = width(g);
    V index;
    for (int64_t l = 0; l < L; ++l) index[l] = Acc(l);
    Word* pairs = reinterpret_cast<Word*>(scratch(K::kPair == 2 ? rows / 2 * kStride * sizeof(Word) : 0));
    for (int64_t row = 0; row < rows; row += 2) {
      Acc* at[2] = {logits_at(g, row), logits_at(g, row + 1)};
      RowGrad grad[2]{};
      for (int64_t e = 0; e < 2 && row + e < x.rows; ++e) grad[e] = row_grad(g, row + e);
      for (int64_t v = 0; v < round_up(n, kPanel); v += L) {
        V d[2]{};
        for (int64_t e = 0; e < 2 && row + e < x.rows; ++e) {
          __builtin_prefetch(at[e] + v + 2 * kStride);
          d[e] = grad[e](load<V>(at[e] + v));
          if (v + L > n) d[e] = select<V>(index < splat<V>(Acc(n - v)), d[e], V{});
        }
        store_numbers<K>(at[0], v, d[0]);
        store_numbers<K>(at[1], v, d[1]);
        if constexpr (K::kPair == 2)
          store(pairs + row / 2 * kStride + v, pair(to_bf16(d[0]), to_bf16(d[1])));
      }
      for (int64_t e = 0; e < 2 && row + e < x.rows; ++e) {
        const int64_t v = grad[e].target;
        if (v < 0 || v >= n) continue;
        if constexpr (K::kPair == 2) {
          const uint16_t d = to_bf16(splat<V>(grad[e].at_target))[0];
          reinterpret_cast<uint16_t*>(at[e])[v] = d;
          reinterpret_cast<uint16_t*>(pairs + row / 2 * kStride + v)[e] = d;
        } else {
          at[e][v] = grad[e].at_target;
        }
      }
    }
    const Word* left = K::kPair == 2 ? pairs : reinterpret_cast<Word*>(logits_at(g, 0));
    for (int64_t c = 0; c < C; c += kPanel)
      for (int64_t v = 0; v < n; v += 6)
        product<K>(std::min<int64_t>(6, n - v), kPanel / L, rows / K::kPair, left + v, 1, kStride,
                   hidden_panels + c / kPanel * (rows / K::kPair) * kPanel, kPanel,
                   static_cast<Acc*>(x.grad_weight) + (g * kGroup + v) * C + c, C, x.first > 0);
  }

  void grad_hidden(int64_t begin, int64_t end) {
    constexpr int64_t kTogether = 4, stride = kStride * sizeof(Acc) / sizeof(Word);  // groups that share the cache
    for (int64_t first = begin * kLogprobRows; first < std::min(x.rows, end * kLogprobRows); first += kLogprobRows)
      for (int64_t g0 = 0; g0 < x.groups; g0 += kTogether)
        for (int64_t c = 0; c < C; c += kPanel)
          for (int64_t g = g0; g < std::min(g0 + kTogether, x.groups); ++g)
            for (int64_t r = first; r < std::min(first + kLogprobRows, x.rows); r += 6) {
              const int64_t n = round_up(width(g), kPanel) / K::kPair;
              product<K>(std::min<int64_t>(6, x.rows - r), kPanel / L, n, reinterpret_cast<Word*>(logits_at(g, r)),
                         stride, 1, weight_pairs + g * kGroup * words + c * n, kPanel,
                         static_cast<Acc*>(x.grad_hidden) + (x.first + r) * C + c, C, column(g) > 0);
            }
  }
};

template <class F>
auto with_chunk(const TokenLogprob& x, const F& f) {
  if (x.dtype == DType::f64) return f(Chunk<F64>(x));
#if defined(__AVX512BF16__)
  if (x.dtype == DType::bf16) return f(Chunk<BF16>(x));
#endif
  return f(Chunk<F32>(x));
}

}  // namespace

int64_t logprob_workspace(const TokenLogprob& x) {
  return with_chunk(x, [](auto chunk) { return int64_t(chunk.bytes); });
}
void logprob_pack(const TokenLogprob& x, int64_t begin, int64_t end) {
  with_chunk(x, [&](auto chunk) { chunk.pack(begin, end); });
}
void logprob_logits(const TokenLogprob& x, int64_t begin, int64_t end) {
  with_chunk(x, [&](auto chunk) { chunk.compute(begin, end); });
}
void logprob_stats(const TokenLogprob& x, int64_t begin, int64_t end) {
  with_chunk(x, [&](auto chunk) {
    for (int64_t i = begin; i < end; ++i) chunk.stats(i);
  });
}
void logprob_grad_weight(const TokenLogprob& x, int64_t begin, int64_t end) {
  with_chunk(x, [&](auto chunk) {
    for (int64_t g = begin; g < end; ++g) chunk.grad_weight(g);
  });
}
void logprob_grad_hidden(const TokenLogprob& x, int64_t begin, int64_t end) {
  with_chunk(x, [&](auto chunk) { chunk.grad_hidden(begin, end); });
}

}  // namespace tinystory::cpu
