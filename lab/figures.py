"""Figures of the lab's results as files: bars, and charts of the report on a page of their own."""

import html
from collections.abc import Sequence

from tinystory.report.charts import STYLE, palette, svg


def bars(title: str, rows: Sequence[tuple[str, float, float]], highlighted: str) -> str:
    """An SVG of horizontal bars. rows: name, positive value, standard error; highlighted: a
    name."""
    left = 12 + 7 * max(len(name) for name, _, _ in rows)
    largest = max(value for _, value, _ in rows)
    parts = []
    for i, (name, value, error) in enumerate(rows):
        y = 26 * i + 28
        length = (540 - left) * value / largest
        colour = "reward" if name == highlighted else "grey"
        shape = f"M{left},{y}h{length:.1f}v16h-{length:.1f}Z"
        parts += [
            f'<text x="0" y="{y + 12}">{html.escape(name)}</text>',
            f'<path class="dot" style="--tint: var(--{colour})" d="{shape}"/>',
            f'<text x="{left + length + 7:.1f}" y="{y + 12}">{value:.3f} ± {error:.3f}</text>',
        ]
    return svg(title, (640, 26 * len(rows) + 30), parts)


def standalone(drawing: str) -> str:
    """A chart as the text of an .svg file, for a README; it also follows light and dark mode."""
    with_namespace = drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    with_style = with_namespace.replace(">", f"><style>{palette()}{STYLE}</style>", 1)
    return with_style + "\n"
