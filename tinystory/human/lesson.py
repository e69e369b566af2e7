"""A person's half hour: the run that is taught at the desk, how much of it is left, and at its end
blind comparisons of stories before and after interaction, which its report then holds."""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tinystory.evaluate.intervals import wilson
from tinystory.human.desk import Desk
from tinystory.human.progress import COMPARED, NEITHER, READ, Pair, Progress, read_progress
from tinystory.report.findings import keep_finding, read_findings
from tinystory.report.page import count
from tinystory.run.errors import UserError
from tinystory.run.folder import holds_run, in_use, numbered, read_config, timestamp
from tinystory.run.journal import Journal
from tinystory.run.paths import hint
from tinystory.run.records import PAIRS, Record, read_records
from tinystory.teacher.probe import HUMAN, HUMAN_S
from tinystory.teacher.server import Refused

TITLE = "Taught by a person"  # of the finding


def lesson_folder(folder: Path) -> Path:
    """The first of `folder`, `folder`-2, ... that holds no run, or one by a human that goes on: all
    pairs of a finished one have been compared."""
    for candidate in numbered(folder):
        if not holds_run(candidate) or _goes_on(candidate):
            break
    return candidate


def _goes_on(folder: Path) -> bool:
    teacher = read_config(folder).get("options", {}).get("teacher")
    by_human = isinstance(teacher, dict) and teacher.get("model") == HUMAN
    return by_human and not _has_result(folder)


def _has_result(folder: Path) -> bool:
    return any(finding["title"] == TITLE for finding in read_findings(folder))


class Lesson:
    """The run in `folder`, taught at `desk`. arguments: of train_interact.py, to begin it. Raises
    UserError for records that cannot be read."""

    def __init__(
        self,
        desk: Desk,
        folder: Path,
        arguments: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        self.desk = desk
        self.folder = folder
        self._arguments = arguments
        self._clock = clock
        self._answers: dict[str, str] = {}  # before, after or neither, by the pair's key
        for record in read_records(folder / PAIRS, check=_check_answer):
            self._answers[record["key"]] = record["preferred"]
        self._is_reported = _has_result(folder)
        self._report = ""  # its path, once it is written here
        self._progress = Progress()
        self._read: list[tuple[int, int] | None] = []  # sizes and times of the files read
        self._problem = ""  # why they could not be read
        self._taken_back: str | None = None  # key of the pair that the human went back to
        self._running = False
        self._since = 0.0  # when the trainer was started, or last got grades
        self._handed_in: tuple[int, int] = (-1, 0)  # finished steps, and stories handed in since
        self._shown = ""  # key of the story or pair on the page, and since when
        self._shown_since = 0.0
        self._seconds: list[float] = []  # per answer
        self._look()

    # ---- the run ---------------------------------------------------------------------------------

    def command(self, url: str) -> str:
        """The command that begins or resumes the run."""
        arguments = [*self._arguments, "--out", self.folder]
        if holds_run(self.folder):
            arguments = ["--out", self.folder, "--resume"]
        return hint("train_interact.py", *arguments, "--teacher-url", f"{url}/v1")

    async def tick(self) -> None:
        """Hand in grades, and report the comparisons, as soon as each is ready; to be called
        regularly."""
        handed_in = self.desk.tick()
        self._look()
        if handed_in:
            step, earlier = self._handed_in
            if step != self._progress.step:
                earlier = 0
            self._handed_in = (self._progress.step, earlier + handed_in)
            self._since = self._clock()
        if self.is_over() and not self._unanswered() and not self._is_reported:
            self._is_reported = True
            try:
                self._report = str(await asyncio.to_thread(self._write_report))
            except UserError as error:
                self._problem = str(error)

    def _look(self) -> None:
        """Read the run's records if a file has changed."""
        files = [_size_and_time(self.folder / name) for name in READ]
        if files != self._read:
            self._read = files
            try:
                self._progress = read_progress(self.folder)
                self._problem = ""
            except UserError as error:
                self._problem = str(error)
        running = in_use(self.folder)
        if running and not self._running:
            self._since = self._clock()
        self._running = running

    def is_over(self) -> bool:
        """Whether the run is finished, so that pairs can be compared."""
        return self._progress.finished and not self._running

    def _write_report(self) -> Path:
        from tinystory.report.run import write_report  # imported here because it needs torch

        keep_finding(self.folder, TITLE, self._progress.step, [self.result()])
        return write_report(self.folder).resolve()

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
        the result."""
        state = self.desk.state()
        self._look()
        pair = None
        if self.is_over() and state["item"] is None:
            pair = self._current()
        shown = ""
        if state["item"]:
            shown = state["item"]["key"]
        elif pair:
            shown = pair.key
        if shown != self._shown:
            self._shown = shown
            self._shown_since = self._clock()

        answers_left = self._answers_left(state)
        state |= {
            "answers_left": answers_left,
            "minutes": math.ceil(self._seconds_left(answers_left or 0) / 60),
            "now": self._now(state),
            "command": "",
            "learned": self._progress.learned,
            "pair": pair and self._shown_pair(pair),
            "result": "",
            "report": self._report,
        }
        if not self._running and not self.is_over() and not state["item"]:
            state["command"] = self.command(url)
        elif self.is_over() and not self._unanswered() and not pair and not self._problem:
            state["result"] = self.result()
        return state

    def _answers_left(self, state: Mapping[str, Any]) -> int | None:
        """Grades and comparisons; None if the run is not taught by a number of grades."""
        progress = self._progress
        if self.is_over():
            return len(self._unanswered())
        if not progress.grades:
            return None
        step, handed_in = self._handed_in
        if step != progress.step:
            handed_in = 0
        given = progress.asked + handed_in + state["waiting"] - state["left"]
        return max(progress.grades - given, 0) + min(progress.evaluated, COMPARED)

    def _seconds_left(self, answers: int) -> float:
        progress = self._progress
        per_answer = median(self._seconds) if self._seconds else HUMAN_S
        steps_left = max(progress.steps - progress.step, 0)
        return answers * per_answer + steps_left * (progress.step_s or 0.0)

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
        if self._handed_in[0] == progress.step:
            doing = "The student learns from your grades"
        return f"{doing}: step {progress.step + 1} of {progress.steps}, {self._wait()}."

    def _wait(self) -> str:
        """Until the next stories, in words."""
        elapsed = self._clock() - self._since
        if self._progress.step_s is None:
            return f"{_in_fives(elapsed)} seconds so far"
        left = self._progress.step_s - elapsed
        return f"about {_in_fives(left)} seconds" if left > 0 else "done in a moment"

    def do(self, who: str, action: str, request: Mapping[str, Any]) -> None:
        """As the desk's, and `prefer`: the story of a pair on the `side` left or right, or
        neither."""
        match action:
            case "prefer":
                self._prefer(who, request)
            case "back" if self.is_over():
                self._go_back()
            case _:
                if action == "pause":
                    self._taken_back = None
                self.desk.do(who, action, request)
        if action in ("grade", "skip", "prefer") and request.get("key") == self._shown:
            self._seconds.append(self._clock() - self._shown_since)

    # ---- pairs -----------------------------------------------------------------------------------

    def _unanswered(self) -> list[Pair]:
        return [pair for pair in self._progress.pairs if pair.key not in self._answers]

    def _current(self) -> Pair | None:
        """The pair on the page: one that the human went back to, or the next one."""
        for pair in self._progress.pairs:
            if pair.key == self._taken_back:
                return pair
        return next(iter(self._unanswered()), None)

    def _shown_pair(self, pair: Pair) -> dict[str, Any]:
        """The pair without the names of its stories."""
        pairs = self._progress.pairs
        side_of = {name: side for side, name in pair.names.items()}
        return {
            "key": pair.key,
            "opening": pair.opening,
            "left": getattr(pair, pair.names["left"]),
            "right": getattr(pair, pair.names["right"]),
            "preferred": side_of.get(self._answers.get(pair.key, "")),
            "place": pairs.index(pair) + 1,
            "pairs": len(pairs),
            "left_out": self._progress.left_out,
        }

    def _go_back(self) -> None:
        pairs = self._progress.pairs
        current = self._current()
        place = pairs.index(current) if current else len(pairs)
        if not place:
            raise Refused("there is nothing to go back to")
        self._taken_back = pairs[place - 1].key

    def _prefer(self, who: str, request: Mapping[str, Any]) -> None:
        by_key = {pair.key: pair for pair in self._progress.pairs}
        key = request.get("key")
        pair = by_key.get(key) if isinstance(key, str) else None
        if pair is None:
            raise Refused("this is not what was asked about: load the page again")
        side = str(request.get("side"))
        if side not in pair.names:
            raise Refused(f"give a side: {', '.join(pair.names)}")
        preferred = pair.names[side]
        record: Record = {
            "key": pair.key,
            "index": pair.index,
            "opening": pair.opening,
            "preferred": preferred,
            "by": who,
            "at": timestamp(),
        }
        try:
            with contextlib.closing(Journal(self.folder / PAIRS, durable=True)) as journal:
                journal.append(record)
        except UserError as error:
            raise Refused(
                f"This answer is not kept yet: {error}. Then give it again.", status=503
            ) from error
        self._answers[pair.key] = preferred
        self._is_reported = False
        self._report = ""
        self._taken_back = None


def _check_answer(record: Record) -> None:
    """Raises ValueError for an answer that cannot be counted."""
    if record["preferred"] not in ("before", "after", NEITHER):
        raise ValueError(f"its 'preferred' is {record['preferred']!r:.40}")


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _in_fives(seconds: float) -> int:
    """Rounded up to 5 seconds: a page that counted each would distract."""
    return 5 * math.ceil(seconds / 5)
