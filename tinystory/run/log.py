"""What a run writes about itself: config.json, metrics.jsonl (one object per step), stories.jsonl
and evaluations.jsonl (one object per story), and the same for a tracker."""

import contextlib
import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
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
    keep_until,
    plain,
    read_metrics,
)
from tinystory.run.track import Tracker


class RunLog(contextlib.ExitStack):
    """Writes the records of a run; as a context manager it closes its files. resume_step: step to
    continue from, whose later records are dropped (0: from the start); None: a new run. writes:
    False in all processes but one.

    A killed run leaves at most an incomplete last line, which readers skip."""

    def __init__(self, folder: Path, *, resume_step: int | None, writes: bool = True):
        super().__init__()
        self.folder = Path(folder)
        self.resume_step = resume_step
        self.writes = writes
        self._journals: dict[str, Journal] = {}
        self._tracker: Tracker | None = None
        self._last_step = -1  # last one that an earlier process recorded, and sent to the tracker
        if not writes:
            return
        require_writable(self.folder / CONFIG)
        if resume_step is None:
            return
        for record in read_metrics(self.folder):
            self._last_step = max(self._last_step, record["step"])
        keep_until(self.folder / METRICS, resume_step)
        keep_until(self.folder / STORIES, resume_step)
        # The checkpoint of step 0 is saved before the evaluation, all others after.
        keep_until(self.folder / EVALUATIONS, resume_step or -1)

    def config(self, options: Mapping[str, Any]) -> None:
        """Write config.json: options, versions, device, git commit, and the times of the start and
        of each resume. The device recorded by name is options["device"] ("cpu", "cuda:0", ...;
        default "cpu")."""
        if not self.writes:
            return
        import torch  # imported here because reports do not need it

        from tinystory.run.device import device_name

        before = read_config(self.folder) if self.resume_step is not None else {}
        device = options.get("device") or "cpu"
        threads = torch.get_num_threads()
        if device == "cpu":
            warn_of_threads(before.get("threads"), threads)
        now = timestamp()
        resumed = before.get("resumed", [])
        if before:
            resumed.append({"step": self.resume_step, "at": now})
        record = {
            "options": options,
            "versions": versions(),
            "device": device_name(device),
            "threads": threads,
            "git_commit": git_commit(),
            "started": before.get("started", now),
            "resumed": resumed,
        }
        text = json.dumps(record, default=str)
        recorded = json.loads(redacted(without_passwords(text)))
        write_config(self.folder, recorded)

        tracker = options.get("track", "none")
        if tracker != "none":
            # each resume continues the same run there
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
        """Append one record per story (`story_records`)."""
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
            journal = Journal(self.folder / name)
            self.callback(journal.close)
            self._journals[name] = journal
        self._journals[name].append(*map(plain, records))


def warn_of_threads(before: Any, threads: int) -> None:
    """before: the threads on record, if any."""
    if type(before) is int and before != threads:
        print(
            f"warning: {threads} threads, where the run had {before}: its bits will not be those "
            f"of a run never stopped; OMP_NUM_THREADS={before} would keep them"
        )


def versions() -> dict[str, str]:
    import torch

    return {
        "python": platform.python_version(),
        # it names the build (+cpu, +cu128), which the metadata of PyPI's wheels do not
        "torch": torch.__version__,
        "tinystory": __version__,
        "numpy": metadata.version("numpy"),
        "tokenizers": metadata.version("tokenizers"),
    }


def git_commit() -> str | None:
    """The commit of the clone that this code runs from, with "-dirty" if it has changes; None
    outside a clone."""
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
    """The text with https://user:password@host shortened to https://host, to be recorded."""
    return re.sub(r'(?<=://)[^/@\s"]+@', "", text)
