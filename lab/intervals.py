"""Intervals of a mean over a few seeds, and bootstrap intervals for other statistics."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from tinystory.run.errors import UserError

RESAMPLES = 1000
# 97.5 % quantiles of Student's t distribution by degrees of freedom
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


class Interval(NamedTuple):
    """A mean with half the length of its 95 % interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """The mean, and half the length of its 95 % interval, by Student's t distribution."""
    half = T_QUANTILES[len(values) - 1] * stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values), half)


def require_interval(option: str, count: int) -> None:
    """Raises UserError unless `interval` takes as many values as the option has."""
    most = max(T_QUANTILES) + 1
    if not 2 <= count <= most:
        raise UserError(f"{option} must be 2 to {most} for an interval, not {count}")


def bootstrap(statistic: Callable[[np.ndarray], float], size: int) -> tuple[float, float]:
    """Percentile bootstrap interval of statistic(rows), where rows are `size` row indices drawn
    with replacement (fixed seed). Resamples with a statistic of nan are left out; if all are nan,
    both ends are nan."""
    rng = np.random.default_rng(0)
    resamples = [rng.integers(size, size=size) for _ in range(RESAMPLES)]
    values = np.array([statistic(rows) for rows in resamples])
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_mean(values: np.ndarray) -> tuple[float, float]:
    """The bootstrap interval of the mean."""
    return bootstrap(lambda rows: float(values[rows].mean()), len(values))
