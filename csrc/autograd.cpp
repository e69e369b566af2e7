// The gradients of the operators, on every device. Autograd calls them if an argument requires a gradient. A struct has
// the name of the operator. `forward` saves the tensors that `backward` needs; `backward` returns one gradient per
// argument, undefined for an argument without a gradient. Through Python, each of these calls would take 70 us.
#include <ATen/core/TensorBody.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/_addmm_activation.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace tinystory {
namespace {

using at::ScalarType, at::Tensor;
using c10::SymInt;
using torch::autograd::AutogradContext, torch::autograd::Function, torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The operator with this name. A call chooses the kernel by the device of the arguments.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The results of an operator, called from a forward pass below autograd, so that the call records no gradient.
template <class Signature, class... Arguments>
auto call_below_autograd(const c10::TypedOperatorHandle<Signature>& op, Arguments&&... arguments) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(std::forward<Arguments>(arguments)...);
}

// Declares outputs without a gradient. The gradients of other outputs may be undefined, so that autograd does not write
// zeros that no code needs.
void mark_non_differentiable(AutogradContext* ctx, const variable_list& outputs) {
  ctx->mark_non_differentiable(outputs);
  ctx->set_materialize_grads(false);
}

// Refuses a backward pass with create_graph=True: a gradient of the gradients would be 0 or lack terms, without an error.
void require_first_order(const char* op) {
  TORCH_CHECK(!at::GradMode::is_enabled(), op, ": there are no second derivatives; call backward() or grad() without ",
              "create_graph, or set TINYSTORY_KERNELS=reference");
}

struct CausalAttention : Function<CausalAttention> {
  static variable_list forward(AutogradContext* ctx, const Tensor& qkv, double dropout_p, const SymInt& seed) {
    static const auto op = find_operator<Two(const Tensor&, double, SymInt)>("tinystory::causal_attention");
    const auto [out, lse] = call_below_autograd(op, qkv, dropout_p, seed);
    ctx->save_for_backward({qkv, out, lse});
    ctx->saved_data["dropout_p"] = dropout_p, ctx->saved_data["seed"] = seed;
    mark_non_differentiable(ctx, {lse});
    return {out, lse};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    require_first_order("causal_attention");
    static const auto op =
        find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, SymInt)>(
            "tinystory::causal_attention_backward");
    if (!grads[0].defined()) return variable_list(3);
    const auto saved = ctx->get_saved_variables();
    return {op.call(grads[0], saved[0], saved[1], saved[2], ctx->saved_data["dropout_p"].toDouble(),
                    ctx->saved_data["seed"].toSymInt()),
            Tensor(), Tensor()};
  }
};

struct TokenLogprob : Function<TokenLogprob> {
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                               int64_t kept_groups) {
    static const auto op =
        find_operator<Four(const Tensor&, const Tensor&, const Tensor&, int64_t)>("tinystory::token_logprob");
    const auto [logprob, entropy, lse, logits] = call_below_autograd(op, hidden, weight, targets, kept_groups);
    ctx->save_for_backward({hidden, weight, targets, entropy, lse, logits});
    mark_non_differentiable(ctx, {lse, logits});
    return {logprob, entropy, lse, logits};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    require_first_order("token_logprob");
    static const auto op =
        find_operator<Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor&, const Tensor&)>("tinystory::token_logprob_backward");
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(4);
    const auto saved = ctx->get_saved_variables();
    const auto grad = [&](int output) { return grads[output].defined() ? grads[output] : at::zeros_like(saved[3]); };
    const auto [grad_hidden, grad_weight] =
        op.call(grad(0), grad(1), saved[0], saved[1], saved[2], saved[3], saved[4], saved[5]);
    return {grad_hidden, grad_weight, Tensor(), Tensor()};
  }
};

struct CrossEntropy : Function<CrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& weight,
                               const Tensor& targets) {
    static const auto op =
        find_operator<Three(const Tensor&, const Tensor&, const Tensor&)>("tinystory::cross_entropy");
    const auto [loss, grad_hidden, grad_weight] = call_below_autograd(op, hidden, weight, targets);
    ctx->save_for_backward({grad_hidden, grad_weight});
    mark_non_differentiable(ctx, {grad_hidden, grad_weight});
    return {loss, grad_hidden, grad_weight};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    require_first_order("cross_entropy");
    if (!grads[0].defined()) return variable_list(3);
    const auto saved = ctx->get_saved_variables();
    return {saved[0] * grads[0], saved[1] * grads[0], Tensor()};
  }
};

struct Linear : Function<Linear> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                               bool gelu, ScalarType dtype, ScalarType out_dtype) {
    static const auto op =
        find_operator<Two(const Tensor&, const Tensor&, const Tensor&, bool, ScalarType, ScalarType)>(
            "tinystory::linear");
    const auto [y, slope] = call_below_autograd(op, x, weight, bias, gelu, dtype, out_dtype);
    ctx->save_for_backward({x, weight, slope});
    ctx->saved_data["gelu"] = gelu, ctx->saved_data["dtype"] = dtype;
    mark_non_differentiable(ctx, {slope});
    return {y, slope};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    require_first_order("linear");
    static const auto op =
        find_operator<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool, ScalarType)>(
            "tinystory::linear_backward");
    if (!grads[0].defined()) return variable_list(6);
    const auto saved = ctx->get_saved_variables();
    const auto [grad_x, grad_weight, grad_bias] =
        op.call(grads[0], saved[0], saved[1], saved[2], ctx->saved_data["gelu"].toBool(),
                ctx->saved_data["dtype"].toScalarType());
    return {grad_x, grad_weight, grad_bias, Tensor(), Tensor(), Tensor()};
  }
};

// The linear layer on a GPU: gelu(x weight^T + bias) by cuBLAS, with 16-bit copies of weight and bias. The gradients of
// weight and bias are float32: the GEMM writes float32 sums, so no cast is needed.
struct LoweredLinear : Function<LoweredLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor&, const Tensor&, const Tensor& weight16,
                        const Tensor& bias16, bool gelu) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor y = at::addmm(bias16, rows, weight16.t());
    ctx->save_for_backward({rows, weight16, gelu ? y : Tensor()});
    return gelu ? at::gelu(y, "tanh") : y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    require_first_order("lowered_linear");
    static const auto gelu_backward = find_operator<Two(const Tensor&, const Tensor&)>("tinystory::gelu_backward");
    if (!grads[0].defined()) return variable_list(6);
    const auto saved = ctx->get_saved_variables();
    const Tensor &rows = saved[0], &weight16 = saved[1], &before_gelu = saved[2];
    Tensor grad = grads[0].contiguous(), grad_bias;
    if (before_gelu.defined()) std::tie(grad, grad_bias) = gelu_backward.call(grad, before_gelu);
    else grad_bias = grad.sum(0, false, at::kFloat);
    return {at::mm(grad, weight16), at::mm(grad.t(), rows, at::kFloat), grad_bias, Tensor(), Tensor(), Tensor()};
  }
};

Tensor lowered_linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& weight16,
                      const Tensor& bias16, bool gelu) {
  const Tensor rows = x.to(weight16.scalar_type()).flatten(0, -2);
  auto shape = x.sym_sizes().vec();
  shape.back() = weight16.sym_size(0);
  Tensor y;
  if (at::GradMode::is_enabled()) y = LoweredLinear::apply(rows, weight, bias, weight16, bias16, gelu);
  else if (gelu) y = at::_addmm_activation(bias16, rows, weight16.t(), 1, 1, true);  // GELU before rounding
  else y = at::addmm(bias16, rows, weight16.t());
  return y.view_symint(shape);
}

struct AddLayerNorm : Function<AddLayerNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& branch,
                               const Tensor& weight, const Tensor& bias, double dropout_p, const SymInt& seed,
                               ScalarType dtype) {
    static const auto op = find_operator<Four(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                              double, SymInt, ScalarType)>("tinystory::add_layer_norm");
    const auto [sum, y, mean, scale] = call_below_autograd(op, x, branch, weight, bias, dropout_p, seed, dtype);
    ctx->save_for_backward({branch ? sum : x, weight, mean, scale});
    ctx->saved_data["dropout_p"] = dropout_p, ctx->saved_data["seed"] = seed;
    if (branch) ctx->saved_data["branch_dtype"] = branch->scalar_type();
    mark_non_differentiable(ctx, branch ? variable_list{mean, scale} : variable_list{mean, scale, sum});
    return {sum, y, mean, scale};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    require_first_order("add_layer_norm");
    static const auto op = find_operator<Four(const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                                              const Tensor&, const Tensor&, double, SymInt, std::optional<ScalarType>)>(
        "tinystory::add_layer_norm_backward");
    const Tensor &grad_sum = grads[0], &grad_y = grads[1];
    if (!grad_sum.defined() && !grad_y.defined()) return variable_list(7);
    const auto saved = ctx->get_saved_variables();
    const auto branch = ctx->saved_data.find("branch_dtype");
    const bool has_branch = branch != ctx->saved_data.end();
    const auto [grad_x, grad_branch, grad_weight, grad_bias] =
        op.call(grad_sum.defined() ? OptionalTensor(grad_sum) : std::nullopt,
                grad_y.defined() ? grad_y : at::zeros_like(saved[0]), saved[0], saved[1], saved[2], saved[3],
                ctx->saved_data["dropout_p"].toDouble(), ctx->saved_data["seed"].toSymInt(),
                has_branch ? std::optional(branch->second.toScalarType()) : std::nullopt);
    return {grad_x, has_branch ? grad_branch : Tensor(), grad_weight, grad_bias, Tensor(), Tensor(), Tensor()};
  }
};

// Calls a Function with the signature of the operator, which returns a tuple.
template <class Differentiable, class Outputs, class... Arguments>
Outputs apply(Arguments... arguments) {
  const variable_list outputs = Differentiable::apply(arguments...);
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return Outputs(outputs[i]...);
  }(std::make_index_sequence<std::tuple_size_v<Outputs>>());
}

}  // namespace

// lowered_linear is composed of other operators, which have kernels and are recorded in graphs.
TORCH_LIBRARY_IMPL(tinystory, CompositeImplicitAutograd, m) { m.impl("lowered_linear", lowered_linear); }

TORCH_LIBRARY_IMPL(tinystory, Autograd, m) {
  m.impl("causal_attention", apply<CausalAttention, Two, const Tensor&, double, SymInt>);
  m.impl("token_logprob", apply<TokenLogprob, Four, const Tensor&, const Tensor&, const Tensor&, int64_t>);
  m.impl("cross_entropy", apply<CrossEntropy, Three, const Tensor&, const Tensor&, const Tensor&>);
  m.impl("linear", apply<Linear, Two, const Tensor&, const Tensor&, const Tensor&, bool, ScalarType, ScalarType>);
  m.impl("add_layer_norm", apply<AddLayerNorm, Four, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                 double, SymInt, ScalarType>);
}

}  // namespace tinystory
