"""Before and after interaction, on held-out openings: numbers and pairs of stories for terminal,
report, model card."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tinystory.evaluate.held_out import reward_mean, story_means
from tinystory.evaluate.stories import mean_of
from tinystory.report.charts import number, text_curve
from tinystory.run.folder import EVALUATIONS, SAMPLES, Record, read_metrics, read_records
from tinystory.run.text import aligned, printable

COLUMNS = {
    "reward": "reward",
    "score_mean": "score",
    "ended": "ended",
    "story_clusters": "clusters",
    "distinct_4": "distinct 4-grams",
    "length_mean": "words",
}
MORE = (0.0, 0.25, 0.75)  # quantiles of the gain at which further pairs are shown


# stories to one opening, before and after, from the same random numbers
Pair: TypeAlias = tuple[Record, Record]


@dataclass(frozen=True)
class BeforeAfter:
    """The evaluation before the first step, and a later one."""

    before: list[Record]
    after: list[Record]  # by the checkpoint `best`, or the latest of an unfinished run

    @property
    def names(self) -> tuple[str, str]:
        return "before interaction", f"after step {number(self.after[0]['step'])}"

    def typical(self) -> tuple[str, list[Pair]]:
        """A sentence on how the pairs were chosen, and the pairs: the median gain in reward, then
        the quantiles MORE. Only pairs of stories that both end, if there are any; none if no
        opening has two rewards."""
        after = {record["index"]: record for record in self.after if record["reward"] is not None}
        scored = [
            record
            for record in self.before
            if record["reward"] is not None and record["index"] in after
        ]
        pairs = [(record, after[record["index"]]) for record in scored]
        ended = [pair for pair in pairs if pair[0]["ended"] == pair[1]["ended"] == "eos"]
        pairs = sorted(
            ended or pairs, key=lambda pair: float(pair[1]["reward"] - pair[0]["reward"])
        )
        ends = " whose stories both end" if ended else ""
        rule = (
            f"The pair with the median gain in reward among {len(pairs)} held-out openings{ends}."
            if pairs
            else ""
        )
        return rule, [
            pairs[i]
            for i in dict.fromkeys(int(q * (len(pairs) - 1)) for q in (0.5, *MORE))
            if pairs
        ]

    def table(self) -> list[list[str]]:
        """A header, and a row of means per group of stories."""
        groups = dict(zip(self.names, (self.before, self.after), strict=True))
        means = {name: group_means(records) for name, records in groups.items()}
        shown = [key for key in COLUMNS if any(row.get(key) is not None for row in means.values())]
        header = [
            f"{len(self.before)} stories to held-out openings",
            *(COLUMNS[key] for key in shown),
        ]
        return [
            header,
            *([name, *(number(row.get(key)) for key in shown)] for name, row in means.items()),
        ]

    def tellers(self) -> str:
        """A sentence on the kinds of teller that the student imitates; "" if stories are not told
        apart by kind."""
        before, after = group_means(self.before), group_means(self.after)
        kinds = [key for key in before if key.startswith("teller_") and key in after]
        shifts = (
            f"{key.removeprefix('teller_')} {before[key]:.0%} → {after[key]:.0%}" for key in kinds
        )
        return f"Kinds of teller: {', '.join(shifts)}." if kinds else ""

    def conclusion(self) -> str:
        """A sentence on the reward; "" if no story has one."""
        first, last = reward_mean(self.before), reward_mean(self.after)
        if first is None or last is None:
            return ""
        if self.after[0]["step"] == self.before[0]["step"]:
            return f"No evaluation surpassed the student before interaction, with a mean reward of {number(first)}."
        verb = "rose" if last > first else "fell" if last < first else "stayed"
        return f"The mean reward {verb} from {number(first)} before interaction to {number(last)} {self.names[1]}."


def read_before_after(run: Path, step: int | None = None) -> BeforeAfter | None:
    """Compare with the last evaluation up to `step`; by default with the checkpoint `best`, or with
    the latest evaluation of an unfinished run. None without two evaluations."""
    evaluations: dict[int, list[Record]] = {}
    for record in read_records(run / EVALUATIONS):
        if step is None or record["step"] <= step:
            evaluations.setdefault(record["step"], []).append(record)
    best = [
        record["step"]
        for record in read_records(run / SAMPLES)
        if record["when"] == "after" and step is None
    ]
    chosen = best[0] if best else max(evaluations, default=0)
    before, after = evaluations.get(0), evaluations.get(chosen) if best or chosen else None
    return BeforeAfter(before, after) if before and after else None


def group_means(records: list[Record]) -> dict[str, float | None]:
    """Means of evaluation stories."""
    score = mean_of(sum(record["scores"].values()) for record in records if record["scores"])
    return {"reward": reward_mean(records), "score_mean": score} | story_means(records)


def from_start(run: Path, metrics: list[Record]) -> list[Record]:
    """metrics.jsonl's records, after one of step 0 with the means of the evaluation before
    training, if there is
    one."""
    start = [record for record in read_records(run / EVALUATIONS) if record["step"] == 0]
    if not start:
        return metrics
    return [
        {"step": 0} | {f"held_out_{key}": value for key, value in group_means(start).items()},
        *metrics,
    ]


def summary(run: Path) -> str:
    """What the terminal shows at the end of a run; "" if its evaluations are not on record."""
    comparison = read_before_after(run)
    if comparison is None:
        return ""
    rule, pairs = comparison.typical()
    lines = [rule]
    for pair in pairs[:1]:
        for name, record in zip(comparison.names, pair, strict=True):
            lines += ["", f"{name}, {grade_line(record)}:", story_lines(record)]
    lines += ["", *aligned(comparison.table()), comparison.tellers(), comparison.conclusion()]
    held_out = [record.get("held_out_reward") for record in from_start(run, read_metrics(run))]
    lines.append(f"Mean reward of every evaluation, from step 0: {text_curve(held_out)}")
    best = f"checkpoints/best is the student {comparison.names[1]}: its evaluation is the latest whose mean reward is\n"
    return "\n".join([*lines, f"{best}within a standard error of the highest."])


def grade_line(record: Record) -> str:
    """reward 0.61 (readability 2, coherence 2, creativity 1)."""
    scores = ", ".join(
        f"{printable(name)} {score:g}" for name, score in (record["scores"] or {}).items()
    )
    return f"reward {number(record['reward'])}" + (f" ({scores})" if scores else "")


def story_lines(record: Record) -> str:
    return textwrap.fill(printable(f"{record['opening']} {record['story']}"), 100)
