"""95 % confidence intervals of proportions and statistics, and their printing."""

import math
from collections.abc import Callable, Sequence

import numpy as np

Z = 1.959964  # two-sided 95 % quantile of the normal distribution
RESAMPLES = 1000


def wilson(correct: float, total: int) -> tuple[float, float]:
    """Wilson's score interval for the proportion correct / total (Wilson 1927). A tie may count one
    half."""
    p, square = correct / total, Z * Z / total
    middle = (p + square / 2) / (1 + square)
    half = Z * math.sqrt(p * (1 - p) / total + square / (4 * total)) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(statistic: Callable[[np.ndarray], float], size: int) -> tuple[float, float]:
    """Percentile bootstrap interval of statistic(rows), with `size` row indices drawn with
    replacement (fixed seed). Resamples for which it is nan are left out; both ends are nan if it
    always is."""
    rng = np.random.default_rng(0)
    values = np.array([statistic(rng.integers(size, size=size)) for _ in range(RESAMPLES)])
    values = values[~np.isnan(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (np.nan, np.nan)
    return float(low), float(high)


def mean_ci(values: np.ndarray) -> tuple[float, float]:
    return bootstrap(lambda rows: float(values[rows].mean()), len(values))


def mean_and_ci(values: np.ndarray) -> tuple[float | None, tuple[float, float] | None]:
    """The mean of (n,) values, without nans, and its bootstrap interval; (None, None) if there are
    none."""
    values = values[~np.isnan(values)]
    return (float(values.mean()), mean_ci(values)) if len(values) else (None, None)


def with_ci(
    value: float | None, ci: Sequence[float] | None, decimals: int = 2, sign: str = ""
) -> str:
    """Formats 0.52 [0.40, 0.63], the value alone without an interval, a dash for None. sign="+"
    prints every sign."""
    if value is None:
        return "\N{EN DASH}"
    ends = f" [{ci[0]:.{decimals}f}, {ci[1]:.{decimals}f}]" if ci else ""
    return f"{value:{sign}.{decimals}f}{ends}"
