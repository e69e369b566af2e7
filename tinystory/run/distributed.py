"""Data parallelism under torchrun: a few collectives, without a wrapper around the model.

Every process holds the whole student and optimiser and computes a shard of a step's rows. Gradients
are summed and all processes take the same optimiser step, so the result equals the result of one
process, up to the order of sums. Only rank 0 sends requests to the teacher, prints and writes.
Without torchrun there is one process, and all functions here are no-ops."""

import atexit
import contextlib
import datetime
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tinystory.run.errors import TORCHRUN, Interrupted, Stop, UserError
from tinystory.run.folder import locked_run
from tinystory.run.log import RunLog

T = TypeVar("T")
Rows = TypeVar("Rows", Tensor, list)
# timeout of a collective: other ranks wait while rank 0 waits for the teacher
TIMEOUT = datetime.timedelta(hours=6)
_is_alone = False  # whether rank 0 is inside the `make` of rank0_value


def start(device: str) -> None:
    """Join torchrun's process group. On GPUs ("auto" or "cuda") each process takes the GPU of its
    local rank. Raises UserError unless there is one GPU per process."""
    if dist.is_initialized() or not all(name in os.environ for name in TORCHRUN):
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        processes = int(os.environ["LOCAL_WORLD_SIZE"])
        gpus = torch.cuda.device_count()
        if processes > gpus or device not in ("auto", "cuda"):
            raise UserError(
                f"{processes} processes need one GPU each, and this machine has "
                f"{gpus}: set --nproc-per-node to {gpus} and leave --device out, or give --device "
                "cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)
    if not is_rank0():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank0() -> bool:
    return rank() == 0


def require_one_each(flag: str, count: int) -> None:
    """Raises UserError unless every process gets at least one row."""
    if count < world_size():
        raise UserError(f"{flag} must be at least {world_size()}, the number of processes")


def shard_strided(rows: Rows) -> Rows:
    """Every world_size()-th row of a list or tensor, from this process's rank on."""
    return rows[rank() :: world_size()]


def shard_contiguous(count: int) -> range:
    """This process's contiguous part of range(count); the parts are in the order of the ranks."""
    start = count * rank() // world_size()
    stop = count * (rank() + 1) // world_size()
    return range(start, stop)


def all_reduce_sum(x: Tensor) -> Tensor:
    """x, summed in place over the processes."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_max(x: float) -> float:
    if world_size() == 1:
        return x
    largest = torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def all_reduce_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum every parameter's gradient over the processes, in one message. A missing gradient counts
    as zero."""
    if world_size() == 1:
        return
    grads = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
    message = torch.cat([grad.flatten() for grad in grads])
    sums = all_reduce_sum(message).split([grad.numel() for grad in grads])
    for grad, total in zip(grads, sums, strict=True):
        grad.copy_(total.view_as(grad))


def broadcast_from_rank0(tensors: Iterable[Tensor]) -> None:
    if world_size() == 1:
        return
    for x in tensors:
        dist.broadcast(x.detach(), 0)


def rank0_value(make: Callable[[], T]) -> T:
    """The value of `make()`, which runs only on rank 0, on every rank. A UserError or Interrupted
    from `make` is raised on every rank. Inside `make`, where only rank 0 is, this calls its
    argument."""
    global _is_alone
    if world_size() == 1 or _is_alone:
        return make()
    message: list[Any] = [None, None]  # the value, and the error
    if is_rank0():
        _is_alone = True
        try:
            message[0] = make()
        except (UserError, Interrupted) as error:
            message[1] = error
        finally:
            _is_alone = False
    dist.broadcast_object_list(message, 0)
    value, failure = message
    if failure is not None:
        raise failure
    return value


def rank0_first(make: Callable[[], T]) -> T:
    """The value of `make()` on this rank. `make` runs on rank 0 first, then on the other ranks. An
    error on rank 0 is raised on every rank."""
    values: list[T] = []  # not broadcast: other processes may be unable to use rank 0's value
    rank0_value(lambda: values.append(make()))
    return values[0] if values else make()


def stop_signal(stop: Stop) -> int:
    """The number of a signal to stop that any process has received, which stops all processes; 0
    without one."""
    return int(all_reduce_max(stop.requested))


def end_if_stopped(stop: Stop) -> None:
    """Raises KeyboardInterrupt if any process has received a signal to stop. Every process waits
    for the others, because torchrun ends all processes when the first one ends by a signal."""
    signum = stop_signal(stop)
    if signum:
        raise KeyboardInterrupt(signum)


@contextlib.contextmanager
def run_folder(config: Any) -> Iterator[Any]:
    """Context of `locked_run` on rank 0; yields rank 0's options on every rank. If each rank looked for
    itself, another command could change between two looks which folder is free, or which run is the
    newest."""
    with contextlib.ExitStack() as stack:
        yield rank0_value(lambda: stack.enter_context(locked_run(config)))


def open_log(folder: Path, resume_step: int | None, evaluated_before: int | None = None) -> RunLog:
    """The records of a run, which rank 0 writes, and cuts before another rank reads them. See
    `RunLog`."""
    return rank0_first(
        lambda: RunLog(
            folder,
            resume_step=resume_step,
            evaluated_before=evaluated_before,
            writes=is_rank0(),
        )
    )


def all_gather_list(items: list[T]) -> list[T]:
    """The lists of all processes, concatenated in rank order, on every rank."""
    if world_size() == 1:
        return items
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, items)
    return list(itertools.chain(*parts))
