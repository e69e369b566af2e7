// Building blocks of the attention kernels: tiles in shared memory, warp-level GEMMs on register fragments, dropout.
//
// A 16 x 8 accumulator fragment has the layout of mma.m16n8k16. With g = lane / 4 and t = lane % 4, c[0] and c[1] hold
// columns 2t and 2t + 1 of row g, and c[2] and c[3] hold the same columns of row g + 8. Two adjacent fragments are
// exactly the A operand of the next mma, so P and dS stay in registers between two GEMMs. kMmaM, kMmaN and kMmaK are
// the numbers of 16-row, 8-column and 8-deep fragments of a warp's GEMM, indexed by mi, ni and ki.
#pragma once
#include <type_traits>

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

// --- fragments -------------------------------------------------------------------------------------------------------
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

// --- GEMMs -----------------------------------------------------------------------------------------------------------
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

// The same in float32, with FMAs instead of tensor cores (TF32), because accuracy matters more than speed here.
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

// --- dropout ---------------------------------------------------------------------------------------------------------
struct Dropout {
  DropoutKeys keys;
  uint32_t threshold;  // 0: off
  float scale;
};

// Dropout mask of 16 kMmaM x 8 kMmaN weights, at most 32 x 32, held as fragments. Rows are keys if kTransposed, else
// queries. The first row and the first column are multiples of 16, and of 32 in a dimension of size 32.
template <bool kTransposed, int kMmaM, int kMmaN>
struct KeepMask {
  static constexpr int kQueryBlocks = kTransposed ? kMmaN : 2 * kMmaM, kKeyBlocks = kTransposed ? 2 * kMmaM : kMmaN;
  static_assert(kQueryBlocks <= 4 && kKeyBlocks <= 4);
  // One word per block of eight queries. Byte j has the bits of key block j: the top bit is set if the weight in this
  // lane's even column is kept, and the next bit if the weight in this lane's odd column is kept.
  uint32_t words[kQueryBlocks];

  __device__ __forceinline__ void draw(const Dropout& d, int head, int row, int column) {
    const int g = lane_id() / 4, t = lane_id() % 4, query = kTransposed ? column : row,
              key = kTransposed ? row : column;
    const uint32_t complement = (256 - d.threshold) * 0x01010101u;
    uint32_t mean[2][kQueryBlocks];
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const Words4 all = dropout_words(d.keys, uint32_t(head), uint32_t(query + (kTransposed ? 2 * t + odd : g)),
                                       uint32_t(key + (kTransposed ? g : 2 * t + odd)));
      uint32_t word[4] = {all.x, all.y, all.z, all.w};
      if (kQueryBlocks < 4 && query % 32) word[0] = word[2], word[1] = word[3];
#pragma unroll
      for (int i = 0; i < kQueryBlocks; ++i) {
        if constexpr (kKeyBlocks < 4) word[i] >>= key % 32;
        // for each byte, the mean of the byte and 256 - threshold, which is >= 128 if the byte is >= threshold
        mean[odd][i] = (word[i] & complement) + ((word[i] ^ complement) >> 1 & 0x7f7f7f7fu);
      }
    }
    // `recomputed` keeps the compiler from postponing a part of the rounds to code that is short of registers
#pragma unroll
    for (int i = 0; i < kQueryBlocks; ++i)
      words[i] = recomputed((mean[0][i] & 0x80808080u) | (mean[1][i] >> 1 & 0x7f7f7f7fu));
  }
  // Whether element i of fragment (mi, ni) is kept.
  __device__ __forceinline__ bool kept(int mi, int ni, int i) const {
    const int row = 2 * mi + i / 2;
    return words[kTransposed ? ni : row] >> (8 * (kTransposed ? row : ni) + 7 - i % 2) & 1;
  }
  // Zeroes the dropped elements of a fragment.
  __device__ __forceinline__ void apply(uint32_t (&c)[2], int mi, int ni) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 2 * mi + half;
      const uint32_t word = words[kTransposed ? ni : row];
      c[half] &= spread_signs(word, word << 1, kTransposed ? row : ni);
    }
  }
  __device__ __forceinline__ void apply(float (&c)[4], int mi, int ni) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!kept(mi, ni, i)) c[i] = 0;
  }
  // The same for all fragments. The first column of the mask is that of c[mi][column].
  __device__ __forceinline__ void apply(auto& c, int column = 0) const {
#pragma unroll
    for (int mi = 0; mi < kMmaM; ++mi)
#pragma unroll
      for (int ni = 0; ni < kMmaN; ++ni) apply(c[mi][column + ni], mi, ni);
  }
};

// --- parameters ------------------------------------------------------------------------------------------------------
// The parameters of every attention kernel. A row of qkv holds q, k and v of all heads.
template <class Element>
struct AttentionParams {
  const Element* qkv;
  Element* out;
  float* lse;
  const Element* grad_out;
  Element* grad_qkv;
  int T, H, heads, group;   // heads: B * H; group: heads per group, see longest_first
  float scale, scale_log2;  // scale of the scores, without and with the factor log2(e)
  Dropout dropout;

  // Offset of a head's first row in a tensor with per_row * H vectors of D elements per row.
  template <int D>
  __device__ __forceinline__ int64_t head_offset(int head, int per_row) const {
    return (int64_t(head / H) * T * per_row * H + head % H) * D;
  }
};

inline int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// Heads per group. Blocks start in the order of their indices. If the longest blocks start first, the last blocks are
// short, and all SMs finish at almost the same time. Heads are processed in groups of equal size, so that the data
// shared by the blocks of a head, for all heads of a group, fits in the L2 cache of an A100 or H100. shared_bytes:
// shared data per head.
constexpr int64_t kCacheBytes = 32 << 20;
inline int heads_per_group(int64_t heads, int64_t shared_bytes) {
  const int64_t fit = shared_bytes < kCacheBytes ? kCacheBytes / shared_bytes : 1;
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

// The parameters of an attention kernel. bytes_per_element: bytes that the blocks of a head share, per element of one
// (T, D) matrix.
template <class Element>
AttentionParams<Element> attention_params(const Attention& x, int bytes_per_element) {
  const double scale = 1 / std::sqrt(double(x.D));
  const uint32_t threshold = dropout_threshold(x.dropout);
  return {.qkv = static_cast<const Element*>(x.qkv),
          .out = static_cast<Element*>(x.out),
          .lse = static_cast<float*>(x.lse),
          .grad_out = static_cast<const Element*>(x.grad_out),
          .grad_qkv = static_cast<Element*>(x.grad_qkv),
          .T = int(x.T),
          .H = int(x.H),
          .heads = int(x.B * x.H),
          .group = heads_per_group(x.B * x.H, x.T * x.D * bytes_per_element),
          .scale = float(scale),
          .scale_log2 = float(scale * 1.4426950408889634),
          .dropout = {dropout_keys(x.seed), threshold, float(dropout_scale(threshold))}};
}

}  // namespace tinystory::cuda
