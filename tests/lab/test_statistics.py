"""Rank correlation: the numbers of scipy. The mean of several proportions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.pairs import spearman, weighted

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


def test_the_interval_of_one_proportion_is_agrestis_and_coulls():
    mean, (low, high) = weighted([(50, 100)], [1.0])
    assert mean == 0.5 and (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 104), rel=1e-3)
