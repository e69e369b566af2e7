// Rows of logits -> log-probability of the target and entropy, in one reading, and the gradient of both back onto the
// logits, in place. One block a row.
#include "rows.cuh"

namespace tinystory::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kLeast = -1000;  // stands for log 0 where it is multiplied by 0

// Of some logits x, with z = log2(e) (x - top): the sums of 2^z and of z 2^z.
struct Stats {
  float top, sum, weighted;

  __device__ __forceinline__ void move_top(float to) {
    const float down = fmaxf((top - to) * kLog2e, kLeast), shrink = exp2_fast(down);
    weighted = shrink * fmaf(sum, down, weighted);
    sum *= shrink;
    top = to;
  }
};

template <class E>
__global__ void __launch_bounds__(kThreads) stats_kernel(LogitChunk p) {
  constexpr int kPiece = kPerVec16<E>;
  const int n = int(blockIdx.x);
  const LogitRow<const E> row{static_cast<const E*>(p.logits) + int64_t(n) * p.V, int(p.V)};
  Stats own{-3e38f, 0, 0};
  for (int v = int(threadIdx.x) * kPiece; v < p.V; v += kThreads * kPiece) {
    float x[kPiece], top = own.top;
    row.load(x, v, -INFINITY);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) top = fmaxf(top, x[i]);
    if (top > own.top) own.move_top(top);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      const float z = (x[i] - top) * kLog2e, e = exp2_fast(z);
      own.sum += e;
      own.weighted = fmaf(fmaxf(z, kLeast), e, own.weighted);
    }
  }
  float* shared = reinterpret_cast<float*>(shared_memory());
  const auto add = [](float a, float b) { return a + b; };
  own.move_top(block_combine(own.top, shared, [](float a, float b) { return fmaxf(a, b); }));
  const float sum = block_combine(own.sum, shared, add), weighted = block_combine(own.weighted, shared, add);
  if (threadIdx.x == 0) {
    const double log_total = log(double(sum));
    p.lse[n] = own.top + log_total;
    require(p.targets[n] >= 0 && p.targets[n] < p.V, "token_logprob: an entry of targets is not in 0 .. V - 1");
    p.logprob[n] = float(to_float(row.row[p.targets[n]]) - own.top - log_total);
    p.entropy[n] = float(log_total - double(weighted) / sum * double(kLn2));
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads) grad_kernel(LogitChunk p) {
  constexpr int kPiece = kPerVec16<E>;
  const int n = int(blockIdx.x);
  const LogitRow<E> row{static_cast<E*>(p.logits) + int64_t(n) * p.V, int(p.V)};
  const float lse = float(p.lse[n]), lse_rest = float(p.lse[n] - lse);  // together as exact as the double
  const float g = p.grad_logprob ? p.grad_logprob[n] : float(p.grad_everywhere);
  const float ge = p.grad_entropy ? p.grad_entropy[n] : 0;
  const float entropy = ge != 0 ? p.entropy[n] : 0;
  const int target = int(p.targets[n]);
  // d logprob / d x = [target] - p;  d entropy / d x = -p (log p + entropy).
  for (int v = int(threadIdx.x) * kPiece; v < p.V; v += kThreads * kPiece) {
    float x[kPiece];
    row.load(x, v, 0);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      const float log_p = x[i] - lse - lse_rest, of_entropy = ge * (fmaxf(log_p, kLeast) + entropy);
      const float e = exp2_fast(log_p * kLog2e);
      x[i] = v + i == target ? -g * expm1f(log_p) - e * of_entropy : -e * (g + of_entropy);
    }
    row.store(x, v);
  }
}

}  // namespace

void logit_stats(const LogitChunk& x, cudaStream_t stream) {
  if (x.rows == 0) return;
  dispatch_dtype(x.dtype, "token_logprob", [&](auto e) {
    launch(stats_kernel<decltype(e)>, x.rows, kThreads, kThreads / kWarpSize * sizeof(float), stream, x);
  });
}

void logit_grad(const LogitChunk& x, cudaStream_t stream) {
  if (x.rows == 0) return;
  dispatch_dtype(x.dtype, "token_logprob",
                 [&](auto e) { launch(grad_kernel<decltype(e)>, x.rows, kThreads, 0, stream, x); });
}

}  // namespace tinystory::cuda
