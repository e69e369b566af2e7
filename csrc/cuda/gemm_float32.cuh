// The GEMMs of gemm.cuh in float32, with FMAs instead of tensor cores (TF32), because accuracy matters more than speed
// here.
#pragma once
#include "gemm.cuh"

namespace tinystory::cuda {

template <int D, int kMmaM, int kMmaN>
__device__ __forceinline__ void gemm_ss(float (&c)[kMmaM][kMmaN][4], const LeftOperand<float, D, kMmaM, false>& left,
                                        Tile<float, D> right, const float (&start)[kMmaN][4]) {
  const int lane = recomputed(lane_id()), g = lane / 4, t = lane % 4;
  each_element<kMmaM, kMmaN>([&](int mi, int ni, int i) { c[mi][ni][i] = start[ni][i]; });
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

template <int D, int kMmaM, int kMmaK>
__device__ __forceinline__ void gemm_rs(float (&c)[kMmaM][D / 8][4], const float (&A)[kMmaM][kMmaK][4],
                                        Tile<float, D> right) {
  const int lane = recomputed(lane_id()), t = lane % 4;
#pragma unroll
  for (int ki = 0; ki < 8 * kMmaK; ++ki) {
    const int owner = lane / 4 * 4 + ki % 8 / 2;  // the lane with column ki of A, for this lane's rows
    float a[kMmaM][2];
#pragma unroll
    for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half) a[mi][half] = shuffle(A[mi][ki / 8][2 * half + ki % 2], owner);
#pragma unroll
    for (int ni = 0; ni < D / 8; ++ni) {
      // chunk 2 ni + t / 2, derived from chunk 2 ni, so that all offsets except two are compile-time constants
      const float* b =
          reinterpret_cast<const float*>(right.chunk(ki, 2 * ni)) + (ki % 2 ? -(t / 2) : t / 2) * 4 + t % 2 * 2;
#pragma unroll
      for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[mi][ni][i] = fmaf(a[mi][i / 2], b[i % 2], c[mi][ni][i]);
    }
  }
}

template <int kDepth, int M, int D, int kMmaN>
__device__ __forceinline__ void gemm_transposed(float (&c)[kMmaN][4], Tile<float, M> left, int row,
                                                Tile<float, D> right, int column) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const auto element = [](auto tile, int r, int i) {
    return reinterpret_cast<const float*>(tile.chunk(r, i / 4)) + i % 4;
  };
#pragma unroll 4
  for (int ki = 0; ki < kDepth; ++ki) {
    const float a[2] = {*element(left, ki, row + g), *element(left, ki, row + g + 8)};
#pragma unroll
    for (int ni = 0; ni < kMmaN; ++ni) {
      const float* b = element(right, ki, column + 8 * ni + 2 * t);
#pragma unroll
      for (int i = 0; i < 4; ++i) c[ni][i] = fmaf(a[i / 2], b[i % 2], c[ni][i]);
    }
  }
}

}  // namespace tinystory::cuda
