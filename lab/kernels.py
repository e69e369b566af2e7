"""Compares our operators with PyTorch's: time and, on a GPU, peak memory and throughput relative to
the GPU's limit."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.timing import PROMPT, Setup
from tinystory import ops

ROWS = 64  # number of stories decoded together


@dataclass(frozen=True)
class Unit:
    """A unit of throughput: key in the results, and work per second of one unit."""

    key: str
    scale: float


TFLOP_S = Unit("tflop_s", 1e12)
GB_S = Unit("gb_s", 1e9)


@dataclass(frozen=True)
class Operator:
    """The same work by our operator and by PyTorch's. amount: number of FLOPs, or of bytes that
    must be read. leaves: tensors that receive gradients."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    unit: Unit
    amount: float
    leaves: Sequence[Tensor] = ()


def operators(setup: Setup) -> dict[str, Operator]:
    table = {"attention": attention(setup)}
    table |= losses(setup)
    table["sample"] = sample(setup)
    table["decode_attention"] = decode_attention(setup)
    return table


def randn(setup: Setup, *shape: int) -> Tensor:
    return torch.randn(shape, device=setup.compute.device).to(setup.compute.dtype)


def attention(setup: Setup) -> Operator:
    B, T, H = setup.batch, setup.config.context, setup.config.n_head
    D = setup.config.n_embd // H
    qkv = randn(setup, B, T, 3, H, D).requires_grad_()

    def ours() -> None:
        ops.causal_attention(qkv).sum().backward()

    def sdpa() -> None:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).sum().backward()

    flops = 7.0 * B * H * T * T * D  # causal: half of 2 + 5 GEMMs
    return Operator(ours, sdpa, TFLOP_S, flops, [qkv])


def losses(setup: Setup) -> dict[str, Operator]:
    """The operators that read hidden states (N, C) and the vocabulary's weight (V, C)."""
    N = setup.batch * setup.config.context
    C, V = setup.config.n_embd, setup.config.vocab_size
    hidden = randn(setup, N, C).requires_grad_()
    weight = randn(setup, V, C).requires_grad_()
    targets = torch.randint(V, (N,), device=setup.compute.device)

    def token_logprob() -> None:
        logprob, _ = ops.token_logprob(hidden, weight, targets)
        logprob.sum().backward()

    def token_logprob_entropy() -> None:
        logprob, entropy = ops.token_logprob(hidden, weight, targets)
        (logprob.sum() + 0.01 * entropy.sum()).backward()

    def cross_entropy() -> None:
        ops.cross_entropy(hidden, weight, targets).sum().backward()

    def torch_cross_entropy() -> None:
        F.cross_entropy(F.linear(hidden, weight), targets).backward()

    def torch_logprob_entropy() -> None:
        log_p = F.linear(hidden, weight).float().log_softmax(-1)
        logprob = log_p.gather(1, targets[:, None])
        entropy = -(log_p.exp() * log_p).sum()
        (logprob.sum() + 0.01 * entropy).backward()

    def operator(ours: Callable[[], None], theirs: Callable[[], None]) -> Operator:
        return Operator(ours, theirs, TFLOP_S, 6.0 * N * C * V, [hidden, weight])

    return {
        "token_logprob": operator(token_logprob, torch_cross_entropy),
        "token_logprob_entropy": operator(token_logprob_entropy, torch_logprob_entropy),
        "cross_entropy": operator(cross_entropy, torch_cross_entropy),
    }


def sample(setup: Setup) -> Operator:
    logits = randn(setup, ROWS, setup.config.vocab_size)
    rows = torch.arange(ROWS, device=setup.compute.device)

    def ours() -> Any:
        return ops.sample(logits, seed=0, rows=rows, step=0)

    def multinomial() -> tuple[Tensor, Tensor]:
        log_p = logits.float().log_softmax(-1)
        p = log_p.exp()
        tokens = p.multinomial(1)
        return log_p.gather(1, tokens), -(p * log_p).sum(-1)

    return Operator(ours, multinomial, GB_S, logits.nbytes)


def decode_attention(setup: Setup) -> Operator:
    """Decode attention for stories of one opening, with caches that are at least half full."""
    device = setup.compute.device
    T, H = setup.config.context, setup.config.n_head
    D = setup.config.n_embd // H
    room = T - PROMPT
    new = randn(setup, ROWS, 3, H, D)
    prefix = randn(setup, PROMPT, 2, H, D)
    cache = randn(setup, ROWS, room, 2, H, D)
    rows = torch.arange(ROWS, device=device)
    lengths = torch.randint(room // 2, room, (ROWS,), device=device)
    spans = torch.tensor([[0, PROMPT]] * ROWS, device=device)
    whole = torch.cat([prefix.expand(ROWS, *prefix.shape), cache], 1)
    visible = torch.arange(T, device=device) <= PROMPT + lengths[:, None]
    mask = visible[:, None, None]

    def ours() -> Tensor:
        return ops.decode_attention(new, prefix, spans, cache, lengths)

    def masked_sdpa() -> Tensor:
        whole[rows, PROMPT + lengths] = new[:, 1:]
        k, v = whole.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(new[:, 0, :, None], k, v, attn_mask=mask)

    cached_tokens = PROMPT + int(lengths.sum())
    return Operator(ours, masked_sdpa, GB_S, cached_tokens * 2 * H * D * new.itemsize)


def compare(setup: Setup, runs: int) -> dict[str, dict[str, Any]]:
    """For each operator: median milliseconds of ours and of PyTorch's (interleaved), and the ratio
    (above 1: ours is faster). On a GPU also our TFLOP/s or GB/s, the rate of a GEMM or copy, and
    the peak memory in MB beyond the inputs."""
    device = setup.compute.device
    flush = None
    limits: dict[Unit, float] = {}
    if device.type == "cuda":
        flush = torch.empty(2**28, dtype=torch.uint8, device=device)
        limits = gpu_limits(setup, runs, flush)
    results = {}
    for name, operator in operators(setup).items():
        ours_s, torch_s = medians(operator, runs, flush)
        row = {"ours_ms": 1000 * ours_s, "torch_ms": 1000 * torch_s, "ratio": torch_s / ours_s}
        if limits:
            unit = operator.unit
            row[unit.key] = operator.amount / ours_s / unit.scale
            row[f"limit_{unit.key}"] = limits[unit] / unit.scale
            row["ours_mb"] = peak_mb(operator.ours, device)
            row["torch_mb"] = peak_mb(operator.theirs, device)
        results[name] = {key: round(value, 3) for key, value in row.items()}
    return results


def gpu_limits(setup: Setup, runs: int, flush: Tensor) -> dict[Unit, float]:
    """FLOPs per second of a large GEMM, and bytes per second, read and written, of a copy."""
    a = randn(setup, 8192, 8192)
    big = torch.empty_like(flush)
    work = Operator(lambda: a @ a, lambda: big.clone(), TFLOP_S, 0.0)
    gemm_s, copy_s = medians(work, runs, flush)
    return {TFLOP_S: 2 * 8192**3 / gemm_s, GB_S: 2 * big.nbytes / copy_s}


def medians(operator: Operator, runs: int, flush: Tensor | None) -> tuple[float, float]:
    """Median seconds of our operator and of PyTorch's, interleaved, after a warm-up."""
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(runs + 1):
        for work, laps in ((operator.ours, ours), (operator.theirs, theirs)):
            for tensor in operator.leaves:
                tensor.grad = None
            laps.append(seconds(work, flush))
    return statistics.median(ours[1:]), statistics.median(theirs[1:])


def seconds(f: Callable, flush: Tensor | None) -> float:
    """Seconds of a call. On a GPU the time is measured by events, after overwriting `flush`, which
    is larger than the L2 cache; the overwriting also lets the host run ahead of the device."""
    if flush is None:
        before = time.perf_counter()
        f()
        return time.perf_counter() - before
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    f()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def peak_mb(f: Callable, device: torch.device) -> float:
    """Peak memory of a call on a GPU, in MB, minus the memory in use before the call."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    f()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
