"""Intervals of a mean over a few seeds, and bootstrap intervals for other statistics."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from tinystory.evaluate.intervals import t_quantile

RESAMPLES = 1000


class Interval(NamedTuple):
    """A mean with half the length of its 95 % interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """The mean, and half the length of its 95 % interval, by Student's t distribution."""
    half = t_quantile(len(values)) * stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values), half)


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
