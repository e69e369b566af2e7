"""A run's progress bar, the log of metrics of steps that a GPU may still be computing, and a timer
of a step's stages."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from tinystory.run import distributed
from tinystory.run.device import Download, now
from tinystory.run.errors import UserError
from tinystory.run.log import RunLog
from tinystory.run.records import Record
from tinystory.run.terminal import WIDEST

LINE = "{desc}{n_fmt} of {total_fmt} {unit}, {elapsed}, {remaining} left{postfix}"
LINE_S = 10.0  # minimum seconds between two lines without a terminal
BAR = 20  # minimum columns of a bar


class ProgressBar(tqdm):  # type: ignore[misc]
    """A progress bar on a terminal; without a terminal, a line when a step ends, at most one line
    in LINE_S. Only rank 0 shows it. The time left is known from the end of the first step: a step's
    stories are counted while they are written, but the step also grades, learns and evaluates."""

    def __init__(self, **options: Any):
        self.lines = not sys.stderr.isatty()
        self.due = 0.0  # time of the next line
        self.step_rate = 0.0  # progress per second until the end of the last step
        super().__init__(
            bar_format=LINE if self.lines else None,
            dynamic_ncols=True,
            disable=not distributed.is_rank0(),
            **options,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        return super().format_dict | {"rate": self.step_rate}

    def __str__(self) -> str:
        """The bar's text. The last fields are dropped if they would leave fewer than BAR columns
        for the bar."""
        if self.lines:
            return str(super().__str__())
        facts = self.format_dict
        columns = facts["ncols"] or WIDEST
        fields = ["{remaining} left"]
        if self.postfix:
            fields += self.postfix.split(", ")
        fields.append("{n_fmt} of {total_fmt} {unit}")
        for count in range(len(fields), -1, -1):
            beside = f"| {', '.join(fields[:count])}"
            facts |= {"ncols": None, "bar_format": f"{{l_bar}}{beside}"}
            if len(self.format_meter(**facts)) + BAR <= columns:
                break
        facts |= {"ncols": columns, "bar_format": f"{{l_bar}}{{bar}}{beside}"}
        return str(self.format_meter(**facts))

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.lines:
            super().display(msg, pos)

    def clear(self, nolock: bool = False) -> None:
        if not self.lines:
            super().clear(nolock)

    def end_step(self, numbers: dict[str, Any], advance: float = 0) -> None:
        """Show the numbers of a step that has ended. advance: progress not yet passed to
        `update`."""
        # on a terminal `update` shows it, a few times a second
        if self.disable:
            return
        self.set_postfix(numbers, refresh=False)
        # the last step's words may exceed the total, which tqdm would then no longer show
        advance = min(advance, self.total - self.n)
        done = self.n + advance - self.initial
        self.step_rate = done / self.format_dict["elapsed"]
        if advance:
            self.update(advance)
        else:
            self.refresh()
        if not self.lines:
            return
        time_now = time.monotonic()
        if self.n >= self.total or time_now >= self.due:
            self.due = time_now + LINE_S
            print(self, file=sys.stderr, flush=True)


class StepLog:
    """Writes the metrics of pretraining steps in order, while a GPU may still be computing later
    steps. step_tokens: tokens per step. watch: function that returns the warnings caused by a
    record, by kind."""

    def __init__(
        self,
        log: RunLog,
        bar: ProgressBar,
        step_tokens: int,
        watch: Callable[[Record], dict[str, str]],
    ):
        self.log = log
        self.bar = bar
        self.step_tokens = step_tokens
        self.watch = watch
        self.launched: deque[tuple[float, Download, dict[str, Any]]] = deque()
        self.last_end = 0.0  # when the last written step ended
        self.metrics: dict[str, Any] = {}  # the last written metrics

    def launch(self, began: float, statistics: Download, **metrics: Any) -> None:
        """Add a launched step to the queue. statistics: (2,) float32, the step's loss and gradient
        norm. metrics: the step's other metrics."""
        self.launched.append((began, statistics, metrics))

    def write(self, ahead: int, validate: Callable[[], dict[str, float]] | None = None) -> None:
        """Wait for all launched steps except the last `ahead` and write their metrics; the last
        written step includes `validate()`. Raises UserError for a loss that is not finite."""
        while len(self.launched) > ahead:
            began, statistics, metrics = self.launched.popleft()
            loss, grad_norm = statistics.wait().tolist()
            began = max(began, self.last_end)
            self.last_end = time.perf_counter()
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {metrics['step']}: lower --learning-rate or "
                    "--resume from the last checkpoint"
                )
            speed = self.step_tokens / (self.last_end - began)
            metrics |= {"loss": loss, "grad_norm": grad_norm, "tokens_per_s": speed}
            metrics |= {"val_loss": None, "val_bits_per_byte": None}
            postfix = {"loss": f"{loss:.3f}", "tok/s": f"{speed:,.0f}"}
            if validate and not self.launched:
                metrics |= validate()
                postfix |= {"val": f"{metrics['val_loss']:.3f}"}
            record = self.log.metrics(**metrics)
            self.bar.end_step(postfix, metrics["words"] - self.bar.n)
            self.metrics = metrics
            if self.log.writes:
                for warning in self.watch(record).values():
                    self.bar.write(warning)


class Stages:
    """Timer of the consecutive stages of a step. seconds: {NAME_s: seconds} of the finished
    stages."""

    def __init__(self, bar: ProgressBar, device: torch.device):
        self.bar = bar
        self.device = device
        self.name = ""
        self.began = 0.0
        self.seconds: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """End the present stage and begin the stage `name`, which the progress bar shows. "": begin
        no stage."""
        if self.name:
            # a GPU's time counts for the stage that launched the work
            self.seconds[f"{self.name}_s"] = now(self.device) - self.began
        if name:
            self.bar.set_description(name)
        self.name = name
        self.began = time.perf_counter()
