"""Gradients implemented in Python: token_logprob on a Mac, linear layers on a GPU.
csrc/autograd.cpp has the others."""

from typing import Any  # torch's ctx takes any attribute

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinystory.ops import reference

CHUNK = 1 << 24  # logits that exist at a time in `chunked_token_logprob`


def chunked_token_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.token_logprob` with PyTorch's matmul, on a Mac Accelerate, which is faster than our
    kernel. Rows are computed in chunks, and again in the backward pass, so that the (N, V) logits
    never exist at once."""
    rows = max(1, CHUNK // len(weight))
    parts = []
    for part, ids in zip(hidden.split(rows), targets.split(rows), strict=True):
        parts.append(checkpoint(reference.token_logprob, part, weight, ids, use_reentrant=False))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def lowered_linear(
    x: Tensor, weight: Tensor, bias: Tensor, copies: tuple[Tensor, Tensor], gelu: bool
) -> Tensor:
    """gelu(x weight^T + bias) by cuBLAS, with 16-bit copies of weight and bias in autocast's type;
    PyTorch would cast both at each use. The gradients are those of weight and bias."""
    weight16, bias16 = copies
    rows = x.to(weight16.dtype).flatten(0, -2)
    if torch.is_grad_enabled():
        y = LoweredLinear.apply(rows, weight, bias, weight16, bias16, gelu)
    elif gelu:
        # On a GPU cuBLAS adds the bias and applies tanh GELU before it rounds.
        y = torch._addmm_activation(bias16, rows, weight16.t(), use_gelu=True)
    else:
        y = bias16.addmm(rows, weight16.t())
    return y.view(*x.shape[:-1], len(bias))


class LoweredLinear(torch.autograd.Function):
    """`lowered_linear` with gradients, on rows (R, K). The weight's needs no cast, since its GEMM
    writes the float32 sums."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        weight16: Tensor,
        bias16: Tensor,
        gelu: bool,
    ) -> Tensor:
        y = torch.addmm(bias16, rows, weight16.t())
        ctx.save_for_backward(rows, weight16, y if gelu else None)
        return F.gelu(y, approximate="tanh") if gelu else y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight16, before_gelu = ctx.saved_tensors
        grad = grad_y
        if before_gelu is not None:
            grad = torch.ops.aten.gelu_backward(grad, before_gelu, approximate="tanh")
        grad_rows = grad @ weight16
        grad_weight = torch.ops.aten.mm.dtype(grad.t(), rows, torch.float32)  # which only CUDA has
        return grad_rows, grad_weight, grad.sum(0, dtype=torch.float32), None, None, None
