"""torch.cuda for the simulated device: streams, events and graphs, which move the machine's clocks.
`install` installs them, `install_project` the project's operators, `install_processes` the
collectives."""

import os
import threading
from types import SimpleNamespace
from typing import Any

from kernels import GRAPHS, OURS, copy_, mm_wide, run
from machine import Clock, device, join, machine

# isort: split
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Stream:
    count = 0

    def __init__(self, device: Any = None, priority: int = 0, *, number: int | None = None):
        if number is None:
            Stream.count += 1
            number = Stream.count
        self.stream_id = number

    @property
    def clock(self) -> Clock:
        return machine.clocks.setdefault(self.stream_id, {})

    def wait_event(self, event: "Event") -> None:
        join(self.clock, event.clock)

    def wait_stream(self, other: "Stream") -> None:
        join(self.clock, other.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        machine.wait("stream", self.clock)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.stream_id == other.stream_id

    def __hash__(self) -> int:
        return self.stream_id


class Event:
    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ):
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict(machine.host)
        join(self.clock, (stream or current_stream()).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        machine.wait("event", self.clock)

    def query(self) -> bool:
        return all(machine.host.get(stream, 0) >= time for stream, time in self.clock.items())

    def elapsed_time(self, other: "Event") -> float:
        return 1.0  # there is no time


def current_stream(_: Any = None) -> Stream:
    return Stream(number=device.stream())


class on_stream:  # torch.cuda.stream
    def __init__(self, stream: Stream | None):
        self.stream = stream

    def __enter__(self) -> None:
        self.before = device.stream()
        if self.stream is not None:
            device.set_stream(self.stream.stream_id)

    def __exit__(self, *_: object) -> None:
        device.set_stream(self.before)


class CUDAGraph:
    """Records what a stream launches between capture_begin and capture_end, and leaves no result of
    it. A replay runs the same kernels on the same addresses."""

    pools = 0

    def __init__(self, keep_graph: bool = False):
        self.kernels: list[tuple] = []
        # blocks that are not of the graph's own pool, and their generations
        self.borrowed: dict[int, int] = {}
        self.ended = False

    def capture_begin(
        self, pool: tuple[int, int] | None = None, capture_error_mode: str = "global"
    ) -> None:
        self.stream = device.stream()
        if self.stream == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        if capture_error_mode == "global" and threading.active_count() > 1:
            machine.problem("a capture forbids the device to the other threads, and there are some")
        assert machine.capturing is None, "one capture at a time"
        CUDAGraph.pools += pool is None
        self.own_pool = pool or (0, CUDAGraph.pools)
        GRAPHS[self.stream], machine.capturing = self, self.stream
        device.begin_capture(self.stream, self.own_pool[1])

    def record(
        self, kernel: Any, arguments: tuple, outputs: list[Tensor], accesses: list[tuple]
    ) -> None:
        for x, *_ in accesses:
            block = device.block_of(x.untyped_storage().data_ptr()) if x.numel() else None
            if block and block[2] != self.own_pool[1]:
                self.borrowed[block[0]] = block[3]
        self.kernels.append((kernel, arguments, outputs, accesses))

    def capture_end(self) -> None:
        del GRAPHS[self.stream]
        machine.capturing, self.ended = None, True
        machine.captures += 1
        device.end_capture()

    def pool(self) -> tuple[int, int]:
        return self.own_pool

    def replay(self) -> None:
        assert self.ended, "a graph is replayed after its capture"
        machine.replays += 1
        for base, generation in self.borrowed.items():
            if (device.block_of(base) or ())[3:5] != (generation, True):
                machine.problem("a graph uses memory that has been freed since its capture")
        clock = machine.launch("graph")
        for kernel, (args, kwargs), outputs, accesses in self.kernels:
            for x, write, index in [*accesses, *((x, True, None) for x in outputs)]:
                machine.access(x, write, clock, index)
            results = [
                x for x in pytree.tree_leaves(kernel(*args, **kwargs)) if isinstance(x, Tensor)
            ]
            if len(results) != len(outputs):  # some are arguments, written in place
                results = [
                    x
                    for x in results
                    if not any(x is a for a in pytree.tree_leaves((args, kwargs)))
                ]
            for output, x in zip(outputs, results, strict=True) if outputs else ():
                output.copy_(x)

    def reset(self) -> None:
        self.kernels = []


_libraries: list[Any] = []  # kept, because a kernel is unregistered when its library is deleted


def install(capability: tuple[int, int] = (8, 0)) -> None:
    """Make torch believe in one device of this compute capability."""
    everything, aten_kernels = (
        torch.library.Library("_", "IMPL"),
        torch.library.Library("aten", "IMPL"),
    )
    everything.fallback(run, "CUDA")
    aten_kernels.impl("copy_", copy_, "CUDA")
    _libraries.extend([everything, aten_kernels])
    properties = SimpleNamespace(
        name="simulated",
        total_memory=8 << 30,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=8,
        L2_cache_size=1 << 20,
    )
    in_place: dict[str, Any] = dict(
        Stream=Stream,
        Event=Event,
        CUDAGraph=CUDAGraph,
        stream=on_stream,
        current_stream=current_stream,
        default_stream=lambda _=None: Stream(number=0),
        synchronize=lambda _=None: machine.wait_for_all(),
        is_current_stream_capturing=lambda: machine.capturing == device.stream(),
        _sleep=lambda cycles: None,
        _lazy_init=lambda: None,
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda _: None,
        _is_in_bad_fork=lambda: False,
        empty_cache=lambda: None,
        is_bf16_supported=lambda *_, **__: capability >= (8, 0),
        get_device_capability=lambda _=None: capability,
        get_device_name=lambda _=None: properties.name,
        get_device_properties=lambda _=None: properties,
        get_rng_state=lambda _="cuda": machine.generator.get_state(),
        set_rng_state=lambda state, _="cuda": machine.generator.set_state(state),
        manual_seed=lambda seed: machine.generator.manual_seed(seed),
        manual_seed_all=lambda seed: machine.generator.manual_seed(seed),
        memory_allocated=lambda _=None: device.memory()[0],
        max_memory_allocated=lambda _=None: device.memory()[1],
        memory_reserved=lambda _=None: device.memory()[2],
        reset_peak_memory_stats=lambda _=None: device.reset_peak(),
        mem_get_info=lambda _=None: (6 << 30, 8 << 30),
    )
    for name, value in in_place.items():
        setattr(torch.cuda, name, value)


def install_project(kernels: str = "") -> None:
    """The project's operators on the device: the CPU's kernels, or the CUDA ones in a library of
    kernel_library."""
    from tinystory.ops import backend, cuda

    # there is nothing to compile
    cuda.load = cuda.load_attention = lambda *_: None
    if backend.load() is None:  # TINYSTORY_KERNELS=reference
        return
    if kernels:  # their binding, compiled for CPU tensors, replaces the CPU's
        torch.ops.load_library(kernels)
        gemm = torch.library.Library("aten", "IMPL")
        gemm.impl("mm.dtype", mm_wide, "CPU")
        gemm.impl(
            "mm.dtype_out", lambda a, b, dtype, *, out: out.copy_(mm_wide(a, b, dtype)), "CPU"
        )
        _libraries.append(gemm)
    ours = torch.library.Library("tinystory", "IMPL")
    for name in OURS:
        op = getattr(torch.ops.tinystory, name).default
        ours.impl(name, lambda *args, op=op, **kwargs: run(op, *args, **kwargs), "CUDA")
    _libraries.append(ours)


def install_processes() -> None:
    """Under torchrun: one device per process of this machine, which the process calls cuda:0, and
    NCCL's collectives by gloo."""
    import torch.distributed as dist

    torch.cuda.device_count = lambda: int(os.environ["LOCAL_WORLD_SIZE"])
    start = dist.init_process_group
    dist.init_process_group = lambda backend, **options: start("gloo", **options)

    def on_device(name: str) -> None:
        collective = getattr(dist, name)

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not x.is_cuda:
                return collective(x, *args, **kwargs)
            alias = device.as_cpu(x, True)
            machine.access(alias, True, machine.launch(name))
            return collective(alias, *args, **kwargs)

        setattr(dist, name, call)

    on_device("all_reduce"), on_device("broadcast")
