"""95 % confidence intervals: for a proportion, a weighted mean of proportions, and any statistic of a sample."""

import math
from collections.abc import Callable, Sequence

import numpy as np

Z = 1.959964  # two-sided 95 % quantile of the normal distribution
RESAMPLES = 1000


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's score interval for the proportion correct / total (Wilson 1927)."""
    p, square = correct / total, Z * Z / total
    middle = (p + square / 2) / (1 + square)
    half = Z * math.sqrt(p * (1 - p) / total + square / (4 * total)) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def weighted(counts: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """Normal interval for sum(weight * correct / total) over independent proportions; counts: (correct, total, weight).

    The variance adds two successes and two failures to each proportion (Agresti and Coull), so that a proportion of 0
    or 1 does not count as certain."""
    middle = sum(weight * correct / total for correct, total, weight in counts)
    variance = 0.0
    for correct, total, weight in counts:
        p = (correct + 2) / (total + 4)
        variance += weight**2 * p * (1 - p) / (total + 4)
    half = Z * math.sqrt(variance)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(statistic: Callable[[np.ndarray], float], size: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile bootstrap interval for statistic(rows), where rows are `size` indices drawn with replacement (fixed
    seed)."""
    rng = np.random.default_rng(0)
    values = [statistic(rng.integers(size, size=size)) for _ in range(resamples)]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
