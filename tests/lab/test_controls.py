"""lab/controls.py: what each control changes in a run, and that it changes nothing afterwards."""

import pytest
from conftest import SHORT, metrics, read_lines

import train_interact
from lab import controls, verdicts
from tinystory.evaluate.control import Comparison
from tinystory.run.errors import UserError


def run_of(place, out, control):
    """A run with sixteen of forty stories graded, by their number of letters, under a control."""
    letters = out.parent / "letters.py"
    letters.write_text(
        "def score(opening, stories):\n    return [(1 + len(s)) / 1000 for s in stories]\n"
    )
    flags = ["--reward", str(letters), "--grades", "16", "--steps", "2", "--diversity", "0"]
    flags += ["--stories-per-step", "20", "--length-weight", "0", "--unfinished", "1"]
    with controls.CHANGES[control]():
        train_interact.main([*SHORT, *flags, "--init", str(place / "p"), "--out", str(out)])
    return read_lines(out / "stories.jsonl")


def graded(stories):
    return [story for story in stories if story["reply"] == ""]


def test_a_random_choice_is_another_one_and_repeats_itself(place, tmp_path):
    runs = [
        run_of(place, tmp_path / name, control)
        for name, control in [("a", "random choice"), ("b", "random choice"), ("c", "")]
    ]
    one, again, chosen = ([story["index"] for story in graded(stories[:20])] for stories in runs)
    assert one == again and len(one) == len(chosen) == 8


def test_without_a_model_only_graded_stories_have_a_reward(place, tmp_path):
    stories = run_of(place, tmp_path / "a", "no model")
    assert len(graded(stories)) == 16
    assert all((story["reward"] is None) == (story["reply"] != "") for story in stories)
    assert "predicted" not in metrics(tmp_path / "a")[0]
    stories = run_of(place, tmp_path / "b", "")  # the control is over
    assert all(story["reward"] is not None for story in stories)


def test_a_control_stands_before_the_options():
    assert controls.split("--lam 0.9") == ("", "--lam 0.9")
    assert controls.split("") == ("", "")
    assert controls.split("shuffled: --grades 64") == ("shuffled", " --grades 64")
    assert controls.split("mean: --grades 64") == ("mean", " --grades 64")
    assert controls.split("--teacher-url http://127.0.0.1:9")[0] == ""
    with pytest.raises(UserError, match="'mixed' is not a control: give one of shuffled"):
        controls.split("mixed: --grades 64")


def test_verdicts_are_counted_by_measure(capsys):
    """Three controls that differ much, and a first control far below the run."""

    def measures(words):
        return {"words": [words - 0.1, words, words + 0.1]}

    controls = [measures(words) for words in (1.0, 5.0, 9.0)]
    one = Comparison("shuffled", 40, measures(0.0), measures(5.0), controls, controls)
    verdicts.print_table([one, one])
    assert capsys.readouterr().out.splitlines()[-1] == "| words | 0 | 0 | 0 | 2 | 2 |"
