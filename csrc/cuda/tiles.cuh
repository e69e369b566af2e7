// Tiles of attention: rows in shared memory, products in a warp's registers, dropout on the weights.
//
// A warp's 16 x 8 piece of a product lies as mma.m16n8k16 leaves it: with g = lane / 4 and t = lane % 4, c[0] and c[1]
// are row g, columns 2t and 2t + 1, and c[2] and c[3] the same columns of row g + 8. Two such pieces side by side are
// exactly the A operand of the next mma, so weights go from the product that made them to the one that uses them in
// registers.
#pragma once
#include "dispatch.cuh"

namespace tinystory::cuda {

// Rows of D numbers in shared memory. Which 16 bytes of a row lie where is permuted by the row's number, so that the
// eight rows which ldmatrix (or a warp's 16-byte access) reads at one column touch all 32 banks once.
template <class E, int D>
struct Tile {
  static constexpr int kRowBytes = D * int(sizeof(E)), kChunks = kRowBytes / 16;
  int offset;  // in shared memory

  __device__ __forceinline__ char* chunk(int row, int c) const {
    const int key = kChunks >= 8 ? row % 8 : row / (8 / kChunks) % kChunks;
    return shared_memory() + offset + row * kRowBytes + ((c ^ key) * 16);
  }
};

// Starts copying kRows rows that lie `stride` numbers apart; rows from `valid` on become zeros.
template <int kRows, int kThreads, class E, int D>
__device__ __forceinline__ void load_rows(Tile<E, D> to, const E* from, int stride, int valid) {
  constexpr int kChunks = Tile<E, D>::kChunks, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0, "every thread copies as many pieces");
  const int thread = recomputed(int(threadIdx.x)), row = thread / kChunks, c = thread % kChunks;
  from += int64_t(row) * stride + c * kPerVec16<E>;
#pragma unroll
  for (int r = 0; r < kRows; r += kStep) {
    copy_async16(to.chunk(row + r, c), from, row + r < valid);
    from += kStep * stride;  // step by step: ready-made offsets for all steps would fill the registers
  }
}

// --- products --------------------------------------------------------------------------------------------------------
// 16 * M rows of a tile as the left operand of a product; kKept reads them once, into registers.
template <class E, int D, int M, bool kKept>
struct LeftRows {
  Tile<E, D> tile;
  int row;
  uint32_t kept[kKept ? M : 1][kKept ? D / 16 : 1][4];

  __device__ __forceinline__ void read(uint32_t (&a)[4], int m, int k, int lane) const {
    ldmatrix(a, tile.chunk(row + 16 * m + lane % 16, 2 * k + lane / 16));
  }
  __device__ __forceinline__ void keep() {
    if constexpr (kKept) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int k = 0; k < D / 16; ++k) read(kept[m][k], m, k, lane_id());
    }
  }
};

// c (16 M x 8 N) += left rows times the transpose of the right tile's first 8 N rows.
template <class E, int D, int M, int N, bool kKept>
__device__ __forceinline__ void multiply_rows(float (&c)[M][N][4], const LeftRows<E, D, M, kKept>& left,
                                              Tile<E, D> right) {
  const int lane = recomputed(lane_id());
#pragma unroll kKept ? D / 16 : 2
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if constexpr (kKept) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = left.kept[m][k][i];
      } else {
        left.read(a[m], m, k, lane);
      }
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      ldmatrix(b, right.chunk(8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<E>(c[m][n], a[m], b[0], b[1]);
        mma<E>(c[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// The same in float32 by fused multiply-adds: error matters more here than speed.
template <int D, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&c)[M][N][4], const LeftRows<float, D, M, false>& left,
                                              Tile<float, D> right) {
  const int lane = recomputed(lane_id()), g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int k = 0; k < D / 4; ++k) {
    float a[M][2][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        unpack(a[m][half], load16_shared(left.tile.chunk(left.row + 16 * m + 8 * half + g, k)), 0.0f);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        float b[4];
        unpack(b, load16_shared(right.chunk(8 * n + 2 * t + odd, k)), 0.0f);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 4; ++i) c[m][n][2 * half + odd] = fmaf(a[m][half][i], b[i], c[m][n][2 * half + odd]);
      }
  }
}

// c (16 M x D) += weights (16 M x 8 K, in registers) times the tile's first 8 K rows.
template <class E, int D, int M, int K>
__device__ __forceinline__ void multiply_weights(float (&c)[M][D / 8][4], const float (&weights)[M][K][4],
                                                 Tile<E, D> right) {
  const int lane = recomputed(lane_id());
#pragma unroll
  for (int k = 0; k < K; k += 2) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      a[m][0] = pack2<E>(weights[m][k][0], weights[m][k][1]);
      a[m][1] = pack2<E>(weights[m][k][2], weights[m][k][3]);
      a[m][2] = pack2<E>(weights[m][k + 1][0], weights[m][k + 1][1]);
      a[m][3] = pack2<E>(weights[m][k + 1][2], weights[m][k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t b[4];
      ldmatrix_transposed(b, right.chunk(8 * k + lane % 16, n + lane / 16));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<E>(c[m][n], a[m], b[0], b[1]);
        mma<E>(c[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <int D, int M, int K>
__device__ __forceinline__ void multiply_weights(float (&c)[M][D / 8][4], const float (&weights)[M][K][4],
                                                 Tile<float, D> right) {
  const int lane = recomputed(lane_id()), t = lane % 4;
#pragma unroll
  for (int k = 0; k < 8 * K; ++k) {
    const int owner = lane / 4 * 4 + k % 8 / 2;  // of the weights in column k of this lane's rows
    float a[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) a[m][half] = shuffle(weights[m][k / 8][2 * half + k % 2], owner);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      // Chunk 2 n + t / 2, found from chunk 2 n so that all but two offsets are constants.
      const float* b =
          reinterpret_cast<const float*>(right.chunk(k, 2 * n)) + (k % 2 ? -(t / 2) : t / 2) * 4 + t % 2 * 2;
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[m][n][i] = fmaf(a[m][i / 2], b[i % 2], c[m][n][i]);
    }
  }
}

// Writes a warp's 16 M rows to global memory, 16 bytes a lane, by way of its own rows of a tile no longer read.
template <class E, int D, int M>
__device__ __forceinline__ void store_rows(const float (&c)[M][D / 8][4], Tile<E, D> by, int row, E* to, int stride,
                                           int valid) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  sync_warp();
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + 16 * m + 8 * half + g;
        if constexpr (sizeof(E) == 2) {
          reinterpret_cast<uint32_t*>(by.chunk(r, n))[t] = pack2<E>(c[m][n][2 * half], c[m][n][2 * half + 1]);
        } else {
          float* pair = reinterpret_cast<float*>(by.chunk(r, 2 * n + t / 2)) + t % 2 * 2;
          pair[0] = c[m][n][2 * half];
          pair[1] = c[m][n][2 * half + 1];
        }
      }
  sync_warp();
  constexpr int kChunks = Tile<E, D>::kChunks;
#pragma unroll
  for (int k = 0; k < 16 * M * kChunks / kWarpSize; ++k) {
    const int i = k * kWarpSize + lane_id(), r = i / kChunks, c16 = i % kChunks;
    if (row + r < valid)
      store16(to + int64_t(row + r) * stride + c16 * kPerVec16<E>, load16_shared(by.chunk(row + r, c16)));
  }
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&c)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] = 0;
}

// --- dropout ---------------------------------------------------------------------------------------------------------
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // 0: off
  float scale;
};

// Which of this lane's eight weights of a 16 x 16 tile are kept, as bits: those of the left mma piece, then of the
// right. For pieces whose rows are keys and whose columns are queries, kTransposed fetches the bits from the lanes that
// own them.
template <bool kTransposed>
__device__ __forceinline__ uint32_t kept_bits(const Dropout& d, int head, int tile_row, int tile_col) {
  const uint32_t lane = uint32_t(lane_id());
  const Words4 w = dropout_words(d.seed, uint32_t(head), uint32_t(tile_row), uint32_t(tile_col), lane);
  const uint32_t word[4] = {w.x, w.y, w.z, w.w};
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bits |= uint32_t((word[i] & 0xffff) >= d.threshold) << (2 * i);
    bits |= uint32_t((word[i] >> 16) >= d.threshold) << (2 * i + 1);
  }
  if constexpr (!kTransposed) return bits;
  const uint32_t g = lane / 4, t = lane % 4;
  const uint32_t even = shuffle(bits, int(8 * t + g / 2)) >> (g % 2);     // of query 2t (and 2t + 8)
  const uint32_t odd = shuffle(bits, int(8 * t + 4 + g / 2)) >> (g % 2);  // of query 2t + 1 (and 2t + 9)
  uint32_t result = 0;
#pragma unroll
  for (int right = 0; right < 2; ++right)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int from = 2 * right + 4 * half, to = 4 * right + 2 * half;
      result |= (even >> from & 1) << to | (odd >> from & 1) << (to + 1);
    }
  return result;
}

// The bits of a whole product of M x N pieces, whose rows begin at `row` and columns at `col`: piece n's are from 4n
// on. To be called before the product needs its registers.
template <bool kTransposed, int N, int M>
__device__ __forceinline__ void draw_kept(uint32_t (&kept)[M], const Dropout& d, int head, int row, int col) {
  static_assert(N <= 8, "a word holds 8 pieces");
#pragma unroll
  for (int m = 0; m < M; ++m) {
    kept[m] = ~0u;
    if (!d.threshold) continue;
    kept[m] = 0;
#pragma unroll 1
    for (int n = 0; n < N; n += 2) {
      const int r = row / 16 + m, c = col / 16 + n / 2;
      kept[m] |= kept_bits<kTransposed>(d, head, kTransposed ? c : r, kTransposed ? r : c) << (4 * n);
    }
  }
}

// --- shapes ----------------------------------------------------------------------------------------------------------
// What every attention kernel is told. A row of qkv holds q, k and v of all heads.
template <class E>
struct AttentionParams {
  const E* qkv;
  E* out;
  float* lse;
  const E* grad_out;
  E* grad_qkv;
  float* delta;  // sum over d of grad_out * out, a number a query
  int T, H, heads;
  float scale, scale_log2;  // of the scores, and with log2(e)
  Dropout dropout;

  // Where a head's first row begins in a tensor whose rows hold `per_row` times H heads.
  template <int D>
  __device__ __forceinline__ int64_t head_offset(int head, int per_row) const {
    return (int64_t(head / H) * T * per_row * H + head % H) * D;
  }
};

template <class E>
AttentionParams<E> attention_params(const Attention& x, float* delta) {
  const double scale = 1 / std::sqrt(double(x.D));
  const uint32_t threshold = dropout_threshold(x.dropout);
  return {static_cast<const E*>(x.qkv),
          static_cast<E*>(x.out),
          static_cast<float*>(x.lse),
          static_cast<const E*>(x.grad_out),
          static_cast<E*>(x.grad_qkv),
          delta,
          int(x.T),
          int(x.H),
          int(x.B * x.H),
          float(scale),
          float(scale * 1.4426950408889634),
          {x.seed, threshold, float(dropout_scale(threshold))}};
}

inline int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

}  // namespace tinystory::cuda
