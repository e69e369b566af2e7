"""Queue of stories that wait for a human's grade, and the store of all grades given so far.

A trainer sends a story and waits. The page shows the story, and the human's grade is recorded at
once. The grades of all waiting stories are handed in together, GRACE_S after the last grade, so
that the human can go back until then. A story that was graded before gets the kept grade."""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinystory.human.progress import key_of
from tinystory.run.errors import UserError
from tinystory.run.folder import timestamp
from tinystory.run.journal import Journal
from tinystory.run.records import Fields, Record, read_records
from tinystory.teacher.chat_server import Refused
from tinystory.teacher.grades import Grades
from tinystory.teacher.prompt import TOP

UNASKED = "this answer belongs to no question that is open here: load the page again"
NOTHING_BEFORE = "there is nothing to go back to"
GRACE_S = 2.0  # seconds from the last grade until the waiting stories are handed in
# Required fields of each record in a file of grades; a skipped story has no scores.
GRADE: Fields = {
    "key": (str,),
    "by": (str,),
    "opening": (str,),
    "story": (str,),
    "scores": (dict, type(None)),
}


@dataclass
class _Story:
    opening: str
    story: str
    trainers: int = 0  # requests that wait for its grade
    handed_in: asyncio.Event = field(default_factory=asyncio.Event)


class GradingQueue:
    """Stories and grades by the criteria of `protocol`. The grades are kept in the file `path`.
    Raises UserError if the file holds anything else."""

    def __init__(self, path: Path, protocol: Grades):
        self.protocol = protocol
        self._waiting: dict[str, _Story] = {}  # by key, in the order in which they came
        self._grades: dict[str, Record] = {}  # by key, in the order in which they were first given
        # key of the story on the page; a grade that this story had was taken back
        self._current: str | None = None
        self._graded = 0.0  # when the last grade was given
        for record in read_records(path, GRADE, self._check):
            self._grades[record["key"]] = record
        self._journal = Journal(path, durable=True)
        self.close = self._journal.close

    # ---- for the trainer -------------------------------------------------------------------------

    def key(self, opening: str, story: str) -> str:
        return key_of(self.protocol.instructions, opening, story)

    def _check(self, record: Record) -> None:
        """Raises ValueError if a recorded grade by this queue's criteria lacks a criterion."""
        is_ours = record["key"] == self.key(record["opening"], record["story"])
        scores = record["scores"]
        if is_ours and scores is not None and scores.keys() != set(self.protocol.names):
            raise ValueError(f"the criteria of its scores are not {', '.join(self.protocol.names)}")

    async def ask(self, opening: str, story: str) -> Mapping[str, int] | None:
        """The human's score for each criterion, or None if the human skipped the story. Waits
        without a time limit."""
        key = self.key(opening, story)
        if key not in self._grades or key in self._waiting:
            waiting = self._waiting.setdefault(key, _Story(opening, story))
            waiting.trainers += 1
            try:
                await waiting.handed_in.wait()
            finally:  # also when the trainer hangs up
                waiting.trainers -= 1
                if not waiting.trainers:
                    self._waiting.pop(key, None)
        return self._grades[key]["scores"]

    def tick(self) -> int:
        """Hand in the grades that are due, and return their number; to be called regularly. Grades
        are due once all waiting stories are graded and GRACE_S has passed."""
        if self._ungraded() or time.monotonic() - self._graded < GRACE_S:
            return 0
        handed_in = len(self._waiting)
        for waiting in self._waiting.values():
            waiting.handed_in.set()
        self._waiting.clear()
        return handed_in

    def _ungraded(self) -> list[str]:
        """Keys of the waiting stories without a grade; a grade that was taken back does not
        count."""
        return [key for key in self._waiting if key not in self._grades or key == self._current]

    # ---- for the page ----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The state that the page shows, as JSON. `item` is a story that a trainer waits for: the
        next one, or the one that the human went back to."""
        ungraded = self._ungraded()
        if self._current not in self._waiting:  # no story is shown, or its trainer has stopped
            self._current = next(iter(ungraded), None)
        item = None
        if self._current:
            story = self._waiting[self._current]
            item = {
                "key": self._current,
                "opening": story.opening,
                "story": story.story,
                "scores": self._grades.get(self._current, {}).get("scores"),
                "again": self._current in self._grades,
            }
        return {
            "item": item,
            "waiting": len(self._waiting),
            "left": len(ungraded),
            "done": len(self._grades),
            "handing_in": bool(self._waiting) and not ungraded,
            "back": self._story_before() is not None,
            "criteria": [asdict(criterion) for criterion in self.protocol.criteria],
        }

    def do(self, who: str, action: str, request: Mapping[str, Any]) -> None:
        """Perform an action of the human called `who`: grade, skip, back or pause. Raises Refused
        if the action is not possible or the grade cannot be saved; the story then still waits."""
        match action:
            case "grade":
                self._grade(who, request, self._scores(request))
            case "skip":
                self._grade(who, request, None)
            case "back":
                self._go_back()
            case "pause":  # a grade that was taken back counts again
                self._current = None
            case _:
                raise Refused(f"unknown action {action[:20]!r}")

    def _go_back(self) -> None:
        before = self._story_before()
        if before is None:
            raise Refused(NOTHING_BEFORE)
        self._current = before

    def _story_before(self) -> str | None:
        """The key of the graded story before the one on the page."""
        graded = [key for key in self._waiting if key in self._grades]
        index = graded.index(self._current) if self._current in graded else len(graded)
        return graded[index - 1] if index else None

    def _scores(self, request: Mapping[str, Any]) -> dict[str, int]:
        names = self.protocol.names
        scores: Any = request.get("scores")
        is_complete = isinstance(scores, dict) and scores.keys() == set(names)
        if not is_complete or not all(
            type(score) is int and 0 <= score <= TOP for score in scores.values()
        ):
            raise Refused(
                f"give a score, a whole number from 0 to {TOP}, for each of {', '.join(names)}"
            )
        return {name: scores[name] for name in names}

    def _grade(self, who: str, request: Mapping[str, Any], scores: dict[str, int] | None) -> None:
        # The page sends the story that it shows, because after a restart a grade may arrive before
        # the trainer has asked again.
        match request:
            case {"key": key, "opening": str(opening), "story": str(story)} if key == self.key(
                opening, story
            ):
                record: Record = {"key": key, "opening": opening, "story": story, "scores": scores}
            case _:
                raise Refused(UNASKED)
        record |= {"by": who, "at": timestamp()}
        with refused_unless_kept():
            self._journal.append(record)
        self._grades[key] = record
        if self._current == key:
            self._current = None
        self._graded = time.monotonic()


@contextlib.contextmanager
def refused_unless_kept() -> Iterator[None]:
    """Raises Refused if an answer cannot be written to its file."""
    try:
        yield
    except UserError as error:
        raise Refused(
            f"This answer is not saved yet: {error}. Then give the answer again.", status=503
        ) from error
