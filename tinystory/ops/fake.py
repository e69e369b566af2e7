"""Fake kernels for torch.compile and torch.library.opcheck. They return empty tensors of the right
shape and dtype. Arguments and results are those of the schemas in csrc/ops.cpp."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]

# columns per group of kept logits, and the padded row length, as in csrc/kernels.h
LOGIT_GROUP = 256
LOGIT_STRIDE = 272


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def causal_attention(qkv: Tensor, *others: Any) -> Tensors:
    B, T, _, H, D = qkv.shape
    out = qkv.new_empty(B, T, H, D)
    lse = qkv.new_empty(B, H, T, dtype=wide(qkv.dtype))
    return out, lse


def sample(logits: Tensor, *_: Any) -> Tensors:
    B = len(logits)
    tokens = logits.new_empty(B, dtype=torch.int64)
    logprobs = logits.new_empty(B, dtype=torch.float32)
    return tokens, logprobs, torch.empty_like(logprobs)


def token_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, kept_groups: int) -> Tensors:
    N = len(hidden)
    dtype = wide(hidden.dtype)
    logprob = hidden.new_empty(N, dtype=dtype)
    lse = hidden.new_empty(N, dtype=torch.float64)
    logits = hidden.new_empty(kept_groups, N, LOGIT_STRIDE, dtype=dtype)
    return logprob, torch.empty_like(logprob), lse, logits


def cross_entropy(hidden: Tensor, weight: Tensor, *_: Any) -> Tensors:
    loss = hidden.new_empty((), dtype=wide(hidden.dtype))
    return loss, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gelu: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensors:
    y = x.new_empty(*x.shape[:-1], len(weight), dtype=out_dtype)
    slope = x.new_empty(y.shape if gelu else 0, dtype=dtype)
    return y, slope


def add_layer_norm(x: Tensor, branch: Tensor | None, *others: Any) -> Tensors:
    dtype = others[-1]
    total = x.new_empty(0 if branch is None else x.shape)
    y = x.new_empty(x.shape, dtype=dtype)
    mean = x.new_empty(x.shape[:-1].numel())
    return total, y, mean, torch.empty_like(mean)


def add_layer_norm_backward(
    grad_total: Tensor | None, grad_y: Tensor, total: Tensor, weight: Tensor, *others: Any
) -> Tensors:
    branch_dtype = others[-1]
    branch_shape = 0 if branch_dtype is None else total.shape
    grad_branch = total.new_empty(branch_shape, dtype=branch_dtype)
    return torch.empty_like(total), grad_branch, torch.empty_like(weight), torch.empty_like(weight)


FAKE_KERNELS: dict[str, Callable] = {
    "causal_attention": causal_attention,
    "causal_attention_backward": lambda grad_out, qkv, *_: torch.empty_like(qkv),
    "decode_attention": lambda qkv, *_: qkv.new_empty(qkv[:, 0].shape),
    "sample": sample,
    "token_logprob": token_logprob,
    "token_logprob_backward": lambda grad_logprob, grad_entropy, hidden, weight, *_: (
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape),
    ),
    "cross_entropy": cross_entropy,
    "linear": linear,
    "linear_backward": lambda grad_y, x, weight, *_: (
        torch.empty_like(x),
        torch.empty_like(weight),
        weight.new_empty(len(weight)),
    ),
    "gelu_backward": lambda grad_y, x: (
        torch.empty_like(x),
        x.new_empty(x.shape[1], dtype=torch.float32),
    ),
    "add_layer_norm": add_layer_norm,
    "add_layer_norm_backward": add_layer_norm_backward,
}


def register() -> None:
    """Register the fake kernels with PyTorch. Call it once, after the operators are loaded."""
    for name, fake in FAKE_KERNELS.items():
        torch.library.register_fake(f"tinystory::{name}", fake)
