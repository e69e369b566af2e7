// GEMMs of a warp on tensor cores, for 16-bit operands: tiles in shared memory (S) or fragments in registers (R).
// gemm_float32.cuh overloads each for float32.
#pragma once
#include "fragments.cuh"

namespace tinystory::cuda {

// 16 * kMmaM rows of a tile as the A operand of a GEMM. With kInRegisters, preload() loads them once.
template <class Element, int D, int kMmaM, bool kInRegisters>
struct LeftOperand {
  Tile<Element, D> tile;
  int row;
  uint32_t fragments[kInRegisters ? kMmaM : 1][kInRegisters ? D / 16 : 1][4];

  // lane: tile.down(row, 0).
  static __device__ __forceinline__ void load(uint32_t (&a)[4], int lane, int mi, int ki) {
    ldmatrix(a, shared_memory() + Tile<Element, D>::advance(lane, 2 * ki) + 16 * mi * Tile<Element, D>::kRowBytes);
  }
  __device__ __forceinline__ void preload() {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
        for (int ki = 0; ki < D / 16; ++ki) load(fragments[mi][ki], tile.down(row, 0), mi, ki);
    }
  }
};

// c (16 kMmaM x 8 kMmaN) = start + A B^T, where A is the left operand and B the first 8 kMmaN rows of `right`, both in
// shared memory (SS). start: initial values, the same for all fragments in a column of fragments.
template <class Element, int D, int kMmaM, int kMmaN, bool kInRegisters>
__device__ __forceinline__ void gemm_ss(float (&c)[kMmaM][kMmaN][4],
                                        const LeftOperand<Element, D, kMmaM, kInRegisters>& left,
                                        Tile<Element, D> right, const float (&start)[kMmaN][4]) {
  const float (&sums)[kMmaM][kMmaN][4] = c;
  // In a loop of the caller, these two offsets take one register each. Offsets of other chunks are derived by XOR.
  const int a_lane = recomputed(left.tile.down(left.row, 0)), b_lane = recomputed(right.across(0, 0));
#pragma unroll
  for (int ki = 0; ki < D / 16; ++ki) {
    uint32_t a[kMmaM][4];
#pragma unroll
    for (int mi = 0; mi < kMmaM; ++mi) {
      if constexpr (kInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[mi][i] = left.fragments[mi][ki][i];
      } else {
        left.load(a[mi], a_lane, mi, ki);
      }
    }
    const char* rows = shared_memory() + Tile<Element, D>::advance(b_lane, 2 * ki);
#pragma unroll
    for (int ni = 0; ni < kMmaN; ni += 2) {
      uint32_t b[4];
      ldmatrix(b, rows + 8 * ni * Tile<Element, D>::kRowBytes);
#pragma unroll
      for (int mi = 0; mi < kMmaM; ++mi) {
        mma<Element>(c[mi][ni], a[mi], b[0], b[1], ki ? sums[mi][ni] : start[ni]);
        mma<Element>(c[mi][ni + 1], a[mi], b[2], b[3], ki ? sums[mi][ni + 1] : start[ni + 1]);
      }
    }
  }
}

// c (16 kMmaM x D) += A B, where A (16 kMmaM x 8 kMmaK) is in registers and B is the first 8 kMmaK rows of `right`, in
// shared memory (RS).
template <class Element, int D, int kMmaM, int kMmaK>
__device__ __forceinline__ void gemm_rs(float (&c)[kMmaM][D / 8][4], const uint32_t (&A)[kMmaM][kMmaK][2],
                                        Tile<Element, D> right) {
  const int b_lane = recomputed(right.down(0, 0));
#pragma unroll
  for (int ki = 0; ki < kMmaK; ki += 2) {
    uint32_t a[kMmaM][4];
#pragma unroll
    for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[mi][i] = A[mi][ki + i / 2][i % 2];
#pragma unroll
    for (int ni = 0; ni < D / 8; ni += 2) {
      uint32_t b[4];
      const char* rows = shared_memory() + Tile<Element, D>::advance(b_lane, ni);
      ldmatrix_transposed(b, rows + 8 * ki * Tile<Element, D>::kRowBytes);
#pragma unroll
      for (int mi = 0; mi < kMmaM; ++mi) {
        mma<Element>(c[mi][ni], a[mi], b[0], b[1], c[mi][ni]);
        mma<Element>(c[mi][ni + 1], a[mi], b[2], b[3], c[mi][ni + 1]);
      }
    }
  }
}

// c (16 x 8 kMmaN) += A^T B, where A is 16 columns of kDepth rows of `left`, beginning with column `row`, and B is
// 8 kMmaN columns of kDepth rows of `right`, beginning with `column`. Both are in shared memory.
template <int kDepth, class Element, int M, int D, int kMmaN>
__device__ __forceinline__ void gemm_transposed(float (&c)[kMmaN][4], Tile<Element, M> left, int row,
                                                Tile<Element, D> right, int column) {
  const int a_lane = recomputed(left.across(0, row / 8)), b_lane = recomputed(right.down(0, column / 8));
#pragma unroll
  for (int ki = 0; ki < kDepth / 16; ++ki) {
    uint32_t a[4];
    ldmatrix_transposed(a, shared_memory() + a_lane + 16 * ki * Tile<Element, M>::kRowBytes);
#pragma unroll
    for (int ni = 0; ni < kMmaN; ni += 2) {
      uint32_t b[4];
      const char* rows = shared_memory() + Tile<Element, D>::advance(b_lane, ni);
      ldmatrix_transposed(b, rows + 16 * ki * Tile<Element, D>::kRowBytes);
      mma<Element>(c[ni], a, b[0], b[1], c[ni]);
      mma<Element>(c[ni + 1], a, b[2], b[3], c[ni + 1]);
    }
  }
}

}  // namespace tinystory::cuda
