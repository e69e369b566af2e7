"""A run's folder: config.json, metrics.jsonl (one object per step) and stories.jsonl (one object per story).

Records are written as whole lines, unbuffered, so a killed run leaves at most an incomplete last line, which readers
skip. A resumed run first truncates both files to the step of its checkpoint.
"""

import contextlib
import datetime
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any, TypeAlias

from tinystory.errors import UserError

Record: TypeAlias = dict[str, Any]  # one JSON object

CONFIG, METRICS, STORIES, SAMPLES = "config.json", "metrics.jsonl", "stories.jsonl", "samples.jsonl"
LOOKS = "looks.jsonl"  # stories to held-out openings


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that replaces path, durably, when the block ends without an error; else path is left untouched.

    Raises UserError if it cannot be written (disk full, read-only, no such folder).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        # The rename is durable only once its folder is synced.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write content (str as UTF-8) to path atomically: a kill at any instant leaves the old content or the new."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another folder")


class RunLog:
    """Opens a run's folder for writing.

    resume_step: None for a new run, else the step of the checkpoint that the run continues from (0: from the start);
    records of later steps are dropped. writes: False in all processes but one. Raises UserError if a new run would
    overwrite an old one.
    """

    def __init__(self, folder: Path, *, resume_step: int | None, writes: bool = True):
        self.folder = Path(folder)
        self.resume_step = resume_step
        self.writes = writes
        self._files: dict[str, IO[bytes]] = {}
        if not writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        if resume_step is None:
            if any((self.folder / name).exists() for name in (CONFIG, METRICS, STORIES, SAMPLES, "checkpoints")):
                raise UserError(f"{self.folder} already holds a run: continue it with --resume or choose another --out")
        else:
            for name in (METRICS, STORIES):
                keep_until(self.folder / name, resume_step)
            # The checkpoint of step 0 is saved before the student is looked at, all others after.
            keep_until(self.folder / LOOKS, resume_step or -1)

    def config(self, options: Mapping[str, Any]) -> None:
        """Write config.json: the options, versions, device, git commit, and the times of the start and of each resume.

        options["device"] ("cpu", "cuda:0", ...; "cpu" if absent) is the device whose name is recorded.
        """
        if not self.writes:
            return
        path = self.folder / CONFIG
        before = json.loads(path.read_bytes()) if self.resume_step is not None and path.exists() else {}
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        resumed = list(before.get("resumed", []))
        if before:
            resumed.append({"step": self.resume_step, "at": now})
        record = {
            "options": options,
            "versions": versions(),
            "device": device_name(options.get("device") or "cpu"),
            "git_commit": git_commit(),
            "started": before.get("started", now),
            "resumed": resumed,
        }
        text = json.dumps(record, indent=2, default=str)
        # A password in a URL (https://user:password@host) must not be recorded.
        text = re.sub(r'(?<=://)[^/@\s"]+@', "", text)
        atomic_write(path, text + "\n")

    def metrics(self, *, step: int, **values: Any) -> None:
        """Append the record of one step. Floats keep 7 significant digits; NaN and infinity become null."""
        self._append(METRICS, [{"step": step} | values])

    def stories(self, records: Sequence[Record]) -> None:
        """Append one record per story: step, index, opening, story, reply, scores, reward, words, ended."""
        self._append(STORIES, records)

    def looks(self, records: Sequence[Record]) -> None:
        """The same for stories to held-out openings, from which nothing is learned."""
        self._append(LOOKS, records)

    def _append(self, name: str, records: Sequence[Record]) -> None:
        if not self.writes:
            return
        lines = "".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records).encode()
        path = self.folder / name
        try:
            if name not in self._files:
                self._files[name] = open(path, "ab", buffering=0)  # noqa: SIM115  (open for the whole run)
            while lines:  # an unbuffered write may be partial, as on a nearly full disk
                lines = lines[self._files[name].write(lines) :]
        except OSError as error:
            raise cannot_write(path, error) from error

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_config(folder: Path) -> Record:
    """The object in config.json; {} if there is no such file."""
    path = Path(folder) / CONFIG
    return json.loads(path.read_bytes()) if path.exists() else {}


def read_metrics(folder: Path) -> list[Record]:
    """All records of metrics.jsonl, in order; [] if there is no such file."""
    return list(read_records(Path(folder) / METRICS))


def read_stories(folder: Path) -> Iterator[Record]:
    """The records of stories.jsonl, one at a time: the file of a long run is too large to hold in memory."""
    return read_records(Path(folder) / STORIES)


def read_records(path: Path) -> Iterator[Record]:
    """The objects of a JSON Lines file; none if it is missing. An incomplete last line is skipped.

    Raises UserError if any other line is not a JSON object: then something else has written to the file.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        broken = None
        for number, line in enumerate(file, 1):
            if broken is not None:
                raise UserError(f"line {broken} of {path} is not a JSON object: fix or delete that line")
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                yield record
            else:
                broken = number


def keep_until(path: Path, step: int) -> None:
    """Remove the records of later steps from a record file."""
    if not path.exists():
        return
    with atomic_file(path) as file:
        for record in read_records(path):
            if record["step"] <= step:
                file.write(json.dumps(record).encode() + b"\n")


def plain(value: Any) -> Any:
    """value with JSON types: tensor and NumPy scalars become numbers, floats are rounded, non-finite ones are None."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def versions() -> dict[str, str | None]:
    import torch  # imported here because reports do not need it

    import tinystory

    # torch.__version__ names the build (+cpu, +cu128), which the metadata of PyPI's wheels do not.
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "tokenizers", "tinystory"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a clone without installation
            found[package] = getattr(tinystory, "__version__", None) if package == "tinystory" else None
    return found


def device_name(device: str) -> str:
    """The device's own name: "NVIDIA H100 80GB HBM3", or the CPU model with the number of threads in use."""
    import torch  # imported here so that --help is fast

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    if kind != "cpu":
        return str(torch.device(device))
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = names[0] if names else model
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def git_commit() -> str | None:
    """The commit of the clone that this code runs from, plus "-dirty" if it has changes; None outside a clone."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(describe, cwd=root, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
