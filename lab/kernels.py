"""Our operators compared with PyTorch's: time and, on a GPU, peak memory and throughput relative to
its limit."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.timing import PROMPT, Setup
from tinystory import ops

ROWS = 64  # stories decoded at a time
UNITS = {"flops": ("tflop_s", 1e12), "bytes": ("gb_s", 1e9)}
# Ours, PyTorch's, the unit of work (a key of UNITS), and the amount: FLOPs, or bytes that must be
# read.
Operator: TypeAlias = tuple[Callable[[], Any], Callable[[], Any], str, float]


def sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def backward(f: Callable[..., Tensor], *arguments: Any) -> Callable[[], None]:
    return lambda: f(*arguments).sum().backward()


def operators(setup: Setup) -> tuple[dict[str, Operator], list[Tensor]]:
    """The operators by name, and the leaf tensors that receive gradients: attention's qkv, hidden
    states, weight."""
    B, T, H, C, V = (
        setup.batch,
        setup.config.context,
        setup.config.n_head,
        setup.config.n_embd,
        setup.config.vocab_size,
    )
    D, N, device = C // H, B * T, setup.compute.device

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(setup.compute.dtype).requires_grad_()

    qkv, hidden, weight = random(B, T, 3, H, D), random(N, C), random(V, C)
    targets, rows = torch.randint(V, (N,), device=device), torch.arange(ROWS, device=device)
    logits = random(ROWS, V).detach()
    new, prefix, cache = (
        random(*n, H, D).detach() for n in ((ROWS, 3), (PROMPT, 2), (ROWS, T - PROMPT, 2))
    )
    whole = torch.cat([prefix.expand(ROWS, *prefix.shape), cache], 1)
    lengths = torch.randint((T - PROMPT) // 2, T - PROMPT, (ROWS,), device=device)
    spans = torch.tensor([[0, PROMPT]] * ROWS, device=device)
    valid = (torch.arange(T, device=device) <= PROMPT + lengths[:, None])[:, None, None]

    def log_softmax() -> Tensor:
        log_p = F.linear(hidden, weight).float().log_softmax(-1)
        return log_p.gather(1, targets[:, None]).sum() - 0.01 * (log_p.exp() * log_p).sum()

    def logprob_and_entropy() -> Tensor:
        logprob, entropy = ops.token_logprob(hidden, weight, targets)
        return logprob.sum() + 0.01 * entropy.sum()

    def multinomial() -> tuple[Tensor, Tensor]:
        log_p = logits.float().log_softmax(-1)
        p = log_p.exp()
        tokens = p.multinomial(1)
        return log_p.gather(1, tokens), -(p * log_p).sum(-1)

    def masked_sdpa() -> Tensor:
        whole[rows, PROMPT + lengths] = new[:, 1:]
        k, v = whole.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(new[:, 0, :, None], k, v, attn_mask=valid)

    sample = partial(ops.sample, logits, seed=0, rows=rows, step=0)
    decode = partial(ops.decode_attention, new, prefix, spans, cache, lengths)
    logprob = backward(lambda: ops.token_logprob(hidden, weight, targets)[0])
    cross_entropy = backward(ops.cross_entropy, hidden, weight, targets)
    linear_loss = backward(lambda: F.cross_entropy(F.linear(hidden, weight), targets))
    # causal: half of 2 + 5 GEMMs
    loss_flops, attention_flops = 6.0 * N * C * V, 7.0 * B * H * T * T * D
    cached = (PROMPT + int(lengths.sum())) * 2 * C * setup.compute.dtype.itemsize
    return {
        "attention": (
            backward(ops.causal_attention, qkv),
            backward(sdpa, qkv),
            "flops",
            attention_flops,
        ),
        "token_logprob": (logprob, linear_loss, "flops", loss_flops),
        "token_logprob_entropy": (
            backward(logprob_and_entropy),
            backward(log_softmax),
            "flops",
            loss_flops,
        ),
        "cross_entropy": (cross_entropy, linear_loss, "flops", loss_flops),
        "sample": (sample, multinomial, "bytes", ROWS * V * setup.compute.dtype.itemsize),
        "decode_attention": (decode, masked_sdpa, "bytes", cached),
    }, [qkv, hidden, weight]


def compare(setup: Setup, runs: int) -> dict[str, dict[str, Any]]:
    """Per operator: median milliseconds of ours and PyTorch's, measured alternately, and their
    ratio (above 1: ours is faster). On a GPU also our TFLOP/s or GB/s and the rate of a GEMM or
    copy, and the peak memory beyond the inputs in MB."""
    table, leaves = operators(setup)
    device = setup.compute.device
    flush = torch.empty(2**28, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def medians(*functions: Callable) -> list[float]:
        times: list[list[float]] = [[] for _ in functions]
        for _ in range(runs + 1):
            for f, laps in zip(functions, times, strict=True):
                for tensor in leaves:
                    tensor.grad = None
                laps.append(seconds(f, flush))
        return [statistics.median(laps[1:]) for laps in times]

    limits: dict[str, float] = {}
    if flush is not None:
        a, big = (
            torch.randn(8192, 8192, device=device).to(setup.compute.dtype),
            torch.empty_like(flush),
        )
        gemm, copy = medians(lambda: a @ a, lambda: big.clone())
        limits = dict(flops=2 * 8192**3 / gemm, bytes=2 * 2**28 / copy)
        del a, big
    results: dict[str, dict[str, float]] = {}
    for name, (ours, theirs, unit, amount) in table.items():
        ours_s, theirs_s = medians(ours, theirs)
        results[name] = {
            "ours_ms": 1000 * ours_s,
            "torch_ms": 1000 * theirs_s,
            "ratio": theirs_s / ours_s,
        }
        if limits:
            key, scale = UNITS[unit]
            results[name] |= {key: amount / ours_s / scale, f"limit_{key}": limits[unit] / scale}
            results[name] |= dict(ours_mb=peak_mb(ours, device), torch_mb=peak_mb(theirs, device))
    return {
        name: {key: round(value, 3) for key, value in row.items()} for name, row in results.items()
    }


def seconds(f: Callable, flush: Tensor | None) -> float:
    """Seconds of a call. On a GPU by events, once `flush`, larger than the L2 cache, is
    overwritten; that also lets the host run ahead of the device."""
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
    """Peak memory of a call on a GPU beyond the memory in use before it, in MB."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    f()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
