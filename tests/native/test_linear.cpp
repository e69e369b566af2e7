// Linear layers and layer norm (with the sum before it), forward and backward, against their plain loops; the same
// bits on any number of threads. Buffers have the size that they need and no more, for sanitizers to see beyond
// their ends.
#include <algorithm>
#include <array>

#include "cpu/gemm.h"
#include "cpu/plain.h"
#include "harness.h"

using namespace tinystory;

struct alignas(64) Line {
  float x[16];
  bool operator==(const Line&) const = default;
};

struct Results {
  std::vector<float> y, grad_x, grad_weight, bias_parts;
  std::vector<Line> slope;
  bool operator==(const Results&) const = default;
};

void test_linear(DType gemm_type, bool gelu_too, int64_t M, int64_t K, int64_t N, int64_t chunk) {
  // Only the matmuls and `slope` are bf16: the kernels round the f32 inputs themselves.
  const bool bf16 = gemm_type == DType::bf16;
  const std::vector<float> x = normal(M * K, 1), weight = normal(N * K, 2, 1 / std::sqrt(float(K)));
  const std::vector<float> bias = normal(N, 3), grad_y = normal(M * N, 5);
  const int64_t blocks = (M + kLinearRows - 1) / kLinearRows;
  const auto results = [&](bool half) {
    return Results{std::vector<float>(M * N), std::vector<float>(M * K), std::vector<float>(N * K),
                   std::vector<float>(blocks * N), std::vector<Line>((half ? M * N / 2 : M * N) / 16)};
  };
  const auto arguments = [&](Results& r, const float* grad) {
    return Linear{.x_type = DType::f32,
                  .y_type = DType::f32,
                  .gemm_type = gemm_type,
                  .gelu = gelu_too,
                  .M = M,
                  .K = K,
                  .N = N,
                  .threads = 1,
                  .x = x.data(),
                  .weight = weight.data(),
                  .bias = bias.data(),
                  .y = r.y.data(),
                  .slope = r.slope.data(),
                  .grad_y = grad,
                  .grad_x = r.grad_x.data(),
                  .grad_weight = r.grad_weight.data(),
                  .bias_parts = r.bias_parts.data(),
                  .first = 0,
                  .rows = std::min(chunk, M),
                  .workspace = nullptr};
  };
  const auto run = [&](int threads) {
    Results r = results(bf16);
    for (const float* grad : {(const float*)nullptr, grad_y.data()}) {
      Linear l = arguments(r, grad);
      l.threads = threads;
      std::vector<char> workspace(cpu::linear_workspace(l));
      l.workspace = workspace.data();
      const auto step = [&](auto kernel, int64_t items) {
        parallel(items, threads, [&](int64_t begin, int64_t end) { kernel(l, begin, end); });
      };
      step(cpu::linear_pack_weight, grad ? N / 32 : (N + 63) / 64);
      for (; l.first < M; l.first += chunk) {
        l.rows = std::min(chunk, M - l.first);
        if (grad) {
          step(cpu::linear_pack_grad, (l.rows + kLinearRows - 1) / kLinearRows);
          step(cpu::linear_grad_x, cpu::linear_tiles(l));
          step(cpu::linear_grad_weight, cpu::linear_weight_tiles(l));
        } else {
          step(cpu::linear_pack_x, l.rows);
          step(cpu::linear_forward, cpu::linear_tiles(l));
        }
      }
    }
    return r;
  };
  const Results r = run(3);
  CHECK(r == run(1));

  const double tolerance = bf16 ? 0.08 : 2e-5;
  Results want = results(false);
  const Linear l = arguments(want, grad_y.data());
  plain::linear_forward(l);
  plain::linear_backward(l);
  const double root = std::sqrt(double(M));  // a sum over rows has M terms
  check_near(r.y, want.y, tolerance, "y");
  check_near(r.grad_x, want.grad_x, tolerance, "grad_x");
  check_near(r.grad_weight, want.grad_weight, tolerance * root, "grad_weight");
  check_near(r.bias_parts, want.bias_parts, tolerance * root, "bias_parts");
}

// dropout < 0: no branch
void test_layer_norm(int64_t rows, int64_t C, double dropout) {
  const bool with_branch = dropout >= 0;
  const std::vector<float> x = normal(rows * C, 1, 3), weight = normal(C, 2), bias = normal(C, 3);
  const std::vector<float> grad_y = normal(rows * C, 4), branch = normal(rows * C, 5), grad_sum = normal(rows * C, 6);
  const int64_t blocks = (rows + kLinearRows - 1) / kLinearRows;
  struct Results {
    std::vector<float> sum, mean, scale, y, grad_x, grad_branch, parts;
  };
  const auto run = [&](const auto& forward, const auto& backward) {
    Results r{x,
              std::vector<float>(rows),
              std::vector<float>(rows),
              std::vector<float>(rows * C),
              std::vector<float>(rows * C),
              std::vector<float>(rows * C),
              std::vector<float>(2 * blocks * C)};
    LayerNorm n{.branch_type = DType::f32,
                .y_type = DType::f32,
                .rows = rows,
                .C = C,
                .dropout = dropout,
                .seed = 9,
                .x = x.data(),
                .branch = with_branch ? branch.data() : nullptr,
                .weight = weight.data(),
                .bias = bias.data(),
                .sum = r.sum.data(),
                .mean = r.mean.data(),
                .scale = r.scale.data(),
                .y = r.y.data(),
                .grad_y = grad_y.data(),
                .grad_sum = with_branch ? grad_sum.data() : nullptr,
                .grad_x = r.grad_x.data(),
                .grad_branch = with_branch ? r.grad_branch.data() : nullptr,
                .parts = r.parts.data()};
    forward(n);
    n.x = r.sum.data();
    backward(n);
    return r;
  };
  const auto split = [](auto kernel, int64_t items) {
    return [=](const LayerNorm& n) { parallel(items, 3, [&](int64_t begin, int64_t end) { kernel(n, begin, end); }); };
  };
  using Plain = void (*)(const LayerNorm&);
  const Results want = run(Plain(plain::layer_norm), plain::layer_norm_backward);
  const Results got = run(split(cpu::layer_norm, rows), split(cpu::layer_norm_backward, blocks));
  CHECK(got.sum == want.sum);
  check_near(got.mean, want.mean, 1e-5, "mean");
  check_near(got.scale, want.scale, 1e-5, "scale");
  check_near(got.y, want.y, 1e-5, "y");
  check_near(got.grad_x, want.grad_x, 1e-5, "grad_x");
  check_near(got.grad_branch, want.grad_branch, 2e-5, "grad_branch");
  check_near(got.parts, want.parts, 1e-4, "parts");
}

int main() {
  std::vector<DType> types{DType::f32};
#if defined(TINYSTORY_BF16)
  types.push_back(DType::bf16);
#endif
  for (DType gemm_type : types)
    for (bool gelu_too : {false, true})
      for (auto [M, K, N, chunk] : {std::array<int64_t, 4>{1, 32, 32, 64},
                                    {70, 96, 160, 64},
                                    {150, 64, 96, 128},
                                    {97, 128, 32, 256},
                                    {200, 32, 64, 64}})
        test_linear(gemm_type, gelu_too, M, K, N, chunk);
  for (int64_t rows : {1, 63, 64, 130})
    for (int64_t C : {32, 96, 672})
      for (double dropout : {-1.0, 0.0, 0.3}) test_layer_norm(rows, C, dropout);
}
