"""The desk at which a person grades: what lies on it, who is looking at what, and what was said.

A story comes from a trainer, which waits for its grade; the page shows it; the grade is kept the moment it is given.
The grades of all stories that wait are handed in together, a moment after the last of them, so that there is a way back
until then. A story that was graded before is never asked again: the trainer gets the grade that is kept.

Several people can sit at one desk. Each story goes to one of them; some go to a second one later, for whom the trainer
does not wait.
"""

import asyncio
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinystory.run.errors import UserError
from tinystory.run.folder import Record, timestamp
from tinystory.run.journal import Journal
from tinystory.teacher.prompt import TOP, Template, instructions

GRACE_S = 2.0  # from the last grade of those that wait until they are handed in
AWAY_S = 10.0  # a page that has not asked for so long is closed, and its story is free for others
FORGET_S = 60.0  # a story for which no trainer has asked for so long is taken off the desk
LONGEST_S = 1e9  # seconds that a page can have been open
LONGEST_NAME = 40  # characters of a person's name


class Mistake(Exception):
    """A request of the page that cannot be done; the message says why."""


@dataclass
class _Story:
    opening: str
    story: str
    trainers: int = 0  # requests that wait for its grade
    left: float = 0.0  # when the last of them went away
    handed_in: asyncio.Event = field(default_factory=asyncio.Event)


class Desk:
    """Grades by `template`, kept in the file `path`. twice: the fraction of stories that a second person grades too."""

    mode = "grade"

    def __init__(self, path: Path, template: Template, twice: float = 0.5, clock: Callable[[], float] = time.monotonic):
        self.template, self.twice, self._clock = template, twice, clock
        self._journal = Journal(path)
        self._waiting: dict[str, _Story] = {}  # by key, in the order in which they came
        self._grades: dict[str, dict[str, Record]] = defaultdict(dict)  # by key and person, the first person first
        self._looks_at: dict[str, str] = {}  # person: key
        self._seen: dict[str, float] = {}  # person: when the page last asked
        self._history: dict[str, list[str]] = defaultdict(list)  # person: keys graded, for the way back
        self._back: set[str] = set()  # keys that were taken back, and are not handed in until they are graded again
        self._graded = 0.0  # when the last grade was given
        for record in self._journal.records:
            if not {"key", "by", "scores", "opening", "story"} <= record.keys():
                raise UserError(f"{self._journal.path} is not a file of grades: choose another with --grades")
            self._note(record)

    def _note(self, record: Record) -> None:
        key, who = record["key"], record["by"]
        self._grades[key][who] = record
        if key not in self._history[who]:
            self._history[who].append(key)

    # ---- for the trainer --------------------------------------------------------------------------------------------

    def key(self, opening: str, story: str) -> str:
        """What identifies a question: the story, and what is asked about it."""
        asked = [instructions(self.template.criteria, self.template.preface), opening, story]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]

    async def ask(self, opening: str, story: str) -> Mapping[str, int] | None:
        """The scores that a person gives; None if the story was skipped. It takes as long as it takes."""
        key = self.key(opening, story)
        if key in self._grades and key not in self._waiting:
            return self._given(key)
        lying = self._waiting.setdefault(key, _Story(opening, story))
        lying.trainers += 1
        try:
            await lying.handed_in.wait()
        finally:  # also when the trainer hangs up
            lying.trainers -= 1
            lying.left = self._clock()
        return self._given(key)

    def _given(self, key: str) -> Mapping[str, int] | None:
        """The scores of the first person who gave any."""
        return next((record["scores"] for record in self._grades[key].values() if record["scores"]), None)

    def tick(self) -> None:
        """To be called every now and then: hand in what is ready, and take off what nobody waits for."""
        now = self._clock()
        for key, lying in list(self._waiting.items()):
            if not lying.trainers and now - lying.left > FORGET_S:
                del self._waiting[key]
        for who in [who for who, seen in self._seen.items() if now - seen > AWAY_S]:
            del self._seen[who]
            self._back.discard(self._looks_at.pop(who, ""))
        if self._waiting and self._all_graded() and now - self._graded >= GRACE_S:
            for lying in self._waiting.values():
                lying.handed_in.set()
            self._waiting.clear()

    def _all_graded(self) -> bool:
        return all(key in self._grades and key not in self._back for key in self._waiting)

    # ---- for the page -----------------------------------------------------------------------------------------------

    def state(self, who: str) -> dict[str, Any]:
        """What the page of this person shows."""
        self._seen[who] = self._clock()
        key = self._looks_at.get(who)
        if key not in self._waiting and key not in self._grades:  # its trainer has stopped
            self._looks_at.pop(who, None)
            key = self._next(who)
        left = [each for each in self._waiting if each not in self._grades or each in self._back]
        shown = None
        if key is not None:
            self._looks_at[who] = key
            lying = self._waiting.get(key)
            told = (lying.opening, lying.story) if lying else self._told(key)
            before = self._grades[key].get(who) if key in self._grades else None
            shown = {
                "key": key,
                "opening": told[0],
                "story": told[1],
                "scores": before and before["scores"],
                "again": before is not None,
                "late": lying is None and before is not None,  # the trainer has its grade already
                "second": self._is_second(key, who),
            }
        return {
            "mode": self.mode,
            "show": shown,
            "left": len(left),
            "seconds_left": sum(1 for each in self._grades if self._wants_second(each, who)),
            "done": len(self._history[who]),
            "handing_in": bool(self._waiting) and self._all_graded(),
            "criteria": [
                {"name": c.name, "question": c.question, "levels": list(c.levels)} for c in self.template.criteria
            ],
        }

    def _told(self, key: str) -> tuple[str, str]:
        record = next(iter(self._grades[key].values()))
        return record["opening"], record["story"]

    def _next(self, who: str) -> str | None:
        """A story that a trainer waits for, else one for a second opinion; never one on somebody else's page."""
        taken = {key for other, key in self._looks_at.items() if other != who}
        for key in self._waiting:
            if key not in taken and key not in self._grades:
                return key
        return next((key for key in self._grades if key not in taken and self._wants_second(key, who)), None)

    def _is_second(self, key: str, who: str) -> bool:
        return any(other != who for other in self._grades.get(key, ()))

    def _wants_second(self, key: str, who: str) -> bool:
        by = self._grades[key]
        scored = any(record["scores"] for record in by.values())
        return scored and len(by) == 1 and who not in by and int(key[:8], 16) < self.twice * 2**32

    def do(self, who: str, action: str, asked: Mapping[str, Any]) -> None:
        """Grade, skip, go back or pause, as the page says. Raises Mistake if that cannot be done."""
        self._seen[who] = self._clock()
        match action:
            case "grade" | "skip":
                self._grade(who, asked, self._scores(asked) if action == "grade" else None)
            case "back":
                if not self._history[who]:
                    raise Mistake("there is nothing to go back to")
                at = self._looks_at.get(who)
                earlier = self._history[who]
                key = earlier[max(earlier.index(at) - 1, 0)] if at in earlier else earlier[-1]
                self._back.discard(at or "")
                self._looks_at[who] = key
                if key in self._waiting:
                    self._back.add(key)
            case "pause":
                self._back.discard(self._looks_at.pop(who, ""))
            case _:
                raise Mistake(f"unknown action {action[:20]!r}")

    def _scores(self, asked: Mapping[str, Any]) -> dict[str, int]:
        scores = asked.get("scores")
        if not isinstance(scores, dict) or scores.keys() != set(self.template.names):
            raise Mistake(f"give a score for each of {', '.join(self.template.names)}")
        if not all(type(score) is int and 0 <= score <= TOP for score in scores.values()):
            raise Mistake(f"a score is a whole number from 0 to {TOP}")
        return {name: scores[name] for name in self.template.names}

    def _grade(self, who: str, asked: Mapping[str, Any], scores: dict[str, int] | None) -> None:
        # The page says what it shows: after a restart a grade may come before the trainer has asked again.
        key, opening, story, seconds = (asked.get(name) for name in ("key", "opening", "story", "seconds"))
        if not (isinstance(opening, str) and isinstance(story, str)) or key != self.key(opening, story):
            raise Mistake("this is not what was asked about: load the page again")
        if seconds is not None and not (type(seconds) in (int, float) and 0 <= seconds < LONGEST_S):
            raise Mistake(f"a person takes from 0 to {LONGEST_S:.0e} seconds")
        record = {
            "key": key, "opening": opening, "story": story, "scores": scores, "by": who,
            "seconds": seconds if seconds is None else round(seconds, 1), "at": timestamp(),
        }  # fmt: skip
        self._journal.append(record)
        self._note(record)
        self._back.discard(key)
        if self._looks_at.get(who) == key:
            del self._looks_at[who]
        self._graded = self._clock()

    def close(self) -> None:
        self._journal.close()
