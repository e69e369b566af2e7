// Attention of one new token a row over a key-value cache, bound by reading the cache once. The shared prefix lies in
// memory once and is small, so that all rows but the first find it in the L2 cache.
//
// A key is read by as many lanes as it has pieces of 16 bytes; such a group takes every so many-th key, four at a time,
// and keeps its own running maximum, sum and output. The block's groups are merged at the end. When there are too few
// rows to fill the device, several blocks share a row's keys, and a second kernel merges what they found.
#include "dispatch.cuh"

namespace tinystory::cuda {
namespace {

constexpr int kThreads = 128, kAtOnce = 4;
constexpr int64_t kLeastKeys = 128;  // a block's share is not worth its merging below this

struct DecodeParams {
  const void *qkv, *prefix;
  void* cache;
  const int64_t* lengths;
  void* out;
  float* parts;  // (B * H, splits, D + 2): output, maximum, sum
  int64_t T;
  int P, H, splits;
  float scale_log2;
};

// Splits of each row's keys. The same for all rows: the lengths are on the device.
int count_splits(const DecodeAttention& x) {
  const int64_t rows = x.B * x.H, wanted = (int64_t(4) * multiprocessors() + rows - 1) / rows;
  const int64_t most = (x.P + x.T + kLeastKeys - 1) / kLeastKeys;
  return int(wanted < most ? wanted : most < 1 ? 1 : most);
}

// Merges `count` partial results that lie `D + 2` floats apart: what thread d returns is the whole's output d.
template <int D>
__device__ __forceinline__ float merge(const float* parts, int count, int d, float& high, float& sum) {
  high = -INFINITY;
  for (int i = 0; i < count; ++i) high = fmaxf(high, parts[i * (D + 2) + D]);
  float out = 0;
  sum = 0;
  for (int i = 0; i < count; ++i) {
    const float* part = parts + i * (D + 2);
    const float weight = high == -INFINITY ? 0 : exp2_fast(part[D] - high);  // a part may have had no keys
    out = fmaf(part[d], weight, out);
    sum = fmaf(part[D + 1], weight, sum);
  }
  return out;
}

template <class E, int D>
__global__ void __launch_bounds__(kThreads, 6) decode_kernel(DecodeParams p) {
  constexpr int kPiece = kPerVec16<E>, kLanes = D / kPiece, kGroups = kThreads / kLanes;
  const int row = int(blockIdx.x) / p.splits, split = int(blockIdx.x) % p.splits, b = row / p.H, h = row % p.H;
  const int lane = int(threadIdx.x) % kLanes, group = int(threadIdx.x) / kLanes;
  const int64_t length = p.lengths[b];
  require(length >= 0 && length < p.T, "decode_attention: an entry of lengths is not in 0 .. T_max - 1");
  const int cached = p.P + int(length), keys = cached + 1;  // the last is its own
  const int share = (keys + p.splits - 1) / p.splits;
  const int begin = split * share, end = (split + 1) * share < keys ? (split + 1) * share : keys;
  const int64_t stride = int64_t(p.H) * D, own_piece = h * D + lane * kPiece;
  const E* prefix = static_cast<const E*>(p.prefix) + own_piece;
  E* cache = static_cast<E*>(p.cache) + 2 * b * p.T * stride + own_piece;
  const E* query = static_cast<const E*>(p.qkv) + 3 * b * stride + own_piece;
  if (split == 0 && group < 2)  // appends the key and the value, which no block reads from there
    store16(cache + (2 * length + group) * stride, load16(query + (1 + group) * stride));

  float q[kPiece], out[kPiece];
  unpack(q, load16(query), E{});
#pragma unroll
  for (int i = 0; i < kPiece; ++i) q[i] *= p.scale_log2, out[i] = 0;
  float high = -INFINITY, sum = 0;
  // All groups go round as often, so that the lanes of a warp stay together for the shuffles.
  for (int j0 = begin; j0 < end; j0 += kGroups * kAtOnce) {
    Vec16 key[kAtOnce], value[kAtOnce];
    float s[kAtOnce], top = high;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int j = j0 + u * kGroups + group;
      key[u] = value[u] = {};
      if (j < end) {
        const E* at = j < p.P      ? prefix + 2 * j * stride
                      : j < cached ? cache + 2 * (j - p.P) * stride
                                   : query + stride;
        key[u] = load16(at);
        value[u] = load16(at + stride);
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      float x[kPiece], dot = 0;
      unpack(x, key[u], E{});
#pragma unroll
      for (int i = 0; i < kPiece; ++i) dot = fmaf(q[i], x[i], dot);
      dot = warp_sum<kLanes>(dot);
      s[u] = j0 + u * kGroups + group < end ? dot : -INFINITY;
      top = fmaxf(top, s[u]);
    }
    if (top == -INFINITY) continue;  // no key for this group; no shuffle follows
    const float shrink = exp2_fast(high - top);
    high = top;
    sum *= shrink;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) out[i] *= shrink;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      float x[kPiece];
      unpack(x, value[u], E{});
      const float weight = exp2_fast(s[u] - top);
      sum += weight;
#pragma unroll
      for (int i = 0; i < kPiece; ++i) out[i] = fmaf(weight, x[i], out[i]);
    }
  }

  float* groups = reinterpret_cast<float*>(shared_memory());  // (kGroups, D + 2)
  float* own = groups + group * (D + 2);
#pragma unroll
  for (int i = 0; i < kPiece; ++i) own[lane * kPiece + i] = out[i];
  if (lane == 0) own[D] = high, own[D + 1] = sum;
  sync_block();
  const int d = int(threadIdx.x);
  if (d >= D) return;
  const float whole = merge<D>(groups, kGroups, d, high, sum);
  if (p.splits == 1) {
    static_cast<E*>(p.out)[int64_t(row) * D + d] = from_float<E>(whole / sum);
  } else {
    float* part = p.parts + int64_t(blockIdx.x) * (D + 2);
    part[d] = whole;
    if (d == 0) part[D] = high, part[D + 1] = sum;
  }
}

template <class E, int D>
__global__ void __launch_bounds__(D) merge_kernel(DecodeParams p) {
  const int row = int(blockIdx.x), d = int(threadIdx.x);
  float high, sum;
  const float whole = merge<D>(p.parts + int64_t(row) * p.splits * (D + 2), p.splits, d, high, sum);
  static_cast<E*>(p.out)[int64_t(row) * D + d] = from_float<E>(whole / sum);
}

struct Decode {
  const DecodeAttention& x;
  int splits;
  float* workspace;
  cudaStream_t stream;
  template <class E, int D>
  void run() const {
    const DecodeParams p{x.qkv,
                         x.prefix,
                         x.cache,
                         x.lengths,
                         x.out,
                         workspace,
                         x.T,
                         int(x.P),
                         int(x.H),
                         splits,
                         float(1.4426950408889634 / std::sqrt(double(D)))};
    constexpr int kGroups = kThreads / (D / kPerVec16<E>);
    launch(decode_kernel<E, D>, x.B * x.H * splits, kThreads, kGroups * (D + 2) * 4, stream, p);
    if (splits > 1) launch(merge_kernel<E, D>, x.B * x.H, D, 0, stream, p);
  }
};

}  // namespace

int64_t decode_attention_workspace(const DecodeAttention& x) {
  if (x.B * x.H == 0) return 0;
  const int64_t splits = count_splits(x);
  return splits == 1 ? 0 : x.B * x.H * splits * (x.D + 2);
}

void decode_attention(const DecodeAttention& x, float* workspace, cudaStream_t stream) {
  if (x.B * x.H == 0) return;
  dispatch_attention(x.dtype, x.D, "decode_attention", Decode{x, count_splits(x), workspace, stream});
}

}  // namespace tinystory::cuda
