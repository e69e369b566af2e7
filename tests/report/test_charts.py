"""The plots: well-formed, inside their frames, and true to the numbers."""

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystory.report.charts import Line, chart, number, padded_range, text_curve, thin, ticks

values = st.floats(-1e9, 1e9, allow_nan=False)


@given(st.lists(st.none() | values, max_size=600), st.text())
def test_any_curve_is_well_formed_and_inside_its_frame(y, title):
    title = "".join(c for c in title if c.isprintable())
    drawing = chart(title, [Line(range(len(y)), y, name="<&>")])
    if all(value is None for value in y):
        assert drawing == ""
        return
    check_inside(drawing)


def test_a_curve_of_the_smallest_numbers_is_flat():
    check_inside(chart("loss", [Line(range(2), [0.0, 5e-324])]))
    check_inside(chart("loss", [Line(range(3), [-5e-324, 0.0, 1e-310])]))


def check_inside(drawing):
    root = ElementTree.fromstring(drawing)
    for path in root.iter("path"):
        for pair in path.get("d").strip("MZ").split("L") if "H" not in path.get("d") else ():
            a, b = map(float, pair.split(","))
            assert 43 <= a <= 341 and 29 <= b <= 211


def test_a_small_change_looks_small():
    """From 154 to 149 the line spans about a twentieth of the axis; from 1 to 5, most of the
    axis."""
    low, high = padded_range(np.array([154.0, 149.0]))
    assert low <= 149 and high >= 154 and 5 / (high - low) < 0.2
    low, high = padded_range(np.array([1.0, 5.0]))
    assert 4 / (high - low) > 0.7


def test_one_wild_step_neither_flattens_the_curve_nor_leaves_the_frame():
    wild = [step / 200 + 1e6 * (step == 150) for step in range(200)]
    check_inside(drawing := chart("KL", [Line(range(200), wild)]))
    line = re.search(r'class="line" d="M([^"]+)"', drawing)[1]
    heights = [float(pair.split(",")[1]) for pair in line.split("L")]
    assert heights[0] - heights[42] > 40  # of the 146 there are; in SVG y grows downwards


@given(values, st.floats(1e-6, 1e9))
def test_ticks_are_even_round_and_inside(low, span):
    if low + span == low or span < 1e-6 * abs(low):
        return
    marks = ticks(low, low + span)
    assert 3 <= len(marks) <= 13
    slack = span * 1e-4
    assert low - slack <= marks[0] and marks[-1] <= low + span + slack
    steps = np.diff(marks)
    assert np.allclose(steps, steps[0], rtol=1e-2)


@given(values, st.floats(0, 1e9))
def test_ticks_of_a_fitted_axis_are_told_apart(low, span):
    names = [number(tick) for tick in ticks(*padded_range(np.array([low, low + span])))]
    assert len(set(names)) == len(names)


@given(st.lists(values, min_size=1, max_size=500), st.integers(1, 50))
def test_thin_keeps_the_level(y, limit):
    y = np.array(y)
    small = thin(y, limit)
    assert len(small) == min(len(y), limit)
    assert y.min() - 1e-6 <= small.min() and small.max() <= y.max() + 1e-6
    if len(y) <= limit:
        assert (small == y).all()


def test_text_curve():
    assert text_curve([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert text_curve([1, None, math.nan, 2]) == "▁█"
    assert text_curve([]) == "" and text_curve([None]) == ""
    assert text_curve([5.0] * 3) == "▄▄▄"
    long = text_curve(range(1000), 40)
    assert len(long) == 40 and list(long) == sorted(long) and long[0] == "▁" and long[-1] == "█"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-3, "-3"),
        (0.61803, "0.618"),
        (12.345, "12.3"),
        (999.7, "1,000"),
        (4321, "4,321"),
        (99_949, "99,949"),
        (123_456, "123k"),
        (999_700, "1M"),
        (12_345_678, "12.3M"),
        (5e9, "5B"),
        (5e13, "50,000B"),
        (0.0004, "0.0004"),
        (1.23e-12, "1.23e-12"),
        (None, "\N{EN DASH}"),
    ],
)
def test_numbers_for_people(value, text):
    assert number(value) == text
