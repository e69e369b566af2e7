"""Which device, which precision, and how a run is asked to end."""

import contextlib
import resource
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

import torch
from torch import Tensor

from tinystory import ops
from tinystory.errors import Output, UserError


def pick_device(name: str) -> torch.device:
    """The device of --device. auto is a GPU if torch sees one and the kernels can be compiled for it, else the CPU,
    which one line then explains. Raises UserError for a device that cannot be used."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        try:
            return pick_device("cuda")
        except UserError as error:
            why = str(error).splitlines()[0]
            print(f"tinystory: --device auto is the CPU here, not the GPU: {why}", file=sys.stderr)
            return torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("no kernels for it")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try --device cpu"
        ) from error
    if device.type == "cuda":
        ops.load_cuda(device)
    return device


def cpu_has_bf16() -> bool:
    """True where bf16 matmuls run in hardware; elsewhere they would be emulated, slower than float32."""
    return any(cpu_flag(name) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def cpu_flag(name: str) -> bool:
    """A private function of torch.cpu; False in versions of torch that do not have it."""
    return getattr(torch.cpu, name, bool)()


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """dtype of the matmuls. auto: bfloat16 where the hardware has it. tf32: float32, whose GEMMs a GPU rounds to 11
    significant bits, in this whole process; UserError on a CPU."""
    if name == "tf32":
        if device.type != "cuda":
            raise UserError("--dtype tf32 needs a GPU: on a CPU give --dtype float32 or bfloat16")
        torch.backends.cuda.matmul.allow_tf32 = True
        return torch.float32
    if name != "auto":
        return getattr(torch, name)
    has = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
    return torch.bfloat16 if has else torch.float32


def dtype_name(asked: str, dtype: torch.dtype) -> str:
    """--dtype for a run's record, so that a resumed run multiplies as before: what auto means here, else as asked."""
    return str(dtype).removeprefix("torch.") if asked == "auto" else asked


def upload(x: Tensor, device: torch.device) -> Tensor:
    """x, on the CPU, on the device. Waits for nothing that a GPU is still computing."""
    pinned = device.type == "cuda"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=pinned)


class Download:
    """A copy of x on the CPU, under way: what is launched after it does not delay it."""

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


def now(device: torch.device) -> float:
    """Seconds of a clock, when all that was launched on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory_mb(device: torch.device) -> int:
    """Peak memory in MiB: on a GPU that of torch's tensors, else the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss >> (20 if sys.platform == "darwin" else 10)  # in bytes there, in KiB elsewhere


class Interrupted(Exception):
    """The user asked the run to end; what is finished is to be saved."""


class Stop:
    """Ctrl-C, SIGTERM or SIGHUP once: `requested` turns true and the loop ends after the step. Ctrl-C or SIGTERM after
    that: at once. (After Ctrl-C the reader of a pipe has gone too, which errors.Output says by SIGHUP.)"""

    def __init__(self) -> None:
        self.requested = Output.reader_gone

    def check(self) -> None:
        """Raise Interrupted if an end was asked for: for waits that may be long and can be given up."""
        if self.requested:
            raise Interrupted

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        def ask(signum: int, frame: FrameType | None) -> None:
            if self.requested and signum != signal.SIGHUP:
                raise KeyboardInterrupt
            self.requested = True

        signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
            signals.pop()
        before = {s: signal.signal(s, ask) for s in signals}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
