"""Comparison of stories for held-out openings before and after interaction: means, and a pair of
stories, for the terminal and the report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from tinystory.evaluate.held_out import evaluations_by_step
from tinystory.evaluate.intervals import mean_ci, mean_of, standard_error
from tinystory.evaluate.stories import cluster_sizes
from tinystory.evaluate.story_records import (
    evaluation_means,
    held_out_metrics,
    reward_mean,
    shown_score,
)
from tinystory.report.charts import number, text_curve, with_error
from tinystory.run.collapse import CollapseDetector
from tinystory.run.folder import read_config
from tinystory.run.records import SAMPLES, Record, read_metrics, read_records, total
from tinystory.run.terminal import aligned, colour, story_text, wrapped
from tinystory.run.text import is_blank, printable
from tinystory.teacher.grade import NOT_ASKED, highest_score

COLUMNS = {
    "reward": "reward",
    "score_mean": "score",
    "judge": "second judge, 0 to 1",
    "ended": "ended",
    "story_clusters": "clusters",
    "distinct_4": "distinct 4-grams",
    "length_mean": "words",
}
# Measures by which two evaluations are compared: the first one that both have.
MEASURES = {"reward": "reward", "judge": "score by the second judge"}
NO_PAIR = "There is no pair to show: no held-out opening has two different, non-empty stories."
NO_HELP = (
    "The run did not help: no later evaluation reached the mean reward before interaction, so "
    "checkpoints/best is the student before interaction. Try more --steps or --stories-per-step. If "
    "scripts/doctor.py --calibrate finds that this teacher cannot distinguish good stories from bad "
    "ones, choose another teacher."
)


@dataclass(frozen=True)
class BeforeAfter:
    """The evaluations before the first step and after the last one. (That of the checkpoint `best`
    would be selected by its reward.)"""

    before: list[Record]
    after: list[Record]
    best: int | None = None  # step of the checkpoint `best`; None for an unfinished run

    @property
    def names(self) -> tuple[str, str]:
        return "before interaction", f"after step {number(self.after[0]['step'])}"

    @property
    def measure(self) -> str:
        """The key in MEASURES by which the evaluations are compared; "" if no opening has two
        rewards or two scores by the second judge."""
        for key in MEASURES:
            if self.gains(key):
                return key
        return ""

    def pairs(self) -> list[tuple[Record, Record]]:
        """Two stories for each held-out opening, before and after, from the same random numbers,
        that are different and not empty, and both have the `measure`, if there is one. If any pair
        has two stories that end: only such pairs."""
        after_by_index = {record["index"]: record for record in self.after}
        comparable = self.gains(self.measure) if self.measure else after_by_index
        pairs: list[tuple[Record, Record]] = []
        for before in self.before:
            if before["index"] not in comparable:
                continue
            after = after_by_index[before["index"]]
            words_before = printable(before["story"]).split()
            words_after = printable(after["story"]).split()
            if words_before and words_after and words_before != words_after:
                pairs.append((before, after))
        ended = [pair for pair in pairs if pair[0]["ended"] == pair[1]["ended"] == "eos"]
        return ended or pairs

    def typical(self) -> tuple[str, Sequence[Record]]:
        """A sentence on how a pair was chosen, and the pair: one of `pairs`, with the median gain in
        the `measure`. Without a measure: the last pair, because a human teacher compares the first
        ones without labels. Without a pair: a sentence that says so, and ()."""
        pairs = self.pairs()
        if not pairs:
            return NO_PAIR, ()
        ends = " that end" if all(record["ended"] == "eos" for record in pairs[0]) else ""
        kind = f"two different, non-empty stories{ends}"
        if not self.measure:
            rule = f"This pair is for the last held-out opening with {kind}."
            return rule, pairs[-1]

        gains = self.gains(self.measure)
        pairs.sort(key=lambda pair: gains[pair[0]["index"]])
        rule = (
            f"This pair has the median gain in {MEASURES[self.measure]} among {len(pairs)} held-out "
            f"openings with {kind}."
        )
        return rule, pairs[(len(pairs) - 1) // 2]

    def table(self, coloured: bool = False) -> list[list[str]]:
        """A header, and a row for each measure with the means before and after; the means in
        COMPARED have standard errors. coloured: colour the cells of these means for a terminal, if
        they `changed`."""
        before_means, before_errors = evaluation_means(self.before), group_errors(self.before)
        after_means, after_errors = evaluation_means(self.after), group_errors(self.after)
        rows = [[f"{len(self.before)} stories for held-out openings", *self.names]]
        for key, title in COLUMNS.items():
            before = before_means.get(key)
            after = after_means.get(key)
            if before is None and after is None:
                continue
            if key == "score_mean":
                records = self.before + self.after
                title = f"score of {max(highest_score(record['scores']) for record in records)}"
            cell = with_error(after, after_errors.get(key))
            if coloured and key in COMPARED:
                direction = changed([*self.gains(key).values()])
                if direction:
                    cell = colour(cell, "better" if direction == "rose" else "worse")
            rows.append([title, with_error(before, before_errors.get(key)), cell])
        return rows

    def styles(self) -> str:
        """A sentence on the styles of the texts before and after; "" if the run does not record
        styles."""
        before = evaluation_means(self.before)
        after = evaluation_means(self.after)
        shifts = []
        for key in before:
            if key.startswith("style_") and key in after:
                style = key.removeprefix("style_")
                shifts.append(f"{style} {before[key]:.0%} → {after[key]:.0%}")
        if not shifts:
            return ""
        return (
            f"Styles of the texts: {', '.join(shifts)}. Dull text (filler) is recognised by its "
            "sentence templates; every other text counts as a story, however good or bad."
        )

    def gains(self, key: str) -> dict[int, float]:
        """The gain in a value of COMPARED, after minus before, by index of the held-out opening, for
        the openings that have both values."""
        value = COMPARED[key]
        values_before = {record["index"]: value(record) for record in self.before}
        gains = {}
        for record in self.after:
            before, after = values_before.get(record["index"]), value(record)
            if before is not None and after is not None:
                gains[record["index"]] = after - before
        return gains

    def conclusion(self) -> str:
        """A sentence on the change in the mean of the `measure`, with the interval of the gain; ""
        without a measure."""
        measure = self.measure
        if not measure:
            return ""
        value = COMPARED[measure]
        first, last = mean_of(map(value, self.before)), mean_of(map(value, self.after))
        gains = [*self.gains(measure).values()]
        verb = changed(gains) or "went"
        means = (
            f"The mean {MEASURES[measure]} {verb} from {number(first)} before interaction to "
            f"{number(last)} {self.names[1]}"
        )
        if len(gains) < 2:
            return f"{means}: too few stories to say whether it changed."
        low, high = (number(bound) for bound in mean_ci(gains))
        interval = f"the 95 % interval of the gain per held-out opening is {low} to {high}"
        if verb == "went":
            return f"{means}, which may be chance: {interval}."
        return f"{means}: {interval}."

    def best_student(self) -> str:
        """A sentence on the checkpoint `best`, or on what to try if interaction did not help; ""
        for an unfinished run."""
        if self.best is None:
            return ""
        if self.best > 0 and reward_mean(self.after) is None:
            return "checkpoints/best is the last student: its evaluations have no rewards."
        if self.best > 0:
            return (
                f"checkpoints/best is the student after step {number(self.best)}: the latest evaluation with a mean "
                "reward within one standard error of the highest, and not below the mean reward "
                "before interaction."
            )
        if reward_mean(self.before) is None:
            return "No evaluation has a reward, so there is no checkpoints/best."
        return NO_HELP


def has_ended(pair: Sequence[Record]) -> bool:
    return all(record["ended"] == "eos" for record in pair)


def changed(gains: Sequence[float]) -> str:
    """ "rose" or "fell" if the 95 % interval of the mean gain excludes 0, else ""."""
    if len(gains) < 2:
        return ""
    low, high = mean_ci(gains)
    if low > 0:
        return "rose"
    return "fell" if high < 0 else ""


def doubt(config: Record) -> str:
    """A sentence to show beside the conclusion if the calibration before the run found that the
    teacher cannot judge; "" otherwise, or without a calibration."""
    match config.get("options", {}).get("calibration"):
        case {"best_auc_ci": [float(low), _], "verdict": str(verdict)} if low <= 0.5:
            return f"But this teacher {printable(verdict)}."
        case {"best_auc_ci": None, "verdict": str(verdict)}:
            return f"But this teacher {printable(verdict)}."
    return ""


def short_name(model: str) -> str:
    """The name of a model. llama.cpp's server names a model by the path of its file, of which only
    the file's name is returned."""
    return PureWindowsPath(model).name if model.endswith(".gguf") else model


def teaching(config: Record, metrics: Sequence[Record]) -> str:
    """A sentence on a language model that taught: what it was asked, what that cost, and how well it
    judged known texts; "" for other teachers."""
    match config.get("options", {}):
        case {"teacher_url": [_, *_], "teacher": {"model": str(model)}, "questions": {**questions}}:
            asked = " ".join(f'"{printable(str(question))}"' for question in questions.values())
        case _:
            return ""
    requests = total(metrics, "teacher_requests")
    tokens = total(metrics, "teacher_tokens_in") + total(metrics, "teacher_tokens_out")
    minutes = total(metrics, "teacher_s") / 60
    sentence = (
        f"{printable(short_name(model))} was asked {asked}: {requests:,.0f} requests, "
        f"{tokens:,.0f} tokens, {minutes:.1f} minutes of waiting during the steps."
    )
    match config["options"].get("calibration"):
        case {"verdict": str(verdict)}:
            sentence += f" The calibration found that it {printable(verdict)}."
    return sentence


def read_before_after(run: Path) -> BeforeAfter | None:
    """The comparison of step 0 with the latest evaluation. None if there are fewer than two
    evaluations."""
    evaluations = evaluations_by_step(run)
    latest = max(evaluations, default=0)
    before = evaluations.get(0)
    if latest == 0 or not before:
        return None
    return BeforeAfter(before, evaluations[latest], best_step(run))


def best_step(run: Path) -> int | None:
    """The step of the checkpoint `best` of a finished run."""
    for record in read_records(run / SAMPLES):
        if record["when"] == "after":
            return int(record["step"])
    return None


def followed(run: Path) -> Sequence[Record]:
    """One story per evaluation, all for the last opening without an empty story, without stories
    between the first and the last that are similar to the one before. (A human teacher compares
    stories for the first openings without labels, so these are not shown.)"""
    chosen: Sequence[Record] = ()
    for stories in zip(*evaluations_by_step(run).values(), strict=False):
        if not any(is_blank(record["story"]) for record in stories):
            chosen = stories
    shown = [*chosen[:1]]
    for story in chosen[1:]:
        is_new = len(cluster_sizes([shown[-1]["story"], story["story"]])) == 2
        if is_new or story is chosen[-1]:
            shown.append(story)
    return shown


# Values of a story by the key of their mean. Reports compare these means with standard errors.
COMPARED: dict[str, Callable[[Record], float | None]] = {
    "reward": lambda record: record["reward"],
    "score_mean": shown_score,
    "judge": lambda record: record.get("judge"),
}


def group_errors(records: list[Record]) -> dict[str, float | None]:
    """Standard errors of the means in COMPARED, by key."""
    return {key: standard_error(map(value, records)) for key, value in COMPARED.items()}


def from_start(run: Path, metrics: list[Record]) -> list[Record]:
    """The records of metrics.jsonl. If there was an evaluation before training, a record of step 0
    with its means comes first."""
    start = evaluations_by_step(run).get(0)
    if not start:
        return metrics
    return [{"step": 0} | held_out_metrics(start), *metrics]


def summary(run: Path) -> str:
    """The text that the terminal shows at the end of a run; "" if no two evaluations are
    recorded."""
    comparison = read_before_after(run)
    if comparison is None:
        return ""
    rule, pair = comparison.typical()
    lines = [rule]
    for name, record in zip(comparison.names, pair, strict=False):
        lines += ["", f"{name}, {grade_line(record)}:"]
        lines.append(story_text(record["opening"], record["story"]))
    metrics = read_metrics(run)
    without_signal = CollapseDetector(metrics).warnings.get("signal")
    held_out = f"held_out_{comparison.measure}"
    curve = text_curve([record.get(held_out) for record in from_start(run, metrics)])
    measured = f"Mean {MEASURES.get(comparison.measure)} of every evaluation, from step 0: {curve}"
    sentences = [
        comparison.styles(),
        comparison.conclusion(),
        teaching(read_config(run), metrics),
        doubt(read_config(run)),
        f"But from step {without_signal[0]}: {without_signal[1]}." if without_signal else "",
        measured if curve else "",
        comparison.best_student(),
    ]
    lines += ["", *aligned(comparison.table(coloured=True)), *filter(None, sentences)]
    return wrapped("\n".join(lines))


def grade_line(record: Record) -> str:
    """A story's grades on one line: reward 0.61, score 5 of 9 (readability 2, coherence 2,
    creativity 1), difference 0.8, second judge 0.7."""
    judged = ""
    if record.get("judge") is not None:
        judged = f", second judge {number(record['judge'])}"
    if record["reward"] is None:
        return f"{'no score' if was_asked(record) else 'not graded'}{judged}"
    line = f"reward {number(record['reward'])}"
    scores = record["scores"] or {}
    score = shown_score(record)
    if score is not None:
        line += f", score {number(score)} of {highest_score(scores)}"
    elif record.get("predicted") is not None:
        line += f", predicted score {number(record['predicted'])} of 1"
    if scores:
        named = ", ".join(f"{printable(name)} {score:g}" for name, score in scores.items())
        line += f" ({named})"
    if record.get("difference") is not None:
        line += f", difference {number(record['difference'])}"
    return line + judged


def was_asked(record: Record) -> bool:
    """Whether the story was sent to the teacher."""
    return bool(record["reply"] != NOT_ASKED.error)
