"""Checkpoints: model.safetensors, model.json, tokenizer.json and the trainer state, without pickle, written atomically.

A checkpoint is written under a name that starts with a dot and renamed when complete, so a kill at any instant leaves
all earlier ones intact. `chck_3M` is a milestone in words, `step_0001200` is for resuming, and `best`, the only name
that is used again, is what an interaction is shown by.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinystory.data.tokenizer import Tokenizer
from tinystory.errors import UserError
from tinystory.student import hf
from tinystory.student.model import Student, StudentConfig

BEST = "best"


def save(folder: Path, student: Student, tokenizer: Tokenizer, *, facts: dict[str, Any],
         state: dict[str, Tensor], counters: dict[str, Any], replace: bool = False) -> Path:  # fmt: skip
    """Write one checkpoint and return its folder. One that exists is left as it is, or replaced. facts: the training
    history (words, corpus), stored in model.json; state and counters: what the trainer needs for a bit-exact resume.
    Raises UserError if it cannot be written."""
    if folder.exists() and not replace:  # the same step of the same run, before a resume
        return folder
    partial, replaced = folder.with_name("." + folder.name), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(_on_cpu(student.state_dict()), partial / "model.safetensors")
        save_file(_on_cpu(state), partial / "trainer.safetensors")
        record = {**asdict(student.config), "tokenizer": tokenizer.fingerprint(), "facts": facts}
        (partial / "model.json").write_text(json.dumps(record, indent=2) + "\n")
        (partial / "trainer.json").write_text(json.dumps(counters, indent=2) + "\n")
        tokenizer.save(partial / "tokenizer.json")
        for path in partial.iterdir():
            _sync(path)
        if folder.exists():  # a kill between the two renames leaves the run without `best`, not with half of one
            folder.rename(replaced)
        partial.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"cannot write checkpoint {folder}: {error}; free some space or choose another --out"
        ) from error
    return folder


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[Student, Tokenizer, dict[str, Any]]:
    """Student, tokenizer and facts of a checkpoint, or of a folder that transformers wrote ({} for the facts). Raises
    UserError if it is incomplete or malformed."""
    if hf.is_folder(folder):
        student, tokenizer = hf.read(folder)
        return student.to(device), tokenizer, {}
    try:
        record = json.loads((folder / "model.json").read_text())
        facts, vocabulary = record.pop("facts", {}), record.pop("tokenizer", None)
        config = StudentConfig(**record)
        student = Student(config)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is not a checkpoint of ours: {_first_line(error)}") from error
    restore(student, folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.vocab_size != config.vocab_size or tokenizer.fingerprint() != vocabulary:
        raise UserError(
            f"{folder}/tokenizer.json is another vocabulary than the one that the weights were trained with: restore "
            "the file that was saved with them"
        )
    return student.to(device), tokenizer, facts


def restore(student: Student, folder: Path) -> None:
    """Load the weights of a checkpoint into a student of the same shape. Raises UserError if the shapes differ."""
    try:
        student.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} is not a checkpoint of ours: {_first_line(error)}") from error
    except RuntimeError as error:  # from load_state_dict, which lists every mismatch
        raise UserError(f"the weights in {folder} have another shape: {_first_line(error)}") from error


def load_trainer(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The `state` and `counters` given to `save`. Raises UserError if they are missing or malformed."""
    try:
        return load_file(folder / "trainer.safetensors"), json.loads((folder / "trainer.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} has no trainer state to resume from: {_first_line(error)}") from error


def newest(run: Path) -> Path | None:
    """The checkpoint with the most steps in a run's folder, or None. Not `best`: it is saved before its step is
    logged."""
    found = [path.parent for path in run.glob("checkpoints/[!.]*/trainer.json") if path.parent.name != BEST]
    return max(
        found, key=lambda path: (json.loads((path / "trainer.json").read_text())["step"], path.name), default=None
    )


def find(path: Path) -> Path:
    """`path` itself if it is a checkpoint or a folder that transformers wrote, else the best checkpoint of the run in
    it, or the newest if none was chosen as the best. Raises UserError if there is none."""
    best = path / "checkpoints" / BEST
    if (path / "model.json").exists() or hf.is_folder(path):
        return path
    found = best if (best / "trainer.json").exists() else newest(path)
    if found is None:
        raise UserError(f"{path} is neither a checkpoint nor a run that has one: give the folder of either")
    return found


def drop_older(folder: Path) -> None:
    """Remove the `step_*` checkpoints beside `folder` that are older."""
    for path in folder.parent.glob("step_*"):
        if path.name < folder.name:
            shutil.rmtree(path)


def pack_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The state of AdamW or MuonAdamW as named tensors. names: of its parameters, in order."""
    return {
        f"{key}.{names[i]}": value
        for i, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, names: list[str], state: dict[str, Tensor]) -> None:
    """The inverse of `pack_optimizer`; other tensors in `state` are ignored."""
    keys = ("step", "exp_avg", "exp_avg_sq", "momentum")
    kept = {
        i: entry
        for i, name in enumerate(names)
        if (entry := {key: state[f"{key}.{name}"] for key in keys if f"{key}.{name}" in state})
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": kept})


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
