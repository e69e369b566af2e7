"""The definition of each operator in plain PyTorch. The definitions work on any device and with any
float type and are differentiable, but they are slow and need much memory.

`ops` documents arguments and results. The kernels are tested against these definitions. Random bits
come from the same Philox counters as in csrc/philox.h, so dropout masks and sampled tokens are
bit-identical."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(qkv: Tensor, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V, (B, T, H, D), where the softmax is over the keys up to the query.
    qkv: (B, T, 3, H, D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    S = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    causal = torch.ones(S.shape[-2:], dtype=torch.bool, device=qkv.device).tril()
    P = S.masked_fill(~causal, -math.inf).softmax(-1)
    if dropout_p > 0:
        batch, heads, length, _ = S.shape
        P = P * dropout_mask(batch, heads, length, dropout_p, seed, qkv.device).to(P.dtype)
    return (P @ v).transpose(1, 2).contiguous()


def decode_attention(
    qkv: Tensor, prefix: Tensor, spans: Tensor, cache: Tensor, lengths: Tensor
) -> Tensor:
    batch = len(cache)
    cache[torch.arange(batch, device=cache.device), lengths] = qkv[:, 1:]  # the new key and value

    # Each row gets all prompts and the cache of the row. The mask hides prompts of other rows and
    # unfilled positions.
    kv = torch.cat([prefix.expand(batch, *prefix.shape), cache], dim=1)  # (B, P + T_max, 2, H, D)
    position = torch.arange(kv.size(1), device=kv.device)
    begin, end = spans[:, :, None].unbind(1)
    in_prompt = (position >= begin) & (position < end)
    in_cache = (position >= len(prefix)) & (position <= len(prefix) + lengths[:, None])
    masked = ~(in_prompt | in_cache)  # (B, P + T_max)

    q = qkv[:, 0]
    k, v = kv.masked_fill(masked[:, :, None, None, None], 0).unbind(2)
    S = torch.einsum("bhd,bthd->bht", q, k) / math.sqrt(q.size(-1))
    P = S.masked_fill(masked[:, None], -math.inf).softmax(-1)
    return torch.einsum("bht,bthd->bhd", P, v)


def token_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.to(hidden.dtype).T
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    logprob = log_p.gather(-1, targets[:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logprob, entropy


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    if not torch.is_autocast_enabled(x.device.type):
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
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
        if dropout_p > 0:
            branch = branch.to(x.dtype) * branch_mask(branch, dropout_p, seed)
        x = x + branch
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
    refuse_rows(~(logits < math.inf).all(1), "holds NaN or +inf")
    refuse_rows((logits == -math.inf).all(1), "is -inf throughout")
    weights = sampling_weights(logits, temperature)
    # The most likely token first; among equal logits, the lowest index first. -0.0 + 0.0 is 0.0.
    order = (logits.float() + 0.0).sort(dim=1, descending=True, stable=True).indices
    ranked = weights.gather(1, order)
    if 0 < top_k < logits.size(1):
        ranked[:, top_k:] = 0
    if top_p < 1:
        more_likely = ranked.cumsum(1) - ranked
        ranked = ranked.masked_fill(more_likely >= top_p_need(top_p, ranked), 0)
    cumulative = torch.zeros_like(weights).scatter(1, order, ranked).cumsum(1)
    draw = below(sample_bits(seed, rows, steps), cumulative[:, -1])
    tokens = torch.searchsorted(cumulative, draw[:, None], right=True)  # (B, 1)

    log_p = (logits.double() / temperature).log_softmax(-1)
    logprobs = log_p.gather(1, tokens).squeeze(1)
    entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)  # avoids 0 * -inf
    return tokens.squeeze(1), logprobs.float(), entropy.float()


def refuse_rows(invalid: Tensor, problem: str) -> None:
    """Raises RuntimeError for the first invalid row, if any. invalid: (B,) bool."""
    if bool(invalid.any()):
        raise RuntimeError(f"sample: logits row {int(invalid.nonzero()[0])} {problem}")


# --- random bits (csrc/philox.h) ------------------------------------------------------------------
LOW32 = 0xFFFFFFFF


def upper(x: Tensor) -> Tensor:
    """The upper 32 bits of 64-bit integers. int64 tensors hold uint64 values here, because products
    wrap around to the same 64 bits."""
    return x >> 32 & LOW32


def philox(seed: int, counter: list[Tensor], rounds: int = 10) -> list[Tensor]:
    """Random bits of Philox4x32 (Salmon et al., SC 2011): four 32-bit words, in int64 tensors, for
    each counter of four words."""
    x, y, z, w = counter
    key0 = seed & LOW32
    key1 = seed >> 32 & LOW32
    for _ in range(rounds):
        a = x * 0xD2511F53
        b = z * 0xCD9E8D57
        x = upper(b) ^ y ^ key0
        z = upper(a) ^ w ^ key1
        y = b & LOW32
        w = a & LOW32
        key0 = key0 + 0x9E3779B9 & LOW32
        key1 = key1 + 0xBB67AE85 & LOW32
    return [x, y, z, w]


def dropout_mask(
    batch: int, heads: int, length: int, p: float, seed: int, device: torch.device | None = None
) -> Tensor:
    """Dropout factors of attention weights, (batch, heads, length, length): 0 or the scale 1 / (1 -
    p), where p is rounded to a multiple of 1/256 below 1."""
    head = torch.arange(batch * heads, device=device)[:, None, None]
    i = torch.arange(length, device=device)[:, None]
    j = torch.arange(length, device=device)
    # The 16 bytes of a call belong to the weights of a 32 x 32 tile with equal i % 8 and j % 8.
    counter = [i // 32 * 64 + i % 8 * 8 + j % 8, j // 32, head, torch.zeros_like(head)]
    mask = scales(philox(seed, counter, 7), i % 32 // 8, j % 32 // 8, p)
    return mask.view(batch, heads, length, length)


def branch_mask(branch: Tensor, p: float, seed: int) -> Tensor:
    """Dropout factors of a branch, float32 with the shape of the branch, (..., C): 0 or the scale,
    with p rounded as in `dropout_mask`."""
    C = branch.shape[-1]
    row = torch.arange(branch.numel() // C, device=branch.device)[:, None]
    column = torch.arange(C, device=branch.device)
    # The 16 bytes of a call belong to four groups of 4 columns, 128 columns apart.
    group = column // 4
    zero = torch.zeros_like(row)
    counter = [group // 128 * 32 + group % 32, row, zero, zero + 2]
    mask = scales(philox(seed, counter, 7), group // 32 % 4, column % 4, p)
    return mask.float().view(branch.shape)


def scales(words: list[Tensor], word: Tensor, byte: Tensor, p: float) -> Tensor:
    """Dropout factors, 0 or 1 / (1 - p): byte `byte` of word `word` of an element's random bits
    decides."""
    threshold = min(int(p * 256 + 0.5), 255)
    stacked = torch.stack(words)
    chosen = stacked.gather(0, word.expand(stacked.shape[1:])[None]).squeeze(0)
    bits = chosen >> (byte * 8) & 0xFF
    return (bits >= threshold).double() * (256 / (256 - threshold))


def sample_bits(seed: int, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """64 random bits for each (row id, step), as high and low 32-bit words."""
    counter = [rows & LOW32, upper(rows), steps & LOW32, torch.ones_like(steps)]
    low, high, _, _ = philox(seed, counter)
    return high, low


# --- fixed-point weights (csrc/weights.h) ---------------------------------------------------------
# 2^f for |f| <= 1/2: coefficients of f^6 to f^0
EXP2 = (
    0.00015353362,
    0.00133988750,
    0.00961843692,
    0.05550332367,
    0.24022647738,
    0.69314718246,
    1.0,
)


def sampling_weights(logits: Tensor, temperature: float) -> Tensor:
    """Fixed-point weights floor(2^40 * 2^t) with t = (logit - highest logit) * log2(e) /
    temperature. Each operation is rounded to float32."""
    logits = logits.float()
    below_highest = logits - logits.amax(1, keepdim=True)
    log2_e = 1.4426950408889634
    scale = torch.tensor(log2_e / temperature, dtype=torch.float32, device=logits.device)
    t = (below_highest * scale).clamp_min(-60)
    n = t.round()
    f = t - n
    p = torch.zeros_like(f)
    for coefficient in EXP2:
        p = p * f + coefficient
    return ((p * 2.0**24).to(torch.int64) << 16) >> -n.to(torch.int64)


def top_p_need(top_p: float, weights: Tensor) -> Tensor:
    """The minimum weight of the kept tokens, (B, 1): top_p, in units of 2^-30, times the total
    weight of each row, rounded up. weights: (B, V)."""
    low30 = 2**30 - 1
    fixed = max(1, int(top_p * 2**30 + 0.5))
    total = weights.sum(1, keepdim=True)
    low = (total & low30) * fixed
    return (total >> 30) * fixed + (low >> 30) + ((low & low30) != 0)


def below(bits: tuple[Tensor, Tensor], total: Tensor) -> Tensor:
    """floor(bits * total / 2^64), where bits are 64 bits given as high and low words, and total <
    2^62."""
    high, low = bits
    total_high = total >> 32
    total_low = total & LOW32
    cross = low * total_high
    other_cross = high * total_low
    middle = upper(low * total_low) + (cross & LOW32) + (other_cross & LOW32)
    return high * total_high + upper(cross) + upper(other_cross) + (middle >> 32)
