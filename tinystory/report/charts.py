"""Charts as inline SVG, whose colours are CSS variables of the page (light and dark), and a
sparkline for terminals."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

Span: TypeAlias = tuple[float, float]  # low and high end of an axis
Size: TypeAlias = tuple[int, int]  # width and height in pixels
ToPixels: TypeAlias = Callable[[ArrayLike], Any]

POINTS = 60  # points per curve: single steps of a long run are noise
SIZE = (340, 210)  # default
LEFT, RIGHT, TOP, BOTTOM = 44, 50, 30, 34  # margins around the plotting area

# Colours by role or criterion: (on a light background, on a dark one).
COLOURS = {
    "ink": ("#26231e", "#e8e4dc"),
    "muted": ("#77716a", "#9c968c"),
    "rule": ("#e6e1d8", "#37342f"),
    "grey": ("#cfc9be", "#57534b"),
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
svg.chart text.value { font-weight: 600; fill: var(--tint); }
svg.chart .grid { stroke: var(--rule); stroke-width: 1; }
svg.chart .line { fill: none; stroke: var(--tint); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg.chart .dot { fill: var(--tint); }
svg.chart .error { fill: none; stroke: var(--tint); stroke-width: 1.5; }
"""


def palette() -> str:
    light, dark = (
        "".join(f"--{name}: {pair[mode]}; " for name, pair in COLOURS.items()) for mode in (0, 1)
    )
    return f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"


@dataclass
class Line:
    """A curve, averaged over neighbours beyond POINTS values. errors: half the length of each error
    bar, or None."""

    x: Sequence[float | None]
    y: Sequence[float | None]
    colour: str = "plain"
    name: str = ""
    errors: Sequence[float | None] = ()

    def points(self) -> np.ndarray:
        """float64 (3, n): x, y and error (nan: none) of the points that have both coordinates."""
        table = np.array([self.x, self.y, self.errors or [None] * len(self.y)], dtype=float)
        return table[:, ~np.isnan(table[:2]).any(0)]

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x and y of the points to draw, and y values that the axis must show."""
        along, values, errors = self.points()
        x, y = thin(along), thin(values)
        if len(y) < 8:
            ends = np.concatenate([values - errors, values + errors])
            return x, y, np.concatenate([y, ends[~np.isnan(ends)]])
        # The axis shows the central 98 % of the values and hardly more: a single outlier would
        # flatten the rest.
        low, high = np.quantile(values, [0.01, 0.99])
        return x, y, np.clip(y, 2 * low - high, 2 * high - low)


def thin(values: np.ndarray, limit: int = POINTS) -> np.ndarray:
    """values, averaged over neighbours to at most `limit` points: (n,) -> (min(n, limit),)."""
    if len(values) <= limit:
        return values
    edges = np.linspace(0, len(values), limit + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def ticks(low: float, high: float) -> list[float]:
    """At least three round numbers within [low, high], with the largest spacing of 1, 2 or 5 times
    a power of ten."""
    power = math.ceil(math.log10(high - low))
    while True:
        for multiple in (5, 2, 1):
            step = multiple * 10.0 ** (power - 1)
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            if last - first >= 2:
                return [float(f"{i * step:.9g}") for i in range(first, last + 1)]
        power -= 1


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within [low, high], 0 < low <= high; if more than 8, only
    the powers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [
        m * 10.0**p for p in powers for m in (1, 2, 5) if low * 0.999 <= m * 10.0**p <= high * 1.001
    ]
    return marks if len(marks) <= 8 else [mark for mark in marks if math.log10(mark).is_integer()]


def tick_names(values: Sequence[float]) -> list[str]:
    names = [number(value) for value in values]
    if len(set(names)) < len(names):
        decimals = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-6))
        names = [f"{value:,.{decimals}f}" for value in values]
    return names


def number(value: float | None) -> str:
    """A number with about three digits: 12.3M, 4,321, 0.618, 1.2e-5; a dash for None."""
    if value is None:
        return "\N{EN DASH}"
    size = abs(value)
    if size >= 99_950:
        unit, name = next(
            (unit, name)
            for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k"))
            if size >= unit * 0.9995
        )
        return f"{value / unit:.3g}{name}" if size < unit * 1000 else f"{value / unit:,.0f}{name}"
    if size >= 999.5 or value == int(value):
        return f"{value:,.0f}"
    if size < 0.001:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.3g}"


def chart(
    title: str,
    lines: Sequence[Line],
    y_range: Span | None = None,
    x_name: str = "step",
    log_x: bool = False,
    size: Size = SIZE,
) -> str:
    """An SVG of the lines that have points; "" if none has. y_range: default fitted to the curves.
    log_x: all x > 0."""
    lines = [line for line in lines if line.points().size]
    if not lines:
        return ""
    x, curves = (
        np.concatenate([line.points()[0] for line in lines]),
        [line.curve() for line in lines],
    )
    x_low, x_high = x.min(), x.max()
    if x_high == x_low:
        x_low, x_high = (x_low / 2, x_high * 2) if log_x else (x_low - 0.5, x_high + 0.5)
    x_ticks = (
        log_ticks(x_low, x_high)
        if log_x
        else [tick for tick in ticks(x_low, x_high) if tick == int(tick)]
    )
    y_low, y_high = y_range or padded_range(np.concatenate([extent for _, _, extent in curves]))
    y_ticks, name_length = ticks(y_low, y_high), max(len(line.name) for line in lines)
    end, bottom = (
        size[0] - (max(86, 50 + 7 * name_length) if name_length else RIGHT),
        size[1] - BOTTOM,
    )
    scale = np.log10 if log_x else np.asarray

    def across(values: ArrayLike) -> Any:  # in pixels
        return LEFT + (scale(values) - scale(x_low)) / (scale(x_high) - scale(x_low)) * (end - LEFT)

    def down(values: ArrayLike) -> Any:
        return TOP + (y_high - np.clip(values, y_low, y_high)) / (y_high - y_low) * (bottom - TOP)

    parts = []
    for tick, name in zip(y_ticks, tick_names(y_ticks), strict=True):
        parts.append(f'<path class="grid" d="M{LEFT},{down(tick):.1f}H{end}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{name}</text>'
        )
    for tick in x_ticks:
        parts.append(
            f'<text x="{across(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>'
        )
    parts.append(
        f'<text x="{end}" y="{size[1] - 3}" text-anchor="end">{html.escape(x_name)}</text>'
    )
    labels = []
    for line, (along, up, _) in zip(lines, curves, strict=True):
        parts += draw(line, across, down, along, up)
        labels.append(
            (float(down(up[-1])), line.colour, f"{line.name} {number(float(up[-1]))}".strip())
        )
    lowest = -math.inf
    for y, colour, text in sorted(labels):
        lowest = max(y + 4, lowest + 13)  # below the label above
        place = f'style="--tint: var(--{colour})" x="{end + 7}" y="{lowest:.1f}"'
        parts.append(f'<text class="value" {place}>{html.escape(text)}</text>')
    return svg(title, size, parts)


def draw(line: Line, across: ToPixels, down: ToPixels, x: np.ndarray, y: np.ndarray) -> list[str]:
    """SVG elements of a line: error bars, the curve, and dots if it has few points."""
    parts = [f'<g style="--tint: var(--{line.colour})">']
    table = line.points()
    for at, value, error in table[:, ~np.isnan(table[2])].T:
        a, b, c = across(at), down(value - error), down(value + error)
        shape = f"M{a:.1f},{b:.1f}V{c:.1f}M{a - 3:.1f},{b:.1f}h6M{a - 3:.1f},{c:.1f}h6"
        parts.append(f'<path class="error" d="{shape}"/>')
    points = [*zip(across(x), down(y), strict=True)]
    parts.append(f'<path class="line" d="M{"L".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')
    if len(points) <= 12:
        parts += [f'<circle class="dot" r="3" cx="{a:.1f}" cy="{b:.1f}"/>' for a, b in points]
    return [*parts, "</g>"]


def svg(title: str, size: Size, parts: Sequence[str]) -> str:
    name = html.escape(title)
    box = f'<svg class="chart" viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{name}">'
    return f'{box}<text class="title" x="0" y="14">{name}</text>{"".join(parts)}</svg>'


def bars(title: str, rows: Sequence[tuple[str, float, float]], highlighted: str) -> str:
    """An SVG of horizontal bars. rows: name, positive value, standard error; highlighted: a
    name."""
    left, scale = 12 + 7 * max(len(name) for name, _, _ in rows), max(value for _, value, _ in rows)
    parts = []
    for i, (name, value, error) in enumerate(rows):
        y, length = 26 * i + 28, (540 - left) * value / scale
        parts.append(f'<text x="0" y="{y + 12}">{html.escape(name)}</text>')
        colour = "reward" if name == highlighted else "grey"
        path = f'class="dot" style="--tint: var(--{colour})" d="M{left},{y}h{length:.1f}v16h-{length:.1f}Z"'
        parts.append(
            f'<path {path}/><text x="{left + length + 7:.1f}" y="{y + 12}">{value:.3f} ± {error:.3f}</text>'
        )
    return svg(title, (640, 26 * len(rows) + 30), parts)


def padded_range(values: np.ndarray) -> Span:
    """The range of the values with a margin; from 0 if they begin just above it."""
    low, high = float(values.min()), float(values.max())
    level = abs(high) if abs(high) > 1e-300 else 0.0
    constant = high - low <= max(1e-6 * level, 1e-300)  # up to rounding
    margin = (level * 0.1 or 1.0) if constant else (high - low) * 0.06
    return (low - margin if low < 0 or low > margin else 0.0, high + margin)


def standalone(drawing: str) -> str:
    """A chart as the text of an .svg file, for a README; it also follows light and dark mode."""
    start = '<svg xmlns="http://www.w3.org/2000/svg" '
    return (
        drawing.replace("<svg ", start, 1).replace(">", f"><style>{palette()}{STYLE}</style>", 1)
        + "\n"
    )


def text_curve(values: Sequence[float | None], width: int = 60) -> str:
    """Block characters, ▁ for the lowest value to █ for the highest, at most `width`; "" without
    values."""
    y = thin(
        np.array(
            [value for value in values if value is not None and math.isfinite(value)], dtype=float
        ),
        width,
    )
    if not len(y):
        return ""
    span = y.max() - y.min()
    return "".join(
        "▁▂▃▄▅▆▇█"[round(v)] for v in ((y - y.min()) / span * 7 if span else np.full(len(y), 3.0))
    )
