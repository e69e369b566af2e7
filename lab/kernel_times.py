"""Compares our operators with PyTorch's: time and, on a GPU, peak memory and throughput relative to
the GPU's limit."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab.timing import PROMPT, Setup, timed
from tinystory import ops
from tinystory.ops import cuda
from tinystory.run.device import now
from tinystory.student.token_step import capture_stream

ROWS = 64  # number of stories decoded together
LENGTHS = (256, 512, 1024)  # of sequences, for attention
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# Number of launches that are timed together, of nodes of a graph (token steps of GPT-2-small and of
# `english`), and of replays.
LAUNCHES, NODES, REPLAYS = 1000, (49, 105), 20


@dataclass(frozen=True)
class Unit:
    """A unit of throughput: key in the results, and work per second of one unit."""

    key: str
    scale: float


TFLOP_S = Unit("tflop_s", 1e12)
GB_S = Unit("gb_s", 1e9)


@dataclass(frozen=True)
class Operator:
    """The same work by our operator and by PyTorch's. Both return the tensors from which a backward
    pass starts. amount: number of FLOPs, or of bytes that must be read and written. leaves: tensors
    that receive gradients."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    unit: Unit
    amount: float
    leaves: Sequence[Tensor] = ()


def operators(setup: Setup) -> dict[str, Operator]:
    table = {"attention": attention(setup, setup.config.context)}
    table |= losses(setup)
    table["sample"] = sample(setup)
    table["decode_attention"] = decode_attention(setup)
    if setup.compute.device.type == "cuda":
        table["add_layer_norm"] = add_layer_norm(setup)
        if setup.compute.dtype == torch.bfloat16:
            table["lowered_linear"] = lowered_linear(setup, gelu=False)
            table["lowered_linear_gelu"] = lowered_linear(setup, gelu=True)
    return table


def randn(setup: Setup, *shape: int) -> Tensor:
    return torch.randn(shape, device=setup.compute.device).to(setup.compute.dtype)


def attention(setup: Setup, T: int) -> Operator:
    B, H = setup.batch, setup.config.n_head
    D = setup.config.n_embd // H
    qkv = randn(setup, B, T, 3, H, D).requires_grad_()

    def sdpa() -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    flops = 7.0 * B * H * T * T * D  # causal: half of 2 + 5 GEMMs
    return Operator(lambda: ops.causal_attention(qkv), sdpa, TFLOP_S, flops, [qkv])


def losses(setup: Setup) -> dict[str, Operator]:
    """The operators that read hidden states (N, C) and the vocabulary's weight (V, C)."""
    N = setup.batch * setup.config.context
    C, V = setup.config.n_embd, setup.config.vocab_size
    hidden = randn(setup, N, C).requires_grad_()
    weight = randn(setup, V, C).requires_grad_()
    targets = torch.randint(V, (N,), device=setup.compute.device)

    def token_logprob() -> Tensor:
        return ops.token_logprob(hidden, weight, targets)[0]

    def token_logprob_entropy() -> tuple[Tensor, Tensor]:
        return ops.token_logprob(hidden, weight, targets)

    def cross_entropy() -> Tensor:
        return ops.cross_entropy(hidden, weight, targets)

    def torch_cross_entropy() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), targets)

    def torch_logprob_entropy() -> tuple[Tensor, Tensor]:
        log_p = F.linear(hidden, weight).float().log_softmax(-1)
        logprob = log_p.gather(1, targets[:, None])
        return logprob, -(log_p.exp() * log_p).sum(-1)

    def operator(ours: Callable[[], Any], theirs: Callable[[], Any]) -> Operator:
        return Operator(ours, theirs, TFLOP_S, 6.0 * N * C * V, [hidden, weight])

    return {
        "token_logprob": operator(token_logprob, torch_cross_entropy),
        "token_logprob_entropy": operator(token_logprob_entropy, torch_logprob_entropy),
        "cross_entropy": operator(cross_entropy, torch_cross_entropy),
    }


def add_layer_norm(setup: Setup) -> Operator:
    """The residual sum and the norm of a block, forward and backward, without dropout."""
    dtype = setup.compute.dtype
    N, C = setup.batch * setup.config.context, setup.config.n_embd
    x = torch.randn(N, C, device=setup.compute.device).requires_grad_()
    branch = randn(setup, N, C).requires_grad_()
    weight, bias = torch.randn(2, C, device=setup.compute.device)
    leaves = [x, branch, weight.requires_grad_(), bias.requires_grad_()]

    def ours() -> tuple[Tensor, Tensor]:
        return torch.ops.tinystory.add_layer_norm(x, branch, weight, bias, 0.0, 0, dtype)[:2]

    def theirs() -> tuple[Tensor, Tensor]:
        total = x + branch
        return total, F.layer_norm(total, (C,), weight, bias).to(dtype)

    # x, branch, sum and y; backward: the gradients of sum and y, sum, and the gradients of x and branch
    read_and_written = N * C * (8 + 2 * dtype.itemsize) + N * C * (12 + 2 * dtype.itemsize)
    return Operator(ours, theirs, GB_S, read_and_written, leaves)


def lowered_linear(setup: Setup, gelu: bool) -> Operator:
    """The first linear layer of a block's MLP, with copies of the weights or as autocast casts
    them."""
    N, C = setup.batch * setup.config.context, setup.config.n_embd
    x = randn(setup, N, C).requires_grad_()
    weight = torch.randn(4 * C, C, device=setup.compute.device).requires_grad_()
    bias = torch.randn(4 * C, device=setup.compute.device).requires_grad_()
    copies = weight.detach().to(x.dtype), bias.detach().to(x.dtype)

    def ours() -> Tensor:
        return ops.lowered_linear(x, weight, bias, copies, gelu)

    def theirs() -> Tensor:
        y = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
        return F.gelu(y, approximate="tanh") if gelu else y

    # x, y and 16-bit weights; backward: grad_y twice, x, weights, grad_x, float32 gradients. With GELU:
    # y before it, written and read, then in the backward pass read, and the gradient written and read.
    elements = (C + 4 * C) + (8 * C + C + C) + gelu * (8 * C + 12 * C)
    moved = 2.0 * N * elements + (2 + 2 + 4) * 4 * C * C
    return Operator(ours, theirs, GB_S, moved, [x, weight, bias])


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
    """For each operator: median milliseconds of ours and of PyTorch's (interleaved), forward,
    backward and together, and the ratio (above 1: ours is faster). On a GPU also our TFLOP/s or
    GB/s, the rate of a GEMM or copy, and the peak memory in MB beyond the inputs; and the rows of
    `on_gpu`."""
    device = setup.compute.device
    flush = None
    limits: dict[Unit, float] = {}
    if device.type == "cuda":
        # four times the L2 cache
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(size, dtype=torch.uint8, device=device)
        limits = gpu_limits(setup, runs, flush)
    results = {}
    for name, operator in operators(setup).items():
        ours, theirs = medians(operator, runs, flush)
        ours_s, torch_s = sum(ours), sum(theirs)
        row = {"ours_ms": 1000 * ours_s, "torch_ms": 1000 * torch_s, "ratio": torch_s / ours_s}
        if operator.leaves:
            row |= {"forward_ms": 1000 * ours[0], "torch_forward_ms": 1000 * theirs[0]}
            row |= {"backward_ms": 1000 * ours[1], "torch_backward_ms": 1000 * theirs[1]}
        if limits:
            unit = operator.unit
            row[unit.key] = operator.amount / ours_s / unit.scale
            row[f"limit_{unit.key}"] = limits[unit] / unit.scale
            row["ours_mb"] = peak_mb(operator.ours, operator.leaves, flush)
            row["torch_mb"] = peak_mb(operator.theirs, operator.leaves, flush)
        results[name] = rounded(row)
    if flush is not None:
        results |= on_gpu(setup, runs, flush)
    return results


def rounded(row: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 3) for key, value in row.items()}


# --- only on a GPU --------------------------------------------------------------------------------
def on_gpu(setup: Setup, runs: int, flush: Tensor) -> dict[str, dict[str, Any]]:
    """Attention beside each back-end of SDPA; cross_entropy with chunks of several sizes; and what a
    launch and a node of a graph take."""
    results: dict[str, dict[str, Any]] = {}
    for T in LENGTHS:
        results[f"attention_{T}"] = against_backends(setup, T, runs, flush)
    module, loss = cuda.load(), losses(setup)["cross_entropy"]
    if module:  # the simulated device of the tests has no such module
        results["chunks"] = {}
        for megabytes in (16, 32, 128):  # the last is the default
            module.set_chunk_bytes(megabytes << 20)
            ours, _ = medians(loss, runs, flush)
            results["chunks"][f"{megabytes}_mb_ms"] = round(1000 * sum(ours), 3)
    results["host"] = overheads(setup.compute.device, runs)
    return results


def against_backends(setup: Setup, T: int, runs: int, flush: Tensor) -> dict[str, float]:
    """Milliseconds of our attention and of SDPA's back-ends, those that support the dtype, forward
    and backward; for 64 of the batch's sequences of 256 tokens as many tokens at every length."""
    batch = max(1, setup.batch * LENGTHS[0] // T)
    operator = attention(dataclasses.replace(setup, batch=batch), T)
    ours, _ = medians(operator, runs, flush)
    row = {"forward_ms": 1000 * ours[0], "backward_ms": 1000 * ours[1]}
    row["tflop_s"] = operator.amount / sum(ours) / TFLOP_S.scale
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                _, theirs = medians(operator, runs, flush)
        except RuntimeError:
            continue  # the back-end lacks the dtype, or this GPU
        row |= {f"{name}_forward_ms": 1000 * theirs[0], f"{name}_backward_ms": 1000 * theirs[1]}
    return rounded(row)


def overheads(device: torch.device, runs: int) -> dict[str, float]:
    """Microseconds that the host takes for a launch, and the device for a kernel launched by the
    host and for a node of a graph, each a kernel without work; of these figures lab/gpu.md
    makes estimates."""
    x = torch.zeros(1, device=device)

    def kernels(count: int) -> None:
        for _ in range(count):
            x.add_(1)

    laps = []
    for _ in range(runs + 1):
        start = now(device)
        kernels(LAUNCHES)
        launched = time.perf_counter()
        laps.append((launched - start, now(device) - start))
    host_s, device_s = (statistics.median(column) for column in zip(*laps[1:], strict=True))
    row = {"launch_us": 1e6 * host_s / LAUNCHES, "kernel_us": 1e6 * device_s / LAUNCHES}
    for nodes in NODES:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(capture_stream(device)):
            graph.capture_begin(capture_error_mode="thread_local")
            kernels(nodes)
            graph.capture_end()
        seconds = [timed(graph.replay, device, REPLAYS)[0] for _ in range(runs + 1)]
        row[f"node_us_of_{nodes}"] = 1e6 * statistics.median(seconds[1:]) / nodes
    return rounded(row)


def gpu_limits(setup: Setup, runs: int, flush: Tensor) -> dict[Unit, float]:
    """FLOPs per second of a large GEMM, and bytes per second, read and written, of a copy."""
    size = min(8192, setup.batch * setup.config.context)
    a = randn(setup, size, size)
    big = torch.empty_like(flush)
    work = Operator(lambda: a @ a, lambda: big.clone(), TFLOP_S, 0.0)
    gemm, copy = medians(work, runs, flush)
    return {TFLOP_S: 2 * size**3 / sum(gemm), GB_S: 2 * big.nbytes / sum(copy)}


# --- timing ---------------------------------------------------------------------------------------
def medians(
    operator: Operator, runs: int, flush: Tensor | None
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Median seconds of our operator and of PyTorch's, each forward and backward, interleaved,
    after a warm-up."""
    laps: list[list[tuple[float, float]]] = [[], []]
    for _ in range(runs + 1):
        for work, own in zip((operator.ours, operator.theirs), laps, strict=True):
            own.append(seconds(work, operator.leaves, flush))
    ours, theirs = ([statistics.median(x) for x in zip(*own[1:], strict=True)] for own in laps)
    return (ours[0], ours[1]), (theirs[0], theirs[1])


def seconds(work: Callable, leaves: Sequence[Tensor], flush: Tensor | None) -> tuple[float, float]:
    """Seconds of the forward pass and of the backward pass, which starts from contiguous gradients.
    On a GPU, `flush`, which is larger than the L2 cache, is overwritten before each."""
    device = flush.device if flush is not None else torch.device("cpu")
    if flush is not None:
        flush.zero_()
    forward_s, outputs = timed(work, device)
    if not leaves:
        return forward_s, 0.0
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    grads = [torch.ones(x.shape, dtype=x.dtype, device=device) for x in outputs]
    if flush is not None:
        flush.zero_()
    backward_s, _ = timed(lambda: torch.autograd.grad(outputs, leaves, grads), device)
    return forward_s, backward_s


def peak_mb(work: Callable, leaves: Sequence[Tensor], flush: Tensor | None) -> float:
    """Peak memory of a forward and a backward pass on a GPU, in MB, minus the memory in use before
    them."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds(work, leaves, flush)
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
