// Helpers for kernels with one block per row of logits: 16-byte accesses per lane, and reductions over the block.
#pragma once
#include <type_traits>

#include "dispatch.cuh"

namespace tinystory::cuda {

// A row of V elements, read kVec at a time, with one 16-byte access if the alignment of the row allows it.
template <class Element>
struct LogitRow {
  using Value = std::remove_const_t<Element>;
  static constexpr int kVec = kVecElements<Value>;
  Element* row;
  int V;

  __device__ __forceinline__ bool vectorizable(int v) const {
    return (reinterpret_cast<uintptr_t>(row) & 15) == 0 && v + kVec <= V;
  }
  __device__ __forceinline__ void load(float (&x)[kVec], int v, float past_end) const {
    if (vectorizable(v)) {
      unpack(x, load16(row + v), Value{});
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] = v + i < V ? to_float(row[v + i]) : past_end;
    }
  }
};

// Reduction over the block: first within each warp, then over the results of the warps in `shared` (one element per
// warp). The order is fixed, so floating-point sums are deterministic. All threads get the result.
template <class Value, class Combine>
__device__ __forceinline__ Value block_combine(Value x, Value* shared, const Combine& combine) {
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
