"""Other programs timed in turns with ours (`scripts/bench.py peers`), each a process of scripts/peer.py."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from tinystory.run.device import cpu_has_bf16
from tinystory.run.errors import UserError
from tinystory.run.paths import ROOT
from tinystory.studies.timing import PROMPT, WORK, Setup

PEERS = {"pretrain": "nanogpt", "rollout": "transformers", "ppo": "trl"}  # by work


@contextlib.contextmanager
def peer(python: str, name: str, settings: dict[str, Any]) -> Iterator[Callable[[], float]]:
    """Yields what returns the seconds of a run in a process of scripts/peer.py, whose standard error is ours, and
    raises UserError if that has ended."""
    argv, pipe = [python, str(ROOT / "scripts/peer.py"), name, json.dumps(settings)], subprocess.PIPE
    process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True)

    def run() -> float:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its output has ended too
            print("run", file=process.stdin, flush=True)
        if line := process.stdout.readline():
            return float(line)
        raise UserError(f"the peer {name} ended with status {process.wait()}: its message is above")

    try:
        yield run
    finally:
        process.kill()
        process.communicate()


def require(nanogpt: Path | None, trl: Path | None, batch: int, device: torch.device) -> None:
    """Raises UserError for options with which peers cannot be timed."""
    if device.type != "cpu" or batch:
        raise UserError("peers are timed on the CPU, with the batch sizes of the published figures: leave out --batch")
    files = [path for path in (nanogpt and nanogpt / "model.py", trl) if path]
    if not files or not all(path.is_file() for path in files):
        raise UserError(
            "peers needs --nanogpt DIR, a clone of github.com/karpathy/nanoGPT with its model.py, or --trl PYTHON, the "
            "interpreter of an environment with trl 0.9.4 and transformers 4.53, or both"
        )


def compare(
    setup: Setup, shape: str, runs: int, nanogpt: Path | None, trl: Path | None, optimizer: str
) -> dict[str, dict[str, Any]]:
    """Per work that has a peer here: median seconds of ours and, by dtype, of the peer, which take turns, so that a
    machine's drift meets both; ratio, the median over the turns of the seconds of its faster dtype to ours (above 1:
    ours is faster)."""
    results: dict[str, dict[str, Any]] = {}
    pythons = {"nanogpt": sys.executable if nanogpt else None, "transformers": trl, "trl": trl}
    for work, name in PEERS.items():
        if not (python := pythons[name]):
            continue
        make_run, key, batches = WORK[work]
        setup = dataclasses.replace(setup, batch=batches[shape])
        ours = make_run(setup, optimizer=optimizer) if work == "pretrain" else make_run(setup)
        settings = dict(model=dataclasses.asdict(setup.config), batch=setup.batch, new=setup.new, prompt=PROMPT)
        settings |= dict(threads=torch.get_num_threads(), repo=str(nanogpt))
        # TRL computes in float32; without hardware bfloat16 is emulated, and a step takes thirty times as long.
        dtypes = ("float32", "bfloat16") if name != "trl" and cpu_has_bf16() else ("float32",)
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(peer(str(python), name, settings | {"dtype": dtype})) for dtype in dtypes]
            turns = tqdm(range(runs + 1), desc=f"{name} and ours", unit="turn", disable=None)
            laps = [[ours()[key], *(run() for run in peers)] for _ in turns][1:]  # the first warms up
        ours_s, *peer_s = (round(median(column), 4) for column in zip(*laps, strict=True))
        best = peer_s.index(min(peer_s))
        ratio = round(median(lap[1 + best] / lap[0] for lap in laps), 2)
        by_dtype = dict(zip(dtypes, peer_s, strict=True))
        results[work] = dict(
            batch=setup.batch, ours_s=ours_s, peer=name, best=dtypes[best], ratio=ratio, peer_s=by_dtype
        )
    return results
