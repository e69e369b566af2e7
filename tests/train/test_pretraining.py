"""train_pretrain.py as a user runs it: complete, stopped and resumed runs."""

import functools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    LIMIT_S,
    ROOT,
    SMALL,
    assert_same_bits,
    cli,
    fails,
    metrics,
    read_lines,
    tiny_stories,
)
from runs import interrupted_at, spoiling

import train_pretrain as pretrain
from tinystory.config import PretrainConfig
from tinystory.evaluate.validation import OPENING
from tinystory.ops.compute import resolve
from tinystory.run.folder import read_config, write_config
from tinystory.student import checkpoint
from tinystory.student.model import Student, StudentConfig
from tinystory.student.optim import make_optimizer


def test_pretraining_learns_and_records(place):
    run = place / "p"
    records = metrics(run)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert records[-1]["words"] >= 2500 > records[-2]["words"]
    assert records[-1]["val_loss"] and records[0]["val_loss"] is None
    wanted = set(
        "step words tokens loss val_loss val_bits_per_byte lr grad_norm tokens_per_s peak_memory_mb".split()
    )
    assert all(record.keys() == wanted for record in records)
    assert json.loads((run / "config.json").read_text())["options"]["n_embd"] == 64
    assert (
        "<svg" in (run / "report.html").read_text()
        or "data:image" in (run / "report.html").read_text()
    )
    student, tokenizer, history = checkpoint.load(checkpoint.newest(run))
    assert history["words"] == records[-1]["words"]
    assert student.config.vocab_size == tokenizer.vocab_size == 320


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


def test_an_optimizer_that_would_not_clip_is_refused():
    student = Student(StudentConfig(n_layer=1, n_head=1, n_embd=32, context=8, vocab_size=64))
    batch, config = torch.randint(64, (4, 9)), PretrainConfig()
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):  # not fused
        with pytest.raises(TypeError, match=f"{optimizer.__name__} reads no grad_scale"):
            pretrain.train_step(
                student, optimizer(student.parameters(), lr=0.1), batch, config, torch.float32, 0
            )


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
    # the other options come from config.json
    pretrain.main(
        ["--resume", "--corpus", str(place / "corpus.txt"), "--out", str(tmp_path / "parts")]
    )
    pretrain.main(
        ["--resume", "--corpus", str(place / "corpus.txt"), "--out", str(tmp_path / "whole")]
    )  # nothing is left to read
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    stories = [read_lines(tmp_path / run / "evaluations.jsonl") for run in ("whole", "parts")]
    assert stories[0] == stories[1]


def test_a_signal_ends_pretraining_by_the_signal_after_it_saved(place, tmp_path):
    """So that a shell does not go on to the next command with a student that is half trained."""
    run = tmp_path / "p"
    argv = [*SMALL, *cli("--corpus {} --words 100M --out {}", place / "corpus.txt", run)]
    program = [sys.executable, ROOT / "train_pretrain.py", *argv]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == -signal.SIGTERM
    assert "everything is saved. Resume with: " in output
    assert checkpoint.read_counters(checkpoint.newest(run))["step"] == metrics(run)[-1]["step"]


@pytest.mark.parametrize("stops", [False, True])
def test_a_run_that_is_moved_ends_and_can_go_on_in_its_new_place(
    place, tmp_path, monkeypatch, capsys, stops
):
    """Also if it is asked to stop before it writes again."""
    run, moved = tmp_path / "p", tmp_path / "moved"
    argv = [*SMALL, *cli("--corpus {} --words 2000", place / "corpus.txt")]
    pretrain.main([*argv, "--out", str(tmp_path / "whole")])
    log = pretrain.RunLog.metrics

    def moving(self, *, step, **values):
        record = log(self, step=step, **values)
        if step == 9:
            run.rename(moved)
        if step == 9 and stops:
            signal.raise_signal(signal.SIGINT)
        return record

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.RunLog, "metrics", moving)
        line = fails(pretrain.main, [*argv, "--save-every", "4", "--out", str(run)], capsys)
    assert ("No such file" if stops else f"{run}/metrics.jsonl was moved or deleted") in line
    assert not run.exists()
    again = cli("--corpus {} --out {}", place / "corpus.txt", moved)
    pretrain.main(["--resume", *again])
    assert_same_run(tmp_path / "whole", moved)


@pytest.mark.parametrize("passes, warned", [(9.9, False), (10.1, True)])
def test_too_many_passes_over_a_corpus_are_said_with_what_would_suit(
    place, tmp_path, capsys, monkeypatch, passes, warned
):
    corpus = place / "corpus.txt"
    _, _, history = checkpoint.load(checkpoint.newest(place / "p"))
    words = int(passes * history["corpus_words"])
    argv = [*SMALL, *cli("--corpus {} --words {} --out {}", corpus, words, tmp_path / "p")]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "pretrain", lambda run: None)
        patch.setattr(pretrain, "finish", lambda run: None)
        pretrain.main(argv)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("10 passes over a corpus of" in printed) == warned
    assert (f"give --words {4 * history['corpus_words']} (4 passes)" in printed) == warned


def test_pretraining_tells_a_story_before_its_first_step_and_at_each_validation(
    place, tmp_path, capsys
):
    corpus = str(place / "corpus.txt")
    run = tmp_path / "p"
    pretrain.main(["--corpus", corpus, "--words", "2000", *SMALL, "--out", str(run)])
    validated = [record["step"] for record in metrics(run) if record["val_loss"]]
    stories = read_lines(run / "evaluations.jsonl")
    assert [story["step"] for story in stories] == [0, *validated]
    assert {story["opening"] for story in stories} == {OPENING}

    printed = capsys.readouterr().out
    headings = [line for line in printed.splitlines() if line.startswith("--- step ")]
    assert headings[0] == "--- step 0"
    assert len(headings) == len(stories)
    assert " ".join(OPENING.split()) in " ".join(printed.split())
    assert printed.index("--- step 0") < printed.index("report: ")
    page = (run / "report.html").read_text()
    assert page.count(f"<em>{OPENING}</em>") > 1


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

    class Download(pretrain.Download):  # of a step's numbers, not of a sample
        def wait(self):
            events.append("read")
            return super().wait()

    monkeypatch.setattr(pretrain, "Download", Download)
    with interrupted_at(pretrain, step=3):
        pretrain.main([*argv, "--out", str(tmp_path / "parts")])
    assert events == "launched launched read launched read launched read read".split()
    assert checkpoint.newest(tmp_path / "parts").name == "step_0000004"
    assert len(metrics(tmp_path / "parts")) == 4
    pretrain.main(
        ["--resume", "--corpus", str(place / "corpus.txt"), "--out", str(tmp_path / "parts")]
    )
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
    assert checkpoint.newest(tmp_path / "p").name == "step_0000002"
    assert len(metrics(tmp_path / "p")) == 2


def test_weights_that_are_not_finite_are_not_saved_by_pretraining(
    place, tmp_path, monkeypatch, capsys
):
    """The loss of the step that makes such weights is finite."""
    argv = ["--corpus", str(place / "corpus.txt"), "--words", "900", "--save-every", "1", *SMALL]
    argv += ["--out", str(tmp_path / "p")]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train_step", spoiling(pretrain.train_step, 3, lambda it: it))
        line = fails(pretrain.main, argv, capsys)
    assert "step 3 diverged" in line and "--muon-learning-rate" in line
    assert checkpoint.newest(tmp_path / "p").name == "step_0000002"
    pretrain.main(["--resume", "--corpus", str(place / "corpus.txt"), "--out", str(tmp_path / "p")])
    assert metrics(tmp_path / "p")[-1]["words"] >= 900


def test_micro_batches_change_only_memory(place, tmp_path):
    argv = ["--corpus", str(place / "corpus.txt"), "--words", "1000", "--dtype", "float32", *SMALL]
    pretrain.main([*argv, "--out", str(tmp_path / "a")])
    pretrain.main([*argv, "--micro-batch-size", "3", "--out", str(tmp_path / "b")])
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


@pytest.mark.parametrize("stories", [["a b " * 200, "b a"], tiny_stories(160)])
def test_resuming_a_changed_corpus_is_refused(place, tmp_path, capsys, stories):
    """Whether or not the other tokenizer has another vocabulary size, and so the weights another
    shape."""
    corpus = tmp_path / "c.txt"
    corpus.write_text((place / "corpus.txt").read_text())
    pretrain.main(["--corpus", str(corpus), "--words", "300", "--out", str(tmp_path / "r"), *SMALL])
    corpus.write_text("\n<|endoftext|>\n".join(stories))
    line = fails(
        pretrain.main,
        cli("--resume --words 600 --corpus {} --out {}", corpus, tmp_path / "r"),
        capsys,
    )
    assert "the corpus changed since" in line and "model.safetensors" not in line


@pytest.mark.parametrize("separator, is_warned_of", [("\n", True), ("\n\n", False)])
def test_stories_that_are_not_separated_are_said_to_be_long_documents(
    tmp_path, capsys, monkeypatch, separator, is_warned_of
):
    """A .txt with one story a line is a few documents, cut every MAX_DOCUMENT characters."""
    monkeypatch.setattr("tinystory.data.shards.cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr("tinystory.data.corpus.MAX_DOCUMENT", 8000)
    stories = tiny_stories(150)
    (tmp_path / "c.txt").write_text(separator.join(stories))
    argv = ["--corpus", str(tmp_path / "c.txt"), "--words", "50", *SMALL]
    pretrain.main([*argv, "--out", str(tmp_path / "p")])
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"bits per byte, on the held-out 5 % of c\.txt", printed)
    documents, median = re.search(
        r"corpus: (\d+) training .* length ([\d,]+) words", printed
    ).groups()
    if is_warned_of:
        assert int(documents) < 6 and int(median.replace(",", "")) > 1000
        assert "in documents of more than 640 tokens, 10 times --context" in printed
        assert "separate the stories of a .txt file by blank lines or <|endoftext|>" in printed
    else:
        assert int(documents) > 120
        assert min(map(count_words, stories)) <= int(median) <= max(map(count_words, stories))
        assert "warning" not in printed


def count_words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("change", [{"seed": 7}, {"val_fraction": 0.5}])
def test_resuming_with_another_tokenizer_is_refused(place, tmp_path, capsys, change):
    """Whether the command line gives it or an edited config.json. Weights learned with one
    tokenizer mean nothing with another."""
    shutil.copytree(place / "p", tmp_path / "p")
    resume = ["--resume", "--words", "2700", "--out", str(tmp_path / "p")]
    resume += ["--corpus", str(place / "corpus.txt")]
    ((name, value),) = change.items()
    flags = [f"--{name.replace('_', '-')}", str(value)]
    assert "does not go with --resume" in fails(pretrain.main, [*resume, *flags], capsys)
    record = read_config(tmp_path / "p")
    record["options"] |= change
    write_config(tmp_path / "p", record)
    line = fails(pretrain.main, resume, capsys)
    assert "the tokenizer of" in line and "is not the one that the corpus gives now" in line
    assert len(metrics(tmp_path / "p")) == len(metrics(place / "p"))


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
