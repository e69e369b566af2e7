"""Confidence intervals: published numbers."""

import numpy as np
import pytest

from tinystory.evaluate.intervals import bootstrap, wilson


def test_intervals():
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)  # Newcombe 1998's formula by hand
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # his table I, method 3
    sample = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap(lambda rows: float(sample[rows].mean()), 400)
    assert (
        high - low == pytest.approx(2 * 1.96 * sample.std() / 20, rel=0.1)
        and low < sample.mean() < high
    )
