"""What others run instead, timed in turns with ours (`scripts/bench.py peers`): each a process of scripts/peer.py."""

import statistics
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

from tinystory.run.errors import UserError
from tinystory.run.paths import ROOT

HOPELESS = 3.0  # a mode that takes so many times the fastest one's seconds is measured once


class Peer:
    """A process of scripts/peer.py, ready to run. Raises UserError, with what it said, if it ends."""

    def __init__(self, python: str, *arguments: str):
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process)
        self.process = subprocess.Popen(
            [python, str(ROOT / "scripts/peer.py"), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True,
        )  # fmt: skip
        self.name = arguments[0]
        self.warm_s = float(self.answer())

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.said.seek(0)
            last = (self.said.read().strip().splitlines() or ["nothing"])[-1]
            raise UserError(f"the peer {self.name} ended with status {self.process.returncode} and said: {last}")
        return line

    def run(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return float(self.answer())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def take_turns(
    ours: Callable[[], float], python: str, peer: str, modes: tuple[str, ...], arguments: list[str], runs: int,
    quiet: bool,
) -> dict:  # fmt: skip
    """Median seconds of ours and of each mode of the peer, which take turns, so that a machine's drift meets both; and
    ratio, the median over the turns of the seconds of the best mode to ours (above 1: ours is faster)."""
    with ExitStack() as stack:
        waiting: dict[str, Peer] = {}
        for mode in tqdm(modes, desc=f"{peer}: warm-up", unit="mode", disable=quiet):
            waiting[mode] = Peer(python, peer, "--mode", mode, *arguments)
            stack.callback(waiting[mode].close)
        best_s = min(p.warm_s for p in waiting.values())
        turns: dict[str, list[float]] = {mode: [] for mode, p in waiting.items() if p.warm_s < HOPELESS * best_s}
        ours()  # a warm-up
        own = []
        for _ in tqdm(range(runs), desc=f"{peer}: in turns with ours", unit="turn", disable=quiet):
            own.append(ours())
            for mode, laps in turns.items():
                laps.append(waiting[mode].run())
    theirs = {mode: statistics.median(turns.get(mode) or [p.warm_s]) for mode, p in waiting.items()}
    best = min(turns, key=theirs.__getitem__)
    ratio = statistics.median(other / our for other, our in zip(turns[best], own, strict=True))
    found: dict = dict(ours_s=round(statistics.median(own), 4), peer=peer, best=best, ratio=round(ratio, 2))
    return found | dict(peer_s={mode: round(s, 4) for mode, s in theirs.items()})


def check(nanogpt: Path | None, trl: Path | None, batch: int | None, device: torch.device) -> None:
    if device.type != "cpu" or batch is not None:
        raise UserError("peers are timed on the CPU, with the batch sizes of the published figures: leave out --batch")
    if not (nanogpt or trl):
        raise UserError("peers needs --nanogpt DIR (a clone), --trl PYTHON (of an environment with trl 0.9.4), or both")
    if nanogpt and not (nanogpt / "model.py").is_file():
        raise UserError(f"--nanogpt {nanogpt} has no model.py: clone github.com/karpathy/nanoGPT")
    if trl and not trl.is_file():
        raise UserError(f"--trl {trl} is no file: name the Python of an environment with trl 0.9.4, transformers 4.53")


def table_row(bench: str, row: dict) -> str:
    theirs = f"{row['peer']} {row['best']}".strip() + f", {row['peer_s'][row['best']]:.3g} s"
    limit = f"{row['gemm_limit_tokens_per_s']:,.0f} tokens/s" if "gemm_limit_tokens_per_s" in row else ""
    speed = f", {row['tokens_per_s']:,.0f} tokens/s" if limit else ""
    return f"| {bench} | {row['ours_s']:.3g} s{speed} | {theirs} | {row['ratio']:.2f}x | {limit} |"
