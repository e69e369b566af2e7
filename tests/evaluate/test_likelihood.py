"""The controls that need no grade: a student's own likelihood as the score, and a constant."""

import json

import pytest
from conftest import SHORT, metrics

import train_interact as interact
from tinystory.config import InteractConfig
from tinystory.evaluate.scoring import MEAN, Likelihood
from tinystory.student import checkpoint
from tinystory.teacher.callable import load_score


def test_likelier_stories_score_higher(place):
    student, tokenizer, _ = checkpoint.load(checkpoint.newest(place / "p"))
    scores = Likelihood(
        student, tokenizer, ["Once upon a time,"], InteractConfig(max_new_tokens=16)
    )
    likely, unlikely = "Tom had a ball. Tom took the ball to the park.", "zyx qvw Jjj kkkx! 7 7 zq."
    better, worse, none = scores(["Once upon a time,"] * 3, [likely, unlikely, ""])
    assert 1 >= better > MEAN > worse >= 0 and none is None
    assert scores(["Once upon a time,"], [likely]) == [pytest.approx(better)]


def test_a_constant_is_the_same_for_all():
    with load_score("constant") as score:
        assert score(["Once"] * 3, ["One.", "Two.", ""]) == [0.5] * 3


@pytest.mark.parametrize("reward", ["likelihood", "constant"])
def test_a_run_learns_from_a_control(place, tmp_path, reward):
    init = ["--init", str(checkpoint.newest(place / "p")), *SHORT, "--steps", "2"]
    interact.main([*init, "--reward", reward, "--out", str(tmp_path / "i")])
    assert [record["unscored"] for record in metrics(tmp_path / "i")] == [0, 0]
    assert (
        json.loads((tmp_path / "i" / "config.json").read_text())["options"]["scored_by"] == reward
    )
