"""The parts of an experiment: runs of the two train commands, several at a time, each run to its end once.

Whether a part is finished is read from its folder, so there is no other state that a kill could leave inconsistent.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tinystory.config import INTERACT_PRESETS, PRETRAIN_PRESETS
from tinystory.data.babylm import milestone_name
from tinystory.report.page import duration
from tinystory.run.errors import UserError
from tinystory.run.folder import CONFIG, METRICS, SAMPLES, Record, atomic_write, parse_object, read_config
from tinystory.run.paths import ROOT
from tinystory.student import checkpoint

MILLION = 10**6
# Options that may differ between calls, because an experiment may move to another folder or device.
NO_SETTINGS = ("init", "reward", "teacher_url", "device")


@dataclass(frozen=True)
class Part:
    """One run of a train command. options: those that differ from the preset; start: words that the student read before
    (0 for pretraining); seed: of the interaction, else 0."""

    arm: str
    start: int
    seed: int
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.arm}/{self.start // MILLION}M-{self.seed}" if self.start else self.arm

    @property
    def reads(self) -> bool:
        return self.arm in ("pretrain", "reading")

    def command(self, out: Path, preset: str) -> list[str]:
        script = ROOT / ("train_pretrain.py" if self.reads else "train_interact.py")
        words = [sys.executable, str(script), "--preset", preset, "--out", str(out / self.name)]
        defaults = (PRETRAIN_PRESETS if self.reads else INTERACT_PRESETS)[preset]
        for name, value in self.options.items():
            flag = name.replace("_", "-")
            if name in defaults and value == defaults[name]:  # some of which are no flags
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
        return words

    def fraction_done(self, out: Path) -> float:
        """The fraction done, 0..1, from its metrics; 1 only if it is finished."""
        folder = out / self.name
        if self.reads:
            newest = checkpoint.newest(folder)
            if newest and checkpoint.read_counters(newest).get("words", 0) >= self.options["words"]:
                return 1.0
        elif (folder / SAMPLES).exists():  # the last file that an interaction writes
            return 1.0
        last = last_record(folder / METRICS)
        if self.reads:
            return min(0.99, max(0, last.get("words", 0) - self.start) / (self.options["words"] - self.start))
        return min(0.99, last.get("step", 0) / self.options["steps"])

    @property
    def work(self) -> float:
        """Estimated cost, in words of forward and backward passes; used for the remaining time only."""
        if self.reads:
            return self.options["words"] - self.start
        return self.options["steps"] * self.options["stories_per_step"] * 90 * (1 + self.options["epochs"])


def last_record(path: Path) -> Record:
    """The last complete record of a JSON Lines file, without reading the rest; {} if there is none."""
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().split(b"\n")[:-1]  # the text after the last line break is incomplete
    try:
        return parse_object(lines[-1]) if lines else {}
    except ValueError:  # for the reader of the whole file to complain about
        return {}


def require_same_settings(part: Part, out: Path) -> None:
    """Raises UserError if the part's folder holds a run with other settings."""
    folder = out / part.name
    recorded = read_config(folder).get("options", {})
    for name, value in part.options.items():
        if name not in NO_SETTINGS and recorded.get(name, value) != value:
            raise UserError(
                f"{folder} was run with {name} {recorded[name]}, not {value}: choose another --out or delete it"
            )


def make_ready(part: Part, out: Path) -> list[str]:
    """Prepare a part's folder for a start or a resume; returns the flag to run it with."""
    folder = out / part.name
    if checkpoint.newest(folder):
        return ["--resume"]
    shutil.rmtree(folder, ignore_errors=True)  # killed before its first checkpoint
    if part.arm != "reading":
        return []
    name = milestone_name(part.start)
    known = read_config(out / "pretrain")
    folder.mkdir(parents=True)
    atomic_write(folder / CONFIG, json.dumps(known | {"options": known["options"] | part.options}))
    partial = folder / "checkpoints" / f".{name}"
    shutil.copytree(out / "pretrain" / "checkpoints" / name, partial)
    partial.rename(partial.with_name(name))
    return ["--resume"]


def run_parts(parts: Sequence[Part], out: Path, preset: str, jobs: int, lock: int, progress: "Progress") -> None:
    """Run the unfinished parts, `jobs` at a time, each with a log file in OUT/logs. lock: from `locked`.

    Raises UserError if one of them fails. However this function ends, it terminates the others, which first save a
    checkpoint."""
    waiting = []
    for part in parts:
        require_same_settings(part, out)
        if part.fraction_done(out) < 1:
            waiting.append(part)
        else:
            progress.skip(part.name)
    running: list[tuple[Part, subprocess.Popen[bytes], float]] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                part = waiting.pop(0)
                words = part.command(out, preset) + make_ready(part, out)
                with open(log_file(out, part), "ab") as log:
                    # In its own session, so that Ctrl-C reaches only us, and we pass it on. It inherits the lock.
                    process = subprocess.Popen(
                        words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(part),
                        pass_fds=(lock,), start_new_session=True,
                    )  # fmt: skip
                running.append((part, process, time.monotonic()))
            time.sleep(0.3)
            for each in list(running):
                part, process, began = each
                ended = process.poll() is not None
                fraction = part.fraction_done(out)
                progress.at(part.name, fraction)
                if ended:
                    running.remove(each)
                    if fraction < 1:
                        raise UserError(
                            f"{part.name} ended with exit code {process.returncode} before it was done; "
                            f"{log_file(out, part)} says why; the same command continues from there"
                        )
                    progress.done(part.name, time.monotonic() - began)
    finally:
        for _, process, _ in running:
            process.terminate()
        for _, process, _ in running:
            process.wait()


def environment(part: Part) -> dict[str, str]:
    """The environment of a part: a single thread for parts that run in parallel, whatever --jobs, since the number of
    threads changes the order of sums and so the rounding."""
    alone = part.arm == "pretrain" or torch.cuda.is_available()
    return dict(os.environ) if alone else os.environ | {"OMP_NUM_THREADS": "1"}


def log_file(out: Path, part: Part) -> Path:
    path = out / "logs" / f"{part.name.replace('/', '-')}.txt"
    path.parent.mkdir(exist_ok=True)
    return path


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int]:
    """The file descriptor of a lock on the experiment. Its parts inherit it, since they can outlive a killed parent."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{out} is in use by another call, or by a part that it left running: waiting for it to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


class Progress:
    """One line per finished part, and a progress bar with the remaining time, estimated from the speed so far."""

    def __init__(self) -> None:
        self.work: dict[str, float] = {}
        self.fractions: dict[str, float] = {}
        self.ended: set[str] = set()
        self.first = 0.0  # the fraction of all work that earlier calls have done
        self.began = time.monotonic()
        self.bar = tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar}{postfix}", mininterval=1)

    def expect(self, name: str, work: float, fraction: float = 0.0) -> None:
        """Announce a part: its work, in any unit, and the fraction already done. Call it for all before any starts."""
        self.work[name], self.fractions[name] = work, fraction
        self.first = self._whole()

    def _whole(self) -> float:
        return sum(work * self.fractions[name] for name, work in self.work.items()) / sum(self.work.values())

    def at(self, name: str, fraction: float) -> None:
        self.fractions[name] = fraction
        self.bar.set_postfix_str(self._left(), refresh=False)
        self.bar.update(self._whole() - self.bar.n)

    def skip(self, name: str) -> None:
        """Mark a part as done by an earlier call, so that it does not count towards the speed of this one."""
        before = self._whole()
        self.fractions[name] = 1.0
        self.first += self._whole() - before
        self.ended.add(name)

    def done(self, name: str, seconds: float) -> None:
        self.at(name, 1.0)
        self.ended.add(name)
        self.bar.write(f"[{len(self.ended)}/{len(self.fractions)}] {name}: {duration(seconds)}; {self._left()}")

    def _left(self) -> str:
        whole = self._whole()
        if whole - self.first < 0.001:
            return "remaining time not known yet"
        return f"about {duration((1 - whole) * (time.monotonic() - self.began) / (whole - self.first))} left"
