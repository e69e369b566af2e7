// Log-probabilities and entropies of targets under softmax(hidden weight^T), and their gradients.
//
// Logits are computed with gemm.h in groups of kGroup columns, in f32 (f64 for f64). The logits of one block of rows
// are in memory at a time: once for the row sums, and again for the gradients, unless the caller keeps the logits. If
// the upstream gradient is a constant (cross_entropy), the gradients are computed right after the row sums of each
// chunk, and the logits of the chunk are kept until then, [group][row][kStride]. For bf16, the gradients of the logits
// are stored twice as bf16: by rows, and temporarily as pairs of rows.
#include <algorithm>
#include <limits>

#include "gemm.h"

namespace tinystory::cpu {
namespace {

constexpr int64_t kGroup = kLogprobGroup;
constexpr int64_t kStride = kLogprobStride;
constexpr int64_t kBlock = 96;  // rows per block; a block and its logits fit in the L2 cache
constexpr double kLog2e = 1.4426950408889634;

template <class Policy>
struct Chunk {
  using Acc = typename Policy::Acc;
  using Pack = typename Policy::Pack;
  using Vec = VecOf<Acc>;
  static constexpr int64_t L = lanes<Vec>, kWidth = kPanel<Policy>;

  const TokenLogprob& x;
  const bool fused;                      // whether the gradients of a chunk are computed right after its row sums
  const int64_t rows, C, packs, stride;  // rows and C are padded for gemm.h; stride: distance between rows of grads
  Pack *weight_pairs, *hidden, *hidden_panels, *grads;
  Acc *sums, *logits;  // sums: (groups, rows, 3), see sum_group; logits shares memory with grads
  size_t bytes;

  explicit Chunk(const TokenLogprob& x)
      : x(x), fused(x.logprob && x.grad_hidden), rows(round_up(x.rows, 2 * kPadding<Policy>)),
        C(round_up(x.C, kColumns)), packs(C / Policy::kPack), stride(fused ? kStride : kStride / Policy::kPack) {
    Arena m{static_cast<char*>(x.workspace), 0};
    // weight_pairs is first, so that its address is the same for all chunks of rows
    weight_pairs = m.take<Pack>(x.grad_hidden ? x.groups * kGroup * packs : 0);
    hidden = m.take<Pack>(rows * packs);
    hidden_panels = m.take<Pack>(x.grad_hidden ? rows * packs : 0);
    sums = m.take<Acc>(x.logprob ? x.groups * rows * 3 : 0);
    grads = m.take<Pack>(x.grad_hidden ? x.groups * rows * stride : 0);
    logits = reinterpret_cast<Acc*>(grads);
    bytes = m.used;
  }

  // Memory of one thread: the group's rows of the weight, and the same as panels; the logits of a block; for bf16, the
  // gradients of a block in pairs of rows, and the gradients of the whole chunk by columns.
  struct Own {
    Pack *weight, *panels, *pairs, *columns;
    Acc* logits;
  };
  Own own() const {
    Own o;
    const auto lay_out = [&](Arena m) {
      o.weight = m.take<Pack>(kGroup * packs), o.panels = m.take<Pack>(kGroup * packs);
      o.logits = m.take<Acc>(kBlock * kStride);
      const bool paired = Policy::kPack == 2 && x.grad_hidden;
      o.pairs = m.take<Pack>(paired ? kBlock / 2 * kStride : 0);
      o.columns = m.take<Pack>(paired ? kGroup * rows / 2 : 0);
      return m.used;
    };
    lay_out({scratch(lay_out({})), 0});
    return o;
  }

  int64_t column(int64_t group) const { return (x.first_group + group) * kGroup; }  // the group's first column
  int64_t width(int64_t group) const { return std::min(kGroup, x.V - column(group)); }
  Pack* grads_at(int64_t group, int64_t row) const { return grads + (group * rows + row) * stride; }
  // The kept logits of a group, starting with this row; null if the logits of this group are not kept.
  Acc* kept_logits(int64_t group, int64_t row) const {
    if (fused) return logits + (group * rows + row) * kStride;
    if (x.first_group + group >= x.kept_groups) return nullptr;
    return static_cast<Acc*>(x.kept_logits) + ((x.first_group + group) * x.N + x.first + row) * kStride;
  }
  // Packs the group's rows of the weight, zero-padded to a whole panel.
  void weight_rows(Pack* to, int64_t group) const {
    pack_rows<Policy>(to, at(x.weight, x.weight_dtype, column(group) * x.C), x.weight_dtype, x.C, width(group),
                      round_up(width(group), kColumns), x.C, C);
  }

  void pack(int64_t begin, int64_t end) {
    const int64_t first = 2 * begin, n = std::min(2 * end, x.rows) - first;
    const int64_t padded = (2 * end < x.rows ? 2 * end : rows) - first;
    pack_rows<Policy>(hidden + first * packs, at(x.hidden, x.dtype, (x.first + first) * x.C), x.dtype, x.C, n, padded,
                      x.C, C);
    if (!x.grad_hidden) return;
    pair_rows<Policy>(hidden_panels + first / Policy::kPack * kWidth, hidden + first * packs, padded, C, kWidth,
                      rows / Policy::kPack);
  }

  // Packs the group's rows of the weight: for the logits, and, with the first chunk of rows, for grad_hidden of all
  // chunks.
  void pack_weight(int64_t g, const Own& own) {
    weight_rows(own.weight, g);
    const int64_t n = round_up(width(g), kColumns);
    transpose_rows<Policy>(own.panels, own.weight, n, C);
    if (x.grad_hidden && x.first == 0)
      pair_rows<Policy>(weight_pairs + g * kGroup * packs, own.weight, n, C, kWidth, n / Policy::kPack);
  }

  // Calls use(first, end, logits) for each block of rows of the chunk, with the logits of this group,
  // [row - first][kStride]. compute: computes the logits first; otherwise they must have been kept.
  template <class F>
  void each_block(int64_t g, const Own& own, bool compute, const F& use) {
    if (compute || (x.first == 0 && !fused)) pack_weight(g, own);
    for (int64_t first = 0; first < x.rows; first += kBlock) {
      const int64_t end = std::min(first + kBlock, x.rows);
      Acc *kept = kept_logits(g, first), *to = kept ? kept : own.logits;
      if (compute)
        gemm<Policy>(end - first, round_up(width(g), kColumns), packs, {hidden + first * packs, packs, 1},
                     {own.panels, kWidth, packs * kWidth}, to, kStride);
      use(first, end, to);
    }
  }

  void sum_logits(int64_t g) {
    each_block(g, own(), true, [&](int64_t first, int64_t end, const Acc* logits) {
      for (int64_t r = first; r < end; ++r) sum_group(g, r, logits + (r - first) * kStride);
    });
  }

  // Stores three values of a row for this group: m, the maximum logit; the sum of 2^z; and the sum of z 2^z, where
  // z = log2(e) (logit - m).
  void sum_group(int64_t g, int64_t row, const Acc* logits) {
    const auto each_vector = [&](const auto& f) {
      int64_t v = 0;
      for (; v + L <= width(g); v += L) f(load<Vec>(logits + v));
      if (v == width(g)) return;
      Vec last = load<Vec>(logits + v);
      for (int64_t l = width(g) - v; l < L; ++l) last[l] = Acc(-INFINITY);
      f(last);
    };
    Vec tops = splat<Vec>(Acc(-INFINITY)), total{}, weighted{};
    each_vector([&](Vec logit) { tops = max(logit, tops); });
    const Acc top = std::max(highest(tops), std::numeric_limits<Acc>::lowest());  // not -inf: -inf - -inf is NaN
    each_vector([&](Vec logit) {
      const Vec z = (logit - top) * Acc(kLog2e), p = exp2(z);
      total += p;
      weighted = fma(max(z, splat<Vec>(Acc(-1000))), p, weighted);  // 0 times -inf would be NaN
    });
    Acc* to = sums + (g * rows + row) * 3;
    to[0] = top, to[1] = sum(total), to[2] = sum(weighted);
    const int64_t target = x.targets[x.first + row] - column(g);
    if (target >= 0 && target < kGroup) static_cast<Acc*>(x.logprob)[x.first + row] = logits[target];
  }

  void stats(int64_t row) {
    double top = -INFINITY, total = 0, weighted = 0;
    for (int64_t g = 0; g < x.groups; ++g) top = std::max<double>(top, sums[(g * rows + row) * 3]);
    for (int64_t g = 0; g < x.groups; ++g) {
      const Acc* group = sums + (g * rows + row) * 3;
      const double z = std::max(-1000.0, (group[0] - top) * kLog2e), scale = std::exp2(z);
      total += scale * group[1], weighted += scale * (group[2] + z * group[1]);
    }
    const int64_t i = x.first + row;
    const double log_total = std::log(total);
    auto& logprob = static_cast<Acc*>(x.logprob)[i];  // holds the target's logit until now
    logprob = Acc(double(logprob) - top - log_total);
    static_cast<Acc*>(x.entropy)[i] = Acc(log_total - weighted / total / kLog2e);
    x.lse[i] = top + log_total;
  }

  // d logprob / d logit = [target] - p;  d entropy / d logit = -p (log p + entropy).
  struct RowGrad {
    Acc lse, rest, g, ge, entropy, at_target;
    int64_t target;
    Vec operator()(Vec logit) const {
      const Vec log_p = (logit - lse) - rest, p = exp2(log_p * Acc(kLog2e));
      return ge != 0 ? p * (-g - ge * (max(log_p, splat<Vec>(Acc(-1000))) + entropy)) : -g * p;
    }
  };
  RowGrad row_grad(int64_t group, int64_t row, const Acc* logits) const {
    const int64_t i = x.first + row;
    RowGrad r{};
    r.lse = Acc(x.lse[i]);
    r.rest = Acc(x.lse[i] - r.lse);
    r.g = x.grad_logprob ? static_cast<const Acc*>(x.grad_logprob)[i] : Acc(x.grad_everywhere);
    r.ge = x.grad_entropy ? static_cast<const Acc*>(x.grad_entropy)[i] : Acc(0);
    r.entropy = r.ge != 0 ? static_cast<const Acc*>(x.entropy)[i] : Acc(0);
    r.target = x.targets[i] - column(group);
    if (r.target >= 0 && r.target < kGroup) {
      const double log_p = double(logits[r.target]) - x.lse[i];
      r.at_target = Acc(-r.g * std::expm1(log_p) - r.ge * std::exp(log_p) * (log_p + r.entropy));
    }
    return r;
  }

  // Computes the gradients of the logits of rows [first, end); `first` is even. With `fused`, they overwrite the
  // logits.
  void differentiate(int64_t g, int64_t first, int64_t end, const Acc* logits, Pack* pairs) {
    const int64_t n = width(g);
    Vec index{};
    for (int64_t l = 0; l < L; ++l) index[l] = Acc(l);
    for (int64_t row = first; row < end; row += 2) {
      const Acc* from[2] = {logits + (row - first) * kStride, logits + (row + 1 - first) * kStride};
      Pack* to[2] = {grads_at(g, row), grads_at(g, row + 1)};
      RowGrad grad[2]{};
      for (int64_t e = 0; e < 2 && row + e < end; ++e) grad[e] = row_grad(g, row + e, from[e]);
      for (int64_t v = 0; v < round_up(n, kColumns); v += L) {
        Vec d[2]{};
        for (int64_t e = 0; e < 2 && row + e < end; ++e) {
          __builtin_prefetch(from[e] + v + 2 * kStride);
          d[e] = grad[e](load<Vec>(from[e] + v));
          if (v + L > n) d[e] = select<Vec>(index < splat<Vec>(Acc(n - v)), d[e], Vec{});
        }
        store_elements<Policy>(to[0], v, d[0]);
        store_elements<Policy>(to[1], v, d[1]);
        if constexpr (Policy::kPack == 2)
          store(pairs + (row - first) / 2 * kStride + v, pair(to_bf16(d[0]), to_bf16(d[1])));
      }
      for (int64_t e = 0; e < 2 && row + e < end; ++e) {
        const int64_t v = grad[e].target;
        if (v < 0 || v >= n) continue;
        if constexpr (Policy::kPack == 2) {
          const uint16_t d = to_bf16(splat<Vec>(grad[e].at_target))[0];
          reinterpret_cast<uint16_t*>(to[e])[v] = d;
          reinterpret_cast<uint16_t*>(pairs + (row - first) / 2 * kStride + v)[e] = d;
        } else {
          to[e][v] = grad[e].at_target;
        }
      }
    }
  }

  void grad_weight(int64_t g) {
    const Own o = own();
    const auto use = [&](int64_t first, int64_t end, const Acc* logits) {
      differentiate(g, first, end, logits, o.pairs);
      if constexpr (Policy::kPack == 2) {
        const int64_t n = (end - first + 1) / 2, padded = round_up(n, kPadding<Policy>);
        std::memset(o.pairs + n * kStride, 0, (padded - n) * kStride * sizeof(Pack));
        transpose_packs(o.columns + first / 2, rows / 2, o.pairs, kStride, padded, round_up(width(g), kColumns));
      }
    };
    each_block(g, o, kept_logits(g, 0) == nullptr, use);
    const int64_t n = rows / Policy::kPack;
    const Left<Policy> left =
        Policy::kPack == 2 ? Left<Policy>{o.columns, n, 1} : Left<Policy>{grads_at(g, 0), 1, kStride};
    gemm<Policy>(width(g), C, n, left, {hidden_panels, kWidth, n * kWidth},
                 static_cast<Acc*>(x.grad_weight) + g * kGroup * C, C, x.first > 0);
  }

  void grad_hidden(int64_t begin, int64_t end) {
    constexpr int64_t kTogether = 2;  // number of groups with weights in the cache at the same time
    for (int64_t first = begin * kLogprobRows; first < std::min(x.rows, end * kLogprobRows); first += kLogprobRows)
      for (int64_t g0 = 0; g0 < x.groups; g0 += kTogether)
        for (int64_t c = 0; c < C; c += kColumns)
          for (int64_t g = g0; g < std::min(g0 + kTogether, x.groups); ++g) {
            const int64_t n = round_up(width(g), kColumns) / Policy::kPack;
            gemm<Policy>(std::min(kLogprobRows, x.rows - first), kColumns, n, {grads_at(g, first), stride, 1},
                         {weight_pairs + g * kGroup * packs + c * n, kWidth, n * kWidth},
                         static_cast<Acc*>(x.grad_hidden) + (x.first + first) * C + c, C, column(g) > 0);
          }
  }
};

template <class F>
auto with_chunk(const TokenLogprob& x, const F& f) {
  if (x.dtype == DType::f64) return f(Chunk<F64>(x));
#if defined(TINYSTORY_BF16)
  if (x.dtype == DType::bf16) return f(Chunk<BF16Tiles>(x));
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
  with_chunk(x, [&](auto chunk) {
    for (int64_t g = begin; g < end; ++g) chunk.sum_logits(g);
  });
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
