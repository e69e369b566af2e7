"""How much of a run's gain comes from the teacher's scores, for the terminal and the report: the run
beside its controls."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from tinystory.evaluate.control import (
    FEWEST_CONTROLS,
    MEASURES,
    Comparison,
    Difference,
    Measures,
    read_comparisons,
)
from tinystory.evaluate.intervals import Z, mean_of, standard_error
from tinystory.report import page
from tinystory.report.charts import Line, chart, number
from tinystory.run.folder import read_config
from tinystory.run.paths import hint
from tinystory.run.terminal import wrapped

# Names of the measures in evaluate.control.CLAIMED, within a sentence.
CLAIMED = {"reward": "mean reward", "judge": "the second judge’s mean score"}
TITLE = "How much of it was the teacher?"


class Kind(NamedTuple):
    """A kind of control. learned: what its student learned from, after "gain comes"."""

    title: str
    learned: str
    colour: str


KINDS = {
    "shuffled": Kind("scores in random order", "with the same scores in random order", "plain"),
    "constant": Kind(
        "equal scores", "with the mean score of each step for every story", "coherence"
    ),
    "likelihood": Kind("likelihood", "with the stories’ likelihood as the score", "creativity"),
}
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


def sentence(comparison: Comparison) -> str:
    """How much of the gain comes from the teacher's scores; "" if no story has a score."""
    measure = comparison.claimed()
    if not measure:
        return ""
    title = CLAIMED[measure]
    of = comparison.differences()[measure]
    digits = decimals(of.half)
    learned = KINDS[comparison.name].learned
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


def answer(run: Path) -> str:
    """The sentences on the controls of a run, for the terminal; without a control, the command for
    one."""
    sentences = filter(None, map(sentence, read_comparisons(run)))
    return wrapped("\n".join(sentences)) or f"{TITLE} See with: {command(run)}"


def command(run: Path) -> str:
    """The command for a control of a run."""
    return hint("train_interact.py", "--control", run)


def interval_note(comparison: Comparison) -> str:
    """What the ± of a comparison is."""
    return OF_TRAININGS if comparison.has_verdicts else OF_OPENINGS.format(fewest=FEWEST_CONTROLS)


def control_section(run: Path, steps: int) -> str:
    """The report's section on the controls of a run of `steps` steps, as HTML; "" for a control."""
    if read_config(run).get("options", {}).get("control"):
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
    measured = picture(steps, comparisons)
    for each in comparisons:
        measured += page.note(title(each)) + page.table(*table(each))
    body = page.block("hero", f"<div>{claimed}</div><div>{measured}</div>")
    return f"<section><h2>{TITLE}</h2>{body}</section>"


def title(comparison: Comparison) -> str:
    """The title of a table, such as "3 controls: scores in random order"."""
    controls = page.count(len(comparison.controls), "control")
    return f"{controls}: {KINDS[comparison.name].title}"


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the measures, with the verdicts."""
    header = ["measure", "verdict: the run is", "run minus control", "before", "run", "control"]
    rows = []
    for name, of in comparison.differences().items():
        means = [number(mean) for mean in (of.before, of.run, of.control)]
        measure = MEASURES[name].format(group=comparison.group)
        verdict = of.verdict or f"needs {FEWEST_CONTROLS} controls"
        rows.append([measure, verdict, with_half(of), *means])
    return header, rows


def picture(steps: int, comparisons: Sequence[Comparison]) -> str:
    """The claimed measure before interaction and after `steps` steps, with 95 % intervals, of the
    run and of the first control of each kind."""
    first = comparisons[0]
    key = first.claimed()
    if not key:
        return ""
    lines = [line(key, first.before, first.run, steps, "reward", "run")]
    for each in comparisons:
        kind = KINDS[each.name]
        name = "control" if each.name == "shuffled" else kind.title
        lines.append(line(key, each.before, each.controls[0], steps, kind.colour, name))
    return chart(f"Held-out stories: {MEASURES[key]}", lines, size=(560, 300))


def line(key: str, before: Measures, after: Measures, steps: int, colour: str, name: str) -> Line:
    """Means with half the width of the 95 % interval, before interaction and after it."""
    columns = [before[key], after[key]]
    means = [mean_of(column) for column in columns]
    halves = [Z * (standard_error(column) or 0.0) for column in columns]
    return Line([0, steps], means, colour, name, halves)
