"""A person's half hour: the run that is taught at the desk, how much of it is left, and at its end
blind comparisons of stories before and after interaction, which its report then holds."""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinystory.evaluate.intervals import wilson
from tinystory.human.desk import GRACE_S, NOTHING_BEFORE, UNASKED, Desk, refused_unless_kept
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
    """The first of `folder`, `folder`-2, ... that holds no run, or one that goes on: all pairs of a
    finished one have been compared."""
    return next(path for path in numbered(folder) if not _has_result(path))


def _has_result(folder: Path) -> bool:
    return any(finding["title"] == TITLE for finding in read_findings(folder))


class Lesson:
    """The run in `folder`, taught at `desk`. arguments: of train_interact.py, to begin it;
    always: to begin and to resume it. Raises UserError for records that cannot be
    read."""

    def __init__(
        self,
        desk: Desk,
        folder: Path,
        arguments: Sequence[str] = (),
        always: Sequence[str] = (),
    ):
        self.desk = desk
        self.folder = folder
        self._arguments = arguments
        self._always = always
        answers = read_records(folder / PAIRS)
        # before, after or neither, by the pair's key
        self._answers = {record["key"]: record["preferred"] for record in answers}
        self._back_at: Pair | None = None  # whose answer was taken back
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
        """Hand in grades, and report the comparisons, as soon as each is ready; to be called
        regularly."""
        handed_in = self.desk.tick()
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
        """What the comparisons say, in sentences."""
        progress = self._progress
        sentences = f"Taught by a person: {count(progress.graded, 'grade')}."
        if progress.pairs:
            answers = Counter(self._answers[pair.key] for pair in progress.pairs)
            pairs = len(progress.pairs)
            low, high = wilson(answers["after"] + answers[NEITHER] / 2, pairs)
            sentences += (
                f" Of {count(pairs, 'pair')}, unnamed and in random order, the story after "
                f"interaction was preferred in {answers['after']} and that before in "
                f"{answers['before']}; {answers[NEITHER]} made no difference. The fraction won, a "
                f"tie counting one half, has the 95 % interval {low:.2f} to {high:.2f} (Wilson)."
            )
        if progress.left_out:
            pairs_left_out = count(progress.left_out, "pair")
            sentences += f" {pairs_left_out} of equal or empty stories were left out."
        return sentences

    # ---- for the page ----------------------------------------------------------------------------

    def state(self, url: str) -> dict[str, Any]:
        """What the page shows: the desk's state; answers left, and about how many minutes; what
        the machine does, or the command that makes it; what the student learned; a pair to compare;
        the result, and the report that holds it."""
        state = self.desk.state()
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
        """Grades and comparisons; None if the run is not taught by a number of grades."""
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
        """What the machine does while no story waits, in a sentence."""
        progress = self._progress
        if self._problem or state["item"] or self.is_over():
            return self._problem
        if not self._running and progress.steps:
            return f"The trainer stopped after step {progress.step}. Go on with:"
        if not self._running:
            return "Start the trainer in another terminal:"
        if not progress.steps:
            return "The trainer is starting."
        if progress.step >= progress.steps:
            return "The student writes the stories that you will compare."

        doing = f"The student writes {progress.stories} stories"
        if self._handed_in[progress.step]:
            doing = "The student learns from your grades"
        elapsed = time.monotonic() - self._since
        wait = f"{_in_fives(elapsed)} seconds so far"
        if progress.step_s:
            left = progress.step_s - elapsed
            wait = f"about {_in_fives(left)} seconds" if left > 0 else "done in a moment"
        return f"{doing}: step {progress.step + 1} of {progress.steps}, {wait}."

    def do(self, who: str, action: str, request: Mapping[str, Any]) -> None:
        """As the desk's, and `prefer`: the story of a pair on the `side` left or right, or
        neither; `back` then leads to the pair before, until the result is reported."""
        if action == "prefer":
            self._prefer(who, request)
        elif action == "back" and self.is_over() and not self.desk.state()["item"]:
            before = self._pair_before()
            if before is None:
                raise Refused(NOTHING_BEFORE)
            self._back_at = before
        else:
            self.desk.do(who, action, request)

    # ---- pairs -----------------------------------------------------------------------------------

    def _unanswered(self) -> list[Pair]:
        return [pair for pair in self._progress.pairs if pair.key not in self._answers]

    def _shown_pair(self) -> Pair | None:
        """The pair to compare; None if all are answered."""
        return self._back_at or next(iter(self._unanswered()), None)

    def _pair_before(self) -> Pair | None:
        """The answered pair before the one that is shown, unless the result is reported."""
        pairs = self._progress.pairs
        shown = self._shown_pair()
        place = pairs.index(shown) if shown in pairs else len(pairs)
        return pairs[place - 1] if place and not self._is_reported else None

    def _unnamed(self, pair: Pair) -> dict[str, Any]:
        """The pair without the names of its stories."""
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
        journal = Journal(self.folder / PAIRS, durable=True)
        with refused_unless_kept(), contextlib.closing(journal):
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
    """Rounded up to 5 seconds: a page that counted each would distract."""
    return 5 * math.ceil(seconds / 5)
