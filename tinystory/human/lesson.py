"""A lesson of a human teacher, about half an hour: the run that the human's grades train, the
number of answers left, and at the end blind comparisons of stories from before and after
interaction. The run's report shows the result."""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinystory.evaluate.intervals import wilson
from tinystory.human.grading_queue import (
    GRACE_S,
    NOTHING_BEFORE,
    UNASKED,
    GradingQueue,
    refused_unless_kept,
)
from tinystory.human.progress import COMPARED, NEITHER, Pair, RunProgress, read_progress
from tinystory.report.findings import keep_finding, read_findings
from tinystory.report.page import count
from tinystory.report.run import write_report
from tinystory.run.errors import UserError
from tinystory.run.folder import holds_run, in_use, numbered, timestamp
from tinystory.run.journal import Journal
from tinystory.run.paths import hint
from tinystory.run.records import FIELDS, PAIRS, Record, read_records
from tinystory.teacher.chat_server import Refused
from tinystory.teacher.probe import HUMAN_S

TITLE = "Taught by a person"  # of the finding


def lesson_folder(folder: Path) -> Path:
    """The first of `folder`, `folder`-2, ... without a finished lesson. A lesson is finished when
    all pairs of the run have been compared."""
    return next(path for path in numbered(folder) if not _has_result(path))


def _has_result(folder: Path) -> bool:
    return any(finding["title"] == TITLE for finding in read_findings(folder))


class Lesson:
    """A run in `folder`, graded through `queue`. arguments: options of train_interact.py that begin
    the run; always: options that also resume the run. Raises UserError for records that cannot be
    read."""

    def __init__(
        self,
        queue: GradingQueue,
        folder: Path,
        arguments: Sequence[str] = (),
        always: Sequence[str] = (),
    ):
        self.queue = queue
        self.folder = folder
        self._arguments = arguments
        self._always = always
        answers = read_records(folder / PAIRS)
        # before, after or neither, by the pair's key
        self._answers = {record["key"]: record["preferred"] for record in answers}
        self._back_at: Pair | None = None  # the pair to answer again
        self._answered = -math.inf  # when the last pair was answered
        self._is_reported = _has_result(folder)
        self._progress = RunProgress()
        self._read: list[tuple[int, int] | None] = []  # sizes and times of the files read
        self._problem = ""  # why they could not be read
        self._running = False
        self._since = 0.0  # when the trainer was started, or last got grades
        self._handed_in: Counter[int] = Counter()  # stories, by the number of finished steps
        self._look()

    # ---- the run ---------------------------------------------------------------------------------

    def command(self, url: str) -> str:
        """The command that begins or resumes the run."""
        arguments = [*self._arguments, "--out", self.folder]
        if holds_run(self.folder):
            arguments = ["--out", self.folder, "--resume"]
        arguments += [*self._always, "--teacher-url", f"{url}/v1"]
        return hint("train_interact.py", *arguments)

    async def tick(self) -> None:
        """Hand in grades and report the comparisons as soon as they are ready. To be called
        regularly."""
        handed_in = self.queue.tick()
        self._look()
        if handed_in:
            self._handed_in[self._progress.step] += handed_in
            self._since = time.monotonic()
        is_answered = self.is_over() and self._shown_pair() is None
        can_change = time.monotonic() - self._answered < GRACE_S
        if is_answered and not can_change and not self._is_reported:
            self._is_reported = True
            try:
                keep_finding(self.folder, TITLE, self._progress.step, [self.result()])
                await asyncio.to_thread(write_report, self.folder)
            except UserError as error:
                self._problem = str(error)

    def _look(self) -> None:
        """Read the run's records if a file has changed."""
        files = [_size_and_time(self.folder / name) for name in FIELDS]
        if files != self._read:
            self._read = files
            try:
                self._progress = read_progress(self.folder)
                self._problem = ""
            except UserError as error:
                self._problem = str(error)
        running = in_use(self.folder)
        if running and not self._running:
            self._since = time.monotonic()
        self._running = running

    def is_over(self) -> bool:
        """Whether the run is finished, so that pairs can be compared."""
        return self._progress.finished and not self._running

    def result(self) -> str:
        """Sentences with the number of grades and the result of the comparisons."""
        progress = self._progress
        sentences = f"A person gave {count(progress.graded, 'grade')}."
        if progress.pairs:
            answers = Counter(self._answers[pair.key] for pair in progress.pairs)
            pairs = len(progress.pairs)
            low, high = wilson(answers["after"] + answers[NEITHER] / 2, pairs)
            sentences += (
                f" The person compared {count(pairs, 'pair')} of stories without labels, in random "
                f"order. The story after interaction was preferred in {answers['after']}, the "
                f"story before in {answers['before']}, and neither in {answers[NEITHER]}. The "
                "fraction of pairs won by the story after interaction, with a tie as one half, "
                f"has the 95 % interval {low:.2f} to {high:.2f} (Wilson)."
            )
        if progress.left_out:
            pairs_left_out = count(progress.left_out, "pair")
            sentences += f" {pairs_left_out} of equal or empty stories were left out."
        return sentences

    # ---- for the page ----------------------------------------------------------------------------

    def state(self, url: str) -> dict[str, Any]:
        """The state that the page shows, as JSON: the queue's state; the number of answers left,
        with an estimate in minutes; what the machine is doing, or the command to start; a pair that
        shows what the student learned; a pair to compare; the result, and the path of the
        report."""
        state = self.queue.state()
        self._look()
        progress = self._progress
        answers_left = self._answers_left(state)
        steps_left = max(progress.steps - progress.step, 0)
        seconds = (answers_left or 0) * HUMAN_S + steps_left * progress.step_s
        state |= {
            "answers_left": answers_left,
            "minutes": math.ceil(seconds / 60),
            "now": self._now(state),
            "command": "",
            "learned": progress.learned,
            "pair": None,
            "result": "",
            "report": "",
        }
        if state["item"]:
            return state
        if not self.is_over():
            if not self._running:
                state["command"] = self.command(url)
            return state
        state["back"] = self._pair_before() is not None
        pair = self._shown_pair()
        if pair is not None:
            state["pair"] = self._unnamed(pair)
        elif not self._problem:
            state["result"] = self.result()
            if self._is_reported:
                state["report"] = str((self.folder / "report.html").resolve())
        return state

    def _answers_left(self, state: Mapping[str, Any]) -> int | None:
        """The number of grades and comparisons left; None for a run without --grades."""
        progress = self._progress
        if self.is_over():
            return len(self._unanswered())
        if not progress.grades:
            return None
        grades_given = (
            progress.asked + self._handed_in[progress.step] + state["waiting"] - state["left"]
        )
        return max(progress.grades - grades_given, 0) + min(progress.evaluated, COMPARED)

    def _now(self, state: Mapping[str, Any]) -> str:
        """A sentence on what the machine is doing while no story waits."""
        progress = self._progress
        if self._problem or state["item"] or self.is_over():
            return self._problem
        if not self._running and progress.steps:
            return f"The trainer stopped after step {progress.step}. Continue with:"
        if not self._running:
            return "Start the trainer in another terminal:"
        if not progress.steps:
            return "The trainer is starting."
        if progress.step >= progress.steps:
            return "The student is writing the stories that you will compare."

        doing = f"The student is writing {progress.stories} stories"
        if self._handed_in[progress.step]:
            doing = "The student is learning from your grades"
        elapsed = time.monotonic() - self._since
        wait = f"{_in_fives(elapsed)} seconds so far"
        if progress.step_s:
            left = progress.step_s - elapsed
            wait = f"about {_in_fives(left)} seconds left" if left > 0 else "almost done"
        return f"{doing}: step {progress.step + 1} of {progress.steps}, {wait}."

    def do(self, who: str, action: str, request: Mapping[str, Any]) -> None:
        """Perform an action of the human called `who`: an action of GradingQueue.do, or `prefer`
        with a `side` (left, right or neither) of a pair. During comparisons, `back` returns to the
        previous pair, until the result is reported. Raises Refused if the action is not
        possible."""
        if action == "prefer":
            self._prefer(who, request)
        elif action == "back" and self.is_over() and not self.queue.state()["item"]:
            before = self._pair_before()
            if before is None:
                raise Refused(NOTHING_BEFORE)
            self._back_at = before
        else:
            self.queue.do(who, action, request)

    # ---- pairs -----------------------------------------------------------------------------------

    def _unanswered(self) -> list[Pair]:
        return [pair for pair in self._progress.pairs if pair.key not in self._answers]

    def _shown_pair(self) -> Pair | None:
        """The pair to compare; None if all are answered."""
        return self._back_at or next(iter(self._unanswered()), None)

    def _pair_before(self) -> Pair | None:
        """The answered pair before the shown one; None if there is none, or once the result is
        reported."""
        pairs = self._progress.pairs
        shown = self._shown_pair()
        index = pairs.index(shown) if shown in pairs else len(pairs)
        return pairs[index - 1] if index and not self._is_reported else None

    def _unnamed(self, pair: Pair) -> dict[str, Any]:
        """The pair for the page, without the labels `before` and `after`."""
        pairs = self._progress.pairs
        return {
            "key": pair.key,
            "opening": pair.opening,
            "left": getattr(pair, pair.names["left"]),
            "right": getattr(pair, pair.names["right"]),
            "place": pairs.index(pair) + 1,
            "pairs": len(pairs),
            "left_out": self._progress.left_out,
        }

    def _prefer(self, who: str, request: Mapping[str, Any]) -> None:
        for pair in self._progress.pairs:
            if pair.key == request.get("key"):
                break
        else:
            raise Refused(UNASKED)
        side = str(request.get("side"))
        if side not in pair.names:
            raise Refused(f"give a side: {', '.join(pair.names)}")
        record: Record = {
            "key": pair.key,
            "index": pair.index,
            "opening": pair.opening,
            "preferred": pair.names[side],
            "by": who,
            "at": timestamp(),
        }
        with (
            refused_unless_kept(),
            contextlib.closing(Journal(self.folder / PAIRS, durable=True)) as journal,
        ):
            journal.append(record)
        self._answers[pair.key] = record["preferred"]
        self._back_at = None
        self._answered = time.monotonic()


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _in_fives(seconds: float) -> int:
    """Seconds, rounded up to a multiple of 5: a page that counts single seconds would distract."""
    return 5 * math.ceil(seconds / 5)
