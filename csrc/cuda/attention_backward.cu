// Causal attention, backward, in two passes: one block a tile of queries for their gradient, then one block a tile of
// keys for those of keys and values. Each computes the weights again from the log-sum-exp. A single pass would save two
// of the seven products, but its blocks would have to add up the queries' gradient with atomics, in an order that
// changes from run to run; here every sum has one owner and one order.
//
// With p the weights, w what dropout made of them (0 or p times a scale) and dp the gradient of p through it:
//   delta = sum of out * grad_out,  ds = p (dp - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = w^T grad_out.
#include "tiles.cuh"

namespace tinystory::cuda {
namespace {

// A block's own rows, 16 M a warp, and the columns that stream past, two stages of them.
template <class E, int D>
struct BackwardShape {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int M = sizeof(E) == 2 && D <= 64 ? 2 : 1;
  static constexpr int kRows = kWarps * 16 * M;
  static constexpr int kColumns = sizeof(E) == 2 ? 32 : 16;
  static constexpr int kRowBytes = kRows * D * int(sizeof(E)), kStageBytes = kColumns * D * int(sizeof(E));
  static constexpr int kShared = 2 * kRowBytes + 4 * kStageBytes;
  static constexpr int kStatBytes = kColumns * 4;  // of one number a query, in the pass for keys
  static_assert(kShared + 4 * kStatBytes <= kMostShared);
};

// delta of a block's queries.
template <class E, int D>
__device__ __forceinline__ void find_delta(const AttentionParams<E>& p, int head, int q0) {
  using S = BackwardShape<E, D>;
  constexpr int kLanes = Tile<E, D>::kChunks, kStep = S::kThreads / kLanes;
  const int c = int(threadIdx.x) % kLanes * kPerVec16<E>;
  for (int row = int(threadIdx.x) / kLanes; row < S::kRows; row += kStep) {
    const int64_t at = ((int64_t(head / p.H) * p.T + q0 + row) * p.H + head % p.H) * D + c;
    float sum = 0;
    if (q0 + row < p.T) {
      float o[kPerVec16<E>], g[kPerVec16<E>];
      unpack(o, load16(p.out + at), E{});
      unpack(g, load16(p.grad_out + at), E{});
#pragma unroll
      for (int i = 0; i < kPerVec16<E>; ++i) sum = fmaf(o[i], g[i], sum);
    }
    sum = warp_sum<kLanes>(sum);
    if (c == 0 && q0 + row < p.T) p.delta[int64_t(head) * p.T + q0 + row] = sum;
  }
}

template <class E, int D>
__global__ void __launch_bounds__(BackwardShape<E, D>::kThreads, 2) queries_gradient_kernel(AttentionParams<E> p) {
  using S = BackwardShape<E, D>;
  constexpr int M = S::M, N = S::kColumns / 8;
  const int tiles = int(gridDim.x) / p.heads;
  const int q0 = (tiles - 1 - int(blockIdx.x) / p.heads) * S::kRows, head = int(blockIdx.x) % p.heads;
  const int stride = 3 * p.H * D, out_stride = p.H * D;
  const E *q = p.qkv + p.template head_offset<D>(head, 3), *k = q + out_stride, *v = k + out_stride;
  const E* grad_out = p.grad_out + p.template head_offset<D>(head, 1);

  const Tile<E, D> queries{0}, grads{S::kRowBytes};
  const auto keys = [&](int stage) { return Tile<E, D>{2 * S::kRowBytes + 2 * stage * S::kStageBytes}; };
  const auto values = [&](int stage) { return Tile<E, D>{keys(stage).offset + S::kStageBytes}; };
  const auto load = [&](int tile) {
    const int k0 = tile * S::kColumns;
    load_rows<S::kColumns, S::kThreads>(keys(tile % 2), k + int64_t(k0) * stride, stride, p.T - k0);
    load_rows<S::kColumns, S::kThreads>(values(tile % 2), v + int64_t(k0) * stride, stride, p.T - k0);
  };
  load_rows<S::kRows, S::kThreads>(queries, q + int64_t(q0) * stride, stride, p.T - q0);
  load_rows<S::kRows, S::kThreads>(grads, grad_out + int64_t(q0) * out_stride, out_stride, p.T - q0);
  load(0);
  copy_commit();
  find_delta<E, D>(p, head, q0);
  sync_block();

  const int row0 = warp_id() * 16 * M, first = q0 + row0, g = lane_id() / 4, t = lane_id() % 4;
  const LeftRows<E, D, M, false> left_queries{queries, row0, {}}, left_grads{grads, row0, {}};
  float dq[M][D / 8][4], lse2[M][2], delta[M][2];
  clear(dq);
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 16 * m + 8 * half + g;  // one past the end has a gradient of zeros, whatever its weights
      lse2[m][half] = row < p.T ? p.lse[int64_t(head) * p.T + row] * kLog2e : 0;
      delta[m][half] = row < p.T ? p.delta[int64_t(head) * p.T + row] : 0;
    }

  const int end = q0 + S::kRows < p.T ? q0 + S::kRows : p.T, n_tiles = (end + S::kColumns - 1) / S::kColumns;
  for (int tile = 0; tile < n_tiles; ++tile) {
    const int k0 = tile * S::kColumns;
    uint32_t kept[M];
    draw_kept<false, N>(kept, p.dropout, head, first, k0);
    copy_wait<0>();
    sync_block();
    if (tile + 1 < n_tiles) load(tile + 1);
    copy_commit();
    if (k0 > first + 16 * M - 1) continue;

    float s[M][N][4], dp[M][N][4];
    clear(s);
    multiply_rows(s, left_queries, keys(tile % 2));
    clear(dp);
    multiply_rows(dp, left_grads, values(tile % 2));
    const bool diagonal = k0 + S::kColumns - 1 > first;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float weight = exp2_fast(fmaf(s[m][n][i], p.scale_log2, -lse2[m][i / 2]));
          if (diagonal && k0 + 8 * n + 2 * t + i % 2 > first + 16 * m + g + i / 2 * 8) weight = 0;
          const float gradient = kept[m] >> (4 * n + i) & 1 ? dp[m][n][i] * p.dropout.scale : 0;
          s[m][n][i] = weight * (gradient - delta[m][i / 2]);
        }
    multiply_weights(dq, s, keys(tile % 2));
  }

#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) dq[m][n][i] *= p.scale;
  E* to = p.grad_qkv + p.template head_offset<D>(head, 3) + int64_t(q0) * stride;
  store_rows<E, D, M>(dq, queries, row0, to, stride, p.T - q0);
}

template <class E, int D>
__global__ void __launch_bounds__(BackwardShape<E, D>::kThreads, 2) keys_gradient_kernel(AttentionParams<E> p) {
  using S = BackwardShape<E, D>;
  constexpr int M = S::M, N = S::kColumns / 8;
  // The first keys are seen by the most queries, so they start first.
  const int k0 = int(blockIdx.x) / p.heads * S::kRows, head = int(blockIdx.x) % p.heads;
  const int stride = 3 * p.H * D, out_stride = p.H * D;
  const E *q = p.qkv + p.template head_offset<D>(head, 3), *grad_out = p.grad_out + p.template head_offset<D>(head, 1);
  const int64_t stat = int64_t(head) * p.T;

  const Tile<E, D> keys{0}, values{S::kRowBytes};
  const auto queries = [&](int stage) { return Tile<E, D>{2 * S::kRowBytes + 2 * stage * S::kStageBytes}; };
  const auto grads = [&](int stage) { return Tile<E, D>{queries(stage).offset + S::kStageBytes}; };
  const auto stats = [&](int stage) {  // log-sum-exp of each query, then delta of each
    return reinterpret_cast<float*>(shared_memory() + S::kShared + 2 * stage * S::kStatBytes);
  };
  const auto load = [&](int tile) {
    const int q0 = tile * S::kColumns, i = recomputed(int(threadIdx.x));
    load_rows<S::kColumns, S::kThreads>(queries(tile % 2), q + int64_t(q0) * stride, stride, p.T - q0);
    load_rows<S::kColumns, S::kThreads>(grads(tile % 2), grad_out + int64_t(q0) * out_stride, out_stride, p.T - q0);
    if (i < S::kColumns) {
      copy_async4(stats(tile % 2) + i, p.lse + stat + q0 + i, q0 + i < p.T);
      copy_async4(stats(tile % 2) + S::kColumns + i, p.delta + stat + q0 + i, q0 + i < p.T);
    }
  };
  const int first_tile = k0 / S::kColumns, n_tiles = (p.T + S::kColumns - 1) / S::kColumns;
  load_rows<S::kRows, S::kThreads>(keys, q + out_stride + int64_t(k0) * stride, stride, p.T - k0);
  load_rows<S::kRows, S::kThreads>(values, q + 2 * out_stride + int64_t(k0) * stride, stride, p.T - k0);
  load(first_tile);
  copy_commit();

  const int row0 = warp_id() * 16 * M, first = k0 + row0;
  const LeftRows<E, D, M, false> left_keys{keys, row0, {}}, left_values{values, row0, {}};
  float dk[M][D / 8][4], dv[M][D / 8][4];
  clear(dk);
  clear(dv);
  for (int tile = first_tile; tile < n_tiles; ++tile) {
    const int q0 = tile * S::kColumns;
    uint32_t kept[M];
    draw_kept<true, N>(kept, p.dropout, head, first, q0);
    copy_wait<0>();
    sync_block();
    if (tile + 1 < n_tiles) load(tile + 1);
    copy_commit();
    if (q0 + S::kColumns - 1 < first) continue;  // these queries see none of this warp's keys

    // Rows are keys, columns queries. A query past the end is zeros, and so are its gradient and delta: no effect.
    float s[M][N][4], dp[M][N][4];
    clear(s);
    multiply_rows(s, left_keys, queries(tile % 2));
    clear(dp);
    multiply_rows(dp, left_values, grads(tile % 2));
    const int lane = recomputed(lane_id()), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int column = 8 * n + 2 * t + odd;
        const float lse2 = stats(tile % 2)[column] * kLog2e, own_delta = stats(tile % 2)[S::kColumns + column];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int i = odd; i < 4; i += 2) {
            float weight = exp2_fast(fmaf(s[m][n][i], p.scale_log2, -lse2));
            if (q0 + column < first + 16 * m + g + i / 2 * 8) weight = 0;
            const float keep = kept[m] >> (4 * n + i) & 1 ? p.dropout.scale : 0;
            s[m][n][i] = weight * keep;
            dp[m][n][i] = weight * (dp[m][n][i] * keep - own_delta);
          }
      }
    multiply_weights(dv, s, grads(tile % 2));
    multiply_weights(dk, dp, queries(tile % 2));
  }

#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) dk[m][n][i] *= p.scale;
  const int head_again = recomputed(int(blockIdx.x)) % p.heads;  // the loop has no register to hold the address
  E* grad_keys = p.grad_qkv + p.template head_offset<D>(head_again, 3) + out_stride + int64_t(k0) * stride;
  store_rows<E, D, M>(dk, keys, row0, grad_keys, stride, p.T - k0);
  store_rows<E, D, M>(dv, values, row0, grad_keys + out_stride, stride, p.T - k0);
}

struct Backward {
  const Attention& x;
  float* delta;
  cudaStream_t stream;
  template <class E, int D>
  void run() const {
    using S = BackwardShape<E, D>;
    const auto params = attention_params<E>(x, delta);
    const int64_t blocks = x.B * x.H * ceil_div(x.T, S::kRows);
    launch(queries_gradient_kernel<E, D>, blocks, S::kThreads, S::kShared, stream, params);
    launch(keys_gradient_kernel<E, D>, blocks, S::kThreads, S::kShared + 4 * S::kStatBytes, stream, params);
  }
};

}  // namespace

void attention_backward(const Attention& x, float* delta, cudaStream_t stream) {
  if (x.B * x.H * x.T > 0) dispatch_attention(x.dtype, x.D, "causal_attention", Backward{x, delta, stream});
}

}  // namespace tinystory::cuda
