// The backward pass of tanh GELU and of the addition of a bias before GELU, in one pass over memory: grad = grad_y
// gelu'(x), and one row of partial sums of grad per block. A warp loops over rows. A lane owns 8 columns and keeps
// their sums in registers. A lane loads kAhead rows before it uses the first one.
#include "dispatch.cuh"

namespace tinystory::cuda {
namespace {

constexpr int kWarps = 8, kAhead = 4, kRows = 2 * kWarps * kAhead;  // kRows: rows per block
constexpr int kVec = 8, kColumns = kVec * kWarpSize;
// kApart: distance in floats between the sums of a lane in shared memory. kShared: floats per warp. With this distance
// there are no bank conflicts, neither when lanes write nor when threads read columns.
constexpr int kApart = kWarpSize + 4, kShared = kVec * kApart;

int64_t strips(const GeluBackward& x) { return (x.N + kColumns - 1) / kColumns; }

// The derivative of gelu(x) = x s with s = 1 / (1 + e^-u) and u = 2 sqrt(2 / pi) (x + 0.044715 x^3): s + x s (1 - s)
// u'.
__device__ __forceinline__ float gelu_slope(float x) {
  constexpr float k = 2 * 0.7978845608f, cubic = 0.044715f;
  const float xx = x * x, s = 1 / (1 + exp2_fast(-kLog2e * k * x * fmaf(cubic, xx, 1)));
  return fmaf(x * s * (1 - s), k * fmaf(3 * cubic, xx, 1), s);
}

template <class Element>
__global__ void __launch_bounds__(kWarps* kWarpSize) gelu_backward_kernel(GeluBackward p) {
  const int N = int(p.N), strip = int(blockIdx.x) % ((N + kColumns - 1) / kColumns);
  const int64_t chunk = int64_t(blockIdx.x) / ((N + kColumns - 1) / kColumns);
  const int warp = int(threadIdx.x) / kWarpSize, column = strip * kColumns + kVec * lane_id();
  const Element *const grad_y = static_cast<const Element*>(p.grad_y), *const inputs = static_cast<const Element*>(p.x);
  float sum[kVec] = {};
#pragma unroll
  for (int batch = 0; batch < kRows; batch += kWarps * kAhead) {
    const int64_t first = chunk * kRows + batch + warp;
    const auto each_row = [&](const auto& f) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (const int64_t row = first + i * kWarps; row < p.rows && column < N) f(i, row * N + column);
    };
    Vec16 dy[kAhead], x[kAhead];
    each_row([&](int i, int64_t at) { dy[i] = load16(grad_y + at), x[i] = load16(inputs + at); });
    each_row([&](int i, int64_t at) {
      float g[kVec], v[kVec];
      unpack(g, dy[i], Element{}), unpack(v, x[i], Element{});
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] += g[j] *= gelu_slope(v[j]);
      store16(static_cast<Element*>(p.grad) + at, pack(g, Element{}));
    });
  }
  float* const all = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int j = 0; j < kVec; ++j) all[warp * kShared + j * kApart + lane_id()] = sum[j];
  sync_block();
  static_assert(kColumns == kWarps * kWarpSize);  // each thread sums one column
  const int own = int(threadIdx.x);
  if (strip * kColumns + own >= N) return;
  float total = 0;
  for (int w = 0; w < kWarps; ++w) total += all[w * kShared + own % kVec * kApart + own / kVec];
  p.parts[chunk * N + strip * kColumns + own] = total;
}

}  // namespace

int64_t gelu_blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }

void gelu_backward(const GeluBackward& x, cudaStream_t stream) {
  if (x.rows == 0 || x.N == 0) return;
  const auto run = [&](auto e) {
    launch(gelu_backward_kernel<decltype(e)>, strips(x) * gelu_blocks(x.rows), kWarps * kWarpSize,
           kWarps * kShared * sizeof(float), stream, x);
  };
  if (x.dtype == DType::bf16) run(bf16{});
  else if (x.dtype == DType::f16) run(f16{});
  else throw std::invalid_argument("gelu_backward on CUDA: only 16-bit types are implemented");
}

}  // namespace tinystory::cuda
