// The residual stream between two layers, in one pass: sum = x + dropout(branch), y = layer norm of sum, in the type of
// the GEMM that reads it; without a branch y = layer norm of x. The backward kernel leaves one row of partial sums per
// block for the gradients of weight and bias.
//
// One warp per row. A lane owns groups of 4 columns, 128 columns apart, so that every access of a warp to global memory
// is contiguous; what it keeps of them in shared memory no other lane reads, so nothing waits, and it lies 4 rows of
// C / 4 floats apart, so that no banks conflict.
#include "dispatch.cuh"

namespace tinystory::cuda {
namespace {

constexpr int kMaxWarps = 4, kRowsPerBlock = 32;
constexpr float kEpsilon = 1e-5f;

struct NormParams {
  LayerNorm x;
  DropoutKeys keys;
  uint32_t threshold;  // 0: no dropout
  float keep_scale;
};

__device__ __forceinline__ int own_row() { return int(threadIdx.x) / kWarpSize; }

// The factors on a lane's groups of a row of the branch: 0 or the scale. A call of Philox serves four groups.
struct BranchDropout {
  const NormParams& p;
  int64_t row;
  Words4 words{};

  __device__ __forceinline__ void apply(float (&b)[4], int group) {
    if (!p.threshold) return;
    const int turn = group / kWarpSize;
    if (turn % 4 == 0) words = branch_words(p.keys, uint64_t(row), uint32_t(group));
    const uint32_t word = turn % 4 == 0 ? words.x : turn % 4 == 1 ? words.y : turn % 4 == 2 ? words.z : words.w;
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] *= (word >> (8 * i) & 0xff) >= p.threshold ? p.keep_scale : 0.0f;
  }
};

template <class Branch, class Out>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize) layer_norm_kernel(NormParams p) {
  const int warps = int(blockDim.x) / kWarpSize, C = int(p.x.C), groups = C / 4;
  const int64_t row = int64_t(blockIdx.x) * warps + own_row(), at = row * C;
  if (row >= p.x.rows) return;
  float* const kept = reinterpret_cast<float*>(shared_memory()) + own_row() * C;
  BranchDropout dropout{p, row};
  float total = 0;
  for (int g = lane_id(); g < groups; g += kWarpSize) {
    float x[4];
    load4(x, p.x.x + at + 4 * g);
    if (p.x.branch) {
      float b[4];
      load4(b, static_cast<const Branch*>(p.x.branch) + at + 4 * g);
      dropout.apply(b, g);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] += b[i];
      store4(p.x.sum + at + 4 * g, x);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) kept[i * groups + g] = x[i], total += x[i];
  }
  const float mean = warp_sum(total) / float(C);
  float squares = 0;
  for (int g = lane_id(); g < groups; g += kWarpSize)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float d = kept[i * groups + g] - mean;
      squares = fmaf(d, d, squares);
    }
  const float scale = 1 / sqrtf(warp_sum(squares) / float(C) + kEpsilon);
  for (int g = lane_id(); g < groups; g += kWarpSize) {
    float weight[4], y[4];
    load4(weight, p.x.weight + 4 * g);
    load4(y, p.x.bias + 4 * g);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = fmaf((kept[i * groups + g] - mean) * scale, weight[i], y[i]);
    store4(static_cast<Out*>(p.x.y) + at + 4 * g, y);
  }
  if (lane_id() == 0) p.x.mean[row] = mean, p.x.scale[row] = scale;
}

// n = (x - mean) scale, g = grad_y weight: grad_x = scale (g - mean of g - n mean of g n) + grad_sum.
template <class Branch, class Out>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize) layer_norm_backward_kernel(NormParams p) {
  const int warps = int(blockDim.x) / kWarpSize, C = int(p.x.C), groups = C / 4;
  float* const all = reinterpret_cast<float*>(shared_memory());
  float *const of_weight = all + own_row() * 2 * C, *const of_bias = of_weight + C;
  for (int g = lane_id(); g < groups; g += kWarpSize)
#pragma unroll
    for (int i = 0; i < 4; ++i) of_weight[i * groups + g] = of_bias[i * groups + g] = 0;

  const int64_t first = int64_t(blockIdx.x) * kRowsPerBlock;
  for (int64_t row = first + own_row(); row < first + kRowsPerBlock && row < p.x.rows; row += warps) {
    const int64_t at = row * C;
    const float mean = p.x.mean[row], scale = p.x.scale[row];
    const auto read = [&](int g, float (&n)[4], float (&grad)[4], float (&weight)[4]) {
      load4(n, p.x.x + at + 4 * g);
      load4(grad, static_cast<const Out*>(p.x.grad_y) + at + 4 * g);
      load4(weight, p.x.weight + 4 * g);
#pragma unroll
      for (int i = 0; i < 4; ++i) n[i] = (n[i] - mean) * scale;
    };
    float g_sum = 0, gn_sum = 0, n[4], grad[4], weight[4];
    for (int g = lane_id(); g < groups; g += kWarpSize) {
      read(g, n, grad, weight);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        of_weight[i * groups + g] += grad[i] * n[i];
        of_bias[i * groups + g] += grad[i];
        g_sum = fmaf(grad[i], weight[i], g_sum);
        gn_sum = fmaf(grad[i] * weight[i], n[i], gn_sum);
      }
    }
    g_sum = warp_sum(g_sum) / float(C), gn_sum = warp_sum(gn_sum) / float(C);
    BranchDropout dropout{p, row};
    for (int g = lane_id(); g < groups; g += kWarpSize) {
      read(g, n, grad, weight);
      float x[4] = {};
      if (p.x.grad_sum) load4(x, p.x.grad_sum + at + 4 * g);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] += scale * (grad[i] * weight[i] - g_sum - n[i] * gn_sum);
      store4(p.x.grad_x + at + 4 * g, x);
      if (!p.x.grad_branch) continue;
      dropout.apply(x, g);
      store4(static_cast<Branch*>(p.x.grad_branch) + at + 4 * g, x);
    }
  }
  sync_block();
  for (int i = int(threadIdx.x); i < 2 * C; i += int(blockDim.x)) {
    const int which = i / C, column = i % C, kept = which * C + column % 4 * groups + column / 4;
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += all[w * 2 * C + kept];
    p.x.parts[(int64_t(which) * gridDim.x + blockIdx.x) * C + column] = sum;
  }
}

NormParams params(const LayerNorm& x) {
  const uint32_t threshold = x.dropout > 0 ? dropout_threshold(x.dropout) : 0;
  return {x, dropout_keys(x.seed), threshold, float(dropout_scale(threshold))};
}

// As many warps per block as shared memory has room for, with `floats` per warp.
int warps_per_block(int64_t floats) {
  const int64_t fit = kMaxSharedBytes / (floats * 4);
  if (fit < 1) throw std::invalid_argument("layer_norm on CUDA: rows this long are not implemented");
  return int(fit < kMaxWarps ? fit : kMaxWarps);
}

// Calls f with values of the branch's and y's types.
template <class F>
void dispatch_norm(const LayerNorm& x, const F& f) {
  dispatch_dtype(x.branch_type, "layer_norm", [&](auto branch) {
    if (x.y_type == x.branch_type) return f(branch, branch);
    if (x.y_type != DType::f32) throw std::invalid_argument("layer_norm on CUDA: y has the branch's type, or float32");
    f(branch, float{});
  });
}

}  // namespace

void layer_norm(const LayerNorm& x, cudaStream_t stream) {
  if (x.rows == 0) return;
  const int warps = warps_per_block(x.C);
  dispatch_norm(x, [&](auto branch, auto y) {
    launch(layer_norm_kernel<decltype(branch), decltype(y)>, (x.rows + warps - 1) / warps, warps * kWarpSize,
           size_t(warps) * x.C * 4, stream, params(x));
  });
}

int64_t layer_norm_blocks(int64_t rows) { return (rows + kRowsPerBlock - 1) / kRowsPerBlock; }

void layer_norm_backward(const LayerNorm& x, cudaStream_t stream) {
  if (x.rows == 0) return;
  const int warps = warps_per_block(2 * x.C);
  dispatch_norm(x, [&](auto branch, auto y) {
    launch(layer_norm_backward_kernel<decltype(branch), decltype(y)>, layer_norm_blocks(x.rows), warps * kWarpSize,
           size_t(warps) * 2 * x.C * 4, stream, params(x));
  });
}

}  // namespace tinystory::cuda
