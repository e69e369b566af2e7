"""95 % intervals: of a share, of a mean of shares, of any statistic of a sample."""

import math
from collections.abc import Callable, Sequence

import numpy as np

Z = 1.959964  # of the normal distribution, 95 % two-sided
RESAMPLES = 1000


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927)."""
    share, square = correct / total, Z * Z / total
    middle = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / total + square / (4 * total)) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def weighted(counts: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """Of sum(weight * correct / total) over independent shares, counts being (correct, total, weight): normal, with
    Agresti and Coull's two more of each outcome in the variance, so that a share of 0 or 1 is not taken as certain."""
    middle = sum(weight * correct / total for correct, total, weight in counts)
    variance = 0.0
    for correct, total, weight in counts:
        share = (correct + 2) / (total + 4)
        variance += weight**2 * share * (1 - share) / (total + 4)
    half = Z * math.sqrt(variance)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(statistic: Callable[[np.ndarray], float], size: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The percentile bootstrap of statistic(rows), rows being `size` indices drawn with replacement; seeded."""
    rng = np.random.default_rng(0)
    values = [statistic(rng.integers(size, size=size)) for _ in range(resamples)]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
