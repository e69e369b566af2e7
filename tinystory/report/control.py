"""How much of a run's gain comes from the teacher's scores, for the terminal and the report: the run
beside its controls."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from tinystory.evaluate.control import (
    FEWEST_CONTROLS,
    MEASURES,
    Comparison,
    Difference,
    control_folders,
    read_comparisons,
)
from tinystory.evaluate.held_out import evaluations_by_step
from tinystory.evaluate.intervals import Z, mean_of, standard_error
from tinystory.report import page
from tinystory.report.charts import Line, chart, number
from tinystory.run.folder import read_config
from tinystory.run.paths import hint

# Names of the measures in evaluate.control.CLAIMED, within a sentence.
CLAIMED = {"reward": "mean reward", "judge": "the second judge’s mean score"}
TITLE = "How much of it was the teacher?"
# What the student of each control learned from.
LEARNED_FROM = {
    "shuffled": "with the same scores in random order",
    "constant": "with the mean score of each step for every story",
    "likelihood": "with the stories’ likelihood as the score",
}
NAMES = {
    "shuffled": "scores in random order",
    "constant": "equal scores",
    "likelihood": "likelihood",
}
COLOURS = {"shuffled": "plain", "constant": "coherence", "likelihood": "creativity"}
NOTE = (
    "Run and controls have the same start, seeds and options. Each last student writes {stories} stories for held-out "
    "openings, with the same random numbers. Bits per byte are each student’s at its best temperature."
)
OF_OPENINGS = (
    "± is the 95 % interval over held-out openings, paired, for these two trainings. It does not include how much two "
    "trainings differ by chance, which is often more: verdicts need {fewest} controls with scores in random order, "
    "and each call of the command adds one."
)
OF_TRAININGS = (
    "± is half the 95 % interval. It includes how much trainings differ by chance, by Student’s t distribution over "
    "the controls with scores in random order. “More” or “less”: the interval excludes 0. “As”: it lies within a third "
    "of a standard deviation of the stories before interaction. If the scores say nothing about the stories, one "
    "verdict in twenty is a wrong “more” or “less”."
)
LIMITS = (
    "A control cannot show everything. What all scores have in common, such as endings and length, is learned with "
    "scores in random order too. A judge that is fooled is fooled in both."
)


def is_control(run: Path) -> bool:
    return bool(read_config(run).get("options", {}).get("control"))


def sentence(comparison: Comparison) -> str:
    """How much of the gain comes from the teacher's scores; "" if no story has a score."""
    measure = comparison.claimed()
    if not measure:
        return ""
    title = CLAIMED[measure]
    of = comparison.differences()[measure]
    digits = decimals(of.half)
    learned = LEARNED_FROM[comparison.name]
    if of.gain > 0:
        return (
            f"Of the gain of {of.gain:.{digits}f} in {title}, {with_half(of)} comes from the teacher’s scores; "
            f"{of.control - of.before:.{digits}f} comes {learned}."
        )
    return (
        f"The run gained nothing in {title} ({of.gain:.{digits}f}). The difference from the same run {learned} is "
        f"{with_half(of)}."
    )


def with_half(of: Difference) -> str:
    """Run minus control with half the width of the interval, such as 0.279 ± 0.032."""
    digits = decimals(of.half)
    return f"{of.by_teacher:.{digits}f} ± {of.half:.{digits}f}"


def decimals(half: float) -> int:
    """Number of decimals that show two digits of half the width of an interval."""
    return max(1 - math.floor(math.log10(half)), 0) if half > 0 else 3


def claims(run: Path) -> list[str]:
    """The sentences on the controls of a run."""
    return [*filter(None, map(sentence, read_comparisons(run)))]


def how_to(run: Path) -> str:
    """The command for the control of a run, after a question."""
    return f"{TITLE} See with: {command(run)}"


def command(run: Path) -> str:
    return hint("train_interact.py", "--control", run)


def interval_note(comparison: Comparison) -> str:
    """What the ± of a comparison is."""
    return OF_TRAININGS if comparison.has_verdicts else OF_OPENINGS.format(fewest=FEWEST_CONTROLS)


def control_section(run: Path) -> str:
    """The report's section on the controls of a run, as HTML; "" for a control."""
    if is_control(run):
        return ""
    comparisons = read_comparisons(run)
    if not comparisons:
        return page.section(TITLE, "See with:", page.command(command(run)))
    claimed = "".join(f"<p><b>{escape(sentence(each))}</b></p>" for each in comparisons)
    note = NOTE.format(stories=number(len(comparisons[0].run["words"])))
    claimed += (
        f'<p class="note">{interval_note(comparisons[0])} {note}</p><p class="note">{LIMITS}</p>'
    )
    if not comparisons[0].has_verdicts:
        claimed += f'<p class="note">{escape(command(run))}</p>'
    measured = picture(run, comparisons)
    measured += "".join(page.table(*table(each)) for each in comparisons)
    body = page.block("hero", f"<div>{claimed}</div><div>{measured}</div>")
    return f"<section><h2>{TITLE}</h2>{body}</section>"


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the measures, with the verdicts."""
    controls = page.count(len(comparison.controls), "control")
    header = [f"{controls}: {NAMES[comparison.name]}", "verdict: the run is"]
    header += ["run minus control", "before", "run", "control"]
    rows = []
    for name, of in comparison.differences().items():
        means = [number(mean) for mean in (of.before, of.run, of.control)]
        title = MEASURES[name].title.format(group=comparison.group)
        verdict = of.verdict or f"needs {FEWEST_CONTROLS} controls"
        rows.append([title, verdict, with_half(of), *means])
    return header, rows


def picture(run: Path, comparisons: Sequence[Comparison]) -> str:
    """The claimed measure of held-out stories with 95 % intervals, for the run and the first control
    of each kind: of every evaluation; if the run's evaluations do not have it, before and after."""
    key = comparisons[0].claimed()
    if not key:
        return ""
    evaluations = values_by_step(run, key)
    last = max(evaluations, default=1)
    ends = {0: comparisons[0].before[key], last: comparisons[0].run[key]}
    has_evaluations = any(value is not None for value in evaluations.get(last, ()))
    lines = [curve(evaluations if has_evaluations else ends, "reward", "run")]
    for comparison in comparisons:
        values = {0: comparison.before[key], last: comparison.controls[0][key]}
        if has_evaluations:
            values = values_by_step(control_folders(run, comparison.name)[0], key)
        name = "control" if comparison.name == "shuffled" else NAMES[comparison.name]
        lines.append(curve(values, COLOURS[comparison.name], name))
    return chart(f"Held-out stories: {MEASURES[key].title}", lines, size=(560, 300))


def values_by_step(run: Path, key: str) -> dict[int, list[float | None]]:
    """A value of the stories of each evaluation of a run, by step."""
    evaluations = evaluations_by_step(run)
    return {step: [record.get(key) for record in evaluations[step]] for step in evaluations}


def curve(values: Mapping[int, Sequence[float | None]], colour: str, name: str) -> Line:
    """Mean and half the width of the 95 % interval of the values at each step."""
    halves = []
    for column in values.values():
        error = standard_error(column)
        halves.append(None if error is None else Z * error)
    means = [mean_of(column) for column in values.values()]
    return Line([*values], means, colour, name, halves)
