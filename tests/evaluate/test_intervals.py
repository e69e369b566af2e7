"""Rank correlation: the numbers of scipy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystory.evaluate.intervals import spearman

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
