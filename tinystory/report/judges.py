"""What a report shows of judges: who scored a run, what others give the same stories, and how far judges agree."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tinystory.evaluate.agreement import Rater, agreement
from tinystory.evaluate.preference import run_preferences
from tinystory.report import page
from tinystory.report.charts import number
from tinystory.run.folder import OPINIONS, SAMPLES, Record, read_records

BEFORE_AFTER = ("the one before", "the story after interaction")
COLUMNS = ["", "Kappa, quadratic weights", "Spearman", "Mean difference", "Means", "Equal"]


def scored_by_note(scored_by: str, config: Record) -> str:
    """The scorer's name and the verdict of the calibration before the run, as HTML; "" if there is no name."""
    if not scored_by:
        return ""
    calibration = config.get("options", {}).get("calibration")
    verdict = calibration.get("verdict") if isinstance(calibration, dict) else None
    return escape(f"Scored by {scored_by}. It {verdict or 'was not calibrated'}.")


def read_opinions(folder: Path) -> dict[str, Rater]:
    """The other judges of a run's stories, by name; of two ratings of a story by the same judge, the later."""
    raters: dict[str, Rater] = {}
    for record in read_records(folder / OPINIONS):
        rater = raters.setdefault(record["judge"], Rater(record["judge"]))
        rater.add(record["opening"], record["story"], record["scores"], record["score"])
    return raters


def judges_section(folder: Path, scored_by: str) -> str:
    """Other judges' scores of the stories before and after, beside those of the run's own teacher; "" if there are
    none."""
    opinions, preferences = read_opinions(folder), run_preferences(folder)
    if not opinions and not preferences:
        return ""
    samples = list(read_records(folder / SAMPLES))
    teacher = Rater(scored_by or "the run’s teacher")
    for record in samples:
        teacher.add(record["opening"], record["story"], record["scores"], None)
    rows = [_row(rater, teacher, samples) for rater in (teacher, *opinions.values())]
    header = ["Judge", "Stories", "Sum before", "Sum after", "Kappa with the teacher", "Spearman with the teacher"]
    table = page.table(header, [row for row in rows if row]) if opinions else ""
    return page.section(
        "Other judges",
        "Scores of the same evaluation stories, before interaction and after it. A gain that only the teacher sees is "
        "a gain at pleasing the teacher. Kappa has quadratic weights, is taken over the sums, and like "
        "Spearman’s correlation has a 95 % interval; 0 is chance.",
        table + "".join(f"<p>{escape(line)}</p>" for line in preference_lines(preferences)),
    )


def _row(rater: Rater, teacher: Rater, samples: list[Record]) -> list[str]:
    sums: dict[str, list[float]] = {"before": [], "after": []}
    for record in samples:
        key = record["opening"], record["story"]
        if record["when"] in sums and key in rater.ratings:
            sums[record["when"]].append(rater.score_sum(key, teacher.criteria() or page.TOP_SCORE))
    if not any(sums.values()):
        return []
    means = [f"{sum(values) / len(values):.2f}" if values else number(None) for values in sums.values()]
    both = ["", ""]
    if rater is not teacher and teacher.ratings:
        statistics = agreement(teacher, rater)["sum"]
        both = [_with_interval(statistics, name) for name in ("kappa", "spearman")]
    return [rater.name, str(sum(map(len, sums.values()))), *means, *both]


def with_ends(value: float | None, interval: Any) -> str:
    """0.52 [0.40, 0.63]; a dash for None."""
    return number(None) if value is None else f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _with_interval(statistics: Mapping[str, Any], name: str) -> str:
    return with_ends(statistics[name], statistics[f"{name}_ci"])


def preference_lines(preferences: Mapping[str, Mapping[str, Any]], names: Sequence[str] = BEFORE_AFTER) -> list[str]:
    """One sentence per judge that compared stories without knowing which is whose. names: of the two storytellers."""
    lines = []
    for judge, rates in preferences.items():
        order = f" ({rates['inconsistent']} of them depended on the order)" if rates["inconsistent"] else ""
        lines.append(
            f"{judge} preferred {names[1]} in {rates['second']} of {rates['pairs']} pairs, {names[0]} in "
            f"{rates['first']}, and neither in {rates['same']}{order}: win rate {with_ends(rates['rate'], rates['ci'])}"
        )
    return lines


# ---- the tables of scripts/agreement.py -----------------------------------------------------------------------------


def agreement_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One row per criterion and one for the sum; the columns are COLUMNS."""
    rows = []
    for name, values in {**result["criteria"], f"sum, 0 to {result['highest']}": result["sum"]}.items():
        statistics = [_with_interval(values, key) for key in ("kappa", "spearman", "difference")]
        means = " and ".join(f"{mean:.2f}" for mean in values["means"])
        rows.append([name.replace("_", " "), *statistics, means, f"{values['equal']:.0%}"])
    return rows


def length_line(result: Mapping[str, Any]) -> str:
    """How the length of a story goes with the scores, in one sentence."""
    first, second, difference = (_with_interval(result["length"], name) for name in ("first", "second", "difference"))
    a, b = result["judges"]
    return (
        f"Spearman’s correlation of length and sum is {first} for {a} and {second} for {b}; of length and the second "
        f"sum less the first, {difference}"
    )
