"""The two train commands as a user runs them: complete, stopped and resumed runs, and users'
mistakes."""

import contextlib
import functools
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import (
    NAMES,
    SHORT,
    SMALL,
    THINGS,
    assert_same_bits,
    fails,
    metrics,
    read_lines,
    tiny_stories,
)

import train_interact as interact
import train_pretrain as pretrain
from tinystory.config import InteractConfig, PretrainConfig
from tinystory.data.openings import Openings
from tinystory.evaluate import held_out
from tinystory.ops.compute import resolve
from tinystory.rl.reward import story_rewards
from tinystory.run.errors import UserError
from tinystory.run.folder import read_config
from tinystory.run.records import read_metrics
from tinystory.student import checkpoint
from tinystory.student.model import Student, StudentConfig
from tinystory.student.optim import make_optimizer
from tinystory.teacher.callable import CallableGrader


@contextlib.contextmanager
def interrupted_at(module, step: int):
    """Ctrl-C arrives while the given step is being logged."""
    log = module.RunLog.metrics

    def metrics(self, *, step: int, **values):
        record = log(self, step=step, **values)
        if step == interrupted_at.step:
            signal.raise_signal(signal.SIGINT)
        return record

    interrupted_at.step = step
    module.RunLog.metrics = metrics
    try:
        yield
    finally:
        module.RunLog.metrics = log


def test_pretraining_learns_and_records(place):
    run = place / "p"
    records = metrics(run)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert records[-1]["words"] >= 2500 > records[-2]["words"]
    assert records[-1]["val_loss"] and records[0]["val_loss"] is None
    wanted = {
        "step",
        "words",
        "tokens",
        "loss",
        "val_loss",
        "val_bits_per_byte",
        "lr",
        "grad_norm",
        "tokens_per_s",
    }
    wanted |= {"peak_memory_mb"}
    assert all(record.keys() == wanted for record in records)
    assert json.loads((run / "config.json").read_text())["options"]["n_embd"] == 64
    assert (
        "<svg" in (run / "report.html").read_text()
        or "data:image" in (run / "report.html").read_text()
    )
    student, tokenizer, history = checkpoint.load(checkpoint.newest(run))
    assert (
        history["words"] == records[-1]["words"]
        and student.config.vocab_size == tokenizer.vocab_size == 320
    )


def test_dropout_of_attention_depends_on_the_seed_the_step_and_the_micro_batch(monkeypatch):
    student = Student(StudentConfig(n_layer=1, n_head=1, n_embd=32, context=8, vocab_size=64))
    optimizer, hidden, seeds = torch.optim.SGD(student.parameters(), lr=0.0), student.hidden, []

    def recorded(tokens, dropout, seed):
        seeds.append(seed)
        return hidden(tokens, dropout, seed)

    monkeypatch.setattr(student, "hidden", recorded)
    batch = torch.randint(64, (4, 9))
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        config = PretrainConfig(seed=seed, dropout=0.1, micro_batch_size=2, grad_clip=0)
        pretrain.train_step(student, optimizer, batch, config, torch.float32, step)
    assert len(set(seeds)) == 6 and seeds[:2] == seeds[6:]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_clipped_step_is_one_with_the_scaled_gradient(optimizer, monkeypatch):
    monkeypatch.setattr("tinystory.student.optim.EPS", 1.0)
    weights = []
    for clip in (0.01, 0.0):
        torch.manual_seed(0)
        student = Student(StudentConfig(n_layer=1, n_head=1, n_embd=32, context=8, vocab_size=64))
        config = PretrainConfig(optimizer=optimizer, grad_clip=clip, learning_rate=0.1)
        optim = make_optimizer(student, config, torch.float32)
        if not clip:
            clipping = functools.partial(
                torch.nn.utils.clip_grad_norm_, list(student.parameters()), 0.01
            )
            optim.register_step_pre_hook(lambda *_, clipping=clipping: [None, clipping()][0])
        for batch in (torch.randint(64, (4, 9)), torch.zeros(4, 9, dtype=torch.long)):
            pretrain.train_step(student, optim, batch, config, torch.float32, 0)
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-4  # 0.045 if one of them is not clipped


@pytest.mark.parametrize("dropout", ["0.0", "0.1"])
def test_pretraining_resumes_to_the_same_bits(place, tmp_path, dropout):
    argv = ["--corpus", str(place / "corpus.txt"), "--words", "2000", "--dropout", dropout, *SMALL]
    pretrain.main([*argv, "--out", str(tmp_path / "whole")])
    with interrupted_at(pretrain, step=3):
        pretrain.main([*argv, "--out", str(tmp_path / "parts")])
    assert len(metrics(tmp_path / "parts")) == 3
    # the options come from config.json
    pretrain.main(["--resume", "--out", str(tmp_path / "parts")])
    pretrain.main(["--resume", "--out", str(tmp_path / "whole")])  # nothing is left to read
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    stories = [read_lines(tmp_path / run / "evaluations.jsonl") for run in ("whole", "parts")]
    assert stories[0] == stories[1]


def test_pretraining_tells_a_story_before_its_first_step_and_at_each_validation(
    place, tmp_path, capsys
):
    corpus = str(place / "corpus.txt")
    run = tmp_path / "p"
    pretrain.main(["--corpus", corpus, "--words", "2000", *SMALL, "--out", str(run)])
    validated = [record["step"] for record in metrics(run) if record["val_loss"]]
    stories = read_lines(run / "evaluations.jsonl")
    assert [story["step"] for story in stories] == [0, *validated]
    assert {story["opening"] for story in stories} == {pretrain.OPENING}

    printed = capsys.readouterr().out
    headings = [line for line in printed.splitlines() if line.startswith("--- step ")]
    assert headings[0] == "--- step 0"
    assert len(headings) == len(stories)
    assert " ".join(pretrain.OPENING.split()) in " ".join(printed.split())
    assert printed.index("--- step 0") < printed.index("report: ")
    page = (run / "report.html").read_text()
    assert page.count(f"<em>{pretrain.OPENING}</em>") > 1


@pytest.mark.parametrize("dropout", ["0.0", "0.1"])
def test_the_stories_of_pretraining_change_no_bit_of_it(place, tmp_path, monkeypatch, dropout):
    argv = ["--corpus", str(place / "corpus.txt"), "--words", "2000", "--dropout", dropout, *SMALL]
    draws = []
    tell_story = pretrain.tell_story

    def told(run):
        before = torch.get_rng_state()
        tell_story(run)
        draws.append(torch.equal(before, torch.get_rng_state()))

    monkeypatch.setattr(pretrain, "tell_story", told)
    pretrain.main([*argv, "--out", str(tmp_path / "told")])
    monkeypatch.setattr(pretrain, "tell_story", lambda run: None)
    pretrain.main([*argv, "--out", str(tmp_path / "silent")])
    assert len(draws) > 1 and all(draws)
    assert not (tmp_path / "silent" / "evaluations.jsonl").exists()
    assert_same_run(tmp_path / "told", tmp_path / "silent")


def test_only_one_process_tells_the_story(place, tmp_path, monkeypatch, capsys):
    argv = ["--corpus", str(place / "corpus.txt"), "--words", "500", *SMALL]
    tell_story = pretrain.tell_story

    def told_elsewhere(run):
        with monkeypatch.context() as patch:
            patch.setattr(pretrain.distributed, "is_rank0", lambda: False)
            tell_story(run)

    monkeypatch.setattr(pretrain, "tell_story", told_elsewhere)
    pretrain.main([*argv, "--out", str(tmp_path / "p")])
    assert "--- step" not in capsys.readouterr().out
    assert not (tmp_path / "p" / "evaluations.jsonl").exists()


def assert_same_run(a: Path, b: Path) -> None:
    """The same weights, and the same metrics but for times."""
    assert_same_bits(a, b)
    timed = ("tokens_per_s", "peak_memory_mb")
    plain = [
        [{k: v for k, v in m.items() if k not in timed} for m in metrics(run)] for run in (a, b)
    ]
    assert plain[0] == plain[1]


def test_a_step_launched_ahead_as_on_a_gpu_changes_nothing(place, tmp_path, monkeypatch):
    argv = ["--corpus", str(place / "corpus.txt"), "--words", "2000", *SMALL]
    pretrain.main([*argv, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(pretrain, "steps_ahead", lambda device: 1)
    events = []
    train_step = pretrain.train_step
    monkeypatch.setattr(
        pretrain, "train_step", lambda *args: (events.append("launched"), train_step(*args))[1]
    )

    class Download(pretrain.Download):  # those of a step, not those of a story that is told
        def wait(self):
            events.append("read")
            return super().wait()

    monkeypatch.setattr(pretrain, "Download", Download)
    with interrupted_at(pretrain, step=3):
        pretrain.main([*argv, "--out", str(tmp_path / "parts")])
    assert events == [
        "launched",
        "launched",
        "read",
        "launched",
        "read",
        "launched",
        "read",
        "read",
    ]
    assert (
        checkpoint.newest(tmp_path / "parts").name == "step_0000004"
        and len(metrics(tmp_path / "parts")) == 4
    )
    pretrain.main(["--resume", "--out", str(tmp_path / "parts")])
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(
    place, tmp_path, monkeypatch, capsys, ahead
):
    train_step = pretrain.train_step

    def diverging(student, optimizer, batch, config, dtype, step):
        loss, grad_norm = train_step(student, optimizer, batch, config, dtype, step)
        return loss * (math.nan if step == 2 else 1), grad_norm

    monkeypatch.setattr(pretrain, "train_step", diverging)
    monkeypatch.setattr(pretrain, "steps_ahead", lambda device: ahead)
    argv = ["--corpus", str(place / "corpus.txt"), "--words", "2000", "--save-every", "2", *SMALL]
    assert "the loss is nan at step 3" in fails(
        pretrain.main, [*argv, "--out", str(tmp_path / "p")], capsys
    )
    assert (
        checkpoint.newest(tmp_path / "p").name == "step_0000002"
        and len(metrics(tmp_path / "p")) == 2
    )


def spoiling(step_function, at: int, place_of_student):
    """A step that leaves an infinite weight behind when it is called for the `at`-th time."""
    calls = []

    def spoiled(*arguments, **options):
        result = step_function(*arguments, **options)
        calls.append(result)
        if len(calls) == at:
            with torch.no_grad():
                place_of_student(arguments[0]).ln_f.weight[0] = math.inf
        return result

    return spoiled


def test_weights_that_are_not_finite_are_not_saved_by_pretraining(
    place, tmp_path, monkeypatch, capsys
):
    """The loss of the step that makes them is finite."""
    argv = ["--corpus", str(place / "corpus.txt"), "--words", "900", "--save-every", "1", *SMALL]
    argv += ["--out", str(tmp_path / "p")]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train_step", spoiling(pretrain.train_step, 3, lambda it: it))
        line = fails(pretrain.main, argv, capsys)
    assert "step 3 made weights that are not finite" in line and "--muon-learning-rate" in line
    assert checkpoint.newest(tmp_path / "p").name == "step_0000002"
    pretrain.main(["--resume", "--out", str(tmp_path / "p")])
    assert metrics(tmp_path / "p")[-1]["words"] >= 900


def test_weights_that_are_not_finite_are_not_saved_by_interaction(
    place, tmp_path, monkeypatch, capsys
):
    """Nor is a student with them evaluated, and other options let the run go on."""
    argv = ["--init", str(place / "p"), *SHORT, "--save-every", "1", "--reward", "constant"]
    argv += ["--out", str(tmp_path / "i")]
    with monkeypatch.context() as patch:
        step = spoiling(interact.ppo.step, 2, lambda policy: policy.student)
        patch.setattr(interact.ppo, "step", step)
        line = fails(interact.main, argv, capsys)
    assert "step 2 made weights that are not finite" in line and "--sharpness-rate" in line
    assert checkpoint.newest(tmp_path / "i").name == "step_0000001"
    interact.main(["--resume", "--out", str(tmp_path / "i"), "--sharpness-rate", "0.01"])
    assert [record["step"] for record in metrics(tmp_path / "i")] == [1, 2, 3, 4]


def test_micro_batches_change_only_memory(place, tmp_path):
    argv = ["--corpus", str(place / "corpus.txt"), "--words", "1000", "--dtype", "float32", *SMALL]
    pretrain.main([*argv, "--out", str(tmp_path / "a")])
    pretrain.main([*argv, "--micro-batch-size", "3", "--out", str(tmp_path / "b")])
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def run_interact(place, out: Path, *more: str) -> None:
    init = str(checkpoint.newest(place / "p"))
    interact.main(
        [
            "--init",
            init,
            "--reward",
            f"{place / 'reward.py'}:score",
            "--out",
            str(out),
            *SHORT,
            *more,
        ]
    )


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
    stories = [
        json.loads(line) for line in (tmp_path / "i" / "stories.jsonl").read_text().splitlines()
    ]
    assert [s["index"] for s in stories] == list(range(24))
    assert all(
        s["words"] == len(s["story"].split()) and s["ended"] in ("eos", "length") for s in stories
    )
    assert records[0]["reward_mean"] == pytest.approx(
        sum(s["reward"] for s in stories[:6]) / 6, abs=1e-5
    )
    samples = [
        json.loads(line) for line in (tmp_path / "i" / "samples.jsonl").read_text().splitlines()
    ]
    evaluations = [
        json.loads(line) for line in (tmp_path / "i" / "evaluations.jsonl").read_text().splitlines()
    ]
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
    assert [record.get("held_out_reward") is None for record in records] == [
        True,
        False,
        True,
        False,
    ]
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


def test_the_temperature_becomes_the_students_own(place, tmp_path):
    """Policy and reference begin with it, and everything later samples at 1."""
    flags = [*SHORT, "--reward", "constant", "--steps", "1", "--temperature", "0.5"]
    interact.main([*flags, "--init", str(place / "p"), "--out", str(tmp_path / "i")])
    tokens = torch.arange(9)[None]
    before, _, _ = checkpoint.load(checkpoint.newest(place / "p"))
    start, _, _ = checkpoint.load(tmp_path / "i/checkpoints/start")
    with torch.no_grad():
        torch.testing.assert_close(start(tokens), 2 * before(tokens))
    (record,) = read_metrics(tmp_path / "i")
    assert abs(record["kl"]) < 1e-2  # the step's stories are drawn before it changes anything


def test_the_temperature_with_the_highest_reward_is_chosen(place, tmp_path, monkeypatch, capsys):
    means = [0.1, 0.2, 0.5, 0.3, 0.2]  # one per temperature that is tried
    sizes = []

    def rewards_of(config, stories, scores):
        sizes.append(len(stories))
        if len(sizes) <= len(means):
            return [means[len(sizes) - 1]] * len(stories)
        return story_rewards(config, stories, scores)

    monkeypatch.setattr(interact, "story_rewards", rewards_of)
    run = tmp_path / "i"
    flags = [*SHORT, "--reward", "constant", "--steps", "1", "--temperature", "0"]
    interact.main([*flags, "--init", str(place / "p"), "--out", str(run)])
    chosen = interact.TEMPERATURES[2]
    assert sizes[: len(means)] == [interact.STORIES_PER_TEMPERATURE] * len(means)
    assert f"temperature {chosen}; mean reward of 32 stories" in capsys.readouterr().out
    options = read_config(run)["options"]
    assert options["temperature"] == chosen
    assert options["tried_temperatures"] == dict(
        zip(map(str, interact.TEMPERATURES), means, strict=True)
    )
    tokens = torch.arange(9)[None]
    before, _, _ = checkpoint.load(checkpoint.newest(place / "p"))
    start, _, _ = checkpoint.load(run / "checkpoints/start")
    with torch.no_grad():
        torch.testing.assert_close(start(tokens), before(tokens) / chosen)

    interact.main(["--out", str(run), "--resume", "--steps", "2"])
    assert len(read_metrics(run)) == 2
    assert read_config(run)["options"] == options | {"resume": True, "steps": 2}


def test_without_graded_evaluations_the_best_student_is_the_last(place, tmp_path, capsys):
    """Evaluations are written and read, but nobody is asked about them."""
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
    assert "4 stories to held-out openings" in capsys.readouterr().out
    assert [record["scored"] for record in metrics(out)] == [8, 0]
    assert [record["predicted"] for record in metrics(out)] == [1, 9]


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
    assert held_out.is_best(first + higher + unscored, 8) and not held_out.is_best(
        first + evaluation(8, None, None), 8
    )


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

    def falling(config, stories, scores):
        if stories[0].index < held_out.FIRST_INDEX:
            return story_rewards(config, stories, scores)
        done.append(stories)
        return rewards[(len(done) - 1) % 3]

    monkeypatch.setattr(interact, "story_rewards", falling)
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


def test_interaction_resumes_to_the_same_bits(place, tmp_path):
    more = ["--minibatch-size", "4"]
    run_interact(place, tmp_path / "whole", *more)
    with interrupted_at(interact, step=3):
        run_interact(place, tmp_path / "parts", *more)
    assert checkpoint.newest(tmp_path / "parts").name == "step_0000003"
    run_interact(place, tmp_path / "parts", "--resume", *more)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    for name in ("stories.jsonl", "evaluations.jsonl", "samples.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "parts" / name).read_text()


def test_a_killed_interaction_resumes_from_its_last_checkpoint(place, tmp_path):
    run_interact(place, tmp_path / "whole")
    run_interact(place, tmp_path / "killed")
    folder = tmp_path / "killed" / "checkpoints"
    # as if killed after step 1 was logged, before any save
    shutil.copytree(folder / "start", folder / "step_0000000")
    shutil.rmtree(folder / "step_0000004")
    run_interact(place, tmp_path / "killed", "--resume")
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")
    assert len(metrics(tmp_path / "killed")) == 4
    for name in (
        "evaluations.jsonl",
        "checkpoints/best/trainer.json",
        "checkpoints/best/model.safetensors",
    ):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_a_kill_costs_a_few_of_the_demos_steps(place, tmp_path):
    """What is saved by default, once every few steps, is there before the end."""
    run_interact(
        place, tmp_path / "i", "--steps", "5", "--save-every", str(InteractConfig.save_every)
    )
    assert (tmp_path / "i" / "checkpoints" / "step_0000004").exists()


def test_an_interrupted_evaluation_is_made_up_for(place, tmp_path, monkeypatch):
    """Ctrl-C arrives in the evaluation of step 2: the step is logged and saved, and a resumed run
    evaluates first."""
    run_interact(place, tmp_path / "whole")
    collect = CallableGrader.collect

    def interrupted(self, stop):
        signal.raise_signal(signal.SIGINT)
        stop.check()

    def second_step(self, stop):
        if (
            min(question.number for question in self.sent) >= held_out.FIRST_INDEX
            and (tmp_path / "parts" / "evaluations.jsonl").exists()
        ):
            return interrupted(self, stop)
        return collect(self, stop)

    with monkeypatch.context() as patch:
        patch.setattr(CallableGrader, "collect", second_step)
        run_interact(place, tmp_path / "parts")
    assert (
        len(metrics(tmp_path / "parts")) == 2
        and "held_out_reward" not in metrics(tmp_path / "parts")[1]
    )
    assert not (tmp_path / "parts" / "samples.jsonl").exists()
    run_interact(place, tmp_path / "parts", "--resume")
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    for name in ("evaluations.jsonl", "samples.jsonl", "checkpoints/best/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_every_opening_is_paid_for_once_and_a_tenth_is_never_trained_on(place, tmp_path):
    texts = [f"{'One day ' * (i % 3)}{name} had a {THINGS[i]}" for i, name in enumerate(NAMES)]
    texts += [f"It was {thing}" for thing in THINGS]
    (tmp_path / "openings.txt").write_text("\n".join(texts))
    more = ["--openings", str(tmp_path / "openings.txt"), "--stories-per-opening", "2"]
    run_interact(place, tmp_path / "i", *more, "--steps", "6", "--stories-per-step", "6")
    openings = Openings(texts, seed=0, per_opening=2)
    stories = [
        json.loads(line) for line in (tmp_path / "i" / "stories.jsonl").read_text().splitlines()
    ]
    assert [story["opening"] for story in stories] == [openings[i] for i in range(36)]
    assert {story["opening"] for story in stories} == set(openings.train)
    evaluations = [
        json.loads(line) for line in (tmp_path / "i" / "evaluations.jsonl").read_text().splitlines()
    ]
    assert {record["opening"] for record in evaluations} == set(openings.held_out) and len(
        openings.held_out
    ) == 1
    for record in metrics(tmp_path / "i"):  # a callable's scores are no words
        used = {story["opening"] for story in stories[: 6 * record["step"]]}
        assert record["words_in"] == sum(len(opening.split()) for opening in used)


def test_collapse_is_said_once_and_can_end_the_run(place, tmp_path, capsys, monkeypatch):
    def news(self, record):
        return {"collapse": "all the same"} if record["step"] == 3 else {}

    monkeypatch.setattr("tinystory.run.collapse.CollapseDetector.add", news)
    run_interact(place, tmp_path / "on")
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("all the same") == 1 and len(
        metrics(tmp_path / "on")
    ) == 4
    run_interact(
        place, tmp_path / "off", "--stop-on-collapse", "--eval-every", "0", "--save-every", "20"
    )
    assert len(metrics(tmp_path / "off")) == 3
    evaluations = [
        json.loads(line)
        for line in (tmp_path / "off" / "evaluations.jsonl").read_text().splitlines()
    ]
    # the last student is evaluated, wherever the run ends
    assert {record["step"] for record in evaluations} == {0, 3}
    assert checkpoint.newest(tmp_path / "off").name == "step_0000003"


def test_an_early_end_is_saved_before_its_evaluation(place, tmp_path, capsys, monkeypatch):
    def news(self, record):
        return {"collapse": "all the same"} if record["step"] == 3 else {}

    monkeypatch.setattr("tinystory.run.collapse.CollapseDetector.add", news)
    collect = CallableGrader.collect

    def gone(self, stop):
        if (
            min(question.number for question in self.sent) >= held_out.FIRST_INDEX
            and (tmp_path / "i" / "metrics.jsonl").exists()
        ):
            raise UserError("the teacher has gone")
        return collect(self, stop)

    monkeypatch.setattr(CallableGrader, "collect", gone)
    argv = [
        "--init",
        str(checkpoint.newest(place / "p")),
        "--reward",
        f"{place / 'reward.py'}:score",
        *SHORT,
    ]
    argv += [
        "--stop-on-collapse",
        "--eval-every",
        "0",
        "--save-every",
        "20",
        "--out",
        str(tmp_path / "i"),
    ]
    assert "the teacher has gone" in fails(interact.main, argv, capsys)
    assert checkpoint.newest(tmp_path / "i").name == "step_0000003"
    monkeypatch.undo()
    run_interact(place, tmp_path / "i", "--resume", "--steps", "3")
    assert len(metrics(tmp_path / "i")) == 3


def test_a_teacher_that_tells_nothing_apart_is_warned_of_once(place, tmp_path, capsys, monkeypatch):
    """A score of 0.5 for every story, an empty one too; the rewards still differ, by length."""
    monkeypatch.setattr("tinystory.teacher.grade.is_blank", lambda text: False)
    (tmp_path / "r.py").write_text("def flat(opening, stories):\n    return [0.5] * len(stories)\n")
    run_interact(
        place,
        tmp_path / "i",
        "--reward",
        f"{tmp_path / 'r.py'}:flat",
        "--steps",
        "7",
        "--eval-every",
        "0",
    )
    printed = "".join(capsys.readouterr())
    assert (
        printed.count("all stories of the last 5 steps had the same score (0.5 in the last)") == 1
    )
    assert all(record["score_std"] == 0 for record in metrics(tmp_path / "i"))


@pytest.mark.usefixtures("empty_stories_too")
def test_no_score_is_no_gradient_and_is_counted(place, tmp_path, capsys):
    init = str(checkpoint.newest(place / "p"))
    base = ["--init", init, *SHORT, "--steps", "1"]
    interact.main(
        [
            *base,
            "--reward",
            f"{place / 'reward.py'}:some",
            "--max-unscored",
            "0.5",
            "--out",
            str(tmp_path / "a"),
        ]
    )
    assert metrics(tmp_path / "a")[0]["unscored"] == 1
    stories = [
        json.loads(line) for line in (tmp_path / "a" / "stories.jsonl").read_text().splitlines()
    ]
    assert [s["reward"] is None for s in stories] == [False, True, False, False, False, False]
    line = fails(
        interact.main,
        [*base, "--reward", f"{place / 'reward.py'}:silent", "--out", str(tmp_path / "b")],
        capsys,
    )
    assert "6 of 6 stories got no score" in line and "--resume" in line
    assert not (tmp_path / "b" / "metrics.jsonl").exists()


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


def test_mistakes_are_told_in_one_sentence(place, tmp_path, capsys, monkeypatch):
    corpus, out = str(place / "corpus.txt"), str(tmp_path / "out")
    init = str(checkpoint.newest(place / "p"))
    (tmp_path / "empty.txt").write_text("")
    for argv, words in [
        (["--corpus", str(tmp_path / "none.txt")], "none.txt"),
        (["--corpus", str(tmp_path / "empty.txt")], "empty"),
        (["--corpus", corpus, "--n-embd", "65", "--n-head", "2"], "multiple of --n-head"),
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
        interact.starting_checkpoint("")
    for run in ("runs/demo/pretrain", "runs/pretrain"):
        shutil.copytree(place / "p", run)
        assert interact.starting_checkpoint("").parent == Path(run) / "checkpoints"


@pytest.mark.parametrize("stories", [["a b " * 200, "b a"], tiny_stories(160)])
def test_resuming_a_changed_corpus_is_refused(place, tmp_path, capsys, stories):
    """Whether or not its vocabulary has another size, and so the weights another shape."""
    corpus = tmp_path / "c.txt"
    corpus.write_text((place / "corpus.txt").read_text())
    pretrain.main(["--corpus", str(corpus), "--words", "300", "--out", str(tmp_path / "r"), *SMALL])
    corpus.write_text("\n<|endoftext|>\n".join(stories))
    line = fails(
        pretrain.main, ["--resume", "--words", "600", "--out", str(tmp_path / "r")], capsys
    )
    assert "the corpus changed since" in line and "model.safetensors" not in line


def test_the_builtin_teacher_end_to_end(place, tmp_path, capsys):
    """Over HTTP; the run starts the server on the student's own corpus."""
    interact.main(
        [
            "--init",
            str(checkpoint.newest(place / "p")),
            "--out",
            str(tmp_path / "i"),
            *SHORT,
            "--steps",
            "1",
        ]
    )
    record = metrics(tmp_path / "i")[0]
    stories = [
        json.loads(line) for line in (tmp_path / "i" / "stories.jsonl").read_text().splitlines()
    ]
    assert record["unscored"] == 0 and all(
        set(s["scores"].values()) <= {0, 1, 2, 3} for s in stories
    )
    evaluations = [
        json.loads(line) for line in (tmp_path / "i" / "evaluations.jsonl").read_text().splitlines()
    ]
    assert record["words_in"] == 1 + sum(len(s["reply"].split()) for s in stories + evaluations)
    assert "stands in for an LLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    "asked, dtype, recorded",
    [
        ("auto", torch.bfloat16, "bfloat16"),
        ("auto", torch.float32, "float32"),
        ("bfloat16", torch.bfloat16, "bfloat16"),
    ],
)
def test_a_run_records_how_it_multiplies(asked, dtype, recorded, monkeypatch):
    monkeypatch.setattr("tinystory.ops.compute.pick_dtype", lambda name, device: dtype)
    assert resolve("cpu", asked).recorded["dtype"] == recorded
