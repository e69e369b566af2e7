// Counter-based random numbers, one definition for CPU and CUDA: Philox4x32 of Salmon, Moraes, Dror and Shaw, "Parallel
// random numbers: as easy as 1, 2, 3" (SC 2011). Philox passes BigCrush with 7 or more rounds; the default is 10
// rounds. tinystory/ops/reference.py has the same function in PyTorch integers.
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

// Purpose of the random bits, the last word of the counter, so that no two purposes share a stream.
enum Purpose : uint32_t { kDropout = 0, kSample = 1, kBranch = 2 };

// The keys of all rounds. The host computes them once per kernel.
template <int kRounds>
struct PhiloxKeys {
  uint32_t word[kRounds][2];
};
template <int kRounds>
TINYSTORY_HD PhiloxKeys<kRounds> philox_keys(uint64_t seed) {
  PhiloxKeys<kRounds> keys;
  for (uint32_t round = 0; round < kRounds; ++round) {
    keys.word[round][0] = uint32_t(seed) + round * 0x9E3779B9u;
    keys.word[round][1] = uint32_t(seed >> 32) + round * 0xBB67AE85u;
  }
  return keys;
}

template <int kRounds>
TINYSTORY_HD Words4 philox(const PhiloxKeys<kRounds>& keys, Words4 counter) {
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * counter.x, b = uint64_t(0xCD9E8D57u) * counter.z;
    counter = {uint32_t(b >> 32) ^ counter.y ^ keys.word[round][0], uint32_t(b),
               uint32_t(a >> 32) ^ counter.w ^ keys.word[round][1], uint32_t(a)};
  }
  return counter;
}
TINYSTORY_HD Words4 philox(uint64_t seed, Words4 counter) { return philox(philox_keys<10>(seed), counter); }

// --- dropout on attention weights ------------------------------------------------------------------------------------
// Each weight (query i, key j) of head b * H + h has 8 random bits and is kept if they are >= the threshold. One call
// provides the bits of the 16 weights of a 32 x 32 tile with the same i % 8 and j % 8: byte j % 32 / 8 of word i % 32 /
// 8. So the fragment of an mma tile that a thread holds uses all bits of each call, whether rows are queries or keys.
using DropoutKeys = PhiloxKeys<7>;
TINYSTORY_HD DropoutKeys dropout_keys(uint64_t seed) { return philox_keys<7>(seed); }
TINYSTORY_HD Words4 dropout_words(const DropoutKeys& keys, uint32_t head, uint32_t i, uint32_t j) {
  return philox(keys, {i / 32 * 64 + i % 8 * 8 + j % 8, j / 32, head, kDropout});
}

// p rounded to a multiple of 1/256 below 1. The scale is 1 / (1 - rounded p), so that the expectation is exact.
TINYSTORY_HD uint32_t dropout_threshold(double p) { return p * 256.0 < 255.0 ? uint32_t(p * 256.0 + 0.5) : 255u; }
TINYSTORY_HD double dropout_scale(uint32_t threshold) { return 256.0 / double(256u - threshold); }

// --- dropout on a branch of the residual stream ----------------------------------------------------------------------
// One call provides the bits of 16 columns of a row: four groups of 4 columns that are 128 columns apart. Byte i of
// word group / 32 % 4 belongs to column i of the group. The groups of a call have the same group / 128 and group % 32.
TINYSTORY_HD Words4 branch_words(const DropoutKeys& keys, uint64_t row, uint32_t group) {
  return philox(keys, {group / 128 * 32 + group % 32, uint32_t(row), uint32_t(row >> 32), kBranch});
}

// --- sampling --------------------------------------------------------------------------------------------------------
// 64 random bits for one token. They depend only on the seed, the id of the row and the step.
TINYSTORY_HD uint64_t sample_bits(uint64_t seed, uint64_t row, uint32_t step) {
  const Words4 r = philox(seed, {uint32_t(row), uint32_t(row >> 32), step, kSample});
  return uint64_t(r.y) << 32 | r.x;
}

}  // namespace tinystory
