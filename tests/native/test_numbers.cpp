// Random numbers, 16-bit floats and the vector exponential.
#include "cpu/vec.h"
#include "harness.h"
#include "philox.h"
#include "weights.h"

using namespace tinystory;
using namespace tinystory::cpu;

int main() {
  {  // Known answers of Random123 (kat_vectors of Salmon et al.).
    const Words4 a = philox(0, {0, 0, 0, 0}), b = philox(~0ull, {~0u, ~0u, ~0u, ~0u});
    CHECK(a.x == 0x6627e8d5 && a.y == 0xe169c58d && a.z == 0xbc57ac4c && a.w == 0x9b00dbd8);
    CHECK(b.x == 0x408f276d && b.y == 0x41c83b0e && b.z == 0xa20bc7c6 && b.w == 0x6d5451fd);
    const Words4 c = philox(philox_keys<7>(0), {0, 0, 0, 0});
    CHECK(c.x == 0x5f6fb709 && c.y == 0x0d893f64 && c.z == 0x4f121f81 && c.w == 0x4f730a48);
  }
  for (uint32_t h = 0; h < 65536; ++h) {  // every half: value, way back, and the vector conversion
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    double want = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) want = mantissa ? NAN : INFINITY;
    if (h >> 15) want = -want;
    const float got = from_f16(uint16_t(h));
    CHECK(std::isnan(want) ? std::isnan(got) : got == want, "half %04x", h);
    if (!std::isnan(want)) CHECK(to_f16(got) == h, "half %04x", h);
    vh v{};
    v[0] = uint16_t(h);
    CHECK(std::isnan(want) ? std::isnan(from_f16(v)[0]) : from_f16(v)[0] == want);
  }
  for (uint32_t i = 0; i < 2'000'000; ++i) {  // rounding to halves and to bf16, against exact arithmetic
    uint32_t bits = i * 2147u + 12345u * (i >> 7);
    float f;
    std::memcpy(&f, &bits, 4);
    if (std::isnan(f)) continue;
    CHECK(to_f16(f) == to_f16(splat<vf>(f))[0], "%08x", bits);
    if (std::fabs(f) < 1e-37f) continue;  // the bf16 instruction flushes subnormals
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    CHECK(to_bf16(splat<vf>(f))[0] == rounded, "%08x", bits);
  }
  for (float x = -126; x < 127; x += 0.0137f) {
    const float got = exp2(splat<vf>(x))[W - 1];
    CHECK(std::fabs(got / std::exp2(double(x)) - 1) < 1.5e-7, "2^%g = %g", x, got);
  }
  CHECK(exp2(splat<vf>(-INFINITY))[0] == 0 && exp2(splat<vf>(-1000.0f))[0] == 0 && exp2(vf{})[0] == 1);
  for (const uint32_t bits : {0x7fc00000u, 0xffc00000u, 0xffffffffu}) {  // NaN stays NaN
    float nan;
    std::memcpy(&nan, &bits, 4);
    CHECK(std::isnan(exp2(splat<vf>(nan))[0]), "2^%08x", bits);
  }
  {  // Order-preserving keys.
    const float sorted[] = {-INFINITY, -3e38f, -1, -1e-40f, 0, 1e-40f, 0.5f, 1, 3e38f};
    uint32_t last = 0;
    for (float f : sorted) {
      uint32_t u;
      std::memcpy(&u, &f, 4);
      CHECK(order_key(u) > last);
      last = order_key(u);
    }
    CHECK(order_key(0x80000000u) == order_key(0));
  }
  CHECK(top_p_need(1ull << 30, 12345678901234567ull) == 12345678901234567ull);
  CHECK(top_p_need(1, 5) == 1 && top_p_need(1ull << 29, 7) == 4);
  CHECK(below(~0ull, 1000) == 999 && below(0, 1000) == 0 && below(1ull << 63, 1000) == 500);
}
