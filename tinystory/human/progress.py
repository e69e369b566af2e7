"""How far the run of a human's student is, from the records in its folder, and the stories of it
that the human is shown: pairs to the same held-out opening, before interaction and after it."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tinystory.evaluate.held_out import evaluations_by_step
from tinystory.report.page import LONGEST
from tinystory.run.folder import read_config
from tinystory.run.records import SAMPLES, Record, read_metrics, read_records, read_stories
from tinystory.run.text import is_blank, printable
from tinystory.teacher.grade import NOT_ASKED

# Openings that are compared at the end: the first ones. Stories to the others are shown before, so
# that no story of a pair has been seen with its name.
COMPARED = 16
NEITHER = "neither"
# Parts of a step in which nobody waits for the human.
MACHINE_PARTS = ("rollout_s", "reference_s", "update_s")


@dataclass(frozen=True)
class Pair:
    """Two stories to one opening. index: of the opening in evaluations."""

    index: int
    opening: str
    before: str
    after: str

    @property
    def key(self) -> str:
        return key_of(self.index, self.opening, self.before, self.after)

    @property
    def names(self) -> dict[str, str]:
        """What each answer says: the name, `before` or `after`, of the story on the `left` or the
        `right`, in random order; `neither`."""
        names = {"left": "before", "right": "after", NEITHER: NEITHER}
        if int(self.key, 16) % 2:
            names |= {"left": "after", "right": "before"}
        return names


@dataclass
class RunProgress:
    """steps, stories, grades, evaluated: as planned, 0 if not recorded; stories: per step; grades:
    of the whole run. step: finished ones; asked, graded: their stories that the teacher was asked
    about, and that it graded. step_s: a step's typical seconds without the teacher's, 0 before the
    first one. learned: the pair to show after the last evaluation, and its step. left_out: pairs of
    equal or empty stories."""

    steps: int = 0
    stories: int = 0
    grades: int = 0
    evaluated: int = 0
    step: int = 0
    asked: int = 0
    graded: int = 0
    step_s: float = 0.0
    learned: Record | None = None
    finished: bool = False
    pairs: list[Pair] = field(default_factory=list)
    left_out: int = 0


def read_progress(folder: Path) -> RunProgress:
    """Raises UserError for records that cannot be read."""
    options = read_config(folder).get("options", {})
    progress = RunProgress(
        steps=_count(options, "steps"),
        stories=_count(options, "stories_per_step"),
        grades=_count(options, "grades"),
        evaluated=_count(options, "eval_stories"),
    )
    seconds = []
    for record in read_metrics(folder):
        progress.step = record["step"]
        seconds.append(sum(record.get(part) or 0 for part in MACHINE_PARTS))
    if seconds:
        progress.step_s = median(seconds)
    for record in read_stories(folder):
        asked = record["reply"] != NOT_ASKED.error
        progress.asked += asked
        # An empty story gets its score without a reply.
        progress.graded += bool(asked and record["reply"] and record["scores"])

    evaluations = evaluations_by_step(folder)
    step = max(evaluations, default=0)
    to_show = _pairs(evaluations.get(0, ()), evaluations.get(step, ()))[COMPARED:]
    if step and to_show:
        pair = to_show[(step - 1) % len(to_show)]  # another one after each evaluation
        progress.learned = {"opening": pair.opening, "before": pair.before, "after": pair.after}
        progress.learned["step"] = step

    samples = defaultdict(list)
    for record in read_records(folder / SAMPLES):
        samples[record["when"]].append(record)
    progress.finished = bool(samples)
    for pair in _pairs(samples["before"], samples["after"])[:COMPARED]:
        if is_blank(pair.before) or is_blank(pair.after) or pair.before == pair.after:
            progress.left_out += 1
        else:
            progress.pairs.append(pair)
    return progress


def key_of(*parts: Any) -> str:
    """What names a question to the human: a hash of its parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _count(options: Mapping[str, Any], name: str) -> int:
    value = options.get(name)
    return value if type(value) is int and value > 0 else 0


def _pairs(before: Iterable[Record], after: Iterable[Record]) -> list[Pair]:
    """By index. The texts are what a page can show."""
    after_by_index = {record["index"]: record for record in after}
    pairs = []
    for record in before:
        index = record["index"]
        if index in after_by_index:
            texts = record["opening"], record["story"], after_by_index[index]["story"]
            pairs.append(Pair(index, *(printable(text[:LONGEST]).strip() for text in texts)))
    return pairs
