"""Experiments with many runs of the two train commands. Options are checked before the first run.
Finished runs are not repeated, and stopped runs are resumed."""

import json
import os
import re
import shlex
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import train_interact
import train_pretrain
from tinystory.config import InteractConfig, PretrainConfig
from tinystory.config.command_line import parse
from tinystory.config.record import given_again
from tinystory.data.openings import load_openings
from tinystory.run.credentials import redacted
from tinystory.run.errors import UserError
from tinystory.run.files import atomic_write
from tinystory.run.folder import CONTROL_RUNS, numbered
from tinystory.run.records import CONFIG, SAMPLES, Record, read_object
from tinystory.student import checkpoint

EXPERIMENT = "experiment.json"  # settings that all runs of an experiment share


def judges_in(options: Sequence[str]) -> dict[str, str]:
    """The environment variables of lab/two_judges.py, if any of the options names this file."""
    if not any("two_judges" in text for text in options):
        return {}
    variables = {name: os.environ.get(name, "") for name in ("CORPUS", "READER", "TEACHER")}
    return {name: redacted(without_urls(value)) for name, value in variables.items()}


def without_urls(text: str) -> str:
    """Options without the addresses of servers, which may change between two calls."""
    return re.sub(r"https?://\S+", "URL", text)


def folder_of(out: str) -> Path:
    """The folder that --out names. Raises UserError for an empty name, which would mean the current
    folder."""
    if not out:
        raise UserError("--out must be given: it is empty")
    return Path(out)


def require_same(path: Path, settings: Record) -> None:
    """Write the settings that all results in an experiment's folder share. Raises UserError if the file
    has other settings, because finished results are used again."""
    before = read_object(path) if path.exists() else settings
    for name, new in settings.items():
        old = before.get(name)
        if old != new:
            raise UserError(
                f"{path.parent} was begun with {name} {old!r}, not {new!r}: choose another --out"
            )
    atomic_write(path, json.dumps(settings, indent=1) + "\n")


def words_of(flag: str, text: str) -> list[str]:
    """The command-line arguments in one text. Raises UserError if the text cannot be split into
    arguments."""
    try:
        return shlex.split(text)
    except ValueError as error:
        reason = str(error).lower()
        raise UserError(
            f"{flag} {text!r}: {reason}; write each text as on a command line"
        ) from None


def pretrain_config(argv: Sequence[str]) -> PretrainConfig:
    """The options of a future pretraining run. Raises UserError for options that the run would
    refuse."""
    config: PretrainConfig = parse(PretrainConfig, list(argv))
    return config


def interact_config(argv: Sequence[str]) -> InteractConfig:
    """The options of a future interaction. Raises UserError for options or openings that the run
    would refuse."""
    config: InteractConfig = parse(InteractConfig, list(argv))
    load_openings(config.openings)
    return config


def corpus_of_teacher(pretraining: PretrainConfig, interaction: InteractConfig) -> list[str]:
    """The option --corpus for an interaction after this pretraining, if the built-in teacher is
    fitted to files, which no checkpoint may name."""
    if interaction.reward or interaction.teacher_url:
        return []
    return given_again(pretraining)  # --corpus, if it has files


def train(out: Path, argv: Sequence[str], again: Sequence[str] = (), words: int = 0) -> Path:
    """The last checkpoint of a run, after finishing the run. argv: options of a new run; a resume
    gets only the options that no record may give. again: options that a resume gets too. words:
    length of a pretraining run; 0: an interaction. Raises UserError if the run is stopped."""
    if not is_finished(out, words):
        print(f"{out} ...", flush=True)
        arguments = ["--out", str(out), *argv, *again]
        if (out / CONFIG).exists():
            config_of = pretrain_config if words else interact_config
            config = config_of([*argv, *again])
            arguments = ["--out", str(out), "--resume", *given_again(config), *again]
        if words:
            train_pretrain.main(arguments)
        else:
            train_interact.main(arguments)
    last = checkpoint.newest(out)
    if last is None or not is_finished(out, words):
        raise UserError(f"{out} was stopped before its end: run the same command again to continue")
    return last


def train_controls(run: Path, name: str, again: Sequence[str] = (), count: int = 1) -> Path:
    """The folder of the first of `count` controls of a finished run, after finishing all. name: one
    of CONTROLS. again: options that no record may give. Raises UserError if a control is
    stopped."""
    folders = [*islice(numbered(run / CONTROL_RUNS / name), count)]
    for folder in folders:
        if not is_finished(folder, 0):
            print(f"{folder} ...", flush=True)
            resume = ["--resume", "--out", str(folder)] if (folder / CONFIG).exists() else []
            train_interact.main(["--control", str(run), name, *resume, *again])
        if not is_finished(folder, 0):
            raise UserError(
                f"{folder} was stopped before its end: run the same command again to continue"
            )
    return folders[0]


def is_finished(out: Path, words: int) -> bool:
    if not words:
        return (out / SAMPLES).exists()  # the last file that an interaction writes
    newest = checkpoint.newest(out)
    return newest is not None and checkpoint.read_counters(newest)["words"] >= words
