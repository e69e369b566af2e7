"""The page about how far judges agree: per pair of judges the numbers, their intervals, and who gave what."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tinystory.report import charts, page
from tinystory.report.judges import with_ends
from tinystory.run.folder import atomic_write

COLUMNS = ["", "Kappa, quadratic weights", "Spearman", "Mean difference", "Means", "Equal"]


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """One row per criterion and one for the sum, for the page and the terminal; the columns are COLUMNS."""
    table = []
    for name, each in {**found["criteria"], f"sum, 0 to {found['highest']}": found["sum"]}.items():
        measured = [with_ends(each[key], each[f"{key}_ci"]) for key in ("kappa", "spearman", "difference")]
        means = " and ".join(f"{mean:.2f}" for mean in each["means"])
        table.append([name.replace("_", " "), *measured, means, f"{each['equal']:.0%}"])
    return table


def length_line(found: Mapping[str, Any]) -> str:
    """How the length of a story goes with the scores, in one sentence."""
    length = {key: with_ends(found["length"][key], found["length"][f"{key}_ci"]) for key in ("first", "second")}
    apart = with_ends(found["length"]["difference"], found["length"]["difference_ci"])
    first, second = found["judges"]
    return (
        f"Length and sum correlate by {length['first']} for {first} and by {length['second']} for {second}; length and "
        f"what {second} gives more, by {apart}"
    )


def write_agreement(comparisons: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write one self-contained page about the results of `agreement`."""
    sections = []
    for found in comparisons:
        first, second = found["judges"]
        drawings = [intervals("Kappa and Spearman, with 95 % intervals", found)]
        drawings += [
            confusion(name.replace("_", " ").capitalize(), each["table"], page.colour(name), second)
            for name, each in found["criteria"].items()
        ]
        body = page.table(COLUMNS, rows(found)) + f"<p>{escape(length_line(found))}.</p>" + page.grid(drawings)
        note = (
            f"{found['stories']} stories that both scored. Difference: the second judge’s score less the first one’s. "
            "In the tables a row is a score of the first judge, a column one of the second: they agree on the diagonal."
        )
        sections.append(page.section(f"{escape(first)} and {escape(second)}", note, body))
    text = page.PAGE.format(
        name="How far judges agree",
        style=charts.palette() + charts.STYLE + page.STYLE,
        subtitle="Kappa compares the scores themselves, Spearman’s correlation their order; 0 is chance, 1 perfect.",
        sections="\n".join(sections),
    )
    atomic_write(path, text.encode("utf-8", "replace"))


def intervals(title: str, found: Mapping[str, Any]) -> str:
    """An SVG of kappa (filled) and Spearman's correlation (hollow) of each criterion and of the sum, with intervals."""
    entries = [*found["criteria"].items(), ("sum", found["sum"])]
    width, left, right, top, slot = 340, 92, 14, 34, 34
    height = top + slot * len(entries) + 24
    ends = [end for _, each in entries for key in ("kappa", "spearman") for end in each[f"{key}_ci"] or ()]
    low = min([0.0, *ends])

    def at(value: float) -> float:
        return left + (value - low) / (1 - low) * (width - left - right)

    parts = [f'<text class="title" x="0" y="14">{escape(title)}</text>']
    for tick in charts.ticks(low, 1.0):
        parts.append(f'<path class="grid" d="M{at(tick):.1f},{top}V{height - 24}"/>')
        parts.append(f'<text x="{at(tick):.1f}" y="{height - 8}" text-anchor="middle">{charts.number(tick)}</text>')
    for i, (name, each) in enumerate(entries):
        up = top + slot * (i + 0.5)
        label = escape(name.replace("_", " "))
        parts.append(f'<text x="{left - 10}" y="{up + 4:.1f}" text-anchor="end">{label}</text>')
        tint = "reward" if name == "sum" else page.colour(name)
        for key, down, fill in (("kappa", -6, "var(--tint)"), ("spearman", 6, "var(--paper)")):
            if each[key] is None:
                continue
            a, b = (at(end) for end in each[f"{key}_ci"])
            parts.append(
                f'<g style="--tint: var(--{tint})"><title>{key} {with_ends(each[key], each[f"{key}_ci"])}</title>'
                f'<path class="error" d="M{a:.1f},{up + down:.1f}H{b:.1f}"/><circle class="error" style="fill: {fill}" '
                f'r="3.5" cx="{at(each[key]):.1f}" cy="{up + down:.1f}"/></g>'
            )
    return charts.svg(title, (width, height), parts)


def confusion(title: str, table: Sequence[Sequence[int]], colour: str, second: str) -> str:
    """An SVG of the counts, the darker the more: rows are the first judge's scores, columns the second's."""
    size, left, top, cell = (340, 210), 44, 34, 36
    most = max(max(row) for row in table) or 1
    parts = [f'<text class="title" x="0" y="14">{escape(title)}</text>']
    wide = (size[0] - left) / len(table)
    for i, row in enumerate(table):
        down, across = top + cell * i, left + wide * i
        parts.append(f'<text x="{left - 12}" y="{down + cell / 2 + 4:.1f}" text-anchor="end">{i}</text>')
        parts.append(f'<text x="{across + wide / 2:.1f}" y="{top + cell * 4 + 16}" text-anchor="middle">{i}</text>')
        for j, count in enumerate(row):
            x = left + wide * j
            parts.append(
                f'<rect class="bar" style="--tint: var(--{colour}); opacity: {0.06 + 0.6 * count / most:.2f}" '
                f'x="{x + 1:.1f}" y="{down + 1}" width="{wide - 2:.1f}" height="{cell - 2}" rx="3"/>'
                f'<text style="fill: var(--ink)" x="{x + wide / 2:.1f}" y="{down + cell / 2 + 4:.1f}" '
                f'text-anchor="middle">{count or ""}</text>'
            )
    parts.append(f'<text x="{size[0]}" y="{size[1] - 3}" text-anchor="end">{escape(second[:40])}</text>')
    return charts.svg(title, size, parts)
