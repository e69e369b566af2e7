"""Runs of the two train commands: what is finished is not run again, and what was stopped goes on."""

from collections.abc import Callable, Sequence
from pathlib import Path

import train_interact
import train_pretrain
from tinystory.run.errors import UserError
from tinystory.run.folder import CONFIG, SAMPLES
from tinystory.student import checkpoint


def pretrain(out: Path, words: int, argv: Sequence[str], again: Sequence[str] = ()) -> Path:
    """The last checkpoint of a run of train_pretrain.py. words: at which it is finished; argv: its options; again:
    further ones, which a resumed run is given too. Raises UserError if it is stopped."""

    def finished() -> bool:
        newest = checkpoint.newest(out)
        return newest is not None and checkpoint.read_counters(newest)["words"] >= words

    return _run(train_pretrain.main, finished, out, argv, again)


def interact(out: Path, argv: Sequence[str], again: Sequence[str] = ()) -> Path:
    """The same for train_interact.py."""
    return _run(train_interact.main, (out / SAMPLES).exists, out, argv, again)  # the last file that it writes


def _run(
    main: Callable[[list[str]], None], finished: Callable[[], bool], out: Path, argv: Sequence[str],
    again: Sequence[str],
) -> Path:  # fmt: skip
    if not finished():
        print(f"{out} ...", flush=True)
        main(["--out", str(out), *(["--resume"] if (out / CONFIG).exists() else argv), *again])
    last = checkpoint.newest(out)
    if last is None or not finished():
        raise UserError(f"{out} was stopped before its end: the same command continues from there")
    return last
