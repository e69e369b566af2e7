"""Means, standard errors, and 95 % confidence intervals of proportions and means."""

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean, stdev

Z = 1.959964  # two-sided 95 % quantile of the normal distribution
# 97.5 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom
T_QUANTILES = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there is no such value."""
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def wilson(correct: float, total: float, intervals: int = 1) -> tuple[float, float]:
    """Wilson's 95 % score interval of the proportion correct / total (Wilson 1927). correct: may
    count a tie as one half. intervals: number of intervals that hold simultaneously with a
    probability of 95 % (Bonferroni)."""
    z = NormalDist().inv_cdf(1 - 0.025 / intervals)
    p = correct / total
    square = z * z / total
    middle = (p + square / 2) / (1 + square)
    half = z * math.sqrt(p * (1 - p) / total + square / (4 * total)) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def mean_ci(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean by Student's t. For a single value, both bounds are the value."""
    middle = fmean(values)
    half = t_quantile(max(len(values), 2)) * (standard_error(values) or 0.0)
    return middle - half, middle + half


def t_quantile(values: int) -> float:
    """The 97.5 % quantile of Student's t distribution for the mean of `values` values, at least 2:
    within 2e-3 for more than 13 values (Abramowitz and Stegun 1964, 26.7.5)."""
    freedom = values - 1
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    return Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)


def with_ci(
    value: float | None, ci: Sequence[float] | None, decimals: int = 2, sign: str = ""
) -> str:
    """The value and the interval as text, such as "0.52 [0.40, 0.63]"; the value alone if ci is
    None; a dash if the value is None. sign="+" also prints plus signs."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{value:{sign}.{decimals}f}"
    if ci:
        text += f" [{ci[0]:.{decimals}f}, {ci[1]:.{decimals}f}]"
    return text


def standard_error(values: Iterable[float | None]) -> float | None:
    """Standard error of the mean of the values that are not None; None for fewer than two
    values."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    return stdev(known) / math.sqrt(len(known))


def is_within_error(values: Sequence[float | None], best: Sequence[float | None]) -> bool:
    """Whether the mean of `values` is at most one standard error below the mean of `best`. The
    standard error is that of the paired differences. Pairs with None are left out; False if no pair
    is left."""
    deficits: list[float] = []
    for value, high in zip(values, best, strict=True):
        if value is not None and high is not None:
            deficits.append(high - value)
    return bool(deficits) and fmean(deficits) <= (standard_error(deficits) or 0.0)
