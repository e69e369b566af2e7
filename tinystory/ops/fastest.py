"""Which operators PyTorch runs on the CPU in place of our kernels: those that its matmul makes faster.

`pick` measures, once per build of the kernels and per dtype, the operators that are nearly all matmul, and keeps the
answer beside the build. A run records it, like its dtype, and keeps it when resumed, so that its bits stay the same.
PyTorch's matmul does not promise what our kernels do: that a row's result depends on that row alone.
"""

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tinystory import ops
from tinystory.ops import build
from tinystory.run.errors import UserError

NAMES = ("cross_entropy", "linear", "token_logprob")
MARGIN = 1.1  # by how much PyTorch must be faster: on a noisy machine equals should not change places
ROWS, WIDTH, VOCAB = 1024, 384, 4096  # of the measurement: between the demo's student and GPT-2-small
FILE = "fastest.json"


def pick(wanted: str, dtype: torch.dtype, device: torch.device) -> str:
    """What --pytorch-ops means here, for ops.run_by_pytorch and for a run's record: operators with commas between, or
    none. auto are those measured to be faster. Raises UserError for an unknown operator."""
    if device.type != "cpu" or not (module := ops.load()):
        names: list[str] = []
    elif wanted == "auto" and os.environ.get("TINYSTORY_KERNELS") == "ours":
        names = []
    elif wanted == "auto":
        names = faster(Path(str(module.__file__)).parent, dtype)
    else:
        names = [] if wanted == "none" else wanted.split(",")
    if unknown := set(names) - set(NAMES):
        raise UserError(f"--pytorch-ops {wanted}: {unknown.pop()!r} is not one of {', '.join(NAMES)}, auto or none")
    return ",".join(names) or "none"


def faster(folder: Path, dtype: torch.dtype) -> list[str]:
    """The operators that PyTorch runs faster in this dtype, as measured when the kernels in `folder` were built."""
    with build.locked(folder):
        built = (folder / "built").stat().st_mtime_ns
        known = measured(folder)
        if known.get("built") != built:
            known = {"built": built}
        if (key := str(dtype).removeprefix("torch.")) not in known:
            print(f"tinystory: timing the kernels beside PyTorch in {key} ...", end=" ", file=sys.stderr, flush=True)
            began = time.monotonic()
            known[key] = {name: compare(name, *pair) for name, pair in pairs(dtype).items()}
            (folder / FILE).write_text(json.dumps(known))
            print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    return [name for name, ratio in known[key].items() if loses(ratio)]


def loses(ratio: float) -> bool:
    """Whether PyTorch runs an operator for which it takes `ratio` times our kernel's seconds."""
    return ratio < 1 / MARGIN


def measured(folder: Path) -> dict[str, Any]:
    """What `faster` wrote: {"built": its time, dtype: {operator: PyTorch's seconds over ours}}; {} if not readable."""
    try:
        known = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def pairs(dtype: torch.dtype) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Per operator: forward and backward pass by our kernels, and by PyTorch, on the same random numbers."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, up, down, embedding = (
        draw(n, k).mul_(k**-0.5 if n != ROWS else 1.0).requires_grad_()
        for n, k in ((ROWS, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (VOCAB, WIDTH))
    )
    bias = torch.zeros(4 * WIDTH, requires_grad=True), torch.zeros(WIDTH, requires_grad=True)
    targets = torch.randint(VOCAB, (ROWS,), generator=torch.Generator().manual_seed(0))
    residual = torch.zeros(ROWS, WIDTH)

    def mlp() -> Tensor:
        return ops.linear(ops.linear(x, up, bias[0], gelu=True), down, bias[1], residual=residual).square().mean()

    def run(forward: Callable[[], Tensor], by: frozenset[str]) -> Callable[[], Tensor]:
        def lap() -> Tensor:
            x.grad = None
            with mock.patch.object(ops, "by_pytorch", by), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                value = forward()
            value.backward()
            assert x.grad is not None
            return torch.stack([value.detach().float(), x.grad.norm()])

        return lap

    work: dict[str, Callable[[], Tensor]] = {
        "cross_entropy": lambda: ops.cross_entropy(x, embedding, targets),
        "linear": mlp,
        "token_logprob": lambda: ops.token_logprob(x, embedding, targets)[0].mean(),
    }
    return {name: (run(forward, frozenset()), run(forward, frozenset([name]))) for name, forward in work.items()}


def compare(name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], runs: int = 3) -> float:
    """PyTorch's seconds over ours, the median over runs in turn, after one to warm up. If these disagree it is 0, so
    that PyTorch runs the operator, and stderr says so."""
    a, b = ours(), theirs()
    if not torch.allclose(a, b, rtol=0.02):
        said = f"our kernel of {name} computes {a.tolist()} where PyTorch has {b.tolist()}, so PyTorch runs it"
        print(f"{said}; please report this processor", end=" ... ", file=sys.stderr, flush=True)
        return 0.0
    laps = []
    for _ in range(runs):
        times = []
        for f in (ours, theirs):
            began = time.perf_counter()
            f()
            times.append(time.perf_counter() - began)
        laps.append(times[1] / times[0])
    return round(statistics.median(laps), 2)
