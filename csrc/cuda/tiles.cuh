// Tiles of the attention kernels in shared memory, and how they are filled by global memory.
#pragma once
#include "dispatch.cuh"

namespace tinystory::cuda {

// Rows of D elements in shared memory, swizzled: the 16-byte chunks of a row are permuted depending on the row index.
// So the eight rows that ldmatrix (or a 16-byte access of a quarter-warp) reads at one column use each of the 32 banks
// once.
template <class Element, int D>
struct Tile {
  static constexpr int kRowBytes = D * int(sizeof(Element)), kChunks = kRowBytes / 16;
  static constexpr int kSwizzled = kChunks < 8 ? kChunks : 8;  // chunks are permuted within groups of this size
  int offset;                                                  // byte offset in shared memory

  static __device__ __forceinline__ int chunk_offset(int row, int c) {
    const int key = kChunks >= 8 ? row % 8 : row / (8 / kChunks) % kChunks;
    return row * kRowBytes + ((c ^ key) * 16);
  }
  __device__ __forceinline__ char* chunk(int row, int c) const {
    return shared_memory() + offset + chunk_offset(row, c);
  }
  // For ldmatrix: the offset of this lane's row in the 16 x 16 elements at `row` and chunk c, which are multiples of 16
  // elements. The second of the four 8 x 8 matrices is below the first (down) or beside the first (across).
  __device__ __forceinline__ int down(int row, int c) const {
    return offset + chunk_offset(row + lane_id() % 16, c + lane_id() / 16);
  }
  __device__ __forceinline__ int across(int row, int c) const {
    return offset + chunk_offset(row + lane_id() / 16 * 8 + lane_id() % 8, c + lane_id() / 8 % 2);
  }
  // The offset in chunk c + `chunks` of a row, given the offset in chunk c. c and `chunks` must have no bit in common.
  static __device__ __forceinline__ int advance(int chunk_offset, int chunks) {
    return (chunk_offset ^ chunks % kSwizzled * 16) + chunks / kSwizzled * kSwizzled * 16;
  }
};

// The address of this thread's part for load_rows. from: the first row. stride: distance between rows, in elements.
template <class Element, int D>
__device__ __forceinline__ const Element* thread_part(const Element* from, int stride) {
  constexpr unsigned kChunks = Tile<Element, D>::kChunks;
  return from + int64_t(threadIdx.x / kChunks) * stride + threadIdx.x % kChunks * kVecElements<Element>;
}

// Starts copying kRows rows to a tile. from: this thread's part, see thread_part. stride: distance between rows, in
// elements. Rows at or beyond `valid` are filled with zeros.
template <int kRows, int kThreads, class Element, int D>
__device__ __forceinline__ void load_rows(Tile<Element, D> to, const Element* from, int stride, int valid) {
  constexpr int kChunks = Tile<Element, D>::kChunks, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0, "every thread copies the same number of chunks");
  const unsigned thread = recomputed(threadIdx.x);
  const int row = int(thread / kChunks), c = int(thread % kChunks);
  char* const first = to.chunk(row, c);
#pragma unroll
  for (int r = 0; r < kRows; r += kStep) {
    char* const chunk = kStep % 8 ? to.chunk(row + r, c) : first + r * Tile<Element, D>::kRowBytes;
    copy_async16(chunk, from, row + r < valid);
    from += kStep * stride;  // incremented, because precomputed offsets for all steps would need too many registers
  }
}

}  // namespace tinystory::cuda
