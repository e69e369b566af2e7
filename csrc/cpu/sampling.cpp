// Sampling by inverse CDF over fixed-point weights (weights.h), with log-probability and entropy in the same pass.
//
// Without top-k and top-p, a row is read once for the maximum and once for block sums; only the block that contains the
// draw is read a third time. Top-k and top-p find a threshold by a radix search over order-preserving keys, with three
// histograms of at most 2048 buckets, so no sort is needed.
#include <algorithm>

#include "../weights.h"
#include "vec.h"

namespace tinystory::cpu {
namespace {

constexpr int64_t kBlock = 1024;
constexpr double kLn2 = 0.6931471805599453;

struct Weights {
  vu64 low, high;  // weights of the lower and of the upper half of the lanes
  vf product;      // t * 2^t, for the entropy
};

Weights weigh(vf logit, vf top, vf scale) {
  const vf t = max((logit - top) * scale, splat<vf>(kLowest));
  const vf shifted = t + kRounder;
  const vf f = t - (shifted - kRounder);
  vf p = splat<vf>(kExp2[6]);
  for (int i = 5; i >= 0; --i) p = p * f + kExp2[i];
  const vi n = (vi)shifted - kRounderBits;
  const vi mantissa = __builtin_convertvector(p * 0x1p24f, vi), shift = -n;
  vu_half m[2], s[2];
  std::memcpy(m, &mantissa, sizeof m);
  std::memcpy(s, &shift, sizeof s);
  const auto fixed = [](vu_half m, vu_half s) {
    return (__builtin_convertvector(m, vu64) << (kWeightBits - 24)) >> __builtin_convertvector(s, vu64);
  };
  return {fixed(m[0], s[0]), fixed(m[1], s[1]), t * (vf)((vi)p + (n << 23))};
}

struct Row {
  const Sample& x;
  const void* logits;
  float top;
  vf scale;

  vf at_index(int64_t v) const {
    const void* p = at(logits, x.dtype, v);
    return v + W <= x.V ? load_as<vf>(p, x.dtype) : load_tail<vf>(p, x.dtype, x.V - v, -INFINITY);
  }

  // Sets `top` to the maximum of the row. Returns 0, or kNotANumber or kNoToken if no draw is possible.
  int64_t find_top() {
    vf highs = splat<vf>(-INFINITY);
    vi wrong{};
    for (int64_t v = 0; v < x.V; v += W) {
      const vf l = at_index(v);
      wrong |= ~(l < INFINITY);  // NaN compares false
      highs = max(l, highs);
    }
    top = highest(highs);
    for (int i = 0; i < W; ++i)
      if (wrong[i]) return kNotANumber;
    return top == -INFINITY ? int64_t(kNoToken) : 0;
  }

  void fill(int64_t begin, int64_t end, uint64_t* weights) const {
    for (int64_t v = begin; v < end; v += W) {
      const Weights w = weigh(at_index(v), splat<vf>(top), scale);
      uint64_t both[W];
      store(both, w.low);
      store(both + W / 2, w.high);
      std::memcpy(weights + v - begin, both, std::min<int64_t>(W, end - v) * 8);
    }
  }
};

// The threshold for which the keys above it have a total measure below `need`, and the keys above or equal to it at
// least `need`. Reduces `need` to the part that the keys equal to the threshold must contribute.
template <class Measure>
uint32_t find_threshold(const uint32_t* keys, int64_t n, uint64_t& need, Measure measure) {
  uint32_t prefix = 0, mask = 0;
  for (const auto& [shift, bits] : {std::pair{21, 11}, {10, 11}, {0, 10}}) {
    uint64_t histogram[2048] = {};
    const uint32_t digits = (1u << bits) - 1;
    for (int64_t i = 0; i < n; ++i)
      if ((keys[i] & mask) == prefix) histogram[keys[i] >> shift & digits] += measure(i);
    uint32_t digit = digits;
    for (; digit > 0 && histogram[digit] < need; --digit) need -= histogram[digit];
    prefix |= digit << shift;
    mask |= digits << shift;
  }
  return prefix;
}

// Zeroes all weights except those of keys above the threshold, and the first `ties` nonzero weights of keys equal to
// it.
void truncate(const uint32_t* keys, uint64_t* weights, int64_t n, uint32_t threshold, uint64_t ties) {
  for (int64_t i = 0; i < n; ++i) {
    if (keys[i] > threshold) continue;
    if (keys[i] == threshold && ties && weights[i]) --ties;
    else weights[i] = 0;
  }
}

int64_t first_above(const uint64_t* weights, int64_t n, uint64_t draw) {
  for (int64_t i = 0; i < n; ++i) {
    if (draw < weights[i]) return i;
    draw -= weights[i];
  }
  return n - 1;  // not reached: the draw is below the total
}

void sample_row(const Sample& x, int64_t b) {
  Row row{x, at(x.logits, x.dtype, b * x.V), 0, splat<vf>(weight_scale(x.temperature))};
  x.logprobs[b] = x.entropy[b] = 0;
  if ((x.tokens[b] = row.find_top()) < 0) return;

  const int64_t blocks = (x.V + kBlock - 1) / kBlock;
  const bool truncated = (x.top_k > 0 && x.top_k < x.V) || x.top_p < 1;
  const int64_t n_weights = truncated ? x.V : kBlock;
  uint64_t* block_sums = reinterpret_cast<uint64_t*>(scratch((blocks + n_weights) * 8 + x.V * 4));
  uint64_t* weights = block_sums + blocks;
  uint64_t total = 0;
  double products = 0;
  for (int64_t k = 0; k < blocks; ++k) {
    vu64 sums{};
    vf product{};
    for (int64_t v = k * kBlock; v < std::min((k + 1) * kBlock, x.V); v += W) {
      const Weights w = weigh(row.at_index(v), splat<vf>(row.top), row.scale);
      sums += w.low + w.high;
      product += w.product;
    }
    total += block_sums[k] = sum(sums);
    products += sum(product);
  }
  const double sum_exp = double(total) * 0x1p-40, log_total = std::log(sum_exp);
  const uint64_t bits = sample_bits(x.seed, uint64_t(x.rows[b]), uint32_t(x.steps[b]));

  int64_t token;
  if (truncated) {
    row.fill(0, x.V, weights);
    uint32_t* keys = reinterpret_cast<uint32_t*>(weights + x.V);
    for (int64_t v = 0; v < x.V; v += W) {
      const vf logit = row.at_index(v);
      for (int64_t i = 0; i < std::min<int64_t>(W, x.V - v); ++i) {
        const float l = logit[i];
        uint32_t u;
        std::memcpy(&u, &l, 4);
        keys[v + i] = order_key(u);
      }
    }
    if (x.top_k > 0 && x.top_k < x.V) {
      uint64_t ties = uint64_t(x.top_k);
      const uint32_t threshold = find_threshold(keys, x.V, ties, [](int64_t) { return uint64_t(1); });
      truncate(keys, weights, x.V, threshold, ties);
      total = 0;
      for (int64_t v = 0; v < x.V; ++v) total += weights[v];
    }
    if (x.top_p < 1) {
      uint64_t need = top_p_need(top_p_fixed(x.top_p), total);
      const uint32_t threshold = find_threshold(keys, x.V, need, [&](int64_t i) { return weights[i]; });
      uint64_t weight = 0;
      for (int64_t v = 0; v < x.V; ++v)
        if (keys[v] == threshold) weight = std::max(weight, weights[v]);
      truncate(keys, weights, x.V, threshold, (need + weight - 1) / weight);
      total = 0;
      for (int64_t v = 0; v < x.V; ++v) total += weights[v];
    }
    token = first_above(weights, x.V, below(bits, total));
  } else {
    uint64_t draw = below(bits, total);
    int64_t k = 0;
    while (draw >= block_sums[k]) draw -= block_sums[k++];
    const int64_t begin = k * kBlock, end = std::min(begin + kBlock, x.V);
    row.fill(begin, end, weights);
    token = begin + first_above(weights, end - begin, draw);
  }
  x.tokens[b] = token;
  const double logit = row.at_index(token)[0];
  x.logprobs[b] = float((logit - row.top) / x.temperature - log_total);
  x.entropy[b] = float(log_total - kLn2 * products / sum_exp);
}

}  // namespace

void sample(const Sample& x, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) sample_row(x, i);
}

}  // namespace tinystory::cpu
