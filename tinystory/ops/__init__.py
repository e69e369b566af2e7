"""The operators: plain functions over compiled kernels (csrc/), which are built at first use.
backend.py chooses the implementation of each; reference.py defines each in plain PyTorch."""

import torch
from torch import Tensor

from tinystory.ops import reference
from tinystory.ops.autograd import chunked_token_logprob
from tinystory.ops.backend import implementation
from tinystory.ops.backend import load as load
from tinystory.ops.fake import LOGIT_GROUP, LOGIT_STRIDE

# enough for the logits of a PPO micro-batch of 32 stories of 90 tokens, vocabulary 8 192
KEPT_BYTES = 100 << 20


def causal_attention(qkv: Tensor, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """Causal self-attention, scale 1 / sqrt(D): packed queries, keys and values (B, T, 3, H, D) ->
    (B, T, H, D).

    qkv is contiguous float32, bfloat16, float16 or float64; D is 32, 64 or 128 (on the CPU any
    multiple of 16 up to 256). Dropout on the attention weights depends on (seed, b * H + h, query,
    key). No (T, T) tensor is stored."""
    if implementation("causal_attention", qkv) == "kernel":
        return torch.ops.tinystory.causal_attention(qkv, dropout_p, seed)[0]
    return reference.causal_attention(qkv, dropout_p, seed)


def decode_attention(
    qkv: Tensor, prefix: Tensor, spans: Tensor, cache: Tensor, lengths: Tensor
) -> Tensor:
    """Decode-step attention (B, H, D): one new token per row; its key and value are appended to the
    KV cache.

    qkv (B, 3, H, D): the new tokens' queries, keys and values. prefix (P, 2, H, D): keys and values
    of the prompts, each once; row b's is prefix[spans[b, 0] : spans[b, 1]] and may be empty, spans
    (B, 2) int64. cache (B, T_max, 2, H, D): each row's own keys and values, of which lengths[b] <
    T_max positions are filled, lengths (B,) int64. Row b's query attends to its prefix, the filled
    positions and itself. All are contiguous and of one dtype. No gradient."""
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
    """Draw a token from each row of logits (B, V): tokens (B,) int64, logprobs (B,) and entropy
    (B,) float32.

    The draw is a function of (seed, row id, step, that row's logits), the same on every device and
    for every batch size, order and thread count. rows (B,) int64 are the ids; step is an int or
    (B,) int64. logprobs and entropy, in nats, are those of softmax(logits / temperature) before
    truncation: top_k keeps the k most likely tokens, ties by lowest index; then top_p keeps the
    smallest set of most likely tokens with at least that probability among them. temperature is in
    [1e-6, 1e6]; top_k=1 is greedy. A token whose logit is -inf, or 28 nats * temperature below the
    maximum, is never drawn. NaN, +inf or a row of -inf raises RuntimeError with the row. On a GPU,
    which is not waited for, such a row draws a negative token, and `require_drawn` raises the error
    later."""
    logits = logits.detach()
    steps = step if isinstance(step, Tensor) else rows.new_full(rows.shape, step)
    if implementation("sample", logits) == "kernel":
        return torch.ops.tinystory.sample(logits, seed, rows, steps, temperature, top_k, top_p)
    return reference.sample(logits, seed, rows, steps, temperature, top_k, top_p)


def require_drawn(tokens: Tensor, rows: Tensor) -> None:
    """Raise RuntimeError for the first row that `sample` could not draw from. Waits for the device
    of tokens (B,)."""
    for i, token in enumerate(tokens.tolist()):
        if token < 0:
            problem = "holds NaN or +inf" if token == -1 else "is -inf throughout"
            raise RuntimeError(f"sample: logits row {i} (id {int(rows[i])}) {problem}")


def token_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy, in nats, under softmax(hidden @ weight.T); both
    are differentiable.

    hidden (N, C), weight (V, C), targets (N,) int64 -> logprob (N,), entropy (N,) in float32
    (float64 for float64). The matmul has hidden's type, or autocast's; weight and its gradient keep
    theirs. Up to 100 MB of the (N, V) logits are kept for the backward pass (see kept_groups); the
    others exist one chunk at a time, in either pass."""
    hidden = hidden.to(matmul_dtype(hidden))
    runs_on = implementation("token_logprob", hidden)
    if runs_on == "kernel":
        groups = kept_groups(hidden, weight)
        return torch.ops.tinystory.token_logprob(hidden, weight, targets, groups)[:2]
    if runs_on == "pytorch":
        return chunked_token_logprob(hidden, weight, targets)
    return reference.token_logprob(hidden, weight, targets)


def kept_groups(hidden: Tensor, weight: Tensor) -> int:
    """How many groups of logit columns token_logprob keeps for a backward pass: on a CPU as many as
    KEPT_BYTES hold. 0 in bfloat16, where they would cost as much to read as to compute again."""
    if hidden.is_cuda or hidden.dtype == torch.bfloat16 or not len(hidden):
        return 0
    if not needs_gradient(hidden, weight):
        return 0
    groups = -(-len(weight) // LOGIT_GROUP)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    group_bytes = len(hidden) * LOGIT_STRIDE * wide.itemsize
    return min(groups, KEPT_BYTES // group_bytes)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean of -logprob as in token_logprob, for pretraining. If gradients are required, the kernel
    computes them in the forward pass, so that the logits are computed once."""
    hidden = hidden.to(matmul_dtype(hidden))
    if needs_gradient(hidden, weight) and implementation("cross_entropy", hidden) == "kernel":
        return torch.ops.tinystory.cross_entropy(hidden, weight, targets)[0]
    logprob, _ = token_logprob(hidden, weight, targets)
    return -logprob.mean()


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False, wide: bool = False
) -> Tensor:
    """x weight^T + bias, then tanh GELU if `gelu`: x (..., K), weight (N, K), bias (N,) -> (...,
    N).

    The matmul and the result have x's type, or autocast's; with `wide` the kernel returns its
    float32 sums. weight, bias and their gradients keep their type, without a cast per use. A row's
    result depends on that row alone. The kernel runs on a CPU for a float32 weight whose sizes are
    multiples of 32; otherwise PyTorch's matmul does."""
    if not on_gpu(x) and fits(x, weight) and implementation("linear", x) == "kernel":
        dtype = matmul_dtype(x)
        out_dtype = torch.float32 if wide else dtype
        return torch.ops.tinystory.linear(x.contiguous(), weight, bias, gelu, dtype, out_dtype)[0]
    return reference.linear(x, weight, bias, gelu)


def lowered_linear(
    x: Tensor, weight: Tensor, bias: Tensor, copies: tuple[Tensor, Tensor], gelu: bool
) -> Tensor:
    """`linear` by cuBLAS, with 16-bit copies of weight and bias in autocast's type; PyTorch would
    cast both at each use. The gradients are those of weight and bias. Sizes are multiples of 8."""
    return torch.ops.tinystory.lowered_linear(x, weight, bias, *copies, gelu)


def wide_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, for logits: x (R, K) and weight (N, K) in one dtype -> (R, N). A GPU keeps the
    float32 sums of 16-bit operands, as in `token_logprob`: in bfloat16, the sampler's
    log-probabilities would differ in the second digit."""
    if on_gpu(x) and x.dtype != torch.float32:
        return torch.ops.aten.mm.dtype(x, weight.t(), torch.float32)  # which only CUDA has
    return x @ weight.t()


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """x + dropout(branch), and its layer norm (eps 1e-5) in the type of the matmul that follows,
    autocast's or x's.

    x (..., C) float32: the residual stream. branch (..., C) float32 or 16-bit: a sublayer's output,
    or None. The dropout mask is a function of (seed, row, column), 8 bits per element, drawn again
    in the backward pass. One kernel, if C is a multiple of 32; else PyTorch."""
    dtype = matmul_dtype(x)
    kernel_fits = x.dtype == torch.float32 and fits(x, weight)
    if kernel_fits and implementation("add_layer_norm", x) == "kernel":
        if branch is not None:
            branch = branch.contiguous()
        total, y, _, _ = torch.ops.tinystory.add_layer_norm(
            x.contiguous(), branch, weight, bias, dropout_p, seed, dtype
        )
        if branch is None:
            total = x  # the kernel writes no sum then
        return total, y
    return reference.add_layer_norm(x, branch, weight, bias, dropout_p, seed, dtype)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels of linear layers and layer norms can run for this input and weight."""
    dtypes = [torch.float32, torch.bfloat16]
    if on_gpu(x):
        dtypes.append(torch.float16)
    if weight.dtype != torch.float32 or any(size % 32 for size in weight.shape):
        return False
    return x.dtype in dtypes and matmul_dtype(x) in dtypes


def needs_gradient(hidden: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The type in which x is multiplied: autocast's, or its own (always for float64)."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
