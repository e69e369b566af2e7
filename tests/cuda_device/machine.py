"""The time of the simulated device: vector clocks of the streams and of the host, which stream
touched which memory when, copies that have not arrived, and every wait. Import it before torch,
which asks for a device's hooks once."""

import ctypes
import importlib.util
import sys
import threading
from collections import Counter
from pathlib import Path

assert "torch" not in sys.modules, "the simulated device must be imported before torch"
from libraries import device_library  # noqa: E402

_library = device_library()
ctypes.CDLL(str(_library), ctypes.RTLD_GLOBAL)
_spec = importlib.util.spec_from_file_location("simulated_device", _library)
assert _spec and _spec.loader
device = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(device)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

Clock = dict[int, int]  # per stream: how many of its launches are known to be done
PROJECT = Path(__file__).resolve().parents[2]
PRODUCT = f"{PROJECT}/"
CELL = 4  # bytes: races are seen between cells


class Problem(RuntimeError):
    """An error that a GPU would not report, such as a race."""


def join(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)


def where() -> str:
    """The project's functions that are running, the innermost first and with its line:
    "run/device.py:59 wait < step". Without such functions: "backward" in a thread of autograd, which
    runs the device's backward passes, and "outside" in all other threads, a test's own included."""
    names, frame = [], sys._getframe(1)
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(PRODUCT) and "/.venv/" not in file and "/tests/" not in file:
            line = "" if names else f"{file.removeprefix(PRODUCT)}:{frame.f_lineno} "
            names.append(line + frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    if names:
        return " < ".join(names)
    # autograd starts its threads in C++, and Python knows no function that they run
    is_autograd = isinstance(threading.current_thread(), threading._DummyThread)
    return "backward" if is_autograd else "outside"


class Machine:
    """A device and the host. `waits` and `problems` count by (kind, `where`), launches by the
    operator's name."""

    def __init__(self) -> None:
        self.clocks: dict[int, Clock] = {}
        self.host: Clock = {}
        # Per block of memory, by `born`: the times of each stream's last read and last write of
        # each cell.
        self.touched: dict[int, tuple[dict[int, np.ndarray], dict[int, np.ndarray]]] = {}
        # Copies under way between the device and pinned memory: (stream, time, the pinned tensor,
        # its value).
        self.downloads: list[tuple[int, int, Tensor, Tensor]] = []
        self.uploads: list[tuple[int, int, Tensor, Tensor]] = []
        self.waits: Counter = Counter()
        self.problems: Counter = Counter()
        self.launches: Counter = Counter()
        self.replays = self.captures = 0
        self.strict = True  # a problem is raised, not only counted
        self.capturing: int | None = None  # the stream
        self.ran: set[str] = set()  # kernels that have run, and so are loaded
        self.generator = torch.Generator()

    def problem(self, text: str) -> None:
        self.problems[text, where()] += 1
        if self.strict:
            raise Problem(f"{text} ({where()})")

    def refuse_in_capture(self, what: str) -> None:
        if self.capturing is not None:
            raise RuntimeError(
                f"CUDA error: operation not permitted when stream is capturing: {what} ({where()})"
            )

    def launch(self, name: str) -> Clock:
        """The clock of the current stream after one more launch, which is ordered after all that
        the host has waited for."""
        stream = device.stream()
        clock = self.clocks.setdefault(stream, {})
        join(clock, self.host)
        clock[stream] = clock.get(stream, 0) + 1
        self.launches[name] += 1
        return clock

    def wait(self, kind: str, clock: Clock) -> None:
        """The host waits until the device is as far as `clock`; copies that are done by then
        arrive."""
        self.refuse_in_capture(kind)
        self.waits[kind, where()] += 1
        join(self.host, clock)
        for stream, time, pinned, value in self.downloads:
            if time <= self.host.get(stream, 0):
                pinned.copy_(value)
        for stream, time, pinned, value in self.uploads:
            if time <= self.host.get(stream, 0) and not torch.equal(as_bytes(pinned), value):
                self.problem("pinned memory was written while a copy to the device read it")
        self.downloads = [copy for copy in self.downloads if copy[1] > self.host.get(copy[0], 0)]
        self.uploads = [copy for copy in self.uploads if copy[1] > self.host.get(copy[0], 0)]

    def wait_for_stream(self, kind: str) -> None:
        self.wait(kind, self.clocks.get(device.stream(), {}))

    def wait_for_all(self) -> None:
        everything: Clock = {}
        for clock in self.clocks.values():
            join(everything, clock)
        self.wait("synchronize", everything)

    def access(self, x: Tensor, write: bool, clock: Clock, index: list | None = None) -> None:
        """A kernel of the current stream, launched at `clock`, reads or writes x, a CPU tensor on
        device memory, or x[index]. It is a race if another stream has written it, or read what is
        written now, and nothing orders the two."""
        block = device.block_of(x.untyped_storage().data_ptr()) if x.numel() else None
        if block is None:
            return
        stream, (base, size, *_, born) = device.stream(), block
        if born not in self.touched:
            for gone in device.released():
                self.touched.pop(gone, None)
        reads, writes = self.touched.setdefault(born, ({}, {}))
        at = cells(x, base, index)
        for verb, others in (
            (("written", writes), ("read", reads)) if write else (("written", writes),)
        ):
            for other, times in others.items():
                if other != stream and int(times[at].max()) > clock.get(other, 0):
                    access = "writes" if write else "reads"
                    self.problem(
                        f"stream {stream} {access} what stream {other} has {verb}, without waiting for it"
                    )
        times = (writes if write else reads).setdefault(
            stream, np.zeros(size // CELL, dtype=np.int32)
        )
        times[at] = clock[stream]


def cells(x: Tensor, base: int, index: list | None) -> slice | np.ndarray:
    """The cells, of the block at address `base`, that hold the elements of x, or of x[index]."""
    start, item = x.untyped_storage().data_ptr() - base, x.element_size()
    if index is None and x.is_contiguous():
        first = start + x.storage_offset() * item
        return slice(first // CELL, -(-(first + x.numel() * item) // CELL))
    elements = torch.arange(x.untyped_storage().nbytes() // item, device="cpu")
    elements = elements.as_strided(x.size(), x.stride(), x.storage_offset())
    if index is not None:
        elements = torch.ops.aten.index.Tensor(elements, index)
    begins = start + elements.reshape(-1) * item
    return torch.cat([(begins + part) // CELL for part in range(0, max(item, CELL), CELL)]).numpy()


def as_bytes(x: Tensor) -> Tensor:
    """A copy of a CPU tensor's bytes."""
    return x.detach().clone().contiguous().reshape(-1).view(torch.uint8)


machine = Machine()
