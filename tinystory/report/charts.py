"""Charts as inline SVG, and a sparkline for the terminal.

The SVG has no colours itself: its classes refer to the page's CSS variables, so that the same chart works on light and
dark backgrounds. `standalone` turns a chart into the text of an .svg file.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

POINTS = 240  # points per curve; more cannot be distinguished at the size drawn

# Colours by role: (on a light background, on a dark one).
CRITERION_COLOURS = {
    "readability": ("#2366ab", "#74aef0"),
    "coherence": ("#b35a00", "#f0a35c"),
    "creativity": ("#8440b5", "#c794ee"),
}
COLOURS = {
    "ink": ("#26231e", "#e8e4dc"),
    "muted": ("#77716a", "#9c968c"),
    "rule": ("#e6e1d8", "#37342f"),
    "grey": ("#cfc9be", "#57534b"),
    "paper": ("#fcfbf8", "#1a1917"),
    "reward": ("#0b7a6b", "#4fc3ae"),
    **CRITERION_COLOURS,
    "plain": ("#5b6470", "#a7b0bd"),
}

STYLE = """
svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
svg.chart text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--muted);
  font-variant-numeric: tabular-nums; }
svg.chart text.title { font-size: 13px; font-weight: 600; fill: var(--ink); }
svg.chart text.value { font-weight: 600; fill: var(--tint); }
svg.chart .grid { stroke: var(--rule); stroke-width: 1; }
svg.chart .band { fill: var(--tint); opacity: .13; }
svg.chart .raw { fill: none; stroke: var(--tint); stroke-width: 1; opacity: .35; }
svg.chart .line { fill: none; stroke: var(--tint); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg.chart .dot, svg.chart .bar { fill: var(--tint); }
svg.chart .error { fill: none; stroke: var(--tint); stroke-width: 1.5; }
"""


def palette() -> str:
    """CSS variables for all colours, following the reader's light or dark setting."""
    light, dark = ("".join(f"--{name}: {pair[mode]}; " for name, pair in COLOURS.items()) for mode in (0, 1))
    return f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"


@dataclass
class Line:
    """One curve. smooth: a rolling mean with its standard deviation as a band and the raw values faintly, else only the
    values. errors: half the length of each value's error bar, None for no bar."""

    x: Sequence[float | None]
    y: Sequence[float | None]
    colour: str = "plain"
    name: str = ""
    smooth: bool = True
    errors: Sequence[float | None] = ()

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """The points that have both coordinates, as float64 (n,) and (n,)."""
        pairs = [(a, b) for a, b in zip(self.x, self.y, strict=True) if a is not None and b is not None]
        x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
        return x, y

    def bars(self) -> np.ndarray:
        """The error bars as rows of x, low end, high end: float64 (n, 3)."""
        if not self.errors:
            return np.empty((0, 3))
        rows = zip(self.x, self.y, self.errors, strict=True)
        bars = [(x, y - e, y + e) for x, y, e in rows if x is not None and y is not None and e is not None]
        return np.array(bars).reshape(-1, 3)


def rolling(y: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of y over a centred window. (n,) -> (n,), (n,).

    At the start, where curves are steep, the window narrows on both sides, so that the mean begins near the first
    values; at the end it is truncated on one side, so that the last mean still averages many values.
    """
    n = len(y)
    reach = np.clip(np.arange(n), 2, window // 2)
    low = np.maximum(np.arange(n) - reach, 0)
    high = np.minimum(np.arange(n) + reach + 1, n)
    centre = y.mean()  # sums of squares of values near zero do not suffer from cancellation
    first = np.concatenate([[0.0], np.cumsum(y - centre)])
    second = np.concatenate([[0.0], np.cumsum((y - centre) ** 2)])
    mean = (first[high] - first[low]) / (high - low)
    square = (second[high] - second[low]) / (high - low)
    return mean + centre, np.sqrt(np.maximum(square - mean**2, 0))


def thin(values: np.ndarray, limit: int = POINTS) -> np.ndarray:
    """values averaged over neighbours to at most limit points. (n,) -> (min(n, limit),)."""
    if len(values) <= limit:
        return values
    edges = np.linspace(0, len(values), limit + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def ticks(low: float, high: float) -> list[float]:
    """At least three round numbers within [low, high], with the largest spacing of 1, 2 or 5 times a power of ten."""
    power = math.ceil(math.log10(high - low))
    while True:
        for multiple in (5, 2, 1):
            step = multiple * 10.0 ** (power - 1)
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            if last - first >= 2:
                return [float(f"{i * step:.9g}") for i in range(first, last + 1)]
        power -= 1


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within [low, high], 0 < low <= high; if more than 8, only the powers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [m * 10.0**p for p in powers for m in (1, 2, 5) if low * 0.999 <= m * 10.0**p <= high * 1.001]
    return marks if len(marks) <= 8 else [mark for mark in marks if math.log10(mark).is_integer()]


def tick_names(values: Sequence[float]) -> list[str]:
    """The ticks as text, with enough decimals to distinguish them."""
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
        unit, name = next((unit, name) for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if size >= unit * 0.9995)
        return f"{value / unit:.3g}{name}" if size < unit * 1000 else f"{value / unit:,.0f}{name}"
    if size >= 999.5 or value == int(value):
        return f"{value:,.0f}"
    if size < 0.001:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.3g}"


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_range: tuple[float, float] | None = None,
    x_name: str = "step",
    log_x: bool = False,
    size: tuple[int, int] = (340, 210),
) -> str:
    """An SVG of the lines that have points; "" if none has. y_range: (low, high), by default fitted to the curves;
    log_x: logarithmic x axis, for positive x; size: width and height in pixels."""
    drawn = [(line, *line.points()) for line in lines]
    drawn = [(line, x, y) for line, x, y in drawn if len(x)]
    if not drawn:
        return ""
    width, height = size
    left, right, top, bottom = 44, 50, 30, 34
    if any(line.name for line, *_ in drawn):
        right = max(86, 50 + 7 * max(len(line.name) for line, *_ in drawn))

    shapes = [curves(line, x, y) for line, x, y in drawn]
    x_low, x_high = min(x[0] for _, x, _ in drawn), max(x[-1] for _, x, _ in drawn)
    if x_high == x_low:
        x_low, x_high = (x_low / 2, x_high * 2) if log_x else (x_low - 0.5, x_high + 0.5)
    x_ticks = log_ticks(x_low, x_high) if log_x else [tick for tick in ticks(x_low, x_high) if tick == int(tick)]
    along = np.log10 if log_x else np.asarray
    if y_range is None:
        bars = [line.bars()[:, 1:].ravel() for line, *_ in drawn]
        edges = np.concatenate([*(each for shape in shapes for each in shape["extent"]), *bars])
        y_low, y_high = edges.min(), edges.max()
        span = y_high - y_low
        level = abs(y_high) if abs(y_high) > 1e-300 else 0.0
        pad = span * 0.06 if span > max(1e-6 * level, 1e-300) else level * 0.1 or 1.0  # constant up to rounding
        y_range = (y_low - pad if y_low < 0 or y_low - pad > 0 else 0.0, y_high + pad)
    y_low, y_high = y_range

    def at_x(x: ArrayLike) -> np.ndarray:
        return left + (along(x) - along(x_low)) / (along(x_high) - along(x_low)) * (width - left - right)

    def at_y(y: ArrayLike) -> np.ndarray:
        return top + (y_high - np.clip(y, y_low, y_high)) / (y_high - y_low) * (height - top - bottom)

    def path(x: np.ndarray, y: np.ndarray) -> str:
        return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(at_x(x), at_y(y), strict=True))

    parts = [f'<text class="title" x="0" y="14">{html.escape(title)}</text>']
    marks = ticks(y_low, y_high)
    for tick, name in zip(marks, tick_names(marks), strict=True):
        up = float(at_y(tick))
        parts.append(f'<path class="grid" d="M{left},{up:.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 6}" y="{up + 4:.1f}" text-anchor="end">{name}</text>')
    for tick in x_ticks:
        across = float(at_x(tick))
        parts.append(f'<text x="{across:.1f}" y="{height - bottom + 16}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 3}" text-anchor="end">{html.escape(x_name)}</text>')

    labels = []
    for (line, x, _), shape in zip(drawn, shapes, strict=True):
        parts.append(f'<g style="--tint: var(--{line.colour})">')
        if "low" in shape:
            there, back = path(shape["x"], shape["high"]), path(shape["x"][::-1], shape["low"][::-1])
            parts.append(f'<path class="band" d="{there}L{back[1:]}Z"/>')
            parts.append(f'<path class="raw" d="{path(shape["x"], shape["raw"])}"/>')
        for at, end, other_end in line.bars():
            a, b, c = float(at_x(at)), float(at_y(end)), float(at_y(other_end))
            drawing = f"M{a:.1f},{b:.1f}V{c:.1f}M{a - 3:.1f},{b:.1f}h6M{a - 3:.1f},{c:.1f}h6"
            parts.append(f'<path class="error" d="{drawing}"/>')
        parts.append(f'<path class="line" d="{path(shape["x"], shape["line"])}"/>')
        if len(x) <= 12:
            dots = zip(at_x(shape["x"]), at_y(shape["line"]), strict=True)
            parts.extend(f'<circle class="dot" r="3" cx="{a:.1f}" cy="{b:.1f}"/>' for a, b in dots)
        parts.append("</g>")
        last = float(shape["line"][-1])
        labels.append((float(at_y(last)), line.colour, f"{line.name} {number(last)}".strip()))
    y_free = -math.inf  # the labels at the ends of the curves are shifted so as not to overlap
    for end, colour, text in sorted(labels):
        y_free = max(end + 4, y_free + 13)
        parts.append(
            f'<text class="value" style="--tint: var(--{colour})" x="{width - right + 7}" y="{y_free:.1f}">'
            f"{html.escape(text)}</text>"
        )
    return svg(title, size, parts)


def trail(
    title: str,
    points: Sequence[tuple[float, float]],
    x_name: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    beside: Mapping[str, Sequence[tuple[float, float]]] = MappingProxyType({}),
) -> str:
    """An SVG of where a pair of measures went over a run, smoothed, from its first point (grey) to its last; "" for
    fewer than two points. beside: named curves to hold it against, in grey."""
    if len(points) < 2:
        return ""
    size = 340, 210
    width, height = size
    left, right, top, bottom = 44, 50, 30, 34
    window = max(5, len(points) // 16) if len(points) >= 8 else 1
    x, y = (thin(rolling(values, window)[0] if window > 1 else values) for values in np.array(points, dtype=float).T)
    (x_low, x_high), (y_low, y_high) = x_range, y_range

    def place(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        across = left + (np.asarray(a) - x_low) / (x_high - x_low) * (width - left - right)
        return across, top + (y_high - np.asarray(b)) / (y_high - y_low) * (height - top - bottom)

    parts = [f'<text class="title" x="0" y="14">{html.escape(title)}</text>']
    for tick in ticks(y_low, y_high):
        up = float(place(x_low, tick)[1])
        parts.append(f'<path class="grid" d="M{left},{up:.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 6}" y="{up + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in ticks(x_low, x_high):
        across = float(place(tick, y_low)[0])
        parts.append(f'<text x="{across:.1f}" y="{height - bottom + 16}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 3}" text-anchor="end">{html.escape(x_name)}</text>')

    def line(x: ArrayLike, y: ArrayLike, tint: str) -> str:
        where = [f"{a:.1f},{b:.1f}" for a, b in zip(*place(x, y), strict=True)]
        return f'<g style="--tint: var(--{tint})"><path class="line" d="M{"L".join(where)}"/></g>'

    labels = []
    for name, curve in beside.items():
        at_x, at_y = zip(*curve, strict=True)
        parts.append(line(at_x, at_y, "grey"))
        a, b = (float(each) for each in place(*curve[-1]))
        labels.append((b + 4, a + 5, name))
    y_free = -math.inf  # labels are shifted so as not to overlap
    for b, a, name in sorted(labels):
        y_free = max(b, y_free + 13)
        parts.append(f'<text x="{a:.1f}" y="{y_free:.1f}">{html.escape(name)}</text>')
    parts.append(line(x, y, "reward"))
    for at, tint, name, down in ((0, "grey", "first", 17), (-1, "reward", "last", -9)):
        a, b = (float(each) for each in place(x[at], y[at]))
        parts.append(
            f'<g style="--tint: var(--{tint})"><circle class="dot" r="4" cx="{a:.1f}" cy="{b:.1f}"/></g>'
            f'<text x="{a:.1f}" y="{b + down:.1f}" text-anchor="middle">{name}</text>'
        )
    return svg(title, size, parts)


def curves(line: Line, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """The arrays to draw for a line: x, line and, if smoothed, raw, low, high; extent: values that the axis shows."""
    if not line.smooth or len(y) < 8:
        shape = {"x": thin(x), "line": thin(y)}
        return shape | {"extent": [shape["line"]]}
    mean, spread = rolling(y, max(5, len(y) // 16))
    shape = {"x": x, "raw": y, "line": mean, "low": mean - spread, "high": mean + spread}
    shape = {name: thin(values) for name, values in shape.items()}
    # The axis shows the mean and the central 98 % of the raw values. Clipping keeps a single outlier from flattening
    # the rest.
    low, high = np.quantile(y, [0.01, 0.99])
    seen = np.clip(shape["line"], 2 * low - high, 2 * high - low)
    return shape | {"extent": [seen, np.array([low, high])]}


def histogram(title: str, first: Sequence[int], last: Sequence[int], colour: str) -> str:
    """Fractions of the scores 0, 1, 2 ... early in a run (grey) and late (in colour), side by side. first, last: counts
    per score."""
    size = 340, 190
    width, height = size
    top, bottom = 44, 22
    parts = [f'<text class="title" x="0" y="14">{html.escape(title)}</text>']
    slot = width / len(first)
    bar = slot * 0.36
    fractions = [[count / max(sum(counts), 1) for count in counts] for counts in (first, last)]
    tallest = max(max(each) for each in fractions) or 1.0
    for score in range(len(first)):
        for which, tint in ((0, "grey"), (1, colour)):
            fraction = fractions[which][score]
            tall = fraction / tallest * (height - top - bottom)
            x = slot * (score + 0.5) + (which - 1) * bar
            y = height - bottom - tall
            parts.append(
                f'<rect class="bar" style="--tint: var(--{tint})" x="{x + 1:.1f}" y="{y:.1f}" '
                f'width="{bar - 2:.1f}" height="{max(tall, 1):.1f}" rx="2"/>'
                f'<text x="{x + bar / 2:.1f}" y="{y - 4:.1f}" text-anchor="middle">{fraction:.0%}</text>'
            )
        parts.append(f'<text x="{slot * (score + 0.5):.1f}" y="{height - 5}" text-anchor="middle">{score}</text>')
    return svg(title, size, parts)


def svg(title: str, size: tuple[int, int], parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{html.escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )


def grid(title: str, drawings: Sequence[str], columns: int = 2, gap: int = 24) -> str:
    """Charts of the default size arranged in rows below a title, as one SVG."""
    size = 340, 210
    parts = [f'<text class="title" x="0" y="14">{html.escape(title)}</text>']
    for i, drawing in enumerate(drawings):
        x, y = i % columns * (size[0] + gap), 32 + i // columns * (size[1] + gap)
        inside = drawing[drawing.index(">") + 1 : drawing.rindex("</svg>")]
        parts.append(f'<g transform="translate({x},{y})">{inside}</g>')
    rows = math.ceil(len(drawings) / columns)
    whole = columns * (size[0] + gap) - gap, 32 + rows * (size[1] + gap) - gap
    return svg(title, whole, parts)


def standalone(drawing: str) -> str:
    """A chart as the text of an .svg file, for a README; it also follows the reader's light or dark setting."""
    start = '<svg xmlns="http://www.w3.org/2000/svg" '
    return drawing.replace("<svg ", start, 1).replace(">", f"><style>{palette()}{STYLE}</style>", 1) + "\n"


def text_curve(values: Sequence[float | None], width: int = 60) -> str:
    """A sparkline of at most width characters, ▁▂▃▄▅▆▇█ from the lowest value to the highest."""
    blocks = "▁▂▃▄▅▆▇█"
    y = thin(np.array([value for value in values if value is not None and math.isfinite(value)], dtype=float), width)
    if not len(y):
        return ""
    span = y.max() - y.min()
    heights = (y - y.min()) / span * (len(blocks) - 1) if span else np.full(len(y), 3.0)
    return "".join(blocks[round(height)] for height in heights)
