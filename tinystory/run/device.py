"""Copies between host and device, and properties of a device: bfloat16, timing, memory, name."""

import contextlib
import platform
import re
import resource
import sys
import time
from pathlib import Path

import torch
from numpy import ndarray
from torch import Tensor


def cpu_has_bf16() -> bool:
    """Whether bf16 matmuls run in hardware and ATEN_CPU_CAPABILITY permits that. Emulated bf16
    matmuls are slower than float32."""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    # a private function, which some versions of torch do not have
    has_avx512_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return has_avx512_bf16() or cpu_has_amx()


def cpu_has_amx() -> bool:
    """Whether the processor has AMX."""
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)
    return bool(has_amx())


def upload(x: Tensor | ndarray, device: torch.device) -> Tensor:
    """A copy of x on the device, made without waiting for the GPU."""
    x = torch.as_tensor(x, device="cpu")
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Download:
    """An asynchronous copy of x to the CPU. Kernels that are launched later do not delay the
    copy."""

    def __init__(self, x: Tensor):
        pinned = x.is_cuda
        self.host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=pinned)
        self.host.copy_(x, non_blocking=pinned)
        self.event: torch.cuda.Event | None = None
        if pinned:
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(x.device))

    def wait(self) -> Tensor:
        if self.event:
            self.event.synchronize()
        return self.host


def now(device: torch.device) -> float:
    """time.perf_counter() in seconds, after the device has finished all launched work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory_mb(device: torch.device) -> int:
    """Peak memory in MiB: of PyTorch's tensors on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss >> (20 if sys.platform == "darwin" else 10)  # bytes on macOS, KiB elsewhere


def device_name(device: str) -> str:
    """The device's name, such as "NVIDIA H100 80GB HBM3"; for a CPU, the model and the number of
    threads in use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    names: list[str] = []
    with contextlib.suppress(OSError):
        cpuinfo = Path("/proc/cpuinfo").read_text()
        names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    model = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"
