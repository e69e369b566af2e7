// Fragments: the part of a warp's matrix that a lane holds in registers, and how a warp writes its matrix to memory.
//
// A 16 x 8 accumulator fragment has the layout of mma.m16n8k16. With g = lane / 4 and t = lane % 4, c[0] and c[1] hold
// columns 2t and 2t + 1 of row g, and c[2] and c[3] hold the same columns of row g + 8. Two adjacent fragments are
// exactly the A operand of the next mma, so P and dS stay in registers between two GEMMs. kMmaM, kMmaN and kMmaK are
// the numbers of 16-row, 8-column and 8-deep fragments of a warp's GEMM, indexed by mi, ni and ki.
#pragma once
#include <type_traits>

#include "tiles.cuh"

namespace tinystory::cuda {

// Calls f(mi, half) for each row in this lane's fragments: row 16 mi + 8 half + g.
template <int kMmaM, class F>
__device__ __forceinline__ void each_row(const F& f) {
#pragma unroll
  for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half) f(mi, half);
}

// Calls f(mi, ni, i) for each element c[mi][ni][i] that this lane holds of a 16 kMmaM x 8 kMmaN matrix.
template <int kMmaM, int kMmaN, class F>
__device__ __forceinline__ void each_element(const F& f) {
#pragma unroll
  for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
    for (int ni = 0; ni < kMmaN; ++ni)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(mi, ni, i);
}

template <int kMmaM, int kMmaN>
__device__ __forceinline__ void clear(float (&c)[kMmaM][kMmaN][4]) {
  each_element<kMmaM, kMmaN>([&](int mi, int ni, int i) { c[mi][ni][i] = 0; });
}

template <int kMmaM, int kMmaN>
__device__ __forceinline__ void multiply(float (&c)[kMmaM][kMmaN][4], float factor) {
  each_element<kMmaM, kMmaN>([&](int mi, int ni, int i) { c[mi][ni][i] *= factor; });
}

// row_max, multiply_row: the maximum of this lane's part of a row (columns 2t and 2t + 1 of each fragment), and the
// multiplication of this part by a factor.
template <int kMmaN>
__device__ __forceinline__ float row_max(const float (&c)[kMmaN][4], int half) {
  float highest = c[0][2 * half];
#pragma unroll
  for (int ni = 0; ni < kMmaN; ++ni) highest = fmaxf(highest, fmaxf(c[ni][2 * half], c[ni][2 * half + 1]));
  return highest;
}
template <int kMmaN>
__device__ __forceinline__ void multiply_row(float (&c)[kMmaN][4], int half, float factor) {
#pragma unroll
  for (int ni = 0; ni < kMmaN; ++ni)
#pragma unroll
    for (int i = 2 * half; i < 2 * half + 2; ++i) c[ni][i] *= factor;
}

// Sets an element to -infinity if hidden(row, column) is true, with row and column relative to the first fragment.
template <int kMmaM, int kMmaN, class F>
__device__ __forceinline__ void mask(float (&c)[kMmaM][kMmaN][4], unsigned lane, const F& hidden) {
  const int g = int(lane / 4), t = int(lane % 4);
  each_element<kMmaM, kMmaN>([&](int mi, int ni, int i) {
    if (hidden(16 * mi + g + i / 2 * 8, 8 * ni + 2 * t + i % 2)) c[mi][ni][i] = -INFINITY;
  });
}

// Fragments as the left operand of the next GEMM. For a 16-bit type: the pair of elements in row g, then that in row g
// + 8.
template <class Element, int kMmaM, int kMmaN>
using Packed = std::conditional_t<sizeof(Element) == 2, uint32_t[kMmaM][kMmaN][2], float[kMmaM][kMmaN][4]>;

template <class Element, int kMmaM, int kMmaN, int kParts>
__device__ __forceinline__ void pack_fragments(auto (&to)[kMmaM][kMmaN][kParts], const float (&c)[kMmaM][kMmaN][4]) {
#pragma unroll
  for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
    for (int ni = 0; ni < kMmaN; ++ni)
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        if constexpr (sizeof(Element) == 2) to[mi][ni][i] = pack2<Element>(c[mi][ni][2 * i], c[mi][ni][2 * i + 1]);
        else to[mi][ni][i] = c[mi][ni][i];
      }
}

// Writes two adjacent elements. `to` is aligned to the pair.
__device__ __forceinline__ void store2(float* to, float x, float y) {
  to[0] = x;
  to[1] = y;
}
template <class Element>
__device__ __forceinline__ void store2(Element* to, float x, float y) {
  *reinterpret_cast<uint32_t*>(to) = pack2<Element>(x, y);
}

// Writes the fragments of a warp to a tile in shared memory, beginning with row `row` of the tile.
template <class Element, int D, int kMmaM, int kMmaN, int kParts>
__device__ __forceinline__ void store_fragments(const auto (&c)[kMmaM][kMmaN][kParts], Tile<Element, D> to, int row) {
  using T = Tile<Element, D>;
  constexpr int kVec = kVecElements<Element>;
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int lane = to.offset + T::chunk_offset(row + g, 2 * t / kVec) + 2 * t % kVec * int(sizeof(Element));
#pragma unroll
  for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
    for (int ni = 0; ni < kMmaN; ++ni)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        auto* pair = reinterpret_cast<std::remove_cvref_t<decltype(c[mi][ni][0])>*>(
            shared_memory() + T::advance(lane, 8 * ni / kVec) + (16 * mi + 8 * half) * T::kRowBytes);
#pragma unroll
        for (int i = 0; i < kParts / 2; ++i) pair[i] = c[mi][ni][kParts / 2 * half + i];
      }
}

// Writes 16 kMmaM rows of a warp to global memory, 16 bytes per lane. They are staged through rows of a tile that only
// this warp still reads.
template <class Element, int D, int kMmaM>
__device__ __forceinline__ void store_rows(const float (&c)[kMmaM][D / 8][4], Tile<Element, D> staging, int row,
                                           Element* to, int stride, int valid) {
  Packed<Element, kMmaM, D / 8> packed;
  pack_fragments<Element>(packed, c);
  sync_warp();
  store_fragments(packed, staging, row);
  sync_warp();
  constexpr int kChunks = Tile<Element, D>::kChunks;
#pragma unroll
  for (int ki = 0; ki < 16 * kMmaM * kChunks / kWarpSize; ++ki) {
    const int i = ki * kWarpSize + lane_id(), r = i / kChunks, c16 = i % kChunks;
    if (row + r < valid)
      store16(to + int64_t(row + r) * stride + c16 * kVecElements<Element>, load16_shared(staging.chunk(row + r, c16)));
  }
}

}  // namespace tinystory::cuda
