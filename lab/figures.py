"""Figures of the lab's results as SVG files: bar charts, scatter plots, and charts of the report."""

import html
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from tinystory.report.charts import STYLE, number, padded_range, palette, svg, text, ticks

COLOURS = ("plain", "reward", "readability", "coherence", "creativity", "muted")  # of curves


class Bar(NamedTuple):
    """A bar of a chart. value: 0 to 1; error: the standard error of the value."""

    name: str
    value: float
    error: float


def bar_chart(title: str, bars: Sequence[Bar], highlighted: str) -> str:
    """An SVG of horizontal bars, with a scale below them. highlighted: name of the bar in
    colour."""
    left = 12 + 6 * max(len(bar.name) for bar in bars)
    unit = (540 - left) / max(bar.value for bar in bars)  # length of a bar of value 1
    bottom = 26 * len(bars) + 24
    parts = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x = left + unit * tick
        if x <= 540:
            parts.append(f'<path class="grid" d="M{x:.1f},24V{bottom}"/>')
            parts.append(text(x, bottom + 14, "middle", f"{tick:g}"))
    for i, bar in enumerate(bars):
        y = 26 * i + 28
        length = unit * bar.value
        colour = "reward" if bar.name == highlighted else "grey"
        shape = f"M{left},{y}h{length:.1f}v16h-{length:.1f}Z"
        value = f"{bar.value:.3f} ± {bar.error:.3f}"
        parts += [
            f'<text x="0" y="{y + 12}">{html.escape(bar.name)}</text>',
            f'<path class="dot" style="--tint: var(--{colour})" d="{shape}"/>',
            f'<text x="{left + length + 7:.1f}" y="{y + 12}">{value}</text>',
        ]
    return svg(title, (640, bottom + 20), parts)


class Point(NamedTuple):
    name: str
    x: float
    y: float


def scatter_plot(
    title: str, points: Sequence[Point], x_name: str, highlighted: Collection[str] = ()
) -> str:
    """An SVG of named points. highlighted: names of the points in colour."""
    width, height = 760, 400
    left, right, top, bottom = 48, width - 12, 34, height - 34
    x_range = padded_range(np.array([point.x for point in points]))
    y_range = padded_range(np.array([point.y for point in points]))
    parts = [text(right, height - 3, "end", x_name)]
    for tick in ticks(*y_range):
        y = np.interp(tick, y_range, (bottom, top))
        parts.append(f'<path class="grid" d="M{left},{y:.1f}H{right}"/>')
        parts.append(text(left - 6, y + 4, "end", number(tick)))
    for tick in ticks(*x_range):
        parts.append(
            text(np.interp(tick, x_range, (left, right)), bottom + 16, "middle", number(tick))
        )
    for point in points:
        x = np.interp(point.x, x_range, (left, right))
        y = np.interp(point.y, y_range, (bottom, top))
        colour = "reward" if point.name in highlighted else "grey"
        parts.append(
            f'<circle class="dot" style="--tint: var(--{colour})" r="4" cx="{x:.1f}" cy="{y:.1f}"/>'
        )
        # a label has about 6 units per character
        is_near_the_left = x - left < 6 * len(point.name) + 20
        if is_near_the_left:
            parts.append(text(x + 8, y + 4, "start", point.name))
        else:
            parts.append(text(x - 8, y + 4, "end", point.name))
    return svg(title, (width, height), parts)


def standalone(drawing: str) -> str:
    """The text of an .svg file with a chart, for a README. The colours follow light and dark
    mode."""
    with_namespace = drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    with_style = with_namespace.replace(">", f"><style>{palette()}{STYLE}</style>", 1)
    return with_style + "\n"
