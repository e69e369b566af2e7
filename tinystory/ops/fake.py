"""Fake kernels for torch.compile and torch.library.opcheck: they return empty tensors of the right
shape and dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOGIT_GROUP, LOGIT_STRIDE = 256, 272  # columns of kept logits, as in csrc/kernels.h


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def per_row(x: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(len(x), dtype=dtype) for dtype in dtypes)


def causal_attention(qkv: Tensor, dropout_p: float, seed: int) -> tuple[Tensor, Tensor]:
    b, t, _, h, d = qkv.shape
    return qkv.new_empty(b, t, h, d), qkv.new_empty(b, h, t, dtype=wide(qkv.dtype))


def token_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, kept_groups: int
) -> tuple[Tensor, ...]:
    logits = hidden.new_empty(kept_groups, len(hidden), LOGIT_STRIDE, dtype=wide(hidden.dtype))
    return *per_row(hidden, wide(hidden.dtype), wide(hidden.dtype), torch.float64), logits


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=wide(hidden.dtype))
    return loss, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, *dtypes: torch.dtype
) -> tuple[Tensor, Tensor]:
    dtype, out_dtype = dtypes
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape, dtype=out_dtype), x.new_empty(shape if gelu else (0,), dtype=dtype)


def linear_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(len(weight))


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float,
    seed: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    total = x.new_empty(0 if branch is None else x.shape)
    return total, x.new_empty(x.shape, dtype=dtype), x.new_empty(rows), x.new_empty(rows)


def add_layer_norm_backward(
    grad_sum: Tensor | None, grad_y: Tensor, total: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # the branch's dtype
    grad_branch = total.new_empty(0 if others[-1] is None else total.shape, dtype=others[-1])
    return torch.empty_like(total), grad_branch, torch.empty_like(weight), torch.empty_like(weight)


# One for every operator of csrc/ops.cpp.
FAKE_KERNELS: dict[str, Callable] = {
    "causal_attention": causal_attention,
    "causal_attention_backward": lambda grad_out, qkv, *_: torch.empty_like(qkv),
    "decode_attention": lambda qkv, *_: qkv.new_empty(qkv[:, 0].shape),
    "sample": lambda logits, *_: per_row(logits, torch.int64, torch.float32, torch.float32),
    "token_logprob": token_logprob,
    # hidden, weight
    "token_logprob_backward": lambda *inputs: tuple(x.new_empty(x.shape) for x in inputs[2:4]),
    "cross_entropy": cross_entropy,
    "linear": linear,
    "linear_backward": linear_backward,
    "add_layer_norm": add_layer_norm,
    "add_layer_norm_backward": add_layer_norm_backward,
}


def register() -> None:
    """Register them with torch, once, after the operators are loaded."""
    for name, fake in FAKE_KERNELS.items():
        torch.library.register_fake(f"tinystory::{name}", fake)
