// Fixed-point sampling weights, one definition for CPU and CUDA.
//
// The weight of a token is floor(2^40 * 2^t) with t = (logit - maximum logit) * log2(e) / temperature. The float steps
// are single IEEE operations that are never fused, and the other steps are integer arithmetic, so every device computes
// the same weights. Integer sums do not depend on the order of the terms, so every device draws the same token. A token
// with a probability below 2^-40 times that of the most likely token has weight 0 and is never drawn.
#pragma once
#include <cstdint>

#include "philox.h"

namespace tinystory {

// 2^f for |f| <= 1/2, relative error under 1.1e-7: minimax polynomial of degree 6 with 2^0 = 1 exactly.
constexpr float kExp2[7] = {1.0f,           0.69314718246f, 0.24022647738f, 0.05550332367f,
                            0.00961843692f, 0.00133988750f, 0.00015353362f};
constexpr int kWeightBits = 40;
constexpr float kLowest = -60.0f;        // lower bound of t, at which the weight is already 0
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: x + kRounder has x, rounded to an integer, in the low bits
constexpr int32_t kRounderBits = 0x4B400000;

inline float weight_scale(double temperature) { return float(1.4426950408889634 / temperature); }

// An integer key with the order of the logits: a greater logit has a greater key; -0 and +0 have the same key.
TINYSTORY_HD uint32_t order_key(uint32_t float_bits) {
  if (float_bits == 0x80000000u) float_bits = 0;
  return float_bits >> 31 ? ~float_bits : float_bits | 0x80000000u;
}

// An integer in [0, total), as uniform as 64 bits allow.
TINYSTORY_HD uint64_t below(uint64_t bits, uint64_t total) {
#ifdef __CUDA_ARCH__
  return __umul64hi(bits, total);
#else
  return uint64_t((unsigned __int128)bits * total >> 64);
#endif
}

// Top-p in integers: p is rounded to a multiple of 2^-30. The kept tokens have a total weight of at least p * total,
// rounded up.
inline uint64_t top_p_fixed(double p) {
  const uint64_t fixed = uint64_t(p * 0x1p30 + 0.5);
  return fixed ? fixed : 1;
}
TINYSTORY_HD uint64_t top_p_need(uint64_t fixed, uint64_t total) {
  const uint64_t low = (total & 0x3fffffff) * fixed;
  return (total >> 30) * fixed + (low >> 30) + ((low & 0x3fffffff) != 0);
}

}  // namespace tinystory
