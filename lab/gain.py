"""When does interaction pay? The gain of a student from interaction, by words of pretraining.

python lab/gain.py --words 400000 800000 1500000 3000000 6000000 --seeds 41 42 43 \\
    --pretrain "--preset english --corpus tinystories.txt" --reader GEMMA \\
    --options "I --reward lab/two_judges.py" "shuffled: I --reward lab/two_judges.py"

with I = `--preset english --temperature 0.5 --grades 256 --steps 8 --stories-per-step 384
--no-eval-graded --eval-every 0 --teacher-timeout 1800`. This takes five hours of one core (Xeon,
AMX). For each number of words and each seed, a student is pretrained and then trained by each text
of --options, as in lab/recipes.py; the first text is the interaction, further texts are controls.
Finished runs and measured rows are not repeated.

A reader that taught nobody (--reader) scores the coherence of the stories' first five sentences
(lab/reader.py). The gain is the coherence after interaction minus the coherence before it, at the
temperature that the interaction folds into the student, paired by opening. Names, pronouns and bits
per byte of the student before interaction are measured at this temperature too. Further controls
are a temperature of four fifths of it without training, the best of four stories by the
interaction's teacher at both temperatures, and the first of four that ends.

The command prints Markdown: a row per number of words, with 95 % intervals over the seeds; how many
words of pretraining give the same coherence, divided by the words read, on each seed's own curve;
how much more the interaction, and its `mean:`, gain than each control, and with how many more
clusters, averaged over the words of each seed; and least-squares fits of the gain of each student
on two numbers that are known after the first step of interaction: the standard deviation of the
first scores, and the headroom above their mean. It writes OUT/gain.json (every number of the
tables), OUT/coherence.svg, OUT/gain.svg and, for the most words, OUT/clusters.svg (gain by
diversity)."""

import itertools
import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import numpy as np

from lab import figures, recipes
from lab.controls import MEAN, split
from lab.figures import COLOURS, Point
from lab.intervals import Interval, interval
from lab.reader import PACKAGED, Reader
from lab.recipes import Arm, Row, arm_of
from lab.runs import (
    EXPERIMENT,
    folder_of,
    interact_config,
    judges_in,
    pretrain_config,
    require_same,
    words_of,
)
from tinystory.config import InteractConfig
from tinystory.evaluate.intervals import mean_of
from tinystory.evaluate.open_grader import open_grader
from tinystory.report.charts import Line, chart
from tinystory.run.errors import UserError, command
from tinystory.run.files import atomic_write
from tinystory.run.folder import locked
from tinystory.run.options import add_number, script_parser
from tinystory.run.records import Record, read_stories
from tinystory.teacher.grade import Grader

LOWER = 0.8  # a control: this fraction of the interaction's temperature
# names of rows: controls that choose among four stories, before and after interaction
BEST_OF_4 = "before, best of 4 by the teacher"
BEST_OF_4_LOWER = "before, best of 4 by the teacher, at the lower temperature"
ENDED_OF_4 = "before, first of 4 that ends"
BEST_OF_4_AFTER = "after, best of 4 by the teacher"
CHOSEN = (BEST_OF_4, ENDED_OF_4, BEST_OF_4_LOWER, BEST_OF_4_AFTER)
# measures of a row in the tables and in gain.json
SHOWN = (
    "coherence",
    "score",
    "ended",
    "words",
    "distinct_4",
    "clusters",
    "largest",
    *recipes.UNSEEN,
)


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--out", default="runs/gain", help="folder for the runs")
    add("--words", nargs="+", type=int, required=True, metavar="N", help="words of pretraining")
    add("--seeds", nargs="+", type=int, required=True, metavar="N", help="seeds of both trainings")
    add("--pretrain", default="", metavar="TEXT", help="options of train_pretrain.py")
    add(
        "--options",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="options of train_interact.py: the interaction, then controls (CONTROL: TEXT)",
    )
    add("--reader", default=PACKAGED, metavar="NAME", help="language model that measures coherence")
    most = len(recipes.OPENINGS)
    add_number(parser, "--stories", 100, f"[2, {most}]", "number of stories per row")
    options = parser.parse_args(argv)
    if len(options.seeds) < 2:
        raise UserError("--seeds needs two seeds or more, for an interval")
    out = folder_of(options.out)
    arms = {text: arm_of(text) for text in options.options}
    pretraining = words_of("--pretrain", options.pretrain)
    for words in options.words:
        pretrain_config([*pretraining, "--words", str(words)])
    for arm in arms.values():
        interact_config(arm.words)
    interaction = arms[options.options[0]]
    if interaction.control == MEAN:
        raise UserError(
            "--options: the first text is the interaction: give its `mean:` as a later one"
        )
    teaching = interact_config(interaction.words)
    if teaching.temperature == 0:
        raise UserError(
            "--options needs a --temperature above 0, for the student before interaction"
        )
    before, lower = (f"before, temperature {each}" for each in temperatures_of(teaching))
    reader = Reader(options.reader)
    summaries = []
    settings = {
        "pretrain": options.pretrain,
        "interaction": options.options[0],
        "reader": options.reader,
        "stories": options.stories,
    }
    with locked(out):
        require_same(out / EXPERIMENT, settings | judges_in(options.options))
        for words in options.words:
            argv = [*pretraining, "--words", str(words)]
            folder = out / str(words)
            students = [
                train_and_measure(folder, seed, argv, arms, teaching, reader, options.stories)
                for seed in options.seeds
            ]
            summaries += [summarise(words, student, before, lower) for student in students]
    atomic_write(out / "gain.json", json.dumps(summaries, indent=1) + "\n")
    print_tables(summaries, students[0]["arms"])
    draw(out, summaries, students[0]["arms"])


def train_and_measure(
    out: Path,
    seed: int,
    pretraining: Sequence[str],
    arms: Mapping[str, Arm],
    teaching: InteractConfig,
    reader: Reader,
    stories: int,
) -> Record:
    """A student's record: `seed`; `rows`, the measures by the row's name; `score_std` and
    `score_mean` of the first step of interaction, 0..1. Trains and measures what is missing.
    teaching: the options of the interaction."""
    temperatures = temperatures_of(teaching)
    rows = [
        row
        for row in recipes.train_students(out, seed, pretraining, arms, temperatures)
        if row.chosen_by == "first"
    ]
    start = rows[0].folder
    config = pretrain_config(["--seed", str(seed), *pretraining])
    unseen = recipes.unseen_texts(config)
    openings = recipes.OPENINGS[:stories]

    def measured(row: Row, grader: Grader, reader: Reader | None) -> Record:
        scored_by = None if grader is rubric else rubric
        measure = partial(
            recipes.measure, row, grader, recipes.CONFIG, openings, reader, unseen, scored_by
        )
        return recipes.measured(out / "rows.jsonl", row.name, seed, measure)

    by_name = {}
    arm_rows = [row for row in rows if row.folder != start]
    with (
        open_grader(recipes.CONFIG, corpus=config.corpus) as rubric,
        open_grader(teaching, corpus=config.corpus) as teacher,
    ):
        for row in rows:
            # at temperature 1, only the measures on unseen texts are of interest
            coherence_of = None if row.folder == start and row.temperature == 1 else reader
            by_name[row.name] = measured(row, rubric, coherence_of)
        for row in (
            Row(BEST_OF_4, start, temperatures[0], n=4, chosen_by="reward"),
            Row(ENDED_OF_4, start, temperatures[0], n=4, chosen_by="ended"),
            Row(BEST_OF_4_LOWER, start, temperatures[1], n=4, chosen_by="reward"),
            Row(BEST_OF_4_AFTER, arm_rows[0].folder, n=4, chosen_by="reward"),
        ):
            by_name[row.name] = measured(row, teacher, reader)

    scores = first_scores(arm_rows[0].folder)
    return {
        "seed": seed,
        "rows": by_name,
        "arms": [row.name for row in arm_rows],
        "score_std": stdev(scores),
        "score_mean": fmean(scores),
    }


def temperatures_of(teaching: InteractConfig) -> tuple[float, float]:
    """The temperatures of the student before interaction: the interaction's, and a lower one."""
    return teaching.temperature, round(LOWER * teaching.temperature, 3)


def first_scores(run: Path) -> list[float]:
    """The teacher's scores, 0..1, in the first step of an interaction."""
    stories = itertools.takewhile(lambda story: story["step"] == 1, read_stories(run))
    return [story["score"] for story in stories if story["score"] is not None]


def summarise(words: int, student: Record, before: str, lower: str) -> Record:
    """A student's numbers for the tables. before, lower: names of the rows before interaction, at
    the interaction's temperature and at a lower one."""
    rows = student["rows"]
    gains = {}
    for name in (lower, *CHOSEN, *student["arms"]):
        gains[name] = paired_gain(rows[before]["coherences"], rows[name]["coherences"])
    measures = {}
    for name, row in rows.items():
        measures[name] = {key: row[key] for key in SHOWN if row.get(key) is not None}
    numbers = {key: student[key] for key in ("seed", "score_std", "score_mean")}
    return {"words": words} | numbers | {"before": before, "gain": gains, "rows": measures}


def paired_gain(before: Sequence[float | None], after: Sequence[float | None]) -> float:
    """The mean difference of the coherences for the same openings; openings with None are left out."""
    pairs = zip(before, after, strict=True)
    return fmean(new - old for old, new in pairs if old is not None and new is not None)


def print_tables(students: Sequence[Record], arms: Sequence[str]) -> None:
    """Print the gains by words of pretraining, the other measures, and the fits."""
    names = [*students[0]["gain"]]
    header = ["words", "coherence before", *(f"gain: {name}" for name in names)]
    header += ["first scores: standard deviation", "mean"]
    print_row(header)
    print_row(["---"] * len(header))
    for words, group in by_words(students).items():
        before = interval([student["rows"][student["before"]]["coherence"] for student in group])
        cells = [f"{words:,}", f"{before} ({group[0]['before']})"]
        cells += [str(interval([student["gain"][name] for student in group])) for name in names]
        for key in ("score_std", "score_mean"):
            cells.append(f"{fmean(student[key] for student in group):.3f}")
        print_row(cells)
    print()
    print_row(["words", "row", *SHOWN])
    print_row(["---"] * (2 + len(SHOWN)))
    for words, group in by_words(students).items():
        for name in group[0]["rows"]:
            cells = [f"{words:,}", name]
            for key in SHOWN:
                mean = mean_of(student["rows"][name].get(key) for student in group)
                cells.append("" if mean is None else f"{mean:.3f}")
            print_row(cells)
    print()
    print_equivalents(students, names)
    print()
    interactions = {arms[0]: "interaction"}
    for arm in arms[1:]:
        if is_mean_of(arm, arms[0]):
            interactions[arm] = "the mean of two interactions"
    for arm, shown in interactions.items():
        for control in names:
            if control not in (arm, BEST_OF_4_AFTER):
                gain, clusters = above(students, arm, control)
                print(f"{shown} above {control}: {gain}, and {clusters} clusters, over the seeds")
    gains = np.array([student["gain"][arms[0]] for student in students])
    deviation = np.array([student["score_std"] for student in students])
    headroom = 1 - np.array([student["score_mean"] for student in students])
    columns = {"standard deviation": deviation, "headroom": headroom}
    if len(students) <= 1 + len(columns):
        return  # a fit would be exact
    for chosen in (["standard deviation"], ["headroom"], ["standard deviation", "headroom"]):
        print(fit(gains, {name: columns[name] for name in chosen}))


def is_mean_of(arm: str, interaction: str) -> bool:
    """Whether a row is the mean of the interaction and of a second run of it."""
    control, options = split(arm.strip("`"))
    of_interaction = "" if interaction == "the demo" else interaction.strip("`")
    return control == MEAN and options.split() == of_interaction.split()


def above(students: Sequence[Record], name: str, control: str) -> tuple[Interval, Interval]:
    """How much more the row `name` gains than the row `control`, and how many more clusters it has,
    over the seeds."""
    gains = [student["gain"][name] - student["gain"][control] for student in students]
    rows = [student["rows"] for student in students]
    clusters = [row[name]["clusters"] - row[control]["clusters"] for row in rows]
    return interval(seed_means(students, gains)), interval(seed_means(students, clusters))


def seed_means(students: Sequence[Record], values: Sequence[float]) -> list[float]:
    """The values of the students, averaged over each seed's words of pretraining: a seed's students
    are not independent."""
    by_seed: dict[int, list[float]] = {}
    for student, value in zip(students, values, strict=True):
        by_seed.setdefault(student["seed"], []).append(value)
    return [fmean(of_seed) for of_seed in by_seed.values()]


def print_equivalents(students: Sequence[Record], names: Sequence[str]) -> None:
    """Print the words of pretraining with the coherence of each row, divided by the words read: the
    geometric mean over the seeds with its 95 % interval, and how many seeds' curves reach it."""
    curves: dict[int, list[tuple[int, float]]] = {}
    for student in students:
        before = student["rows"][student["before"]]["coherence"]
        curves.setdefault(student["seed"], []).append((student["words"], before))
    print_row(["words", *(f"times the words: {name}" for name in names)])
    print_row(["---"] * (1 + len(names)))
    for words, group in by_words(students).items():
        cells = [f"{words:,}"]
        for name in names:
            ratios = []
            for student in group:
                curve = curves[student["seed"]]
                level = dict(curve)[words] + student["gain"][name]
                equivalent = words_equivalent(curve, words, level)
                if equivalent is not None:
                    ratios.append(math.log(equivalent / words))
            cells.append(f"{shown_ratio(ratios)} ({len(ratios)} of {len(group)})")
        print_row(cells)


def words_equivalent(
    curve: Sequence[tuple[int, float]], words: int, coherence: float
) -> float | None:
    """The words of pretraining, from `words` on, at which a curve of (words, coherence before
    interaction) reaches a coherence, by interpolation over the logarithm of the words; None if the
    curve ends below. A coherence below that of `words` counts as that of `words`."""
    points = [point for point in sorted(curve) if point[0] >= words]
    if coherence <= points[0][1]:
        return words
    for (lower, low), (upper, high) in itertools.pairwise(points):
        if low <= coherence <= high:
            fraction = (coherence - low) / (high - low)
            return lower * (upper / lower) ** fraction
    return None


def shown_ratio(logarithms: Sequence[float]) -> str:
    """The geometric mean of ratios with its 95 % interval, if there are two or more."""
    if not logarithms:
        return "above the curve"
    if len(logarithms) == 1:
        return f"{math.exp(logarithms[0]):.2f}"
    mean, half = interval(logarithms)
    return f"{math.exp(mean):.2f} [{math.exp(mean - half):.2f}, {math.exp(mean + half):.2f}]"


def fit(gains: np.ndarray, columns: Mapping[str, np.ndarray]) -> str:
    """The least-squares fit of the gains, as a sentence. gains and columns: (students,)."""
    design = np.stack([np.ones_like(gains), *columns.values()], axis=1)
    coefficients, *_ = np.linalg.lstsq(design, gains, rcond=None)
    residual = gains - design @ coefficients
    r_squared = 1 - residual.var() / gains.var()
    constant, *slopes = coefficients
    terms = [f"{slope:+.3f} * {name}" for slope, name in zip(slopes, columns, strict=True)]
    return f"gain = {constant:.3f} {' '.join(terms)}: R-squared {r_squared:.2f}"


def draw(out: Path, students: Sequence[Record], arms: Sequence[str]) -> None:
    """Write coherence.svg, the coherence by words of pretraining, and gain.svg, the gain by the
    standard deviation of the first scores."""
    groups = by_words(students)
    millions = [words / 1e6 for words in groups]
    names = {BEST_OF_4: BEST_OF_4, arms[0]: "after interaction"}
    names |= {arm: short_name(arm, arms[0]) for arm in arms[1:]}
    curves = {"before": [student["rows"][student["before"]]["coherence"] for student in students]}
    for row, name in names.items():
        curves[name] = [student["rows"][row]["coherence"] for student in students]
    lines = []
    for (name, coherences), colour in zip(curves.items(), COLOURS, strict=False):
        by_group = np.array(coherences).reshape(len(groups), -1)  # (words, seeds)
        intervals = [interval(group.tolist()) for group in by_group]
        means = [each.mean for each in intervals]
        errors = [each.half for each in intervals]
        lines.append(Line(millions, means, colour, name, errors))
    coherence = chart(
        "Coherence of stories, nats per token",
        lines,
        x_name="million words of pretraining",
        size=(640, 320),
    )
    atomic_write(out / "coherence.svg", figures.standalone(coherence))

    lines = []
    for (words, group), colour in zip(groups.items(), COLOURS, strict=False):
        points = sorted((student["score_std"], student["gain"][arms[0]]) for student in group)
        deviations, gains = zip(*points, strict=True)
        lines.append(Line(deviations, gains, colour, f"{words / 1e6:g} M"))
    gain = chart(
        "Gain in coherence, nats per token",
        lines,
        x_name="standard deviation of the first scores",
        size=(640, 320),
    )
    atomic_write(out / "gain.svg", figures.standalone(gain))

    most_words = [*groups.values()][-1]
    before = most_words[0]["before"]
    picture = draw_clusters(most_words, before, names, [names[arms[0]]])
    atomic_write(out / "clusters.svg", picture)


def draw_clusters(
    students: Sequence[Record],
    before: str,
    names: Mapping[str, str],
    highlighted: Collection[str] = (),
) -> str:
    """An SVG file: gain in coherence by clusters, means of each row over the students. before: the
    row with a gain of 0; names: the other rows' names in the figure; highlighted: some of these."""
    rows = {before: "before"} | dict(names)
    points = []
    for row, name in rows.items():
        clusters = mean_of(student["rows"].get(row, {}).get("clusters") for student in students)
        gain = 0.0 if row == before else mean_of(student["gain"].get(row) for student in students)
        assert clusters is not None and gain is not None
        points.append(Point(name, clusters, gain))
    title = "Gain in coherence, nats per token, and diversity"
    x_name = f"clusters of similar stories among {recipes.CLUSTERED}"
    return figures.standalone(figures.scatter_plot(title, points, x_name, highlighted))


def short_name(arm: str, interaction: str) -> str:
    """The name of an arm's control, and the words that the interaction's options lack."""
    control, colon, options = arm.strip("`").partition(": ")
    if not colon:
        control, options = "", arm.strip("`")
    known = interaction.strip("`").split()
    return " ".join([control, *(word for word in options.split() if word not in known)]).strip()


def by_words(students: Sequence[Record]) -> dict[int, list[Record]]:
    """The students by their words of pretraining; each group has the same seeds in order."""
    groups: dict[int, list[Record]] = {}
    for student in students:
        groups.setdefault(student["words"], []).append(student)
    return groups


def print_row(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
