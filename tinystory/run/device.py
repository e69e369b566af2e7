"""Precision, copies between host and device, timing and memory of a device, and signals that end a run."""

import contextlib
import math
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tinystory.run.errors import Interrupted, Output, UserError
from tinystory.run.folder import RunLog


def cpu_has_bf16() -> bool:
    """True where bf16 matmuls run in hardware; elsewhere they would be emulated, slower than float32."""
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, and not in every version of torch
    return any(getattr(torch.cpu, flag, bool)() for flag in flags)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """dtype of the matmuls. auto: bfloat16 where the hardware has it. tf32: float32, with GEMMs that round their inputs
    to 11 significant bits, in this whole process; UserError on a CPU."""
    if name == "tf32":
        if device.type != "cuda":
            raise UserError("--dtype tf32 needs a GPU: on a CPU give --dtype float32 or bfloat16")
        torch.backends.cuda.matmul.allow_tf32 = True
        return torch.float32
    if name != "auto":
        return getattr(torch, name)
    supported = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
    return torch.bfloat16 if supported else torch.float32


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device of x, which is on the CPU. Does not wait for the GPU."""
    pinned = device.type == "cuda"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=pinned)


class Download:
    """An asynchronous copy of x to the CPU; kernels launched after it do not delay it."""

    def __init__(self, x: Tensor):
        pinned = x.is_cuda
        self.host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=pinned)
        self.host.copy_(x, non_blocking=pinned)
        self.event = torch.cuda.Event() if pinned else None
        if self.event:
            self.event.record(torch.cuda.current_stream(x.device))

    def wait(self) -> Tensor:
        if self.event:
            self.event.synchronize()
        return self.host


class StepLog:
    """Writes the metrics of pretraining steps, in order, while a GPU may still be computing later ones. step_tokens:
    tokens per step."""

    def __init__(self, log: RunLog, bar: tqdm, step_tokens: int):
        self.log, self.bar, self.step_tokens = log, bar, step_tokens
        self.launched: deque[tuple[float, Download, dict[str, Any]]] = deque()
        self.last_end = 0.0  # time at which the last written step had ended
        self.metrics: dict[str, Any] = {}  # of the last step written

    def launch(self, began: float, statistics: Download, **metrics: Any) -> None:
        """statistics: the step's loss and gradient norm, (2,) float32."""
        self.launched.append((began, statistics, metrics))

    def write(self, ahead: int, validate: Callable[[], dict[str, float]] | None = None) -> None:
        """Wait for all launched steps but the last `ahead`, and write their metrics, with a validation after the very
        last one. Raises UserError for a loss that is not finite."""
        while len(self.launched) > ahead:
            began, statistics, metrics = self.launched.popleft()
            loss, grad_norm = statistics.wait().tolist()
            began, self.last_end = max(began, self.last_end), time.perf_counter()
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {metrics['step']}: lower --learning-rate or --resume from the last "
                    "checkpoint"
                )
            speed = self.step_tokens / (self.last_end - began)
            metrics |= dict(loss=loss, grad_norm=grad_norm, tokens_per_s=speed, val_loss=None, val_bits_per_byte=None)
            postfix = {"loss": f"{loss:.3f}", "tok/s": f"{speed:,.0f}"}
            if validate and not self.launched:
                metrics |= validate()
                postfix |= {"val": f"{metrics['val_loss']:.3f}"}
            self.log.metrics(**metrics)
            self.bar.update(metrics["words"] - self.bar.n)
            self.bar.set_postfix(postfix)
            self.metrics = metrics


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has finished all launched work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory_mb(device: torch.device) -> int:
    """Peak memory in MiB: on a GPU of torch's tensors, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss >> (20 if sys.platform == "darwin" else 10)  # in bytes there, in KiB elsewhere


class Stop:
    """`requested` turns true at the first Ctrl-C, SIGTERM or SIGHUP (a closed terminal; nohup ignores it), and the loop
    ends after the step. A later Ctrl-C or SIGTERM ends it at once; a later SIGHUP does not, because Ctrl-C also ends
    the reader of a pipe, for which errors.Output sends one."""

    def __init__(self) -> None:
        self.requested = Output.reader_gone

    def check(self) -> None:
        """Raises Interrupted if an end was requested. For long waits that can be given up."""
        if self.requested:
            raise Interrupted

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        def handle(signum: int, frame: FrameType | None) -> None:
            if self.requested and signum != signal.SIGHUP:
                raise KeyboardInterrupt
            self.requested = True

        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        before = {s: signal.signal(s, handle) for s in signals}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
