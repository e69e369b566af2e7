// A scalar twin of ARM's BFDOT and BFMMLA, rounding as they do with FPCR.EBF = 0 (Arm Architecture Reference Manual,
// DDI 0487): what csrc/cpu/arm_bf16.h runs with TINYSTORY_ARM_BF16_TWIN.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace arm_bf16_twin {

template <class To, class From>
To bits_as(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// x + rest as a float, where |rest| is less than the distance from x to the next floats: rounded to odd, that is, cut
// toward zero, and the last bit set if that changed the value. Subnormals become zero, beyond 2^128 is infinity.
inline float to_odd(double x, double rest) {
  if (!std::isfinite(x)) return std::isnan(x) ? bits_as<float>(0x7fc00000u) : float(x);
  constexpr uint64_t kCut = (uint64_t(1) << 29) - 1;
  uint64_t bits = bits_as<uint64_t>(x);
  if (rest != 0 && (rest > 0) != (x > 0)) --bits;  // x was rounded away from zero
  const bool exact = rest == 0 && (bits & kCut) == 0;
  const double cut = bits_as<double>(bits & ~kCut);
  if (std::fabs(cut) < 0x1p-126) return std::copysign(0.0f, float(cut));
  if (std::fabs(cut) >= 0x1p128) return std::copysign(INFINITY, float(cut));
  return bits_as<float>(bits_as<uint32_t>(float(cut)) | (exact ? 0 : 1));
}

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float half(uint32_t pair, int which) { return flushed(bits_as<float>(which ? pair & 0xffff0000 : pair << 16)); }

inline float product(float a, float b) { return to_odd(double(a) * double(b), 0); }

inline float sum(float a, float b) {
  const double x = flushed(a), y = flushed(b), s = x + y, t = s - x;
  return to_odd(s, (x - (s - t)) + (y - t));  // Knuth's TwoSum: exact
}

// sum + a b, of pairs of bf16.
inline float dot(float c, uint32_t a, uint32_t b) {
  return sum(c, sum(product(half(a, 0), half(b, 0)), product(half(a, 1), half(b, 1))));
}

}  // namespace arm_bf16_twin
