"""Data parallel over the processes that torchrun starts: a handful of collectives, and no wrapper around the model.

Every process holds the whole student and optimiser. Each computes its share of a step's rows, gradients are summed, and
all take the same optimiser step, so N processes do what one does, but for the order of sums. The first process alone
talks to the teacher, prints and writes. Without torchrun there is one process and everything here does nothing.
"""

import atexit
import datetime
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tinystory.device import Interrupted
from tinystory.errors import UserError

T = TypeVar("T")
BUCKET = 1 << 24  # numbers summed at once: large enough to fill the wire, small beside the gradients
PATIENCE = datetime.timedelta(hours=6)  # others wait this long for the first, which waits for the teacher


def start(device: str) -> None:
    """Join the processes that torchrun started. On a GPU ("auto" or "cuda") each takes that of its local rank.

    Raises UserError if they cannot have one each."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        here, cards = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > cards or device not in ("auto", "cuda"):
            raise UserError(
                f"{here} processes need {here} GPUs, one each, and this machine has {cards}: set --nproc-per-node to "
                f"{cards} and leave --device out, or give --device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


def share(rows: T) -> T:
    """This process's part of a list or tensor: every world()-th row."""
    return rows[rank() :: world()]


def block(count: int) -> range:
    """This process's part of range(count), without gaps; the first process has the first."""
    return range(count * rank() // world(), count * (rank() + 1) // world())


def sum_(x: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def largest(x: float) -> float:
    """The largest over the processes."""
    if world() > 1:
        box = torch.tensor(x, dtype=torch.float64)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return float(box)
    return x


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum every parameter's gradient over the processes, a bucket of them at a time; none counts as zero."""
    if world() == 1:
        return
    bucket: list[Tensor] = []
    for p in [*parameters, None]:
        if p is None or sum(g.numel() for g in bucket) >= BUCKET:
            flat = sum_(torch.cat([g.flatten() for g in bucket]))
            for g, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(summed.view_as(g))
            bucket = []
        if p is not None:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            bucket.append(p.grad)


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Make the tensors those of the first process."""
    if world() > 1:
        for x in tensors:
            dist.broadcast(x.detach(), 0)


def from_first(make: Callable[[], T]) -> T:
    """What the first process alone makes, in every process; so is the UserError or Interrupted that it raises."""
    if world() == 1:
        return make()
    box: list[Any] = [None, None]
    if is_first():
        try:
            box[0] = make()
        except (UserError, Interrupted) as error:
            box[1] = error
    dist.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def together(make: Callable[[], T]) -> T:
    """What each process makes for itself, the first before the others; what the first raises stops them all."""
    made: list[T] = []
    from_first(lambda: made.append(make()))
    return made[0] if made else make()


def gather(items: list[T]) -> list[T]:
    """The lists of all processes, one after the other, in every process."""
    if world() == 1:
        return items
    lists: list[Any] = [None] * world()
    dist.all_gather_object(lists, items)
    return [item for each in lists for item in each]
