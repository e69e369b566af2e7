"""How an interaction ends: stopped, killed, out of budget, collapsed, and resumed."""

import json
import re
import shutil
import signal

import pytest
from conftest import SHORT, assert_same_bits, fails, metrics, read_lines
from runs import run_interact, spoiling, stops_by

import train_interact as interact
from tinystory.evaluate import held_out
from tinystory.run.collapse import CollapseDetector
from tinystory.run.log import RunLog
from tinystory.run.records import EVALUATIONS, read_records
from tinystory.student import checkpoint
from tinystory.teacher.callable import CallableGrader


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("interaction") / "whole"
    run_interact(place, folder)
    return folder


def test_weights_that_are_not_finite_are_not_saved_by_interaction(
    place, tmp_path, monkeypatch, capsys
):
    """Nor is a student with such weights evaluated, and other options let the run continue."""
    argv = ["--init", str(place / "p"), *SHORT, "--save-every", "1", "--reward", "constant"]
    argv += ["--out", str(tmp_path / "i")]
    with monkeypatch.context() as patch:
        step = spoiling(interact.ppo.step, 2, lambda policy: policy.student)
        patch.setattr(interact.ppo, "step", step)
        line = fails(interact.main, argv, capsys)
    assert "step 2 diverged" in line and "--logit-scale-lr" in line
    assert checkpoint.newest(tmp_path / "i").name == "step_0000001"
    interact.main(["--resume", "--out", str(tmp_path / "i"), "--logit-scale-lr", "0.01"])
    assert [record["step"] for record in metrics(tmp_path / "i")] == [1, 2, 3, 4]


def test_a_milestone_is_saved_after_its_steps_record(place, tmp_path, monkeypatch):
    """A run may be resumed from the milestone, so a kill in between must lose no record."""
    milestone = tmp_path / "i" / "checkpoints" / "chck_1"
    write_record = RunLog.metrics

    def checked(log, **values):
        assert not milestone.exists()
        return write_record(log, **values)

    with monkeypatch.context() as patch:
        patch.setattr(interact, "words_of_milestones", lambda config, history: {"chck_1": 1})
        patch.setattr(RunLog, "metrics", checked)
        argv = ["--init", str(place / "p"), *SHORT, "--reward", "constant", "--steps", "1"]
        interact.main([*argv, "--out", str(tmp_path / "i")])
    assert milestone.exists()


def test_a_killed_interaction_resumes_from_its_last_checkpoint(place, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "killed")
    folder = tmp_path / "killed" / "checkpoints"
    # as if killed after step 1 was logged, before any save
    shutil.copytree(folder / "start", folder / "step_0000000")
    shutil.rmtree(folder / "step_0000004")
    run_interact(place, tmp_path / "killed", "--resume")
    assert_same_bits(whole, tmp_path / "killed")
    assert len(metrics(tmp_path / "killed")) == 4
    for name in (
        "evaluations.jsonl",
        "checkpoints/best/trainer.json",
        "checkpoints/best/model.safetensors",
    ):
        assert (whole / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.parametrize("step", [0, 2])
def test_an_interrupted_evaluation_is_made_up_for(place, whole, tmp_path, monkeypatch, step):
    """Ctrl-C arrives in the evaluation after a step: the step is logged and saved, and a resumed
    run evaluates first."""
    collect = CallableGrader.collect
    parts = tmp_path / "parts"

    def interrupted(self, stop):
        is_evaluation = min(question.number for question in self.sent) >= held_out.FIRST_INDEX
        if is_evaluation and (step == 0 or (parts / "evaluations.jsonl").exists()):
            signal.raise_signal(signal.SIGINT)
            stop.check()
        return collect(self, stop)

    with monkeypatch.context() as patch:
        patch.setattr(CallableGrader, "collect", interrupted)
        with stops_by(signal.SIGINT):
            run_interact(place, parts)
    logged = metrics(parts) if step else []
    assert len(logged) == step and not (step and "held_out_reward" in logged[-1])
    assert checkpoint.newest(parts).name == f"step_{step:07d}"
    assert not (parts / "samples.jsonl").exists()
    run_interact(place, parts, "--resume")
    assert_same_bits(whole, parts)
    held_out_rewards = [
        [record.get("held_out_reward") for record in metrics(run)] for run in (whole, parts)
    ]
    assert held_out_rewards[0] == held_out_rewards[1]
    for name in ("evaluations.jsonl", "samples.jsonl", "checkpoints/best/model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_collapse_is_said_once_and_can_end_the_run(place, tmp_path, capsys, monkeypatch):
    steps = []

    class Detector(CollapseDetector):
        def add(self, record):
            steps.append(record["step"])
            return {"collapse": "all the same"} if record["step"] == 3 else {}

    monkeypatch.setattr(interact, "CollapseDetector", Detector)
    run_interact(place, tmp_path / "on")
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("all the same") == 1
    # later evaluations are compared with the one before training
    assert steps == [0, 1, 2, 3, 4]
    assert len(metrics(tmp_path / "on")) == 4
    run_interact(
        place, tmp_path / "off", "--stop-on-collapse", "--eval-every", "0", "--save-every", "20"
    )
    assert len(metrics(tmp_path / "off")) == 3
    evaluations = read_lines(tmp_path / "off" / "evaluations.jsonl")
    # the last student is evaluated, wherever the run ends
    assert {record["step"] for record in evaluations} == {0, 3}
    assert checkpoint.newest(tmp_path / "off").name == "step_0000003"


def test_the_word_budget_holds_openings_that_are_still_to_come(place, tmp_path):
    (tmp_path / "openings.txt").write_text("Tom had\nMia had a big\nIt was\nHeld out\n")
    more = ["--openings", str(tmp_path / "openings.txt"), "--stories-per-opening", "6"]
    run_interact(place, tmp_path / "i", *more, "--budget-words", "7")
    assert len(metrics(tmp_path / "i")) < 3 and metrics(tmp_path / "i")[-1]["words_in"] <= 7


@pytest.mark.parametrize(("budget", "steps"), [(224, 1), (256, 1), (319, 1), (320, 2)])
def test_budget_stops_hard_evaluations_included(place, tmp_path, monkeypatch, budget, steps):
    """A story is 16 words: a step 6 times 16, an evaluation 4 times 16, at steps 0, 2 and the
    end."""
    monkeypatch.setattr("tinystory.data.tokenizer.Tokenizer.decode", lambda self, ids: "w " * 16)
    run_interact(place, tmp_path / "i", "--budget-words-out", str(budget))
    files = [tmp_path / "i" / name for name in ("stories.jsonl", "evaluations.jsonl")]
    read = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    counters = checkpoint.read_counters(checkpoint.newest(tmp_path / "i"))
    assert len(metrics(tmp_path / "i")) == steps
    assert sum(record["words"] for record in read) == counters["words_out"] <= budget


def test_the_closing_evaluation_of_a_run_that_its_budget_ends_is_in_its_metrics(
    place, tmp_path, capsys, monkeypatch
):
    """Two steps and two evaluations of 16 words per story."""
    monkeypatch.setattr("tinystory.data.tokenizer.Tokenizer.decode", lambda self, ids: "w " * 16)
    run_interact(place, tmp_path / "i", "--eval-every", "0", "--budget-words-out", "320")
    first, last = metrics(tmp_path / "i")
    evaluation = [r for r in read_records(tmp_path / "i" / EVALUATIONS) if r["step"] == 2]
    mean = sum(record["reward"] for record in evaluation) / len(evaluation)
    assert last["held_out_reward"] == pytest.approx(mean, abs=1e-6)
    assert "held_out_story_clusters" in last and "held_out_reward" not in first
    (curve,) = re.findall("every evaluation, from step 0: (.*)", capsys.readouterr().out)
    assert len(curve) == 2
