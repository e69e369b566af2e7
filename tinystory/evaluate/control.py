"""A run beside its control: measures of three students, before interaction, after the run and after
the control, on the same held-out openings and texts, and what their differences say."""

import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from tinystory.config import CONTROLS, InteractConfig
from tinystory.data.corpus import NAMES, open_corpus
from tinystory.data.openings import Openings
from tinystory.data.shards import held_out_documents
from tinystory.evaluate.corruptions import unseen_stories
from tinystory.evaluate.graders import Graders
from tinystory.evaluate.held_out import is_evaluated
from tinystory.evaluate.intervals import Z, mean_of, standard_error, t_quantile
from tinystory.evaluate.stories import cluster_ids
from tinystory.evaluate.validation import best_temperature_bits
from tinystory.rl.policy import Policy, rollout
from tinystory.rl.reward import differences, story_rewards
from tinystory.run import distributed
from tinystory.run.errors import Stop, UserError
from tinystory.run.files import atomic_write
from tinystory.run.folder import CONTROL_RUNS, newest_first, read_config
from tinystory.run.records import LARGEST, Fields, Record, plain, read_metrics, read_object
from tinystory.student import checkpoint
from tinystory.student.generate import Story
from tinystory.student.model import Student
from tinystory.teacher.control import control_number
from tinystory.teacher.grade import Grader

COMPARISON = "comparison.json"
STUDENTS = ("before", "run", "control")
# Fewest stories per student. They are written in groups of --eval-stories, as in an evaluation; with
# a teacher on the command line, in one group.
STORIES = 200
DOCUMENTS = 200  # held-out texts for bits per byte
# Index of the first story; no other stories use these random numbers.
FIRST_INDEX = 4 * 10**9
# Half the width, in standard deviations of the stories before interaction, of the range of
# differences that are too small to matter.
SMALL = 1 / 3
FEWEST_CONTROLS = 3  # with scores in random order, for a verdict


class Measure(NamedTuple):
    """A measure of a story or, for bits per byte, of a text. title: may have a place for the number
    of stories in a group. is_sum: the measure of a student is the sum over a group, not the mean."""

    title: str
    is_sum: bool = False


MEASURES: Mapping[str, Measure] = {
    "reward": Measure("reward, 0 to 1"),
    "score": Measure("score, 0 to 1"),
    "judge": Measure("second judge, 0 to 1"),
    "ended": Measure("ended"),
    "clusters": Measure("clusters among {group} stories", is_sum=True),
    "words": Measure("words"),
    "bits_per_byte": Measure("bits per byte"),
}
CLAIMED = ("reward", "judge")  # the first of these that is measured is the gain of the sentence

Values = list[float | None]  # one per story or text; None: unscored
Measures = Mapping[str, Values]  # by name in MEASURES


# ---- measuring -----------------------------------------------------------------------------------


def compare(
    policy: Policy, reference: Student, openings: Openings, graders: Graders, stop: Stop
) -> None:
    """Write COMPARISON, the measures of the three students, into the folder of a finished control.
    reference: the student before interaction. Raises Interrupted on `stop`."""
    config = policy.config
    last = last_student(Path(config.control[0]))
    run_student, _, _ = checkpoint.load(last, reference.wte.weight.device)
    students = dict(zip(STUDENTS, (reference, run_student, policy.student), strict=True))
    size = config.eval_stories
    groups = 1 if config.teacher_url else math.ceil(STORIES / size)
    held_out = openings.held_out
    prompts = [held_out[i % len(held_out)] for i in range(groups * size)]
    texts = held_out_texts(config, policy.history)

    record: Record = {"group": size, "temperatures": {}}
    for name, student in students.items():
        one = replace(policy, student=student)
        stories = rollout(one, prompts, FIRST_INDEX)
        measures: dict[str, list[float | None]] = defaultdict(list)
        for first in range(0, len(stories), size):
            group = stories[first : first + size]
            for measure, column in story_values(config, group, graders, stop).items():
                measures[measure] += column
        if texts:
            temperature, bits = best_temperature_bits(student, policy.tokenizer, texts)
            record["temperatures"][name] = temperature
            measures["bits_per_byte"] += bits
        record[name] = measures
    if distributed.is_rank0():
        atomic_write(Path(config.out) / COMPARISON, json.dumps(plain(record)) + "\n")


def story_values(
    config: InteractConfig, stories: Sequence[Story], graders: Graders, stop: Stop
) -> dict[str, Values]:
    """The measures of a group of stories, by name; without scores or a judge, fewer. A story in a
    cluster of n stories has the value 1 / n, so that the sum is the number of clusters."""
    clusters = cluster_ids([story.text for story in stories])
    sizes = Counter(clusters)
    values: dict[str, Values] = {
        "ended": [float(story.ended == "eos") for story in stories],
        "clusters": [1 / sizes[cluster] for cluster in clusters],
        "words": [float(story.words) for story in stories],
    }
    if config.eval_graded:
        values["score"] = scores_of(stories, graders.examiner, stop)
        difference = differences([story.text for story in stories])
        values["reward"] = [*story_rewards(config, stories, values["score"], difference)]
    if graders.judge:
        values["judge"] = scores_of(stories, graders.judge, stop)
    return values


def scores_of(stories: Sequence[Story], grader: Grader, stop: Stop) -> Values:
    """The scores of stories on every rank, 0..1. Raises Interrupted on `stop`."""
    for story in stories:
        grader.send(story)
    return [grade.score for grade in grader.collect(stop)]


def last_student(run: Path) -> Path:
    """The last checkpoint of a run. The checkpoint `best` is chosen by its held-out stories, which
    is an advantage that the control would not have."""
    folder = checkpoint.newest(run)
    if folder is None:
        raise UserError(f"{run} has no checkpoint: give --control a run with its checkpoints")
    return folder


def held_out_texts(config: InteractConfig, history: Mapping[str, Any]) -> list[str]:
    """DOCUMENTS texts on which a student with this training history was not trained: new stories of
    the grammar, or documents of the validation split. [] if the corpus is not known."""
    corpus = history.get("corpus") or []
    if "builtin" in corpus:
        return unseen_stories(DOCUMENTS)
    names = config.corpus or [name for name in corpus if name in NAMES]
    reason = "the texts held out from pretraining are not known; give the student's --corpus"
    if len(names) == len(corpus) > 0 and {"val_fraction", "seed"} <= history.keys():
        try:
            documents = held_out_documents(
                open_corpus(names), history["val_fraction"], history["seed"]
            )
            return list(itertools.islice(documents, DOCUMENTS))
        except UserError as error:  # such as a download that fails
            reason = str(error)
    print(f"bits per byte are not measured: {reason}")
    return []


def note_on_grades(config: InteractConfig, examiner: Grader, openings: Openings) -> str:
    """A sentence on who grades the held-out stories of a control, and on the cost if that is a
    teacher on the command line, or if it could be the run's."""
    evaluations = sum(is_evaluated(config, step) for step in range(config.steps + 1))
    grades = (evaluations + len(STUDENTS)) * config.eval_stories
    if config.eval_graded:
        by = f"held-out stories are graded by {examiner.facts['scored_by']}"
        return f"{by}: {examiner.forecast(grades, openings[0])}" if config.teacher_url else by
    run = Path(config.control[0])
    by = f"held-out stories are graded by the second judge ({config.judge}), not by the teacher of {run}"
    if not read_config(run)["options"]["teacher_url"]:
        return f"{by}; to ask that function, give --reward again"
    cost = f"{grades:,} grades"
    metrics = read_metrics(run)
    requests = total(metrics, "teacher_requests")
    if requests:
        tokens = grades * total(metrics, "teacher_tokens_in") / requests
        cost += f", about {tokens:,.0f} prompt tokens"
    return f"{by}; to ask that teacher, give --teacher-url again: {cost}"


def total(metrics: Sequence[Record], key: str) -> float:
    """The sum of the numbers among a metric's values, which a server may have reported."""
    values = [record.get(key) for record in metrics]
    return float(sum(value for value in values if isinstance(value, int | float)))


# ---- what the differences say --------------------------------------------------------------------


class Difference(NamedTuple):
    """Means of a measure: before interaction, after the run, after the controls; and half the width
    of the 95 % interval of run minus control. verdict: see `verdict`; "" with too few controls."""

    before: float
    run: float
    control: float
    half: float
    verdict: str

    @property
    def gain(self) -> float:
        return self.run - self.before

    @property
    def by_teacher(self) -> float:
        return self.run - self.control


@dataclass(frozen=True)
class Comparison:
    """A run beside its controls of one kind. name: of the kind, one of CONTROLS. group: number of
    stories in a group. before, run, controls: measures by name, of the student before, after the
    run, and after each control. shuffled: the same of the controls with scores in random order,
    which show how much trainings differ by chance."""

    name: str
    group: int
    before: Measures
    run: Measures
    controls: Sequence[Measures]
    shuffled: Sequence[Measures]

    @property
    def has_verdicts(self) -> bool:
        return len(self.shuffled) >= FEWEST_CONTROLS

    def differences(self) -> dict[str, Difference]:
        """The measures that all students have, by name."""
        students = (self.before, self.run, *self.controls)
        result = {}
        for name, measure in MEASURES.items():
            columns = [student[name] for student in students if name in student]
            if len(columns) < len(students):
                continue
            rows = [row for row in zip(*columns, strict=True) if None not in row]
            if len(rows) > 1:
                trainings = []
                if self.has_verdicts:
                    trainings = [mean_of(student.get(name, ())) for student in self.shuffled]
                scale = self.group if measure.is_sum else 1
                result[name] = difference(rows, trainings, scale)
        return result

    def claimed(self) -> str:
        """Name of the measure whose gain the report states; "" if none was measured."""
        known = self.differences()
        return next((name for name in CLAIMED if name in known), "")


def difference(
    rows: Sequence[Sequence[float]], trainings: Sequence[float | None] = (), scale: float = 1.0
) -> Difference:
    """Means and verdict from rows of values for the same opening, (before, run, control, ...).

    trainings: means after several trainings that differ only by chance. With them, the interval is
    at least the prediction interval of run minus control under the hypothesis that the scores say
    nothing about the stories: run and controls then are further such trainings. Without them, the
    interval is only over the openings, and there is no verdict, because trainings differ more by
    chance than stories do."""
    paired = [row[1] - fmean(row[2:]) for row in rows]
    half = Z * (standard_error(paired) or 0.0)
    before, run, *controls = (fmean(column) for column in zip(*rows, strict=True))
    known = [mean for mean in trainings if mean is not None]
    says = ""
    if len(known) >= FEWEST_CONTROLS:
        by_chance = stdev(known) * math.sqrt(1 + 1 / len(controls))
        half = max(half, t_quantile(len(known)) * by_chance)
        says = verdict(fmean(paired), half, SMALL * stdev(row[0] for row in rows))
    return Difference(scale * before, scale * run, scale * fmean(controls), scale * half, says)


def verdict(mean: float, half: float, small: float) -> str:
    """What a 95 % interval mean - half..mean + half of the difference of run and control says. It
    excludes 0: more or less than the control. It lies within -small..small: as the control.
    Otherwise the number of stories is too small to say."""
    if mean - half > 0:
        return "more than its control"
    if mean + half < 0:
        return "less than its control"
    if abs(mean) + half <= small:
        return "as its control"
    return "not told apart at this size"


def read_comparisons(run: Path) -> list[Comparison]:
    """The comparisons of a run with its controls, in the order of CONTROLS. Controls with another
    number of stories than the first (--eval-stories) are left out. Raises UserError for a file that
    `compare` cannot have written."""
    by_kind: dict[str, list[Record]] = {}
    for name in CONTROLS:
        paths = [folder / COMPARISON for folder in control_folders(run, name)]
        records = [read_comparison(path) for path in paths if path.exists()]
        if records:
            by_kind[name] = records
    comparisons = []
    for name, (first, *others) in by_kind.items():
        controls = [first, *(record for record in others if are_alike(record, first))]
        shuffled = [record for record in by_kind.get("shuffled", ()) if are_alike(record, first)]
        comparison = Comparison(
            name=name,
            group=first["group"],
            before=first["before"],
            run=first["run"],
            controls=[record["control"] for record in controls],
            shuffled=[record["control"] for record in shuffled],
        )
        comparisons.append(comparison)
    return comparisons


def are_alike(record: Record, other: Record) -> bool:
    """Whether two records by `compare` have the same numbers of stories and texts."""
    names = record["run"].keys() & other["run"].keys() & MEASURES.keys()
    sizes = [[len(each["run"][name]) for name in sorted(names)] for each in (record, other)]
    return record["group"] == other["group"] and sizes[0] == sizes[1]


def control_folders(run: Path, name: str) -> list[Path]:
    """The folders of a run's controls of one kind: shuffled, shuffled-2, ..."""
    return sorted(newest_first(run / CONTROL_RUNS / name), key=control_number)


def read_comparison(path: Path) -> Record:
    """A record by `compare`: group, and the measures of each student. Raises UserError unless all
    values are numbers or None, and all columns of a measure have one length."""
    fields: Fields = dict.fromkeys(STUDENTS, (dict,))
    record = read_object(path, {"group": (int,)} | fields)
    try:
        for name in MEASURES:
            columns = [record[student].get(name, []) for student in STUDENTS]
            if any(not isinstance(column, list) for column in columns):
                raise ValueError(f"its {name!r} is not a list")
            if not all(is_value(value) for column in columns for value in column):
                raise ValueError(f"its {name!r} is not a list of numbers")
            if len({len(column) for column in columns}) > 1:
                raise ValueError(f"its {name!r} has different lengths")
        if not record["run"].get("words"):
            raise ValueError("it has no stories")
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read: {error}; delete the folder {path.parent} and run the control again"
        ) from None
    return record


def is_value(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and -LARGEST < value < LARGEST)
