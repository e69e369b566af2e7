"""scripts/recipes.py: what it measures of a student, and which stories are the best of several."""

import dataclasses
import math

import pytest
from conftest import fails

from scripts import recipes
from tinystory.data.openings import Openings
from tinystory.ops.compute import resolve
from tinystory.student import checkpoint
from tinystory.teacher.callable import CallableGrader

COUNT = 24


@pytest.fixture
def measures(place, monkeypatch):
    monkeypatch.setattr(recipes, "CONFIG", dataclasses.replace(recipes.CONFIG, max_new_tokens=12, diversity=0.0))
    monkeypatch.setattr(recipes, "resolve", lambda *_: resolve("cpu", "float32", "none"))
    monkeypatch.setattr(recipes, "OPENINGS", Openings(["Once", "Tom", "Mia had"], 0))
    start = checkpoint.newest(place / "p")
    grader = CallableGrader(lambda opening, stories: [min(len(set(s)) / 30, 1.0) for s in stories], "letters")
    return lambda **how: recipes.measure(recipes.Row("", start, **how), start, grader, COUNT)


def test_options_that_are_no_command_line_are_one_sentence(tmp_path, capsys):
    line = fails(recipes.main, ["--out", str(tmp_path / "r"), "--options", "'unclosed"], capsys)
    assert "--options: no closing quotation" in line and not (tmp_path / "r").exists()


def test_the_untouched_student_is_at_no_distance_and_a_lower_temperature_is(measures):
    plain, cooler = measures(), measures(temperature=0.5)
    assert abs(plain["kl"]) < 0.01 < cooler["kl"] and plain["seconds"] == 0
    assert plain["he_or_she"] is None or 0 <= plain["he_or_she"] <= 1
    assert set(plain) == set(cooler) and plain["held_out_words"] > 0


def test_the_best_of_several_is_by_reward_or_by_likelihood(measures):
    plain, graded, ungraded = measures(), measures(n=4, graded=True), measures(n=4)
    assert graded["reward"] >= ungraded["reward"]  # of the same candidates
    # Held-out stories by the plain student are the first of theirs, and of 24 one at least is not the best of its four.
    assert graded["held_out_reward"] > plain["held_out_reward"]
    assert ungraded["held_out_ended"] >= plain["held_out_ended"]
    assert graded["kl"] == pytest.approx(plain["kl"] + math.log(4) - 0.75, abs=0.02)  # of other stories
