// Causal attention, forward: FlashAttention-2 (Dao 2023, arXiv 2307.08691).
//
// A block owns a tile of queries of one head, a warp 16 M of its rows. Tiles of keys and values stream past, the next
// one in flight while this one is used. Each row keeps its running maximum m and sum l; when m grows, what was summed
// so far shrinks by 2^(old m - new m). Scores are in units of log2, so that the exponential is the hardware's exp2.
#include "tiles.cuh"

namespace tinystory::cuda {
namespace {

template <class E, int D>
struct ForwardShape {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int M = sizeof(E) == 2 && D <= 64 ? 2 : 1;
  static constexpr int kQueries = kWarps * 16 * M;
  static constexpr int kKeys = sizeof(E) == 2 ? 64 : D <= 64 ? 32 : 16;
  static constexpr bool kKeepQueries = sizeof(E) == 2 && D == 32;
  static constexpr int kQueryBytes = kQueries * D * int(sizeof(E)), kStageBytes = kKeys * D * int(sizeof(E));
  static constexpr int kShared = kQueryBytes + 4 * kStageBytes;  // two stages of keys and values
  static_assert(kShared <= kMostShared);
};

template <class E, int D>
__global__ void __launch_bounds__(ForwardShape<E, D>::kThreads, 2) attention_forward_kernel(AttentionParams<E> p) {
  using S = ForwardShape<E, D>;
  constexpr int M = S::M, N = S::kKeys / 8;
  const int tiles = int(gridDim.x) / p.heads;
  // Late tiles see the most keys, so they start first.
  const int q0 = (tiles - 1 - int(blockIdx.x) / p.heads) * S::kQueries, head = int(blockIdx.x) % p.heads;
  const int stride = 3 * p.H * D;
  const E* q = p.qkv + p.template head_offset<D>(head, 3);
  const E *k = q + p.H * D, *v = k + p.H * D;

  const Tile<E, D> queries{0};
  const auto keys = [&](int stage) { return Tile<E, D>{S::kQueryBytes + 2 * stage * S::kStageBytes}; };
  const auto values = [&](int stage) { return Tile<E, D>{keys(stage).offset + S::kStageBytes}; };
  const auto load = [&](int tile) {
    const int k0 = tile * S::kKeys;
    load_rows<S::kKeys, S::kThreads>(keys(tile % 2), k + int64_t(k0) * stride, stride, p.T - k0);
    load_rows<S::kKeys, S::kThreads>(values(tile % 2), v + int64_t(k0) * stride, stride, p.T - k0);
  };

  load_rows<S::kQueries, S::kThreads>(queries, q + int64_t(q0) * stride, stride, p.T - q0);
  load(0);
  copy_commit();

  const int row0 = warp_id() * 16 * M, g = lane_id() / 4, t = lane_id() % 4;
  LeftRows<E, D, M, S::kKeepQueries> left{queries, row0, {}};
  float out[M][D / 8][4], high[M][2], sum[M][2];
  clear(out);
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) high[m][half] = -INFINITY, sum[m][half] = 0;

  const int end = q0 + S::kQueries < p.T ? q0 + S::kQueries : p.T, n_tiles = (end + S::kKeys - 1) / S::kKeys;
  for (int tile = 0; tile < n_tiles; ++tile) {
    const int k0 = tile * S::kKeys, first = q0 + row0;
    uint32_t kept[M];
    draw_kept<false, N>(kept, p.dropout, head, first, k0);
    copy_wait<0>();
    sync_block();  // this tile is there for all, and all are done with the one before, whose place the next may take
    if (tile == 0) left.keep();
    if (tile + 1 < n_tiles) load(tile + 1);
    copy_commit();

    if (k0 > first + 16 * M - 1) continue;  // this warp's queries see none of these keys
    float s[M][N][4];
    clear(s);
    multiply_rows(s, left, keys(tile % 2));
    if (k0 + S::kKeys - 1 > first) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (k0 + 8 * n + 2 * t + i % 2 > first + 16 * m + g + i / 2 * 8) s[m][n][i] = -INFINITY;
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = high[m][half];
#pragma unroll
        for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        top = warp_max<4>(top);
        const float shrink = exp2_fast((high[m][half] - top) * p.scale_log2), offset = top * p.scale_log2;
        high[m][half] = top;
        float total = 0;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = exp2_fast(fmaf(s[m][n][i], p.scale_log2, -offset));
            total += s[m][n][i];
          }
        sum[m][half] = sum[m][half] * shrink + total;  // of this lane's columns; a row's four lanes meet later
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) out[m][n][i] *= shrink;
      }
    if (p.dropout.threshold) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (!(kept[m] >> (4 * n + i) & 1)) s[m][n][i] = 0;
    }
    multiply_weights(out, s, values(tile % 2));
  }

  float* lse = p.lse + int64_t(head) * p.T + q0;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = warp_sum<4>(sum[m][half]), scale = (p.dropout.threshold ? p.dropout.scale : 1.0f) / total;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) out[m][n][i] *= scale;
      const int row = row0 + 16 * m + 8 * half + g;
      if (t == 0 && q0 + row < p.T) lse[row] = (high[m][half] * p.scale_log2 + log2_fast(total)) * kLn2;
    }
  const int out_stride = p.H * D;
  E* to = p.out + p.template head_offset<D>(head, 1) + int64_t(q0) * out_stride;
  store_rows<E, D, M>(out, queries, row0, to, out_stride, p.T - q0);
}

struct Forward {
  const Attention& x;
  cudaStream_t stream;
  template <class E, int D>
  void run() const {
    using S = ForwardShape<E, D>;
    launch(attention_forward_kernel<E, D>, x.B * x.H * ceil_div(x.T, S::kQueries), S::kThreads, S::kShared, stream,
           attention_params<E>(x, nullptr));
  }
};

}  // namespace

void attention_forward(const Attention& x, cudaStream_t stream) {
  if (x.B * x.H * x.T > 0) dispatch_attention(x.dtype, x.D, "causal_attention", Forward{x, stream});
}

}  // namespace tinystory::cuda
