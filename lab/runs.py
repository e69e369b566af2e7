"""Runs of the two train commands: finished ones are not run again, and stopped ones are resumed."""

from collections.abc import Sequence
from pathlib import Path

import train_interact
import train_pretrain
from tinystory.run.errors import UserError
from tinystory.run.folder import CONFIG, SAMPLES
from tinystory.student import checkpoint


def train(out: Path, argv: Sequence[str], again: Sequence[str] = (), words: int = 0) -> Path:
    """Finish a run, and return its last checkpoint. argv: options of a new run; again: options
    given on a resume too; words: length of a pretraining run, 0: an interaction. Raises UserError
    if the run is stopped."""

    def finished() -> bool:
        newest = checkpoint.newest(out)
        read = words and newest and checkpoint.read_counters(newest)["words"] >= words
        # the last file that an interaction writes
        return bool(read) if words else (out / SAMPLES).exists()

    if not finished():
        print(f"{out} ...", flush=True)
        main = train_pretrain.main if words else train_interact.main
        main(["--out", str(out), *(["--resume"] if (out / CONFIG).exists() else argv), *again])
    last = checkpoint.newest(out)
    if last is None or not finished():
        raise UserError(f"{out} was stopped before its end: the same command continues from there")
    return last
