// Converts tensors to the structs of kernels.h: checks the arguments and allocates the results. ops.cpp and
// cuda/ops.cpp share this header, so that both devices raise the same errors.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "kernels.h"

namespace tinystory {

using at::Tensor;

inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    case at::kDouble:
      if (!t.is_cuda()) return DType::f64;
      [[fallthrough]];
    default:
      TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16",
                  t.is_cuda() ? " or float16 on CUDA" : ", float16 or float64", ", not ", t.scalar_type());
  }
}

inline void check_like(const Tensor& t, const Tensor& other, const char* op, const char* name, const char* other_name) {
  TORCH_CHECK(t.scalar_type() == other.scalar_type(), op, ": ", name, " is ", t.scalar_type(), " but ", other_name,
              " is ", other.scalar_type());
  TORCH_CHECK(t.device() == other.device(), op, ": ", name, " is on ", t.device(), " but ", other_name, " is on ",
              other.device());
}

inline void check_contiguous(const Tensor& t, const char* op, const char* name) {
  TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous; call .contiguous() first");
  TORCH_CHECK(!t.is_cuda() || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, op, ": ", name,
              " must begin at a multiple of 16 bytes on CUDA; call .clone() first");
}

// An incoming gradient, contiguous and aligned as the kernels need it. Autograd chooses its memory, not the user.
inline Tensor aligned_grad(const Tensor& grad) {
  const Tensor t = grad.contiguous();
  return t.is_cuda() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 ? t.clone() : t;
}

inline void check_head_size(int64_t D, const Tensor& t, const char* op, const char* name) {
  TORCH_CHECK(!t.is_cuda() || D == 32 || D == 64 || D == 128, op, ": ", name,
              "'s head size D must be 32, 64 or 128 on CUDA, not ", D);
  TORCH_CHECK(D >= 16 && D <= 256 && D % 16 == 0, op, ": ", name,
              "'s head size D must be a multiple of 16 up to 256, not ", D);
}

inline void check_ids(const Tensor& t, int64_t n, const Tensor& other, const char* op, const char* name) {
  TORCH_CHECK(t.dim() == 1 && t.size(0) == n, op, ": ", name, " must have shape (", n, "), not ", t.sizes());
  TORCH_CHECK(t.scalar_type() == at::kLong, op, ": ", name, " must be int64, not ", t.scalar_type());
  TORCH_CHECK(t.device() == other.device(), op, ": ", name, " is on ", t.device(), ", not on ", other.device());
}

inline at::ScalarType wide(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_float(const Tensor& t, at::IntArrayRef shape, const char* op, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.sizes() == shape && t.is_contiguous(), op, ": ", name,
              " must be contiguous float32 of shape ", shape, ", not ", t.scalar_type(), " of shape ", t.sizes());
}

// --- causal_attention ------------------------------------------------------------------------------------------------
inline Attention attention_args(const Tensor& qkv, double dropout_p, int64_t seed, const char* op) {
  TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, op, ": qkv must have shape (B, T, 3, H, D), not ", qkv.sizes());
  check_contiguous(qkv, op, "qkv");
  const int64_t D = qkv.size(4);
  check_head_size(D, qkv, op, "qkv");
  TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, op, ": dropout_p must be in [0, 1), not ", dropout_p);
  return {.dtype = dtype_of(qkv, op, "qkv"),
          .B = qkv.size(0),
          .T = qkv.size(1),
          .H = qkv.size(3),
          .D = D,
          .dropout = dropout_p,
          .seed = uint64_t(seed),
          .qkv = qkv.const_data_ptr()};
}

struct AttentionForward {
  Attention x;
  Tensor out, lse;

  AttentionForward(const Tensor& qkv, double dropout_p, int64_t seed)
      : x(attention_args(qkv, dropout_p, seed, "causal_attention")),
        out(at::empty({x.B, x.T, x.H, x.D}, qkv.options())),
        lse(at::empty({x.B, x.H, x.T}, qkv.options().dtype(wide(qkv)))) {
    x.out = out.data_ptr();
    x.lse = lse.data_ptr();
  }
};

struct AttentionBackward {
  Attention x;
  Tensor grad_out, grad_qkv;

  AttentionBackward(const Tensor& grad_out_, const Tensor& qkv, const Tensor& out, const Tensor& lse, double dropout_p,
                    int64_t seed)
      : x(attention_args(qkv, dropout_p, seed, "causal_attention_backward")) {
    constexpr auto op = "causal_attention_backward";
    check_like(grad_out_, qkv, op, "grad_out", "qkv");
    TORCH_CHECK(grad_out_.sizes() == out.sizes(), op, ": grad_out must have shape ", out.sizes(), ", not ",
                grad_out_.sizes());
    grad_out = aligned_grad(grad_out_);
    check_contiguous(grad_out, op, "grad_out");
    grad_qkv = at::empty(qkv.sizes(), qkv.options());
    x.grad_out = grad_out.const_data_ptr();
    x.out = out.data_ptr();
    x.lse = lse.data_ptr();
    x.grad_qkv = grad_qkv.data_ptr();
  }
};

// --- decode_attention ------------------------------------------------------------------------------------------------
struct Decode {
  DecodeAttention x;
  Tensor spans, lengths, out;

  Decode(const Tensor& qkv, const Tensor& prefix, const Tensor& spans_, const Tensor& cache, const Tensor& lengths_) {
    constexpr auto op = "decode_attention";
    TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) == 3, op, ": qkv must have shape (B, 3, H, D), not ", qkv.sizes());
    const int64_t B = qkv.size(0), H = qkv.size(2), D = qkv.size(3);
    check_head_size(D, qkv, op, "qkv");
    const auto check_keys = [&](const Tensor& t, int64_t dim, const char* name, const char* shape) {
      TORCH_CHECK(
          t.dim() == dim && t.sizes().slice(dim - 3) == at::IntArrayRef({2, H, D}) && (dim < 5 || t.size(0) == B), op,
          ": ", name, " must have shape ", shape, " with qkv's B, H and D, not ", t.sizes());
      check_like(t, qkv, op, name, "qkv");
      check_contiguous(t, op, name);
    };
    check_keys(prefix, 4, "prefix", "(P, 2, H, D)");
    check_keys(cache, 5, "cache", "(B, T_max, 2, H, D)");
    check_contiguous(qkv, op, "qkv");
    TORCH_CHECK(spans_.dim() == 2 && spans_.size(1) == 2, op, ": spans must have shape (B, 2), not ", spans_.sizes());
    check_ids(spans_.flatten(), 2 * B, qkv, op, "spans");
    check_ids(lengths_, B, qkv, op, "lengths");
    spans = spans_.contiguous(), lengths = lengths_.contiguous();
    out = at::empty({B, H, D}, qkv.options());
    x = {.dtype = dtype_of(qkv, op, "qkv"),
         .B = B,
         .P = prefix.size(0),
         .T = cache.size(1),
         .H = H,
         .D = D,
         .qkv = qkv.const_data_ptr(),
         .prefix = prefix.const_data_ptr(),
         .spans = spans.const_data_ptr<int64_t>(),
         .cache = cache.data_ptr(),
         .lengths = lengths.const_data_ptr<int64_t>(),
         .out = out.data_ptr()};
  }
};

// --- sample ----------------------------------------------------------------------------------------------------------
inline void check_sampling(double temperature, int64_t top_k, double top_p, const char* op) {
  TORCH_CHECK(temperature >= 1e-6 && temperature <= 1e6, op, ": temperature must be between 1e-6 and 1e6, not ",
              temperature, "; top_k=1 takes the most likely token");
  TORCH_CHECK(top_k >= 0, op, ": top_k must be 0 (off) or positive, not ", top_k);
  TORCH_CHECK(top_p > 0 && top_p <= 1, op, ": top_p must be in (0, 1], not ", top_p);
}

struct Draw {
  Sample x;
  Tensor rows, steps, tokens, logprobs, entropy;

  Draw(const Tensor& logits, int64_t seed, const Tensor& rows_, const Tensor& steps_, double temperature, int64_t top_k,
       double top_p) {
    constexpr auto op = "sample";
    TORCH_CHECK(logits.dim() == 2, op, ": logits must have shape (B, V), not ", logits.sizes());
    const int64_t B = logits.size(0), V = logits.size(1);
    const DType dtype = dtype_of(logits, op, "logits");
    TORCH_CHECK(dtype != DType::f64, op, ": logits must be float32, bfloat16 or float16, not float64");
    TORCH_CHECK(logits.is_contiguous(), op, ": logits must be contiguous; call .contiguous() first");
    TORCH_CHECK(V >= 1 && V < (1 << 22), op, ": logits must have between 1 and 2^22 - 1 columns, not ", V);
    check_ids(rows_, B, logits, op, "rows");
    check_ids(steps_, B, logits, op, "step");
    check_sampling(temperature, top_k, top_p, op);
    rows = rows_.contiguous(), steps = steps_.contiguous();
    tokens = at::empty({B}, rows.options()), logprobs = at::empty({B}, logits.options().dtype(at::kFloat));
    entropy = at::empty_like(logprobs);
    x = {.dtype = dtype,
         .B = B,
         .V = V,
         .logits = logits.const_data_ptr(),
         .rows = rows.const_data_ptr<int64_t>(),
         .steps = steps.const_data_ptr<int64_t>(),
         .seed = uint64_t(seed),
         .temperature = temperature,
         .top_k = top_k,
         .top_p = top_p,
         .tokens = tokens.data_ptr<int64_t>(),
         .logprobs = logprobs.data_ptr<float>(),
         .entropy = entropy.data_ptr<float>()};
  }
};

// --- token_logprob ---------------------------------------------------------------------------------------------------
inline void check_logprob(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const char* op) {
  TORCH_CHECK(hidden.dim() == 2, op, ": hidden must have shape (N, C), not ", hidden.sizes());
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == hidden.size(1), op, ": weight must have shape (V, ",
              hidden.size(1), "), not ", weight.sizes());
  TORCH_CHECK(hidden.size(1) > 0, op, ": hidden has no columns");
  TORCH_CHECK(weight.device() == hidden.device(), op, ": weight is on ", weight.device(), " but hidden is on ",
              hidden.device());
  const bool f64 = dtype_of(hidden, op, "hidden") == DType::f64;
  TORCH_CHECK(f64 == (dtype_of(weight, op, "weight") == DType::f64), op, ": weight is ", weight.scalar_type(),
              " but hidden is ", hidden.scalar_type());
  check_ids(targets, hidden.size(0), hidden, op, "targets");
}

// --- add_layer_norm --------------------------------------------------------------------------------------------------
using OptionalTensor = std::optional<Tensor>;

// Checks a tensor by check_float and check_contiguous, and that it is on the device of x.
inline void check_part(const Tensor& t, const Tensor& x, at::IntArrayRef shape, const char* op, const char* name) {
  check_float(t, shape, op, name);
  check_contiguous(t, op, name);
  TORCH_CHECK(t.device() == x.device(), op, ": ", name, " is on ", t.device(), " but x is on ", x.device());
}

inline DType norm_type(const Tensor& t, const char* op, const char* name) {
  const DType type = dtype_of(t, op, name);
  TORCH_CHECK(type != DType::f64, op, ": ", name, " must be float32, bfloat16 or float16, not Double");
  return type;
}

inline LayerNorm norm_args(const Tensor& x, const Tensor& weight, double dropout_p, int64_t seed, const char* op) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) % 32 == 0 && x.size(-1) > 0, op, ": x's last dimension must be a multiple of ",
              "32, not ", x.sizes());
  const int64_t C = x.size(-1);
  check_part(x, x, x.sizes(), op, "x");
  check_part(weight, x, {C}, op, "weight");
  TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, op, ": dropout_p must be in [0, 1), not ", dropout_p);
  return {.branch_type = {},
          .y_type = {},
          .rows = x.numel() / C,
          .C = C,
          .dropout = dropout_p,
          .seed = uint64_t(seed),
          .x = x.const_data_ptr<float>(),
          .branch = nullptr,
          .weight = weight.const_data_ptr<float>()};
}

struct NormForward {
  LayerNorm n;
  Tensor sum, y, mean, scale;  // sum: empty without a branch

  NormForward(const Tensor& x, const OptionalTensor& branch, const Tensor& weight, const Tensor& bias, double dropout_p,
              int64_t seed, at::ScalarType dtype)
      : n(norm_args(x, weight, dropout_p, seed, "add_layer_norm")),
        sum(branch ? at::empty_like(x) : at::empty({0}, x.options())),
        y(at::empty(x.sizes(), x.options().dtype(dtype))), mean(at::empty({n.rows}, x.options())),
        scale(at::empty_like(mean)) {
    constexpr auto op = "add_layer_norm";
    check_part(bias, x, {n.C}, op, "bias");
    n.branch_type = n.y_type = norm_type(y, op, "y");
    if (branch) {
      check_contiguous(*branch, op, "branch");
      TORCH_CHECK(branch->sizes() == x.sizes() && branch->device() == x.device(), op, ": branch must be like x, (",
                  x.sizes(), ") on ", x.device(), ", not (", branch->sizes(), ") on ", branch->device());
      n.branch_type = norm_type(*branch, op, "branch"), n.branch = branch->const_data_ptr();
      n.sum = sum.data_ptr<float>();
    }
    n.bias = bias.const_data_ptr<float>(), n.y = y.data_ptr();
    n.mean = mean.data_ptr<float>(), n.scale = scale.data_ptr<float>();
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor> results() const { return {sum, y, mean, scale}; }
};

struct NormBackward {
  LayerNorm n;
  Tensor grad_sum, grad_y, grad_x, grad_branch, parts;  // grad_branch: empty without a branch

  NormBackward(const OptionalTensor& grad_sum_, const Tensor& grad_y_, const Tensor& x, const Tensor& weight,
               const Tensor& mean, const Tensor& scale, double dropout_p, int64_t seed,
               std::optional<at::ScalarType> branch_dtype)
      : n(norm_args(x, weight, dropout_p, seed, "add_layer_norm_backward")), grad_y(aligned_grad(grad_y_)),
        grad_x(at::empty_like(x)), grad_branch(branch_dtype ? at::empty(x.sizes(), x.options().dtype(*branch_dtype))
                                                            : at::empty({0}, x.options())) {
    constexpr auto op = "add_layer_norm_backward";
    check_part(mean, x, {n.rows}, op, "mean");
    check_part(scale, x, {n.rows}, op, "scale");
    TORCH_CHECK(grad_y.sizes() == x.sizes(), op, ": grad_y must have shape (", x.sizes(), "), not (", grad_y.sizes(),
                ")");
    check_contiguous(grad_y, op, "grad_y");
    n.y_type = n.branch_type = norm_type(grad_y, op, "grad_y"), n.grad_y = grad_y.const_data_ptr();
    if (grad_sum_) {
      grad_sum = aligned_grad(*grad_sum_);
      check_part(grad_sum, x, x.sizes(), op, "grad_sum");
      n.grad_sum = grad_sum.const_data_ptr<float>();
    }
    if (branch_dtype) n.branch_type = norm_type(grad_branch, op, "branch"), n.grad_branch = grad_branch.data_ptr();
    n.mean = mean.data_ptr<float>(), n.scale = scale.data_ptr<float>(), n.grad_x = grad_x.data_ptr<float>();
  }
  void allocate_parts(at::IntArrayRef shape) {
    parts = at::empty(shape, grad_x.options());
    n.parts = parts.data_ptr<float>();
  }
};

}  // namespace tinystory
