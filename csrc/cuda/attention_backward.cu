// Causal attention, backward (FlashAttention-2), in one pass of five GEMMs. Each block owns one tile of keys and
// accumulates its dK and dV while it loops over the query tiles that attend to these keys. P is recomputed from the
// log-sum-exp. dQ of a query tile is a sum over the blocks of a head. The blocks add to dQ in a fixed order, the block
// of the first keys first and the block of the diagonal last, so the bits of the gradient never change. Blocks also
// start in this order, which is the order of decreasing length, and all blocks begin with the last queries. A block
// that starts together with the previous block waits once, for a fifth of a tile; a block that starts later does not
// wait.
//
// With Z the dropout mask times the dropout scale:
//   delta = rowsum(O * dO),  dP = Z * (dO V^T),  dS = P * (dP - delta),
//   dQ = scale dS K,  dK = scale dS^T Q,  dV = (Z * P)^T dO.
// The loop leaves out the dropout scale: it computes dP and delta divided by the dropout scale, and the final sums are
// multiplied by the dropout scale.
#include "attention.cuh"

namespace tinystory::cuda {
namespace {

// A block owns kKeys keys, 16 * kMmaM per warp, and loops over tiles of kQueries queries. There is one stage: the next
// tile is copied while dQ is computed, because dQ needs neither queries nor grads.
template <class Element, int D>
struct BackwardPolicy {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kMmaM = sizeof(Element) == 2 && D <= 64 ? 2 : 1;
  static constexpr int kKeys = kWarps * 16 * kMmaM, kQueries = sizeof(Element) == 2 ? 32 : 16;
  // A warp computes 16 rows of dQ and kColumns columns.
  static constexpr int kRowGroups = kQueries / 16, kColumns = D * kRowGroups / kWarps;
  static constexpr int kStats = 3 * kQueries;     // floats per tile of queries
  static constexpr int kPartials = kQueries * D;  // floats of dQ per tile of queries
  static constexpr int kKeyBytes = kKeys * D * int(sizeof(Element)), kQueryBytes = kQueries * D * int(sizeof(Element));
  // Offsets in shared memory, in the order: keys, values, queries, grads (dO), dS, stats, ticket.
  static constexpr int kGradScores = 2 * (kKeyBytes + kQueryBytes);
  static constexpr int kStatsAt = kGradScores + kKeys * kQueries * int(sizeof(Element));
  static constexpr int kTicketAt = kStatsAt + kStats * 4, kShared = kTicketAt + 16;
  static_assert(kShared <= kMaxSharedBytes);
};

template <class Element>
struct BackwardParams : AttentionParams<Element> {
  int query_tiles, key_blocks;
  // Per (head, tile of queries): log-sum-exp * log2(e) of each query; then for each pair of queries
  // {-delta0, -delta1, -delta0, -delta1} / dropout scale, the initial values of the fragments of dP.
  float* stats;
  float* partials;  // partial sums of dQ per (head, tile), stored as the fragments of the warps
  int* turns;  // per (head, tile): number of blocks that have added to dQ; the block of the diagonal does not count
  int* ticket;
};

// Writes stats, and sets turns and ticket to zero. A row of a tile is processed by as many threads as it has 16-byte
// chunks. Rows past the end get zeros, so that they contribute nothing.
template <class Element, int D>
__global__ void __launch_bounds__(BackwardPolicy<Element, D>::kThreads)
    backward_stats_kernel(BackwardParams<Element> p) {
  using Policy = BackwardPolicy<Element, D>;
  constexpr int kLanes = Tile<Element, D>::kChunks, kVec = kVecElements<Element>;
  static_assert(Policy::kQueries * kLanes % Policy::kThreads == 0, "rows fill the blocks");
  const int64_t index = (int64_t(blockIdx.x) * Policy::kThreads + threadIdx.x) / kLanes,
                tile = index / Policy::kQueries;
  const int c = int(threadIdx.x) % kLanes, r = int(index % Policy::kQueries), head = int(tile / p.query_tiles),
            row = int(tile % p.query_tiles) * Policy::kQueries + r;
  float sum = 0;
  if (row < p.T) {
    const int64_t at = p.template head_offset<D>(head, 1) + int64_t(row) * p.H * D + c * kVec;
    float o[kVec], g[kVec];
    unpack(o, load16(p.out + at), Element{});
    unpack(g, load16(p.grad_out + at), Element{});
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum = fmaf(o[i], g[i], sum);
  }
  sum = -warp_sum<kLanes>(sum) / p.dropout.scale;
  if (c != 0) return;
  float *lse2 = p.stats + tile * Policy::kStats, *deltas = lse2 + Policy::kQueries + r / 2 * 4 + r % 2;
  lse2[r] = row < p.T ? p.lse[int64_t(head) * p.T + row] * kLog2e : 0;
  deltas[0] = deltas[2] = sum;
  if (r == 0) p.turns[tile] = 0;
  if (index == 0) *p.ticket = 0;
}

// Loads the initial values of the fragments of dP / dropout scale: -delta / dropout scale of each column.
template <int kMmaN>
__device__ __forceinline__ void load_deltas(float (&start)[kMmaN][4], const float* stats) {
  const float* deltas = stats + 8 * kMmaN + lane_id() % 4 * 4;
#pragma unroll
  for (int ni = 0; ni < kMmaN; ++ni) unpack(start[ni], load16_shared(deltas + 16 * ni), 0.0f);
}

// Overwrites S by P, and dP - delta by dS = P (dP - delta); dP, delta and dS are divided by the dropout scale. A
// dropped weight has dP = 0.
template <bool kDropout, int kMmaM, int kMmaN>
__device__ __forceinline__ void differentiate(float (&S)[kMmaM][kMmaN][4], float (&dP)[kMmaM][kMmaN][4],
                                              const float* stats, const KeepMask<true, kMmaM, kMmaN>& keep, int t,
                                              float scale_log2) {
#pragma unroll
  for (int ni = 0; ni < kMmaN; ++ni) {
    const float* lse2 = stats + 8 * ni + 2 * t;
    const float* deltas = stats + 8 * kMmaN + 16 * ni + 4 * t;
    const float dropped[2] = {deltas[0], deltas[1]};
#pragma unroll
    for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kDropout && !keep.kept(mi, ni, i)) dP[mi][ni][i] = dropped[i % 2];
        S[mi][ni][i] = exp2_fast(fmaf(S[mi][ni][i], scale_log2, -lse2[i % 2]));
        dP[mi][ni][i] *= S[mi][ni][i];
      }
  }
}

// load_partials, store_partials: load and store a thread's fragments of the partial sums of dQ of a tile. The fragments
// of all kThreads threads are interleaved.
template <int kThreads, int kMmaN>
__device__ __forceinline__ void load_partials(Vec16 (&to)[kMmaN], const float* partials, unsigned thread) {
#pragma unroll
  for (int ni = 0; ni < kMmaN; ++ni) to[ni] = load16(partials + (ni * kThreads + thread) * 4);
}
template <int kThreads, int kMmaN>
__device__ __forceinline__ void store_partials(float* partials, const float (&dQ)[kMmaN][4], unsigned thread) {
#pragma unroll
  for (int ni = 0; ni < kMmaN; ++ni) store16(partials + (ni * kThreads + thread) * 4, pack(dQ[ni], 0.0f));
}
template <int kMmaN>
__device__ __forceinline__ void add(float (&dQ)[kMmaN][4], const Vec16 (&partials)[kMmaN]) {
#pragma unroll
  for (int ni = 0; ni < kMmaN; ++ni)
#pragma unroll
    for (int i = 0; i < 4; ++i) dQ[ni][i] += bits_float(partials[ni].word[i]);
}

// Writes 16 rows of dQ to the gradient. first: the first row. to: the first column, in row 0.
template <class Element, int kMmaN>
__device__ __forceinline__ void store_queries(Element* to, int stride, const float (&dQ)[kMmaN][4], int first, int rows,
                                              float scale) {
  const unsigned lane = recomputed(unsigned(lane_id()));
  const int g = int(lane / 4), t = int(lane % 4);
  to += 2 * t;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + 8 * half + g;
    if (row < rows) {
#pragma unroll
      for (int ni = 0; ni < kMmaN; ++ni)
        store2(to + int64_t(row) * stride + 8 * ni, dQ[ni][2 * half] * scale, dQ[ni][2 * half + 1] * scale);
    }
  }
}

template <class Element, int D, bool kDropout>
__global__ void __launch_bounds__(BackwardPolicy<Element, D>::kThreads, 2)
    attention_backward_kernel(BackwardParams<Element> p) {
  using Policy = BackwardPolicy<Element, D>;
  constexpr int kMmaM = Policy::kMmaM, kMmaN = Policy::kQueries / 8, kQueries = Policy::kQueries;
  constexpr int kTiles = Policy::kKeys / kQueries;
  int* const shared_ticket = reinterpret_cast<int*>(shared_memory() + Policy::kTicketAt);
  if (threadIdx.x == 0) *shared_ticket = take_ticket(p.ticket);
  sync_block();
  const auto [head, block] = longest_first(shuffle(*shared_ticket, 0), p.heads, p.key_blocks, p.group);
  const int k0 = block * Policy::kKeys;
  const int stride = 3 * p.H * D, out_stride = p.H * D;
  const Element *q = p.qkv + p.template head_offset<D>(head, 3),
                *grad_out = p.grad_out + p.template head_offset<D>(head, 1);

  const Tile<Element, D> keys{0}, values{Policy::kKeyBytes}, queries{2 * Policy::kKeyBytes},
      grads{2 * Policy::kKeyBytes + Policy::kQueryBytes};
  const Tile<Element, kQueries> grad_scores{Policy::kGradScores};
  const auto stats = reinterpret_cast<float*>(shared_memory() + Policy::kStatsAt);
  // A block begins with the last tile of queries: first row of this tile, and index of this tile among all heads'
  // tiles.
  const int last_row = (p.query_tiles - 1) * kQueries, last_tile = (head + 1) * p.query_tiles - 1;
  // Source addresses of this thread's part of the next tile.
  const Element* next_queries = thread_part<Element, D>(q + int64_t(last_row) * stride, stride);
  const Element* next_grads = thread_part<Element, D>(grad_out + int64_t(last_row) * out_stride, out_stride);
  const auto load = [&](int row, int tile) {
    const int valid = p.T - row;
    load_rows<kQueries, Policy::kThreads>(queries, next_queries, stride, valid);
    load_rows<kQueries, Policy::kThreads>(grads, next_grads, out_stride, valid);
    const unsigned i = 4 * recomputed(threadIdx.x);
    if (i < Policy::kStats) copy_async16(stats + i, p.stats + int64_t(tile) * Policy::kStats + i, true);
    next_queries -= kQueries * stride;
    next_grads -= kQueries * out_stride;
  };
  const Element* k = thread_part<Element, D>(q + out_stride + int64_t(k0) * stride, stride);
  load_rows<Policy::kKeys, Policy::kThreads>(keys, k, stride, p.T - k0);
  load_rows<Policy::kKeys, Policy::kThreads>(values, k + out_stride, stride, p.T - k0);
  load(last_row, last_tile);
  copy_commit();

  const int warp = warp_id(), row0 = warp * 16 * kMmaM, first = k0 + row0;
  const int dq_row = warp % Policy::kRowGroups * 16, dq_column = warp / Policy::kRowGroups * Policy::kColumns;
  const LeftOperand<Element, D, kMmaM, false> K{keys, row0, {}}, V{values, row0, {}};
  float dK[kMmaM][D / 8][4], dV[kMmaM][D / 8][4];
  clear(dK);
  clear(dV);
  // left: number of tiles after this one. The last kTiles tiles contain the diagonal. This block is the last to add to
  // dQ of these tiles.
  for (int left = p.query_tiles - 1 - block * kTiles, tile = last_tile; left >= 0; --left, --tile) {
    const int q0 = k0 + left * kQueries;
    KeepMask<true, kMmaM, kMmaN> keep;
    if constexpr (kDropout) keep.draw(p.dropout, head, first, q0);
    copy_wait<0>();
    sync_block();  // all threads see this tile, and all have finished the previous one
    if (threadIdx.x == 0 && left + 1 >= kTiles && q0 + kQueries < p.T) post(p.turns + tile + 1, block + 1);
    int* const turn = p.turns + tile;
    int seen = 0;
    if (threadIdx.x == kWarpSize && block > 0) seen = peek(turn);

    // S and dP are transposed here: rows are keys, columns are queries.
    float S[kMmaM][kMmaN][4], dP[kMmaM][kMmaN][4];
    Packed<Element, kMmaM, kMmaN> P, dS;
    if (q0 + kQueries - 1 < first) {  // causality: these queries attend to none of this warp's keys
      clear(dP);
      pack_fragments<Element>(dS, dP);
      store_fragments(dS, grad_scores, row0);
    } else {
      float start[kMmaN][4] = {};
      gemm_ss(S, K, queries, start);
      load_deltas(start, stats);
      gemm_ss(dP, V, grads, start);
      const unsigned lane = recomputed(unsigned(lane_id()));
      if (q0 < first + 16 * kMmaM - 1) mask(S, lane, [&](int key, int query) { return q0 + query < first + key; });
      differentiate<kDropout>(S, dP, stats, keep, int(lane % 4), p.scale_log2);
      pack_fragments<Element>(P, S);
      pack_fragments<Element>(dS, dP);
      if constexpr (kDropout) keep.apply(P);
      store_fragments(dS, grad_scores, row0);
      gemm_rs(dV, P, grads);
      gemm_rs(dK, dS, queries);
    }
    if (threadIdx.x == kWarpSize && block > 0) wait_for(turn, block, seen);
    sync_block();  // dS is complete, all threads have read queries and grads, and it is this block's turn

    const unsigned thread = recomputed(threadIdx.x);
    float* partials = p.partials + int64_t(tile) * Policy::kPartials;
    Vec16 earlier[Policy::kColumns / 8];
    if (block > 0) load_partials<Policy::kThreads>(earlier, partials, thread);
    if (left > 0) load(q0 - kQueries, tile - 1);
    copy_commit();
    float dQ[Policy::kColumns / 8][4] = {};
    gemm_transposed<Policy::kKeys>(dQ, grad_scores, dq_row, keys, dq_column);
    if (block > 0) add(dQ, earlier);
    if (left >= kTiles) {
      store_partials<Policy::kThreads>(partials, dQ, thread);
    } else {
      // Only few tiles take this branch, so values that only this branch needs are recomputed, not kept in registers.
      Element* to = p.grad_qkv + p.template head_offset<D>(recomputed(head), 3) + recomputed(dq_column);
      store_queries(to, stride, dQ, q0 + recomputed(dq_row), p.T, p.scale * p.dropout.scale);
    }
  }
  sync_block();  // all have read keys; dK is staged in the same memory

  multiply(dK, p.scale * p.dropout.scale);
  multiply(dV, p.dropout.scale);
  Element* grad_keys = p.grad_qkv + p.template head_offset<D>(recomputed(head), 3) + out_stride + int64_t(k0) * stride;
  store_rows<Element, D, kMmaM>(dK, keys, row0, grad_keys, stride, p.T - k0);
  store_rows<Element, D, kMmaM>(dV, values, row0, grad_keys + out_stride, stride, p.T - k0);
}

// Sizes of the parts of the workspace, in floats. partials and stats come first, because they need alignment.
struct Workspace {
  int64_t tiles, partials, stats;
  template <class Policy>
  Workspace(const Attention& x, Policy)
      : tiles(x.B * x.H * ceil_div(x.T, Policy::kQueries)), partials(tiles * Policy::kPartials),
        stats(tiles * Policy::kStats) {}
  int64_t floats() const { return partials + stats + tiles + 1; }
};

struct WorkspaceFloats {
  const Attention& x;
  int64_t& floats;
  template <class Element, int D>
  void run() const {
    floats = Workspace(x, BackwardPolicy<Element, D>{}).floats();
  }
};

struct Backward {
  const Attention& x;
  float* workspace;
  cudaStream_t stream;
  template <class Element, int D>
  void run() const {
    using Policy = BackwardPolicy<Element, D>;
    const Workspace parts(x, Policy{});
    float* const stats = workspace + parts.partials;
    int* const turns = reinterpret_cast<int*>(stats + parts.stats);
    const BackwardParams<Element> p{attention_params<Element>(x, 2 * sizeof(Element) + 4),  // queries, grads, partials
                                    ceil_div(x.T, Policy::kQueries),
                                    ceil_div(x.T, Policy::kKeys),
                                    stats,
                                    workspace,
                                    turns,
                                    turns + parts.tiles};
    constexpr int kRowsPerBlock = Policy::kThreads / Tile<Element, D>::kChunks;
    launch(backward_stats_kernel<Element, D>, parts.tiles * (Policy::kQueries / kRowsPerBlock), Policy::kThreads, 0,
           stream, p);
    launch(p.dropout.threshold ? attention_backward_kernel<Element, D, true>
                               : attention_backward_kernel<Element, D, false>,
           x.B * x.H * p.key_blocks, Policy::kThreads, Policy::kShared, stream, p);
  }
};

}  // namespace

int64_t attention_backward_workspace(const Attention& x) {
  int64_t floats = 0;
  dispatch_attention(x.dtype, x.D, "causal_attention", WorkspaceFloats{x, floats});
  return floats;
}

void attention_backward(const Attention& x, float* workspace, cudaStream_t stream) {
  if (x.B * x.H * x.T > 0) dispatch_attention(x.dtype, x.D, "causal_attention", Backward{x, workspace, stream});
}

}  // namespace tinystory::cuda
