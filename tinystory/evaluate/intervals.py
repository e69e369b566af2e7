"""Means, 95 % confidence intervals of proportions and means, their printing, and standard
errors."""

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean, stdev

Z = 1.959964  # two-sided 95 % quantile of the normal distribution


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def wilson(correct: float, total: float, intervals: int = 1) -> tuple[float, float]:
    """Wilson's score interval for the proportion correct / total (Wilson 1927). A tie may count one
    half. With several intervals, all of them together are right with a probability of 95 %
    (Bonferroni)."""
    z = NormalDist().inv_cdf(1 - 0.025 / intervals)
    p = correct / total
    square = z * z / total
    middle = (p + square / 2) / (1 + square)
    half = z * math.sqrt(p * (1 - p) / total + square / (4 * total)) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def mean_ci(values: Sequence[float]) -> tuple[float, float]:
    """The normal interval of the mean; the value alone if there is only one."""
    middle = fmean(values)
    half = Z * (standard_error(values) or 0.0)
    return middle - half, middle + half


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


def is_within_error(values: Sequence[float | None], best: Sequence[float | None]) -> bool:
    """Whether the mean of the values is at most a standard error below that of the best ones, pair
    by pair. Pairs with None are left out; False without any other."""
    deficits: list[float] = []
    for value, high in zip(values, best, strict=True):
        if value is not None and high is not None:
            deficits.append(high - value)
    return bool(deficits) and fmean(deficits) <= (standard_error(deficits) or 0.0)
