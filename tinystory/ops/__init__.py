"""The project's own operators: compiled kernels (csrc/), compiled at first use, behind plain functions.

TINYSTORY_KERNELS=reference runs the plain-PyTorch definitions of tinystory/ops/reference.py instead.
"""

import functools
import os
import sys

import torch
from torch import Tensor

from tinystory.errors import UserError
from tinystory.ops import autograd, build, cuda, reference

__all__ = [
    "causal_attention",
    "cross_entropy",
    "decode_attention",
    "layer_norm",
    "linear",
    "load",
    "require_drawn",
    "sample",
    "token_logprob",
]


def causal_attention(qkv: Tensor, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """Causal self-attention of packed queries, keys and values: (B, T, 3, H, D) -> (B, T, H, D).

    Scale 1 / sqrt(D). qkv is contiguous float32, bfloat16, float16 or float64; D is 32, 64 or 128 (on the CPU any
    multiple of 16 up to 256). Dropout on the attention weights is a function of (seed, b * H + h, query, key); the
    backward pass draws the same mask again. No (T, T) tensor is stored.
    """
    if compiled("causal_attention", qkv.device.type):
        return torch.ops.tinystory.causal_attention(qkv, dropout_p, seed)[0]
    return reference.causal_attention(qkv, dropout_p, seed)


def decode_attention(qkv: Tensor, prefix: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one new token a row, which it appends to the row's cache: -> (B, H, D).

    qkv (B, 3, H, D): the new tokens' queries, keys and values. prefix (P, 2, H, D): keys and values that all rows begin
    with, stored once; P may be 0. cache (B, T_max, 2, H, D): each row's own, of which lengths[b] < T_max positions are
    in use (lengths (B,) int64); the new key and value are written to the next. Row b's query sees the prefix, those and
    itself. All contiguous, of one dtype as for causal_attention. No gradient.
    """
    run = torch.ops.tinystory if compiled("decode_attention", qkv.device.type) else reference
    return run.decode_attention(qkv.detach(), prefix.detach(), cache, lengths)


def sample(
    logits: Tensor,
    *,
    seed: int,
    rows: Tensor,
    step: int | Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token from each row of logits (B, V): tokens (B,) int64, logprobs (B,) and entropy (B,) float32.

    The draw is a function of (seed, row id, step, that row's logits): rows (B,) int64 are the ids, step is one number
    or (B,) int64. It is the same on every device and at every batch size, order and thread count. top_k keeps the k
    most likely tokens, ties by lowest index; top_p then keeps the fewest most likely ones that hold at least that share
    of the rest. logprobs and entropy are in nats, of softmax(logits / temperature) before top-k and top-p. The
    temperature is in [1e-6, 1e6]; the greedy choice is top_k=1. A logit of -inf, or one 28 nats * temperature below the
    highest, is never drawn; NaN, +inf or a row of -inf is an error that names the row. On a GPU, which this does not
    wait for, such a row draws a negative token, and `require_drawn` raises the error where tokens are read.
    """
    logits = logits.detach()
    steps = step if isinstance(step, Tensor) else rows.new_full(rows.shape, step)
    run = torch.ops.tinystory.sample if compiled("sample", logits.device.type) else reference.sample
    return run(logits, seed, rows, steps, temperature, top_k, top_p)


def require_drawn(tokens: Tensor, rows: Tensor) -> None:
    """Raise RuntimeError for the first row that `sample` could not draw from. Waits for the device of tokens (B,)."""
    for i, token in enumerate(tokens.tolist()):
        if token < 0:
            what = "holds NaN or +inf" if token == -1 else "is -inf throughout"
            raise RuntimeError(f"sample: logits row {i} (id {int(rows[i])}) {what}")


def token_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy, in nats, under softmax(hidden @ weight.T).

    hidden (N, C), weight (V, C), targets (N,) int64 -> logprob (N,), entropy (N,) in float32 (float64 for float64).
    Products are computed in hidden's type, or in autocast's; the (N, V) logits exist one chunk of rows at a time, and
    once more in the backward pass. Gradients go to hidden and weight from both outputs.
    """
    hidden, weight = autocast(hidden, weight)
    if compiled("token_logprob", hidden.device.type):
        return torch.ops.tinystory.token_logprob(hidden, weight, targets)[:2]
    return reference.token_logprob(hidden, weight, targets)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean of -logprob as token_logprob gives it, for pretraining.

    Where gradients are wanted the forward pass computes them too, so the logits are computed once, not twice."""
    hidden, weight = autocast(hidden, weight)
    if not compiled("cross_entropy", hidden.device.type):
        return reference.cross_entropy(hidden, weight, targets)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return torch.ops.tinystory.cross_entropy(hidden, weight, targets)[0]
    return -torch.ops.tinystory.token_logprob(hidden, weight, targets)[0].mean()


def autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Under torch.autocast the products are computed in its type; weight keeps its own, and so does its gradient."""
    return hidden if hidden.dtype == torch.float64 else hidden.to(product_dtype(hidden)), weight


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
    """A linear layer and what follows it: x (..., K), weight (N, K), bias (N,) -> (..., N).

    gelu: tanh GELU of the sum. residual (..., N): added last. Products are computed in x's type, or in autocast's,
    which is also the result's unless a residual gives it its own. weight and bias keep their type, and so do their
    gradients: nothing is cast a use. A row's result depends on that row alone. The kernel runs on a CPU for a float32
    weight with sizes that are multiples of 32; for all else PyTorch's own product does (on a GPU cuBLAS).
    """
    dtype = product_dtype(x)
    if fused("linear", x, weight) and (residual is None or residual.dtype == torch.float32):
        residual = residual if residual is None else residual.contiguous()
        return torch.ops.tinystory.linear(x.contiguous(), weight, bias, residual, gelu, dtype == torch.bfloat16)[0]
    return reference.linear(x, weight, bias, residual, gelu)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm of the last dimension, eps 1e-5, for a product to read: x (..., C) float32 -> (..., C) in autocast's
    type (without autocast float32). Where the kernel does not run, as for linear, PyTorch's does, in float32."""
    if fused("layer_norm", x, weight) and x.dtype == torch.float32:
        return torch.ops.tinystory.layer_norm(x.contiguous(), weight, bias, product_dtype(x) == torch.bfloat16)[0]
    return reference.layer_norm(x, weight, bias)


def fused(name: str, x: Tensor, weight: Tensor) -> bool:
    """Whether the CPU's kernel computes a layer with this weight."""
    fits = x.device.type == "cpu" and weight.dtype == torch.float32 and x.dtype in (torch.float32, torch.bfloat16)
    fits = fits and all(size % 32 == 0 for size in weight.shape)
    return fits and product_dtype(x) in (torch.float32, torch.bfloat16) and compiled(name, "cpu")


def product_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@torch.compiler.assume_constant_result
def compiled(name: str, device: str) -> bool:
    """Whether the compiled kernel runs this; else plain PyTorch does, said once on stderr."""
    return choose(name, device)


@functools.cache
def choose(name: str, device: str) -> bool:
    if not load():
        return False
    if device == "cuda":
        cuda.load()
    key = torch._C._dispatch_key_for_device(device)
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"tinystory::{name}", key):
        return True
    print(f"tinystory: no {device} kernel of {name} here, so plain PyTorch runs it", file=sys.stderr)
    return False


@functools.cache
def load() -> bool:
    """Build and load the kernels (once a process). False if TINYSTORY_KERNELS=reference asks for plain PyTorch."""
    wanted = os.environ.get("TINYSTORY_KERNELS", "")
    if wanted == "reference":
        print("tinystory: TINYSTORY_KERNELS=reference, so plain PyTorch runs in place of the kernels", file=sys.stderr)
        return False
    if wanted:
        raise UserError(f"TINYSTORY_KERNELS={wanted!r} is not known; unset it, or set it to 'reference'")
    build.load()
    autograd.register()
    return True
