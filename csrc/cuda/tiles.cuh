// Building blocks of the attention kernels: tiles in shared memory, warp-level GEMMs on register fragments, dropout.
//
// A 16 x 8 accumulator fragment has the layout of mma.m16n8k16: with g = lane / 4 and t = lane % 4, c[0] and c[1] hold
// row g, columns 2t and 2t + 1, and c[2] and c[3] the same columns of row g + 8. Two adjacent fragments are exactly the
// A operand of the next mma, so P and dS pass from one GEMM to the next in registers. kMmaM, kMmaN and kMmaK count the
// 16-row, 8-column and 8-deep fragments of a warp's GEMM, indexed by mi, ni and ki.
#pragma once
#include "dispatch.cuh"

namespace tinystory::cuda {

// Rows of D elements in shared memory, swizzled: the 16-byte chunks of a row are permuted by the row index, so that the
// eight rows that ldmatrix (or a quarter-warp's 16-byte access) reads at one column touch each of the 32 banks once.
template <class Element, int D>
struct Tile {
  static constexpr int kRowBytes = D * int(sizeof(Element)), kChunks = kRowBytes / 16;
  static constexpr int kSwizzled = kChunks < 8 ? kChunks : 8;  // chunks are permuted within groups of this many
  int offset;                                                  // in shared memory

  static __device__ __forceinline__ int chunk_offset(int row, int c) {
    const int key = kChunks >= 8 ? row % 8 : row / (8 / kChunks) % kChunks;
    return row * kRowBytes + ((c ^ key) * 16);
  }
  __device__ __forceinline__ char* chunk(int row, int c) const {
    return shared_memory() + offset + chunk_offset(row, c);
  }
  // From the offset of chunk c to that of chunk c + `chunks` of the same row, for even `chunks` and c < 2.
  static __device__ __forceinline__ int advance(int chunk_offset, int chunks) {
    return (chunk_offset ^ chunks % kSwizzled * 16) + chunks / kSwizzled * kSwizzled * 16;
  }
};

// Starts copying kRows rows that are `stride` elements apart; rows at or beyond `valid` are filled with zeros.
template <int kRows, int kThreads, class Element, int D>
__device__ __forceinline__ void load_rows(Tile<Element, D> to, const Element* from, int stride, int valid) {
  constexpr int kChunks = Tile<Element, D>::kChunks, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0, "every thread copies the same number of chunks");
  const int thread = recomputed(int(threadIdx.x)), row = thread / kChunks, c = thread % kChunks;
  from += int64_t(row) * stride + c * kVecElements<Element>;
#pragma unroll
  for (int r = 0; r < kRows; r += kStep) {
    copy_async16(to.chunk(row + r, c), from, row + r < valid);
    from += kStep * stride;  // incremented: precomputed offsets for all steps would fill the registers
  }
}

// --- GEMMs -----------------------------------------------------------------------------------------------------------
// 16 * kMmaM rows of a tile as the A operand of a GEMM; with kInRegisters they are loaded once, by preload().
template <class Element, int D, int kMmaM, bool kInRegisters>
struct LeftOperand {
  Tile<Element, D> tile;
  int row;
  uint32_t fragments[kInRegisters ? kMmaM : 1][kInRegisters ? D / 16 : 1][4];

  // The offset in shared memory of this lane's chunk of ki = 0; `load` takes it and a fragment's indices.
  __device__ __forceinline__ int lane_offset(int lane) const {
    return tile.offset + Tile<Element, D>::chunk_offset(row + lane % 16, lane / 16);
  }
  static __device__ __forceinline__ void load(uint32_t (&a)[4], int lane_offset, int mi, int ki) {
    ldmatrix(a,
             shared_memory() + Tile<Element, D>::advance(lane_offset, 2 * ki) + 16 * mi * Tile<Element, D>::kRowBytes);
  }
  __device__ __forceinline__ void preload() {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
        for (int ki = 0; ki < D / 16; ++ki) load(fragments[mi][ki], lane_offset(lane_id()), mi, ki);
    }
  }
};

// c (16 kMmaM x 8 kMmaN) += A B^T: A the left operand, B the first 8 kMmaN rows of `right`. Both in shared memory (SS).
template <class Element, int D, int kMmaM, int kMmaN, bool kInRegisters>
__device__ __forceinline__ void gemm_ss(float (&c)[kMmaM][kMmaN][4],
                                        const LeftOperand<Element, D, kMmaM, kInRegisters>& left,
                                        Tile<Element, D> right) {
  const int lane = recomputed(lane_id()), a_offset = left.lane_offset(lane),
            b_offset = right.offset + Tile<Element, D>::chunk_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int ki = 0; ki < D / 16; ++ki) {
    uint32_t a[kMmaM][4];
#pragma unroll
    for (int mi = 0; mi < kMmaM; ++mi) {
      if constexpr (kInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[mi][i] = left.fragments[mi][ki][i];
      } else {
        left.load(a[mi], a_offset, mi, ki);
      }
    }
    const char* rows = shared_memory() + Tile<Element, D>::advance(b_offset, 2 * ki);
#pragma unroll
    for (int ni = 0; ni < kMmaN; ni += 2) {
      uint32_t b[4];
      ldmatrix(b, rows + 8 * ni * Tile<Element, D>::kRowBytes);
#pragma unroll
      for (int mi = 0; mi < kMmaM; ++mi) {
        mma<Element>(c[mi][ni], a[mi], b[0], b[1]);
        mma<Element>(c[mi][ni + 1], a[mi], b[2], b[3]);
      }
    }
  }
}

// The same in float32 with FMAs instead of tensor cores (TF32): accuracy matters more here than speed.
template <int D, int kMmaM, int kMmaN>
__device__ __forceinline__ void gemm_ss(float (&c)[kMmaM][kMmaN][4], const LeftOperand<float, D, kMmaM, false>& left,
                                        Tile<float, D> right) {
  const int lane = recomputed(lane_id()), g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int ki = 0; ki < D / 4; ++ki) {
    float a[kMmaM][2][4];
#pragma unroll
    for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        unpack(a[mi][half], load16_shared(left.tile.chunk(left.row + 16 * mi + 8 * half + g, ki)), 0.0f);
#pragma unroll
    for (int ni = 0; ni < kMmaN; ++ni)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        float b[4];
        unpack(b, load16_shared(right.chunk(8 * ni + 2 * t + odd, ki)), 0.0f);
#pragma unroll
        for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              c[mi][ni][2 * half + odd] = fmaf(a[mi][half][i], b[i], c[mi][ni][2 * half + odd]);
      }
  }
}

// c (16 kMmaM x D) += A B: A (16 kMmaM x 8 kMmaK) in registers, B the first 8 kMmaK rows of `right` in shared memory
// (RS).
template <class Element, int D, int kMmaM, int kMmaK>
__device__ __forceinline__ void gemm_rs(float (&c)[kMmaM][D / 8][4], const float (&A)[kMmaM][kMmaK][4],
                                        Tile<Element, D> right) {
  const int lane = recomputed(lane_id()), offset = right.offset + Tile<Element, D>::chunk_offset(lane % 16, lane / 16);
#pragma unroll
  for (int ki = 0; ki < kMmaK; ki += 2) {
    uint32_t a[kMmaM][4];
#pragma unroll
    for (int mi = 0; mi < kMmaM; ++mi) {
      a[mi][0] = pack2<Element>(A[mi][ki][0], A[mi][ki][1]);
      a[mi][1] = pack2<Element>(A[mi][ki][2], A[mi][ki][3]);
      a[mi][2] = pack2<Element>(A[mi][ki + 1][0], A[mi][ki + 1][1]);
      a[mi][3] = pack2<Element>(A[mi][ki + 1][2], A[mi][ki + 1][3]);
    }
#pragma unroll
    for (int ni = 0; ni < D / 8; ni += 2) {
      uint32_t b[4];
      const char* rows = shared_memory() + Tile<Element, D>::advance(offset, ni);
      ldmatrix_transposed(b, rows + 8 * ki * Tile<Element, D>::kRowBytes);
#pragma unroll
      for (int mi = 0; mi < kMmaM; ++mi) {
        mma<Element>(c[mi][ni], a[mi], b[0], b[1]);
        mma<Element>(c[mi][ni + 1], a[mi], b[2], b[3]);
      }
    }
  }
}

template <int D, int kMmaM, int kMmaK>
__device__ __forceinline__ void gemm_rs(float (&c)[kMmaM][D / 8][4], const float (&A)[kMmaM][kMmaK][4],
                                        Tile<float, D> right) {
  const int lane = recomputed(lane_id()), t = lane % 4;
#pragma unroll
  for (int ki = 0; ki < 8 * kMmaK; ++ki) {
    const int owner = lane / 4 * 4 + ki % 8 / 2;  // of column ki of A in this lane's rows
    float a[kMmaM][2];
#pragma unroll
    for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half) a[mi][half] = shuffle(A[mi][ki / 8][2 * half + ki % 2], owner);
#pragma unroll
    for (int ni = 0; ni < D / 8; ++ni) {
      // Chunk 2 ni + t / 2, derived from chunk 2 ni so that all but two offsets are compile-time constants.
      const float* b =
          reinterpret_cast<const float*>(right.chunk(ki, 2 * ni)) + (ki % 2 ? -(t / 2) : t / 2) * 4 + t % 2 * 2;
#pragma unroll
      for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[mi][ni][i] = fmaf(a[mi][i / 2], b[i % 2], c[mi][ni][i]);
    }
  }
}

// Writes a warp's 16 kMmaM rows to global memory, 16 bytes per lane, staged through the warp's own rows of a tile that
// only this warp still reads.
template <class Element, int D, int kMmaM>
__device__ __forceinline__ void store_rows(const float (&c)[kMmaM][D / 8][4], Tile<Element, D> staging, int row,
                                           Element* to, int stride, int valid) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  sync_warp();
#pragma unroll
  for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
    for (int ni = 0; ni < D / 8; ++ni)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + 16 * mi + 8 * half + g;
        if constexpr (sizeof(Element) == 2) {
          reinterpret_cast<uint32_t*>(staging.chunk(r, ni))[t] =
              pack2<Element>(c[mi][ni][2 * half], c[mi][ni][2 * half + 1]);
        } else {
          float* pair = reinterpret_cast<float*>(staging.chunk(r, 2 * ni + t / 2)) + t % 2 * 2;
          pair[0] = c[mi][ni][2 * half];
          pair[1] = c[mi][ni][2 * half + 1];
        }
      }
  sync_warp();
  constexpr int kChunks = Tile<Element, D>::kChunks;
#pragma unroll
  for (int ki = 0; ki < 16 * kMmaM * kChunks / kWarpSize; ++ki) {
    const int i = ki * kWarpSize + lane_id(), r = i / kChunks, c16 = i % kChunks;
    if (row + r < valid)
      store16(to + int64_t(row + r) * stride + c16 * kVecElements<Element>, load16_shared(staging.chunk(row + r, c16)));
  }
}

template <int kMmaM, int kMmaN>
__device__ __forceinline__ void clear(float (&c)[kMmaM][kMmaN][4]) {
#pragma unroll
  for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
    for (int ni = 0; ni < kMmaN; ++ni)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[mi][ni][i] = 0;
}

// --- dropout ---------------------------------------------------------------------------------------------------------
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // 0: off
  float scale;
};

// Keep bits of this lane's eight elements of a 16 x 16 tile of P: four of the left fragment, then four of the right.
// For fragments of P^T (rows are keys), kTransposed fetches the bits from the lanes that own them.
template <bool kTransposed>
__device__ __forceinline__ uint32_t keep_bits(const Dropout& d, int head, int tile_row, int tile_col) {
  const uint32_t lane = uint32_t(lane_id());
  const Words4 random = dropout_words(d.seed, uint32_t(head), uint32_t(tile_row), uint32_t(tile_col), lane);
  const uint32_t word[4] = {random.x, random.y, random.z, random.w};
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

// Keep bits of kMmaM x kMmaN fragments whose first row is `row` and first column `col`; bits 4 ni to 4 ni + 3 of
// keep_mask[mi] belong to fragment (mi, ni). Call it before the GEMM needs its registers.
template <bool kTransposed, int kMmaN, int kMmaM>
__device__ __forceinline__ void draw_keep_masks(uint32_t (&keep_mask)[kMmaM], const Dropout& d, int head, int row,
                                                int col) {
  static_assert(kMmaN <= 8, "32 bits hold 8 fragments");
#pragma unroll
  for (int mi = 0; mi < kMmaM; ++mi) {
    keep_mask[mi] = ~0u;
    if (!d.threshold) continue;
    keep_mask[mi] = 0;
#pragma unroll 1
    for (int ni = 0; ni < kMmaN; ni += 2) {
      const int r = row / 16 + mi, c = col / 16 + ni / 2;
      keep_mask[mi] |= keep_bits<kTransposed>(d, head, kTransposed ? c : r, kTransposed ? r : c) << (4 * ni);
    }
  }
}

// Multiplies fragments by the dropout mask times its scale.
template <int kMmaM, int kMmaN>
__device__ __forceinline__ void apply_dropout(float (&c)[kMmaM][kMmaN][4], const uint32_t (&keep_mask)[kMmaM],
                                              float scale) {
#pragma unroll
  for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
    for (int ni = 0; ni < kMmaN; ++ni)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[mi][ni][i] = keep_mask[mi] >> (4 * ni + i) & 1 ? c[mi][ni][i] * scale : 0;
}

// --- parameters ------------------------------------------------------------------------------------------------------
// The parameters of every attention kernel. A row of qkv holds q, k and v of all heads.
template <class Element>
struct AttentionParams {
  const Element* qkv;
  Element* out;
  float* lse;
  const Element* grad_out;
  Element* grad_qkv;
  float* delta;  // (B, H, T): rowsum(O * dO)
  int T, H, heads;
  float scale, scale_log2;  // of the scores, without and with a factor log2(e)
  Dropout dropout;

  // Offset of a head's first row in a tensor whose rows hold per_row * H vectors of D.
  template <int D>
  __device__ __forceinline__ int64_t head_offset(int head, int per_row) const {
    return (int64_t(head / H) * T * per_row * H + head % H) * D;
  }
};

template <class Element>
AttentionParams<Element> attention_params(const Attention& x, float* delta) {
  const double scale = 1 / std::sqrt(double(x.D));
  const uint32_t threshold = dropout_threshold(x.dropout);
  return {static_cast<const Element*>(x.qkv),
          static_cast<Element*>(x.out),
          static_cast<float*>(x.lse),
          static_cast<const Element*>(x.grad_out),
          static_cast<Element*>(x.grad_qkv),
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
