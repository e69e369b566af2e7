// Attention kernels against a plain double-precision loop, the same bits however the work is split, nothing written
// out of bounds (each output has a guard behind it).
#include <cstring>

#include "harness.h"
#include "kernels.h"
#include "philox.h"

using namespace tinystory;

struct Case {
  int64_t B, T, H, D;
  double dropout;
};

bool kept(const Case& c, uint64_t seed, int64_t head, int64_t i, int64_t j) {
  const Words4 w = dropout_words(dropout_keys(seed), head, i, j);
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
  return (words[i % 32 / 8] >> (j % 32 / 8 * 8) & 0xff) >= dropout_threshold(c.dropout);
}

void test(const Case& c, int threads) {
  const int64_t n = c.B * c.T * c.H * c.D, row = 3 * c.H * c.D;
  const std::vector<float> qkv = normal(3 * n, 1), grad_out = normal(n, 2);
  const uint64_t seed = 99;
  const double scale = 1 / std::sqrt(double(c.D)), drop = dropout_scale(dropout_threshold(c.dropout));
  std::vector<double> out(n), grad(3 * n);
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t h = 0; h < c.H; ++h)
      for (int64_t i = 0; i < c.T; ++i) {
        const auto at = [&](int which, int64_t t) { return (b * c.T + t) * row + which * c.H * c.D + h * c.D; };
        const int64_t o = ((b * c.T + i) * c.H + h) * c.D;
        std::vector<double> p(i + 1), dp(i + 1);
        double total = 0, delta = 0;
        for (int64_t j = 0; j <= i; ++j) {
          double s = 0;
          for (int64_t d = 0; d < c.D; ++d) s += double(qkv[at(0, i) + d]) * qkv[at(1, j) + d];
          total += p[j] = std::exp(s * scale);
        }
        for (int64_t j = 0; j <= i; ++j) {
          p[j] /= total;
          const double keep = kept(c, seed, b * c.H + h, i, j) ? drop : 0;
          for (int64_t d = 0; d < c.D; ++d) {
            out[o + d] += p[j] * keep * qkv[at(2, j) + d];
            grad[at(2, j) + d] += p[j] * keep * grad_out[o + d];
            dp[j] += keep * grad_out[o + d] * qkv[at(2, j) + d];
          }
          delta += p[j] * dp[j];
        }
        for (int64_t j = 0; j <= i; ++j)
          for (int64_t d = 0; d < c.D; ++d) {
            grad[at(0, i) + d] += p[j] * (dp[j] - delta) * scale * qkv[at(1, j) + d];
            grad[at(1, j) + d] += p[j] * (dp[j] - delta) * scale * qkv[at(0, i) + d];
          }
      }

  constexpr float guard = 12345;
  std::vector<float> o(n + 64, guard), g(3 * n + 64, guard), lse(c.B * c.H * c.T + 64, guard);
  const Attention x{DType::f32,      c.B,     c.T, c.H, c.D, c.dropout, seed, qkv.data(), o.data(), lse.data(),
                    grad_out.data(), g.data()};
  parallel(c.B * c.H, threads, [&](int64_t begin, int64_t end) { cpu::attention_forward(x, begin, end); });
  parallel(c.B * c.H, threads, [&](int64_t begin, int64_t end) { cpu::attention_backward(x, begin, end); });
  for (int64_t i = 0; i < n; ++i) CHECK(std::fabs(o[i] - out[i]) < 1e-5, "T %ld out %g != %g", long(c.T), o[i], out[i]);
  for (int64_t i = 0; i < 3 * n; ++i) CHECK(std::fabs(g[i] - grad[i]) < 3e-5, "grad %g != %g", g[i], grad[i]);
  for (int i = 0; i < 64; ++i) CHECK(o[n + i] == guard && g[3 * n + i] == guard && lse[c.B * c.H * c.T + i] == guard);

  std::vector<float> o1(n), g1(3 * n);
  Attention one = x;
  one.out = o1.data();
  one.grad_qkv = g1.data();
  cpu::attention_forward(one, 0, c.B * c.H);
  cpu::attention_backward(one, 0, c.B * c.H);
  CHECK(!std::memcmp(o1.data(), o.data(), n * 4) && !std::memcmp(g1.data(), g.data(), 3 * n * 4));
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
  Attention x{DType::f32,       c.B,       c.T, c.H, c.D, c.dropout, 1, wide.data(), o32.data(), lse.data(),
              wide_grad.data(), g32.data()};
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
  std::vector<float> cache = normal(B * T * 2 * row, 3), out(B * row);
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
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = 0; i < 2 * row; ++i)
      CHECK(cache[(b * T + lengths[b]) * 2 * row + i] == qkv[(b * 3 + 1) * row + i], "not appended");
    for (int64_t h = 0; h < H; ++h) {
      std::vector<double> want(D);
      double total = 0;
      const int64_t begin = spans[2 * b], shared = spans[2 * b + 1] - begin;
      for (int64_t j = 0; j <= shared + lengths[b]; ++j) {
        const float* key =
            (j < shared ? &prefix[(begin + j) * 2 * row] : &cache[(b * T + j - shared) * 2 * row]) + h * D;
        double s = 0;
        for (int64_t d = 0; d < D; ++d) s += double(qkv[b * 3 * row + h * D + d]) * key[d];
        total += s = std::exp(s / std::sqrt(double(D)));
        for (int64_t d = 0; d < D; ++d) want[d] += s * key[row + d];
      }
      for (int64_t d = 0; d < D; ++d) CHECK(std::fabs(out[(b * H + h) * D + d] - want[d] / total) < 1e-5);
    }
  }
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
