// Counter-based random numbers, one definition for CPU and CUDA: Philox4x32-10 of Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). tinystory/ops/reference.py has the same in PyTorch integers.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define TINYSTORY_HD __host__ __device__ __forceinline__
#else
#define TINYSTORY_HD inline
#endif

namespace tinystory {

struct Words4 {
  uint32_t x, y, z, w;
};

// The purpose of the bits is the last word of the counter, so that no two uses share a stream.
enum Purpose : uint32_t { kDropout = 0, kSample = 1 };

TINYSTORY_HD Words4 philox(uint64_t seed, Words4 counter) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * counter.x, b = uint64_t(0xCD9E8D57u) * counter.z;
    counter = {uint32_t(b >> 32) ^ counter.y ^ key0, uint32_t(b), uint32_t(a >> 32) ^ counter.w ^ key1, uint32_t(a)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// --- dropout on attention weights ------------------------------------------------------------------------------------
// Each weight (query i, key j) of head b * H + h has its own 16 random bits and is kept when they are >= the threshold.
// A 16 x 16 tile of weights takes 32 calls, numbered by lane = 4 * g + t as the threads of a warp hold an mma tile. Of
// a lane's four words, x holds row g at columns 2t (low half) and 2t + 1 (high half), y the same columns of row g + 8,
// and z and w the same two rows at columns 2t + 8 and 2t + 9.
TINYSTORY_HD Words4 dropout_words(uint64_t seed, uint32_t head, uint32_t tile_row, uint32_t tile_col, uint32_t lane) {
  return philox(seed, {tile_row * 32 + lane, tile_col, head, kDropout});
}

// p rounded to a multiple of 2^-16. The scale is 1 / (1 - rounded p), so that the expectation is exact.
TINYSTORY_HD uint32_t dropout_threshold(double p) { return uint32_t(p * 65536.0 + 0.5); }
TINYSTORY_HD double dropout_scale(uint32_t threshold) { return 65536.0 / double(65536u - threshold); }

// --- sampling --------------------------------------------------------------------------------------------------------
// 64 random bits for one token: a function of the seed, the row's id and the step alone.
TINYSTORY_HD uint64_t sample_bits(uint64_t seed, uint64_t row, uint32_t step) {
  const Words4 r = philox(seed, {uint32_t(row), uint32_t(row >> 32), step, kSample});
  return uint64_t(r.y) << 32 | r.x;
}

}  // namespace tinystory
