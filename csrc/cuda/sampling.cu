// Sampling by inverse CDF over fixed-point weights (../weights.h), one block per row. Draws the same token as
// ../cpu/sampling.cpp.
//
// Each warp owns a segment of the row. The row is read once for the maximum logit and once for the sum of weights; then
// one warp reads its segment again to find the token. Top-k and top-p find a threshold by a radix search over
// order-preserving keys (three histograms of at most 2048 buckets), without sorting. Then all warps read the row once
// more for the total weight of the kept tokens. All reads except the first hit the cache.
#include "../weights.h"
#include "rows.cuh"

namespace tinystory::cuda {
namespace {

constexpr int kMaxWarps = 32, kBuckets = 2048;
// Number of 16-byte loads of a thread in flight before the first is used. With cuts (top-k or top-p), a block has four
// times as many threads, so one load is enough.
template <bool kCuts>
constexpr int kAhead = kCuts ? 1 : 4;
// Threads per block. Without cuts, a thread needs few registers, so five blocks of fewer warps fit on an SM.
template <bool kCuts>
constexpr int kThreads = kCuts ? kMaxWarps * kWarpSize : 256;  // block_combine needs a power of two
constexpr double kLn2Double = 0.6931471805599453;

struct SampleParams {
  const void* logits;
  int V;
  const int64_t *rows, *steps;
  uint64_t seed, top_p;  // top_p from top_p_fixed; 0: off
  int top_k;             // 0: off
  float scale;           // weight_scale(temperature)
  double temperature;
  int64_t* tokens;
  float *logprobs, *entropy;
};

struct Weight {
  uint64_t fixed;
  float t_weight;  // t * 2^t, for the entropy
};
// The weight of a logit, by the same sequence of IEEE operations as in ../cpu/sampling.cpp.
__device__ __forceinline__ Weight weigh(float logit, float top, float scale) {
  const float t = fmaxf(mul_rn(add_rn(logit, -top), scale), kLowest);
  const float shifted = add_rn(t, kRounder), f = add_rn(t, -add_rn(shifted, -kRounder));
  constexpr float c[7] = {kExp2[0], kExp2[1], kExp2[2], kExp2[3], kExp2[4], kExp2[5], kExp2[6]};
  float p = c[6];
#pragma unroll
  for (int i = 5; i >= 0; --i) p = add_rn(mul_rn(p, f), c[i]);
  const int n = int(float_bits(shifted)) - kRounderBits;
  const uint64_t mantissa = uint64_t(uint32_t(mul_rn(p, 16777216.0f)));
  return {(mantissa << (kWeightBits - 24)) >> -n, t * bits_float(float_bits(p) + (uint32_t(n) << 23))};
}
__device__ __forceinline__ float logit_of_key(uint32_t key) { return bits_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// The truncated vocabulary: all tokens with a key above `key`, and the first `ties` tokens with a key equal to `key`.
struct Cut {
  uint32_t key;
  uint64_t ties;
};

// The rest of a search, in the order of the tokens, for the first token at which the cumulative weight of the truncated
// vocabulary exceeds a draw.
template <bool kCuts>
struct Search {
  uint64_t draw;        // minus the weights of the tokens passed
  uint64_t ties;        // number of tokens equal to the threshold that may still be kept
  uint64_t tie_weight;  // weight of such a token

  // Each lane has a group of tokens: the weight of those above the threshold, and the number of those equal to it. The
  // lane of the group with the token sought, which is passed up to this group; or -1, and all groups are passed.
  __device__ __forceinline__ int find_lane(uint64_t weight, uint32_t equal) {
    const uint32_t equals = kCuts ? warp_prefix_sum(equal) : 0, before = equals - equal;
    const uint64_t free = ties > before ? ties - before : 0;
    if (kCuts) weight += (equal < free ? equal : free) * tie_weight;
    const uint64_t weights = warp_prefix_sum(weight);
    const uint32_t found = ballot(weights > draw);
    const int lane = found ? lowest_bit(found) : kWarpSize - 1;
    draw -= shuffle(found ? weights - weight : weights, lane);
    if (kCuts) {
      const uint32_t passed = shuffle(found ? before : equals, lane);
      ties = ties > passed ? ties - passed : 0;
    }
    return found ? lane : -1;
  }

  // Whether the next token is the one sought; else it is passed.
  __device__ __forceinline__ bool find(uint64_t weight, bool equal) {
    if (equal && ties) weight = tie_weight, --ties;
    if (draw < weight) return true;
    draw -= weight;
    return false;
  }
};

struct SharedState {
  uint64_t histogram[kBuckets], sums[kMaxWarps];
  uint32_t equal[kMaxWarps];
};

template <class Element, bool kCuts>
struct RowSampler {
  static constexpr int kVec = LogitRow<Element>::kVec;
  LogitRow<const Element> row;
  float top, scale;
  SharedState& shared;
  int warp_begin, warp_end;  // this warp's segment

  // Calls visit(x) for each logit of this thread, in order.
  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
    constexpr int kStep = kWarpSize * kVec, kLast = (kAhead<kCuts> - 1) * kStep;
    int v = warp_begin + lane_id() * kVec;
    for (; v + kLast < warp_end && row.vectorizable(v + kLast); v += kAhead<kCuts> * kStep) {
      Vec16 loaded[kAhead<kCuts>];
#pragma unroll
      for (int i = 0; i < kAhead<kCuts>; ++i) loaded[i] = load16(row.row + v + i * kStep);
#pragma unroll
      for (int i = 0; i < kAhead<kCuts>; ++i) {
        float x[kVec];
        unpack(x, loaded[i], Element{});
#pragma unroll
        for (int j = 0; j < kVec; ++j) visit(x[j]);
      }
    }
    for (; v < warp_end; v += kStep) {
      float x[kVec];
      row.load(x, v, -INFINITY);
#pragma unroll
      for (int i = 0; i < kVec; ++i)
        if (v + i < row.V) visit(x[i]);
    }
  }

  template <class Value>
  __device__ __forceinline__ Value block_sum(Value x) const {
    return block_combine(x, reinterpret_cast<Value*>(shared.sums), [](Value a, Value b) { return a + b; });
  }
  __device__ __forceinline__ float block_max(float x) const {
    return block_combine(x, reinterpret_cast<float*>(shared.sums), [](float a, float b) { return fmaxf(a, b); });
  }

  __device__ __forceinline__ uint64_t weight_of_key(uint32_t key) const {
    return weigh(logit_of_key(key), top, scale).fixed;
  }

  // The highest bucket for which this bucket and the buckets above it have a total of at least `need`. Reduces `need`
  // to the part that must come from this bucket. Every warp computes the result redundantly: first the group of 64
  // buckets, then the bucket in this group.
  __device__ __forceinline__ uint32_t find_bucket(uint64_t& need) const {
    const int warp = int(threadIdx.x) / kWarpSize, lane = lane_id();
    const uint64_t* mine = shared.histogram + warp * 64 + 2 * lane;
    const uint64_t sum = warp_sum(mine[0] + mine[1]);
    if (lane == 0) shared.sums[warp] = sum;
    sync_block();
    const uint64_t level = shared.sums[kMaxWarps - 1 - lane], levels = warp_prefix_sum(level);
    const int first = lowest_bit(ballot(levels >= need) | 1u << 31);
    need -= shuffle(levels - level, first);
    const int high = (kMaxWarps - first) * 64 - 1 - 2 * lane;
    const uint64_t upper = shared.histogram[high], both = upper + shared.histogram[high - 1];
    const uint64_t running = warp_prefix_sum(both);
    const int second = lowest_bit(ballot(running >= need) | 1u << 31);
    need -= shuffle(running - both, second);
    const uint64_t of_upper = shuffle(upper, second);
    const bool in_lower = of_upper < need;
    if (in_lower) need -= of_upper;
    sync_block();
    return uint32_t(shuffle(high, second)) - in_lower;
  }

  // The threshold key: the keys above it have a total measure below `need`, and the keys above or equal to it at least
  // `need`. Reduces `need` to the part that the keys equal to the threshold must contribute. `extra` is added to the
  // measure of key `extra_key`.
  template <class Measure>
  __device__ __forceinline__ uint32_t find_threshold(uint64_t& need, const Measure& measure, uint32_t extra_key,
                                                     uint64_t extra) const {
    uint32_t prefix = 0, mask = 0;
#pragma unroll 1
    for (int round = 0; round < 3; ++round) {
      const int shift = round == 0 ? 21 : round == 1 ? 10 : 0;
      const uint32_t digits = round == 2 ? 1023 : 2047;
      for (int i = int(threadIdx.x); i < kBuckets; i += kThreads<kCuts>) shared.histogram[i] = 0;
      sync_block();
      const auto add = [&](uint32_t key, uint64_t x) {
        if ((key & mask) == prefix && x) atomic_add_shared(&shared.histogram[key >> shift & digits], x);
      };
      for_each([&](float x) {
        const uint32_t key = order_key(float_bits(x));
        add(key, measure(x, key));
      });
      if (threadIdx.x == 0) add(extra_key, extra);
      sync_block();
      prefix |= find_bucket(need) << shift;
      mask |= digits << shift;
    }
    return prefix;
  }

  // Total weight of the truncated vocabulary.
  __device__ __forceinline__ uint64_t kept_total(const Cut& cut) const {
    uint64_t sum = 0;
    for_each([&](float x) {
      if (order_key(float_bits(x)) > cut.key) sum += weigh(x, top, scale).fixed;
    });
    return block_sum(sum) + cut.ties * weight_of_key(cut.key);
  }

  // Counts a token with logit x: adds the weight to `above` if the key is above the threshold, and 1 to `equal` if the
  // key equals the threshold.
  __device__ __forceinline__ void count(float x, const Cut& cut, uint64_t& above, uint32_t& equal) const {
    const uint32_t key = order_key(float_bits(x));
    if (!kCuts || key > cut.key) above += weigh(x, top, scale).fixed;
    if (kCuts) equal += key == cut.key;
  }

  // The token sought among this lane's tokens, which begin with v.
  __device__ __forceinline__ int find_in_lane(const float (&x)[kVec], int v, const Cut& cut,
                                              Search<kCuts> search) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (v + i >= row.V) continue;
      uint64_t weight = 0;
      uint32_t equal = 0;
      count(x[i], cut, weight, equal);
      if (search.find(weight, equal)) return v + i;
    }
    return -1;  // not reached: draw < the lane's weight
  }

  // The first token at which the cumulative weight within the truncated vocabulary exceeds `draw`. One lane of the
  // block returns the token; all other lanes return -1. above: total weight of this thread's tokens; with a cut, it is
  // computed again.
  __device__ __forceinline__ int find_token(const Cut& cut, uint64_t draw, uint64_t above) const {
    const int warp = int(threadIdx.x) / kWarpSize, lane = lane_id();
    if (kCuts) {
      uint32_t equal = above = 0;
      for_each([&](float x) { count(x, cut, above, equal); });
      equal = warp_sum(equal);
      if (lane == 0) shared.equal[warp] = equal;
    }
    above = warp_sum(above);
    if (lane == 0) shared.sums[warp] = above;
    sync_block();

    Search<kCuts> search{draw, cut.ties, kCuts ? weight_of_key(cut.key) : 0};
    // lanes beyond the last warp have arbitrary values, but the search ends before them
    if (search.find_lane(shared.sums[lane], kCuts ? shared.equal[lane] : 0) != warp) return -1;
    for (int first = warp_begin; first < warp_end; first += kWarpSize * kVec) {
      const int v = first + lane * kVec;
      float x[kVec];
      row.load(x, v, -INFINITY);
      uint64_t weight = 0;
      uint32_t equal = 0;
#pragma unroll
      for (int i = 0; i < kVec; ++i)
        if (v + i < row.V) count(x[i], cut, weight, equal);
      const int owner = search.find_lane(weight, equal);
      if (owner >= 0) return owner == lane ? find_in_lane(x, v, cut, search) : -1;
    }
    return -1;  // not reached: draw < total
  }
};

template <class Element, bool kCuts>
__global__ void __launch_bounds__(kThreads<kCuts>, kCuts ? 1 : 5) sample_kernel(SampleParams p) {
  constexpr int kVec = kVecElements<Element>, kStride = kThreads<kCuts> * kVec;
  const int b = int(blockIdx.x), per_warp = (p.V + kStride - 1) / kStride * kWarpSize * kVec;
  const int begin = int(threadIdx.x) / kWarpSize * per_warp, end = begin + per_warp;
  RowSampler<Element, kCuts> s{{static_cast<const Element*>(p.logits) + int64_t(b) * p.V, p.V},
                               0,
                               p.scale,
                               *reinterpret_cast<SharedState*>(shared_memory()),
                               begin,
                               end < p.V ? end : p.V};

  float top = -INFINITY;
  s.for_each([&](float x) { top = fmaxf(top, x < INFINITY ? x : INFINITY); });  // NaN compares false
  s.top = top = s.block_max(top);
  if (top == INFINITY || top == -INFINITY) {
    if (threadIdx.x == 0) {
      p.tokens[b] = top > 0 ? kNotANumber : kNoToken;
      p.logprobs[b] = p.entropy[b] = 0;
    }
    return;
  }

  uint64_t total = 0;
  float t_weights = 0;
  s.for_each([&](float x) {
    const Weight w = weigh(x, top, p.scale);
    total += w.fixed;
    t_weights += w.t_weight;
  });
  const uint64_t own = total;
  total = s.block_sum(total);
  t_weights = s.block_sum(t_weights);
  const double sum_exp = double(total) * 0x1p-40;

  Cut cut{0, 0};
  uint64_t kept = total;
  if (kCuts && p.top_k) {
    cut.ties = uint64_t(p.top_k);
    cut.key = s.find_threshold(cut.ties, [](float, uint32_t) { return uint64_t(1); }, 0, 0);
    kept = s.kept_total(cut);
  }
  if (kCuts && p.top_p) {
    uint64_t need = top_p_need(p.top_p, kept);
    const auto measure = [&](float x, uint32_t key) {
      return key > cut.key ? weigh(x, top, p.scale).fixed : uint64_t(0);
    };
    const uint64_t tied = cut.ties ? cut.ties * s.weight_of_key(cut.key) : 0;
    const uint32_t key = s.find_threshold(need, measure, cut.key, tied);
    const uint64_t weight = s.weight_of_key(key);
    cut = {key, (need + weight - 1) / weight};
    kept = s.kept_total(cut);
  }
  const uint64_t draw = below(sample_bits(p.seed, uint64_t(p.rows[b]), uint32_t(p.steps[b])), kept);
  const int token = s.find_token(cut, draw, own);
  if (token < 0) return;
  const double log_total = log(sum_exp), logit = to_float(s.row.row[token]);
  p.tokens[b] = token;
  p.logprobs[b] = float((logit - top) / p.temperature - log_total);
  p.entropy[b] = float(log_total - kLn2Double * t_weights / sum_exp);
}

}  // namespace

void sample(const Sample& x, cudaStream_t stream) {
  if (x.B == 0) return;
  const bool by_k = x.top_k > 0 && x.top_k < x.V, by_p = x.top_p < 1;
  const SampleParams p{x.logits,
                       int(x.V),
                       x.rows,
                       x.steps,
                       x.seed,
                       by_p ? top_p_fixed(x.top_p) : 0,
                       by_k ? int(x.top_k) : 0,
                       weight_scale(x.temperature),
                       x.temperature,
                       x.tokens,
                       x.logprobs,
                       x.entropy};
  dispatch_dtype(x.dtype, "sample", [&](auto e) {
    using Element = decltype(e);
    const auto kernel = by_k || by_p ? sample_kernel<Element, true> : sample_kernel<Element, false>;
    launch(kernel, x.B, by_k || by_p ? kThreads<true> : kThreads<false>, sizeof(SharedState), stream, p);
  });
}

}  // namespace tinystory::cuda
