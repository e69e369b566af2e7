"""A run's folder: config.json, metrics.jsonl (one object per step) and stories.jsonl (one object
per story).

A killed run leaves at most an incomplete last line, which readers skip. A resumed run first
truncates these files to the step of its checkpoint. One process at a time writes (`locked`). A
folder may have been cut, edited or written by something else, so each kind of file has one reader
here, which checks names, types and sizes for its callers."""

import contextlib
import datetime
import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any, TypeAlias

from filelock import FileLock, Timeout

from tinystory import __version__
from tinystory.run.credentials import redacted
from tinystory.run.errors import UserError, cannot_write
from tinystory.run.journal import Journal
from tinystory.run.paths import ROOT, hint
from tinystory.run.track import Tracker
from tinystory.run.trust import marked

Record: TypeAlias = dict[str, Any]  # one JSON object
# allowed types by field; None: it may be missing
Fields: TypeAlias = dict[str, tuple[type | None, ...]]

CONFIG, METRICS, STORIES, SAMPLES = "config.json", "metrics.jsonl", "stories.jsonl", "samples.jsonl"
EVALUATIONS = "evaluations.jsonl"  # stories to held-out openings
FINDINGS = "findings.jsonl"  # what other programs found out about the run, for its report
MANIFEST = "manifest.json"
LOCK = ".lock"
LONGEST = 1 << 26  # bytes of a JSON file, or of a line of records
LARGEST = 1e100  # bound on the absolute value of a number in a record

_NUMBER = (int, float, type(None))
_STORY: Fields = {
    "opening": (str,),
    "story": (str,),
    "scores": (dict, type(None)),
    "step": (int,),
    "index": (int,),
    "reply": (str, type(None)),
    "reward": _NUMBER,
    "words": (int,),
    "ended": (str,),
}
NO_FIELDS: Fields = {}
FIELDS: dict[str, Fields] = {  # required in each record
    METRICS: {"step": (int,)},
    STORIES: _STORY,
    EVALUATIONS: _STORY,
    SAMPLES: _STORY | {"when": (str,)},
    CONFIG: {"options": (dict,), "started": (str,), "device": (str,), "resumed": (list,)},
    FINDINGS: {"title": (str,), "step": (int,), "sentences": (list,), "table": (list,)},
}


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that durably replaces `path` when the block ends without an error; else `path`
    is untouched. Raises UserError if it cannot be written (disk full, read-only, no such
    folder)."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)  # until then the rename is not durable
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        # a read-only file system refuses even to remove a missing file
        with contextlib.suppress(OSError):
            partial.unlink()


def require_writable(path: Path) -> None:
    """Create the folder of a file to be written after long work. Raises UserError if it cannot be
    written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise cannot_write(path, error) from error


def require_output(path: Path) -> None:
    """`require_writable` for a file or a new folder that the user names. Also raises UserError for
    what a run keeps under that name, and for anything among a run's checkpoints."""
    folder = path.parent.resolve()
    names = (*FIELDS, "report.html", LOCK, "checkpoints")
    of_run = path.name in names or path.name.endswith("replies.jsonl")
    refused = of_run and holds_run(folder)
    for parent in (folder, *folder.parents):
        refused |= parent.name == "checkpoints" and holds_run(parent.parent)
    if refused:
        raise UserError(f"{path} is among the files of a run: choose another place")
    require_writable(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write content (str as UTF-8) so that a kill at any instant leaves either the old content or
    the new."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A path at which the block makes a folder, which becomes `folder`, a new one, when the block
    ends without an error. What a killed process left half-written there is removed first. Raises
    UserError if it cannot be written."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        partial.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, *, new: bool = False) -> Iterator[None]:
    """Lock a run's folder, created if missing, for the block. The operating system releases the
    lock however the process ends; new folders that stay empty are removed. Raises UserError, naming
    the holder, if another process has the lock, or if `new` and the folder already holds a run."""
    folder, path = Path(folder), Path(folder) / LOCK
    lock = FileLock(path, blocking=False)
    try:
        new_folders = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder} is in use by {_holder(folder) or 'another process'}: wait until that has ended, stop it, or "
            "choose another --out"
        ) from None
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        if new and holds_run(folder):
            raise UserError(
                f"{folder} already holds a run: continue it with --resume or choose another --out"
            )
        try:
            path.write_text(
                f"process {os.getpid()} on {socket.gethostname()} since {timestamp()}\n"
            )
        except OSError as error:
            raise cannot_write(folder, error) from error
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for parent in new_folders:
                parent.rmdir()


def _holder(folder: Path) -> str:
    """The process that has locked a folder, as `locked` describes it; "" if none has."""
    with contextlib.suppress(OSError), open(folder / LOCK, errors="replace") as file:
        return file.read(200).strip()
    return ""


def in_use(folder: Path) -> bool:
    """Whether a process writes to a run's folder, from its lock file alone: taking the lock could
    get in the way. A process on another machine cannot be checked, and counts as running."""
    holder = re.fullmatch(r"process (\d{1,9}) on (\S+) since \S+", _holder(folder))
    if holder and holder[2] == socket.gethostname():
        try:
            os.kill(int(holder[1]), 0)  # signal 0: does it exist?
        except OSError as error:
            return isinstance(error, PermissionError)  # another user's
    return bool(holder)


class RunLog(contextlib.ExitStack):
    """Writes the records of a run; as a context manager it closes its files. resume_step: step to
    continue from, whose later records are dropped (0: from the start); None: a new run. writes:
    False in all processes but one."""

    def __init__(self, folder: Path, *, resume_step: int | None, writes: bool = True):
        super().__init__()
        self.folder, self.resume_step, self.writes = Path(folder), resume_step, writes
        self._journals: dict[str, Journal] = {}
        self._tracker: Tracker | None = None
        self._last_step = -1  # last one that an earlier process recorded, and sent to the tracker
        if writes:
            require_writable(self.folder / CONFIG)
        if writes and resume_step is not None:
            self._last_step = max(
                (record["step"] for record in read_metrics(self.folder)), default=-1
            )
            for name in (METRICS, STORIES):
                keep_until(self.folder / name, resume_step)
            # The checkpoint of step 0 is saved before the evaluation, all others after.
            keep_until(self.folder / EVALUATIONS, resume_step or -1)

    def config(self, options: Mapping[str, Any]) -> None:
        """Write config.json: options, versions, device, git commit, and the times of the start and
        of each resume. The device recorded by name is options["device"] ("cpu", "cuda:0", ...;
        default "cpu")."""
        if not self.writes:
            return
        import torch  # imported here because reports do not need it

        before = read_config(self.folder) if self.resume_step is not None else {}
        at, threads, device = timestamp(), torch.get_num_threads(), options.get("device") or "cpu"
        if device == "cpu" and type(before.get("threads")) is int and before["threads"] != threads:
            print(
                f"warning: {threads} threads, where the run had {before['threads']}: its bits will not be those of a "
                f"run never stopped; OMP_NUM_THREADS={before['threads']} would keep them"
            )
        resumed = before.get("resumed", [])
        if before:
            resumed.append({"step": self.resume_step, "at": at})
        # torch.__version__ names the build (+cpu, +cu128), which the metadata of PyPI's wheels do
        # not.
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tinystory": __version__,
        }
        versions |= {name: metadata.version(name) for name in ("numpy", "tokenizers")}
        machine = dict(
            versions=versions, device=device_name(device), threads=threads, git_commit=git_commit()
        )
        record = dict(
            options=options, **machine, started=before.get("started", at), resumed=resumed
        )
        text = redacted(without_passwords(json.dumps(record, default=str)))
        recorded = json.loads(text)
        write_config(self.folder, recorded)
        # each resume continues the same run there
        if (tracker := options.get("track", "none")) != "none":
            run_id = re.sub(r"\W+", "-", f"{self.folder.resolve().name}-{record['started']}")
            self._tracker = Tracker(tracker, self.folder, run_id, recorded["options"])
            self.callback(self._tracker.close)

    def metrics(self, *, step: int, **values: Any) -> Record:
        """Append and return the record of a step: floats keep 7 digits, NaN and infinity become
        null."""
        record = plain({"step": step} | values)
        self._append(METRICS, [record])
        self.track(record)
        return record

    def track(self, record: Record) -> None:
        """Send numbers to the tracker only, such as an evaluation's before the first step."""
        if self._tracker is not None and record["step"] > self._last_step:
            self._tracker.metrics(record)

    def stories(self, records: Sequence[Record]) -> None:
        """Append one record per story: step, index, opening, story, reply, scores, reward, words,
        ended."""
        self._append(STORIES, records)

    def evaluations(self, records: Sequence[Record]) -> None:
        """Append the same for the stories of an evaluation, which are not trained on."""
        self._append(EVALUATIONS, records)
        if self._tracker is not None and records[0]["step"] > self._last_step:
            self._tracker.stories(records)

    def _append(self, name: str, records: Sequence[Record]) -> None:
        if not self.writes:
            return
        if name not in self._journals:
            self._journals[name] = self.enter_context(
                contextlib.closing(Journal(self.folder / name))
            )
        self._journals[name].append(*map(plain, records))


def write_config(folder: Path, record: Record) -> None:
    """Write config.json with this user's mark."""
    atomic_write(folder / CONFIG, json.dumps(marked(record), indent=2) + "\n")


def without_passwords(text: str) -> str:
    """The text with https://user:password@host shortened to https://host, to be recorded."""
    return re.sub(r'(?<=://)[^/@\s"]+@', "", text)


def timestamp() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def parse_object(text: bytes | str, fields: Fields) -> Record:
    """The JSON object in a text. Raises ValueError unless it is one, with these fields and without
    NaN or Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"it holds {name}")

    try:
        record = json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    check_fields(record, fields)
    return record


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read. In the block, OSError and ValueError become a UserError that offers no
    remedy; callers may add one. A pipe or a device is refused: reading it could block."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            yield file
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error


def read_text(path: Path) -> str:
    """The text of a regular file. Raises UserError if it is over LONGEST bytes, has NUL characters
    or is not UTF-8."""
    with open_bytes(path) as file:
        return _text(file)


def _text(file: IO[bytes]) -> str:
    content = file.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise ValueError(f"it is over {LONGEST >> 20} MB")
    if b"\0" in content:
        raise ValueError("it holds NUL characters")
    return content.decode()


def read_object(path: Path, fields: Fields = NO_FIELDS) -> Record:
    """The JSON object in a file. Raises UserError unless it is one with these fields."""
    with open_bytes(path) as file:
        return parse_object(_text(file), fields)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises UserError if it cannot be read."""
    digest = hashlib.sha256()
    with open_bytes(path) as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """Write the size and the SHA-256 of each file in a folder to its MANIFEST, and sync them
    all."""
    manifest = {
        p.name: {"size": p.stat().st_size, "sha256": file_hash(p)} for p in sorted(folder.iterdir())
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in folder.iterdir():
        sync(path)


def require_whole(folder: Path, names: Iterable[str]) -> None:
    """Raises UserError, naming the file, unless these files match the folder's MANIFEST."""
    manifest = read_object(folder / MANIFEST)
    for name in names:
        path = folder / name
        if not path.is_file() or manifest.get(name) != {
            "size": path.stat().st_size,
            "sha256": file_hash(path),
        }:
            problem = f"is not what {MANIFEST} beside it says was saved: one of them is damaged"
            raise UserError(f"{path} {problem if path.exists() else 'is missing'}")


def read_config(folder: Path) -> Record:
    """The object in config.json; {} if there is no such file. Raises UserError unless it has
    RunLog.config's fields."""
    path = Path(folder) / CONFIG
    return read_object(path, FIELDS[CONFIG]) if path.exists() else {}


def require_config(folder: Path) -> Record:
    """The object in config.json of a run to be resumed. Raises UserError if it cannot be read."""
    if not holds_run(Path(folder)):
        raise UserError(
            f"--resume: {folder} holds no run, and no checkpoint yet; start without --resume"
        )
    try:
        return read_object(Path(folder) / CONFIG, FIELDS[CONFIG])
    except UserError as error:
        raise UserError(
            f"{error}; restore it from a copy, or start a new run in another --out"
        ) from error


def holds_run(folder: Path) -> bool:
    return any(
        (folder / name).exists() for name in (CONFIG, METRICS, STORIES, SAMPLES, "checkpoints")
    )


def newest_run() -> Path:
    """The run under runs/ that was written to last, the default of commands. Raises UserError if
    there is none."""
    configs = Path("runs").glob(f"**/{CONFIG}")
    # not an export
    runs = [path.parent for path in configs if not (path.parent / "model.safetensors").exists()]
    if not runs:
        raise UserError(
            f"there is no run under runs/: give the folder of one, or begin one: {hint('train_pretrain.py')}"
        )
    run = max(runs, key=lambda folder: max(path.stat().st_mtime for path in folder.iterdir()))
    print(f"the newest run: {run}", file=sys.stderr)
    return run


def read_metrics(folder: Path) -> list[Record]:
    return list(read_records(Path(folder) / METRICS))


def read_stories(folder: Path) -> Iterator[Record]:
    """The records of stories.jsonl, one at a time: a long run's file is too large for memory."""
    return read_records(Path(folder) / STORIES)


def read_records(
    path: Path, fields: Fields | None = None, check: Callable[[Record], None] | None = None
) -> Iterator[Record]:
    """The records of a JSON Lines file; none if it is missing. fields: required (default: FIELDS of
    its name). check: raises ValueError for a record that is refused all the same. A last line left
    incomplete by a killed process is skipped. Raises UserError for any other line that is no such
    record."""
    if not path.exists():
        return
    fields = FIELDS.get(path.name, NO_FIELDS) if fields is None else fields
    with open_bytes(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), start=1):
            if line == b"\n":
                continue
            try:
                if len(line) > LONGEST:
                    raise ValueError(f"it is over {LONGEST >> 20} MB")
                record = parse_object(line, fields)
                if check is not None:
                    check(record)
            except ValueError as error:
                torn = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
                if torn and not line.endswith(b"\n"):
                    return
                raise UserError(
                    f"line {number} of {path} does not belong there ({error}): fix or delete that line, or choose "
                    "another file"
                ) from None
            yield record


def check_fields(record: Record, fields: Fields) -> None:
    """Raises ValueError for a field that is missing, of another type, or out of its range."""
    for name, kinds in fields.items():
        if name not in record and None in kinds:
            continue
        if name not in record:
            raise ValueError(f"it has no {name!r}")
        if type(record[name]) not in kinds:
            raise ValueError(f"its {name!r} is {record[name]!r:.40}")
        if int in kinds and float not in kinds and not 0 <= record[name] < 1 << 53:
            raise ValueError(f"its {name!r} is negative or too large")
    numbers = [name for name, kinds in fields.items() if kinds == _NUMBER]
    for name, value in (
        record.items() if fields is FIELDS[METRICS] else ((name, record[name]) for name in numbers)
    ):
        if type(value) not in (*_NUMBER, bool) and not name.startswith("teacher_"):
            raise ValueError(f"its {name!r} is {value!r:.40}")
        if isinstance(value, int | float) and not -LARGEST < value < LARGEST:
            raise ValueError(f"its {name!r} is too large")
    if "story" in fields and any(
        type(score) not in (int, float) or not 0 <= score <= 3
        for score in (record["scores"] or {}).values()
    ):
        raise ValueError("a score in it is not a number from 0 to 3")


def keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    with atomic_file(path) as file:
        for record in read_records(path):
            if record["step"] <= step:
                file.write(json.dumps(record).encode() + b"\n")


def plain(value: Any) -> Any:
    """JSON types for value: tensor and NumPy scalars become numbers, floats keep 7 digits,
    non-finite ones are None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def device_name(device: str) -> str:
    """The device's own name, such as "NVIDIA H100 80GB HBM3"; for a CPU its model and the threads
    in use."""
    import torch  # imported here so that --help is fast

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = re.findall(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    model = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def git_commit() -> str | None:
    """The commit of the clone that this code runs from, with "-dirty" if it has changes; None
    outside a clone."""
    if not (ROOT / ".git").exists():
        return None
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.check_output(
            describe, cwd=ROOT, stderr=subprocess.DEVNULL, text=True, timeout=20
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None
