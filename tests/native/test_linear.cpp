// Linear layers and layer norm (with the sum before it), forward and backward, against plain double-precision loops; the
// same bits on any number of threads. Buffers have the size that they need and no more, for sanitizers to see beyond
// their ends.
#include <algorithm>
#include <array>

#include "cpu/gemm.h"
#include "harness.h"
#include "kernels.h"
#include "philox.h"

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

double gelu(double x, double& slope) {
  const double k = 0.7978845608028654, u = k * (x + 0.044715 * x * x * x), t = std::tanh(u);
  slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x);
  return 0.5 * x * (1 + t);
}

void test_linear(DType gemm_type, bool gelu_too, int64_t M, int64_t K, int64_t N, int64_t chunk) {
  // Only the matmuls and `slope` are bf16: the kernels round the f32 inputs themselves.
  const bool bf16 = gemm_type == DType::bf16;
  const std::vector<float> x = normal(M * K, 1), weight = normal(N * K, 2, 1 / std::sqrt(float(K)));
  const std::vector<float> bias = normal(N, 3), grad_y = normal(M * N, 5);
  const int64_t blocks = (M + kLinearRows - 1) / kLinearRows;
  const auto run = [&](int threads) {
    Results r{std::vector<float>(M * N), std::vector<float>(M * K), std::vector<float>(N * K),
              std::vector<float>(blocks * N), std::vector<Line>((bf16 ? M * N / 2 : M * N) / 16)};
    for (const float* grad : {(const float*)nullptr, grad_y.data()}) {
      Linear l{.x_type = DType::f32,
               .y_type = DType::f32,
               .gemm_type = gemm_type,
               .gelu = gelu_too,
               .M = M,
               .K = K,
               .N = N,
               .threads = threads,
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
  std::vector<double> grad_x(M * K), grad_weight(N * K), grad_bias(N);
  for (int64_t i = 0; i < M; ++i)
    for (int64_t j = 0; j < N; ++j) {
      double sum = bias[j], slope = 1;
      for (int64_t k = 0; k < K; ++k) sum += double(x[i * K + k]) * weight[j * K + k];
      if (gelu_too) sum = gelu(sum, slope);
      CHECK(std::fabs(r.y[i * N + j] - sum) < tolerance, "y %g", r.y[i * N + j]);
      const double g = grad_y[i * N + j] * slope;
      grad_bias[j] += g;
      for (int64_t k = 0; k < K; ++k) {
        grad_x[i * K + k] += g * weight[j * K + k];
        grad_weight[j * K + k] += g * x[i * K + k];
      }
    }
  const double root = std::sqrt(double(M));  // a sum over rows has M terms
  for (int64_t i = 0; i < M * K; ++i) CHECK(std::fabs(r.grad_x[i] - grad_x[i]) < tolerance, "%g", grad_x[i]);
  for (int64_t i = 0; i < N * K; ++i) CHECK(std::fabs(r.grad_weight[i] - grad_weight[i]) < tolerance * root);
  for (int64_t j = 0; j < N; ++j) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += r.bias_parts[b * N + j];
    CHECK(std::fabs(sum - grad_bias[j]) < tolerance * root, "bias %g %g", sum, grad_bias[j]);
  }
}

// dropout < 0: no branch
void test_layer_norm(int64_t rows, int64_t C, double dropout) {
  const bool with_branch = dropout >= 0;
  const std::vector<float> x = normal(rows * C, 1, 3), weight = normal(C, 2), bias = normal(C, 3);
  const std::vector<float> grad_y = normal(rows * C, 4), branch = normal(rows * C, 5), grad_sum = normal(rows * C, 6);
  const int64_t blocks = (rows + kLinearRows - 1) / kLinearRows;
  std::vector<float> mean(rows), scale(rows), y(rows * C), grad_x(rows * C), parts(blocks * 2 * C);
  std::vector<float> sum = x, grad_branch(rows * C), factor(rows * C, 1);
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
              .sum = sum.data(),
              .mean = mean.data(),
              .scale = scale.data(),
              .y = y.data(),
              .grad_y = grad_y.data(),
              .grad_sum = with_branch ? grad_sum.data() : nullptr,
              .grad_x = grad_x.data(),
              .grad_branch = with_branch ? grad_branch.data() : nullptr,
              .parts = parts.data()};
  if (dropout > 0)
    for (int64_t i = 0; i < rows * C; ++i) {
      const int64_t group = i % C / 4;
      const Words4 w = branch_words(dropout_keys(n.seed), uint64_t(i / C), uint32_t(group));
      const uint32_t words[] = {w.x, w.y, w.z, w.w}, threshold = dropout_threshold(dropout);
      const uint32_t byte = words[group / 32 % 4] >> (8 * (i % 4)) & 0xff;
      factor[i] = byte >= threshold ? float(dropout_scale(threshold)) : 0;
    }
  parallel(rows, 3, [&](int64_t begin, int64_t end) { cpu::layer_norm(n, begin, end); });
  for (int64_t i = 0; i < rows * C; ++i)
    CHECK(sum[i] == (with_branch ? x[i] + branch[i] * factor[i] : x[i]), "sum %g", sum[i]);
  n.x = sum.data();
  parallel(blocks, 3, [&](int64_t begin, int64_t end) { cpu::layer_norm_backward(n, begin, end); });
  std::vector<double> sums(2 * C);
  for (int64_t i = 0; i < rows; ++i) {
    double m = 0, square = 0, mean_g = 0, mean_gh = 0;
    for (int64_t c = 0; c < C; ++c) m += double(sum[i * C + c]) / C;
    for (int64_t c = 0; c < C; ++c) square += (sum[i * C + c] - m) * (sum[i * C + c] - m) / C;
    const double s = 1 / std::sqrt(square + 1e-5);
    const auto h = [&](int64_t c) { return (sum[i * C + c] - m) * s; };
    for (int64_t c = 0; c < C; ++c) {
      const double g = double(grad_y[i * C + c]) * weight[c];
      mean_g += g / C, mean_gh += g * h(c) / C;
      sums[c] += grad_y[i * C + c] * h(c), sums[C + c] += grad_y[i * C + c];
    }
    for (int64_t c = 0; c < C; ++c) {
      CHECK(std::fabs(y[i * C + c] - (h(c) * weight[c] + bias[c])) < 1e-5);
      double want = (double(grad_y[i * C + c]) * weight[c] - mean_g - h(c) * mean_gh) * s;
      if (with_branch) want += grad_sum[i * C + c];
      CHECK(std::fabs(grad_x[i * C + c] - want) < 1e-5);
      if (with_branch) CHECK(std::fabs(grad_branch[i * C + c] - want * factor[i * C + c]) < 2e-5);
    }
  }
  for (int64_t c = 0; c < 2 * C; ++c) {
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += parts[(c / C * blocks + b) * C + c % C];
    CHECK(std::fabs(total - sums[c]) < 1e-4);
  }
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
