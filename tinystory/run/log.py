"""Writes the records of a run: config.json, metrics.jsonl (one object per step), stories.jsonl and
evaluations.jsonl (one object per story)."""

import contextlib
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tinystory import __version__
from tinystory.run.credentials import redacted
from tinystory.run.files import require_writable
from tinystory.run.folder import read_config, timestamp, write_config
from tinystory.run.journal import Journal
from tinystory.run.paths import ROOT
from tinystory.run.records import (
    CONFIG,
    EVALUATIONS,
    METRICS,
    STORIES,
    Record,
    add_to_record,
    keep_until,
    plain,
)


class RunLog(contextlib.ExitStack):
    """Writes the records of a run. The context manager closes the files. resume_step: step to
    continue from (0: from the start); records of later steps are dropped. None: a new run.
    evaluated_before: evaluations of earlier steps are kept on a resume (default: all until
    resume_step, but not that of step 0). writes: False in all processes except one.

    A killed run leaves at most an incomplete last line, which readers skip."""

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int | None,
        evaluated_before: int | None = None,
        writes: bool = True,
    ):
        super().__init__()
        self.folder = folder
        self.resume_step = resume_step
        self.writes = writes
        self._journals: dict[str, Journal] = {}
        if not writes:
            return
        require_writable(self.folder / CONFIG)
        if resume_step is None:
            return
        keep_until(self.folder / METRICS, resume_step)
        keep_until(self.folder / STORIES, resume_step)
        if evaluated_before is None:
            evaluated_before = resume_step + 1 if resume_step else 0
        keep_until(self.folder / EVALUATIONS, evaluated_before - 1)

    def config(self, options: dict[str, Any]) -> None:
        """Write config.json: options, versions, device, git commit, and the times of the start and
        of each resume. options["device"] ("cpu", "cuda:0", ...; default "cpu") is recorded by the
        device's name."""
        if not self.writes:
            return
        import torch  # imported here because reports do not need it

        from tinystory.run.device import device_name

        before = read_config(self.folder) if self.resume_step is not None else {}
        device = options.get("device") or "cpu"
        threads = torch.get_num_threads()
        threads_before = before.get("threads", threads)
        if device == "cpu" and threads_before != threads:
            print(
                f"warning: this resume has {threads} threads and the run had {threads_before!r:.20}, so the results "
                "are not bit-identical to an uninterrupted run: set OMP_NUM_THREADS to the run's number"
            )
        now = timestamp()
        resumed = before.get("resumed", [])
        if before:
            resumed.append({"step": self.resume_step, "at": now})
        record = {
            "options": before.get("options", {})
            | options,  # some values are only known at the start
            "versions": versions(),
            "device": device_name(device),
            "threads": threads,
            "git_commit": git_commit(),
            "started": before.get("started", now),
            "resumed": resumed,
        }
        text = json.dumps(record, default=str)
        write_config(self.folder, json.loads(redacted(without_passwords(text))))

    def set_option(self, name: str, value: Any) -> None:
        """Change one of the options in config.json, which a step found out."""
        record = read_config(self.folder)
        record["options"][name] = value
        write_config(self.folder, record)

    def metrics(self, *, step: int, **values: Any) -> Record:
        """The record of a step, which is appended to metrics.jsonl. Floats keep 7 digits; NaN and
        infinity become null."""
        record = plain({"step": step} | values)
        self.append(METRICS, [record])
        return record

    def add_metrics(self, step: int, values: Record, costs: Record) -> None:
        """Add an evaluation's values to the record of a step. The evaluation's costs of the teacher
        are added to the step's costs; only `teacher_cost`, the cost of the whole run, is
        replaced."""
        path = self.folder / METRICS
        if self.writes and path.exists():
            add_to_record(path, step, plain(values), plain(costs))
            journal = self._journals.pop(METRICS, None)
            if journal is not None:  # it would append to the replaced file
                journal.close()

    def append(self, name: str, records: Sequence[Record]) -> None:
        """Append records to the file `name`: METRICS (one record per step), STORIES (one record per
        story, see `story_records`) or EVALUATIONS (one record per story of an evaluation)."""
        if not self.writes:
            return
        if name not in self._journals:
            journal = Journal(self.folder / name)
            self.callback(journal.close)
            self._journals[name] = journal
        self._journals[name].append(*map(plain, records))


def versions() -> dict[str, str]:
    import torch

    return {
        "python": platform.python_version(),
        # torch.__version__ names the build (+cpu, +cu128), which the metadata of PyPI's wheels omit
        "torch": torch.__version__,
        "tinystory": __version__,
        "numpy": metadata.version("numpy"),
        "tokenizers": metadata.version("tokenizers"),
    }


def git_commit() -> str | None:
    """The commit of the clone that this code runs from, with "-dirty" if the clone has changes;
    None outside a clone."""
    if not (ROOT / ".git").exists():
        return None
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.check_output(
            describe, cwd=ROOT, stderr=subprocess.DEVNULL, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip()


def without_passwords(text: str) -> str:
    """The text, with https://user:password@host shortened to https://host, so that no password is
    recorded."""
    return re.sub(r'(?<=://)[^/@\s"]+@', "", text)
