"""The options of a run from its config.json.

A run's folder may come from somebody else, so no command opens, executes or sends requests to
anything that the folder names: such options must be given again on the command line."""

import dataclasses
import re
import shlex
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from tinystory.config.base import RunConfig
from tinystory.config.interaction import PROMPTS, REWARDS
from tinystory.data import corpus, openings
from tinystory.run.credentials import redacted
from tinystory.run.errors import UserError
from tinystory.run.folder import newest_first, require_config
from tinystory.run.options import arguments, flag_of
from tinystory.run.records import CONFIG
from tinystory.run.text import printable

# Options that a resumed run keeps. Some act only at the start of a run. The others determine the
# tokenizer, the held-out documents, the order of the corpus and the earlier evaluations.
KEPT_ON_RESUME = (
    *("preset", "init", "seed"),
    *("n_layer", "n_head", "n_embd", "context", "vocab_size", "weights_init"),
    *("val_fraction", "packing", "batch_size", "optimizer"),
    *("openings", "temperature", "kl_coef"),
)
# An option without choices takes a value from config.json only if its entry here admits the value.
RECORDED: dict[str, Callable[[str], object]] = {
    "device": re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?").fullmatch,
    "corpus": corpus.NAMES.__contains__,
    "reward": REWARDS.__contains__,
    "openings": lambda text: not openings.names_file(text),
    "teacher_prompt": PROMPTS.__contains__,
    "judge": ("rubric",).__contains__,
    "judge_prompt": PROMPTS.__contains__,
}


def resumed_config(config_class: type[RunConfig], typed: dict[str, Any]) -> RunConfig:
    """The options of the run in --out, or without --out of the newest run that was started without
    it, overridden by `typed`, the options on the command line."""
    names_out = "out" in typed
    if not names_out:
        runs = newest_first(Path(config_class.out))
        typed["out"] = str(runs[0]) if runs else config_class.out
    # --init is needed only before the first checkpoint
    config: RunConfig = recorded_config(config_class, Path(typed["out"]), typed, unused=["init"])
    if not names_out:
        config.given -= {"out"}
    return config


def recorded_config(
    config_class: type[RunConfig],
    run: Path,
    typed: dict[str, Any],
    unused: Container[str] = (),
    kept: Container[str] = KEPT_ON_RESUME,
) -> Any:
    """The options in a run's config.json, overridden by `typed`, options from the command line.
    Raises UserError if another command or version began the run, if an option in `kept` is given
    another value, if `check` refuses a value, and if an option is missing that only the command
    line may give. unused: options that the caller does not use, which may be missing."""
    recorded = require_config(run)["options"]
    path = run / CONFIG
    fields = dataclasses.fields(config_class)
    options: dict[str, Any] = {}
    missing: dict[str, Any] = {}
    for f in fields:
        if f.name not in recorded:
            raise UserError(
                f"{path} has no {f.name}: the run was begun by another command or another "
                "version; continue with that one, or start a new run in another --out"
            )
        if may_be_recorded(f, recorded[f.name]):
            options[f.name] = recorded[f.name]
        elif f.name not in (*typed, "out") and f.name not in unused:
            missing[f.name] = recorded[f.name]
    options.pop("any_model", None)  # each resume must insist on it
    if "tried_temperatures" in recorded and typed.get("temperature") == 0:
        typed = typed | {"temperature": recorded["temperature"]}  # the chosen temperature
    config = config_class(**options | {"resume": False} | typed | {"out": str(run)})
    config.given = frozenset(f.name for f in fields)
    for f in fields:
        is_kept = f.name in kept and f.name in typed
        if is_kept and getattr(config, f.name) != recorded[f.name]:
            raise UserError(
                f"{flag_of(f)} {typed[f.name]} does not go with --resume: {run} was begun with "
                f"{recorded[f.name]!r:.200}; leave it out, or start a new run in another --out"
            )
    if missing:
        again = shown(arguments(config_class, missing))
        raise UserError(
            f"{path} records {again}: the folder may be somebody else's, so no file, URL or "
            "model that it names is used; give these options again on the command line"
        )
    try:
        config.check()
    except UserError as error:
        raise UserError(
            f"{path}: {error}; correct the value in that file, or give the flag"
        ) from None
    return config


def may_be_recorded(f: dataclasses.Field, value: Any) -> bool:
    """Whether an option may take this value from a run's config.json. Numbers and choices may be
    taken, and values of a wrong type too, because `check` refuses them."""
    if isinstance(f.default, int | float) or isinstance(f.metadata["allowed"], tuple):
        return True
    texts = value if isinstance(value, list) else [value]
    admits = RECORDED.get(f.name, lambda text: False)
    return all(not isinstance(text, str) or text == "" or admits(text) for text in texts)


def given_again(config: RunConfig) -> list[str]:
    """The arguments that must be given again with --resume, because no record may give them."""
    options = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name not in ("out", "init") and not may_be_recorded(f, value):
            options[f.name] = value
    return arguments(type(config), options)


def shown(words: Sequence[str]) -> str:
    """Arguments from a record as text for the user: on one line, without control characters and
    keys."""
    plain = (" ".join(printable(word[:200]).split()) for word in words)
    return redacted(shlex.join(plain))
