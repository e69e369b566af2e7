"""report.html of an experiment of scripts/reproduce.py: interaction beside pretraining and its controls."""

import json
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tinystory.report import charts, page
from tinystory.report.charts import Line, chart, number
from tinystory.report.evaluation import at
from tinystory.run.folder import Record, atomic_write

EXPERIMENT, EVALUATION = "experiment.json", "evaluation"
# Arm of the experiment: (name, colour).
ARMS = {
    "before": ("pretrained", "plain"),
    "interact": ("+ interaction", "reward"),
    "random": ("+ random reward", "coherence"),
    "reading": ("+ more pretraining", "readability"),
}
# Measures: name, and path into a record's measures.
SCORE = ("stories", "score_mean")
MEASURES = {  # the first four are rewarded
    "Score": SCORE,
    "readability": ("stories", "readability_mean"),
    "coherence": ("stories", "coherence_mean"),
    "creativity": ("stories", "creativity_mean"),
    "Score, other openings": ("other_openings", "score_mean"),
    "distinct_4": ("stories", "distinct_4"),
    "Clusters of 10": ("stories", "story_clusters_10"),
    "Nats per word": ("stories", "entropy_per_word"),
    "Copied": ("stories", "copied_share"),
    "Words": ("stories", "length_mean"),
    "Bits per byte": ("bits_per_byte",),
    "BLiMP": ("blimp", "accuracy"),
}
HERO = (640, 380)
# arXiv 2509.15714: millions of pretraining words, and the score before and after interaction (docs/paper.md).
PUBLISHED = {20: (0.032, 0.196), 50: (0.258, 1.356), 90: (0.698, 2.28), 200: (1.448, 2.7), 500: (2.248, 3.125)}
PUBLISHED[900] = (2.641, 3.368)


def write_experiment_report(out: Path) -> Path:
    """The path of OUT/report.html, which is written with its first figure, OUT/figure.svg.

    Input: OUT/experiment.json and the OUT/evaluation/*.json that have the same settings."""
    facts = json.loads((out / EXPERIMENT).read_bytes())
    records = [json.loads(path.read_bytes()) for path in (out / EVALUATION).glob("*.json")]
    records = [record for record in records if record["settings"] == facts["evaluation"]]
    records.sort(key=lambda record: (list(ARMS).index(record["arm"]), record["words"], record["seed"]))
    x_name = "words of pretraining and taken in"
    curves = lines(records, SCORE)
    if facts["scale"] in ("paper", "rehearsal"):
        x, (before, after) = [words * 1e6 for words in PUBLISHED], zip(*PUBLISHED.values(), strict=True)
        curves.append(Line(x, before, "muted", "published", False))
        curves.append(Line(x, after, "creativity", "published, + interaction", False))
    figure = chart("Teacher’s score, 0 to 9", curves, x_name=x_name, log_x=True, size=HERO)
    atomic_write(out / "figure.svg", charts.standalone(figure))
    sections = [
        figure,
        equivalents(records),
        measures_table(records),
        page.details("How it was run", "", page.facts(facts.items())),
    ]
    subtitle = escape(f"scale {facts['scale']} · teacher {facts['teacher']} · {facts['device']}")
    return page.write(out / "report.html", "Does interaction replace pretraining?", subtitle, sections)


# ---- numbers --------------------------------------------------------------------------------------------------------


def values(records: Sequence[Record], path: Sequence[str]) -> list[float]:
    """The measure at the end of a path, of the records that have it."""
    return [value for record in records if (value := at(record["measures"], path)) is not None]


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """None for the mean of nothing and the standard deviation of fewer than two."""
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def of_arm(records: Sequence[Record], arm: str) -> dict[int, list[Record]]:
    """The records of an arm, all seeds, by the pretraining words at its start (for "before": of the student itself)."""
    groups: dict[int, list[Record]] = {}
    for record in records:
        if record["arm"] == arm:
            groups.setdefault(record["start"] or record["words"], []).append(record)
    return groups


def equivalent_words(score: float, words: Sequence[int], scores: Sequence[float]) -> str:
    """The fewest words of pretraining that reach the score, in millions, on the curve of `scores` at ascending `words`,
    interpolated linearly in log(words); outside the curve, only a bound."""
    if score <= scores[0]:
        return f"at most {millions(words[0])}"
    for i in range(1, len(words)):
        if scores[i] >= score:
            t = (score - scores[i - 1]) / (scores[i] - scores[i - 1])
            return millions(words[i - 1] * (words[i] / words[i - 1]) ** t)
    return f"more than {millions(words[-1])}"


def millions(words: float) -> str:
    return f"{words / 1e6:.3g} M"


def plus_minus(values: Sequence[float]) -> str:
    """Mean ± standard deviation with the same number of decimals; a dash without values."""
    mean, std = mean_and_std(values)
    if mean is None:
        return number(None)
    decimals = 2 if abs(mean) < 10 else 1
    return f"{mean:.{decimals}f}" + ("" if std is None else f" ± {std:.{decimals}f}")


# ---- sections -------------------------------------------------------------------------------------------------------


def lines(records: Sequence[Record], path: Sequence[str]) -> list[Line]:
    """One curve per arm over words of pretraining and taken in: mean over seeds, with the standard deviation as error
    bars."""
    curves = []
    for arm, (name, colour) in ARMS.items():
        groups = of_arm(records, arm).values()
        points = [mean_and_std(values(group, path)) for group in groups]
        x = [statistics.fmean(record["words"] for record in group) for group in groups]
        curves.append(Line(x, [mean for mean, _ in points], colour, name, False, [std for _, std in points]))
    return curves


def equivalents(records: Sequence[Record]) -> str:
    """How much pretraining reaches the score of each interaction."""
    arms = {arm: of_arm(records, arm) for arm in ARMS}
    words = list(arms["before"])
    curve = [values(group, SCORE)[0] for group in arms["before"].values()]
    rows = []
    for start, group in arms["interact"].items():
        mean, std = mean_and_std(values(group, SCORE))
        if mean is None:
            continue
        scores = [plus_minus(values(arms[arm].get(start, []), SCORE)) for arm in ARMS]
        words_in = statistics.fmean(record["words"] for record in group) - start
        equivalent, low, high = (equivalent_words(mean + d, words, curve) for d in (0.0, -(std or 0.0), std or 0.0))
        around = " to ".join(dict.fromkeys((low, high)))
        rows.append([millions(start), *scores, number(words_in), equivalent, around])
    header = "Pretraining words|Score|after interaction|after random reward|after more pretraining|Words taken in"
    return page.section(
        "What interaction is worth",
        "Mean and standard deviation over the seeds. “Equivalent pretraining” is where the curve of pretraining alone "
        "first reaches that score, interpolated linearly in the logarithm of words; nothing is extrapolated beyond the "
        "words measured here.",
        page.table([*header.split("|"), "Equivalent pretraining", "± one deviation"], rows),
    )


def measures_table(records: Sequence[Record]) -> str:
    columns = {name: path for name, path in MEASURES.items() if values(records, path)}
    rows = []
    for start in of_arm(records, "interact"):
        for arm, (name, _) in ARMS.items():
            if group := of_arm(records, arm).get(start):
                cells = [plus_minus(values(group, path)) for path in columns.values()]
                rows.append([f"{millions(start)} {name}", *cells])
    return page.section(
        "What was rewarded and what was not",
        "Only the score and its three criteria were rewarded; with --objective demo also being different from the "
        "other stories, and an end. distinct_4: distinct word 4-grams over all 4-grams; "
        "copied: the longest phrase of the corpus in a story; "
        "bits per byte: on held-out text. A score bought by repeating the same story shows in these.",
        page.table(["Student", *columns], rows),
    )
