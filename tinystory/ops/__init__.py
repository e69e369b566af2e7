"""The operators: plain functions that call compiled kernels (csrc/). The kernels are built at first
use. backend.py chooses the implementation of each operator; reference.py defines each operator in
plain PyTorch."""

import torch
from torch import Tensor

from tinystory.ops import reference
from tinystory.ops.autograd import chunked_token_logprob
from tinystory.ops.backend import implementation
from tinystory.ops.backend import load as load
from tinystory.ops.fake import LOGIT_GROUP, LOGIT_STRIDE

# Maximum bytes of kept logits: enough for a PPO micro-batch of 32 stories of 90 tokens with a
# vocabulary of 8 192.
KEPT_BYTES = 100 << 20


def causal_attention(qkv: Tensor, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """Causal self-attention, (B, T, H, D), of packed queries, keys and values, (B, T, 3, H, D),
    with scale 1 / sqrt(D).

    qkv is contiguous float32, bfloat16, float16 or float64; D is 32, 64 or 128 (on the CPU any
    multiple of 16 up to 256). Dropout on the attention weights depends on (seed, b * H + h, query,
    key). No (T, T) tensor is stored."""
    if implementation("causal_attention", qkv) == "kernel":
        return torch.ops.tinystory.causal_attention(qkv, dropout_p, seed)[0]
    return reference.causal_attention(qkv, dropout_p, seed)


def decode_attention(
    qkv: Tensor, prefix: Tensor, spans: Tensor, cache: Tensor, lengths: Tensor
) -> Tensor:
    """Decode-step attention, (B, H, D): one new token per row. The key and value of the new token
    are appended to the KV cache.

    qkv: (B, 3, H, D), queries, keys and values of the new tokens. prefix: (P, 2, H, D), keys and
    values of the prompts, each prompt once. spans: (B, 2) int64; the prefix of row b is
    prefix[spans[b, 0] : spans[b, 1]] and may be empty. cache: (B, T_max, 2, H, D), keys and values
    of each row. lengths: (B,) int64, number of filled positions of each row, less than T_max. The
    query of row b attends to the prefix of the row, the filled positions and the new token. All
    tensors are contiguous; qkv, prefix and cache have one dtype. There is no gradient."""
    qkv = qkv.detach()
    prefix = prefix.detach()
    if implementation("decode_attention", qkv) == "kernel":
        return torch.ops.tinystory.decode_attention(qkv, prefix, spans, cache, lengths)
    return reference.decode_attention(qkv, prefix, spans, cache, lengths)


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
    """Tokens, (B,) int64, drawn from the rows of logits, (B, V), and their log-probabilities and
    the entropies, (B,) float32, in nats.

    The draw depends only on (seed, row id, step, logits of the row). It is the same on every device
    and for every batch size, order and number of threads. rows: (B,) int64, the ids. step: an int
    or (B,) int64. logprobs and entropy are those of softmax(logits / temperature) before
    truncation. top_k keeps the k most likely tokens; ties go to the lowest index. Then top_p keeps
    the smallest set of most likely tokens with at least this probability. temperature is in [1e-6,
    1e6]; top_k=1 is greedy. A token with logit -inf, or with a logit 28 nats * temperature below
    the maximum, is never drawn.

    NaN, +inf or a row of -inf raises RuntimeError with the number of the row. On a GPU, such a row
    draws a negative token, because the host does not wait, and `require_drawn` raises the error
    later."""
    logits = logits.detach()
    steps = step if isinstance(step, Tensor) else rows.new_full(rows.shape, step)
    if implementation("sample", logits) == "kernel":
        return torch.ops.tinystory.sample(logits, seed, rows, steps, temperature, top_k, top_p)
    return reference.sample(logits, seed, rows, steps, temperature, top_k, top_p)


def require_drawn(tokens: Tensor, rows: Tensor) -> None:
    """Raises RuntimeError for the first row from which `sample` could not draw. Waits for the
    device of tokens, (B,)."""
    for i, token in enumerate(tokens.tolist()):
        if token < 0:
            problem = "holds NaN or +inf" if token == -1 else "is -inf throughout"
            raise RuntimeError(f"sample: logits row {i} (id {int(rows[i])}) {problem}")


def token_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, (N,), and entropy of each row, (N,), in nats, under
    softmax(hidden @ weight.T), in float32 (float64 for float64). Both are differentiable.

    hidden: (N, C). weight: (V, C). targets: (N,) int64. The matmul has the type of hidden, or of
    autocast; weight and the gradient of weight keep the type of weight. At most 100 MB of the (N,
    V) logits are kept for the backward pass (see kept_groups); the other logits are in memory one
    chunk at a time, in both passes."""
    hidden = hidden.to(matmul_dtype(hidden))
    runs_on = implementation("token_logprob", hidden)
    if runs_on == "kernel":
        groups = kept_groups(hidden, weight)
        return torch.ops.tinystory.token_logprob(hidden, weight, targets, groups)[:2]
    if runs_on == "pytorch":
        return chunked_token_logprob(hidden, weight, targets)
    return reference.token_logprob(hidden, weight, targets)


def kept_groups(hidden: Tensor, weight: Tensor) -> int:
    """Number of groups of logit columns that token_logprob keeps for a backward pass: on a CPU, as
    many as fit in KEPT_BYTES; 0 in bfloat16, because reading logits would take as much time as
    recomputing them; 0 on a GPU."""
    if hidden.is_cuda or hidden.dtype == torch.bfloat16 or not len(hidden):
        return 0
    if not needs_gradient(hidden, weight):
        return 0
    groups = -(-len(weight) // LOGIT_GROUP)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    group_bytes = len(hidden) * LOGIT_STRIDE * wide.itemsize
    return min(groups, KEPT_BYTES // group_bytes)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean of -logprob, with logprob as in token_logprob, for pretraining. If gradients are
    required, the kernel computes them in the forward pass, so that the logits are computed once. Not
    in float16, because gradients of 1 / N and less would underflow before a loss is scaled."""
    hidden = hidden.to(matmul_dtype(hidden))
    kernel_fits = hidden.dtype != torch.float16 and needs_gradient(hidden, weight)
    if kernel_fits and implementation("cross_entropy", hidden) == "kernel":
        return torch.ops.tinystory.cross_entropy(hidden, weight, targets)[0]
    logprob, _ = token_logprob(hidden, weight, targets)
    return -logprob.mean()


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False, wide: bool = False
) -> Tensor:
    """x weight^T + bias, (..., N), then tanh GELU if `gelu`. x: (..., K). weight: (N, K). bias:
    (N,).

    The matmul and the result have the type of x, or of autocast; with `wide`, the kernel returns
    the float32 sums. weight, bias and their gradients keep their type, without a cast per use. The
    result of a row depends only on this row. The kernel runs on a CPU, for a float32 weight with
    sizes that are multiples of 32; otherwise PyTorch's matmul runs."""
    if not on_gpu(x) and fits(x, weight) and implementation("linear", x) == "kernel":
        dtype = matmul_dtype(x)
        out_dtype = torch.float32 if wide else dtype
        return torch.ops.tinystory.linear(x.contiguous(), weight, bias, gelu, dtype, out_dtype)[0]
    return reference.linear(x, weight, bias, gelu)


def lowered_linear(
    x: Tensor, weight: Tensor, bias: Tensor, copies: tuple[Tensor, Tensor], gelu: bool
) -> Tensor:
    """`linear` by cuBLAS. copies: 16-bit copies of weight and bias in the type of autocast, because
    PyTorch would cast weight and bias at each use. The gradients go to weight and bias. Sizes are
    multiples of 8."""
    return torch.ops.tinystory.lowered_linear(x, weight, bias, *copies, gelu)


def wide_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, (R, N), for logits. x: (R, K) and weight: (N, K), in one dtype. On a GPU, the
    result of 16-bit operands is float32, as in `token_logprob`. With a bfloat16 result, the
    sampler's log-probabilities would differ in the second digit."""
    if on_gpu(x) and x.dtype != torch.float32:
        return torch.ops.aten.mm.dtype(x, weight.t(), torch.float32)  # exists only for CUDA
    return x @ weight.t()


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The sum x + dropout(branch), and the layer norm of the sum (eps 1e-5) in the type of the next
    matmul, which is that of autocast or of x.

    x: (..., C) float32, the residual stream. branch: (..., C) float32 or 16-bit, the output of a
    sublayer, or None. The dropout mask depends on (seed, row, column), has 8 random bits per
    element, and is drawn again in the backward pass. If C is a multiple of 32, the operator is one
    kernel; otherwise PyTorch runs."""
    dtype = matmul_dtype(x)
    kernel_fits = x.dtype == torch.float32 and fits(x, weight)
    if kernel_fits and implementation("add_layer_norm", x) == "kernel":
        if branch is not None:
            if on_gpu(x) and dtype != torch.float32:  # a 16-bit result needs a branch of its type
                branch = branch.to(dtype)
            branch = branch.contiguous()
        total, y, _, _ = torch.ops.tinystory.add_layer_norm(
            x.contiguous(), branch, weight, bias, dropout_p, seed, dtype
        )
        if branch is None:
            total = x  # without a branch, the kernel writes no sum
        return total, y
    return reference.add_layer_norm(x, branch, weight, bias, dropout_p, seed, dtype)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels of linear layers and layer norms can run for this input and weight."""
    dtypes = [torch.float32, torch.bfloat16]
    if on_gpu(x):
        dtypes.append(torch.float16)
    if weight.dtype != torch.float32 or any(size % 32 or size == 0 for size in weight.shape):
        return False
    return x.dtype in dtypes and matmul_dtype(x) in dtypes


def needs_gradient(hidden: Tensor, weight: Tensor) -> bool:
    """Whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)


def on_gpu(x: Tensor) -> bool:
    """Whether x is on a CUDA device."""
    return x.is_cuda


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The type of matmuls with x: that of autocast, if enabled, else that of x; always float64 for
    float64."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
