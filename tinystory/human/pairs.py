"""The desk at which a person says which of two stories is the better one, without being told which is which."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinystory.evaluate.preference import SAME, Choice, Pair, win_rate
from tinystory.human.desk import Mistake
from tinystory.run.folder import Record, timestamp
from tinystory.run.journal import Journal


class PairDesk:
    """Choices between the stories of `pairs`, kept in the file `path`. Each person sees the pairs in an order of their
    own, and which story is on the left is drawn for each pair and person: neither tells which is which."""

    mode = "compare"

    def __init__(self, path: Path, pairs: Sequence[Pair]):
        self.pairs = {pair.key: pair for pair in pairs}
        self._journal = Journal(path)
        self._choices: dict[str, dict[str, Record]] = defaultdict(dict)  # by person and key, in order
        self._looks_at: dict[str, str] = {}
        for record in self._journal.records:
            if record.get("key") in self.pairs:
                self._choices[record["by"]][record["key"]] = record

    def swapped(self, who: str, key: str) -> bool:
        """Whether the first story of this pair is on the right."""
        return bool(_draw(who, key)[0] & 1)

    def state(self, who: str) -> dict[str, Any]:
        """What the page of this person shows."""
        chosen = self._choices[who]
        key = self._looks_at.get(who) or self._next(who)
        shown = None
        if key is not None:
            self._looks_at[who] = key
            pair = self.pairs[key]
            stories = [pair.first, pair.second]
            shown = {
                "key": key,
                "opening": pair.opening,
                "stories": stories[::-1] if self.swapped(who, key) else stories,
                "again": key in chosen,
            }
        state = {"mode": self.mode, "show": shown, "left": len(self.pairs) - len(chosen), "done": len(chosen)}
        if shown is None:
            state["result"] = win_rate(self.choices(who))
        return state

    def _next(self, who: str) -> str | None:
        order = sorted(self.pairs, key=lambda key: _draw(who, key))
        return next((key for key in order if key not in self._choices[who]), None)

    def choices(self, who: str) -> list[Choice]:
        return [Choice(record["choice"]) for record in self._choices[who].values() if record["choice"]]

    def do(self, who: str, action: str, asked: Mapping[str, Any]) -> None:
        """Choose, skip, go back or pause, as the page says. Raises Mistake if that cannot be done."""
        match action:
            case "choose" | "skip":
                key, side = str(asked.get("key")), asked.get("side")
                if key not in self.pairs or (action == "choose" and side not in ("left", "right", SAME)):
                    raise Mistake("there is no such pair or side")
                choice = None
                if action == "choose":
                    swapped = self.swapped(who, key)
                    choice = SAME if side == SAME else ("second" if (side == "right") != swapped else "first")
                pair = self.pairs[key]
                record = {
                    "key": key, "opening": pair.opening, "first": pair.first, "second": pair.second,
                    "left": "second" if self.swapped(who, key) else "first", "choice": choice, "by": who,
                    "at": timestamp(),
                }  # fmt: skip
                self._journal.append(record)
                self._choices[who][key] = record
                self._looks_at.pop(who, None)
            case "back":
                chosen = list(self._choices[who])
                if not chosen:
                    raise Mistake("there is nothing to go back to")
                at = self._looks_at.get(who)
                self._looks_at[who] = chosen[max(chosen.index(at) - 1, 0)] if at in chosen else chosen[-1]
            case "pause":
                self._looks_at.pop(who, None)
            case _:
                raise Mistake(f"unknown action {action[:20]!r}")

    def tick(self) -> None:
        """Nobody waits for a choice."""

    def close(self) -> None:
        self._journal.close()


def _draw(who: str, key: str) -> bytes:
    return hashlib.sha256(json.dumps([who, key]).encode()).digest()
