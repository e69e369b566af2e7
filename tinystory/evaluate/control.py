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

from tinystory.config import InteractConfig
from tinystory.config.control import CONTROLS
from tinystory.data.corpus import NAMES, open_corpus
from tinystory.data.openings import Openings
from tinystory.data.shards import held_out_documents
from tinystory.evaluate import held_out
from tinystory.evaluate.corruptions import unseen_stories
from tinystory.evaluate.graders import Graders
from tinystory.evaluate.intervals import Z, mean_of, standard_error, t_quantile
from tinystory.evaluate.recorded_scores import control_number
from tinystory.evaluate.stories import cluster_ids
from tinystory.evaluate.validation import best_temperature_bits
from tinystory.rl.policy import Policy
from tinystory.run import distributed
from tinystory.run.errors import Stop, UserError
from tinystory.run.files import atomic_write
from tinystory.run.folder import CONTROL_RUNS, newest_first, read_config
from tinystory.run.records import LARGEST, Fields, Record, plain, read_object
from tinystory.student import checkpoint
from tinystory.student.model import Student
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

# Titles of the measures of a story or, for bits per byte, of a text. group: number of stories in a
# group.
MEASURES = {
    "reward": "reward, 0 to 1",
    "score": "score, 0 to 1",
    "judge": "second judge, 0 to 1",
    "ended": "ended",
    "clusters": "clusters among {group} stories",
    "words": "words",
    "bits_per_byte": "bits per byte",
}
CLAIMED = ("reward", "judge")  # the first of these that is measured is the gain of the sentence

# Values of the stories or texts by name in MEASURES. None: not scored.
Measures = Mapping[str, Sequence[float | None]]


# ---- measuring -----------------------------------------------------------------------------------


def compare(
    policy: Policy, reference: Student, openings: Openings, graders: Graders, stop: Stop
) -> None:
    """Write COMPARISON, the measures of the three students, into the folder of a finished control.
    reference: the student before interaction. Raises Interrupted on `stop`."""
    config = policy.config
    run = Path(config.control[0])
    # The checkpoint `best` is chosen by its held-out stories, which is an advantage that the control
    # would not have.
    last = checkpoint.newest(run)
    assert last is not None, "the control began with a checkpoint of the run"
    run_student, _, _ = checkpoint.load(last, reference.wte.weight.device)
    students = dict(zip(STUDENTS, (reference, run_student, policy.student), strict=True))
    texts = held_out_texts(config, policy.history)
    record: Record = {"group": config.eval_stories}
    for name, student in students.items():
        policy_of_student = replace(policy, student=student)
        measures = story_measures(policy_of_student, openings.held_out, graders, stop)
        if texts:
            _, measures["bits_per_byte"] = best_temperature_bits(student, policy.tokenizer, texts)
        record[name] = measures
    if distributed.is_rank0():
        atomic_write(Path(config.out) / COMPARISON, json.dumps(plain(record)) + "\n")


def story_measures(
    policy: Policy, openings: Sequence[str], graders: Graders, stop: Stop
) -> dict[str, Any]:
    """The measures of a student's stories, by name. A story in a cluster of n stories has the value
    1 / n times the size of the group, so the mean is the number of clusters in a group."""
    config = policy.config
    size = config.eval_stories
    groups = 1 if config.teacher_url else math.ceil(STORIES / size)
    measures: dict[str, Any] = defaultdict(list)
    for first in range(0, groups * size, size):
        prompts = [openings[i % len(openings)] for i in range(first, first + size)]
        _, _, records = held_out.evaluate(policy, 0, prompts, graders, stop, FIRST_INDEX + first)
        clusters = cluster_ids([record["story"] for record in records])
        cluster_sizes = Counter(clusters)
        for record, cluster in zip(records, clusters, strict=True):
            measures["reward"].append(record["reward"])
            measures["score"].append(record["score"])
            measures["judge"].append(record.get("judge"))
            measures["ended"].append(float(record["ended"] == "eos"))
            measures["clusters"].append(size / cluster_sizes[cluster])
            measures["words"].append(record["words"])
    return measures


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


def note_on_grades(config: InteractConfig, teacher: Grader, openings: Openings) -> str:
    """A sentence on who grades the held-out stories of a control, and on the cost if that is a
    teacher on the command line, or on the number of grades if it could be the run's."""
    evaluations = sum(held_out.is_evaluated(config, step) for step in range(config.steps + 1))
    grades = (evaluations + len(STUDENTS)) * config.eval_stories
    if config.eval_graded:
        note = f"held-out stories are graded by {teacher.facts['scored_by']}"
        return f"{note}: {teacher.forecast(grades, openings[0])}" if config.teacher_url else note
    run = Path(config.control[0])
    has_url = read_config(run)["options"]["teacher_url"]
    flag = "--teacher-url" if has_url else "--reward"
    return (
        f"held-out stories are graded by the second judge ({config.judge}), not by the teacher of {run}; "
        f"for {grades:,} grades by that teacher, give {flag} again"
    )


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
    stories in a group. before, run, controls: measures of the student before, after the run, and
    after each control. shuffled: measures after each control with scores in random order, which
    show how much trainings differ by chance."""

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
        """The measures for which at least two stories or texts have a value of every student, by
        name."""
        result = {}
        for name in MEASURES:
            students = (self.before, self.run, *self.controls)
            columns = [student.get(name, ()) for student in students]
            rows = [row for row in zip(*columns, strict=True) if None not in row]
            if len(rows) > 1:
                trainings = [mean_of(student.get(name, ())) for student in self.shuffled]
                result[name] = difference(rows, trainings)
        return result

    def claimed(self) -> str:
        """Name of the measure whose gain the report states; "" if none was measured."""
        known = self.differences()
        return next((name for name in CLAIMED if name in known), "")


def difference(
    rows: Sequence[Sequence[float]], trainings: Sequence[float | None] = ()
) -> Difference:
    """Means and verdict from rows of values for the same opening, (before, run, control, ...).

    trainings: means after several trainings that differ only by chance. With FEWEST_CONTROLS of
    them, the interval is at least the prediction interval of run minus control under the hypothesis
    that the scores say nothing about the stories: run and controls then are further such trainings.
    With fewer, the interval is only over the openings, and there is no verdict, because trainings
    differ more by chance than stories do."""
    paired = [row[1] - fmean(row[2:]) for row in rows]
    half = Z * (standard_error(paired) or 0.0)
    before, run, *controls = (fmean(column) for column in zip(*rows, strict=True))
    known = [mean for mean in trainings if mean is not None]
    says = ""
    if len(known) >= FEWEST_CONTROLS:
        by_chance = stdev(known) * math.sqrt(1 + 1 / len(controls))
        half = max(half, t_quantile(len(known)) * by_chance)
        says = verdict(fmean(paired), half, SMALL * stdev(row[0] for row in rows))
    return Difference(before, run, fmean(controls), half, says)


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


# ---- reading -------------------------------------------------------------------------------------


def read_comparisons(run: Path) -> list[Comparison]:
    """The comparisons of a run with its controls, in the order of CONTROLS. Controls with other
    numbers of stories than the first (--eval-stories) are left out. Raises UserError for a file that
    `compare` cannot have written."""
    records = {name: read_records_of_kind(run, name) for name in CONTROLS}
    comparisons = []
    for name in CONTROLS:
        if records[name]:
            first = records[name][0]
            comparison = Comparison(
                name=name,
                group=first["group"],
                before=first["before"],
                run=first["run"],
                controls=controls_like(first, records[name]),
                shuffled=controls_like(first, records["shuffled"]),
            )
            comparisons.append(comparison)
    return comparisons


def controls_like(first: Record, records: Sequence[Record]) -> list[Measures]:
    """The measures of the controls with the numbers of stories and texts, and with the scores, of the
    record `first`: those by another grader are left out."""
    return [record["control"] for record in records if sizes(record) == sizes(first)]


def sizes(record: Record) -> list[int]:
    """Number of stories in a group; and of each measure of the run's student, the number of values, and
    whether any is known."""
    numbers = [record["group"]]
    for name in MEASURES:
        values = record["run"][name]
        numbers += [len(values), any(value is not None for value in values)]
    return numbers


def read_records_of_kind(run: Path, name: str) -> list[Record]:
    """The records by `compare` of a run's controls of one kind: shuffled, shuffled-2, ..."""
    folders = sorted(newest_first(run / CONTROL_RUNS / name), key=control_number)
    paths = [folder / COMPARISON for folder in folders]
    return [read_comparison(path) for path in paths if path.exists()]


def read_comparison(path: Path) -> Record:
    """A record by `compare`: group, and the measures of each student; [] for a measure that the
    record lacks. Raises UserError unless all values are numbers or None, as many for each
    student."""
    fields: Fields = dict.fromkeys(STUDENTS, (dict,))
    record = read_object(path, {"group": (int,)} | fields)
    for name in MEASURES:
        columns = [record[student].setdefault(name, []) for student in STUDENTS]
        if not all(map(is_column, columns)) or len(set(map(len, columns))) > 1:
            raise UserError(
                f"{path} cannot be read: its {name!r} is not a list of numbers for each student, all of "
                f"one length; delete the folder {path.parent} and run the control again"
            )
    return record


def is_column(values: object) -> bool:
    """Whether the values are a list of numbers and None."""
    if not isinstance(values, list):
        return False
    known = [value for value in values if value is not None]
    return all(type(value) in (int, float) and abs(value) < LARGEST for value in known)
