"""Run folders: whether a folder holds a run, which process writes to it, and config.json."""

import contextlib
import copy
import datetime
import itertools
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tinystory.run.errors import UserError, cannot_write
from tinystory.run.files import atomic_write, open_bytes, require_writable
from tinystory.run.paths import hint
from tinystory.run.records import CONFIG, FIELDS, METRICS, SAMPLES, STORIES, Record, read_object
from tinystory.run.text import printable

LOCK = ".lock"
CONTROL_RUNS = "controls"  # folder in a run, with a folder for each of the controls


class Taken(UserError):
    """A new run cannot use the folder, because it holds another run or a process has locked it."""


def holds_run(folder: Path) -> bool:
    names = (CONFIG, METRICS, STORIES, SAMPLES, "checkpoints")
    return any((folder / name).exists() for name in names)


def newest_run() -> Path:
    """The run under runs/ that was written to last, which is the default of commands. Raises
    UserError if there is no run."""
    runs = []
    for config in Path("runs").glob(f"**/{CONFIG}"):
        run = config.parent
        is_export = (run / "model.safetensors").exists()
        is_control = run.parent.name == CONTROL_RUNS
        if not is_export and not is_control:
            runs.append(run)
    if not runs:
        raise UserError(
            "there is no run under runs/: give the folder of a run, or begin one: "
            f"{hint('train_pretrain.py')}"
        )
    newest = max(runs, key=last_written)
    print(printable(f"the newest run: {newest}"), file=sys.stderr)
    return newest


def newest_first(*folders: Path) -> list[Path]:
    """The runs in these folders and in the further folders that `numbered` gives for each, newest
    first, by the time of the last write."""
    runs = []
    for folder in folders:
        for path in sorted(folder.parent.glob(f"{folder.name}*")):
            number = path.name.removeprefix(folder.name)
            if re.fullmatch(r"(-\d+)?", number) and holds_run(path):
                runs.append(path)
    return sorted(runs, key=last_written, reverse=True)


def last_written(run: Path) -> float:
    """The time at which a run was last written to, in seconds since the epoch. Hidden files do not
    count, because they come and go while a run is written."""
    return max(path.stat().st_mtime for path in run.glob("[!.]*"))


def numbered(folder: Path) -> Iterator[Path]:
    """Yields FOLDER, FOLDER-2, FOLDER-3, ..."""
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def require_output(path: Path) -> None:
    """`require_writable` for a file or a new folder that the user names. Also raises UserError for
    a file that a run keeps, and for any path among a run's checkpoints."""
    folder = path.parent.resolve()
    names = (*FIELDS, "report.html", LOCK, "checkpoints")
    is_of_run = path.name in names or path.name.endswith("replies.jsonl")
    refused = is_of_run and holds_run(folder)
    for parent in (folder, *folder.parents):
        refused |= parent.name == "checkpoints" and holds_run(parent.parent)
    if refused:
        raise UserError(f"{path} is among the files of a run: choose another path")
    require_writable(path)


def timestamp() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# ---- config.json ---------------------------------------------------------------------------------


def write_config(folder: Path, record: Record) -> None:
    atomic_write(folder / CONFIG, json.dumps(record, indent=2) + "\n")


def read_config(folder: Path) -> Record:
    """The object in config.json; {} if there is no such file. Raises UserError unless the object
    has the fields that RunLog.config writes."""
    path = folder / CONFIG
    return read_object(path, FIELDS[CONFIG]) if path.exists() else {}


def require_config(folder: Path) -> Record:
    """The object in config.json of a run to be resumed. Raises UserError if the file is missing or
    cannot be read."""
    if not holds_run(folder):
        raise UserError(
            f"--resume: {folder} holds no run and no checkpoint; give the run's folder as --out, or "
            "start without --resume"
        )
    try:
        return read_object(folder / CONFIG, FIELDS[CONFIG])
    except UserError as error:
        raise UserError(
            f"{error}; restore it from a copy, or start a new run in another --out"
        ) from error


# ---- one process at a time -----------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path, *, new: bool = False) -> Iterator[None]:
    """Lock a run's folder for the block; a missing folder is created. The operating system releases
    the lock when the process ends, in whatever way. New folders that stay empty are removed. Raises
    Taken, with the name of the holder, if another process has the lock, or if `new` and the folder
    already holds a run."""
    path = folder / LOCK
    lock = FileLock(path, blocking=False)
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"cannot write {path}: it is not a regular file; remove it")
        new_folders = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        holder = lock_holder(folder) or "another process"
        raise Taken(
            f"{folder} is in use by {holder}: wait until that process ends, stop it, or choose "
            "another --out"
        ) from None
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        if new and holds_run(folder):
            raise Taken(
                f"{folder} already holds a run: continue it with --resume or choose another --out"
            )
        process = f"process {os.getpid()} on {socket.gethostname()} since {timestamp()}\n"
        try:
            path.write_text(process)
        except OSError as error:
            raise cannot_write(folder, error) from error
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for parent in new_folders:
                parent.rmdir()


@contextlib.contextmanager
def locked_run(config: Any) -> Iterator[Any]:
    """Lock the folder config.out of a run for the block, and yield the options. A new run without
    --out takes the first free folder of `numbered`, which is then `out` of the yielded options, and
    prints this."""
    folder = Path(config.out)
    takes_free = not (config.resume or "out" in config.given)
    with contextlib.ExitStack() as stack:
        for candidate in numbered(folder):
            if takes_free and holds_run(candidate):  # only a resume may lock it
                continue
            try:
                stack.enter_context(locked(candidate, new=not config.resume))
                break
            except Taken:
                if not takes_free:
                    raise
        if candidate != folder:
            print(printable(f"{folder} is taken, so the folder of this run is {candidate}"))
        elif config.resume and "out" not in config.given:
            print(printable(f"--resume: the newest run without --out is {folder}"))
        taken = copy.copy(config)
        taken.out = str(candidate)
        yield taken


def lock_holder(folder: Path) -> str:
    """The description, from the lock file, of the process that has locked a folder; "" if no
    process has."""
    try:
        with open_bytes(folder / LOCK) as file:
            return file.read(200).decode(errors="replace").strip()
    except UserError:
        return ""


def in_use(folder: Path) -> bool:
    """Whether a process writes to a run's folder, judged only from the lock file, because taking
    the lock could block a command. A process on another machine cannot be checked and counts as
    running."""
    holder = re.fullmatch(r"process (\d{1,9}) on (\S+) since \S+", lock_holder(folder))
    if holder is None:
        return False
    process, host = holder.groups()
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(process), 0)  # signal 0: does it exist?
    except OSError as error:
        return isinstance(error, PermissionError)  # a process of another user
    return True
