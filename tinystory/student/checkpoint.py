"""Checkpoints: model.safetensors, model.json, tokenizer.json and the trainer's state, without
pickle, written atomically.

A checkpoint is renamed when it is complete, so a kill leaves all earlier checkpoints intact.
`chck_3M` is a milestone in words, `step_0001200` is for resuming, and `best` is the result. Only
`best` is ever replaced."""

import contextlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from tinystory.config.presets import PRETRAIN_PRESETS
from tinystory.data.tokenizer import Tokenizer
from tinystory.run.errors import UserError, cannot_write
from tinystory.run.files import atomic_folder
from tinystory.run.records import (
    Fields,
    check_fields,
    read_object,
    require_whole,
    write_manifest,
)
from tinystory.run.text import printable
from tinystory.student import hf
from tinystory.student.model import Student, StudentConfig, to_device, wrong_shape

T = TypeVar("T")
BEST = "best"
STEP = re.compile(r"step_\d{7,}")
# Types of a `history`. They are checked, because a student may come from somebody else, who counted
# in another way, or lies.
HISTORY: Fields = {
    "words": (int, None),
    "tokens": (int, None),
    "corpus_words": (int, None),
    "interaction_words_in": (int, None),
    "interaction_words_out": (int, None),
    "corpus": (list, None),
    "preset": (str, None),
    "val_fraction": (int, float, None),
    "seed": (int, None),
}
# Types of a trainer's counters, and bounds on the other values in the trainer's files, which may
# come from somebody else too. Within these bounds no sum of squares overflows.
JSON_TYPES: Mapping[type, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,)}
LARGEST_COEFFICIENT = 1e9
LARGEST_STATE = 1e15
UNREADABLE = 1 << 63  # the step of a checkpoint with unreadable counters
FILES = ("model.safetensors", "model.json", "tokenizer.json", "trainer.safetensors", "trainer.json")


def save(
    folder: Path,
    student: Student,
    tokenizer: Tokenizer,
    *,
    history: dict[str, Any],
    state: dict[str, Tensor],
    counters: dict[str, Any],
    replace: bool = False,
) -> Path:
    """The folder of the checkpoint that is written here. An undamaged checkpoint in `folder` is
    kept, unless `replace`. history is saved in model.json; state and counters are the trainer's,
    for a bit-identical resume. Raises UserError if the checkpoint cannot be written."""
    if folder.exists() and not replace:  # the same step of this run, from before a resume
        with contextlib.suppress(UserError):
            require_whole(folder, FILES)
            return folder
    replaced = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    with atomic_folder(folder) as partial:
        partial.parent.mkdir(exist_ok=True)  # not the run's folder, which may have been moved
        partial.mkdir()
        hf.write_tensors(partial / "model.safetensors", student.state_dict())
        hf.write_tensors(partial / "trainer.safetensors", state)
        record = asdict(student.config) | {"history": history}
        (partial / "model.json").write_text(json.dumps(record, indent=2) + "\n")
        (partial / "trainer.json").write_text(json.dumps(counters, indent=2) + "\n")
        tokenizer.save(partial / "tokenizer.json")
        write_manifest(partial)
        # a kill between the two renames leaves the run without `best`, but never with an incomplete
        # one
        if folder.exists():
            folder.rename(replaced)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def load(
    folder: Path | str, device: torch.device | str = "cpu"
) -> tuple[Student, Tokenizer, dict[str, Any]]:
    """Student, tokenizer and history ({} for a folder saved by transformers). Raises UserError if
    the checkpoint is incomplete or malformed, before more memory is allocated than the weights
    fill."""
    folder = Path(folder)
    history: dict[str, Any] = {}
    if hf.is_folder(folder):
        student, tokenizer = hf.read(folder)
    else:
        require_whole(folder, FILES)
        record = read_object(folder / "model.json")
        history = _history(folder, record.pop("history", {}))
        wrong = wrong_shape(record)
        if wrong:
            raise UserError(f"{folder / 'model.json'} describes an impossible student: {wrong}")
        student = hf.read_student(folder / "model.safetensors", StudentConfig(**record), ours=True)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return to_device(student, device), tokenizer, history


def read_history(folder: Path) -> dict[str, Any]:
    """The history of the student in `folder`; {} for a folder saved by transformers. Raises
    UserError if it is malformed."""
    if hf.is_folder(folder):
        return {}
    return _history(folder, read_object(folder / "model.json").get("history", {}))


def _history(folder: Path, history: object) -> dict[str, Any]:
    """The `history` given to `save`. Raises UserError if the object cannot be a history."""
    try:
        if not isinstance(history, dict):
            raise ValueError(f"it is {history!r:.40}")
        check_fields(history, HISTORY)
        if "preset" in history and history["preset"] not in PRETRAIN_PRESETS:
            raise ValueError("its 'preset' is not a preset's name")
        for name in history.get("corpus", []):
            if not isinstance(name, str) or "\0" in name:
                raise ValueError("its 'corpus' is no list of names")
        return history
    except ValueError as error:
        raise UserError(
            f"{folder / 'model.json'} has an impossible history of the student: {error}"
        ) from None


def restore(student: Student, folder: Path) -> None:
    """Load the weights of a checkpoint into a student of the same shape. Raises UserError if the
    shapes differ."""
    weights = hf.read_student(folder / "model.safetensors", student.config, ours=True)
    student.load_state_dict(weights.state_dict())


def load_trainer(folder: Path, run_state: Callable[..., T]) -> tuple[dict[str, Tensor], T]:
    """The `state` and the `counters` (as a `run_state`) given to `save`. Raises UserError unless
    all numbers are finite and in range."""
    counters = read_counters(folder)
    field_types = get_type_hints(run_state)
    try:
        if counters.keys() != field_types.keys():
            raise ValueError("it has other fields")
        check_fields(counters, {name: JSON_TYPES[hint] for name, hint in field_types.items()})
        for name, value in counters.items():
            if field_types[name] is float and not 0 <= value <= LARGEST_COEFFICIENT:
                raise ValueError(f"its {name!r} is {value!r:.40}")
    except ValueError as error:
        raise UserError(
            f"{folder / 'trainer.json'} was not saved by this command ({error}): it must hold "
            f"{', '.join(field_types)}"
        ) from None

    path = folder / "trainer.safetensors"
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): start from another checkpoint") from error
    for name, tensor in state.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            problem = str(tensor.dtype)
        elif not (tensor.abs() <= LARGEST_STATE).all():
            problem = "NaN, infinite or absurdly large numbers"
        else:
            continue
        raise UserError(f"{path} holds {problem} in {name!r:.80}: start from another checkpoint")
    return state, run_state(**counters)


def read_counters(folder: Path) -> dict[str, Any]:
    """The `counters` given to `save`, which have at least `step`. Raises UserError if they cannot
    be read."""
    return read_object(folder / "trainer.json", {"step": (int,)})


@contextlib.contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """Context for restoring the state of `load_trainer`: ValueError, KeyError and the RuntimeError
    of load_state_dict become a UserError that names the file."""
    try:
        yield
    except (ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder / 'trainer.safetensors'} does not fit this run ({reason}): give the options of "
            "the run that saved it, or start from another checkpoint"
        ) from error


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """A run's checkpoints as pairs (step, folder), newest first. Checkpoints with an unreadable
    step come before the others, with UNREADABLE. `best` is not included, because it is saved before
    its step is logged."""
    folders = []
    for folder in run.glob("checkpoints/[!.]*"):
        if folder.is_dir() and folder.name != BEST:
            step = UNREADABLE
            with contextlib.suppress(UserError):
                step = read_counters(folder)["step"]
            folders.append((step, folder))
    return sorted(folders, reverse=True)


def newest(run: Path) -> Path | None:
    """The checkpoint of a run with the most steps, or None."""
    for step, folder in checkpoints(run):
        if step < UNREADABLE:
            return folder
    return None


def newest_whole(run: Path) -> Path | None:
    """The newest undamaged checkpoint, to resume from; None if the run never saved one. Damaged
    checkpoints are named on stderr. Raises UserError if all are damaged."""
    folders = checkpoints(run)
    for _, folder in folders:
        try:
            require_whole(folder, FILES)
            return folder
        except UserError as error:
            print(f"tinystory: {error}; trying the previous checkpoint", file=sys.stderr)
    if folders:
        raise UserError(
            f"--resume: every checkpoint in {run} is damaged: restore one from a copy, or start a "
            "new run"
        )
    print(
        printable(f"{run} was stopped before its first checkpoint, so it starts from the beginning")
    )
    return None


def find(path: Path) -> Path:
    """The checkpoint that `path` names: `path` itself if it is a checkpoint or a folder saved by
    transformers; of a run, `best` or else the newest checkpoint; for hub:NAME@REVISION, the
    downloaded folder. Raises UserError if there is no checkpoint."""
    if str(path).startswith("hub:"):
        return hf.download(str(path))
    if (path / "model.json").exists() or hf.is_folder(path):
        return path
    best = path / "checkpoints" / BEST
    if (best / "trainer.json").exists():
        return best
    folder = newest(path)
    if folder:
        return folder
    raise UserError(
        f"{path} is neither a checkpoint nor a run with a checkpoint: give the folder of one of these"
    )


def drop_older(folder: Path) -> None:
    """Remove all `step_*` checkpoints older than `folder`, except the last of them, which is kept
    in case `folder` is damaged later. Also remove checkpoints that a killed process left
    half-written or half-removed. Only the process that writes the checkpoints may call this. (All
    other names sort before `step_`.)"""
    steps = [path for path in folder.parent.iterdir() if STEP.fullmatch(path.name)]
    try:
        for path in sorted(path for path in steps if path.name < folder.name)[:-1]:
            # renamed first, so that a kill never leaves a half-removed checkpoint
            path.rename(path.with_name("." + path.name))
        for path in folder.parent.glob(".step_*"):
            shutil.rmtree(path, ignore_errors=True)  # what is left, the next call removes
    except OSError as error:
        raise cannot_write(folder.parent, error) from error


def pack_optimizer(optimizer: Optimizer) -> dict[str, Tensor]:
    """The state of AdamW or MuonAdamW (constructed with named parameters) as named tensors."""
    names: list[str] = []
    for group in optimizer.param_groups:
        names += group["param_names"]
    tensors = {}
    for i, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            tensors[f"{key}.{names[i]}"] = value
    return tensors


def unpack_optimizer(optimizer: Optimizer, state: dict[str, Tensor]) -> None:
    """Load the result of `pack_optimizer` into an optimizer. Other tensors in `state` are ignored.
    Raises ValueError if a tensor does not fit, for example from another optimizer or student."""
    entries: dict[int, dict[str, Tensor]] = {}
    i = 0  # number of the parameter in the optimizer's state
    for group in optimizer.param_groups:
        keys = ("step", "momentum") if "muon" in group else ("step", "exp_avg", "exp_avg_sq")
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if f"step.{name}" in state:  # missing before the first step
                entries[i] = {key: _entry(state, key, name, p.shape) for key in keys}
            i += 1
    optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})


def _entry(state: dict[str, Tensor], key: str, parameter: str, shape: torch.Size) -> Tensor:
    """The tensor KEY.PARAMETER of the state. Raises ValueError if it cannot be the optimizer's."""
    name = f"{key}.{parameter}"
    value = state.get(name)
    if value is None or value.shape != (() if key == "step" else shape):
        raise ValueError(parameter)
    if value.dtype != torch.float32:
        raise ValueError(f"{name} is {value.dtype}, not float32")
    if key in ("step", "exp_avg_sq") and (value < 0).any():
        raise ValueError(f"{name} is negative")
    return value
