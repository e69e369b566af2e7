"""Other programs timed in turns with ours (`scripts/bench.py peers`), each a process of scripts/peer.py."""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tinystory.run.device import cpu_has_bf16
from tinystory.run.errors import UserError
from tinystory.run.paths import ROOT
from tinystory.studies.timing import PROMPT, WORK, Setup

PEERS = {"pretrain": "nanogpt", "rollout": "transformers", "ppo": "trl"}  # by work


class Peer:
    """A process of scripts/peer.py, whose standard error is ours. Raises UserError if it ends."""

    def __init__(self, python: str, name: str, settings: dict[str, Any]):
        argv, pipe = [python, str(ROOT / "scripts/peer.py"), name, json.dumps(settings)], subprocess.PIPE
        self.name, self.process = name, subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True)

    def run(self) -> float:
        """The seconds of a run."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its output has ended too
            print("run", file=self.process.stdin, flush=True)
        if line := self.process.stdout.readline():
            return float(line)
        raise UserError(f"the peer {self.name} ended with status {self.process.wait()}: its message is above")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


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
    for work, peer in PEERS.items():
        python = (sys.executable if nanogpt else None) if peer == "nanogpt" else trl
        if not python:
            continue
        make_run, key, batches = WORK[work]
        setup = dataclasses.replace(setup, batch=batches[shape])
        run = make_run(setup, optimizer=optimizer) if work == "pretrain" else make_run(setup)
        settings = dict(model=dataclasses.asdict(setup.config), batch=setup.batch, new=setup.new, prompt=PROMPT)
        settings |= dict(threads=torch.get_num_threads(), repo=str(nanogpt))
        # TRL computes in float32; without hardware bfloat16 is emulated, and a step takes thirty times as long.
        dtypes = ("float32", "bfloat16") if peer != "trl" and cpu_has_bf16() else ("float32",)
        with contextlib.ExitStack() as stack:
            peers = {dtype: Peer(str(python), peer, settings | {"dtype": dtype}) for dtype in dtypes}
            for process in peers.values():
                stack.callback(process.close)
            laps = []
            for _ in tqdm(range(runs + 1), desc=f"{peer} and ours", unit="turn", disable=None):
                laps.append([run()[key], *(process.run() for process in peers.values())])
        ours_s, *peer_s = (statistics.median(column) for column in zip(*laps[1:], strict=True))  # the first warms up
        best = peer_s.index(min(peer_s))
        ratio = statistics.median(lap[1 + best] / lap[0] for lap in laps[1:])
        results[work] = dict(batch=setup.batch, ours_s=round(ours_s, 4), peer=peer, best=dtypes[best])
        results[work] |= dict(
            ratio=round(ratio, 2), peer_s=dict(zip(dtypes, (round(s, 4) for s in peer_s), strict=True))
        )
    return results
