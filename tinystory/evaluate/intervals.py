"""95 % confidence intervals of proportions and statistics, their printing, and standard errors."""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import stdev

import numpy as np

Z = 1.959964  # two-sided 95 % quantile of the normal distribution
RESAMPLES = 1000


def wilson(correct: float, total: int) -> tuple[float, float]:
    """Wilson's score interval for the proportion correct / total (Wilson 1927). A tie may count one
    half."""
    p = correct / total
    square = Z * Z / total
    middle = (p + square / 2) / (1 + square)
    half = Z * math.sqrt(p * (1 - p) / total + square / (4 * total)) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(statistic: Callable[[np.ndarray], float], size: int) -> tuple[float, float]:
    """Percentile bootstrap interval of statistic(rows), with `size` row indices drawn with
    replacement (fixed seed). Resamples for which it is nan are left out; both ends are nan if it
    always is."""
    rng = np.random.default_rng(0)
    resamples = [rng.integers(size, size=size) for _ in range(RESAMPLES)]
    values = np.array([statistic(rows) for rows in resamples])
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def mean_ci(values: np.ndarray) -> tuple[float, float]:
    return bootstrap(lambda rows: float(values[rows].mean()), len(values))


def with_ci(
    value: float | None, ci: Sequence[float] | None, decimals: int = 2, sign: str = ""
) -> str:
    """Formats 0.52 [0.40, 0.63], the value alone without an interval, a dash for None. sign="+"
    prints every sign."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{value:{sign}.{decimals}f}"
    if ci:
        text += f" [{ci[0]:.{decimals}f}, {ci[1]:.{decimals}f}]"
    return text


def standard_error(values: Iterable[float | None]) -> float | None:
    """Of the mean of the values that are not None; None for fewer than two."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    return stdev(known) / math.sqrt(len(known))
