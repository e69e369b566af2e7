"""report.html for an experiment of scripts/reproduce.py: interaction compared with reading and with its controls."""

import json
import math
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tinystory.report import charts, page
from tinystory.report.charts import Line, chart, number
from tinystory.run.folder import EVALUATIONS, Record, atomic_write, read_records

EXPERIMENT, EVALUATION = "experiment.json", "evaluation"
# Arm of the experiment: (name, colour).
ARMS = {
    "before": ("read", "plain"),
    "interact": ("+ interaction", "reward"),
    "random": ("+ random reward", "coherence"),
    "reading": ("+ more reading", "readability"),
}
# The measures shown: name and path into a record's measures.
SCORE = ("stories", "score_mean")
OTHER_SCORE = ("other_openings", "score_mean")
SEEN = {  # rewarded
    "Score": SCORE,
    "readability": ("stories", "readability_mean"),
    "coherence": ("stories", "coherence_mean"),
    "creativity": ("stories", "creativity_mean"),
}
UNSEEN = {  # not rewarded
    "Score, other openings": OTHER_SCORE,
    "distinct_4": ("stories", "distinct_4"),
    "self-BLEU": ("stories", "self_bleu"),
    "Clusters of 10": ("stories", "story_clusters_10"),
    "Utility of 10": ("stories", "utility_10"),
    "Nats per word": ("stories", "entropy_per_word"),
    "Copied": ("stories", "copied_share"),
    "Words": ("stories", "length_mean"),
    "Bits per byte": ("bits_per_byte",),
    "BLiMP": ("blimp", "accuracy"),
}
HERO = (640, 380)


def write_experiment_report(out: Path) -> Path:
    """Write OUT/report.html and its first figure, OUT/figure.svg. Returns the path of the page.

    Input: OUT/experiment.json, the OUT/evaluation/*.json that have the same settings, and the runs in OUT."""
    described = json.loads((out / EXPERIMENT).read_bytes())
    records = [json.loads(path.read_bytes()) for path in (out / EVALUATION).glob("*.json")]
    records = [record for record in records if record["settings"] == described["evaluation"]]
    records.sort(key=lambda record: (list(ARMS).index(record["arm"]), record["words"], record["seed"]))
    figure = chart(
        "Teacher’s score, 0 to 9", lines(records, SCORE), x_name="words read and taken in", log_x=True, size=HERO
    )
    atomic_write(out / "figure.svg", charts.standalone(figure))
    sections = [
        page.hero(headline(records), figure),
        equivalents(records),
        measures_table(records),
        beyond_the_score(records),
        stories(out, records),
        page.details("How it was run", page.facts([(k, shown(v)) for k, v in described.items()]), opened=True),
    ]
    text = page.PAGE.format(
        name="Does interaction buy what reading buys?",
        style=charts.palette() + charts.STYLE + page.STYLE,
        subtitle=escape(f"scale {described['scale']} · teacher {described['teacher']} · {described['device']}"),
        sections="\n".join(filter(None, sections)),
    )
    atomic_write(out / "report.html", text.encode("utf-8", "replace"))
    return out / "report.html"


# ---- numbers --------------------------------------------------------------------------------------------------------


def value(record: Record, path: Sequence[str]) -> float | None:
    """The measure at the end of a path; None if it was not taken."""
    found: Any = record["measures"]
    for name in path:
        found = found.get(name) if found else None
    return found


def spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of the values present; None for a mean of none or a deviation of fewer than two."""
    there = [each for each in values if each is not None]
    mean = statistics.fmean(there) if there else None
    return mean, statistics.stdev(there) if len(there) > 1 else None


def of_arm(records: Sequence[Record], arm: str) -> dict[int, list[Record]]:
    """The records of an arm, all seeds, grouped by the words read at the start (for "before": by words read)."""
    groups: dict[int, list[Record]] = {}
    for record in records:
        if record["arm"] == arm:
            groups.setdefault(record["start"] or record["words"], []).append(record)
    return groups


def reading_that_scores(score: float, words: Sequence[int], scores: Sequence[float]) -> float:
    """The fewest words of reading that reach the score, on the curve of `scores` at ascending `words`, interpolated
    linearly in log(words). 0 if the first point reaches it, inf if none does."""
    if score <= scores[0]:
        return 0.0
    for i in range(1, len(words)):
        if scores[i] >= score:
            t = (score - scores[i - 1]) / (scores[i] - scores[i - 1])
            return math.exp(math.log(words[i - 1]) + t * math.log(words[i] / words[i - 1]))
    return math.inf


def in_words(reading: float, words: Sequence[int]) -> str:
    """The result of reading_that_scores as text; outside the curve, only a bound."""
    if reading == 0:
        return f"at most {millions(words[0])}"
    return f"more than {millions(words[-1])}" if math.isinf(reading) else millions(reading)


def millions(words: float) -> str:
    return f"{words / 1e6:.3g} M"


def plus_minus(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation with the same number of decimals; a dash without values."""
    mean, deviation = spread(values)
    if mean is None:
        return number(None)
    decimals = 2 if abs(mean) < 10 else 1
    return f"{mean:.{decimals}f}" + ("" if deviation is None else f" ± {deviation:.{decimals}f}")


def shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- the page -------------------------------------------------------------------------------------------------------


def lines(records: Sequence[Record], path: Sequence[str]) -> list[Line]:
    """One curve per arm over words read and taken in: mean over seeds, with the standard deviation as error bars."""
    drawn = []
    for arm, (name, colour) in ARMS.items():
        groups = list(of_arm(records, arm).values())
        points = [spread([value(record, path) for record in group]) for group in groups]
        x = [statistics.fmean(record["words"] for record in group) for group in groups]
        drawn.append(Line(x, [m for m, _ in points], colour, name, False, [d for _, d in points]))
    return drawn


def headline(records: Sequence[Record]) -> list[str]:
    """One tile per start: the score before and after interaction."""
    before, tiles = of_arm(records, "before"), []
    for start, group in of_arm(records, "interact").items():
        ends = [value(before[start][0], SCORE), spread([value(record, SCORE) for record in group])[0]]
        tiles.append(page.tile(f"From {millions(start)} words", page.change(ends), "teacher’s score of 9", "reward"))
    return tiles


def equivalents(records: Sequence[Record]) -> str:
    """How much reading reaches the score of each interaction."""
    before, arms = of_arm(records, "before"), {arm: of_arm(records, arm) for arm in ARMS}
    words = list(before)
    curve = [group[0]["measures"]["stories"]["score_mean"] for group in before.values()]
    rows = []
    for start, group in arms["interact"].items():
        scores = [value(record, SCORE) for record in group]
        mean, deviation = spread(scores)
        if mean is None:
            continue
        nearby = [mean, *(mean + sign * (deviation or 0.0) for sign in (-1, 1))]
        like, *around = (in_words(reading_that_scores(score, words, curve), words) for score in nearby)
        others = [plus_minus([value(r, SCORE) for r in arms[arm].get(start, [])]) for arm in ("random", "reading")]
        taken = statistics.fmean(record["words"] for record in group) - start
        rows.append([
            millions(start), plus_minus([value(before[start][0], SCORE)]), plus_minus(scores), *others, number(taken),
            like, " to ".join(dict.fromkeys(around)),
        ])  # fmt: skip
    header = ["Words read", "Score", "after interaction", "after random reward", "after more reading",
              "Words taken in", "Equivalent reading", "± one deviation"]  # fmt: skip
    return page.section(
        "What interaction buys",
        "Mean and standard deviation over the seeds. “Equivalent reading” is where the curve of reading alone "
        "first reaches that score, interpolated linearly in the logarithm of words; nothing is extrapolated beyond the "
        "words read here.",
        page.table(header, rows),
    )


def measures_table(records: Sequence[Record]) -> str:
    columns = {name: path for name, path in (SEEN | UNSEEN).items() if any(value(r, path) is not None for r in records)}
    rows = []
    starts = of_arm(records, "interact")
    for start in starts:
        for arm, (name, _) in ARMS.items():
            group = of_arm(records, arm).get(start, [])
            if group:
                measured = [plus_minus([value(record, path) for record in group]) for path in columns.values()]
                rows.append([f"{millions(start)} {name}", *measured])
    return page.section(
        "What the teacher saw and what it did not",
        "Only the score and its three criteria were rewarded; with --objective demo also being different from the "
        "other stories, and an end. distinct_4: distinct word 4-grams over all 4-grams; "
        "self-BLEU: similarity of the stories to each other; copied: the longest phrase of the corpus in a story; "
        "bits per byte: on held-out text. A score bought by repeating the same story shows in these.",
        page.table(["Student", *columns], rows),
    )


def beyond_the_score(records: Sequence[Record]) -> str:
    drawings = [
        chart(name, lines(records, path), x_name="words", log_x=True, size=(420, 230)) for name, path in UNSEEN.items()
    ]
    return page.section("What was not rewarded", "", page.grid(drawings))


def stories(out: Path, records: Sequence[Record]) -> str:
    """The first story that each start's student told when it was evaluated before, and at the end, with the same
    random numbers."""
    pairs = []
    for start in of_arm(records, "interact"):
        told = list(read_records(out / "interact" / f"{start // 10**6}M-0" / EVALUATIONS))
        first = {record["step"]: record for record in reversed(told)}  # of each evaluation
        sides = (("before", first[min(first)]), ("after", first[max(first)]))
        pairs.append(
            "".join(page.story_card(r, f"{millions(start)} words read, {when} interaction") for when, r in sides)
        )
    return page.section(
        "The same random numbers, before and after", "The first story of seed 0.",
        "".join(f'<div class="pair">{pair}</div>' for pair in pairs),
    )  # fmt: skip
