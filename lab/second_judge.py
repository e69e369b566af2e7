"""A run's gain as seen by a second judge, which was not its teacher, beside controls that need no
learning."""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab.reader import Reader, mean_and_ci
from tinystory.config import InteractConfig
from tinystory.evaluate.corruptions import corpus_documents, first_sentences, usable_documents
from tinystory.evaluate.held_out import FIRST_INDEX
from tinystory.evaluate.intervals import mean_ci, with_ci
from tinystory.evaluate.stories import best_of_n
from tinystory.ops.compute import Compute
from tinystory.report.charts import number
from tinystory.run.errors import UserError
from tinystory.run.files import atomic_write
from tinystory.run.records import EVALUATIONS, SAMPLES, Record, plain, read_records
from tinystory.student import checkpoint
from tinystory.student.generate import generate
from tinystory.teacher.grade import Grade

JUDGED = "judged.jsonl"  # in a run's folder: the stories that were judged, with both scores
TEMPERATURES = (0.7, 0.5)
BEST_OF = 4
BEFORE, AFTER, BEST, REAL = "before", "after", "best checkpoint", "real stories"
BEST_OF_N = f"before, best of {BEST_OF} by the teacher"
COLDER = tuple(f"before, temperature {temperature}" for temperature in TEMPERATURES)
GROUPS = (BEFORE, AFTER, BEST, *COLDER, BEST_OF_N, REAL)


def judge_run(
    run: Path,
    config: InteractConfig,
    compute: Compute,
    reader: Reader,
    grade: Callable[[Sequence[tuple[str, str]]], list[Grade]],
    corpus: Sequence[str] = (),
) -> list[Record]:
    """Write and return judged.jsonl: for each of GROUPS, stories to the openings of the run's
    evaluations, with the teacher's score (the sum of its criteria, or a callable's score) and the
    reader's sense.

    BEFORE, AFTER and BEST are from the evaluations, REAL from `corpus` (default: the student's
    own); the student at the run's start writes the others. grade: the run's teacher. Raises
    UserError without evaluations at both ends."""
    by_step: dict[int, list[tuple[str, str]]] = {}
    for record in sorted(
        read_records(run / EVALUATIONS), key=lambda record: (record["step"], record["index"])
    ):
        by_step.setdefault(record["step"], []).append((record["opening"], record["story"]))
    best = next(
        (record["step"] for record in read_records(run / SAMPLES) if record["when"] == "after"),
        None,
    )
    if len(by_step) < 2 or 0 not in by_step or best not in by_step:
        raise UserError(
            f"{run} was not evaluated before its first step and at its end: give a finished interaction"
        )
    groups = {BEFORE: by_step[0], AFTER: by_step[max(by_step)], BEST: by_step[best]}
    student, tokenizer, history = checkpoint.load(run / "checkpoints" / "start", compute.device)
    openings = [opening for opening, _ in by_step[0]]

    def write(temperature: float, copies: int = 1) -> list[tuple[str, str]]:
        sampling: dict[str, Any] = dict(
            max_new_tokens=config.max_new_tokens, temperature=temperature, seed=config.seed
        )
        with torch.no_grad(), compute.autocast():
            stories = generate(
                student, None, tokenizer, openings * copies, first_index=FIRST_INDEX, **sampling
            )
        return [(story.opening, story.text) for story in stories]

    groups |= {
        name: write(temperature) for name, temperature in zip(COLDER, TEMPERATURES, strict=True)
    }
    drawn = write(config.temperature, BEST_OF)
    real = real_stories(
        corpus_documents(corpus or history.get("corpus", ["builtin"])),
        len(openings),
        seed=config.seed,
    )
    groups[REAL] = [(opening, " ".join(sentences)) for opening, *sentences in real]
    graded = list(dict.fromkeys([*drawn, *(pair for group in groups.values() for pair in group)]))
    grades = zip(graded, grade(graded), strict=True)
    scores = {
        pair: sum(each.scores.values()) if each.scores else each.score for pair, each in grades
    }
    groups[BEST_OF_N] = [
        drawn[i] for i in best_of_n([scores[pair] for pair in drawn], len(openings))
    ]
    records: list[Record] = [
        {"group": name, "index": i, "opening": pair[0], "story": pair[1], "score": scores[pair]}
        for name in GROUPS
        for i, pair in enumerate(groups[name])
    ]
    senses = reader.sense([(record["opening"], record["story"]) for record in records]).tolist()
    records = [
        record | {"sense": plain(sense)} for record, sense in zip(records, senses, strict=True)
    ]
    atomic_write(run / JUDGED, "".join(json.dumps(record) + "\n" for record in records))
    return records


def real_stories(documents: Iterable[str], count: int, seed: int) -> list[list[str]]:
    """First sentences of `count` stories drawn from the documents; if too few are long enough, from
    the grammar."""
    drawn = random.Random(seed).sample(usable_documents(documents, count), count)
    return [first_sentences(text, i) for i, text in enumerate(drawn)]


def summary(records: Sequence[Record], measure: str) -> dict[str, dict[str, Any]]:
    """Per group the mean "score" or "sense" over its stories, the bootstrap interval "ci", and
    "gap", the fraction of the way from BEFORE to REAL, None unless BEFORE is below REAL's interval.
    None for what was not measured."""
    groups = {
        name: [record[measure] for record in records if record["group"] == name] for name in GROUPS
    }
    means: dict[str, Any] = {
        name: mean_and_ci(np.array(values, dtype=float)) for name, values in groups.items()
    }
    low, high = means[BEFORE][0], means[REAL][0]
    wide = low is not None and high is not None and low < means[REAL][1][0]
    return {
        name: {
            "mean": mean,
            "ci": ci,
            "gap": (mean - low) / (high - low) if wide and mean is not None else None,
        }
        for name, (mean, ci) in means.items()
    }


def gain(records: Sequence[Record], group: str, over: str) -> tuple[float, tuple[float, float]]:
    """Mean difference in sense between two groups' stories to the same openings, and its bootstrap
    interval."""
    sense = {
        (record["group"], record["index"]): record["sense"]
        for record in records
        if record["sense"] is not None
    }
    pairs = [
        (value, sense.get((over, index))) for (name, index), value in sense.items() if name == group
    ]
    difference = np.array([ours - theirs for ours, theirs in pairs if theirs is not None])
    nothing = float("nan"), (float("nan"), float("nan"))
    return (float(difference.mean()), mean_ci(difference)) if len(difference) else nothing


def conclusion(records: Sequence[Record]) -> str:
    """One sentence: the gain in sense, compared with the best control."""
    value, ci = gain(records, AFTER, BEFORE)
    text = f"{with_ci(value, ci, sign='+')} nats per token"
    if not ci[0] > 0:
        return f"The reader, which was not the teacher, sees no gain in sense from interaction: {text}."
    groups = summary(records, "sense")
    fraction = groups[AFTER]["gap"]
    way = "" if fraction is None else f", {fraction:.0%} of the way to real stories"
    controls = [name for name in (*COLDER, BEST_OF_N) if groups[name]["mean"] is not None]
    control = max(controls, key=lambda name: groups[name]["mean"], default=BEST_OF_N)
    beyond, beyond_ci = gain(records, AFTER, control)
    theirs = f"{gain(records, control, BEFORE)[0]:+.2f} for “{control}”, which needs no training"
    verdict = (
        "more than"
        if beyond_ci[0] > 0
        else "less than"
        if beyond_ci[1] < 0
        else "no different from"
    )
    return (
        f"The reader, which was not the teacher, sees a gain in sense of {text}{way}; that is {verdict} the {theirs} "
        f"(difference {with_ci(beyond, beyond_ci, sign='+')})."
    )


def judged_rows(records: Sequence[Record]) -> list[list[str]]:
    """A header, and per group: size, mean by each judge, and the fraction of the way from before to
    real stories."""
    tables = {measure: summary(records, measure) for measure in ("score", "sense")}
    rows = [
        [
            "Stories",
            "Number",
            "Teacher’s score",
            "of the way",
            "Sense, nats per token",
            "of the way",
        ]
    ]
    for name in GROUPS:
        cells = []
        for table in tables.values():
            row = table[name]
            cells += [
                with_ci(row["mean"], row["ci"]),
                number(None) if row["gap"] is None else f"{row['gap']:.0%}",
            ]
        rows.append([name, str(sum(record["group"] == name for record in records)), *cells])
    return rows
