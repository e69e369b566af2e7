"""Runs of the two train commands that several tests need."""

import contextlib
import math
import signal
from pathlib import Path

import pytest
import torch
from conftest import SHORT, cli

import train_interact as interact
from tinystory.student import checkpoint


@contextlib.contextmanager
def stops_by(signum: int):
    """The command in the block stops by a signal."""
    with pytest.raises(SystemExit) as exit:
        yield
    assert exit.value.code == 128 + signum


@contextlib.contextmanager
def interrupted_at(module, step: int):
    """Ctrl-C arrives while the given step is being logged, and ends the command."""
    log = module.RunLog.metrics

    def metrics(self, *, step: int, **values):
        record = log(self, step=step, **values)
        if step == interrupted_at.step:
            signal.raise_signal(signal.SIGINT)
        return record

    interrupted_at.step = step
    module.RunLog.metrics = metrics
    try:
        with stops_by(signal.SIGINT):
            yield
    finally:
        module.RunLog.metrics = log


def spoiling(step_function, at: int, place_of_student):
    """A step that leaves an infinite weight behind when it is called for the `at`-th time."""
    calls = []

    def spoiled(*arguments, **options):
        result = step_function(*arguments, **options)
        calls.append(result)
        if len(calls) == at:
            with torch.no_grad():
                place_of_student(arguments[0]).ln_f.weight[0] = math.inf
        return result

    return spoiled


def run_interact(place, out: Path, *more: str) -> None:
    init = str(checkpoint.newest(place / "p"))
    interact.main(
        [
            *cli("--init {} --reward {}:score --out {}", init, place / "reward.py", out),
            *SHORT,
            *more,
        ]
    )
