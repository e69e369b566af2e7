"""The command that comes after a pretraining, for the terminal and for the report."""

import contextlib
from dataclasses import fields
from pathlib import Path

from tinystory.config import InteractConfig, PretrainConfig
from tinystory.config.record import given_again
from tinystory.data.openings import load_openings
from tinystory.data.tokenizer import Tokenizer
from tinystory.run.errors import UserError
from tinystory.run.paths import hint
from tinystory.run.records import Record
from tinystory.student import checkpoint
from tinystory.student.generate import encode_opening


def next_command(config: PretrainConfig, tokenizer: Tokenizer) -> str:
    """The command for an interaction with this student, or a sentence on why it has no room for
    one."""
    openings = load_openings(InteractConfig.openings)
    longest = max(len(encode_opening(tokenizer, opening)) for opening in openings)
    room = config.context - longest
    if room < 1:
        return (
            f"a student with a longer --context than {config.context}: the longest built-in opening "
            f"has {longest} tokens, so no story fits; train_interact.py would need a short --opening"
        )
    arguments = ["--init", config.out]
    if config.preset != InteractConfig.preset:
        arguments += ["--preset", config.preset]
    arguments += given_again(config)  # --corpus, if it holds files: the built-in teacher needs them
    if room < InteractConfig.max_new_tokens:
        arguments += ["--max-new-tokens", str(room)]
    return hint("train_interact.py", *arguments)


def recorded_next_command(run: Path, record: Record) -> str:
    """`next_command` for a run with this config.json; "" if the record lacks valid options, or the
    run has no checkpoint."""
    newest = checkpoint.newest(run)
    options = record.get("options", {})
    names = [f.name for f in fields(PretrainConfig)]
    if newest is None or not options.keys() >= set(names):
        return ""
    with contextlib.suppress(UserError):
        config = PretrainConfig(**{name: options[name] for name in names} | {"out": str(run)})
        config.check()
        return next_command(config, Tokenizer.load(newest / "tokenizer.json"))
    return ""
