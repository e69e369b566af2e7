// The operators: the schemas (at the end), and the CPU implementations, which call the kernels of csrc/cpu.
// cuda/ops.cpp has the CUDA implementations. Only these two files, arguments.h, autograd.cpp (the gradients),
// parallel.h and module.cpp include headers of PyTorch.
#include <ATen/ops/gelu_backward.h>
#include <torch/library.h>

#include <tuple>

#include "arguments.h"
#include "memory.h"
#include "parallel.h"

namespace tinystory {
namespace {

// A buffer of this thread with at least `bytes` bytes. The buffer is kept between calls, because page faults of a new
// buffer of 50 MB would cost time in each call. Allocates a new buffer if a returned tensor still uses the old one.
// Buffers that are in use at the same time need different kNumber.
template <int kNumber = 0>
const Tensor& workspace(int64_t bytes) {
  thread_local Tensor memory;
  if (!memory.defined() || memory.numel() < bytes || memory.storage().use_count() > 1) {
    memory = at::empty({bytes}, at::kByte);
    use_huge_pages(memory.data_ptr(), bytes);
  }
  return memory;
}

// The sum over the n rows of parts, (n, C), computed in f64. For a few thousand elements, at::sum would take 80 us.
Tensor sum_of_rows(const float* parts, int64_t n, int64_t C, const at::TensorOptions& options) {
  std::vector<double> total(C);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < C; ++c) total[c] += parts[i * C + c];
  Tensor sums = at::empty({C}, options);
  std::copy(total.begin(), total.end(), sums.data_ptr<float>());
  return sums;
}

std::tuple<Tensor, Tensor> causal_attention(const Tensor& qkv, double dropout_p, int64_t seed) {
  const AttentionForward f(qkv, dropout_p, seed);
  parallel(f.x.B * f.x.H, [&](int64_t begin, int64_t end) { cpu::attention_forward(f.x, begin, end); });
  return {f.out, f.lse};
}

Tensor causal_attention_backward(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                                 double dropout_p, int64_t seed) {
  const AttentionBackward f(grad_out, qkv, out, lse, dropout_p, seed);
  parallel(f.x.B * f.x.H, [&](int64_t begin, int64_t end) { cpu::attention_backward(f.x, begin, end); });
  return f.grad_qkv;
}

Tensor decode_attention(const Tensor& qkv, const Tensor& prefix, const Tensor& spans, const Tensor& cache,
                        const Tensor& lengths) {
  const Decode f(qkv, prefix, spans, cache, lengths);
  for (int64_t b = 0; b < f.x.B; ++b) {
    TORCH_CHECK(f.x.lengths[b] >= 0 && f.x.lengths[b] < f.x.T, "decode_attention: lengths[", b, "] is ", f.x.lengths[b],
                ", not in 0 .. T_max - 1 = ", f.x.T - 1);
    const int64_t begin = f.x.spans[2 * b], end = f.x.spans[2 * b + 1];
    TORCH_CHECK(0 <= begin && begin <= end && end <= f.x.P, "decode_attention: spans[", b, "] is ", begin, " .. ", end,
                ", not within 0 .. P = ", f.x.P);
  }
  parallel(f.x.B * f.x.H, [&](int64_t begin, int64_t end) { cpu::decode_attention(f.x, begin, end); });
  return f.out;
}

std::tuple<Tensor, Tensor, Tensor> sample(const Tensor& logits, int64_t seed, const Tensor& rows, const Tensor& steps,
                                          double temperature, int64_t top_k, double top_p) {
  const Draw f(logits, seed, rows, steps, temperature, top_k, top_p);
  parallel(f.x.B, [&](int64_t begin, int64_t end) { cpu::sample(f.x, begin, end); });
  for (int64_t b = 0; b < f.x.B; ++b) {
    TORCH_CHECK(f.x.tokens[b] != kNotANumber, "sample: logits row ", b, " (id ", f.x.rows[b], ") holds NaN or +inf");
    TORCH_CHECK(f.x.tokens[b] != kNoToken, "sample: logits row ", b, " (id ", f.x.rows[b], ") is -inf throughout");
  }
  return {f.tokens, f.logprobs, f.entropy};
}

// --- token_logprob ---------------------------------------------------------------------------------------------------
struct Logprob {
  const Tensor hidden, weight, targets;
  const at::TensorOptions wide;  // f32, or f64 for f64
  TokenLogprob x{};
  Tensor logprob, entropy, lse, grad_hidden, grad_weight;
  Tensor sums;  // sums of grad_weight for the columns of the chunk

  Logprob(const Tensor& h, const Tensor& w, const Tensor& t, const char* op)
      : hidden(check(h, w, t, op).contiguous()), weight(w.contiguous()), targets(t.contiguous()),
        wide(h.options().dtype(tinystory::wide(h))) {
    x.dtype = dtype_of(h, op, "hidden");
    x.weight_dtype = dtype_of(w, op, "weight");
    x.N = h.size(0), x.C = h.size(1), x.V = w.size(0);
    x.hidden = hidden.const_data_ptr(), x.weight = weight.const_data_ptr();
    x.targets = targets.const_data_ptr<int64_t>();
  }

  static const Tensor& check(const Tensor& h, const Tensor& w, const Tensor& t, const char* op) {
    check_logprob(h, w, t, op);
    for (int64_t i = 0; i < t.size(0); ++i) {
      const int64_t target = t.const_data_ptr<int64_t>()[i * t.stride(0)];
      TORCH_CHECK(target >= 0 && target < w.size(0), op, ": targets[", i, "] is ", target,
                  ", not in 0 .. V - 1 = ", w.size(0) - 1);
    }
    return h;
  }

  void use(const Tensor& entropy_, const Tensor& lse_) {
    x.entropy = entropy_.data_ptr();
    x.lse = lse_.data_ptr<double>();
  }
  void keep(const Tensor& logits) {
    x.kept_logits = logits.data_ptr();
    x.kept_groups = logits.size(0);
  }
  void allocate_results() {
    logprob = at::empty({x.N}, wide), entropy = at::empty({x.N}, wide);
    lse = at::empty({x.N}, wide.dtype(at::kDouble));
    x.logprob = logprob.data_ptr();
    use(entropy, lse);
  }

  // Computes log-probabilities and entropies.
  void compute_results() {
    const int64_t rows = std::min(x.N, kRows);
    prepare(rows, all_groups());
    each_chunk(rows, [&] {
      pack_hidden();
      results_of_chunk();
    });
  }

  // Computes gradients from given entropies and lse. A chunk has as many rows as possible, so that the weight is packed
  // rarely, about `bytes` bytes of logits, and some columns for every thread.
  void compute_grads(int64_t bytes) {
    const int64_t rows = std::min(x.N, kRows), threads = at::get_num_threads();
    const int64_t fit = elements(bytes) / std::max<int64_t>(1, rows) / kLogprobGroup;
    const int64_t groups = std::max<int64_t>(1, blocks(fit, threads)) * threads;
    allocate_grads(std::min(x.V, groups * kLogprobGroup));
    prepare(rows, std::min(groups, all_groups()));
    for (x.first_group = 0; x.first_group < all_groups(); x.first_group += groups) {
      x.groups = std::min(groups, all_groups() - x.first_group);
      const bool packed = rows == x.N && x.first_group > 0 && x.groups == groups;  // hidden is already packed
      each_chunk(rows, [&] {
        if (!packed) pack_hidden();
        grads_of_chunk();
      });
      finish_grad_weight();
    }
  }

  // Computes results and gradients. A chunk of about `bytes` bytes of logits spans all columns, so that the gradients
  // can be computed right after the row sums.
  void compute_results_and_grads(int64_t bytes) {
    const int64_t fit = elements(bytes) / std::max<int64_t>(1, x.V);
    const int64_t rows = std::min(x.N, std::max<int64_t>(2, fit / 2 * 2));
    allocate_grads(x.V);
    prepare(rows, all_groups());
    each_chunk(rows, [&] {
      pack_hidden();
      results_of_chunk();
      grads_of_chunk();
    });
    finish_grad_weight();
  }

  static constexpr int64_t kRows = 4096;  // rows of a chunk if the logits of the chunk are not stored as a whole
  int64_t elements(int64_t bytes) const { return bytes / int64_t(wide.dtype().itemsize()); }
  int64_t all_groups() const { return blocks(x.V, kLogprobGroup); }

  // Allocates the workspace for chunks with these numbers of rows and groups.
  void prepare(int64_t rows, int64_t groups) {
    x.rows = rows, x.groups = groups;
    x.workspace = workspace(cpu::logprob_workspace(x)).data_ptr();
  }
  template <class F>
  void each_chunk(int64_t rows, const F& f) {
    for (x.first = 0; x.first < x.N; x.first += rows) {
      x.rows = std::min(rows, x.N - x.first);
      f();
    }
  }
  template <class Kernel>
  void step(Kernel kernel, int64_t items) {
    parallel(items, [&](int64_t begin, int64_t end) { kernel(x, begin, end); });
  }
  void pack_hidden() { step(cpu::logprob_pack, (x.rows + 1) / 2); }
  void results_of_chunk() {
    step(cpu::logprob_logits, x.groups);
    step(cpu::logprob_stats, x.rows);
  }
  void grads_of_chunk() {
    step(cpu::logprob_grad_weight, x.groups);
    step(cpu::logprob_grad_hidden, blocks(x.rows, kLogprobRows));
  }

  void allocate_grads(int64_t columns) {
    const int64_t C = (x.C + 63) / 64 * 64;
    grad_hidden = at::empty({x.N, C}, wide), grad_weight = at::empty({x.V, x.C}, weight.options());
    const bool in_place = columns == x.V && C == x.C && grad_weight.scalar_type() == wide.dtype();
    sums = in_place ? grad_weight : at::empty({columns, C}, wide);
    x.grad_hidden = grad_hidden.data_ptr(), x.grad_weight = sums.data_ptr();
    if (x.N == 0) sums.zero_();
  }
  void finish_grad_weight() {
    if (sums.is_same(grad_weight)) return;
    const int64_t first = x.first_group * kLogprobGroup, n = std::min(x.groups * kLogprobGroup, x.V - first);
    grad_weight.narrow(0, first, n).copy_(sums.narrow(0, 0, n).narrow(1, 0, x.C));
  }
  std::tuple<Tensor, Tensor> grads() const {
    return {grad_hidden.narrow(1, 0, x.C).to(hidden.scalar_type()).contiguous(), grad_weight};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprob(const Tensor& hidden, const Tensor& weight,
                                                         const Tensor& targets, int64_t kept_groups) {
  Logprob p(hidden, weight, targets, "token_logprob");
  p.allocate_results();
  const int64_t bytes = kept_groups * p.x.N * kLogprobStride * int64_t(p.wide.dtype().itemsize());
  const Tensor logits = workspace<1>(bytes)
                            .narrow(0, 0, bytes)
                            .view(p.wide.dtype().toScalarType())
                            .view({kept_groups, p.x.N, kLogprobStride});
  p.keep(logits);
  p.compute_results();
  return {p.logprob, p.entropy, p.lse, logits};
}

std::tuple<Tensor, Tensor> token_logprob_backward(const Tensor& grad_logprob, const Tensor& grad_entropy,
                                                  const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                  const Tensor& entropy, const Tensor& lse, const Tensor& logits) {
  Logprob p(hidden, weight, targets, "token_logprob_backward");
  const Tensor g = grad_logprob.contiguous(), ge = grad_entropy.contiguous();
  p.x.grad_logprob = g.const_data_ptr(), p.x.grad_entropy = ge.const_data_ptr();
  p.use(entropy, lse);
  p.keep(logits);
  p.compute_grads(10 << 20);
  return p.grads();
}

// The mean of -logprob, and the gradients. The backward pass only multiplies the gradients by a factor, so the logits
// are computed once, in the forward pass.
std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& targets) {
  Logprob p(hidden, weight, targets, "cross_entropy");
  TORCH_CHECK(p.x.N > 0, "cross_entropy: hidden has no rows");
  p.x.grad_everywhere = -1.0 / p.x.N;
  p.allocate_results();
  p.compute_results_and_grads(64 << 20);
  const auto [grad_hidden, grad_weight] = p.grads();
  return {p.logprob.mean(at::kDouble).neg_().to(p.logprob.scalar_type()), grad_hidden, grad_weight};
}

// --- linear, add_layer_norm ------------------------------------------------------------------------------------------
constexpr int64_t kChunkRows = 2048;  // rows per chunk of a linear layer, so that the packed rows stay in the L3 cache

DType float_or_bf16(const Tensor& t, const char* op, const char* name) {
  const DType type = dtype_of(t, op, name);
  TORCH_CHECK(type == DType::f32 || type == DType::bf16, op, ": ", name, " must be float32 or bfloat16, not ",
              t.scalar_type());
  TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous; call .contiguous() first");
  return type;
}

// The type of the GEMMs of a layer.
DType gemm_type(at::ScalarType dtype, const char* op) {
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, op, ": dtype must be float32 or bfloat16, not ", dtype);
  return dtype == at::kBFloat16 ? DType::bf16 : DType::f32;
}

Linear linear_args(const Tensor& x, const Tensor& weight, bool gelu, at::ScalarType dtype, const char* op) {
  TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1), op, ": x (..., K) and weight (N, K) ",
              "do not fit: ", x.sizes(), " and ", weight.sizes());
  check_float(weight, weight.sizes(), op, "weight");
  const int64_t N = weight.size(0), K = weight.size(1);
  TORCH_CHECK(N > 0 && K > 0 && N % 32 == 0 && K % 32 == 0, op,
              ": weight's sizes must be multiples of 32 above 0, not ", weight.sizes());
  return {.x_type = float_or_bf16(x, op, "x"),
          .y_type = {},
          .gemm_type = gemm_type(dtype, op),
          .gelu = gelu,
          .M = x.numel() / std::max<int64_t>(K, 1),
          .K = K,
          .N = N,
          .threads = at::get_num_threads(),
          .x = x.const_data_ptr(),
          .weight = weight.const_data_ptr<float>(),
          .rows = {}};
}

// Packs the weight, then calls `run` for each chunk of rows.
template <class F>
void linear_chunks(Linear& l, int64_t weight_items, const F& run) {
  l.rows = std::min(kChunkRows, l.M);
  l.workspace = workspace(cpu::linear_workspace(l)).data_ptr();
  parallel(weight_items, [&](int64_t begin, int64_t end) { cpu::linear_pack_weight(l, begin, end); });
  for (; l.first < l.M; l.first += kChunkRows) {
    l.rows = std::min(kChunkRows, l.M - l.first);
    run([&](auto kernel, int64_t items) {
      parallel(items, [&](int64_t begin, int64_t end) { kernel(l, begin, end); });
    });
  }
}

std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const Tensor& bias, bool gelu,
                                  at::ScalarType dtype, at::ScalarType out_dtype) {
  constexpr auto op = "linear";
  Linear l = linear_args(x, weight, gelu, dtype, op);
  check_float(bias, {l.N}, op, "bias");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = l.N;
  Tensor y = at::empty(shape, x.options().dtype(out_dtype));
  Tensor slope = at::empty(gelu ? shape : std::vector<int64_t>{0}, x.options().dtype(dtype));
  l.y_type = float_or_bf16(y, op, "y");
  l.bias = bias.const_data_ptr<float>();
  l.y = y.data_ptr(), l.slope = slope.data_ptr();
  linear_chunks(l, blocks(l.N, 64), [&](const auto& step) {
    step(cpu::linear_pack_x, l.rows);
    step(cpu::linear_forward, cpu::linear_tiles(l));
  });
  return {y, slope};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                   const Tensor& slope, bool gelu, at::ScalarType dtype) {
  constexpr auto op = "linear_backward";
  Linear l = linear_args(x, weight, gelu, dtype, op);
  const Tensor g = grad_y.contiguous();
  TORCH_CHECK(g.numel() == l.M * l.N && (!gelu || slope.numel() == l.M * l.N), op,
              ": grad_y or slope do not fit x and weight: ", g.sizes(), " and ", slope.sizes());
  l.y_type = float_or_bf16(g, op, "grad_y");
  Tensor grad_x = at::empty_like(x), grad_weight = at::empty_like(weight);
  Tensor bias_parts = at::empty({blocks(l.M, kLinearRows), l.N}, weight.options());
  if (l.M == 0) grad_weight.zero_();
  l.grad_y = g.const_data_ptr(), l.slope = slope.data_ptr(), l.grad_x = grad_x.data_ptr();
  l.grad_weight = grad_weight.data_ptr<float>(), l.bias_parts = bias_parts.data_ptr<float>();
  linear_chunks(l, l.N / 32, [&](const auto& step) {
    step(cpu::linear_pack_grad, blocks(l.rows, kLinearRows));
    step(cpu::linear_grad_x, cpu::linear_tiles(l));
    step(cpu::linear_grad_weight, cpu::linear_weight_tiles(l));
  });
  return {grad_x, grad_weight, sum_of_rows(l.bias_parts, bias_parts.size(0), l.N, weight.options())};
}

// On CUDA this operator is one kernel. On the CPU only tests call it; training uses linear_backward instead.
std::tuple<Tensor, Tensor> gelu_backward(const Tensor& grad_y, const Tensor& x) {
  const Tensor grad = at::gelu_backward(grad_y, x, "tanh");
  return {grad, grad.sum(0, false, at::kFloat)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const OptionalTensor& branch,
                                                          const Tensor& weight, const Tensor& bias, double dropout_p,
                                                          int64_t seed, at::ScalarType dtype) {
  const NormForward f(x, branch, weight, bias, dropout_p, seed, dtype);
  parallel(f.n.rows, [&](int64_t begin, int64_t end) { cpu::layer_norm(f.n, begin, end); });
  return f.results();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(const OptionalTensor& grad_sum, const Tensor& grad_y,
                                                                   const Tensor& sum, const Tensor& weight,
                                                                   const Tensor& mean, const Tensor& scale,
                                                                   double dropout_p, int64_t seed,
                                                                   std::optional<at::ScalarType> branch_dtype) {
  NormBackward f(grad_sum, grad_y, sum, weight, mean, scale, dropout_p, seed, branch_dtype);
  const int64_t n = blocks(f.n.rows, kLinearRows), C = f.n.C;
  f.allocate_parts({2, n, C});
  parallel(n, [&](int64_t begin, int64_t end) { cpu::layer_norm_backward(f.n, begin, end); });
  const auto total = [&](const float* parts) { return sum_of_rows(parts, n, C, weight.options()); };
  return {f.grad_x, f.grad_branch, total(f.n.parts), total(f.n.parts + n * C)};
}

}  // namespace

// One entry per operator: the schema, and the CPU implementation.
TORCH_LIBRARY(tinystory, m) {
  const auto op = [&](const char* schema, auto* kernel) {
    m.def(schema, torch::dispatch(c10::DispatchKey::CPU, kernel));
  };
  op("causal_attention(Tensor qkv, float dropout_p, SymInt seed) -> (Tensor out, Tensor lse)", causal_attention);
  op("causal_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, float dropout_p, SymInt seed)"
     " -> Tensor",
     causal_attention_backward);
  op("decode_attention(Tensor qkv, Tensor prefix, Tensor spans, Tensor(a!) cache, Tensor lengths) -> Tensor",
     decode_attention);
  op("sample(Tensor logits, SymInt seed, Tensor rows, Tensor steps, float temperature, int top_k, float top_p)"
     " -> (Tensor tokens, Tensor logprobs, Tensor entropy)",
     sample);
  op("token_logprob(Tensor hidden, Tensor weight, Tensor targets, int kept_groups) -> (Tensor logprob, Tensor entropy,"
     " Tensor lse, Tensor logits)",
     token_logprob);
  op("token_logprob_backward(Tensor grad_logprob, Tensor grad_entropy, Tensor hidden, Tensor weight, Tensor targets,"
     " Tensor entropy, Tensor lse, Tensor logits) -> (Tensor grad_hidden, Tensor grad_weight)",
     token_logprob_backward);
  op("cross_entropy(Tensor hidden, Tensor weight, Tensor targets)"
     " -> (Tensor loss, Tensor grad_hidden, Tensor grad_weight)",
     cross_entropy);
  op("linear(Tensor x, Tensor weight, Tensor bias, bool gelu, ScalarType dtype, ScalarType out_dtype)"
     " -> (Tensor y, Tensor slope)",
     linear);
  op("linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor slope, bool gelu, ScalarType dtype)"
     " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
     linear_backward);
  op("gelu_backward(Tensor grad_y, Tensor x) -> (Tensor grad, Tensor grad_bias)", gelu_backward);
  m.def("lowered_linear(Tensor x, Tensor weight, Tensor bias, Tensor weight16, Tensor bias16, bool gelu) -> Tensor");
  op("add_layer_norm(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float dropout_p, SymInt seed,"
     " ScalarType dtype) -> (Tensor sum, Tensor y, Tensor mean, Tensor scale)",
     add_layer_norm);
  op("add_layer_norm_backward(Tensor? grad_sum, Tensor grad_y, Tensor sum, Tensor weight, Tensor mean, Tensor scale,"
     " float dropout_p, SymInt seed, ScalarType? branch_dtype)"
     " -> (Tensor grad_x, Tensor grad_branch, Tensor grad_weight, Tensor grad_bias)",
     add_layer_norm_backward);
}

}  // namespace tinystory
