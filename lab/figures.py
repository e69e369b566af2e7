"""Figures of the lab's results as SVG files: bar charts, and charts of the report."""

import html
from collections.abc import Sequence
from typing import NamedTuple

from tinystory.report.charts import STYLE, palette, svg, text

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


def standalone(drawing: str) -> str:
    """The text of an .svg file with a chart, for a README. The colours follow light and dark
    mode."""
    with_namespace = drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    with_style = with_namespace.replace(">", f"><style>{palette()}{STYLE}</style>", 1)
    return with_style + "\n"
