"""The definition of each operator in plain PyTorch: any device, any float type, differentiable,
slow, memory-hungry.

`ops` documents arguments and results. The kernels are tested against these definitions. Random bits
come from the same Philox counters as in csrc/philox.h, so that dropout masks and sampled tokens are
the same bit for bit."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOW32 = 0xFFFFFFFF


def causal_attention(qkv: Tensor, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """softmax(Q K^T / sqrt(D), over keys up to the query) V: packed (B, T, 3, H, D) -> (B, T, H,
    D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    S = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    causal = torch.ones(S.shape[-2:], dtype=torch.bool, device=qkv.device).tril()
    P = S.masked_fill(~causal, -math.inf).softmax(-1)
    if dropout_p > 0:
        batch, heads, length, _ = S.shape
        P = P * dropout_mask(batch, heads, length, dropout_p, seed, qkv.device).to(P.dtype)
    return (P @ v).transpose(1, 2).contiguous()


def decode_attention(
    qkv: Tensor,
    prefix: Tensor,
    spans: Tensor,
    cache: Tensor,
    lengths: Tensor,
    dropout_p: float = 0.0,
) -> Tensor:
    """`ops.decode_attention`. dropout_p: on the attention weights, from torch's generator; no
    kernel has it."""
    cache[torch.arange(len(cache), device=cache.device), lengths] = qkv[:, 1:]
    q, kv = qkv[:, 0], torch.cat([prefix.expand(len(cache), *prefix.shape), cache], 1)
    position = torch.arange(kv.size(1), device=q.device)
    outside = (position < spans[:, :1]) | (position >= spans[:, 1:])
    masked = torch.where(position < len(prefix), outside, position > len(prefix) + lengths[:, None])
    k, v = kv.masked_fill(masked[:, :, None, None, None], 0).unbind(2)
    scores = torch.einsum("bhd,bthd->bht", q, k) / math.sqrt(q.size(-1))
    P = F.dropout(scores.masked_fill(masked[:, None], -math.inf).softmax(-1), dropout_p)
    return torch.einsum("bht,bthd->bhd", P, v)


def token_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.to(hidden.dtype).T
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float,
    seed: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if branch is not None:
        x = x + (
            branch.to(x.dtype) * branch_mask(branch, dropout_p, seed) if dropout_p > 0 else branch
        )
    return x, F.layer_norm(x, weight.shape, weight, bias).to(dtype)


def sample(
    logits: Tensor,
    seed: int,
    rows: Tensor,
    steps: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    if not bool((logits < math.inf).all()):
        raise RuntimeError(
            f"sample: logits row {int((~(logits < math.inf)).any(1).nonzero()[0])} holds NaN or +inf"
        )
    if bool((logits == -math.inf).all(1).any()):
        raise RuntimeError(
            f"sample: logits row {int((logits == -math.inf).all(1).nonzero()[0])} is -inf throughout"
        )
    weights = sampling_weights(logits, temperature)
    # The most likely first; among equals the lowest index first.
    order = (logits.float() + 0.0).sort(dim=1, descending=True, stable=True).indices
    ranked = weights.gather(1, order)
    if 0 < top_k < logits.size(1):
        ranked[:, top_k:] = 0
    if top_p < 1:
        fixed = max(1, int(top_p * 2**30 + 0.5))
        total = ranked.sum(1, keepdim=True)
        low = (total & 0x3FFFFFFF) * fixed
        need = (total >> 30) * fixed + (low >> 30) + ((low & 0x3FFFFFFF) != 0)
        ranked = ranked.masked_fill(ranked.cumsum(1) - ranked >= need, 0)
    cumulative = torch.zeros_like(weights).scatter(1, order, ranked).cumsum(1)
    draw = below(sample_bits(seed, rows, steps), cumulative[:, -1])
    tokens = torch.searchsorted(cumulative, draw[:, None], right=True)[:, 0]
    log_p = (logits.double() / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)
    return tokens, log_p.gather(1, tokens[:, None])[:, 0].float(), entropy.float()


# --- random bits ----------------------------------------------------------------------------------


def philox(seed: int, counter: list[Tensor], rounds: int = 10) -> list[Tensor]:
    """Philox4x32 (Salmon et al., SC 2011): four 32-bit words, in int64 tensors, per 4-word
    counter."""
    x, y, z, w = counter
    key0, key1 = seed & LOW32, seed >> 32 & LOW32
    for _ in range(rounds):
        a, b = x * 0xD2511F53, z * 0xCD9E8D57  # int64 wraps, and has the same 64 bits as uint64
        x, y, z, w = (
            (b >> 32 & LOW32) ^ y ^ key0,
            b & LOW32,
            (a >> 32 & LOW32) ^ w ^ key1,
            a & LOW32,
        )
        key0, key1 = key0 + 0x9E3779B9 & LOW32, key1 + 0xBB67AE85 & LOW32
    return [x, y, z, w]


def dropout_mask(
    batch: int, heads: int, length: int, p: float, seed: int, device: torch.device | None = None
) -> Tensor:
    """A mask (batch, heads, length, length), 0 or the scale 1 / (1 - p), p rounded to a multiple of
    1/256 below 1."""
    head = torch.arange(batch * heads, device=device)[:, None, None]
    i = torch.arange(length, device=device)[:, None]
    j = torch.arange(length, device=device)
    counter = [i // 32 * 64 + i % 8 * 8 + j % 8, j // 32, head, torch.zeros_like(head)]
    return scales(philox(seed, counter, 7), i % 32 // 8, j % 32 // 8, p).view(
        batch, heads, length, length
    )


def branch_mask(branch: Tensor, p: float, seed: int) -> Tensor:
    """A float32 mask of the branch's shape (..., C), 0 or the scale, p rounded as in
    `dropout_mask`."""
    C = branch.shape[-1]
    row = torch.arange(branch.numel() // C, device=branch.device)[:, None]
    column = torch.arange(C, device=branch.device)
    group, zero = column // 4, torch.zeros_like(row)
    counter = [group // 128 * 32 + group % 32, row, zero, zero + 2]
    return (
        scales(philox(seed, counter, 7), group // 32 % 4, column % 4, p).float().view(branch.shape)
    )


def scales(words: list[Tensor], word: Tensor, byte: Tensor, p: float) -> Tensor:
    """0 or 1 / (1 - p) per element, decided by byte `byte` of word `word` of its random bits."""
    threshold, bits = min(int(p * 256 + 0.5), 255), torch.stack(words)
    bits = bits.gather(0, word.expand(bits.shape[1:])[None])[0] >> (byte * 8) & 0xFF
    return (bits >= threshold).double() * (256 / (256 - threshold))


def sample_bits(seed: int, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """64 random bits for each (row id, step): high and low 32-bit words."""
    low, high, _, _ = philox(
        seed, [rows & LOW32, rows >> 32 & LOW32, steps & LOW32, torch.ones_like(steps)]
    )
    return high, low


# --- fixed-point weights (csrc/weights.h) ---------------------------------------------------------
EXP2 = (
    1.0,
    0.69314718246,
    0.24022647738,
    0.05550332367,
    0.00961843692,
    0.00133988750,
    0.00015353362,
)


def sampling_weights(logits: Tensor, temperature: float) -> Tensor:
    """floor(2^40 * 2^t), t = (logit - highest) * log2(e) / temperature, each operation rounded to
    float32 by itself."""
    logits = logits.float()
    scale = torch.tensor(
        1.4426950408889634 / temperature, dtype=torch.float32, device=logits.device
    )
    t = ((logits - logits.amax(1, keepdim=True)) * scale).clamp_min(-60)
    n = t.round()
    f = t - n
    p = torch.full_like(f, EXP2[6])
    for coefficient in EXP2[5::-1]:
        p = p * f + coefficient
    return ((p * 2.0**24).to(torch.int64) << 16) >> -n.to(torch.int64)


def below(bits: tuple[Tensor, Tensor], total: Tensor) -> Tensor:
    """floor(bits * total / 2^64) for 64 bits given as high and low words, total < 2^62."""
    high, low = bits
    total_high, total_low = total >> 32, total & LOW32
    middle = (
        (low * total_low >> 32 & LOW32) + (low * total_high & LOW32) + (high * total_low & LOW32)
    )
    carry = (low * total_high >> 32) + (high * total_low >> 32 & LOW32) + (middle >> 32)
    return high * total_high + carry
