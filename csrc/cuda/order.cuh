// The order in which the blocks of an attention kernel take their tiles.
#pragma once
#include "dispatch.cuh"

namespace tinystory::cuda {

inline int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// Heads per group. Blocks start in the order of their indices. If the longest blocks start first, the last blocks are
// short, and all SMs finish at almost the same time. Heads are processed in groups of equal size, so that the data
// shared by the blocks of a head, for all heads of a group, fits in four fifths of the L2 cache. shared_bytes: shared
// data per head.
inline int heads_per_group(int64_t heads, int64_t shared_bytes) {
  const int64_t room = l2_bytes() / 5 * 4, fit = shared_bytes < room ? room / shared_bytes : 1;
  return ceil_div(heads, ceil_div(heads, fit));
}

// The tile that a block computes: one tile of one head. The tile of rank 0 is the longest.
struct Share {
  int head, rank;
};
__device__ __forceinline__ Share longest_first(int block, int heads, int tiles, int group) {
  const int first = block / (group * tiles) * group, size = heads - first < group ? heads - first : group,
            within = block - first * tiles;
  return {first + within % size, within / size};
}

}  // namespace tinystory::cuda
