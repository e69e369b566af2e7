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
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    results = [
        checkpoint(reference.token_logprob, part, weight, ids, use_reentrant=False)
        for part, ids in parts
    ]
    return torch.cat([logprob for logprob, _ in results]), torch.cat(
        [entropy for _, entropy in results]
    )


def lowered_linear(
    x: Tensor, weight: Tensor, bias: Tensor, copies: tuple[Tensor, Tensor], gelu: bool
) -> Tensor:
    """gelu(x weight^T + bias) by cuBLAS, with 16-bit copies of weight and bias in autocast's type;
    PyTorch would cast both at each use. The gradients are those of weight and bias."""
    x = x.to(copies[0].dtype)
    if torch.is_grad_enabled():
        return LoweredLinear.apply(x, weight, bias, *copies, gelu)
    # On a GPU cuBLAS adds the bias and applies tanh GELU before it rounds.
    weight, bias = copies
    rows = x.flatten(0, -2)
    y = (
        torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
        if gelu
        else bias.addmm(rows, weight.t())
    )
    return y.view(*x.shape[:-1], len(bias))


class LoweredLinear(torch.autograd.Function):
    """`lowered_linear` with gradients. The weight's needs no cast, since its GEMM writes the
    float32 sums."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        weight16: Tensor,
        bias16: Tensor,
        gelu: bool,
    ) -> Tensor:
        rows = x.flatten(0, -2)
        inner = torch.addmm(bias16, rows, weight16.t())
        ctx.save_for_backward(rows, weight16, inner if gelu else None)
        y = F.gelu(inner, approximate="tanh") if gelu else inner
        return y.view(*x.shape[:-1], len(bias))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight16, inner = ctx.saved_tensors
        g = grad_y.reshape(len(rows), -1)
        g = g if inner is None else torch.ops.aten.gelu_backward(g, inner, approximate="tanh")
        grad_x = (g @ weight16).view(*grad_y.shape[:-1], -1)
        grad_weight = torch.ops.aten.mm.dtype(g.t(), rows, torch.float32)  # which only CUDA has
        return grad_x, grad_weight, g.sum(0, dtype=torch.float32), None, None, None
