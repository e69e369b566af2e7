// The twin of ARM's bf16 instructions: known answers; and where this processor has them, the instructions beside it.
#include "arm_bf16_twin.h"
#include "cpu/arm_bf16.h"
#include "harness.h"

using namespace arm_bf16_twin;

constexpr uint32_t kOne = 0x3f80, kTiny = 0x0080, kHuge = 0x7f7f;  // 1, 2^-126, 255 * 2^120 in bf16

uint32_t pair(uint32_t low, uint32_t high) { return low | high << 16; }

void test_twin() {
  CHECK(dot(3, pair(kOne, 0x4000), pair(0x4040, 0xc080)) == 3 + 1 * 3 - 2 * 4);
  // To odd: 1 + 2^-24 is a tie that IEEE's rounding makes 1; below 1 the neighbour, 1 - 2^-24, is odd.
  CHECK(sum(1, 0x1p-24f) == 1 + 0x1p-23f && sum(1, 0x1p-100f) == 1 + 0x1p-23f && sum(1, -0x1p-100f) == 1 - 0x1p-24f);
  CHECK(sum(1 + 0x1p-23f, 0x1p-24f) == 1 + 0x1p-23f && sum(1 + 0x1p-23f, -0x1p-30f) == 1 + 0x1p-23f);
  CHECK(sum(-1, -0x1p-24f) == -1 - 0x1p-23f && sum(1 + 0x1p-22f, -0x1p-60f) == 1 + 0x1p-23f);
  // The pair is summed first, rounded, then added.
  CHECK(dot(-1, pair(kOne, 0x3380), pair(kOne, 0x3f80)) == 0x1p-23f && sum(sum(-1, 1), 0x1p-24f) == 0x1p-24f);
  // Subnormals are zero, whether read or formed.
  CHECK(dot(1, pair(0x0040, 0), pair(0x7f00, 0)) == 1 && dot(0x1p-127f, 0, 0) == 0);
  CHECK(product(0x1p-70f, -0x1p-60f) == 0 && std::signbit(product(0x1p-70f, -0x1p-60f)));
  CHECK(sum(0x1p-126f, -0x1.8p-126f) == 0 && dot(0, pair(kTiny, 0), pair(kOne, 0)) == 0x1p-126f);
  // Overflow is infinity, but the largest finite number is odd. There is one NaN.
  CHECK(sum(0x1.fffffep127f, 0x1p102f) == 0x1.fffffep127f && sum(0x1.fffffep127f, 0x1p104f) == INFINITY);
  CHECK(dot(0, pair(kHuge, 0), pair(kHuge | 0x8000, 0)) == -INFINITY);
  CHECK(bits_as<uint32_t>(sum(INFINITY, -INFINITY)) == 0x7fc00000 && bits_as<uint32_t>(sum(-NAN, 1)) == 0x7fc00000);
}

#if defined(TINYSTORY_ARM_BF16)
using namespace tinystory::cpu::arm;

// One in eight a special value, one in eight any bits, the rest of exponents so near that their sums are inexact.
uint32_t draw(std::mt19937& engine) {
  const uint32_t bits = engine(), kind = engine() % 8;
  constexpr uint32_t kSpecial[] = {0, 1, kTiny, kTiny - 1, kOne, kHuge, 0x7f80, 0x7fc1};
  if (kind == 0) return kSpecial[bits % 8] << 16 | (bits & 0x80000000) | (bits >> 8 & 1);
  if (kind == 1) return bits;
  return (bits & 0x807fffff) | (112 + (bits >> 23) % 32) << 23;
}

void test_instructions() {
  std::mt19937 engine(1);
  for (int n = 0; n < 300'000; ++n) {
    Sums c;
    Pairs a, b;
    for (int i = 0; i < 4; ++i) {
      c[i] = bits_as<float>(draw(engine));
      a[i] = draw(engine) >> 16 | (draw(engine) & 0xffff0000), b[i] = draw(engine) >> 16 | (draw(engine) & 0xffff0000);
    }
    const Sums dots = bfdot(c, a, b), squares = bfmmla(c, a, b);
    for (int i = 0; i < 4; ++i) {
      const int row = i / 2 * 2, column = i % 2 * 2;
      const float want = dot(c[i], a[i], b[i]);
      const float square = dot(dot(c[i], a[row], b[column]), a[row + 1], b[column + 1]);
      const auto same = [](float x, float y) { return bits_as<uint32_t>(x) == bits_as<uint32_t>(y); };
      CHECK(same(dots[i], want), "BFDOT(%a, %08x, %08x) = %a, not %a", c[i], a[i], b[i], dots[i], want);
      CHECK(same(squares[i], square), "BFMMLA: %a, not %a", squares[i], square);
    }
  }
}
#endif

int main() {
  test_twin();
#if defined(TINYSTORY_ARM_BF16)
  test_instructions();
#endif
}
