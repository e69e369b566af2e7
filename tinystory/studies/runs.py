"""Runs of the two train commands: what is finished is not run again, and what was stopped goes on."""

from collections.abc import Sequence
from pathlib import Path

import train_interact
import train_pretrain
from tinystory.run.errors import UserError
from tinystory.run.folder import CONFIG, SAMPLES
from tinystory.student import checkpoint


def train(out: Path, argv: Sequence[str], again: Sequence[str] = (), words: int = 0) -> Path:
    """The last checkpoint of a run. argv: its options; again: further ones, which a resumed run is given too; words: at
    which pretraining is finished, 0 for an interaction. Raises UserError if it is stopped."""

    def finished() -> bool:
        newest = checkpoint.newest(out)
        read = words and newest and checkpoint.read_counters(newest)["words"] >= words
        return bool(read) if words else (out / SAMPLES).exists()  # the last file that an interaction writes

    if not finished():
        print(f"{out} ...", flush=True)
        main = train_pretrain.main if words else train_interact.main
        main(["--out", str(out), *(["--resume"] if (out / CONFIG).exists() else argv), *again])
    last = checkpoint.newest(out)
    if last is None or not finished():
        raise UserError(f"{out} was stopped before its end: the same command continues from there")
    return last
