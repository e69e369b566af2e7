// Dropout of attention weights.
#pragma once
#include "fragments.cuh"

namespace tinystory::cuda {

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

}  // namespace tinystory::cuda
