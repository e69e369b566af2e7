// Attention kernels against their plain loops, the same bits however the work is split, nothing written
// out of bounds (each output has a guard behind it).
#include <cstring>

#include "cpu/plain.h"
#include "harness.h"

using namespace tinystory;

struct Case {
  int64_t B, T, H, D;
  double dropout;
};

void test(const Case& c, int threads) {
  const int64_t n = c.B * c.T * c.H * c.D, rows = c.B * c.H * c.T;
  const std::vector<float> qkv = normal(3 * n, 1), grad_out = normal(n, 2);
  constexpr float kGuard = 12345;
  struct Results {
    std::vector<float> out, lse, grad;
  };
  const auto run = [&](const auto& forward, const auto& backward) {
    Results r{std::vector<float>(n + 64, kGuard), std::vector<float>(rows + 64, kGuard),
              std::vector<float>(3 * n + 64, kGuard)};
    const Attention x{.dtype = DType::f32,
                      .B = c.B,
                      .T = c.T,
                      .H = c.H,
                      .D = c.D,
                      .dropout = c.dropout,
                      .seed = 99,
                      .qkv = qkv.data(),
                      .out = r.out.data(),
                      .lse = r.lse.data(),
                      .grad_out = grad_out.data(),
                      .grad_qkv = r.grad.data()};
    forward(x);
    backward(x);
    return r;
  };
  const auto split = [&](auto kernel, int threads) {
    return [=](const Attention& x) {
      parallel(x.B * x.H, threads, [&](int64_t begin, int64_t end) { kernel(x, begin, end); });
    };
  };
  const Results want = run(plain::attention_forward, plain::attention_backward);
  const Results got = run(split(cpu::attention_forward, threads), split(cpu::attention_backward, threads));
  check_near(got.out, want.out, 1e-5, "out");
  check_near(got.lse, want.lse, 1e-5, "lse");
  check_near(got.grad, want.grad, 3e-5, "grad");
  for (int i = 0; i < 64; ++i)
    CHECK(got.out[n + i] == kGuard && got.lse[rows + i] == kGuard && got.grad[3 * n + i] == kGuard);

  const Results again = run(split(cpu::attention_forward, 1), split(cpu::attention_backward, 1));
  CHECK(again.out == got.out && again.lse == got.lse && again.grad == got.grad);
}

// bf16 and f16 inputs: the same values in f32 give the same result up to the rounding of weights and output.
void test_halves(DType type, const Case& c) {
  const int64_t n = c.B * c.T * c.H * c.D;
  std::vector<float> wide = normal(3 * n, 5), wide_grad = normal(n, 6);
  std::vector<uint16_t> qkv(3 * n), grad(n), o(n), g(3 * n);
  const auto narrow = [&](float& f, uint16_t& to) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    u &= 0xffff0000;  // representable in bf16
    if (type == DType::f16) u &= 0xffffe000;
    std::memcpy(&f, &u, 4);
    to = type == DType::bf16 ? u >> 16 : f == 0 ? 0 : (u >> 16 & 0x8000) | (((u & 0x7fffffff) - 0x38000000) >> 13);
    if (type == DType::f16 && std::fabs(f) < 1e-4f) f = to = 0;
  };
  for (int64_t i = 0; i < 3 * n; ++i) narrow(wide[i], qkv[i]);
  for (int64_t i = 0; i < n; ++i) narrow(wide_grad[i], grad[i]);
  std::vector<float> lse(c.B * c.H * c.T), o32(n), g32(3 * n);
  Attention x{.dtype = DType::f32,
              .B = c.B,
              .T = c.T,
              .H = c.H,
              .D = c.D,
              .dropout = c.dropout,
              .seed = 1,
              .qkv = wide.data(),
              .out = o32.data(),
              .lse = lse.data(),
              .grad_out = wide_grad.data(),
              .grad_qkv = g32.data()};
  cpu::attention_forward(x, 0, c.B * c.H);
  cpu::attention_backward(x, 0, c.B * c.H);
  x.dtype = type, x.qkv = qkv.data(), x.out = o.data(), x.grad_out = grad.data(), x.grad_qkv = g.data();
  cpu::attention_forward(x, 0, c.B * c.H);
  cpu::attention_backward(x, 0, c.B * c.H);
  const auto widen = [&](uint16_t h) {
    if (type == DType::bf16) {
      const uint32_t u = uint32_t(h) << 16;
      float f;
      std::memcpy(&f, &u, 4);
      return f;
    }
    const int e = h >> 10 & 31;
    const float f = e ? std::ldexp(float(1024 + (h & 1023)), e - 25) : std::ldexp(float(h & 1023), -24);
    return h >> 15 ? -f : f;
  };
  const float tolerance = type == DType::bf16 ? 0.03f : 0.004f;
  for (int64_t i = 0; i < n; ++i) CHECK(std::fabs(widen(o[i]) - o32[i]) < tolerance, "%g %g", widen(o[i]), o32[i]);
  for (int64_t i = 0; i < 3 * n; ++i)
    CHECK(std::fabs(widen(g[i]) - g32[i]) < 2 * tolerance, "%g %g", widen(g[i]), g32[i]);
}

void test_decode() {
  const int64_t B = 3, P = 9, H = 2, D = 48, T = 37, row = H * D;
  const std::vector<float> qkv = normal(B * 3 * row, 1), prefix = normal(P * 2 * row, 2);
  const std::vector<float> before = normal(B * T * 2 * row, 3);
  std::vector<float> cache = before, out(B * row);
  const int64_t lengths[] = {0, 36, 17}, spans[] = {0, 9, 4, 4, 3, 8};
  DecodeAttention x{.dtype = DType::f32,
                    .B = B,
                    .P = P,
                    .T = T,
                    .H = H,
                    .D = D,
                    .qkv = qkv.data(),
                    .prefix = prefix.data(),
                    .spans = spans,
                    .cache = cache.data(),
                    .lengths = lengths,
                    .out = out.data()};
  parallel(B * H, 3, [&](int64_t begin, int64_t end) { cpu::decode_attention(x, begin, end); });
  std::vector<float> plain_cache = before, want(B * row);
  x.cache = plain_cache.data(), x.out = want.data();
  plain::decode_attention(x);
  check_near(out, want, 1e-5, "out");
  CHECK(cache == plain_cache, "the new keys and values are appended, and nothing else is written");
}

int main() {
  for (const Case& c : {Case{1, 1, 1, 16, 0},
                        {2, 3, 2, 32, 0},
                        {1, 47, 1, 64, 0},
                        {1, 48, 1, 64, 0.1},
                        {1, 49, 3, 64, 0},
                        {2, 64, 1, 128, 0},
                        {1, 65, 2, 32, 0.3},
                        {1, 101, 1, 96, 0.5},
                        {1, 150, 2, 64, 0}})
    test(c, 3);
  for (DType type : {DType::bf16, DType::f16})
    for (const Case& c : {Case{1, 1, 2, 64, 0},
                          {1, 33, 1, 32, 0.2},
                          {2, 97, 1, 64, 0},
                          {1, 50, 1, 48, 0},
                          {1, 49, 1, 128, 0},
                          {1, 200, 1, 32, 0.1}})
      test_halves(type, c);
  test_decode();
}
