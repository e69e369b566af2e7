"""Bootstrap intervals for statistics without a formula for the interval."""

import math
from collections.abc import Callable

import numpy as np

RESAMPLES = 1000


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
