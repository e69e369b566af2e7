"""A run's folder: config.json, metrics.jsonl (one object a step) and stories.jsonl (one object a story).

Records are written a whole line at a time, unbuffered, so a killed run leaves at most one torn last line. Whoever reads
skips that line; a resumed run cuts both files back to its checkpoint's step before it goes on.
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
from typing import IO

from tinystory.errors import UserError

CONFIG, METRICS, STORIES, SAMPLES = "config.json", "metrics.jsonl", "stories.jsonl", "samples.jsonl"
LOOKS = "looks.jsonl"  # stories to held-out openings


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes path's place, durably, when the block ends well; otherwise path is left untouched.

    Raises UserError where the disk refuses (full, read-only, no such folder).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        # The rename itself is only on disk once its folder is.
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
    """Write content (str as UTF-8) to path: after a kill at any instant path holds all of the old or all of the new."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another folder")


class RunLog:
    """Opens a run's folder for writing.

    resume_step: None for a new run; else the step of the checkpoint that the run continues from (0: from the start),
    and records of later steps are dropped. writes: False in all processes but one. Raises UserError if a new run would
    write over an old one.
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

    def config(self, options: Mapping) -> None:
        """Write config.json: options as run, versions, device, git commit, when it started and was resumed.

        options["device"] ("cpu", "cuda:0", ...; "cpu" if absent) is the device whose name is kept.
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
        # A password inside a URL (https://user:password@host) is a secret, whoever put it there.
        text = re.sub(r'(?<=://)[^/@\s"]+@', "", text)
        atomic_write(path, text + "\n")

    def metrics(self, *, step: int, **values) -> None:
        """Append one step's record. Floats keep 7 significant digits; JSON has no NaN or infinity: they become null."""
        self._append(METRICS, [{"step": step} | values])

    def stories(self, records: Sequence[Mapping]) -> None:
        """Append one record a story: step, index, opening, story, reply, scores, reward, words, ended."""
        self._append(STORIES, records)

    def looks(self, records: Sequence[Mapping]) -> None:
        """The same for stories to held-out openings, from which nothing is learned."""
        self._append(LOOKS, records)

    def _append(self, name: str, records: Sequence[Mapping]) -> None:
        if not self.writes:
            return
        lines = "".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records).encode()
        path = self.folder / name
        try:
            if name not in self._files:
                self._files[name] = open(path, "ab", buffering=0)  # noqa: SIM115  (held for the whole run)
            while lines:  # an unbuffered write may take only a part, as on a disk that is nearly full
                lines = lines[self._files[name].write(lines) :]
        except OSError as error:
            raise cannot_write(path, error) from error

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_config(folder: Path) -> dict:
    """config.json's object; {} where there is none."""
    path = Path(folder) / CONFIG
    return json.loads(path.read_bytes()) if path.exists() else {}


def read_metrics(folder: Path) -> list[dict]:
    """Every record of metrics.jsonl, in order; [] where there is none."""
    return list(read_records(Path(folder) / METRICS))


def read_stories(folder: Path) -> Iterator[dict]:
    """The records of stories.jsonl, one at a time: a long run's file is larger than one wants to hold."""
    return read_records(Path(folder) / STORIES)


def read_records(path: Path) -> Iterator[dict]:
    """The objects of a JSON-lines file; none if it is missing. A torn last line is skipped.

    Raises UserError if any other line is not a JSON object: then something else wrote to the file.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        torn = None
        for number, line in enumerate(file, 1):
            if torn is not None:
                raise UserError(f"line {torn} of {path} is not a JSON object: mend or delete that line")
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                yield record
            else:
                torn = number


def keep_until(path: Path, step: int) -> None:
    """Cut a record file back to the records whose step is at most step."""
    if not path.exists():
        return
    with atomic_file(path) as file:
        for record in read_records(path):
            if record["step"] <= step:
                file.write(json.dumps(record).encode() + b"\n")


def plain(value):
    """value as JSON can hold it: tensor and NumPy scalars become numbers, floats are rounded, non-finite ones None."""
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
    import torch  # not at the top: reports do without

    import tinystory

    # torch says itself which build it is (+cpu, +cu128), which the metadata of PyPI's does not.
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "tokenizers", "tinystory"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a clone that was not installed
            found[package] = getattr(tinystory, "__version__", None) if package == "tinystory" else None
    return found


def device_name(device: str) -> str:
    """What the device calls itself: "NVIDIA H100 80GB HBM3", or the CPU's model with the threads in use."""
    import torch  # here, so that --help need not wait for it

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = names[0] if names else model
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def git_commit() -> str | None:
    """The commit of the clone that this code runs from ("-dirty" appended if it was changed), None outside one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(describe, cwd=root, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
