"""Which student of an interaction is the best."""

import json

from conftest import SHORT, metrics, read_lines
from runs import interrupted_at, run_interact

import train_interact as interact
from tinystory.evaluate import held_out
from tinystory.rl.reward import story_rewards
from tinystory.student import checkpoint


def test_without_graded_evaluations_the_best_student_is_the_last(place, tmp_path, capsys):
    """Evaluations are written and read, but not graded."""
    flags = ["--no-eval-graded", "--grades", "8", "--stories-per-step", "9", "--steps", "2"]
    reward = ["--reward", f"{place / 'reward.py'}"]
    out = tmp_path / "i"
    interact.main(["--init", str(place / "p"), *SHORT, *reward, *flags, "--out", str(out)])
    evaluations = read_lines(out / "evaluations.jsonl")
    assert [record["step"] for record in evaluations] == [0] * 4 + [2] * 4
    assert {record["reward"] for record in evaluations} == {None}
    assert {record["reply"] for record in evaluations} == {"the teacher was not asked"}
    assert metrics(out)[-1]["held_out_reward"] is None
    shown = checkpoint.find(out)
    assert shown.name == "best"
    assert json.loads((shown / "trainer.json").read_text())["step"] == 2
    assert {record["step"] for record in read_lines(out / "samples.jsonl")} == {0, 2}
    assert "4 stories for held-out openings" in capsys.readouterr().out
    assert [record["scored"] for record in metrics(out)] == [8, 0]
    assert [record["predicted"] for record in metrics(out)] == [1, 9]


def test_the_best_student_is_the_latest_that_none_clearly_beats():
    def evaluation(step, *rewards):
        return [{"step": step, "index": i, "reward": reward} for i, reward in enumerate(rewards)]

    first = evaluation(0, 0.1, 0.4, 0.2, 0.3)
    assert held_out.is_best(first, 0)
    higher, lower = evaluation(4, 0.5, 0.5, 0.5, 0.5), evaluation(4, 0.0, 0.3, 0.1, 0.2)
    assert held_out.is_best(first + higher, 4) and not held_out.is_best(first + lower, 4)
    # 0.14 less on average, with a standard error of 0.16; then 0.15 with one of 0.12.
    assert held_out.is_best(first + higher + evaluation(8, 0.5, 0.5, 0.55, -0.1), 8)
    assert not held_out.is_best(first + higher + evaluation(8, 0.4, 0.5, 0.5, 0.0), 8)
    # The highest evaluation counts, not the last: small steps down add up.
    down = [
        *first,
        *higher,
        *evaluation(8, 0.45, 0.5, 0.5, 0.45),
        *evaluation(12, 0.4, 0.45, 0.45, 0.4),
    ]
    assert not held_out.is_best(down, 8) and not held_out.is_best(down, 12)
    unscored = evaluation(8, None, 0.5, None, 0.5)
    assert held_out.is_best(first + higher + unscored, 8)
    assert not held_out.is_best(first + evaluation(8, None, None), 8)


def test_the_best_student_is_none_whose_mean_is_below_that_of_the_start():
    def evaluation(step, *rewards):
        return [{"step": step, "index": i, "reward": reward} for i, reward in enumerate(rewards)]

    first = evaluation(0, 0.8, 0.3, 0.7, 0.4)
    # 0.05 less on average, with a standard error of 0.17
    fallen = evaluation(4, 0.4, 0.6, 0.3, 0.7)
    assert not held_out.is_best(first + fallen, 4)
    assert held_out.is_best(first + evaluation(4, 0.4, 0.8, 0.3, 0.7), 4)  # the same mean
    higher = evaluation(4, 0.9, 0.4, 0.8, 0.5)
    assert held_out.is_best(first + higher + evaluation(8, 0.5, 0.9, 0.4, 0.7), 8)
    assert not held_out.is_best(first + higher + evaluation(8, 0.4, 0.9, 0.4, 0.4), 8)
    # There is no such bound if the start has no reward.
    unscored = evaluation(0, None, None, None, None)
    assert not held_out.is_best(unscored, 0) and held_out.is_best(unscored + fallen, 4)


def test_a_run_that_falls_keeps_the_start_as_the_best_student(place, tmp_path, capsys, monkeypatch):
    """Also resumed; with falls within a standard error."""
    rewards = [[0.8, 0.3, 0.7, 0.4], [0.4, 0.6, 0.3, 0.7], [0.3, 0.7, 0.3, 0.7]]
    done = []

    def falling(config, stories, *more):
        if stories[0].index < held_out.FIRST_INDEX:
            return story_rewards(config, stories, *more)
        done.append(stories)
        return rewards[(len(done) - 1) % 3]

    monkeypatch.setattr(held_out, "story_rewards", falling)
    run_interact(place, tmp_path / "whole")
    with interrupted_at(interact, step=3):
        run_interact(place, tmp_path / "parts")
    run_interact(place, tmp_path / "parts", "--resume")
    printed = capsys.readouterr().out
    assert printed.count("The run did not help") == 2 and len(done) == 6
    for name in ("whole", "parts"):
        best = checkpoint.find(tmp_path / name)
        assert best.name == "best" and checkpoint.read_counters(best)["step"] == 0
        newest = checkpoint.read_counters(checkpoint.newest(tmp_path / name))
        assert newest["step"] == 4 and newest["best_step"] == 0
        lines = (tmp_path / name / "samples.jsonl").read_text().splitlines()
        assert {json.loads(line)["step"] for line in lines} == {0}
