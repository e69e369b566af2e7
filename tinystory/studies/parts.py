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
from tinystory.run.errors import UserError
from tinystory.run.folder import CONFIG, SAMPLES, atomic_write, read_config
from tinystory.run.paths import ROOT
from tinystory.student import checkpoint

MILLION = 10**6
# Options that may differ between calls, because an experiment may move to another folder or device.
MOVABLE = ("init", "reward", "teacher_url", "device")


@dataclass(frozen=True)
class Part:
    """One run of a train command. options: those that differ from the preset; start: pretraining words of the student
    that it begins with (0 for pretraining itself); seed: of the interaction, else 0."""

    arm: str
    start: int
    seed: int
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.arm}/{self.start // MILLION}M-{self.seed}" if self.start else self.arm

    @property
    def pretrains(self) -> bool:
        return self.arm in ("pretrain", "reading")

    def command(self, out: Path, preset: str) -> list[str]:
        script = ROOT / ("train_pretrain.py" if self.pretrains else "train_interact.py")
        argv = [sys.executable, str(script), "--preset", preset, "--out", str(out / self.name)]
        defaults = (PRETRAIN_PRESETS if self.pretrains else INTERACT_PRESETS)[preset]
        for name, value in self.options.items():
            flag = name.replace("_", "-")
            if name in defaults and value == defaults[name]:  # some of which are no flags
                continue
            if isinstance(value, bool):
                argv.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                argv += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
        return argv

    def finished(self, out: Path) -> bool:
        folder = out / self.name
        if not self.pretrains:
            return (folder / SAMPLES).exists()  # the last file that an interaction writes
        newest = checkpoint.newest(folder)
        return newest is not None and checkpoint.read_counters(newest)["words"] >= self.options["words"]


def require_same_settings(part: Part, out: Path) -> None:
    """Raises UserError if the part's folder holds a run with other settings."""
    folder = out / part.name
    recorded = read_config(folder).get("options", {})
    for name, value in part.options.items():
        if name not in MOVABLE and recorded.get(name, value) != value:
            raise UserError(
                f"{folder} was run with {name} {recorded[name]}, not {value}: choose another --out or delete it"
            )


def prepare_folder(part: Part, out: Path) -> list[str]:
    """The flag to run a part with, after its folder is ready: to resume, or for further pretraining, which continues
    from a copy of the milestone's checkpoint."""
    folder = out / part.name
    if checkpoint.newest(folder):
        return ["--resume"]
    shutil.rmtree(folder, ignore_errors=True)  # killed before its first checkpoint
    if part.arm != "reading":
        return []
    name = milestone_name(part.start)
    config = read_config(out / "pretrain")
    folder.mkdir(parents=True)
    atomic_write(folder / CONFIG, json.dumps(config | {"options": config["options"] | part.options}))
    partial = folder / "checkpoints" / f".{name}"
    shutil.copytree(out / "pretrain" / "checkpoints" / name, partial)
    partial.rename(partial.with_name(name))
    return ["--resume"]


def log_path(part: Part, out: Path) -> Path:
    return out / "logs" / f"{part.name.replace('/', '-')}.txt"


def start(part: Part, out: Path, preset: str, lock: int) -> subprocess.Popen[bytes]:
    """The process of a part, in a session of its own, so that Ctrl-C reaches only us and we pass it on. It inherits the
    lock. Parts that run in parallel get a single thread, whatever --jobs: the number of threads changes the order of
    sums, and so the rounding."""
    parallel = part.arm != "pretrain" and not torch.cuda.is_available()
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if parallel else {})
    argv = part.command(out, preset) + prepare_folder(part, out)
    path = log_path(part, out)
    path.parent.mkdir(exist_ok=True)
    with open(path, "ab") as log:
        streams: dict[str, Any] = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return subprocess.Popen(argv, env=environment, pass_fds=(lock,), start_new_session=True, **streams)


def run_parts(parts: Sequence[Part], out: Path, preset: str, jobs: int, lock: int) -> None:
    """Run the unfinished parts, `jobs` at a time. OUT/logs says how far each is. lock: from `locked`.

    Raises UserError if one of them fails. However this function ends, it terminates the others, which first save a
    checkpoint."""
    for part in parts:
        require_same_settings(part, out)
    waiting = [part for part in parts if not part.finished(out)]
    running: list[tuple[Part, subprocess.Popen[bytes]]] = []
    arms = ", ".join(dict.fromkeys(part.arm for part in parts))
    bar = tqdm(total=len(parts), initial=len(parts) - len(waiting), desc=arms, unit="part")
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                part = waiting.pop(0)
                running.append((part, start(part, out, preset, lock)))
            time.sleep(0.3)
            for part, process in [pair for pair in running if pair[1].poll() is not None]:
                if not part.finished(out):
                    raise UserError(
                        f"{part.name} ended with exit code {process.returncode} before it was done; "
                        f"{log_path(part, out)} says why; the same command continues from there"
                    )
                running.remove((part, process))
                bar.update()
                bar.write(f"{part.name} is finished")
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()
        bar.close()


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
