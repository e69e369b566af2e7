"""The project's own operators: compiled kernels (csrc/), compiled at first use, behind plain functions.

TINYSTORY_KERNELS=reference runs the plain-PyTorch definitions of tinystory/ops/reference.py instead. On the CPU some
operators may be PyTorch's where it is faster: see tinystory/ops/fastest.py.
"""

import functools
import os
import sys
from types import ModuleType

import torch
from torch import Tensor

from tinystory.ops import autograd, build, cuda, reference, vendor
from tinystory.ops.autograd import LoweredLinear
from tinystory.run.errors import UserError

__all__ = [
    "add_layer_norm",
    "causal_attention",
    "cross_entropy",
    "decode_attention",
    "layer_norm",
    "linear",
    "load",
    "load_cuda",
    "require_drawn",
    "run_by_pytorch",
    "sample",
    "token_logprob",
]

by_pytorch: frozenset[str] = frozenset()  # the operators that PyTorch runs on the CPU although there is a kernel


def run_by_pytorch(names: str) -> None:
    """Let PyTorch run these operators on the CPU from now on; names as fastest.pick returns them."""
    global by_pytorch
    by_pytorch = frozenset(names.split(",")) - {"none"}


def causal_attention(qkv: Tensor, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """Causal self-attention of packed queries, keys and values: (B, T, 3, H, D) -> (B, T, H, D).

    Scale 1 / sqrt(D). qkv is contiguous float32, bfloat16, float16 or float64; D is 32, 64 or 128 (on the CPU any
    multiple of 16 up to 256). Dropout on the attention weights is a function of (seed, b * H + h, query, key); the
    backward pass draws the same mask again. No (T, T) tensor is stored.
    """
    if compiled("causal_attention", qkv.device.type):
        return torch.ops.tinystory.causal_attention(qkv, dropout_p, seed)[0]
    return reference.causal_attention(qkv, dropout_p, seed)


def decode_attention(qkv: Tensor, prefix: Tensor, spans: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """Decode-step attention: one new token per row; its key and value are appended to the KV cache. -> (B, H, D)

    qkv (B, 3, H, D): the new tokens' queries, keys and values. prefix (P, 2, H, D): keys and values of what the rows
    begin with, each prefix once; row b's is prefix[spans[b, 0] : spans[b, 1]], spans (B, 2) int64, and may be empty.
    cache (B, T_max, 2, H, D): each row's own keys and values, of which lengths[b] < T_max positions are filled, lengths
    (B,) int64; the new ones are written to the next. Row b's query attends to its prefix, the filled positions and
    itself. All tensors are contiguous and have one dtype, as for causal_attention. No gradient.
    """
    run = torch.ops.tinystory if compiled("decode_attention", qkv.device.type) else reference
    return run.decode_attention(qkv.detach(), prefix.detach(), spans, cache, lengths)


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

    The draw is a function of (seed, row id, step, that row's logits): rows (B,) int64 are the ids; step is an int or
    (B,) int64. It is the same on every device and for every batch size, order and thread count. logprobs and entropy
    are in nats, of softmax(logits / temperature), before truncation: top_k keeps the k most likely tokens, ties by
    lowest index; then top_p keeps the smallest set of most likely tokens with at least that probability among them.
    temperature is in [1e-6, 1e6]; top_k=1 is greedy. A token whose logit is -inf, or 28 nats * temperature below the
    maximum, is never drawn. NaN, +inf or a row of -inf raises RuntimeError, which names the row. On a GPU, which this
    function does not wait for, such a row draws a negative token, and `require_drawn` raises the error later.
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
    The matmul is computed in hidden's type, or in autocast's. The (N, V) logits exist one chunk at a time, and again in
    the backward pass. Both outputs have gradients by hidden and weight.
    """
    hidden, weight = autocast(hidden, weight)
    if pytorch_runs("token_logprob", hidden):
        return vendor.TokenLogprob.apply(hidden, weight, targets)
    if compiled("token_logprob", hidden.device.type):
        return torch.ops.tinystory.token_logprob(hidden, weight, targets)[:2]
    return reference.token_logprob(hidden, weight, targets)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean of -logprob as in token_logprob, for pretraining.

    If gradients are required the forward pass computes them too, so that the logits are computed once, not twice."""
    hidden, weight = autocast(hidden, weight)
    if not compiled("cross_entropy", hidden.device.type):
        return reference.cross_entropy(hidden, weight, targets)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        if pytorch_runs("cross_entropy", hidden):
            return vendor.CrossEntropy.apply(hidden, weight, targets)
        return torch.ops.tinystory.cross_entropy(hidden, weight, targets)[0]
    return -torch.ops.tinystory.token_logprob(hidden, weight, targets)[0].mean()


def autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Under torch.autocast the matmul is computed in its type; weight and its gradient keep theirs."""
    return hidden if hidden.dtype == torch.float64 else hidden.to(matmul_dtype(hidden)), weight


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor | None = None, gelu: bool = False,
    copies: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """residual + gelu(x weight^T + bias): x (..., K), weight (N, K), bias (N,), residual (..., N) -> (..., N).

    gelu (tanh GELU) and residual are optional. The matmul is computed in x's type, or in autocast's, which is also the
    result's type unless there is a residual, whose type it then has. weight, bias and their gradients keep their type:
    there is no cast per use. A row's result depends on that row alone. The kernel runs on a CPU for a float32 weight
    whose sizes are multiples of 32; otherwise PyTorch's matmul runs (on a GPU cuBLAS). copies: weight and bias in the
    type of the matmul, which is then 16-bit, and no residual: without them it casts weight and bias.
    """
    dtype = matmul_dtype(x)
    if copies is not None:
        x, (weight16, bias16) = x.to(dtype), copies
        if torch.is_grad_enabled():
            return LoweredLinear.apply(x, weight, bias, copies, gelu)
        # On a GPU cuBLAS adds the bias and applies tanh GELU before it rounds.
        rows, columns = x.flatten(0, -2), weight16.t()
        y = torch._addmm_activation(bias16, rows, columns, use_gelu=True) if gelu else bias16.addmm(rows, columns)
        return y.view(*x.shape[:-1], len(bias))
    if pytorch_runs("linear", x):
        return reference.linear(x, weight, bias, residual, gelu)
    if not on_gpu(x) and fused("linear", x, weight) and (residual is None or residual.dtype == torch.float32):
        residual = residual if residual is None else residual.contiguous()
        return torch.ops.tinystory.linear(x.contiguous(), weight, bias, residual, gelu, dtype)[0]
    return reference.linear(x, weight, bias, residual, gelu)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm over the last dimension, eps 1e-5, as the input of a matmul: x (..., C) float32 -> (..., C) in
    autocast's type (float32 without autocast). Where the kernel does not run, as for `linear`, PyTorch's does, in
    float32."""
    if fused("layer_norm", x, weight) and x.dtype == torch.float32:
        return torch.ops.tinystory.layer_norm(x.contiguous(), weight, bias, matmul_dtype(x))[0]
    return reference.layer_norm(x, weight, bias)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The residual stream after a branch, x + dropout(branch), and its layer norm in dtype: one kernel on a GPU.

    x (..., C) float32, branch (..., C) float32 or 16-bit, dtype the branch's or float32, C a multiple of 32. The mask
    of dropout is a function of (seed, row, column), 8 bits per element, and drawn again in the backward pass.
    """
    if fused("add_layer_norm", x, weight):
        x, branch = x.contiguous(), branch.contiguous()
        return torch.ops.tinystory.add_layer_norm(x, branch, weight, bias, dropout_p, seed, dtype)[:2]
    return reference.add_layer_norm(x, branch, weight, bias, dropout_p, seed, dtype)


def norm_adds(x: Tensor, weight: Tensor) -> bool:
    """Whether the residual is added by the kernel of the layer norm after it, as on a GPU, rather than by that of the
    linear layer before it."""
    return on_gpu(x) and x.dtype == torch.float32 and fused("add_layer_norm", x, weight)


def fused(name: str, x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel `name` runs for this input and weight."""
    types = (torch.float32, torch.bfloat16, *((torch.float16,) if on_gpu(x) else ()))
    fits = x.device.type in ("cpu", "cuda") and weight.dtype == torch.float32 and x.dtype in types
    fits = fits and all(size % 32 == 0 for size in weight.shape)
    return fits and matmul_dtype(x) in types and compiled(name, x.device.type)


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def pytorch_runs(name: str, x: Tensor) -> bool:
    """Whether PyTorch runs this operator although there is a kernel."""
    return name in by_pytorch and x.device.type == "cpu" and x.dtype != torch.float64


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The type in which x is multiplied: autocast's, or its own."""
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
def load() -> ModuleType | None:
    """Build and load the kernels, once per process: their Python module (csrc/module.cpp). None if
    TINYSTORY_KERNELS=reference asks for plain PyTorch."""
    wanted = os.environ.get("TINYSTORY_KERNELS", "")
    if wanted == "reference":
        print("tinystory: TINYSTORY_KERNELS=reference, so plain PyTorch runs in place of the kernels", file=sys.stderr)
        return None
    if wanted not in ("", "ours"):
        raise UserError(f"TINYSTORY_KERNELS={wanted!r} is not known; unset it, or set it to 'reference' or 'ours'")
    module = build.load()
    autograd.register()
    return module


def load_cuda(device: torch.device) -> None:
    """Build and load the CUDA kernels for this GPU, unless TINYSTORY_KERNELS=reference. UserError if it cannot be."""
    if load():
        cuda.check(torch.cuda.get_device_capability(device))
        cuda.load()
