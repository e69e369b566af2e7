"""Sends a run's records to TensorBoard, wandb or trackio as well; they stay on this machine unless
the tracker's own environment variables (WANDB_MODE, TRACKIO_SPACE_ID) say otherwise."""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinystory.run.text import printable

TRACKERS = ("none", "tensorboard", "wandb", "trackio")
COLUMNS = ("index", "opening", "story", "scores", "score", "reward")  # of the table of stories


class Tracker:
    """Sends records to a tracker, as its run `run_id`. The first failure is printed, and the run
    goes on without it."""

    def __init__(self, name: str, folder: Path, run_id: str, options: Mapping[str, Any]):
        self.name = name
        self._sink: TensorBoard | Wandb | None = None
        tracker = TensorBoard if name == "tensorboard" else Wandb
        self._sink = self._try(tracker, name, folder, run_id, options)

    def metrics(self, record: Mapping[str, Any]) -> None:
        if self._sink is None:
            return
        numbers = {}
        for key, value in record.items():
            if key != "step" and type(value) in (int, float):
                numbers[key] = value
        self._try(self._sink.log, record["step"], numbers)

    def stories(self, records: Sequence[Mapping[str, Any]]) -> None:
        if self._sink is None:
            return
        rows = []
        for record in records:
            cells = [printable(str(record[name])) for name in COLUMNS]
            rows.append([" ".join(cell.split()) for cell in cells])
        self._try(self._sink.table, records[0]["step"], rows)

    def close(self) -> None:
        if self._sink:
            self._try(self._sink.close)

    def _try(self, send: Callable, *arguments: Any) -> Any:
        try:
            return send(*arguments)
        except Exception as error:  # Errors of trackers, storage and network have no common class,
            # and a failing plot must not end a run of hours.
            self._sink = None
            message = printable(" ".join(str(error).split()))[:200] or type(error).__name__
            tqdm.write(
                f"warning: {self.name} failed ({message}): the run goes on, and records "
                "everything, without it"
            )


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs`."""

    def __init__(self, name: str, folder: Path, *_: object):
        tensorboard = importlib.import_module("torch.utils.tensorboard")
        self.writer = tensorboard.SummaryWriter(folder / name)
        self.close = self.writer.close

    def log(self, step: int, numbers: dict) -> None:
        for key, value in numbers.items():  # in float64, as metrics.jsonl has them
            self.writer.add_scalar(key, value, step, new_style=True, double_precision=True)
        self.writer.flush()

    def table(self, step: int, rows: list) -> None:
        lines: list[Sequence[str]] = [COLUMNS, ["---"] * len(COLUMNS)]
        for row in rows:
            lines.append([cell.replace("|", "\\|") for cell in row])
        markdown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        self.writer.add_text("stories", markdown, step)


class Wandb:
    """wandb, or trackio, which has its interface."""

    def __init__(self, name: str, folder: Path, run_id: str, options: Mapping[str, Any]):
        self.module = importlib.import_module(name)
        settings: dict[str, Any] = {
            "project": "tinystory",
            "resume": "allow",
            "config": dict(options),
        }
        if name == "wandb":
            mode = os.environ.get("WANDB_MODE", "offline")
            settings |= {"name": folder.name, "id": run_id, "dir": folder, "mode": mode}
        else:
            settings |= {"name": run_id, "embed": False}
            settings |= {"auto_log_cpu": False, "auto_log_gpu": False}
        self.module.init(**settings)
        self.close = self.module.finish

    def log(self, step: int, numbers: dict) -> None:
        self.module.log(numbers, step=step)

    def table(self, step: int, rows: list) -> None:
        self.log(step, {"stories": self.module.Table(columns=list(COLUMNS), data=rows)})
