"""Send a run's records to TensorBoard, wandb or trackio, until the run ends.

python lab/track.py runs/demo/interact tensorboard   during the run, or after it
python lab/track.py runs/demo/pretrain wandb         wandb is offline unless WANDB_MODE is set

Each call sends all records, as a new run of the tracker. TensorBoard shows only the last call's.
"""

import importlib
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.report.before_after import from_start
from tinystory.run.errors import UserError, command
from tinystory.run.folder import holds_run, in_use, read_config, timestamp
from tinystory.run.options import script_parser
from tinystory.run.records import EVALUATIONS, Record, read_metrics, read_records
from tinystory.run.text import printable

TRACKERS = ("tensorboard", "wandb", "trackio")
COLUMNS = ("index", "opening", "story", "scores", "score", "reward")  # of the stories' table
PAUSE_S = 5.0


class Sink(Protocol):
    def log(self, step: int, numbers: dict[str, float]) -> None: ...

    def table(self, step: int, rows: list[list[str]]) -> None: ...

    def close(self) -> None: ...

    def where(self) -> str:
        """A line that says where the records are, with the command that shows them."""


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("tracker", choices=TRACKERS)
    options = parser.parse_args(argv)
    run, name = options.run, options.tracker
    if not holds_run(run):
        raise UserError(f"{run} holds no run: give the --out folder of a train command")
    try:
        sink = open_sink(name, run)
    except ImportError as error:
        raise UserError(f"{name} needs its package ({error}): pip install {name}") from None
    last = -1  # step of the last sent record
    running = True
    while running:
        running = in_use(run)
        last = send(run, sink, last)
        if running:
            time.sleep(PAUSE_S)
    sink.close()
    print(printable(sink.where()))


def send(run: Path, sink: Sink, last: int) -> int:
    """The newest step, after sending all records after step `last`. A resumed run repeats steps
    with bit-identical results, so no step is sent twice."""
    tables: dict[int, list[list[str]]] = {}
    for record in read_records(run / EVALUATIONS):
        cells = [" ".join(printable(str(record.get(name))).split()) for name in COLUMNS]
        tables.setdefault(record["step"], []).append(cells)
    for record in from_start(run, read_metrics(run)):
        step = record["step"]
        if step <= last:
            continue
        sink.log(step, numbers_of(record))
        if step in tables:
            sink.table(step, tables[step])
        last = step
    return last


def numbers_of(record: Record) -> dict[str, float]:
    numbers = {}
    for key, value in record.items():
        if key != "step" and type(value) in (int, float):
            numbers[key] = value
    return numbers


def open_sink(name: str, run: Path) -> Sink:
    if name == "tensorboard":
        return TensorBoard(run)
    return Wandb(name, run, read_config(run).get("options", {}))


class TensorBoard:
    """Writes event files into the run's folder, for `tensorboard --logdir runs`."""

    def __init__(self, run: Path):
        tensorboard = importlib.import_module("torch.utils.tensorboard")
        self.folder = run / "tensorboard"
        shutil.rmtree(self.folder, ignore_errors=True)  # what an earlier call sent
        self.writer = tensorboard.SummaryWriter(self.folder)
        self.close = self.writer.close

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():  # in float64, as metrics.jsonl has them
            self.writer.add_scalar(key, value, step, new_style=True, double_precision=True)
        self.writer.flush()

    def table(self, step: int, rows: list[list[str]]) -> None:
        lines: list[Sequence[str]] = [COLUMNS, ["---"] * len(COLUMNS)]
        for row in rows:
            lines.append([cell.replace("|", "\\|") for cell in row])
        markdown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        self.writer.add_text("stories", markdown, step)

    def where(self) -> str:
        return f"written to {self.folder}; to look at it: tensorboard --logdir {quote(str(self.folder))}"


class Wandb:
    """Sends records to wandb, or to trackio, which has the same API."""

    def __init__(self, name: str, run: Path, options: Mapping[str, Any]):
        self.module = importlib.import_module(name)
        self.name = name
        self.shown_by = "trackio show --project tinystory"
        if name == "wandb":
            folder = quote(str(run / "wandb"))
            self.shown_by = f"wandb sync {folder}/offline-run-* (unless WANDB_MODE=online sent it)"
        settings: dict[str, Any] = {"project": "tinystory", "config": dict(options)}
        settings["name"] = f"{run.resolve().name} {timestamp()}"
        if name == "wandb":
            settings |= {"dir": run, "mode": os.environ.get("WANDB_MODE", "offline")}
        else:
            settings |= {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        self.module.init(**settings)
        self.close = self.module.finish

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.module.log(numbers, step=step)

    def table(self, step: int, rows: list[list[str]]) -> None:
        self.module.log({"stories": self.module.Table(columns=list(COLUMNS), data=rows)}, step=step)

    def where(self) -> str:
        return f"sent to {self.name}'s project tinystory; to look at it: {self.shown_by}"


if __name__ == "__main__":
    main()
