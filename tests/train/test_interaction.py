"""train_interact.py as a user runs it, and users' mistakes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import (
    LIMIT_S,
    NAMES,
    ROOT,
    SHORT,
    SMALL,
    THINGS,
    cli,
    fails,
    metrics,
    read_lines,
)
from runs import run_interact

import train_interact as interact
import train_pretrain as pretrain
from tinystory.config import InteractConfig
from tinystory.data.openings import Openings
from tinystory.evaluate import held_out
from tinystory.evaluate.forecast import FEW_GRADES, stories_to_grade
from tinystory.rl.policy import RunState
from tinystory.rl.start import starting_checkpoint
from tinystory.run.errors import UserError
from tinystory.student import checkpoint


def test_interaction_records_what_it_did(place, tmp_path, capsys):
    run_interact(place, tmp_path / "i", "--dtype", "float32")
    records = metrics(tmp_path / "i")
    contract = (
        "step reward_mean score_mean readability_mean coherence_mean creativity_mean kl kl_coef entropy length_mean"
        " distinct_4 diversity_mean story_clusters ended objective words_in words_out unscored rollout_s teacher_s"
        " update_s peak_memory_mb"
    )
    assert all(set(contract.split()) <= record.keys() for record in records) and len(records) == 4
    assert records[0]["ratio_error"] < 1e-4 and abs(records[0]["kl"]) < 1e-3
    assert records[-1]["kl"] != 0
    stories = read_lines(tmp_path / "i" / "stories.jsonl")
    assert [s["index"] for s in stories] == list(range(24))
    assert all(
        s["words"] == len(s["story"].split()) and s["ended"] in ("eos", "length") for s in stories
    )
    assert records[0]["reward_mean"] == pytest.approx(
        sum(s["reward"] for s in stories[:6]) / 6, abs=1e-5
    )
    samples = read_lines(tmp_path / "i" / "samples.jsonl")
    evaluations = read_lines(tmp_path / "i" / "evaluations.jsonl")
    assert [record["step"] for record in evaluations] == [0] * 4 + [2] * 4 + [4] * 4
    assert records[-1]["words_out"] == sum(s["words"] for s in stories + evaluations)
    assert [record["index"] for record in evaluations] == [
        held_out.FIRST_INDEX + i for i in range(4)
    ] * 3
    rewards = {at: sum(r["reward"] for r in evaluations if r["step"] == at) / 4 for at in (0, 2, 4)}
    best = max(
        at for at in rewards if held_out.is_best([r for r in evaluations if r["step"] <= at], at)
    )
    assert samples == [
        {"when": when, **r}
        for when, at in (("before", 0), ("after", best))
        for r in evaluations
        if r["step"] == at
    ]
    shown = checkpoint.find(tmp_path / "i")
    assert shown.name == "best" and checkpoint.newest(tmp_path / "i").name == "step_0000004"
    assert json.loads((shown / "trainer.json").read_text())["step"] == best
    expected = [True, False, True, False]
    assert [record.get("held_out_reward") is None for record in records] == expected
    assert records[3]["held_out_reward"] == pytest.approx(rewards[4], abs=1e-6)
    own = [s["reward"] for s in stories[18:]]
    assert records[3]["reward_mean"] == pytest.approx(sum(own) / 6, abs=1e-5)
    penalty = records[3]["kl_coef"] * records[3]["kl"]
    assert records[3]["objective"] == pytest.approx(records[3]["reward_mean"] - penalty, abs=1e-5)
    assert records[3]["ended"] == pytest.approx(
        sum(s["ended"] == "eos" for s in stories[18:]) / 6, abs=1e-6
    )
    assert 0 < records[3]["diversity_mean"] <= 1 and 1 <= records[3]["story_clusters"] <= 6
    printed = capsys.readouterr().out
    assert "mean reward" in printed and "held-out openings" in printed


def test_of_a_few_grades_one_may_be_refused(place, tmp_path, capsys, empty_stories_too):
    """One of eight is more than --max-unscored 0.1 allows where all stories are graded."""
    (tmp_path / "r.py").write_text(
        "def one(o, stories):\n    return [None] + [0.5] * (len(stories) - 1)\n"
        "def two(o, stories):\n    return [None] * 2 + [0.5] * (len(stories) - 2)\n"
    )
    flags = [*SHORT, "--steps", "1", "--stories-per-step", "16", "--no-eval-graded"]
    flags += ["--init", str(place / "p"), "--opening", "Once upon a time, Tom"]
    one, two = (f"{tmp_path / 'r.py'}:{name}" for name in ("one", "two"))
    interact.main([*flags, "--grades", "8", "--reward", one, "--out", str(tmp_path / "a")])
    assert [record["unscored"] for record in metrics(tmp_path / "a")] == [1]
    flags += ["--out", str(tmp_path / "b")]
    assert "2 of 8 stories got no score" in fails(
        interact.main, [*flags, "--grades", "8", "--reward", two], capsys
    )


def test_a_step_without_any_score_or_prediction_is_one_sentence(
    place, tmp_path, capsys, empty_stories_too
):
    (tmp_path / "r.py").write_text(
        "def score(o, stories):\n    return [0.5] + [None] * (len(stories) - 1)\n"
    )
    flags = [*SHORT, "--stories-per-step", "16", "--no-eval-graded", "--init", str(place / "p")]

    # The teacher's one score in eight is not enough to predict the second step's.
    few = ["--grades", "8", "--max-unscored", "0.99", "--reward", str(tmp_path / "r.py")]
    line = fails(interact.main, [*flags, *few, "--out", str(tmp_path / "few")], capsys)
    assert "no story of step 2 has a score" in line and "--resume and --grades above 8" in line
    assert len(metrics(tmp_path / "few")) == 1

    # A run that had all stories graded keeps none to predict from.
    out = ["--out", str(tmp_path / "all")]
    interact.main([*flags, "--steps", "1", "--reward", "random", *out])
    more = ["--resume", "--steps", "5", *out]
    line = fails(interact.main, [*more, "--grades", "8"], capsys)
    assert "no story of step 2 has a score: all --grades were given (16 so far)" in line
    interact.main([*more, "--grades", "40"])
    assert len(metrics(tmp_path / "all")) == 5


def test_every_opening_is_paid_for_once_and_a_tenth_is_never_trained_on(place, tmp_path):
    texts = [f"{'One day ' * (i % 3)}{name} had a {THINGS[i]}" for i, name in enumerate(NAMES)]
    texts += [f"It was {thing}" for thing in THINGS]
    (tmp_path / "openings.txt").write_text("\n".join(texts))
    more = ["--openings", str(tmp_path / "openings.txt"), "--stories-per-opening", "2"]
    run_interact(place, tmp_path / "i", *more, "--steps", "6", "--stories-per-step", "6")
    openings = Openings(texts, seed=0, per_opening=2)
    stories = read_lines(tmp_path / "i" / "stories.jsonl")
    assert [story["opening"] for story in stories] == [openings[i] for i in range(36)]
    assert {story["opening"] for story in stories} == set(openings.train)
    evaluations = read_lines(tmp_path / "i" / "evaluations.jsonl")
    assert {record["opening"] for record in evaluations} == set(openings.held_out)
    assert len(openings.held_out) == 1
    for record in metrics(tmp_path / "i"):  # a callable's scores are no words
        used = {story["opening"] for story in stories[: 6 * record["step"]]}
        assert record["words_in"] == sum(len(opening.split()) for opening in used)


def test_a_teacher_that_tells_nothing_apart_is_warned_of_once_and_beside_the_headline(
    place, tmp_path, capsys, monkeypatch
):
    """A score of 0.5 for every story, an empty one too; the rewards still differ, by length."""
    monkeypatch.setattr("tinystory.teacher.grade.is_blank", lambda text: False)
    (tmp_path / "r.py").write_text("def flat(opening, stories):\n    return [0.5] * len(stories)\n")
    flags = cli("--reward {}:flat --steps 7 --eval-every 0", tmp_path / "r.py")
    run_interact(place, tmp_path / "i", *flags)
    run, headline, rest = "".join(capsys.readouterr()).partition("The mean reward ")
    said = "all stories of the last 5 steps had the same score (0.5 in the last)"
    assert headline and (run + rest).count(said) == 2 and f"But from step 5: {said}" in rest
    assert all(record["score_std"] == 0 for record in metrics(tmp_path / "i"))


@pytest.mark.usefixtures("empty_stories_too")
def test_no_score_is_no_gradient_and_is_counted(place, tmp_path, capsys):
    init = str(checkpoint.newest(place / "p"))
    base = ["--init", init, *SHORT, "--steps", "1"]
    some = cli("--reward {}:some --max-unscored 0.5", place / "reward.py")
    interact.main([*base, *some, "--out", str(tmp_path / "a")])
    assert metrics(tmp_path / "a")[0]["unscored"] == 1
    stories = read_lines(tmp_path / "a" / "stories.jsonl")
    assert [s["reward"] is None for s in stories] == [False, True, False, False, False, False]
    line = fails(
        interact.main,
        [*base, "--reward", f"{place / 'reward.py'}:silent", "--out", str(tmp_path / "b")],
        capsys,
    )
    assert "6 of 6 stories got no score" in line and "--resume" in line
    assert not (tmp_path / "b" / "metrics.jsonl").exists()


def test_mistakes_are_told_in_one_sentence(place, tmp_path, capsys, monkeypatch):
    corpus, out = str(place / "corpus.txt"), str(tmp_path / "out")
    init = str(checkpoint.newest(place / "p"))
    (tmp_path / "empty.txt").write_text("")
    for argv, words in [
        (["--corpus", str(tmp_path / "none.txt")], "none.txt"),
        (["--corpus", str(tmp_path / "empty.txt")], "empty"),
        (["--corpus", corpus, "--n-embd", "65", "--n-head", "2"], "--n-embd 65 / --n-head 2"),
        (["--corpus", corpus, "--words", "0"], "--words"),
        (["--corpus", corpus, "--device", "cuda:9"], "--device cuda:9"),
        (["--corpus", corpus, "--resume"], "no checkpoint"),
        (["--corpus", corpus, "--context", "100000"], "--context"),
    ]:
        assert words in fails(pretrain.main, [*argv, "--out", out], capsys)
    assert "already holds a run" in fails(
        pretrain.main, ["--corpus", corpus, "--out", str(place / "p"), *SMALL], capsys
    )
    monkeypatch.chdir(tmp_path)
    for argv, words in [
        ([], "train_pretrain.py"),
        (["--init", str(tmp_path)], "neither a checkpoint nor a run"),
        (["--init", init, *SHORT, "--reward", "x.py:f"], "x.py"),
        (["--init", init], "--max-new-tokens"),
        (["--init", init, *SHORT, "--teacher-url", "http://127.0.0.1:9"], "127.0.0.1:9"),
    ]:
        assert words in fails(interact.main, [*argv, "--out", out], capsys)
    assert not Path(out).exists() or not list(Path(out).iterdir()), "nothing half-written"


def test_without_init_the_newest_under_runs_pretrain_is_taken_or_that_of_the_demo(
    place, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint under runs/pretrain: run .* first"):
        starting_checkpoint(InteractConfig())
    for run in ("runs/demo/pretrain", "runs/pretrain"):
        shutil.copytree(place / "p", run)
        assert starting_checkpoint(InteractConfig()).parent == Path(run) / "checkpoints"


def test_the_builtin_teacher_end_to_end(place, tmp_path, capsys):
    """Over HTTP; the run starts the server on the student's own corpus, once the user names it."""
    init = checkpoint.newest(place / "p")
    flags = cli("--corpus {} --init {} --steps 1", place / "corpus.txt", init)
    interact.main([*SHORT, *flags, "--out", str(tmp_path / "i")])
    record = metrics(tmp_path / "i")[0]
    stories = read_lines(tmp_path / "i" / "stories.jsonl")
    assert record["unscored"] == 0
    assert all(set(s["scores"].values()) <= {0, 1, 2, 3} for s in stories)
    evaluations = read_lines(tmp_path / "i" / "evaluations.jsonl")
    assert record["words_in"] == 1 + sum(len(s["reply"].split()) for s in stories + evaluations)
    assert "stands in for an LLM" in capsys.readouterr().out


def test_the_forecast_counts_what_the_teacher_will_be_asked():
    start = RunState(0.0)
    few = InteractConfig(**FEW_GRADES)
    assert stories_to_grade(InteractConfig(steps=4), start) == 4 * 384 + 5 * 40
    assert stories_to_grade(few, start) == 64 + 2 * 40
    assert stories_to_grade(replace(few, eval_graded=False), start) == 64
    assert stories_to_grade(replace(few, temperature=0.0), start) == 64 + 2 * 40 + 5 * 8
    later = RunState(0.0, step=3, asked=42, evaluated_before=1)
    assert stories_to_grade(few, later) == 64 - 42 + 40


def test_a_hundred_evaluations_need_no_more_open_files_than_one(place, tmp_path):
    """In another process, because this one may hold many files open."""
    limited = (
        "import resource, sys, train_interact as interact\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "interact.main(sys.argv[1:])\n"
    )
    flags = cli("--reward constant --init {} --out {}", place / "p", tmp_path / "i")
    flags += cli("--steps 100 --eval-every 1 --stories-per-step 2 --eval-stories 1")
    done = subprocess.run(
        [sys.executable, "-c", limited, *SHORT, *flags, "--max-new-tokens", "1"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert all("held_out_reward" in record for record in metrics(tmp_path / "i"))
