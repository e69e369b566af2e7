"""Confidence intervals: published numbers."""

import pytest

from tinystory.evaluate.intervals import mean_ci, t_quantile, wilson


def test_intervals():
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)  # Newcombe 1998's formula by hand
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # his table I, method 3
    assert mean_ci([1.0, 3.0]) == pytest.approx((2 - 12.71, 2 + 12.71))
    # the tables of Student's t
    for freedom, quantile in {1: 12.71, 12: 2.179, 13: 2.160, 30: 2.042, 120: 1.980}.items():
        assert t_quantile(freedom + 1) == pytest.approx(quantile, abs=2e-3)
    assert mean_ci([4.0]) == (4.0, 4.0)
