"""lab/gain.py: the gain of each student, its intervals over seeds, and the fits."""

import json
import math
import re

import numpy as np
import pytest
from conftest import fails

from lab import gain, recipes
from tinystory.student import checkpoint

OPTIONS = "--temperature 0.5"
ARGV = ["--words", "400", "800", "--seeds", "1", "2", "3"]
ARGV += ["--options", OPTIONS, f"shuffled: {OPTIONS}", f"mean: {OPTIONS}"]


def record(words, seed):
    """A student with a gain of 0.1, plus the standard deviation, plus half of the headroom."""
    deviation, mean = 0.01 * seed + words / 10_000, 0.2 * seed
    gained = 0.1 + deviation + (1 - mean) / 2
    rows = {}
    for name, coherences in {
        "before, temperature 0.5": [-0.5, None],
        "before, temperature 0.4": [-0.6, -0.6],
        gain.BEST_OF_4: [-0.5, -0.4],
        gain.ENDED_OF_4: [-0.5, -0.4],
        gain.BEST_OF_4_LOWER: [-0.4, -0.4],
        gain.BEST_OF_4_AFTER: [-0.3, -0.2],
        "the demo": [gained - 0.5, 3.0],
        "`shuffled: `": [-0.25, 7.0],
        "`mean: `": [-0.05, 7.0],
    }.items():
        coherence = float(np.mean([value for value in coherences if value is not None]))
        rows[name] = {
            "coherences": coherences,
            "coherence": coherence,
            "clusters": 50 + 10 * (name == "the demo"),
            "ended": 0.5,
            "rewards": [0.1, 0.2],
        }
    arms = ["the demo", "`shuffled: `", "`mean: `"]
    return dict(seed=seed, rows=rows, arms=arms, score_std=deviation, score_mean=mean)


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(gain, "Reader", lambda name: None)
    monkeypatch.setattr(
        gain, "train_and_measure", lambda out, seed, *_: record(int(out.name), seed)
    )


def test_the_gain_is_paired_by_opening_and_its_interval_is_over_seeds(measured, tmp_path, capsys):
    gain.main(["--out", str(tmp_path), *ARGV])
    students = json.loads((tmp_path / "gain.json").read_text())
    assert [(student["words"], student["seed"]) for student in students] == [
        (words, seed) for words in (400, 800) for seed in (1, 2, 3)
    ]
    for student in students:
        assert student["before"] == "before, temperature 0.5"
        # the second opening has no coherence before, so it counts for no gain
        assert student["gain"]["`shuffled: `"] == pytest.approx(0.25)
        assert student["gain"][gain.BEST_OF_4] == pytest.approx(0)
        assert student["gain"]["before, temperature 0.4"] == pytest.approx(-0.1)
        expected = 0.1 + student["score_std"] + (1 - student["score_mean"]) / 2
        assert student["gain"]["the demo"] == pytest.approx(expected)
        assert "rewards" not in student["rows"]["the demo"]
    printed = capsys.readouterr().out
    # the gains of three seeds are 0.09 apart: 4.303 * 0.09 / sqrt(3)
    assert "0.460 ± 0.224" in printed and "0.250 ± 0.000" in printed
    more = "0.230 ± 0.224, and 10.000 ± 0.000 clusters, over the seeds"
    assert f"interaction above `shuffled: `: {more}" in printed
    more = "0.200 ± 0.000, and 0.000 ± 0.000 clusters, over the seeds"
    assert f"the mean of two interactions above `shuffled: `: {more}" in printed
    assert "gain = 0.100 +1.000 * standard deviation +0.500 * headroom: R-squared 1.00" in printed
    for name in ("coherence.svg", "gain.svg", "clusters.svg"):
        assert (tmp_path / name).read_text().startswith("<svg xmlns")


def test_a_row_with_more_clusters_and_coherence_is_right_of_the_others_and_above():
    before = "before, temperature 0.5"
    students = [record(100, seed) | {"gain": {"the demo": 0.1 * seed}} for seed in (1, 2)]
    svg = gain.draw_clusters(students, before, {"the demo": "after <b>"}, ["after <b>"])
    points = re.findall(r'--(\w+)\)" r="4" cx="([\d.]+)" cy="([\d.]+)"', svg)
    (grey, *before), (tint, *after) = points
    assert (grey, tint) == ("grey", "reward")
    assert float(after[0]) > float(before[0]) and float(after[1]) < float(before[1])
    assert ">before</text>" in svg and ">after &lt;b&gt;</text>" in svg


def test_words_equivalent_is_on_the_students_own_curve():
    curve = [(100, -0.8), (400, -0.4), (1600, -0.3)]
    for coherence, words in {-0.9: 100, -0.6: 200, -0.4: 400, -0.35: 800, -0.2: None}.items():
        assert gain.words_equivalent(curve, 100, coherence) == pytest.approx(words)
    assert gain.words_equivalent(curve, 400, -0.6) == 400  # worse than before
    assert gain.shown_ratio([]) == "above the curve"
    assert gain.shown_ratio([0.0]) == "1.00"
    # logarithms 0.1 apart: 12.706 * 0.1 / 2
    assert gain.shown_ratio([math.log(2), math.log(2) + 0.1]) == "2.10 [1.11, 3.97]"


def test_a_lines_name_is_what_differs_from_the_interaction():
    interaction = "`--steps 8 --reward lab/two_judges.py`"
    assert gain.short_name("`shuffled: --steps 8`", interaction) == "shuffled"
    assert gain.short_name("`--steps 8 --reward likelihood`", interaction) == "likelihood"
    assert gain.short_name("`mean: --steps 2 --reward likelihood`", interaction) == (
        "mean 2 likelihood"
    )


def test_the_mean_of_an_interaction_has_the_same_options():
    assert gain.is_mean_of("`mean: --steps 8`", "`--steps 8`")
    assert gain.is_mean_of("`mean:`", "the demo")
    assert not gain.is_mean_of("`mean: --steps 2`", "`--steps 8`")
    assert not gain.is_mean_of("`shuffled: --steps 8`", "`--steps 8`")


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--words", "400", "--seeds", "1"], "--seeds needs two seeds or more"),
        (
            ["--words", "400", "--seeds", "1", "2", "--options", "mean: "],
            "give its `mean:` as a later",
        ),
        (["--words", "0", "--seeds", "1", "2"], "--words must be"),
        (["--words", "400", "--seeds", "1", "2", "--options", "--lam 7"], "--lam must be"),
        (
            ["--words", "400", "--seeds", "1", "2", "--options", "--temperature 0"],
            "needs a --temperature above 0",
        ),
    ],
)
def test_options_are_checked_before_the_first_run(argv, complaint, measured, tmp_path, capsys):
    assert complaint in fails(gain.main, ["--out", str(tmp_path / "out"), *argv], capsys)
    assert not (tmp_path / "out").exists()


def test_a_student_is_measured_once(place, tmp_path, monkeypatch):
    """The first scores are the interaction's, and the row at temperature 1 needs no reader."""
    start = checkpoint.newest(place / "p")
    run = tmp_path / "run"
    run.mkdir()
    scores = {1: [0.3, None, 0.5, 0.7], 2: [0.9]}
    stories = [{"step": step, "score": score} for step in scores for score in scores[step]]
    monkeypatch.setattr(gain, "read_stories", lambda folder: iter(stories) if folder == run else [])
    rows = [
        recipes.Row("before interaction", start, n=4),
        recipes.Row("best of 4 by likelihood", start, n=4, chosen_by="likelihood"),
        recipes.Row("before, temperature 0.5", start, 0.5),
        recipes.Row("the demo", run),
    ]
    monkeypatch.setattr(recipes, "train_students", lambda *_: rows)
    monkeypatch.setattr(recipes, "unseen_texts", lambda config: [f"unseen by {config.seed}"])
    calls = []

    def measure(row, grader, config, openings, reader, unseen, rubric):
        calls.append((row.name, row.n, row.temperature, reader))
        assert (rubric is None) == (row.name not in gain.CHOSEN)
        assert unseen == ["unseen by 1"]
        return {"coherence": len(openings)}

    monkeypatch.setattr(recipes, "measure", measure)
    arms = {"": recipes.arm_of("")}
    argv = ["--corpus", str(place / "corpus.txt")]
    teaching = gain.interact_config(["--temperature", "0.5"])
    out = tmp_path / "out"
    out.mkdir()
    student = gain.train_and_measure(out, 1, argv, arms, teaching, "reader", 5)
    assert calls == [
        ("before interaction", 4, 1.0, None),
        ("before, temperature 0.5", 1, 0.5, "reader"),
        ("the demo", 1, 1.0, "reader"),
        (gain.BEST_OF_4, 4, 0.5, "reader"),
        (gain.ENDED_OF_4, 4, 0.5, "reader"),
        (gain.BEST_OF_4_LOWER, 4, 0.4, "reader"),
        (gain.BEST_OF_4_AFTER, 4, 1.0, "reader"),
    ]
    assert (student["score_std"], student["score_mean"]) == pytest.approx((0.2, 0.5))
    assert student["arms"] == ["the demo"] and student["rows"]["the demo"]["coherence"] == 5
    calls.clear()
    assert (
        gain.train_and_measure(out, 1, argv, arms, teaching, "reader", 5) == student and not calls
    )
