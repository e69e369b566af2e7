"""Other programs timed in turns with ours (`scripts/bench.py peers`), each a process of scripts/peer.py."""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tinystory.run.device import cpu_has_bf16
from tinystory.run.errors import UserError
from tinystory.run.paths import ROOT
from tinystory.studies.timing import PROMPT, WORK, Setup, gemm_limit

HOPELESS = 3.0  # a mode that takes so many times the fastest one's seconds is measured once
DTYPES = ("float32", "bfloat16")
PEERS = {  # work: the peer and its modes
    "pretrain": ("nanogpt", tuple(f"{kind}-{dtype}" for kind in ("eager", "compile") for dtype in DTYPES)),
    "rollout": ("transformers", DTYPES),
    "ppo": ("trl", ("",)),
}


class Peer:
    """A process of scripts/peer.py, ready to run. Raises UserError, with its last line of stderr, if it ends."""

    def __init__(self, python: str, *arguments: str):
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process)
        argv, pipe = [python, str(ROOT / "scripts/peer.py"), *arguments], subprocess.PIPE
        self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=self.stderr, text=True)
        self.name = arguments[0]
        self.warm_s = self.seconds()

    def seconds(self) -> float:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.stderr.seek(0)
            last = (self.stderr.read().strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the peer {self.name} ended with status {self.process.returncode}: {last}")
        return float(line)

    def run(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return self.seconds()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def take_turns(
    ours: Callable[[], float],
    python: str,
    peer: str,
    modes: Sequence[str],
    arguments: list[str],
    runs: int,
) -> dict[str, Any]:
    """Median seconds of ours and of each mode of the peer, which take turns, so that a machine's drift meets both; and
    ratio, the median over the turns of the seconds of the best mode to ours (above 1: ours is faster)."""
    with ExitStack() as stack:
        peers: dict[str, Peer] = {}
        for mode in tqdm(modes, desc=f"{peer}: warm-up", unit="mode", disable=None):
            peers[mode] = Peer(python, peer, "--mode", mode, *arguments)
            stack.callback(peers[mode].close)
        best_s = min(process.warm_s for process in peers.values())
        laps: dict[str, list[float]] = {mode: [] for mode, p in peers.items() if p.warm_s < HOPELESS * best_s}
        ours()  # a warm-up
        own = []
        for _ in tqdm(range(runs), desc=f"{peer}: in turns with ours", unit="turn", disable=None):
            own.append(ours())
            for mode, seconds in laps.items():
                seconds.append(peers[mode].run())
    medians = {mode: statistics.median(laps.get(mode) or [process.warm_s]) for mode, process in peers.items()}
    best = min(laps, key=medians.__getitem__)
    ratio = statistics.median(other / our for other, our in zip(laps[best], own, strict=True))
    row: dict[str, Any] = dict(ours_s=round(statistics.median(own), 4), peer=peer, best=best, ratio=round(ratio, 2))
    return row | dict(peer_s={mode: round(seconds, 4) for mode, seconds in medians.items()})


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
    """Per work that has a peer here the result of take_turns, and tokens per second beside those of the GEMMs
    alone."""
    results = {}
    for work, (peer, modes) in PEERS.items():
        python = str(trl or "") if peer != "nanogpt" else sys.executable if nanogpt else ""
        if not python:
            continue
        if not cpu_has_bf16():  # emulated: a step takes thirty times as long
            modes = tuple(mode for mode in modes if not mode.endswith("bfloat16"))
        make_run, key, batches = WORK[work]
        setup = dataclasses.replace(setup, batch=batches[shape])
        run = make_run(setup, optimizer=optimizer) if work == "pretrain" else make_run(setup)
        sizes = dict(batch=setup.batch, new=setup.new, prompt=PROMPT, threads=torch.get_num_threads(), repo=nanogpt)
        arguments = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        arguments += ["--model", json.dumps(dataclasses.asdict(setup.config))]
        row: dict[str, Any] = dict(batch=setup.batch)
        row |= take_turns(lambda: run()[key], python, peer, modes, arguments, runs)  # noqa: B023
        if work != "ppo":
            tokens = setup.batch * (setup.config.context if work == "pretrain" else setup.new)
            row |= dict(tokens_per_s=round(tokens / row["ours_s"], 1), gemm_limit_tokens_per_s=gemm_limit(work, setup))
        results[work] = row
    return results
