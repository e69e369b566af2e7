"""A run's records in TensorBoard, wandb or trackio, beside its own files: on this machine, unless the tracker's own
environment variables (WANDB_MODE, TRACKIO_SPACE_ID) say otherwise."""

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from tinystory.run.text import printable

TRACKERS = ("none", "tensorboard", "wandb", "trackio")
COLUMNS = ("index", "opening", "story", "scores", "reward")  # of a table of stories
Record: TypeAlias = Mapping[str, Any]
Sink: TypeAlias = tuple[Callable[[int, dict], Any], Callable[[int, list], Any], Callable[[], Any]]  # log, table, close


class Tracker:
    """Sends records to the tracker `name`, as the run `run_id` there. If it fails, one line says so, and the run goes
    on without it. last_step: the steps up to it are there already, sent by an earlier process."""

    def __init__(self, name: str, folder: Path, run_id: str, options: Record, last_step: int):
        self.name, self.last_step = name, last_step
        self._sink: Sink | None = None
        opened = (tensorboard, folder) if name == "tensorboard" else (wandb, name, folder, run_id, options)
        self._sink = self._try(*opened)

    def metrics(self, record: Record) -> None:
        """One curve for each number of a record of metrics.jsonl."""
        numbers = {key: value for key, value in record.items() if key != "step" and type(value) in (int, float)}
        if self._sink and record["step"] > self.last_step:
            self._try(self._sink[0], record["step"], numbers)

    def stories(self, records: Sequence[Record]) -> None:
        """The stories of an evaluation as a table of text."""
        if self._sink and records[0]["step"] > self.last_step:
            rows = [[cell(record[name]) for name in COLUMNS] for record in records]
            self._try(self._sink[1], records[0]["step"], rows)

    def close(self) -> None:
        if self._sink:
            self._try(self._sink[2])

    def _try(self, send: Callable, *arguments: Any) -> Any:
        try:
            return send(*arguments)
        except Exception as error:  # Whatever it is: what trackers, their storage and the network raise has no common
            # class, and a run of hours must not end because a picture of it cannot be drawn.
            self._sink = None
            message = printable(" ".join(str(error).split()))[:200] or type(error).__name__
            tqdm.write(f"warning: {self.name} failed ({message}): the run goes on, and records everything, without it")


def cell(value: object) -> str:
    """Text on one line."""
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(printable(text).split())


def tensorboard(folder: Path) -> Sink:
    """Event files in the run's folder: `tensorboard --logdir runs`."""
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(folder / "tensorboard")

    def log(step: int, numbers: dict) -> None:
        for key, value in numbers.items():  # in float64, as metrics.jsonl has them
            writer.add_scalar(key, value, step, new_style=True, double_precision=True)
        writer.flush()

    def table(step: int, rows: list) -> None:
        rows = [COLUMNS, ["---"] * len(COLUMNS), *rows]
        lines = (" | ".join(text.replace("|", "\\|") for text in row) for row in rows)
        writer.add_text("stories", "\n".join(f"| {line} |" for line in lines), step)

    return log, table, writer.close


def wandb(name: str, folder: Path, run_id: str, options: Record) -> Sink:
    """wandb, or trackio, which has its interface."""
    module = importlib.import_module(name)
    own: dict[str, Any] = dict(name=run_id, embed=False, auto_log_cpu=False, auto_log_gpu=False)
    if name == "wandb":
        own = dict(name=folder.name, id=run_id, dir=folder, mode=os.environ.get("WANDB_MODE", "offline"))
    module.init(project="tinystory", resume="allow", config=dict(options), **own)

    def table(step: int, rows: list) -> None:
        module.log({"stories": module.Table(columns=list(COLUMNS), data=rows)}, step=step)

    return lambda step, numbers: module.log(numbers, step=step), table, module.finish
