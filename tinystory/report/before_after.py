"""Before and after interaction, on held-out openings: numbers and pairs of stories for terminal,
report, model card."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tinystory.evaluate.held_out import reward_mean, story_means
from tinystory.evaluate.stories import mean_of
from tinystory.report.charts import number, text_curve
from tinystory.run.records import EVALUATIONS, SAMPLES, Record, read_metrics, read_records
from tinystory.run.terminal import aligned, colour, story_text, wrapped
from tinystory.run.text import printable

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
        after_by_index = {record["index"]: record for record in self.after}
        pairs: list[Pair] = []
        for before in self.before:
            after = after_by_index.get(before["index"])
            if after is None or before["reward"] is None or after["reward"] is None:
                continue
            pairs.append((before, after))
        ended = [pair for pair in pairs if pair[0]["ended"] == pair[1]["ended"] == "eos"]
        pairs = ended or pairs
        if not pairs:
            return "", []

        pairs.sort(key=lambda pair: float(pair[1]["reward"] - pair[0]["reward"]))
        ends = " whose stories both end" if ended else ""
        rule = (
            f"The pair with the median gain in reward among {len(pairs)} held-out openings{ends}."
        )
        shown: list[int] = []
        for quantile in (0.5, *MORE):
            place = int(quantile * (len(pairs) - 1))
            if place not in shown:
                shown.append(place)
        return rule, [pairs[place] for place in shown]

    def table(self) -> list[list[str]]:
        """A header, and a row of means per group of stories."""
        before_means = group_means(self.before)
        after_means = group_means(self.after)
        header = [f"{len(self.before)} stories to held-out openings"]
        before_row, after_row = ([name] for name in self.names)
        for key, title in COLUMNS.items():
            before = before_means.get(key)
            after = after_means.get(key)
            if before is None and after is None:
                continue
            header.append(title)
            before_row.append(number(before))
            after_row.append(number(after))
        return [header, before_row, after_row]

    def tellers(self) -> str:
        """A sentence on the kinds of teller that the student imitates; "" if stories are not told
        apart by kind."""
        before = group_means(self.before)
        after = group_means(self.after)
        shifts = []
        for key in before:
            if key.startswith("teller_") and key in after:
                kind = key.removeprefix("teller_")
                shifts.append(f"{kind} {before[key]:.0%} → {after[key]:.0%}")
        return f"Kinds of teller: {', '.join(shifts)}." if shifts else ""

    def conclusion(self) -> str:
        """A sentence on the reward; "" if no story has one."""
        first, last = reward_mean(self.before), reward_mean(self.after)
        if first is None or last is None:
            return ""
        if self.after[0]["step"] == self.before[0]["step"]:
            return f"No evaluation surpassed the student before interaction, with a mean reward of {number(first)}."
        verb = "stayed"
        if last != first:
            verb = "rose" if last > first else "fell"
        return f"The mean reward {verb} from {number(first)} before interaction to {number(last)} {self.names[1]}."


def read_before_after(run: Path, step: int | None = None) -> BeforeAfter | None:
    """Compare with the last evaluation up to `step`; by default with the checkpoint `best`, or with
    the latest evaluation of an unfinished run. None without two evaluations."""
    evaluations: dict[int, list[Record]] = {}
    for record in read_records(run / EVALUATIONS):
        if step is None or record["step"] <= step:
            evaluations.setdefault(record["step"], []).append(record)
    chosen = max(evaluations, default=0)
    best = best_step(run) if step is None else None
    if best is None and chosen == 0:
        return None
    before = evaluations.get(0)
    after = evaluations.get(chosen if best is None else best)
    return BeforeAfter(before, after) if before and after else None


def best_step(run: Path) -> int | None:
    """The step of the checkpoint `best` of a finished run."""
    for record in read_records(run / SAMPLES):
        if record["when"] == "after":
            return int(record["step"])
    return None


def group_means(records: list[Record]) -> dict[str, float | None]:
    """Means of evaluation stories."""
    score = mean_of(sum(record["scores"].values()) for record in records if record["scores"])
    return {"reward": reward_mean(records), "score_mean": score} | story_means(records)


def from_start(run: Path, metrics: list[Record]) -> list[Record]:
    """metrics.jsonl's records, after one of step 0 with the means of the evaluation before
    training, if there is one."""
    start = [record for record in read_records(run / EVALUATIONS) if record["step"] == 0]
    if not start:
        return metrics
    first: Record = {"step": 0}
    for key, value in group_means(start).items():
        first[f"held_out_{key}"] = value
    return [first, *metrics]


def summary(run: Path) -> str:
    """What the terminal shows at the end of a run; "" if its evaluations are not on record."""
    comparison = read_before_after(run)
    if comparison is None:
        return ""
    rule, pairs = comparison.typical()
    lines = [rule]
    for pair in pairs[:1]:
        for name, record in zip(comparison.names, pair, strict=True):
            lines += ["", f"{name}, {grade_line(record)}:"]
            lines.append(story_text(record["opening"], record["story"]))
    lines.append("")
    lines += aligned(coloured(comparison))
    lines += [comparison.tellers(), comparison.conclusion()]
    held_out = [record.get("held_out_reward") for record in from_start(run, read_metrics(run))]
    lines += [
        f"Mean reward of every evaluation, from step 0: {text_curve(held_out)}",
        f"checkpoints/best is the student {comparison.names[1]}: its evaluation is the latest whose "
        "mean reward is",
        "within a standard error of the highest.",
    ]
    return wrapped("\n".join(lines))


def coloured(comparison: BeforeAfter) -> list[list[str]]:
    """The table, with the later reward and score in the colour of a gain or a loss."""
    before = group_means(comparison.before)
    after = group_means(comparison.after)
    rows = comparison.table()
    header, last_row = rows[0], rows[-1]
    for key in ("reward", "score_mean"):
        first = before.get(key)
        last = after.get(key)
        if first is None or last is None or first == last:
            continue
        column = header.index(COLUMNS[key])
        last_row[column] = colour(last_row[column], "better" if last > first else "worse")
    return rows


def grade_line(record: Record) -> str:
    """reward 0.61 (readability 2, coherence 2, creativity 1)."""
    reward = f"reward {number(record['reward'])}"
    scores = record["scores"] or {}
    if not scores:
        return reward
    named = ", ".join(f"{printable(name)} {score:g}" for name, score in scores.items())
    return f"{reward} ({named})"


def story_lines(record: Record) -> str:
    return textwrap.fill(printable(f"{record['opening']} {record['story']}"), 100)
