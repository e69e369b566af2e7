"""Checkpoints: model.safetensors, model.json, tokenizer.json and the trainer state, without pickle, written atomically.

A checkpoint is written under a name that starts with a dot and renamed when complete, so a kill at any instant leaves
all earlier ones intact. `chck_3M` is a milestone in words, `step_0001200` is for resuming, and `best`, the only name
that is used again, is what an interaction is shown by.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinystory.data.tokenizer import Tokenizer
from tinystory.run import distributed
from tinystory.run.errors import UserError
from tinystory.run.folder import cannot_write, read_object
from tinystory.student import hf
from tinystory.student.model import Student, StudentConfig, wrong_shape

T = TypeVar("T")
BEST = "best"
FILES = ("model.safetensors", "model.json", "tokenizer.json", "trainer.safetensors", "trainer.json")
MANIFEST = "manifest.json"  # size and SHA-256 of each
ADAM = ("step", "exp_avg", "exp_avg_sq")  # what Adam keeps of each parameter
# What trainers count, and of which type each count is.
COUNTERS: dict[str, Any] = dict(
    step=int, words=int, tokens=int, corpus=str, written=int, kl_coef=float, best_step=int, words_in=int, words_out=int,
)  # fmt: skip


def save(folder: Path, student: Student, tokenizer: Tokenizer, *, facts: dict[str, Any],
         state: dict[str, Tensor], counters: dict[str, Any], replace: bool = False) -> Path:  # fmt: skip
    """Write one checkpoint and return its folder. One that exists whole is left as it is, or replaced. facts: the
    training history (words, corpus), stored in model.json; state and counters: what the trainer needs for a bit-exact
    resume, of COUNTERS. Raises UserError if it cannot be written."""
    if folder.exists() and not replace:  # the same step of the same run, before a resume
        with contextlib.suppress(UserError):
            require_whole(folder)
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
        files = {name: partial / name for name in FILES}
        manifest = {n: {"size": path.stat().st_size, "sha256": file_hash(path)} for n, path in files.items()}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
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


def require_whole(folder: Path) -> None:
    """Raises UserError, naming the file, unless each file of a checkpoint is what was saved."""
    manifest = read_object(folder / MANIFEST)
    for name in FILES:
        try:
            size, digest = (folder / name).stat().st_size, file_hash(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: {error.strerror or error}") from error
        if manifest.get(name) != {"size": size, "sha256": digest}:
            raise UserError(f"{folder / name} is not what {MANIFEST} beside it says was saved: one of them is damaged")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[Student, Tokenizer, dict[str, Any]]:
    """Student, tokenizer and facts of a checkpoint, or of a folder that transformers wrote ({} for the facts). Raises
    UserError if it is incomplete or malformed, before anything is allocated that its weights do not fill."""
    if hf.is_folder(folder):
        student, tokenizer = hf.read(folder)
        require_finite(student, folder)
        return student.to(device), tokenizer, {}
    if not (folder / "model.json").is_file():
        raise UserError(f"{folder} is not a checkpoint of ours: it has no model.json")
    require_whole(folder)
    record = read_object(folder / "model.json")
    facts, vocabulary = record.pop("facts", {}), record.pop("tokenizer", None)
    wrong = wrong_shape(record) or wrong_facts(facts)
    if wrong:
        raise UserError(f"{folder / 'model.json'} describes a student that there cannot be: {wrong}")
    config = StudentConfig(**record)
    require_shapes(folder / "model.safetensors", config)
    with torch.device("meta"):
        student = Student(config)
    student = student.to_empty(device="cpu")
    restore(student, folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.vocab_size != config.vocab_size or tokenizer.fingerprint() != vocabulary:
        raise UserError(
            f"{folder}/tokenizer.json is another vocabulary than the one that the weights were trained with: restore "
            "the file that was saved with them"
        )
    return student.to(device), tokenizer, facts


def wrong_facts(facts: Any) -> str:
    """What is wrong with the training history in a model.json; "" if nothing is."""
    if not isinstance(facts, dict):
        return "its facts are no object"
    for name, value in facts.items():
        names = name == "corpus" and isinstance(value, list) and all(isinstance(each, str) for each in value)
        if not names and not (type(value) is int and 0 <= value < 1 << 63):
            return f"its {name!r} is {value!r:.80}"
    return ""


def require_shapes(path: Path, config: StudentConfig) -> None:
    """Raises UserError unless the tensors of a file are those of such a student, from their names and shapes alone."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}") from error
    if len(found) == 12 * config.n_layer + 4:  # else the list below could be longer than memory
        expected = {ours: shape[::-1] if swapped else shape for _, ours, swapped, shape in hf.layout(config)}
        if found == expected:
            return
    raise UserError(f"{path} does not hold the tensors of the student that model.json beside it describes")


def require_finite(student: Student, folder: Path) -> None:
    for name, parameter in student.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{folder} holds NaN or infinite weights, in {name}: give an earlier checkpoint")


def restore(student: Student, folder: Path) -> None:
    """Load the weights of a checkpoint into a student of the same shape. Raises UserError if the shapes differ or a
    weight is not finite."""
    try:
        student.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} is not a checkpoint of ours: {_first_line(error)}") from error
    except RuntimeError as error:  # from load_state_dict, which lists every mismatch
        raise UserError(f"the weights in {folder} have another shape: {_first_line(error)}") from error
    require_finite(student, folder)


def load_trainer(folder: Path, run_state: Callable[..., T]) -> tuple[dict[str, Tensor], T]:
    """The `state` given to `save`, and the `counters` as the dataclass that they were. Raises UserError if they are
    missing, malformed, or another's."""
    try:
        return load_file(folder / "trainer.safetensors"), run_state(**read_counters(folder))
    except TypeError:
        raise UserError(f"{folder / 'trainer.json'} is no checkpoint of such a run") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} has no trainer state to resume from: {_first_line(error)}") from error


def read_counters(folder: Path) -> dict[str, Any]:
    """The `counters` given to `save`: at least `step`. Raises UserError if they are missing or malformed."""
    counters = read_object(folder / "trainer.json")
    for name, value in counters.items():
        kind = COUNTERS.get(name)
        if type(value) is not kind or (kind is not str and not (0 if kind is int else -1e30) <= value < 1 << 63):
            raise UserError(f"{folder / 'trainer.json'} is damaged: its {name!r} is {value!r:.80}")
    if "step" not in counters:
        raise UserError(f"{folder / 'trainer.json'} is damaged: it has no 'step'")
    return counters


def restore_module(module: torch.nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Load a module's parameters from a trainer's state, where their names begin with the module's. Raises UserError if
    they are missing or have other shapes."""
    try:
        module.load_state_dict({key: state[f"{name}.{key}"] for key in module.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise UserError(f"the trainer state to resume from does not fit: {_first_line(error)}") from error


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a run's folder with their steps, newest first; one whose step cannot be read counts as the
    newest. Not `best`: it is saved before its step is logged."""
    found = []
    for folder in run.glob("checkpoints/[!.]*"):
        if folder.is_dir() and folder.name != BEST:
            try:
                found.append((read_counters(folder)["step"], folder))
            except UserError:
                found.append((1 << 63, folder))
    return sorted(found, reverse=True)


def newest(run: Path) -> Path | None:
    """The checkpoint with the most steps in a run's folder, or None."""
    return next((folder for step, folder in checkpoints(run) if step < 1 << 63), None)


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint to resume from; None if the run never reached one. One that is damaged is named on stderr
    and passed over. Raises UserError if all are."""
    found = checkpoints(run)
    for _, folder in found:
        try:
            require_whole(folder)
            return folder
        except UserError as error:
            print(f"tinystory: {error}; looking for the checkpoint before it", file=sys.stderr)
    if found:
        raise UserError(f"--resume: every checkpoint in {run} is damaged: restore one from a copy, or start a new run")
    return None


def to_resume(run: Path) -> Path | None:
    """`newest_whole` of rank 0, on every rank."""
    folder = distributed.rank0_value(lambda: newest_whole(run))
    if folder is None:
        print(f"{run} was stopped before its first checkpoint: it starts again")
    return folder


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
    """Remove the `step_*` checkpoints before `folder` but one, in case that `folder` is damaged later, and what a
    killed process left half-written. Only for the process that writes them. (All other names sort before `step_`.)"""
    older = sorted(path for path in folder.parent.glob("step_*") if path.name < folder.name)
    try:
        for path in older[:-1]:
            path.rename(path.with_name("." + path.name))  # so that a kill leaves none that is half removed
        for path in folder.parent.glob(".*"):
            shutil.rmtree(path)
    except OSError as error:
        raise cannot_write(folder.parent, error) from error


def pack_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The state of AdamW or MuonAdamW as named tensors. names: of its parameters, in order."""
    return {
        f"{key}.{names[i]}": value
        for i, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, names: list[str], state: dict[str, Tensor]) -> None:
    """The inverse of `pack_optimizer`; other tensors in `state` are ignored. Raises UserError if one does not fit."""
    kept: dict[int, dict[str, Tensor]] = {}
    each = (
        (p, ("step", "momentum") if "muon" in group else ADAM)
        for group in optimizer.param_groups
        for p in group["params"]
    )
    for i, (name, (parameter, keys)) in enumerate(zip(names, each, strict=True)):
        found = {key: state[f"{key}.{name}"] for key in {*ADAM, "momentum"} if f"{key}.{name}" in state}
        if not found:  # before the first step
            continue
        if found.keys() != set(keys) or any(
            tensor.shape != (() if key == "step" else parameter.shape) for key, tensor in found.items()
        ):
            raise UserError(f"the trainer state to resume from is another optimiser's: that of {name} does not fit")
        kept[i] = found
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
