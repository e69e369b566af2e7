"""The desk at which humans say which of two stories is the better one, without being told which is which."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinystory.evaluate.preference import SAME, Choice, Pair, win_rate
from tinystory.human.desk import Mistake, step_back
from tinystory.run.folder import Record, read_records, timestamp
from tinystory.run.journal import Journal


class PairDesk:
    """Choices between the stories of `pairs`, kept in the file `path`. Each human sees the pairs in an order of their
    own, and which story is on the left is drawn for each pair and human: neither tells which is which."""

    mode = "compare"

    def __init__(self, path: Path, pairs: Sequence[Pair]):
        self.pairs = {pair.key: pair for pair in pairs}
        self._choices: dict[str, dict[str, Record]] = defaultdict(dict)  # by human and key, in order
        self._current: dict[str, str] = {}  # human: key of the pair on the page
        for record in read_records(path):
            if record["key"] in self.pairs:
                self._choices[record["by"]][record["key"]] = record
        self._journal = Journal(path, durable=True)

    def swapped(self, who: str, key: str) -> bool:
        """Whether the first story of this pair is on the right."""
        return bool(_draw(who, key)[0] & 1)

    def state(self, who: str) -> dict[str, Any]:
        """What the page of this human shows."""
        choices = self._choices[who]
        unseen = (key for key in sorted(self.pairs, key=lambda key: _draw(who, key)) if key not in choices)
        state = {"mode": self.mode, "item": None, "left": len(self.pairs) - len(choices), "done": len(choices)}
        key = self._current.get(who) or next(unseen, None)
        if key is None:
            return state | {"result": win_rate(self.choices(who))}
        self._current[who] = key
        pair = self.pairs[key]
        stories = [pair.second, pair.first] if self.swapped(who, key) else [pair.first, pair.second]
        return state | {"item": dict(key=key, opening=pair.opening, stories=stories, again=key in choices)}

    def choices(self, who: str) -> list[Choice]:
        return [Choice(record["choice"]) for record in self._choices[who].values() if record["choice"]]

    def do(self, who: str, action: str, request: Mapping[str, Any]) -> None:
        """Choose, skip, go back or pause, as the page says. Raises Mistake if that cannot be done."""
        match action:
            case "choose" | "skip":
                self._choose(who, str(request.get("key")), request.get("side") if action == "choose" else "none")
            case "back":
                self._current[who] = step_back(list(self._choices[who]), self._current.get(who))
            case "pause":
                self._current.pop(who, None)
            case _:
                raise Mistake(f"unknown action {action[:20]!r}")

    def _choose(self, who: str, key: str, side: object) -> None:
        left, right = ("second", "first") if self.swapped(who, key) else ("first", "second")
        choices: dict[str, str | None] = {"left": left, "right": right, SAME: SAME, "none": None}
        if key not in self.pairs or not isinstance(side, str) or side not in choices:
            raise Mistake("there is no such pair or side")
        pair = self.pairs[key]
        record: Record = dict(key=key, opening=pair.opening, first=pair.first, second=pair.second)
        record |= dict(left=left, choice=choices[side], by=who, at=timestamp())
        self._journal.append(record)
        self._choices[who][key] = record
        self._current.pop(who, None)

    def tick(self) -> None:
        """Nobody waits for a choice."""

    def close(self) -> None:
        self._journal.close()


def _draw(who: str, key: str) -> bytes:
    return hashlib.sha256(json.dumps([who, key]).encode()).digest()
