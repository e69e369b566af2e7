"""Rank correlation: the numbers of scipy. Intervals: published numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystory.evaluate.intervals import bootstrap, spearman, weighted, wilson

TABLES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=60)


@given(TABLES)
def test_spearman_is_scipys(pairs):
    stats = pytest.importorskip("scipy.stats", reason="pip install 'tinystory[test]'")
    a, b = np.array(pairs, dtype=float).T
    ours = spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_intervals():
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)  # Newcombe 1998's formula by hand
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # his table I, method 3
    mean, (low, high) = weighted([(50, 100)], [1.0])
    assert mean == 0.5
    assert (low + high) / 2 == pytest.approx(0.5) and high - low == pytest.approx(
        2 * 1.96 * math.sqrt(0.25 / 104), rel=1e-3
    )
    sample = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap(lambda rows: float(sample[rows].mean()), 400)
    assert (
        high - low == pytest.approx(2 * 1.96 * sample.std() / 20, rel=0.1)
        and low < sample.mean() < high
    )
