"""The gain of a run measured by a second judge, which was not the teacher, compared with controls
that need no training."""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np
import torch

from lab.intervals import bootstrap_mean
from lab.reader import Reader, mean_and_bootstrap_ci
from tinystory.config import InteractConfig
from tinystory.evaluate.corruptions import corpus_documents, first_sentences, usable_documents
from tinystory.evaluate.held_out import FIRST_INDEX
from tinystory.evaluate.intervals import with_ci
from tinystory.ops.compute import Compute
from tinystory.report.before_after import best_step
from tinystory.report.charts import number
from tinystory.run.errors import UserError
from tinystory.run.files import atomic_write
from tinystory.run.records import EVALUATIONS, Record, plain, read_records
from tinystory.student import checkpoint
from tinystory.student.generate import generate
from tinystory.teacher.grade import Grade, highest_score

JUDGED = "judged.jsonl"  # file in a run's folder with the judged stories and both scores
TEMPERATURES = (0.7, 0.5)
BEST_OF = 4
BEFORE, AFTER, BEST, REAL = "before", "after", "best checkpoint", "real stories"
BEST_OF_N = f"before, best of {BEST_OF} by the teacher"
COLDER = tuple(f"before, at {factor} of the temperature" for factor in TEMPERATURES)
GROUPS = (BEFORE, AFTER, BEST, *COLDER, BEST_OF_N, REAL)
StoryAfter: TypeAlias = tuple[str, str]  # opening and story


def judge_run(
    run: Path,
    config: InteractConfig,
    compute: Compute,
    reader: Reader,
    grade: Callable[[Sequence[StoryAfter]], list[Grade]],
    corpus: Sequence[str],
) -> list[Record]:
    """The records of judged.jsonl, which is written here: for each of GROUPS, stories for the
    openings of the run's evaluations, with the teacher's score (on the scale of `shown_scores`) and
    the reader's coherence.

    BEFORE, AFTER and BEST are from the evaluations, and REAL from `corpus`. The student from before
    interaction writes the other groups. grade: the run's teacher. Raises UserError without
    evaluations at the start and the end."""
    groups = evaluated_stories(run)
    openings = [opening for opening, _ in groups[BEFORE]]
    student, tokenizer, _ = checkpoint.load(run / "checkpoints" / "start", compute.device)

    def write(temperature: float, copies: int = 1) -> list[StoryAfter]:
        with torch.no_grad(), compute.autocast():
            stories = generate(
                student,
                None,
                tokenizer,
                openings * copies,
                first_index=FIRST_INDEX,
                max_new_tokens=config.max_new_tokens,
                temperature=temperature,
                seed=config.seed,
            )
        return [(story.opening, story.text) for story in stories]

    for name, temperature in zip(COLDER, TEMPERATURES, strict=True):
        groups[name] = write(temperature)
    candidates = write(1.0, BEST_OF)
    documents = corpus_documents(corpus)
    real = real_stories(documents, len(openings), seed=config.seed)
    groups[REAL] = [(opening, " ".join(sentences)) for opening, *sentences in real]

    distinct = list(dict.fromkeys(itertools.chain(candidates, *groups.values())))
    scores: dict[StoryAfter, float | None] = {}
    for story, graded in zip(distinct, grade(distinct), strict=True):
        score = graded.score
        scores[story] = None if score is None else score * highest_score(graded.scores)
    best = best_of_n([scores[story] for story in candidates], len(openings))
    groups[BEST_OF_N] = [candidates[i] for i in best]

    records: list[Record] = []
    for name in GROUPS:
        for index, story in enumerate(groups[name]):
            opening, text = story
            record = {"group": name, "index": index, "opening": opening, "story": text}
            records.append(record | {"score": scores[story]})
    coherences = reader.coherence([(record["opening"], record["story"]) for record in records])
    for record, coherence in zip(records, coherences.tolist(), strict=True):
        record["coherence"] = plain(coherence)
    atomic_write(run / JUDGED, "".join(json.dumps(record) + "\n" for record in records))
    return records


def evaluated_stories(run: Path) -> dict[str, list[StoryAfter]]:
    """The stories of a run's evaluations before the first step, after the last step, and of `best`.
    Raises UserError if an evaluation is missing."""
    by_step: dict[int, list[StoryAfter]] = {}
    evaluations = read_records(run / EVALUATIONS)
    for record in sorted(evaluations, key=lambda record: (record["step"], record["index"])):
        by_step.setdefault(record["step"], []).append((record["opening"], record["story"]))
    best = best_step(run)
    if len(by_step) < 2 or 0 not in by_step or best not in by_step:
        raise UserError(
            f"{run} has no evaluations before the first step and at the end: give a finished interaction"
        )
    return {BEFORE: by_step[0], AFTER: by_step[max(by_step)], BEST: by_step[best]}


def real_stories(documents: Iterable[str], count: int, seed: int) -> list[list[str]]:
    """First sentences of `count` stories drawn from the documents, or from the grammar if too few
    documents are long enough."""
    drawn = random.Random(seed).sample(usable_documents(documents, count), count)
    return [first_sentences(text, i) for i, text in enumerate(drawn)]


def summary(records: Sequence[Record], measure: str) -> dict[str, dict[str, Any]]:
    """For each group: "mean", the mean score or coherence of the stories; "ci", its bootstrap interval;
    and "gap", the fraction of the way from BEFORE to REAL (None unless BEFORE is below REAL's
    interval). Values are None if they were not measured. measure: "score" or "coherence"."""
    table: dict[str, dict[str, Any]] = {}
    for name in GROUPS:
        values = [record[measure] for record in records if record["group"] == name]
        mean, ci = mean_and_bootstrap_ci(np.array(values, dtype=float))
        table[name] = {"mean": mean, "ci": ci, "gap": None}
    low = table[BEFORE]["mean"]
    high = table[REAL]["mean"]
    if low is not None and high is not None and low < table[REAL]["ci"][0]:
        for row in table.values():
            if row["mean"] is not None:
                row["gap"] = (row["mean"] - low) / (high - low)
    return table


def gain(records: Sequence[Record], group: str, over: str) -> tuple[float, tuple[float, float]]:
    """The mean difference in coherence between two groups' stories for the same openings, and its
    bootstrap interval."""
    coherences = coherence_by_index(records, group)
    others = coherence_by_index(records, over)
    differences = [coherences[index] - others[index] for index in coherences if index in others]
    if not differences:
        return math.nan, (math.nan, math.nan)
    return fmean(differences), bootstrap_mean(np.array(differences))


def coherence_by_index(records: Sequence[Record], group: str) -> dict[int, float]:
    """The coherence of a group's stories by index, without stories that have none."""
    coherences = {}
    for record in records:
        if record["group"] == group and record["coherence"] is not None:
            coherences[record["index"]] = record["coherence"]
    return coherences


def conclusion(records: Sequence[Record]) -> str:
    """A sentence with the gain in coherence, compared with the best control."""
    value, ci = gain(records, AFTER, BEFORE)
    text = f"{with_ci(value, ci, sign='+')} nats per token"
    if not ci[0] > 0:
        return f"The reader, which was not the teacher, measures no gain in coherence from interaction: {text}."
    groups = summary(records, "coherence")
    fraction = groups[AFTER]["gap"]
    if fraction is not None:
        text += f", {fraction:.0%} of the way to real stories"
    controls = [name for name in (*COLDER, BEST_OF_N) if groups[name]["mean"] is not None]
    control = max(controls, key=lambda name: groups[name]["mean"], default=BEST_OF_N)
    control_gain, _ = gain(records, control, BEFORE)
    beyond, (low, high) = gain(records, AFTER, control)
    verdict = "no different from"
    if low > 0:
        verdict = "more than"
    elif high < 0:
        verdict = "less than"
    return (
        f"The reader, which was not the teacher, measures a gain in coherence of {text}; that is {verdict} the "
        f"{control_gain:+.2f} for “{control}”, which needs no training "
        f"(difference {with_ci(beyond, (low, high), sign='+')})."
    )


def judged_rows(records: Sequence[Record]) -> list[list[str]]:
    """A header, and a row per group: number of stories, mean by each judge, and the fraction of the
    way from before interaction to real stories."""
    coherence_title = "Coherence, nats per token"
    rows = [["Stories", "Number", "Teacher’s score", "of the way", coherence_title, "of the way"]]
    scores = summary(records, "score")
    coherences = summary(records, "coherence")
    for name in GROUPS:
        size = sum(record["group"] == name for record in records)
        row = [name, str(size)]
        for measured in (scores[name], coherences[name]):
            gap = measured["gap"]
            row.append(with_ci(measured["mean"], measured["ci"]))
            row.append(number(None) if gap is None else f"{gap:.0%}")
        rows.append(row)
    return rows


def best_of_n(values: Sequence[Any], count: int) -> list[int]:
    """For each i < count, the index of the largest value in values[i::count]. None (no score)
    counts as less than any value."""
    best = []
    for first in range(count):
        group = range(first, len(values), count)
        best.append(max(group, key=lambda i: (values[i] is not None, values[i])))
    return best
