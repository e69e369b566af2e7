// Causal attention, forward: FlashAttention-2 (Dao 2023, arXiv 2307.08691).
//
// A block computes one tile of queries of one head; each warp computes 16 * kMmaM rows of the tile. Tiles of keys and
// values stream through shared memory in two stages: the next tile is copied while the current tile is used. Names
// follow the paper: S = Q K^T, P = exp(S - m), O = P V, with m and l the running row maximum and row sum. Exponents are
// in units of log2, so that exp is the hardware's ex2. m may lag behind the true row maximum: O and l are rescaled by
// exp(m_old - m_new) only when a score exceeds m by more than kSlack, as in FlashAttention-4. So P is at most 2^kSlack,
// which every dtype can represent.
#include "attention.cuh"

namespace tinystory::cuda {
namespace {

constexpr float kSlack = 8;

template <class Element, int D>
struct ForwardPolicy {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kMmaM = sizeof(Element) == 2 && D <= 64 ? 2 : 1;
  static constexpr int kQueries = kWarps * 16 * kMmaM;
  static constexpr int kKeys = sizeof(Element) == 2 ? 64 : D <= 64 ? 32 : 16;
  static constexpr bool kQueriesInRegisters = sizeof(Element) == 2 && D <= 64;
  static constexpr int kQueryBytes = kQueries * D * int(sizeof(Element)),
                       kStageBytes = kKeys * D * int(sizeof(Element));
  static constexpr int kShared = kQueryBytes + 4 * kStageBytes;  // two stages of a key tile and a value tile
  static_assert(kShared <= kMaxSharedBytes);
};

// The running softmax of a warp's rows. The scores arrive one tile of keys at a time.
template <int kMmaM>
struct OnlineSoftmax {
  float scale_log2;  // scale of the scores times log2(e)
  // Per row: m, in units of log2, and l over this lane's columns. The lanes' values of l are summed at the end.
  float m[kMmaM][2], l[kMmaM][2];

  __device__ __forceinline__ explicit OnlineSoftmax(float scale) : scale_log2(scale) {
    each_row<kMmaM>([&](int mi, int half) { m[mi][half] = -INFINITY, l[mi][half] = 0; });
  }

  // Raises m to the row maxima, and rescales O and l, if any score of the warp exceeds m by more than kSlack.
  template <int kMmaN, int kMmaD>
  __device__ __forceinline__ void raise_maximum(const float (&S)[kMmaM][kMmaN][4], float (&O)[kMmaM][kMmaD][4]) {
    float highest[kMmaM][2];
    bool exceeds = false;
    each_row<kMmaM>([&](int mi, int half) {
      highest[mi][half] = row_max(S[mi], half);
      exceeds |= fmaf(highest[mi][half], scale_log2, -m[mi][half]) > kSlack;
    });
    if (!ballot(exceeds)) return;
    each_row<kMmaM>([&](int mi, int half) {
      const float m_new = fmaxf(m[mi][half], warp_max<4>(highest[mi][half]) * scale_log2);
      const float rescale = exp2_fast(m[mi][half] - m_new);
      m[mi][half] = m_new;
      l[mi][half] *= rescale;
      multiply_row(O[mi], half, rescale);
    });
  }

  // Overwrites S by P = exp(S - m), and adds P to l.
  template <int kMmaN>
  __device__ __forceinline__ void exponentiate(float (&S)[kMmaM][kMmaN][4]) {
    each_element<kMmaM, kMmaN>([&](int mi, int ni, int i) {
      S[mi][ni][i] = exp2_fast(fmaf(S[mi][ni][i], scale_log2, -m[mi][i / 2]));
      l[mi][i / 2] += S[mi][ni][i];
    });
  }
};

template <class Element, int D, bool kDropout>
__global__ void __launch_bounds__(ForwardPolicy<Element, D>::kThreads, 2)
    attention_forward_kernel(AttentionParams<Element> p) {
  using Policy = ForwardPolicy<Element, D>;
  constexpr int kMmaM = Policy::kMmaM, kMmaN = Policy::kKeys / 8, kMaskN = kMmaN < 4 ? kMmaN : 4;
  // The last tile of a head attends to the most keys, so it has rank 0.
  const int query_tiles = int(gridDim.x) / p.heads;
  const auto [head, rank] = longest_first(int(blockIdx.x), p.heads, query_tiles, p.group);
  const int q0 = (query_tiles - 1 - rank) * Policy::kQueries;
  const int stride = 3 * p.H * D;
  const Element* q = p.qkv + p.template head_offset<D>(head, 3);

  const Tile<Element, D> queries{0};
  const auto keys = [&](int stage) { return Tile<Element, D>{Policy::kQueryBytes + 2 * stage * Policy::kStageBytes}; };
  const auto values = [&](int stage) { return Tile<Element, D>{keys(stage).offset + Policy::kStageBytes}; };
  const Element* next_keys = thread_part<Element, D>(q + p.H * D, stride);  // source address for the next tile
  const auto load = [&](int tile) {
    const int valid = p.T - tile * Policy::kKeys;
    load_rows<Policy::kKeys, Policy::kThreads>(keys(tile % 2), next_keys, stride, valid);
    load_rows<Policy::kKeys, Policy::kThreads>(values(tile % 2), next_keys + p.H * D, stride, valid);
    next_keys += Policy::kKeys * stride;
  };

  load_rows<Policy::kQueries, Policy::kThreads>(queries, thread_part<Element, D>(q + int64_t(q0) * stride, stride),
                                                stride, p.T - q0);
  load(0);
  copy_commit();

  const int row0 = warp_id() * 16 * kMmaM, first = q0 + row0;
  LeftOperand<Element, D, kMmaM, Policy::kQueriesInRegisters> Q{queries, row0, {}};
  OnlineSoftmax<kMmaM> softmax(p.scale_log2);
  float O[kMmaM][D / 8][4];
  clear(O);

  const int end = q0 + Policy::kQueries < p.T ? q0 + Policy::kQueries : p.T,
            n_tiles = (end + Policy::kKeys - 1) / Policy::kKeys;
  for (int tile = 0; tile < n_tiles; ++tile) {
    const int k0 = tile * Policy::kKeys;
    KeepMask<false, kMmaM, kMaskN> keep[kMmaN / kMaskN];
    if constexpr (kDropout) {
#pragma unroll
      for (int i = 0; i < kMmaN / kMaskN; ++i) keep[i].draw(p.dropout, head, first, k0 + 8 * kMaskN * i);
    }
    copy_wait<0>();
    sync_block();  // all threads see this tile, and all have finished the previous one, so its stage can be reused
    if (tile == 0) Q.preload();
    if (tile + 1 < n_tiles) load(tile + 1);
    copy_commit();

    if (k0 > first + 16 * kMmaM - 1) continue;  // causality: this warp's queries attend to none of these keys
    float S[kMmaM][kMmaN][4];
    const float zeros[kMmaN][4] = {};
    gemm_ss(S, Q, keys(tile % 2), zeros);
    if (k0 + Policy::kKeys - 1 > first)
      mask(S, lane_id(), [&](int query, int key) { return k0 + key > first + query; });
    softmax.raise_maximum(S, O);
    softmax.exponentiate(S);
    Packed<Element, kMmaM, kMmaN> P;
    pack_fragments<Element>(P, S);
    if constexpr (kDropout) {
#pragma unroll
      for (int i = 0; i < kMmaN / kMaskN; ++i) keep[i].apply(P, kMaskN * i);
    }
    gemm_rs(O, P, values(tile % 2));
  }

  float* lse = p.lse + int64_t(head) * p.T + q0;
  each_row<kMmaM>([&](int mi, int half) {
    const float row_sum = warp_sum<4>(softmax.l[mi][half]);
    multiply_row(O[mi], half, p.dropout.scale / row_sum);
    const int row = row0 + 16 * mi + 8 * half + lane_id() / 4;
    if (lane_id() % 4 == 0 && q0 + row < p.T) lse[row] = (softmax.m[mi][half] + log2_fast(row_sum)) * kLn2;
  });
  const int out_stride = p.H * D;
  Element* to = p.out + p.template head_offset<D>(head, 1) + int64_t(q0) * out_stride;
  store_rows<Element, D, kMmaM>(O, queries, row0, to, out_stride, p.T - q0);
}

struct Forward {
  const Attention& x;
  cudaStream_t stream;
  template <class Element, int D>
  void run() const {
    using Policy = ForwardPolicy<Element, D>;
    const auto p = attention_params<Element>(x, 2 * sizeof(Element));  // keys and values
    launch(
        p.dropout.threshold ? attention_forward_kernel<Element, D, true> : attention_forward_kernel<Element, D, false>,
        x.B * x.H * ceil_div(x.T, Policy::kQueries), Policy::kThreads, Policy::kShared, stream, p);
  }
};

}  // namespace

void attention_forward(const Attention& x, cudaStream_t stream) {
  if (x.B * x.H * x.T > 0) dispatch_attention(x.dtype, x.D, "causal_attention", Forward{x, stream});
}

}  // namespace tinystory::cuda
