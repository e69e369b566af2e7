// The attention kernels on the SIMT machine against their definition in float64.
//
// Error bounds are per element and to first order. An output is a sum of products; each product may have a relative
// error of a few roundings in the dtype, plus the effect of float32 rounding on the score. So the bound is the same sum
// over absolute values, each term multiplied by its relative error.
#include <algorithm>
#include <set>

#include "../../../csrc/cuda/order.cuh"
#include "check.h"

using namespace tinystory;
using namespace test;

namespace {

struct Case {
  int64_t B, T, H;
  double dropout, scale = 1;
};

bool kept(uint64_t seed, int64_t head, int64_t i, int64_t j, double p) {
  const Words4 w = dropout_words(dropout_keys(seed), uint32_t(head), uint32_t(i), uint32_t(j));
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
  return (words[i % 32 / 8] >> (j % 32 / 8 * 8) & 0xff) >= dropout_threshold(p);
}

struct Expected {
  std::vector<double> out, out_bound, lse, lse_bound, grad, grad_bound;
};

Expected attend(const std::vector<double>& qkv, const std::vector<double>& grad_out, const Case& c, int64_t D,
                uint64_t seed, double unit, double least) {
  const auto [B, T, H, dropout, input_scale] = c;
  const double scale = 1 / std::sqrt(double(D)), keep_scale = dropout_scale(dropout_threshold(dropout));
  Expected e;
  e.out.resize(B * T * H * D), e.out_bound.resize(B * T * H * D, 1e-7);
  e.lse.resize(B * H * T), e.lse_bound.resize(B * H * T);
  e.grad.resize(qkv.size()), e.grad_bound.resize(qkv.size(), 1e-7);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i = 0; i < T; ++i) {
        const auto at = [&](int64_t row, int which) { return (((b * T + row) * 3 + which) * H + h) * D; };
        const double* q = &qkv[at(i, 0)];
        const int64_t o = ((b * T + i) * H + h) * D;
        std::vector<double> s(i + 1), p(i + 1), mask(i + 1);
        double top = -INFINITY, total = 0, score_size = 0;
        for (int64_t j = 0; j <= i; ++j) {
          double size = 0;
          for (int64_t d = 0; d < D; ++d) {
            s[j] += scale * q[d] * qkv[at(j, 1) + d];
            size += scale * std::fabs(q[d] * qkv[at(j, 1) + d]);
          }
          top = std::max(top, s[j]);
          score_size = std::max(score_size, size);
        }
        for (int64_t j = 0; j <= i; ++j) total += p[j] = std::exp(s[j] - top);
        const double score_error = score_size * 0x1p-22, weight_error = unit + score_error;
        e.lse[(b * H + h) * T + i] = top + std::log(total);
        e.lse_bound[(b * H + h) * T + i] = 4e-6 + score_error;
        std::vector<double> out_size(D);
        for (int64_t j = 0; j <= i; ++j) {
          p[j] /= total;
          mask[j] = kept(seed, b * H + h, i, j, dropout) ? keep_scale : 0;
          for (int64_t d = 0; d < D; ++d) {
            const double term = p[j] * mask[j] * qkv[at(j, 2) + d];
            e.out[o + d] += term;
            e.out_bound[o + d] += std::fabs(term) * weight_error + least * std::fabs(qkv[at(j, 2) + d]);
            out_size[d] += std::fabs(term);
          }
        }
        const double* g = &grad_out[o];
        double delta = 0, delta_size = 0;
        for (int64_t d = 0; d < D; ++d) delta += g[d] * e.out[o + d], delta_size += std::fabs(g[d]) * out_size[d];
        for (int64_t j = 0; j <= i; ++j) {
          double dp = 0, dp_size = 0;
          for (int64_t d = 0; d < D; ++d) {
            dp += mask[j] * g[d] * qkv[at(j, 2) + d];
            dp_size += mask[j] * std::fabs(g[d] * qkv[at(j, 2) + d]);
            e.grad[at(j, 2) + d] += p[j] * mask[j] * g[d];
            e.grad_bound[at(j, 2) + d] += std::fabs(g[d]) * (p[j] * mask[j] * weight_error + least);
          }
          const double ds = p[j] * (dp - delta) * scale,
                       ds_bound = p[j] * (dp_size + delta_size) * scale * weight_error + least;
          for (int64_t d = 0; d < D; ++d) {
            e.grad[at(i, 0) + d] += ds * qkv[at(j, 1) + d];
            e.grad[at(j, 1) + d] += ds * q[d];
            e.grad_bound[at(i, 0) + d] += ds_bound * std::fabs(qkv[at(j, 1) + d]);
            e.grad_bound[at(j, 1) + d] += ds_bound * std::fabs(q[d]);
          }
        }
      }
  return e;
}

template <class Element>
void test_training(const Case& c, int64_t D, uint64_t seed) {
  const std::string name = std::string(Type<Element>::name) + " B=" + std::to_string(c.B) +
                           " T=" + std::to_string(c.T) + " H=" + std::to_string(c.H) + " D=" + std::to_string(D) +
                           " dropout=" + std::to_string(c.dropout) + " scale=" + std::to_string(c.scale) +
                           " seed=" + std::to_string(seed);
  std::mt19937_64 random(seed);
  const auto qkv = normal<Element>(random, c.B * c.T * 3 * c.H * D, c.scale),
             grad_out = normal<Element>(random, c.B * c.T * c.H * D);
  // In 16-bit types P and the output are rounded once each; in float32 the long sums round as well.
  const double unit = Type<Element>::unit * (sizeof(Element) == 2 ? 2 : 32);
  const double least = std::is_same_v<Element, f16>
                           ? 0x1p-24
                           : 0;  // spacing of f16 subnormals, to which small elements of P are rounded
  const Expected want = attend(to_doubles(qkv), to_doubles(grad_out), c, D, seed, unit, least);

  simt::set_seed(seed);
  run(name, [&] {
    const simt::Buffer<Element> in(qkv), grad(grad_out);
    simt::Buffer<Element> out(c.B * c.T * c.H * D), grad_in(qkv.size());
    simt::Buffer<float> lse(c.B * c.H * c.T);
    const Attention x{Type<Element>::dtype, c.B,        c.T,         c.H,           D, c.dropout, seed, in.data(),
                      out.data(),           lse.data(), grad.data(), grad_in.data()};
    simt::Buffer<float> workspace(cuda::attention_backward_workspace(x));
    cuda::attention_forward(x, nullptr);
    check_close(to_doubles(out.read()), want.out, want.out_bound, "out " + name);
    check_close(to_doubles(lse.read()), want.lse, want.lse_bound, "lse " + name);
    cuda::attention_backward(x, workspace.data(), nullptr);
    const auto first = grad_in.read();
    check_close(to_doubles(first), want.grad, want.grad_bound, "grad " + name);
    check(simt::bank_conflicts() == 0, "bank conflicts, " + name);

    simt::set_seed(seed + 1000);  // the same bits in another order of threads and blocks
    cuda::attention_backward(x, workspace.data(), nullptr);
    check(std::memcmp(grad_in.data(), first.data(), first.size() * sizeof(Element)) == 0, "grad again " + name);
  });
}

template <class Element>
void test_training(uint64_t seed) {
  // At and around multiples of the tile sizes (16, 32, 64, 128), then random shapes.
  std::vector<Case> cases{{1, 1, 1, 0},   {2, 7, 3, 0},     {1, 16, 2, 0.3},    {1, 63, 1, 0},
                          {1, 64, 1, 0},  {1, 65, 2, 0.1},  {1, 127, 1, 0},     {1, 130, 2, 0.5},
                          {1, 257, 1, 0}, {1, 90, 1, 0, 5}, {1, 150, 1, 0.1, 5}};
  std::mt19937_64 random(seed);
  for (int i = 0; i < 12; ++i)
    cases.push_back(
        {1 + int64_t(random() % 2), 1 + int64_t(random() % 200), 1 + int64_t(random() % 2), i % 2 ? 0.0 : 0.2});
  for (const Case& c : cases)
    for (const int64_t D : {32, 64, 128}) test_training<Element>(c, D, ++seed);
}

// The longest tiles of a group's heads start first, and every tile belongs to a block.
void test_order() {
  for (const auto& [heads, tiles, group] :
       {std::tuple{1, 1, 1}, {1, 5, 1}, {7, 4, 7}, {10, 4, 5}, {11, 3, 4}, {384, 4, 192}}) {
    std::set<std::pair<int, int>> seen;
    bool in_order = true;
    int last_group = 0, last_rank = 0;
    for (int block = 0; block < heads * tiles; ++block) {
      const auto [head, rank] = cuda::longest_first(block, heads, tiles, group);
      if (head < 0 || head >= heads || rank < 0 || rank >= tiles) break;
      seen.insert({head, rank});
      in_order &= std::pair(last_group, last_rank) <= std::pair(head / group, rank);
      last_group = head / group, last_rank = rank;
    }
    check(in_order && int(seen.size()) == heads * tiles, "order of " + std::to_string(heads) + " heads");
  }
  // Groups that fit 32 MB of an A100's 40 MB: all heads; two equal groups; single heads that are larger. An RTX 3060 has
  // 3 MB.
  check(cuda::heads_per_group(192, 128 << 10) == 192, "one group");
  check(cuda::heads_per_group(192, 256 << 10) == 96, "two groups");
  check(cuda::heads_per_group(5, 64 << 20) == 1, "groups of one head");
  simt::set_l2_bytes(3 << 20);
  check(cuda::heads_per_group(192, 128 << 10) == 18, "groups on a GPU with a small cache");
  simt::set_l2_bytes(40 << 20);
}

// Unsupported arguments raise an error instead of giving a wrong result.
void expect_refusal(const std::string& part, DType dtype, int64_t D) {
  Attention x{};
  x.dtype = dtype, x.B = x.T = x.H = 1, x.D = D;
  for (const bool backward : {false, true}) {
    std::string got;
    try {
      if (backward) cuda::attention_backward(x, nullptr, nullptr);
      else cuda::attention_forward(x, nullptr);
    } catch (const std::invalid_argument& e) {
      got = e.what();
    }
    check(got.find(part) != std::string::npos, "expected a refusal with '" + part + "', got '" + got + "'");
  }
}

}  // namespace

int main(int argc, char** argv) {  // names of dtypes to test, default all
  const auto wanted = [&](const std::string& dtype) {
    return argc == 1 || std::find(argv + 1, argv + argc, dtype) != argv + argc;
  };
  test_order();
  expect_refusal("head size must be 32, 64 or 128, not 48", DType::f32, 48);
  expect_refusal("float64 is not implemented", DType::f64, 64);
  if (wanted("bf16")) test_training<bf16>(0);
  if (wanted("f16")) test_training<f16>(100);
  if (wanted("f32")) test_training<float>(200);
  return report("simt_attention");
}
