// The residual stream between two layers, in one pass: sum = x + dropout(branch), y = layer norm of sum, in the type of
// the GEMM that reads y. Without a branch, y = layer norm of x. The backward kernel writes one row of partial sums per
// block for the gradients of weight and bias.
//
// Each warp processes one row. A lane owns groups of 4 columns that are 128 columns apart, so that every access of a
// warp to global memory is contiguous. A lane loads kAhead groups before it uses the first one, because a store or a
// sum between two loads would serialise the loads. So a row of up to kAhead * 128 columns stays in registers; a longer
// row is read again.
#include "dispatch.cuh"

namespace tinystory::cuda {
namespace {

constexpr int kWarps = 4, kAhead = 8;
constexpr int kBlocksPerProcessor = 3;  // resident blocks of the backward kernel per SM, limited by registers
constexpr float kEpsilon = 1e-5f;

struct NormParams {
  LayerNorm x;
  DropoutKeys keys;
  uint32_t threshold;  // 0: no dropout
  float keep_scale;
};

__device__ __forceinline__ int own_row() { return int(threadIdx.x) / kWarpSize; }

// Dropout on a lane's groups of a row of the branch: multiplies by 0 or the scale. One call of Philox provides the bits
// of four groups. i: index of the group among those of the lane; a call needs i = 0, 1, 2, 3 (mod 4) in this order.
static_assert(kAhead % 4 == 0);
struct BranchDropout {
  const NormParams& p;
  int64_t row;
  Words4 words{};

  __device__ __forceinline__ void apply(float (&b)[4], int i, int group) {
    if (!p.threshold) return;
    if (i % 4 == 0) words = branch_words(p.keys, uint64_t(row), uint32_t(group));
    const uint32_t word = i % 4 == 0 ? words.x : i % 4 == 1 ? words.y : i % 4 == 2 ? words.z : words.w;
#pragma unroll
    for (int j = 0; j < 4; ++j) b[j] *= (word >> (8 * j) & 0xff) >= p.threshold ? p.keep_scale : 0.0f;
  }
};

// kAhead groups of a row, held by a lane; `first` is the index of the first group.
using Groups = float[kAhead][4];
template <class F>
__device__ __forceinline__ void each_group(int first, int groups, const F& f) {
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (first + i * kWarpSize < groups) f(i, first + i * kWarpSize);
}
template <class Element>
__device__ __forceinline__ void load_groups(Groups& x, const Element* row, int first, int groups) {
  each_group(first, groups, [&](int i, int g) { load4(x[i], row + 4 * g); });
}
// Calls f(first) for each batch of kAhead groups of this lane in a row of `groups` groups.
template <class F>
__device__ __forceinline__ void each_batch(int groups, const F& f) {
  for (int first = lane_id(); first < groups; first += kAhead * kWarpSize) f(first);
}
// Adds x(j) to sum j of a group, j < 4. All four sums are read before the first is written.
template <class F>
__device__ __forceinline__ void add_to(float* sums, int groups, const F& x) {
  float sum[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) sum[j] = sums[j * groups] + x(j);
#pragma unroll
  for (int j = 0; j < 4; ++j) sums[j * groups] = sum[j];
}

template <class Branch, class Out>
__global__ void __launch_bounds__(kWarps* kWarpSize, 4) layer_norm_kernel(NormParams p) {
  const int C = int(p.x.C), groups = C / 4;
  const bool in_registers = groups <= kAhead * kWarpSize;
  const int64_t row = int64_t(blockIdx.x) * kWarps + own_row(), at = row * C;
  if (row >= p.x.rows) return;
  BranchDropout dropout{p, row};
  Groups x;
  float total = 0;
  each_batch(groups, [&](int first) {
    load_groups(x, p.x.x + at, first, groups);
    if (p.x.branch) {
      Groups b;
      load_groups(b, static_cast<const Branch*>(p.x.branch) + at, first, groups);
      each_group(first, groups, [&](int i, int g) {
        dropout.apply(b[i], i, g);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[i][j] += b[i][j];
        store4(p.x.sum + at + 4 * g, x[i]);
      });
    }
    each_group(first, groups, [&](int i, int) {
#pragma unroll
      for (int j = 0; j < 4; ++j) total += x[i][j];
    });
  });
  const float* const sum = (p.x.branch ? p.x.sum : p.x.x) + at;
  const float mean = warp_sum(total) / float(C);
  float squares = 0;
  each_batch(groups, [&](int first) {
    if (!in_registers) load_groups(x, sum, first, groups);
    each_group(first, groups, [&](int i, int) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float d = x[i][j] - mean;
        squares = fmaf(d, d, squares);
      }
    });
  });
  const float scale = 1 / sqrtf(warp_sum(squares) / float(C) + kEpsilon);
  each_batch(groups, [&](int first) {
    Groups weight, y;
    if (!in_registers) load_groups(x, sum, first, groups);
    load_groups(weight, p.x.weight, first, groups);
    load_groups(y, p.x.bias, first, groups);
    each_group(first, groups, [&](int i, int g) {
#pragma unroll
      for (int j = 0; j < 4; ++j) y[i][j] = fmaf((x[i][j] - mean) * scale, weight[i][j], y[i][j]);
      store4(static_cast<Out*>(p.x.y) + at + 4 * g, y[i]);
    });
  });
  if (lane_id() == 0) p.x.mean[row] = mean, p.x.scale[row] = scale;
}

// With n = (x - mean) scale and g = grad_y weight: grad_x = scale (g - mean of g - n mean of g n) + grad_sum. A warp
// sums the gradients of weight and bias over its rows in shared memory. Until the final sum, no lane uses another
// lane's elements, so no barrier is needed. The four sums of a group are C / 4 floats apart, to avoid bank conflicts.
template <class Branch, class Out>
__global__ void __launch_bounds__(kWarps* kWarpSize, kBlocksPerProcessor) layer_norm_backward_kernel(NormParams p) {
  const int warps = int(blockDim.x) / kWarpSize, C = int(p.x.C), groups = C / 4;
  const bool in_registers = groups <= kAhead * kWarpSize;
  float* const all = reinterpret_cast<float*>(shared_memory());
  float *const of_weight = all + own_row() * 2 * C, *const of_bias = of_weight + C;
  for (int g = lane_id(); g < groups; g += kWarpSize)
#pragma unroll
    for (int i = 0; i < 4; ++i) of_weight[i * groups + g] = of_bias[i * groups + g] = 0;

  for (int64_t row = int64_t(blockIdx.x) * warps + own_row(); row < p.x.rows; row += int64_t(gridDim.x) * warps) {
    const int64_t at = row * C;
    const float mean = p.x.mean[row], scale = p.x.scale[row];
    Groups n, g;
    const auto read = [&](int first, bool add) {
      Groups weight;
      load_groups(n, p.x.x + at, first, groups);
      load_groups(g, static_cast<const Out*>(p.x.grad_y) + at, first, groups);
      load_groups(weight, p.x.weight, first, groups);
      each_group(first, groups, [&](int i, int group) {
#pragma unroll
        for (int j = 0; j < 4; ++j) n[i][j] = (n[i][j] - mean) * scale;
        if (add) {
          add_to(of_weight + group, groups, [&](int j) { return g[i][j] * n[i][j]; });
          add_to(of_bias + group, groups, [&](int j) { return g[i][j]; });
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) g[i][j] *= weight[i][j];
      });
    };
    float g_sum = 0, gn_sum = 0;
    each_batch(groups, [&](int first) {
      read(first, true);
      each_group(first, groups, [&](int i, int) {
#pragma unroll
        for (int j = 0; j < 4; ++j) g_sum += g[i][j], gn_sum = fmaf(g[i][j], n[i][j], gn_sum);
      });
    });
    g_sum = warp_sum(g_sum) / float(C), gn_sum = warp_sum(gn_sum) / float(C);
    BranchDropout dropout{p, row};
    each_batch(groups, [&](int first) {
      if (!in_registers) read(first, false);
      Groups x = {};
      if (p.x.grad_sum) load_groups(x, p.x.grad_sum + at, first, groups);
      each_group(first, groups, [&](int i, int group) {
#pragma unroll
        for (int j = 0; j < 4; ++j) x[i][j] += scale * (g[i][j] - g_sum - n[i][j] * gn_sum);
        store4(p.x.grad_x + at + 4 * group, x[i]);
        if (!p.x.grad_branch) return;
        dropout.apply(x[i], i, group);
        store4(static_cast<Branch*>(p.x.grad_branch) + at + 4 * group, x[i]);
      });
    });
  }
  sync_block();
  for (int i = int(threadIdx.x); i < 2 * groups; i += int(blockDim.x)) {
    const int which = i / groups, group = i % groups;
    float sum[4] = {};
    for (int w = 0; w < warps; ++w)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += all[(2 * w + which) * C + j * groups + group];
    store4(p.x.parts + (int64_t(which) * gridDim.x + blockIdx.x) * C + 4 * group, sum);
  }
}

NormParams params(const LayerNorm& x) {
  const uint32_t threshold = x.dropout > 0 ? dropout_threshold(x.dropout) : 0;
  return {x, dropout_keys(x.seed), threshold, float(dropout_scale(threshold))};
}

// Calls f with values of the C++ types of branch and y.
template <class F>
void dispatch_norm(const LayerNorm& x, const F& f) {
  dispatch_dtype(x.branch_type, "layer_norm", [&](auto branch) {
    if (x.y_type == x.branch_type) return f(branch, branch);
    if (x.y_type != DType::f32)
      throw std::invalid_argument("layer_norm on CUDA: y must have the branch's type, or float32");
    f(branch, float{});
  });
}

}  // namespace

void layer_norm(const LayerNorm& x, cudaStream_t stream) {
  if (x.rows == 0) return;
  dispatch_norm(x, [&](auto branch, auto y) {
    launch(layer_norm_kernel<decltype(branch), decltype(y)>, (x.rows + kWarps - 1) / kWarps, kWarps * kWarpSize, 0,
           stream, params(x));
  });
}

// Number of blocks of the backward kernel: at most as many as are resident at the same time.
int64_t layer_norm_blocks(int64_t rows) {
  const int64_t most = kBlocksPerProcessor * multiprocessors(), enough = (rows + kWarps - 1) / kWarps;
  return enough < most ? enough : most;
}

void layer_norm_backward(const LayerNorm& x, cudaStream_t stream) {
  if (x.rows == 0) return;
  // as many warps as fit in shared memory, at most kWarps
  const int64_t bytes = 2 * x.C * 4, fit = kMaxSharedBytes / bytes, warps = fit < kWarps ? fit : kWarps;
  if (warps < 1)
    throw std::invalid_argument("layer_norm on CUDA: rows of more than " + std::to_string(kMaxSharedBytes / 8) +
                                " columns are not implemented");
  dispatch_norm(x, [&](auto branch, auto y) {
    launch(layer_norm_backward_kernel<decltype(branch), decltype(y)>, layer_norm_blocks(x.rows), int(warps) * kWarpSize,
           size_t(warps * bytes), stream, params(x));
  });
}

}  // namespace tinystory::cuda
