// Causal attention, backward (FlashAttention-2), in two passes: dQ with one block per tile of queries, then dK and dV
// with one block per tile of keys. Each pass recomputes P from the log-sum-exp. A single pass would save two of the
// seven GEMMs, but its blocks would have to accumulate dQ with atomics, in an order that changes from run to run; here
// every sum has one owner and one order, so gradients are deterministic.
//
// With Z the dropout mask times its scale:
//   delta = rowsum(O * dO),  dP = Z * (dO V^T),  dS = P * (dP - delta),
//   dQ = scale dS K,  dK = scale dS^T Q,  dV = (Z * P)^T dO.
#include "tiles.cuh"

namespace tinystory::cuda {
namespace {

// A block owns kRows rows, 16 * kMmaM per warp; tiles of kColumns columns stream past in two stages.
template <class Element, int D>
struct BackwardPolicy {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kMmaM = sizeof(Element) == 2 && D <= 64 ? 2 : 1;
  static constexpr int kRows = kWarps * 16 * kMmaM;
  static constexpr int kColumns = sizeof(Element) == 2 ? 32 : 16;
  static constexpr int kRowBytes = kRows * D * int(sizeof(Element)), kStageBytes = kColumns * D * int(sizeof(Element));
  static constexpr int kShared = 2 * kRowBytes + 4 * kStageBytes;
  static constexpr int kStatBytes = kColumns * 4;  // one float per query of a tile, in the dK, dV pass
  static_assert(kShared + 4 * kStatBytes <= kMaxSharedBytes);
};

// Writes delta of the block's queries.
template <class Element, int D>
__device__ __forceinline__ void compute_delta(const AttentionParams<Element>& p, int head, int q0) {
  using Policy = BackwardPolicy<Element, D>;
  constexpr int kLanes = Tile<Element, D>::kChunks, kStep = Policy::kThreads / kLanes;
  const int c = int(threadIdx.x) % kLanes * kVecElements<Element>;
  for (int row = int(threadIdx.x) / kLanes; row < Policy::kRows; row += kStep) {
    const int64_t at = ((int64_t(head / p.H) * p.T + q0 + row) * p.H + head % p.H) * D + c;
    float sum = 0;
    if (q0 + row < p.T) {
      float o[kVecElements<Element>], g[kVecElements<Element>];
      unpack(o, load16(p.out + at), Element{});
      unpack(g, load16(p.grad_out + at), Element{});
#pragma unroll
      for (int i = 0; i < kVecElements<Element>; ++i) sum = fmaf(o[i], g[i], sum);
    }
    sum = warp_sum<kLanes>(sum);
    if (c == 0 && q0 + row < p.T) p.delta[int64_t(head) * p.T + q0 + row] = sum;
  }
}

template <class Element, int D>
__global__ void __launch_bounds__(BackwardPolicy<Element, D>::kThreads, 2) dq_kernel(AttentionParams<Element> p) {
  using Policy = BackwardPolicy<Element, D>;
  constexpr int kMmaM = Policy::kMmaM, kMmaN = Policy::kColumns / 8;
  const int query_tiles = int(gridDim.x) / p.heads;
  const int q0 = (query_tiles - 1 - int(blockIdx.x) / p.heads) * Policy::kRows, head = int(blockIdx.x) % p.heads;
  const int stride = 3 * p.H * D, out_stride = p.H * D;
  const Element *q = p.qkv + p.template head_offset<D>(head, 3), *k = q + out_stride, *v = k + out_stride;
  const Element* grad_out = p.grad_out + p.template head_offset<D>(head, 1);

  const Tile<Element, D> queries{0}, grads{Policy::kRowBytes};
  const auto keys = [&](int stage) {
    return Tile<Element, D>{2 * Policy::kRowBytes + 2 * stage * Policy::kStageBytes};
  };
  const auto values = [&](int stage) { return Tile<Element, D>{keys(stage).offset + Policy::kStageBytes}; };
  const auto load = [&](int tile) {
    const int k0 = tile * Policy::kColumns;
    load_rows<Policy::kColumns, Policy::kThreads>(keys(tile % 2), k + int64_t(k0) * stride, stride, p.T - k0);
    load_rows<Policy::kColumns, Policy::kThreads>(values(tile % 2), v + int64_t(k0) * stride, stride, p.T - k0);
  };
  load_rows<Policy::kRows, Policy::kThreads>(queries, q + int64_t(q0) * stride, stride, p.T - q0);
  load_rows<Policy::kRows, Policy::kThreads>(grads, grad_out + int64_t(q0) * out_stride, out_stride, p.T - q0);
  load(0);
  copy_commit();
  compute_delta<Element, D>(p, head, q0);
  sync_block();

  const int row0 = warp_id() * 16 * kMmaM, first = q0 + row0, g = lane_id() / 4, t = lane_id() % 4;
  const LeftOperand<Element, D, kMmaM, false> Q{queries, row0, {}}, dO{grads, row0, {}};
  float dQ[kMmaM][D / 8][4], lse2[kMmaM][2], delta[kMmaM][2];
  clear(dQ);
#pragma unroll
  for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 16 * mi + 8 * half + g;  // past the end dO = 0, so any finite values do
      lse2[mi][half] = row < p.T ? p.lse[int64_t(head) * p.T + row] * kLog2e : 0;
      delta[mi][half] = row < p.T ? p.delta[int64_t(head) * p.T + row] : 0;
    }

  const int end = q0 + Policy::kRows < p.T ? q0 + Policy::kRows : p.T,
            n_tiles = (end + Policy::kColumns - 1) / Policy::kColumns;
  for (int tile = 0; tile < n_tiles; ++tile) {
    const int k0 = tile * Policy::kColumns;
    uint32_t keep_mask[kMmaM];
    draw_keep_masks<false, kMmaN>(keep_mask, p.dropout, head, first, k0);
    copy_wait<0>();
    sync_block();
    if (tile + 1 < n_tiles) load(tile + 1);
    copy_commit();
    if (k0 > first + 16 * kMmaM - 1) continue;

    float S[kMmaM][kMmaN][4], dP[kMmaM][kMmaN][4];
    clear(S);
    gemm_ss(S, Q, keys(tile % 2));
    clear(dP);
    gemm_ss(dP, dO, values(tile % 2));
    if (k0 + Policy::kColumns - 1 > first) {
#pragma unroll
      for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
        for (int ni = 0; ni < kMmaN; ++ni)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (k0 + 8 * ni + 2 * t + i % 2 > first + 16 * mi + g + i / 2 * 8) S[mi][ni][i] = -INFINITY;
    }
    if (p.dropout.threshold) apply_dropout(dP, keep_mask, p.dropout.scale);
    auto& dS = S;  // in place
#pragma unroll
    for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
      for (int ni = 0; ni < kMmaN; ++ni)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float P = exp2_fast(fmaf(S[mi][ni][i], p.scale_log2, -lse2[mi][i / 2]));
          dS[mi][ni][i] = P * (dP[mi][ni][i] - delta[mi][i / 2]);
        }
    gemm_rs(dQ, dS, keys(tile % 2));
  }

#pragma unroll
  for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
    for (int ni = 0; ni < D / 8; ++ni)
#pragma unroll
      for (int i = 0; i < 4; ++i) dQ[mi][ni][i] *= p.scale;
  Element* to = p.grad_qkv + p.template head_offset<D>(head, 3) + int64_t(q0) * stride;
  store_rows<Element, D, kMmaM>(dQ, queries, row0, to, stride, p.T - q0);
}

template <class Element, int D>
__global__ void __launch_bounds__(BackwardPolicy<Element, D>::kThreads, 2) dkdv_kernel(AttentionParams<Element> p) {
  using Policy = BackwardPolicy<Element, D>;
  constexpr int kMmaM = Policy::kMmaM, kMmaN = Policy::kColumns / 8;
  // The first keys are visible to the most queries, so they start first.
  const int k0 = int(blockIdx.x) / p.heads * Policy::kRows, head = int(blockIdx.x) % p.heads;
  const int stride = 3 * p.H * D, out_stride = p.H * D;
  const Element *q = p.qkv + p.template head_offset<D>(head, 3),
                *grad_out = p.grad_out + p.template head_offset<D>(head, 1);
  const int64_t first_stat = int64_t(head) * p.T;

  const Tile<Element, D> keys{0}, values{Policy::kRowBytes};
  const auto queries = [&](int stage) {
    return Tile<Element, D>{2 * Policy::kRowBytes + 2 * stage * Policy::kStageBytes};
  };
  const auto grads = [&](int stage) { return Tile<Element, D>{queries(stage).offset + Policy::kStageBytes}; };
  const auto stats = [&](int stage) {  // the tile's log-sum-exps, then its deltas
    return reinterpret_cast<float*>(shared_memory() + Policy::kShared + 2 * stage * Policy::kStatBytes);
  };
  const auto load = [&](int tile) {
    const int q0 = tile * Policy::kColumns, i = recomputed(int(threadIdx.x));
    load_rows<Policy::kColumns, Policy::kThreads>(queries(tile % 2), q + int64_t(q0) * stride, stride, p.T - q0);
    load_rows<Policy::kColumns, Policy::kThreads>(grads(tile % 2), grad_out + int64_t(q0) * out_stride, out_stride,
                                                  p.T - q0);
    if (i < Policy::kColumns) {
      copy_async4(stats(tile % 2) + i, p.lse + first_stat + q0 + i, q0 + i < p.T);
      copy_async4(stats(tile % 2) + Policy::kColumns + i, p.delta + first_stat + q0 + i, q0 + i < p.T);
    }
  };
  const int first_tile = k0 / Policy::kColumns, n_tiles = (p.T + Policy::kColumns - 1) / Policy::kColumns;
  load_rows<Policy::kRows, Policy::kThreads>(keys, q + out_stride + int64_t(k0) * stride, stride, p.T - k0);
  load_rows<Policy::kRows, Policy::kThreads>(values, q + 2 * out_stride + int64_t(k0) * stride, stride, p.T - k0);
  load(first_tile);
  copy_commit();

  const int row0 = warp_id() * 16 * kMmaM, first = k0 + row0;
  const LeftOperand<Element, D, kMmaM, false> K{keys, row0, {}}, V{values, row0, {}};
  float dK[kMmaM][D / 8][4], dV[kMmaM][D / 8][4];
  clear(dK);
  clear(dV);
  for (int tile = first_tile; tile < n_tiles; ++tile) {
    const int q0 = tile * Policy::kColumns;
    uint32_t keep_mask[kMmaM];
    draw_keep_masks<true, kMmaN>(keep_mask, p.dropout, head, first, q0);
    copy_wait<0>();
    sync_block();
    if (tile + 1 < n_tiles) load(tile + 1);
    copy_commit();
    if (q0 + Policy::kColumns - 1 < first) continue;  // causality: none of this warp's keys is visible to these queries

    // S and dP are transposed here: rows are keys, columns are queries. A query past the end has q, dO and delta zero,
    // so it contributes nothing.
    float S[kMmaM][kMmaN][4], dP[kMmaM][kMmaN][4];
    clear(S);
    gemm_ss(S, K, queries(tile % 2));
    clear(dP);
    gemm_ss(dP, V, grads(tile % 2));
    if (q0 < first + 16 * kMmaM - 1) {
      const int lane = recomputed(lane_id()), g = lane / 4, t = lane % 4;
#pragma unroll
      for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
        for (int ni = 0; ni < kMmaN; ++ni)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (q0 + 8 * ni + 2 * t + i % 2 < first + 16 * mi + g + i / 2 * 8) S[mi][ni][i] = -INFINITY;
    }
    if (p.dropout.threshold) apply_dropout(dP, keep_mask, p.dropout.scale);
    auto &P = S, &dS = dP;  // in place
    const int t = recomputed(lane_id()) % 4;
#pragma unroll
    for (int ni = 0; ni < kMmaN; ++ni)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int column = 8 * ni + 2 * t + odd;
        const float lse2 = stats(tile % 2)[column] * kLog2e, delta = stats(tile % 2)[Policy::kColumns + column];
#pragma unroll
        for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
          for (int i = odd; i < 4; i += 2) {
            P[mi][ni][i] = exp2_fast(fmaf(S[mi][ni][i], p.scale_log2, -lse2));
            dS[mi][ni][i] = P[mi][ni][i] * (dP[mi][ni][i] - delta);
          }
      }
    if (p.dropout.threshold) apply_dropout(P, keep_mask, p.dropout.scale);
    gemm_rs(dV, P, grads(tile % 2));
    gemm_rs(dK, dS, queries(tile % 2));
  }

#pragma unroll
  for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
    for (int ni = 0; ni < D / 8; ++ni)
#pragma unroll
      for (int i = 0; i < 4; ++i) dK[mi][ni][i] *= p.scale;
  // The loop has no register to spare for this address, so it is computed again.
  const int head_again = recomputed(int(blockIdx.x)) % p.heads;
  Element* grad_keys = p.grad_qkv + p.template head_offset<D>(head_again, 3) + out_stride + int64_t(k0) * stride;
  store_rows<Element, D, kMmaM>(dK, keys, row0, grad_keys, stride, p.T - k0);
  store_rows<Element, D, kMmaM>(dV, values, row0, grad_keys + out_stride, stride, p.T - k0);
}

struct Backward {
  const Attention& x;
  float* delta;
  cudaStream_t stream;
  template <class Element, int D>
  void run() const {
    using Policy = BackwardPolicy<Element, D>;
    const auto params = attention_params<Element>(x, delta);
    const int64_t blocks = x.B * x.H * ceil_div(x.T, Policy::kRows);
    launch(dq_kernel<Element, D>, blocks, Policy::kThreads, Policy::kShared, stream, params);
    launch(dkdv_kernel<Element, D>, blocks, Policy::kThreads, Policy::kShared + 4 * Policy::kStatBytes, stream, params);
  }
};

}  // namespace

void attention_backward(const Attention& x, float* delta, cudaStream_t stream) {
  if (x.B * x.H * x.T > 0) dispatch_attention(x.dtype, x.D, "causal_attention", Backward{x, delta, stream});
}

}  // namespace tinystory::cuda
