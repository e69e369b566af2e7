// One block a row of logits: pieces of 16 bytes a lane, and sums over the block.
#pragma once
#include <type_traits>

#include "dispatch.cuh"

namespace tinystory::cuda {

// A row of V numbers in pieces of kPiece, which are read and written at once where the row's beginning allows it.
template <class E>
struct LogitRow {
  using Number = std::remove_const_t<E>;
  static constexpr int kPiece = kPerVec16<Number>;
  E* row;
  int V;

  __device__ __forceinline__ bool whole(int v) const {
    return (reinterpret_cast<uintptr_t>(row) & 15) == 0 && v + kPiece <= V;
  }
  __device__ __forceinline__ void load(float (&x)[kPiece], int v, float past_end) const {
    if (whole(v)) {
      unpack(x, load16(row + v), Number{});
    } else {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) x[i] = v + i < V ? to_float(row[v + i]) : past_end;
    }
  }
  __device__ __forceinline__ void store(const float (&x)[kPiece], int v) const {
    if (whole(v)) {
      store16(row + v, pack(x, E{}));
    } else {
#pragma unroll
      for (int i = 0; i < kPiece; ++i)
        if (v + i < V) row[v + i] = from_float<E>(x[i]);
    }
  }
};

// Combines a value of every thread, first within warps, then over what the warps left in `shared` (a place for each).
// The order is fixed, so sums of floats are the same in every run.
template <class T, class F>
__device__ __forceinline__ T block_combine(T x, T* shared, const F& combine) {
  const int warp = int(threadIdx.x) / kWarpSize, lane = lane_id(), warps = int(blockDim.x) / kWarpSize;
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) x = combine(x, shuffle_xor(x, mask));
  if (lane == 0) shared[warp] = x;
  sync_block();
  x = shared[lane < warps ? lane : 0];
  for (int mask = 1; mask < warps; mask *= 2) x = combine(x, shuffle_xor(x, mask));
  x = shuffle(x, 0);
  sync_block();
  return x;
}

}  // namespace tinystory::cuda
