"""Gradients and shapes of the compiled operators, for autograd, torch.compile and torch.library.opcheck.

`OPERATORS`, at the end, has one entry per operator of csrc/ops.cpp. A fake kernel returns empty tensors of the results'
shapes and dtypes. `setup` saves what `backward` needs, and `backward` returns a gradient, or None, per argument.
"""

from collections.abc import Callable
from typing import Any  # torch's ctx takes any attribute

import torch
import torch.nn.functional as F
from torch import Tensor

Gradients = tuple[Tensor | None, ...]  # one per argument of the operator
ops = torch.ops.tinystory


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def per_row(x: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    """A number of each dtype per row of x."""
    return tuple(x.new_empty(len(x), dtype=dtype) for dtype in dtypes)


# --- causal_attention -------------------------------------------------------------------------------------------------
def attention_fake(qkv: Tensor, dropout_p: float, seed: int) -> tuple[Tensor, Tensor]:
    b, t, _, h, d = qkv.shape
    return qkv.new_empty(b, t, h, d), qkv.new_empty(b, h, t, dtype=wide(qkv.dtype))


def attention_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    qkv, ctx.dropout_p, ctx.seed = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def attention_backward(ctx: Any, grad_out: Tensor | None, _: None) -> Gradients:
    if grad_out is None:
        return None, None, None
    qkv, out, lse = ctx.saved_tensors
    return ops.causal_attention_backward(grad_out, qkv, out, lse, ctx.dropout_p, ctx.seed), None, None


# --- token_logprob ----------------------------------------------------------------------------------------------------
LOGIT_GROUP, LOGIT_STRIDE = 256, 272  # columns, as in csrc/kernels.h
KEPT_BYTES = 100 << 20  # a PPO micro-batch of 32 stories of 90 tokens, vocabulary 8 192


def kept_groups(hidden: Tensor, weight: Tensor) -> int:
    """For how many groups of columns token_logprob keeps the logits for a backward pass: on a CPU as many as KEPT_BYTES
    hold, without a backward pass none. In bfloat16 they would cost as much to read as to compute again."""
    needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if hidden.is_cuda or hidden.dtype == torch.bfloat16 or not needed or not len(hidden):
        return 0
    groups = (len(weight) + LOGIT_GROUP - 1) // LOGIT_GROUP
    return min(groups, KEPT_BYTES // (len(hidden) * LOGIT_STRIDE * wide(hidden.dtype).itemsize))


def token_logprob_fake(hidden: Tensor, weight: Tensor, targets: Tensor, kept_groups: int) -> tuple[Tensor, ...]:
    logits = hidden.new_empty(kept_groups, len(hidden), LOGIT_STRIDE, dtype=wide(hidden.dtype))
    return *per_row(hidden, wide(hidden.dtype), wide(hidden.dtype), torch.float64), logits


def token_logprob_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, entropy, lse, logits = output
    ctx.save_for_backward(*inputs[:3], entropy, lse, logits)
    ctx.mark_non_differentiable(lse, logits)
    ctx.set_materialize_grads(False)  # of the logits: 100 MB of zeros


def token_logprob_backward(ctx: Any, *grads: Tensor | None) -> Gradients:
    if grads[0] is None and grads[1] is None:
        return (None,) * 4
    entropy = ctx.saved_tensors[3]
    grad_logprob, grad_entropy = (torch.zeros_like(entropy) if grad is None else grad for grad in grads[:2])
    return *ops.token_logprob_backward(grad_logprob, grad_entropy, *ctx.saved_tensors), None, None


# --- cross_entropy ----------------------------------------------------------------------------------------------------
def cross_entropy_fake(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=wide(hidden.dtype))
    return loss, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def cross_entropy_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def cross_entropy_backward(ctx: Any, grad: Tensor | None, *_: None) -> Gradients:
    if grad is None:
        return None, None, None
    grad_hidden, grad_weight = ctx.saved_tensors
    return grad_hidden * grad, grad_weight * grad, None


# --- linear -----------------------------------------------------------------------------------------------------------
def linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape, dtype=out_dtype), x.new_empty(shape if gelu else (0,), dtype=dtype)


def linear_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.gelu, ctx.dtype, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def linear_backward(ctx: Any, grad_y: Tensor | None, _: None) -> Gradients:
    if grad_y is None:
        return (None,) * 6
    return *ops.linear_backward(grad_y, *ctx.saved_tensors, ctx.gelu, ctx.dtype), None, None, None


def lowered_linear(x: Tensor, weight: Tensor, bias: Tensor, copies: tuple[Tensor, Tensor], gelu: bool) -> Tensor:
    """gelu(x weight^T + bias) by cuBLAS, computed with copies of weight and bias in autocast's type, which is 16-bit:
    PyTorch would cast weight and bias at each use. The gradients are those of weight and bias."""
    x = x.to(copies[0].dtype)
    if torch.is_grad_enabled():
        return LoweredLinear.apply(x, weight, bias, *copies, gelu)
    # On a GPU cuBLAS adds the bias and applies tanh GELU before it rounds.
    weight, bias = copies
    rows = x.flatten(0, -2)
    y = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True) if gelu else bias.addmm(rows, weight.t())
    return y.view(*x.shape[:-1], len(bias))


class LoweredLinear(torch.autograd.Function):
    """`lowered_linear` with gradients. They need no cast: the GEMM for the weight's writes the float32 sums."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, weight16: Tensor, bias16: Tensor, gelu: bool
    ) -> Tensor:
        rows = x.flatten(0, -2)
        inner = torch.addmm(bias16, rows, weight16.t())
        ctx.save_for_backward(rows, weight16, inner if gelu else None)
        y = F.gelu(inner, approximate="tanh") if gelu else inner
        return y.view(*x.shape[:-1], len(bias))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Gradients:
        rows, weight16, inner = ctx.saved_tensors
        g = grad_y.reshape(len(rows), -1)
        g = g if inner is None else torch.ops.aten.gelu_backward(g, inner, approximate="tanh")
        grad_x = (g @ weight16).view(*grad_y.shape[:-1], -1)
        grad_weight = torch.ops.aten.mm.dtype(g.t(), rows, torch.float32)  # which only CUDA has
        return grad_x, grad_weight, g.sum(0, dtype=torch.float32), None, None, None


# --- add_layer_norm ---------------------------------------------------------------------------------------------------
def add_layer_norm_fake(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, dropout_p: float, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    total = x.new_empty(0 if branch is None else x.shape)
    return total, x.new_empty(x.shape, dtype=dtype), x.new_empty(rows), x.new_empty(rows)


def add_layer_norm_backward_fake(
    grad_sum: Tensor | None, grad_y: Tensor, total: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    branch_dtype: torch.dtype | None = others[-1]
    grad_branch = total.new_empty(0 if branch_dtype is None else total.shape, dtype=branch_dtype)
    return torch.empty_like(total), grad_branch, torch.empty_like(weight), torch.empty_like(weight)


def add_layer_norm_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, branch, weight, _, ctx.dropout_p, ctx.seed, _ = inputs
    total, _, mean, scale = output
    ctx.branch_dtype = None if branch is None else branch.dtype
    ctx.save_for_backward(x if branch is None else total, weight, mean, scale)
    ctx.mark_non_differentiable(mean, scale, *([total] if branch is None else []))
    ctx.set_materialize_grads(False)


def add_layer_norm_backward(ctx: Any, grad_sum: Tensor | None, grad_y: Tensor | None, *_: None) -> Gradients:
    if grad_sum is None and grad_y is None:
        return (None,) * 7
    grad_y = torch.zeros_like(ctx.saved_tensors[0]) if grad_y is None else grad_y
    grad_x, grad_branch, *grads = ops.add_layer_norm_backward(
        grad_sum, grad_y, *ctx.saved_tensors, ctx.dropout_p, ctx.seed, ctx.branch_dtype
    )
    return grad_x, None if ctx.branch_dtype is None else grad_branch, *grads, None, None, None


# --- registration -----------------------------------------------------------------------------------------------------
# Per name: the fake kernel; then, if the operator has a gradient, setup and backward.
OPERATORS: dict[str, tuple[Callable, ...]] = {
    "causal_attention": (attention_fake, attention_setup, attention_backward),
    "causal_attention_backward": (lambda grad_out, qkv, *_: torch.empty_like(qkv),),
    "decode_attention": (lambda qkv, *_: qkv.new_empty(qkv[:, 0].shape),),
    "sample": (lambda logits, *_: per_row(logits, torch.int64, torch.float32, torch.float32),),
    "token_logprob": (token_logprob_fake, token_logprob_setup, token_logprob_backward),
    "token_logprob_backward": (lambda *inputs: tuple(x.new_empty(x.shape) for x in inputs[2:4]),),  # hidden, weight
    "cross_entropy": (cross_entropy_fake, cross_entropy_setup, cross_entropy_backward),
    "linear": (linear_fake, linear_setup, linear_backward),
    "linear_backward": (
        lambda grad_y, x, weight, *_: (torch.empty_like(x), torch.empty_like(weight), weight.new_empty(len(weight))),
    ),
    "add_layer_norm": (add_layer_norm_fake, add_layer_norm_setup, add_layer_norm_backward),
    "add_layer_norm_backward": (add_layer_norm_backward_fake,),
}


def register() -> None:
    """Register all of them with torch. Called once, after the operators were loaded."""
    for name, (fake, *gradient) in OPERATORS.items():
        torch.library.register_fake(f"tinystory::{name}", fake)
        if gradient:
            setup, backward = gradient
            torch.library.register_autograd(f"tinystory::{name}", backward, setup_context=setup)
