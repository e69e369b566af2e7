// The CUDA implementations of the op schemas in ../ops.cpp. The only CUDA headers of PyTorch in this file are those of
// c10/cuda, so the file needs no library of the CUDA toolkit besides nvcc. GEMMs go through ATen to cuBLAS.
//
// No function here synchronizes with the device. Errors that only the device can see are reported later: `sample` draws
// a negative token (see tinystory.ops.require_drawn); a length or target out of range fails a device-side assertion.
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <tuple>

#include "../arguments.h"
#include "kernels.cuh"

namespace tinystory {
namespace {

// RAII guard: makes the device of an op's first tensor the current device, and has the current stream of this device.
struct DeviceScope {
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
  DeviceScope(const Tensor& t, const char* op, const char* name)
      : guard((check(t, op, name), t.device())), stream(c10::cuda::getCurrentCUDAStream()) {}
  static void check(const Tensor& t, const char* op, const char* name) {
    TORCH_CHECK(t.is_cuda(), op, ": ", name, " is on ", t.device(), " but other arguments are on a CUDA device");
  }
};

// --- attention -------------------------------------------------------------------------------------------------------
// By dtype, and by head size: 32, 64 or 128. Null until Python has loaded the library (tinystory/ops/cuda.py).
const cuda::AttentionKernels* attention_kernels[4][3];

void add_attention(const cuda::AttentionKernels& kernels) {
  attention_kernels[int(kernels.dtype)][kernels.D / 64] = &kernels;
}

const cuda::AttentionKernels& kernels_for(DType dtype, int64_t D, const char* op) {
  const cuda::AttentionKernels* kernels = attention_kernels[int(dtype)][D / 64];
  TORCH_CHECK(kernels, op, ": no kernels are loaded for this dtype and head size ", D, "; call tinystory.ops.", op);
  return *kernels;
}

std::tuple<Tensor, Tensor> causal_attention(const Tensor& qkv, double dropout_p, int64_t seed) {
  const DeviceScope on(qkv, "causal_attention", "qkv");
  const AttentionForward f(qkv, dropout_p, seed);
  kernels_for(f.x.dtype, f.x.D, "causal_attention").forward(f.x, on.stream);
  return {f.out, f.lse};
}

Tensor causal_attention_backward(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                                 double dropout_p, int64_t seed) {
  const DeviceScope on(qkv, "causal_attention_backward", "qkv");
  const AttentionBackward f(grad_out, qkv, out, lse, dropout_p, seed);
  const auto& kernels = kernels_for(f.x.dtype, f.x.D, "causal_attention");
  const Tensor workspace = at::empty({kernels.backward_workspace(f.x)}, lse.options());
  kernels.backward(f.x, workspace.data_ptr<float>(), on.stream);
  return f.grad_qkv;
}

Tensor decode_attention(const Tensor& qkv, const Tensor& prefix, const Tensor& spans, const Tensor& cache,
                        const Tensor& lengths) {
  const DeviceScope on(qkv, "decode_attention", "qkv");
  const Decode f(qkv, prefix, spans, cache, lengths);
  const auto& kernels = kernels_for(f.x.dtype, f.x.D, "decode_attention");
  const Tensor workspace = at::empty({kernels.decode_workspace(f.x)}, qkv.options().dtype(at::kFloat));
  kernels.decode(f.x, workspace.data_ptr<float>(), on.stream);
  return f.out;
}

// --- sample ----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> sample(const Tensor& logits, int64_t seed, const Tensor& rows, const Tensor& steps,
                                          double temperature, int64_t top_k, double top_p) {
  const DeviceScope on(logits, "sample", "logits");
  const Draw f(logits, seed, rows, steps, temperature, top_k, top_p);
  cuda::sample(f.x, on.stream);
  return {f.tokens, f.logprobs, f.entropy};
}

// --- token_logprob ---------------------------------------------------------------------------------------------------
// The operands of GEMMs have the dtype of hidden. Logits, sums over chunks and results are float32.
int64_t chunk_bytes = 128 << 20;  // bytes of logits per chunk, enough rows to fill the device

struct Logprob {
  static constexpr int64_t kChunksTogether = 4;  // for 16-bit types: number of chunks with gradients in the same GEMMs

  const DeviceScope on;
  const Tensor hidden, weight, targets;
  const at::ScalarType weight_type;
  const at::TensorOptions float_options;
  const int64_t N, C, V;
  Tensor logprob, entropy, lse, grad_logprob, grad_entropy, grad_hidden, grad_weight;
  double grad_everywhere = 0;

  Logprob(const Tensor& h, const Tensor& w, const Tensor& t, const char* op)
      : on(h, op, "hidden"), hidden((check_logprob(h, w, t, op), h.contiguous())),
        weight(w.to(h.scalar_type()).contiguous()), targets(t.contiguous()), weight_type(w.scalar_type()),
        float_options(h.options().dtype(at::kFloat)), N(h.size(0)), C(h.size(1)), V(w.size(0)) {}

  void allocate_results() {
    logprob = at::empty({N}, float_options), entropy = at::empty({N}, float_options);
    lse = at::empty({N}, float_options.dtype(at::kDouble));
  }

  // Computes the gradient of hidden, and adds to that of weight, from these gradients of logits, which begin at row
  // `first`. PyTorch cannot add a product of 16-bit matrices to float32 sums in place, so each product writes (V, C)
  // sums to new memory. So fewer, larger products are faster.
  void multiply(const Tensor& grad, int64_t first) {
    const Tensor rows = hidden.narrow(0, first, grad.size(0));
    Tensor to = grad_hidden.narrow(0, first, grad.size(0));
    at::mm_out(to, grad, weight);
    const bool wide = grad.scalar_type() == at::kFloat;
    if (!grad_weight.defined()) grad_weight = wide ? at::mm(grad.t(), rows) : at::mm(grad.t(), rows, at::kFloat);
    else if (wide) grad_weight.addmm_(grad.t(), rows);
    else grad_weight.add_(at::mm(grad.t(), rows, at::kFloat));
  }

  void run(bool stats, bool grads) {
    if (grads) grad_hidden = at::empty({N, C}, hidden.options());
    // A row is a whole number of cache lines for every V, because cuBLAS and our kernels access 16 bytes at a time.
    const int64_t stride = (V + 63) / 64 * 64;
    const auto rows_of = [&](int64_t rows, const at::TensorOptions& options) {
      return at::empty({rows, stride}, options).narrow(1, 0, V);
    };
    const int64_t fit = std::max<int64_t>(1, chunk_bytes / std::max<int64_t>(1, stride * int64_t(sizeof(float))));
    const DType dtype = dtype_of(hidden, "token_logprob", "hidden");
    const bool wide = dtype == DType::f32;
    const Tensor memory = rows_of(std::min(fit, N), float_options);
    const int64_t together = wide ? fit : kChunksTogether * fit;
    const Tensor grad_memory = wide || !grads ? memory : rows_of(std::min(together, N), hidden.options());
    for (int64_t first = 0; first < N; first += fit) {
      const int64_t rows = std::min(fit, N - first), waiting = grads ? first % together : 0;
      const auto chunk = [&](const Tensor& t) { return t.narrow(0, first, rows); };
      const auto pointer = [&](const Tensor& t) { return t.defined() ? t.data_ptr<float>() + first : nullptr; };
      Tensor logits = memory.narrow(0, 0, rows), grad = grad_memory.narrow(0, waiting, rows);
      if (wide) at::mm_out(logits, chunk(hidden), weight.t());
      else at::mm_out(logits, chunk(hidden), weight.t(), at::kFloat);
      const cuda::LogitChunk x{.grad_dtype = dtype,
                               .rows = rows,
                               .V = V,
                               .stride = stride,
                               .logits = logits.data_ptr<float>(),
                               .grad = grad.data_ptr(),
                               .targets = targets.const_data_ptr<int64_t>() + first,
                               .logprob = pointer(logprob),
                               .entropy = pointer(entropy),
                               .lse = lse.data_ptr<double>() + first,
                               .grad_logprob = pointer(grad_logprob),
                               .grad_entropy = pointer(grad_entropy),
                               .grad_everywhere = grad_everywhere};
      if (stats) cuda::logit_stats(x, on.stream);
      if (!grads) continue;
      cuda::logit_grad(x, on.stream);
      const int64_t ready = waiting + rows;
      if (ready == together || first + rows == N) multiply(grad_memory.narrow(0, 0, ready), first - waiting);
    }
    if (grads) grad_weight = N ? grad_weight.to(weight_type) : at::zeros({V, C}, weight.options().dtype(weight_type));
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprob(const Tensor& hidden, const Tensor& weight,
                                                         const Tensor& targets, int64_t kept_groups) {
  TORCH_CHECK(kept_groups == 0, "token_logprob: only the CPU's kernel keeps logits");
  Logprob p(hidden, weight, targets, "token_logprob");
  p.allocate_results();
  p.run(true, false);
  return {p.logprob, p.entropy, p.lse, at::empty({0, p.N, kLogprobStride}, p.float_options)};
}

std::tuple<Tensor, Tensor> token_logprob_backward(const Tensor& grad_logprob, const Tensor& grad_entropy,
                                                  const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                  const Tensor& entropy, const Tensor& lse, const Tensor&) {
  Logprob p(hidden, weight, targets, "token_logprob_backward");
  p.grad_logprob = grad_logprob.contiguous(), p.grad_entropy = grad_entropy.contiguous();
  p.entropy = entropy, p.lse = lse;
  p.run(false, true);
  return {p.grad_hidden, p.grad_weight};
}

// Mean of -logprob, and the gradients. The gradient with respect to each logprob is known in advance (-1 / N), so the
// logits are computed once.
std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& targets) {
  Logprob p(hidden, weight, targets, "cross_entropy");
  TORCH_CHECK(p.N > 0, "cross_entropy: hidden has no rows");
  p.grad_everywhere = -1.0 / p.N;
  p.allocate_results();
  p.run(true, true);
  return {p.logprob.mean().neg_(), p.grad_hidden, p.grad_weight};
}

// --- add_layer_norm --------------------------------------------------------------------------------------------------
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const OptionalTensor& branch,
                                                          const Tensor& weight, const Tensor& bias, double dropout_p,
                                                          int64_t seed, at::ScalarType dtype) {
  const DeviceScope on(x, "add_layer_norm", "x");
  const NormForward f(x, branch, weight, bias, dropout_p, seed, dtype);
  cuda::layer_norm(f.n, on.stream);
  return f.results();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(const OptionalTensor& grad_sum, const Tensor& grad_y,
                                                                   const Tensor& sum, const Tensor& weight,
                                                                   const Tensor& mean, const Tensor& scale,
                                                                   double dropout_p, int64_t seed,
                                                                   std::optional<at::ScalarType> branch_dtype) {
  const DeviceScope on(sum, "add_layer_norm_backward", "sum");
  NormBackward f(grad_sum, grad_y, sum, weight, mean, scale, dropout_p, seed, branch_dtype);
  f.allocate_parts({2, cuda::layer_norm_blocks(f.n.rows), f.n.C});
  cuda::layer_norm_backward(f.n, on.stream);
  return {f.grad_x, f.grad_branch, f.parts[0].sum(0), f.parts[1].sum(0)};
}

// --- gelu_backward ---------------------------------------------------------------------------------------------------
std::tuple<Tensor, Tensor> gelu_backward(const Tensor& grad_y_, const Tensor& x) {
  constexpr auto op = "gelu_backward";
  const DeviceScope on(x, op, "x");
  const Tensor grad_y = aligned_grad(grad_y_);
  check_like(grad_y, x, op, "grad_y", "x");
  check_contiguous(grad_y, op, "grad_y"), check_contiguous(x, op, "x");
  TORCH_CHECK(x.dim() == 2 && grad_y.sizes() == x.sizes() && x.size(1) % 8 == 0, op, ": grad_y and x must have the ",
              "same shape (rows, N), N a multiple of 8, not ", grad_y.sizes(), " and ", x.sizes());
  const int64_t rows = x.size(0), N = x.size(1);
  const Tensor grad = at::empty_like(x);
  const Tensor parts = at::empty({cuda::gelu_blocks(rows), N}, x.options().dtype(at::kFloat));
  cuda::gelu_backward({dtype_of(x, op, "x"), rows, N, grad_y.const_data_ptr(), x.const_data_ptr(), grad.data_ptr(),
                       parts.data_ptr<float>()},
                      on.stream);
  return {grad, parts.sum(0)};
}

}  // namespace

TORCH_LIBRARY_IMPL(tinystory, CUDA, m) {
  m.impl("causal_attention", causal_attention);
  m.impl("causal_attention_backward", causal_attention_backward);
  m.impl("decode_attention", decode_attention);
  m.impl("sample", sample);
  m.impl("token_logprob", token_logprob);
  m.impl("token_logprob_backward", token_logprob_backward);
  m.impl("cross_entropy", cross_entropy);
  m.impl("gelu_backward", gelu_backward);
  m.impl("add_layer_norm", add_layer_norm);
  m.impl("add_layer_norm_backward", add_layer_norm_backward);
}

}  // namespace tinystory

// Python imports the library as a module. The import registers the kernels above.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace tinystory;
  m.def("add_attention",
        [](uintptr_t kernels) { add_attention(*reinterpret_cast<const cuda::AttentionKernels*>(kernels)); });
  m.def("set_chunk_bytes", [](int64_t bytes) { chunk_bytes = bytes; });  // lab/kernel_times.py compares sizes
}
