"""Progress of a run with a human teacher, from the records in the run's folder, and the pairs of
stories that the human is shown: stories for the same held-out opening, from before and after
interaction."""

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

# Number of openings compared at the end, the first ones. During the run only stories for the other
# openings are shown, so that no compared story was seen with a label.
COMPARED = 16
NEITHER = "neither"
# Parts of a step that do not wait for the human.
MACHINE_PARTS = ("rollout_s", "reference_s", "update_s")


@dataclass(frozen=True)
class Pair:
    """Two stories for one opening. index: index of the opening in evaluations."""

    index: int
    opening: str
    before: str
    after: str

    @property
    def key(self) -> str:
        return key_of(self.index, self.opening, self.before, self.after)

    @property
    def names(self) -> dict[str, str]:
        """The story preferred by each answer: `left` and `right` map to `before` and `after` in
        random order; `neither` maps to `neither`."""
        names = {"left": "before", "right": "after", NEITHER: NEITHER}
        if int(self.key, 16) % 2:
            names |= {"left": "after", "right": "before"}
        return names


@dataclass
class RunProgress:
    """Progress of a run.

    steps, stories, grades, evaluated: planned numbers of steps, of stories per step, of grades in
    the run and of stories per evaluation; 0 if not recorded. step: number of finished steps. asked,
    graded: number of stories in finished steps that were sent to the teacher, and that were graded.
    step_s: median seconds of a step without waiting for the teacher; 0 before the first step.
    learned: the pair to show after the last evaluation, and the step of that evaluation. pairs:
    pairs to compare. left_out: number of pairs with equal or empty stories, which are not
    compared."""

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
    """The progress of the run in `folder`. Raises UserError for records that cannot be read."""
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
        pair = to_show[(step - 1) % len(to_show)]  # a different pair after each evaluation
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
    """A hash of a question's parts, which identifies the question on the page and in files."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _count(options: Mapping[str, Any], name: str) -> int:
    value = options.get(name)
    return value if type(value) is int and value > 0 else 0


def _pairs(before: Iterable[Record], after: Iterable[Record]) -> list[Pair]:
    """Pairs of the records with the same index. Texts are cut and cleaned for a page."""
    after_by_index = {record["index"]: record for record in after}
    pairs = []
    for record in before:
        index = record["index"]
        if index in after_by_index:
            texts = record["opening"], record["story"], after_by_index[index]["story"]
            pairs.append(Pair(index, *(printable(text[:LONGEST]).strip() for text in texts)))
    return pairs
