// Decode-step attention: one new token per row attends to the row's KV cache, and the key and the value of the new
// token are appended to the cache. The time is bound by reading the cache once. The shared prefix is stored once and is
// small, so every row except the first reads the prefix from the L2 cache.
//
// A group of lanes reads one key, 16 bytes per lane. The groups of a block take the keys in turn, kUnroll at a time.
// Each group has its own running maximum m, sum l and output O; the partial results of the groups are merged at the
// end. If there are too few rows to fill the device, several blocks split the keys of a row (as in flash-decoding), and
// a second kernel merges their partial results.
#include "dispatch.cuh"

namespace tinystory::cuda {
namespace {

constexpr int kThreads = 128, kUnroll = 4;
constexpr int64_t kMinKeysPerSplit = 128;  // with fewer keys per block, the merge costs more than the split gains

struct DecodeParams {
  const void *qkv, *prefix;
  void* cache;
  const int64_t *spans, *lengths;
  void* out;
  float* partials;  // (B * H, splits, D + 2): O, m, l
  int64_t T;
  int P, H, splits;
  float scale_log2;
};

// Number of blocks that split the keys of a row. It is the same for all rows, because the host does not know the
// lengths.
int split_count(const DecodeAttention& x) {
  const int64_t rows = x.B * x.H, wanted = (int64_t(4) * multiprocessors() + rows - 1) / rows;
  const int64_t most = (x.P + x.T + kMinKeysPerSplit - 1) / kMinKeysPerSplit;
  return int(wanted < most ? wanted : most < 1 ? 1 : most);
}

// Merges `count` partial results (O, m, l), D + 2 floats each, and sets m and l. Thread d returns element d of the
// merged, unnormalised O.
template <int D>
__device__ __forceinline__ float merge_partials(const float* partials, int count, int d, float& m, float& l) {
  m = -INFINITY;
  for (int i = 0; i < count; ++i) m = fmaxf(m, partials[i * (D + 2) + D]);
  float O = 0;
  l = 0;
  for (int i = 0; i < count; ++i) {
    const float* part = partials + i * (D + 2);
    const float weight = m == -INFINITY ? 0 : exp2_fast(part[D] - m);  // -inf if no partial result has a key
    O = fmaf(part[d], weight, O);
    l = fmaf(part[D + 1], weight, l);
  }
  return O;
}

template <class Element, int D>
__global__ void __launch_bounds__(kThreads, 6) decode_kernel(DecodeParams p) {
  constexpr int kVec = kVecElements<Element>, kLanes = D / kVec, kGroups = kThreads / kLanes;
  const int row = int(blockIdx.x) / p.splits, split = int(blockIdx.x) % p.splits, b = row / p.H, h = row % p.H;
  const int lane = int(threadIdx.x) % kLanes, group = int(threadIdx.x) / kLanes;
  const int64_t length = p.lengths[b], span = p.spans[2 * b], prefix_end = p.spans[2 * b + 1];
  require(length >= 0 && length < p.T, "decode_attention: an entry of lengths is not in 0 .. T_max - 1");
  require(span >= 0 && span <= prefix_end && prefix_end <= p.P, "decode_attention: an entry of spans is not in 0 .. P");
  const int P = int(prefix_end - span), cached = P + int(length), keys = cached + 1;  // the last key is the new token's
  const int keys_per_split = (keys + p.splits - 1) / p.splits;
  const int begin = split * keys_per_split,
            end = (split + 1) * keys_per_split < keys ? (split + 1) * keys_per_split : keys;
  const int64_t stride = int64_t(p.H) * D, own_vec = h * D + lane * kVec;
  const Element* prefix = static_cast<const Element*>(p.prefix) + own_vec;
  Element* cache = static_cast<Element*>(p.cache) + 2 * b * p.T * stride + own_vec;
  const Element* query = static_cast<const Element*>(p.qkv) + 3 * b * stride + own_vec;
  if (split == 0 && group < 2)  // append the new key and value; no block reads them from the cache
    store16(cache + (2 * length + group) * stride, load16(query + (1 + group) * stride));

  float q[kVec], O[kVec];
  unpack(q, load16(query), Element{});
#pragma unroll
  for (int i = 0; i < kVec; ++i) q[i] *= p.scale_log2, O[i] = 0;
  float m = -INFINITY, l = 0;
  // All groups make the same number of iterations, so that all lanes of a warp reach the shuffles.
  for (int j0 = begin; j0 < end; j0 += kGroups * kUnroll) {
    Vec16 key[kUnroll], value[kUnroll];
    float s[kUnroll], m_new = m;
    bool has_nan = false;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int j = j0 + u * kGroups + group;
      key[u] = value[u] = {};
      if (j < end) {
        const Element* at = j < P        ? prefix + 2 * (span + j) * stride
                            : j < cached ? cache + 2 * (j - P) * stride
                                         : query + stride;
        key[u] = load16(at);
        value[u] = load16(at + stride);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[kVec], dot = 0;
      unpack(x, key[u], Element{});
#pragma unroll
      for (int i = 0; i < kVec; ++i) dot = fmaf(q[i], x[i], dot);
      dot = warp_sum<kLanes>(dot);
      s[u] = j0 + u * kGroups + group < end ? dot : -INFINITY;
      m_new = fmaxf(m_new, s[u]);
      has_nan |= s[u] != s[u];  // fmaxf ignores NaN
    }
    // A group without a key so far has nothing to add. No shuffle follows in this iteration.
    if (m_new == -INFINITY && !has_nan) continue;
    const float rescale = exp2_fast(m - m_new);
    m = m_new;
    l *= rescale;
#pragma unroll
    for (int i = 0; i < kVec; ++i) O[i] *= rescale;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[kVec];
      unpack(x, value[u], Element{});
      const float weight = exp2_fast(s[u] - m_new);
      l += weight;
#pragma unroll
      for (int i = 0; i < kVec; ++i) O[i] = fmaf(weight, x[i], O[i]);
    }
  }

  float* groups = reinterpret_cast<float*>(shared_memory());  // (kGroups, D + 2)
  float* own = groups + group * (D + 2);
#pragma unroll
  for (int i = 0; i < kVec; ++i) own[lane * kVec + i] = O[i];
  if (lane == 0) own[D] = m, own[D + 1] = l;
  sync_block();
  const int d = int(threadIdx.x);
  if (d >= D) return;
  const float merged = merge_partials<D>(groups, kGroups, d, m, l);
  if (p.splits == 1) {
    static_cast<Element*>(p.out)[int64_t(row) * D + d] = from_float<Element>(merged / l);
  } else {
    float* part = p.partials + int64_t(blockIdx.x) * (D + 2);
    part[d] = merged;
    if (d == 0) part[D] = m, part[D + 1] = l;
  }
}

template <class Element, int D>
__global__ void __launch_bounds__(D) merge_kernel(DecodeParams p) {
  const int row = int(blockIdx.x), d = int(threadIdx.x);
  float m, l;
  const float merged = merge_partials<D>(p.partials + int64_t(row) * p.splits * (D + 2), p.splits, d, m, l);
  static_cast<Element*>(p.out)[int64_t(row) * D + d] = from_float<Element>(merged / l);
}

struct Decode {
  const DecodeAttention& x;
  int splits;
  float* workspace;
  cudaStream_t stream;
  template <class Element, int D>
  void run() const {
    const DecodeParams p{.qkv = x.qkv,
                         .prefix = x.prefix,
                         .cache = x.cache,
                         .spans = x.spans,
                         .lengths = x.lengths,
                         .out = x.out,
                         .partials = workspace,
                         .T = x.T,
                         .P = int(x.P),
                         .H = int(x.H),
                         .splits = splits,
                         .scale_log2 = float(1.4426950408889634 / std::sqrt(double(D)))};
    constexpr int kGroups = kThreads / (D / kVecElements<Element>);
    launch(decode_kernel<Element, D>, x.B * x.H * splits, kThreads, kGroups * (D + 2) * 4, stream, p);
    if (splits > 1) launch(merge_kernel<Element, D>, x.B * x.H, D, 0, stream, p);
  }
};

}  // namespace

int64_t decode_attention_workspace(const DecodeAttention& x) {
  if (x.B * x.H == 0) return 0;
  const int64_t splits = split_count(x);
  return splits == 1 ? 0 : x.B * x.H * splits * (x.D + 2);
}

void decode_attention(const DecodeAttention& x, float* workspace, cudaStream_t stream) {
  if (x.B * x.H == 0) return;
  dispatch_attention(x.dtype, x.D, "decode_attention", Decode{x, split_count(x), workspace, stream});
}

}  // namespace tinystory::cuda
