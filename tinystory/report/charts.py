"""Charts as inline SVG, and a sparkline for terminals. The colours are CSS variables of the page,
for light and dark mode."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Span = tuple[float, float]  # low and high end of an axis
Size = tuple[int, int]  # width and height in pixels

POINTS = 60  # points per curve: single steps of a long run are noise
SIZE = (340, 210)  # default
LEFT, RIGHT, TOP, BOTTOM = 44, 50, 30, 34  # margins around the plotting area
UNITS = {"B": 1e9, "M": 1e6, "k": 1e3}

# Colours by role or criterion: (on a light background, on a dark one).
COLOURS = {
    "ink": ("#26231e", "#e8e4dc"),
    "muted": ("#77716a", "#9c968c"),
    "rule": ("#e6e1d8", "#37342f"),
    "grey": ("#cfc9be", "#57534b"),
    "edge": ("#8f897f", "#6f6a62"),  # 3 to 1 against paper, as the border of a button needs
    "paper": ("#fcfbf8", "#1a1917"),
    "reward": ("#0b7a6b", "#4fc3ae"),
    "readability": ("#2366ab", "#74aef0"),
    "coherence": ("#b35a00", "#f0a35c"),
    "creativity": ("#8440b5", "#c794ee"),
    "plain": ("#5b6470", "#a7b0bd"),
}

STYLE = """
svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
svg.chart text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--muted);
  font-variant-numeric: tabular-nums; }
svg.chart text.title { font-size: 13px; font-weight: 600; fill: var(--ink); }
svg.chart .value text { font-weight: 600; fill: var(--tint); }
svg.chart .grid { stroke: var(--rule); stroke-width: 1; }
svg.chart .line { fill: none; stroke: var(--tint); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg.chart .dot { fill: var(--tint); }
svg.chart .error { fill: none; stroke: var(--tint); stroke-width: 1.5; }
"""


def palette() -> str:
    light = dark = ""
    for name, (on_light, on_dark) in COLOURS.items():
        light += f"--{name}: {on_light}; "
        dark += f"--{name}: {on_dark}; "
    return f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"


@dataclass
class Line:
    """A curve. More than POINTS values are averaged over neighbours. errors: half the length of
    each value's error bar, or None."""

    x: Sequence[float | None]
    y: Sequence[float | None]
    colour: str = "plain"
    name: str = ""
    errors: Sequence[float | None] = ()

    def points(self) -> np.ndarray:
        """float64 (3, n): x, y and error (0: none) of the points that have both coordinates."""
        errors = self.errors or [None] * len(self.y)
        table = np.array([self.x, self.y, errors], dtype=float)
        has_both = ~np.isnan(table[:2]).any(0)
        return np.nan_to_num(table[:, has_both])

    def extent(self) -> np.ndarray:
        """The y values that the axis must show: the central 98 % and little more, because a single
        outlier would flatten the rest."""
        _, y, error = self.points()
        low, high = np.quantile(y, [0.01, 0.99])
        ends = np.concatenate([thin(y - error), thin(y + error)])
        return np.clip(ends, 2 * low - high - error.max(), 2 * high - low + error.max())


def thin(values: np.ndarray, limit: int = POINTS) -> np.ndarray:
    """values, averaged over neighbours to at most `limit` points: (n,) -> (min(n, limit),)."""
    if len(values) <= limit:
        return values
    edges = np.linspace(0, len(values), limit + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def ticks(low: float, high: float) -> list[float]:
    """At least three round numbers within [low, high], spaced by 1, 2 or 5 times a power of ten."""
    widest = (high - low) / 3
    power = step = 10.0 ** math.floor(math.log10(widest))
    for multiple in (2, 5):
        if multiple * power <= widest:
            step = multiple * power
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.9g}") for i in range(first, last + 1)]


def number(value: float | None) -> str:
    """A number with about three digits: 12.3M, 4,321, 0.618, 1.2e-05; a dash for None."""
    if value is None:
        return "\N{EN DASH}"
    size = abs(value)
    if size >= 99_950:
        for letter, unit in UNITS.items():
            if size >= 0.9995 * unit:
                three_digits = float(f"{value / unit:.3g}")
                return f"{three_digits:,g}{letter}"
    return f"{value:,.0f}" if size >= 999.5 else f"{value:.3g}"


def with_error(mean: float | None, error: float | None) -> str:
    return number(mean) if error is None else f"{number(mean)} ± {error:.2g}"


def chart(
    title: str,
    lines: Sequence[Line],
    y_range: Span | None = None,
    x_name: str = "step",
    size: Size = SIZE,
) -> str:
    """An SVG of the lines that have points; "" if none has. y_range: range of the axis (default:
    fitted to the lines)."""
    lines = [line for line in lines if line.points().size]
    if not lines:
        return ""
    all_x = np.concatenate([line.points()[0] for line in lines])
    x_range = all_x.min(), all_x.max()
    if x_range[0] == x_range[1]:
        x_range = all_x[0] - 0.5, all_x[0] + 0.5
    y_range = y_range or padded_range(np.concatenate([line.extent() for line in lines]))
    width, height = size
    right = width - RIGHT - 7 * max(len(line.name) for line in lines)
    bottom = height - BOTTOM

    def across(values: Any) -> Any:
        return np.interp(values, x_range, (LEFT, right))

    def down(values: Any) -> Any:
        return np.interp(values, y_range, (bottom, TOP))  # an outlier is at the edge

    parts = [text(right, height - 3, "end", x_name)]
    for tick in ticks(*y_range):
        y = down(tick)
        parts.append(f'<path class="grid" d="M{LEFT},{y:.1f}H{right}"/>')
        parts.append(text(LEFT - 6, y + 4, "end", number(tick)))
    for tick in ticks(*x_range):
        if tick == int(tick):
            parts.append(text(across(tick), bottom + 16, "middle", number(tick)))
    ends = []  # height, colour and text of each line's last value
    for line in lines:
        parts.append(f'<g style="--tint: var(--{line.colour})">')
        x, y, errors = line.points()
        for at, low, high in zip(across(x), down(y - errors), down(y + errors), strict=True):
            if low != high:
                parts.append(f'<path class="error" d="M{at:.1f},{low:.1f}V{high:.1f}"/>')
        points = [*zip(across(thin(x)), down(thin(y)), strict=True)]
        path = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<path class="line" d="M{path}"/>')
        if len(points) <= 12:
            parts += [f'<circle class="dot" r="3" cx="{x:.1f}" cy="{y:.1f}"/>' for x, y in points]
        parts.append("</g>")
        last = f"{line.name} {number(thin(y)[-1])}".strip()
        ends.append((points[-1][1], line.colour, last))
    lowest = -math.inf
    for end, colour, last in sorted(ends):
        lowest = max(end + 4, lowest + 13)  # below each other
        label = text(right + 7, lowest, "start", last)
        parts.append(f'<g class="value" style="--tint: var(--{colour})">{label}</g>')
    return svg(title, size, parts)


def text(x: float, y: float, anchor: str, words: str) -> str:
    attributes = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {attributes}>{html.escape(words)}</text>"


def svg(title: str, size: Size, parts: Sequence[str]) -> str:
    name = html.escape(title)
    box = f'<svg class="chart" viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{name}">'
    return f'{box}<text class="title" x="0" y="14">{name}</text>{"".join(parts)}</svg>'


def padded_range(values: np.ndarray) -> Span:
    """The range of the values with a margin; from 0 if they begin just above it. It is at least a
    quarter of their level, so that a small change looks small."""
    low, high = float(values.min()), float(values.max())
    least = max(abs(low), abs(high), 1e-9) / 4
    margin = max((high - low) * 0.06, (least - (high - low)) / 2)
    starts_at_zero = 0 <= low <= margin
    return (0.0 if starts_at_zero else low - margin, high + margin)


def text_curve(values: Sequence[float | None], width: int = 60) -> str:
    """A sparkline of at most `width` block characters, from ▁ for the lowest value to █ for the
    highest; "" without values."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return ""
    y = thin(np.array(finite, dtype=float), width)
    span = y.max() - y.min()
    heights = (y - y.min()) / span * 7 if span else np.full(len(y), 3.0)
    return "".join("▁▂▃▄▅▆▇█"[round(height)] for height in heights)
