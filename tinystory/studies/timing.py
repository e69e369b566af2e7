"""Seconds and bytes of a call on the CPU or a GPU, and the limit that PyTorch's GEMMs set, for scripts/bench.py."""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from tinystory.run.device import now
from tinystory.student.model import StudentConfig


def lap_timer(device: torch.device) -> Callable[[Callable], float]:
    """A function that runs another one and returns its seconds. On a GPU it uses events, after flushing the L2 cache,
    which also lets the host run ahead of the device."""
    if device.type != "cuda":

        def lap(f: Callable) -> float:
            began = time.perf_counter()
            f()
            return time.perf_counter() - began

        return lap
    flush = torch.empty(2**28, dtype=torch.uint8, device=device)  # larger than any L2 cache

    def lap_on_stream(f: Callable) -> float:
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        began.record()
        f()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1000

    return lap_on_stream


def gemm_limit(bench: str, config: StudentConfig, batch: int, dtype: torch.dtype, device: torch.device) -> float:
    """Tokens per second of pretraining or of rollout if all but PyTorch's GEMMs took no time."""
    rows, backward = (batch, False) if bench == "rollout" else (batch * config.context, True)
    return round(rows / gemm_seconds(config, rows, dtype, device, backward), 1)


def gemm_seconds(
    config: StudentConfig, rows: int, dtype: torch.dtype, device: torch.device, backward: bool, runs: int = 5
) -> float:
    """Seconds that PyTorch takes for the student's GEMMs alone over `rows` rows, with or without the backward pass."""
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    total = 0.0
    for k, n, times in ((C, 3 * C, L), (C, C, L), (C, 4 * C, L), (4 * C, C, L), (C, V, 1)):
        shapes = [(rows, k, n), (rows, n, k), (n, rows, k)] if backward else [(rows, k, n)]
        for m, inner, out in shapes:
            x, w = (torch.randn(s, dtype=dtype, device=device) for s in ((m, inner), (out, inner)))
            laps = []
            for _ in range(runs):
                began = now(device)
                F.linear(x, w)
                laps.append(now(device) - began)
            total += times * statistics.median(laps)
    return total


def held_mb(f: Callable, device: torch.device) -> float | None:
    """Peak memory of one call beyond the memory in use before it, in MB. On a CPU freed memory is first returned to the
    system, and the call runs in a new thread, so that memory which a thread keeps between calls is counted too."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        f()
        return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    try:  # Linux: 5 resets the high-water mark to the resident memory
        Path("/proc/self/clear_refs").write_text("5")
        before = status_kb("VmRSS")
        with ThreadPoolExecutor(1) as thread:
            thread.submit(f).result()
        return round((status_kb("VmHWM") - before) / 1024, 1)
    except OSError:
        return None


def status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def profile(run: Callable, device: torch.device) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=40), file=sys.stderr)
