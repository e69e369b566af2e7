"""The desk at which humans grade: the stories that wait, who is reading which, and every grade given.

A story comes from a trainer, which waits for its grade; the page shows it; the grade is kept the moment it is given.
The grades of all stories that wait are handed in together, a moment after the last of them, so that there is a way back
until then. A story that was graded before is never asked about again: the trainer gets the grade that is kept.

Several humans can sit at one desk. Each story goes to one of them.
"""

import asyncio
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinystory.run.folder import Fields, Record, read_records, timestamp
from tinystory.run.journal import Journal
from tinystory.teacher.prompt import TOP, Template, instructions
from tinystory.teacher.server import Refused

GRACE_S = 2.0  # from the last grade of those that wait until they are handed in
AWAY_S = 10.0  # a page that has not asked for so long is closed, and its story is free for others
# That each record of a file of grades has at least; a skipped story has no scores.
GRADE: Fields = {"key": (str,), "by": (str,), "opening": (str,), "story": (str,), "scores": (dict, type(None))}
LONGEST_NAME = 40  # characters of a human's name


@dataclass
class _Story:
    opening: str
    story: str
    trainers: int = 0  # requests that wait for its grade
    handed_in: asyncio.Event = field(default_factory=asyncio.Event)


class Desk:
    """Grades by `template`, kept in the file `path`."""

    def __init__(self, path: Path, template: Template, clock: Callable[[], float] = time.monotonic):
        self.template, self._clock = template, clock
        self._waiting: dict[str, _Story] = {}  # by key, in the order in which they came
        self._grades: dict[str, dict[str, Record]] = defaultdict(dict)  # by key and human, the first human first
        self._current: dict[str, str] = {}  # human: key of the story on the page
        self._seen: dict[str, float] = {}  # human: when the page last asked
        self._history: dict[str, list[str]] = defaultdict(list)  # human: keys graded, for the way back
        self._back: set[str] = set()  # keys that were taken back, and are not handed in until they are graded again
        self._graded = 0.0  # when the last grade was given
        for record in read_records(path, GRADE):
            self._add(record)
        self._journal = Journal(path, durable=True)

    def _add(self, record: Record) -> None:
        key, who = record["key"], record["by"]
        self._grades[key][who] = record
        if key not in self._history[who]:
            self._history[who].append(key)

    # ---- for the trainer --------------------------------------------------------------------------------------------

    def key(self, opening: str, story: str) -> str:
        """Identifies a question: the story, and what is asked about it."""
        return hashlib.sha256(json.dumps([instructions(self.template), opening, story]).encode()).hexdigest()[:24]

    async def ask(self, opening: str, story: str) -> Mapping[str, int] | None:
        """The scores that a human gives; None if the story was skipped. It takes as long as it takes."""
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
        # The scores of the first human who gave any.
        return next((record["scores"] for record in self._grades[key].values() if record["scores"]), None)

    def tick(self) -> None:
        """To be called every now and then: hand in what is ready, and free the stories of closed pages."""
        now = self._clock()
        for who in [who for who, seen in self._seen.items() if now - seen > AWAY_S]:
            del self._seen[who]
            self._leave(who)
        if self._all_graded() and now - self._graded >= GRACE_S:
            for waiting in self._waiting.values():
                waiting.handed_in.set()
            self._waiting.clear()

    def _all_graded(self) -> bool:
        return bool(self._waiting) and not self._ungraded()

    def _ungraded(self) -> list[str]:
        return [key for key in self._waiting if key not in self._grades or key in self._back]

    # ---- for the page -----------------------------------------------------------------------------------------------

    def state(self, who: str) -> dict[str, Any]:
        """What the page of this human shows."""
        self._seen[who] = self._clock()
        key = self._current.get(who)
        if key not in self._waiting and key not in self._grades:  # its trainer has stopped
            self._current.pop(who, None)
            key = self._next(who)
        return {
            "item": None if key is None else self._item(who, key),
            "left": len(self._ungraded()),
            "done": len(self._history[who]),
            "handing_in": self._all_graded(),
            "criteria": [asdict(criterion) for criterion in self.template.criteria],
        }

    def _item(self, who: str, key: str) -> dict[str, Any]:
        """The story for this human's page, which shows it from now on."""
        self._current[who] = key
        by, waiting = self._grades.get(key, {}), self._waiting.get(key)
        first, own = next(iter(by.values()), {}), by.get(who)
        return {
            "key": key,
            "opening": waiting.opening if waiting else first["opening"],
            "story": waiting.story if waiting else first["story"],
            "scores": own and own["scores"],
            "again": own is not None,
            "late": waiting is None and own is not None,  # the trainer has its grade already
        }

    def _next(self, who: str) -> str | None:
        """A story that a trainer waits for, and that is not on somebody else's page."""
        taken = {key for other, key in self._current.items() if other != who}
        return next((key for key in self._waiting if key not in self._grades and key not in taken), None)

    def do(self, who: str, action: str, request: Mapping[str, Any]) -> None:
        """Grade, skip, go back or pause, as the page says. Raises Refused if that cannot be done."""
        self._seen[who] = self._clock()
        match action:
            case "grade" | "skip":
                self._grade(who, request, self._scores(request) if action == "grade" else None)
            case "back":
                history, current = self._history[who], self._current.get(who)
                if not history:
                    raise Refused("there is nothing to go back to")
                key = history[max(history.index(current) - 1, 0)] if current in history else history[-1]
                self._leave(who)
                self._current[who] = key
                if key in self._waiting:
                    self._back.add(key)
            case "pause":
                self._leave(who)
            case _:
                raise Refused(f"unknown action {action[:20]!r}")

    def _leave(self, who: str) -> None:
        """Take the story off this human's page. A grade that was taken back counts again."""
        self._back.discard(self._current.pop(who, ""))

    def _scores(self, request: Mapping[str, Any]) -> dict[str, int]:
        scores = request.get("scores")
        if not isinstance(scores, dict) or scores.keys() != set(self.template.names):
            raise Refused(f"give a score for each of {', '.join(self.template.names)}")
        if not all(type(score) is int and 0 <= score <= TOP for score in scores.values()):
            raise Refused(f"a score is a whole number from 0 to {TOP}")
        return {name: scores[name] for name in self.template.names}

    def _grade(self, who: str, request: Mapping[str, Any], scores: dict[str, int] | None) -> None:
        # The page says what it shows: after a restart a grade may come before the trainer has asked again.
        key, opening, story = (request.get(name) for name in ("key", "opening", "story"))
        if not (isinstance(opening, str) and isinstance(story, str)) or key != self.key(opening, story):
            raise Refused("this is not what was asked about: load the page again")
        record: Record = dict(key=key, opening=opening, story=story, scores=scores, by=who, at=timestamp())
        self._journal.append(record)
        self._add(record)
        self._back.discard(key)
        if self._current.get(who) == key:
            del self._current[who]
        self._graded = self._clock()

    def close(self) -> None:
        self._journal.close()
