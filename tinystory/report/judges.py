"""What a report says of whoever scored: who it was, whether it can judge, and what others say of the same stories."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from tinystory.evaluate.agreement import Judge, agreement
from tinystory.evaluate.preference import run_preferences
from tinystory.report import page
from tinystory.report.charts import number
from tinystory.run.folder import OPINIONS, SAMPLES, Record, read_records


def scored_by_note(scored_by: str, config: Record) -> str:
    """Who gave the scores, and what the calibration before the run found; "" if neither is known. HTML."""
    calibration = config.get("options", {}).get("calibration")
    if not scored_by:
        return ""
    verdict = calibration.get("verdict") if isinstance(calibration, dict) else None
    found = f"It {verdict}." if verdict else "It was not calibrated."
    return f"Scored by {escape(scored_by)}. {escape(found)}"


def read_opinions(folder: Path) -> dict[str, Judge]:
    """The judges whose opinions of a run's stories are kept there, by name; a later opinion replaces an earlier one."""
    judges: dict[str, Judge] = {}
    for record in read_records(folder / OPINIONS):
        judge = judges.setdefault(record["judge"], Judge(record["judge"], {}, {}))
        judge.add(record["opening"], record["story"], record["scores"], record["score"])
    return judges


def also_said(opinions: Mapping[str, Judge], record: Record) -> str:
    """What other judges said of one story, for its card; "" if none did. HTML."""
    told = record["opening"], record["story"]
    said = []
    for name, judge in opinions.items():
        if told in judge.scores:
            said.append(f"{page.clip(name, 40)} says {' '.join(f'{each:g}' for each in judge.scores[told].values())}")
        elif told in judge.wholes:
            said.append(f"{page.clip(name, 40)} says {judge.wholes[told]:.2f} of 1")
    return " · ".join(said)


def judges_section(folder: Path, scored_by: str) -> str:
    """What others say of the stories before and after, beside the run's own teacher; "" if nobody was asked."""
    opinions, preferences = read_opinions(folder), run_preferences(folder)
    if not opinions and not preferences:
        return ""
    samples = list(read_records(folder / SAMPLES))
    own = Judge(scored_by or "the run’s teacher", {}, {})
    for record in samples:
        own.add(record["opening"], record["story"], record["scores"], None)
    rows = [_row(judge, own, samples) for judge in (own, *opinions.values())]
    header = ["Judge", "Stories", "Sum before", "Sum after", "Kappa with the teacher", "Spearman with the teacher"]
    tables = page.table(header, [row for row in rows if row]) if opinions else ""
    says = "".join(f"<p>{escape(line)}</p>" for line in preference_lines(preferences))
    return page.section(
        "What a second judge says",
        "Of the same evaluation stories, before interaction and after it. A gain that only the teacher sees "
        "is a gain at pleasing the teacher. Kappa has quadratic weights, is taken over the sums, and like Spearman’s "
        "correlation is shown with a 95 % interval; 0 is chance.",
        tables + says,
    )


def _row(judge: Judge, own: Judge, samples: list[Record]) -> list[str]:
    sums: dict[str, list[float]] = {"before": [], "after": []}
    criteria = len(next(iter(own.scores.values()), ())) or 3
    for record in samples:
        if record["when"] in sums and judge.knows(record["opening"], record["story"]):
            sums[record["when"]].append(judge.total((record["opening"], record["story"]), criteria))
    if not any(sums.values()):
        return []
    means = [f"{sum(each) / len(each):.2f}" if each else number(None) for each in sums.values()]
    both = ["", ""]
    if judge is not own and own.scores:
        found = agreement(own, judge)["sum"]
        both = [with_ends(found[name], found[f"{name}_ci"]) for name in ("kappa", "spearman")]
    return [judge.name, str(sum(map(len, sums.values()))), *means, *both]


def with_ends(value: float | None, interval: Any) -> str:
    """0.52 [0.40, 0.63]; a dash for None."""
    return number(None) if value is None else f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def preference_lines(preferences: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence per judge that compared stories before and after, without knowing which is which."""
    lines = []
    for who, found in preferences.items():
        order = f" ({found['inconsistent']} of them depended on the order)" if found["inconsistent"] else ""
        lines.append(
            f"{who} preferred the story after interaction in {found['second']} of {found['pairs']} pairs, the one "
            f"before in {found['first']}, and neither in {found['same']}{order}: win rate "
            f"{with_ends(found['rate'], found['ci'])}"
        )
    return lines
