"""The operators that PyTorch runs on the CPU in place of our kernels, because its matmul is faster.

`pick` times, once per build of the kernels and per dtype, the operators that are nearly all matmul, and keeps the
times beside the build. A run records the choice, like its dtype, and keeps it when resumed, so that its bits stay the
same. PyTorch's matmul does not promise what our kernels do: that a row's result depends on that row alone.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from timeit import timeit

import torch
from torch import Tensor

from tinystory import ops
from tinystory.ops import backend, build
from tinystory.ops.backend import Backend
from tinystory.run.errors import UserError
from tinystory.run.folder import atomic_write

NAMES = ("cross_entropy", "linear", "token_logprob")
MARGIN = 1.1  # by how much PyTorch must be faster: on a noisy machine equals should not change places
ROWS, WIDTH, VOCAB = 1024, 384, 4096  # timed sizes: between the demo's student and GPT-2-small
FILE = "fastest.json"


def pick(choice: str, dtype: torch.dtype, device: torch.device) -> str:
    """The operators that --pytorch-ops means here, with commas between, or "none": for backend.run_by_pytorch and for a
    run's record. auto means those that PyTorch runs faster. Raises UserError for an unknown operator."""
    names: list[str] = []
    if device.type == "cpu" and (module := ops.load()) and choice != "none":
        if choice != "auto":
            names = choice.split(",")
        elif backend.current().kernels == "auto":
            names = faster(Path(str(module.__file__)).parent, dtype)
    if unknown := set(names) - set(NAMES):
        raise UserError(f"--pytorch-ops {choice}: {unknown.pop()!r} is not one of {', '.join(NAMES)}, auto or none")
    return ",".join(names) or "none"


def faster(folder: Path, dtype: torch.dtype) -> list[str]:
    """The operators that PyTorch runs faster in this dtype, timed once per build of the kernels in `folder`."""
    with build.locked(folder):
        times = measured(folder)
        if (key := str(dtype).removeprefix("torch.")) not in times:
            print(f"tinystory: timing the kernels beside PyTorch in {key} ...", end=" ", file=sys.stderr, flush=True)
            start = time.monotonic()
            times[key] = {name: compare(name, *pair) for name, pair in pairs(dtype).items()}
            atomic_write(folder / FILE, json.dumps(times))
            print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return [name for name, ratio in times[key].items() if loses(ratio)]


def loses(ratio: float) -> bool:
    """Whether PyTorch runs an operator for which it takes `ratio` times our kernel's seconds."""
    return ratio < 1 / MARGIN


def measured(folder: Path) -> dict[str, dict[str, float]]:
    """What `faster` has measured, {dtype: {operator: PyTorch's seconds over ours}}. A new build empties the folder."""
    file = folder / FILE
    return json.loads(file.read_text()) if file.exists() else {}


def pairs(dtype: torch.dtype) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Two functions per operator, its forward and backward pass by our kernel and by PyTorch, on the same random
    numbers."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, up, down, embedding = (
        draw(n, k).mul_(k**-0.5 if n != ROWS else 1.0).requires_grad_()
        for n, k in ((ROWS, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (VOCAB, WIDTH))
    )
    bias = torch.zeros(4 * WIDTH, requires_grad=True), torch.zeros(WIDTH, requires_grad=True)
    targets = torch.randint(VOCAB, (ROWS,), generator=torch.Generator().manual_seed(0))

    def mlp() -> Tensor:
        return ops.linear(ops.linear(x, up, bias[0], gelu=True), down, bias[1], wide=True).square().mean()

    def run(forward: Callable[[], Tensor], *pytorch_ops: str) -> Callable[[], Tensor]:
        @torch.enable_grad()  # the first who asks may be an evaluation
        def lap() -> Tensor:
            x.grad = None
            with backend.using(Backend("ours", frozenset(pytorch_ops))):
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    loss = forward()
                loss.backward()
            assert x.grad is not None
            return torch.stack([loss.detach().float(), x.grad.norm()])

        return lap

    forward: dict[str, Callable[[], Tensor]] = {
        "cross_entropy": lambda: ops.cross_entropy(x, embedding, targets),
        "linear": mlp,
        "token_logprob": lambda: ops.token_logprob(x, embedding, targets)[0].mean(),
    }
    return {name: (run(f), run(f, name)) for name, f in forward.items()}


def compare(name: str, kernel: Callable[[], Tensor], pytorch: Callable[[], Tensor], runs: int = 5) -> float:
    """PyTorch's seconds over the kernel's: the least of each over runs in turn, after one to warm up; other programs
    only add to them. It is 0 if the results disagree, so that PyTorch runs the operator, and stderr says so."""
    a, b = kernel(), pytorch()
    if not torch.allclose(a, b, rtol=0.02):
        message = f"our kernel of {name} computes {a.tolist()} where PyTorch has {b.tolist()}, so PyTorch runs it"
        print(f"{message}; please report this processor", end=" ... ", file=sys.stderr, flush=True)
        return 0.0
    laps = [(timeit(kernel, number=1), timeit(pytorch, number=1)) for _ in range(runs)]
    ours, theirs = (min(seconds) for seconds in zip(*laps, strict=True))
    return round(theirs / ours, 2)
