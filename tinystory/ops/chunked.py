"""ops.token_logprob and ops.cross_entropy by PyTorch's matmul, which on a Mac is Accelerate, faster than our kernels:
in chunks of rows, so that the (N, V) logits never exist at once.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 24  # logits that exist at a time


def chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their log-probabilities (rows, V), float32."""
    size = max(1, CHUNK // len(weight))
    for i in range(0, len(hidden), size):
        rows = slice(i, i + size)
        yield rows, (hidden[rows] @ weight.T).float().log_softmax(-1)


class TokenLogprob(torch.autograd.Function):
    """Logprob and entropy, both (N,) float32: hidden (N, C) float32 or bfloat16, weight (V, C), targets (N,) int64."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        cast = weight.to(hidden.dtype)
        logprob, entropy = hidden.new_empty((2, len(hidden)), dtype=torch.float32)
        for rows, log_p in chunks(hidden, cast):
            logprob[rows] = log_p.gather(1, targets[rows, None])[:, 0]
            entropy[rows] = -(log_p.exp() * log_p.clamp_min(-1000)).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets, entropy = ctx.saved_tensors
        cast, (grad, grad_entropy) = weight.to(hidden.dtype), grads
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows, log_p in chunks(hidden, cast):
            p = log_p.exp()
            # d logprob / d logit = [target] - p;  d entropy / d logit = -p (log p + entropy).
            d = -p * (grad[rows, None] + grad_entropy[rows, None] * (log_p.clamp_min(-1000) + entropy[rows, None]))
            d.scatter_add_(1, targets[rows, None], grad[rows, None])
            d = d.to(hidden.dtype)
            grad_hidden[rows] = d @ cast
            grad_weight += d.T @ hidden[rows]
        return grad_hidden, grad_weight, None


class CrossEntropy(torch.autograd.Function):
    """Mean of -logprob, whose gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        cast, loss = weight.to(hidden.dtype), hidden.new_zeros((), dtype=torch.float32)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows, log_p in chunks(hidden, cast):
            loss -= log_p.gather(1, targets[rows, None]).sum()
            d = log_p.exp_()
            d.scatter_add_(1, targets[rows, None], d.new_full((len(d), 1), -1.0))
            d = d.div_(len(hidden)).to(hidden.dtype)
            grad_hidden[rows] = d @ cast
            grad_weight += d.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None


token_logprob, cross_entropy = TokenLogprob.apply, CrossEntropy.apply
