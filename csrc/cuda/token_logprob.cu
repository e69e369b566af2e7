// For each row of float32 logits: the log-probability of the target and the entropy, in a single pass (online softmax),
// and the gradient of both with respect to the logits, in the dtype of the GEMMs that read the gradient. One block per
// row.
#include "rows.cuh"

namespace tinystory::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kMinLog = -1000;  // replaces log 0 in products with 0

// Running statistics of logits x: m = max x, l = sum of 2^z, z_sum = sum of z 2^z, where z = log2(e) (x - m).
struct Stats {
  float m, l, z_sum;

  __device__ __forceinline__ void rescale(float m_new) {
    const float shift = fmaxf((m - m_new) * kLog2e, kMinLog), factor = exp2_fast(shift);
    z_sum = factor * fmaf(l, shift, z_sum);
    l *= factor;
    m = m_new;
  }
};

__global__ void __launch_bounds__(kThreads) stats_kernel(LogitChunk p) {
  constexpr int kVec = kVecElements<float>;
  const int n = int(blockIdx.x);
  const LogitRow<const float> row{p.logits + n * p.stride, int(p.V)};
  Stats own{-3e38f, 0, 0};
  for (int v = int(threadIdx.x) * kVec; v < p.V; v += kThreads * kVec) {
    float x[kVec], m_new = own.m;
    row.load(x, v, -INFINITY);
#pragma unroll
    for (int i = 0; i < kVec; ++i) m_new = fmaxf(m_new, x[i]);
    if (m_new > own.m) own.rescale(m_new);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float z = (x[i] - m_new) * kLog2e, e = exp2_fast(z);
      own.l += e;
      own.z_sum = fmaf(fmaxf(z, kMinLog), e, own.z_sum);
    }
  }
  float* shared = reinterpret_cast<float*>(shared_memory());
  const auto add = [](float a, float b) { return a + b; };
  own.rescale(block_combine(own.m, shared, [](float a, float b) { return fmaxf(a, b); }));
  const float l = block_combine(own.l, shared, add), z_sum = block_combine(own.z_sum, shared, add);
  if (threadIdx.x == 0) {
    const double log_total = log(double(l));
    p.lse[n] = own.m + log_total;
    require(p.targets[n] >= 0 && p.targets[n] < p.V, "token_logprob: an entry of targets is not in 0 .. V - 1");
    p.logprob[n] = float(row.row[p.targets[n]] - own.m - log_total);
    p.entropy[n] = float(log_total - double(z_sum) / l * double(kLn2));
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads) grad_kernel(LogitChunk p) {
  constexpr int kVec = kVecElements<float>;
  const int n = int(blockIdx.x);
  const LogitRow<const float> row{p.logits + n * p.stride, int(p.V)};
  Element* grad = static_cast<Element*>(p.grad) + n * p.stride;
  const float lse = float(p.lse[n]), lse_low = float(p.lse[n] - lse);  // high and low part of the double
  const float g = p.grad_logprob ? p.grad_logprob[n] : float(p.grad_everywhere);
  const float ge = p.grad_entropy ? p.grad_entropy[n] : 0;
  const float entropy = ge != 0 ? p.entropy[n] : 0;
  const int target = int(p.targets[n]);
  // d logprob / d x = [target] - p;  d entropy / d x = -p (log p + entropy).
  for (int v = int(threadIdx.x) * kVec; v < p.V; v += kThreads * kVec) {
    float x[kVec];
    row.load(x, v, 0);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float log_p = x[i] - lse - lse_low, entropy_term = ge * (fmaxf(log_p, kMinLog) + entropy);
      const float e = exp2_fast(log_p * kLog2e);
      x[i] = v + i == target ? -g * expm1f(log_p) - e * entropy_term : -e * (g + entropy_term);
    }
    if (row.vectorizable(v) && (reinterpret_cast<uintptr_t>(grad) & (4 * sizeof(Element) - 1)) == 0) {
      store4(grad + v, x);
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i)
        if (v + i < p.V) grad[v + i] = from_float<Element>(x[i]);
    }
  }
}

}  // namespace

void logit_stats(const LogitChunk& x, cudaStream_t stream) {
  if (x.rows == 0) return;
  launch(stats_kernel, x.rows, kThreads, kThreads / kWarpSize * sizeof(float), stream, x);
}

void logit_grad(const LogitChunk& x, cudaStream_t stream) {
  if (x.rows == 0) return;
  dispatch_dtype(x.grad_dtype, "token_logprob",
                 [&](auto e) { launch(grad_kernel<decltype(e)>, x.rows, kThreads, 0, stream, x); });
}

}  // namespace tinystory::cuda
