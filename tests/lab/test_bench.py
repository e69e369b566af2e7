"""lab/bench.py on a tiny shape: one line of JSON that adds up, through the product's own
functions."""

import contextlib
import dataclasses
import json
import statistics

import pytest
import torch
from conftest import cli

from lab import bench as bench_script
from lab import timing
from tinystory.student.model import StudentConfig


@pytest.fixture
def bench(monkeypatch):
    tiny = StudentConfig(n_layer=2, n_head=2, n_embd=64, context=64, vocab_size=300)
    monkeypatch.setitem(timing.SHAPES, "small", tiny)
    return bench_script


@pytest.fixture
def run(bench, capsys):
    def run(*argv: str) -> dict:
        bench.main(["--device", "cpu", "--runs", "1", *argv])
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        return json.loads(out)

    return run


def test_rollout_counts_the_tokens_that_were_written(run):
    r = run("rollout", "--batch", "6", "--new", "9")
    assert r["bench"] == "rollout" and r["batch"] == 6 and r["new"] == 9 and r["runs"] == 1
    assert 0 < r["tokens"] <= 54
    # times are rounded
    assert r["tokens_per_s"] == pytest.approx(r["tokens"] / r["rollout_s"], rel=0.1)
    assert r["gemm_limit_tokens_per_s"] > 0 and r["peak_mb"] > 50


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_is_a_whole_iteration(run, monkeypatch, dtype):
    updates, epochs = timing.ppo.update, []

    def update(*args):
        stats = updates(*args)
        epochs.append(args[0].config.epochs)
        assert stats["skipped"] == 0
        return stats

    monkeypatch.setattr(timing.ppo, "update", update)
    r = run("ppo", "--batch", "4", "--new", "8", "--dtype", dtype)
    assert epochs == [4, 4]  # one that is not timed, one that is
    assert r["dtype"] == dtype
    assert 0 < r["reference_s"] < r["update_s"] < r["total_s"]
    assert r["total_s"] == pytest.approx(r["rollout_s"] + r["update_s"], rel=0.2, abs=0.01)


def test_pretraining_is_train_pretrains_own_step(run, monkeypatch):
    steps, seen = timing.train_step, []

    def step(student, optimizer, tokens, *rest, **how):
        seen.append(tuple(tokens.shape))
        return steps(student, optimizer, tokens, *rest, **how)

    monkeypatch.setattr(timing, "train_step", step)
    r = run("pretrain", "--batch", "3")
    assert seen == [(3, 65)] * 2
    assert r["tokens_per_s"] == pytest.approx(3 * 64 / r["step_s"], rel=0.1)  # times are rounded


def test_kernels_are_all_beside_pytorchs(run):
    r = run("kernels", "--batch", "2", "--dtype", "float32")
    logprobs = {"token_logprob", "token_logprob_entropy", "cross_entropy"}
    assert set(r["kernels"]) == {"attention", "sample", "decode_attention"} | logprobs
    for figures in r["kernels"].values():
        assert figures["ours_ms"] > 0 and figures["torch_ms"] > 0 and figures["ratio"] > 0


def test_what_cannot_be_is_one_sentence(bench, capsys):
    for argv, message in (
        (["rollout", "--new", "60"], "--new 60 does not fit: small has room for 44 tokens"),
        (["rollout", "--batch", "-3"], "--batch must be"),
        (["ppo", "--runs", "0"], "--runs must be"),
    ):
        with pytest.raises(SystemExit) as exit:
            bench.main(argv)
        assert exit.value.code == 2 and message in capsys.readouterr().err


def test_a_profile_names_the_engines_phases(bench, run):
    if not bench.ops.load():
        pytest.skip("the kernels are not compiled")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees this one
    try:
        with torch.profiler.profile() as profiler:
            run("rollout", "--batch", "4", "--new", "5")
    finally:
        torch.set_num_threads(threads)
    assert {"engine: qkv", "engine: attention", "engine: draw"} <= {
        event.key for event in profiler.key_averages()
    }


# --- peers ----------------------------------------------------------------------------------------
NANOGPT = """
import time
import torch

clock = 0.0  # seconds that steps are said to take, whatever they do
time.perf_counter = lambda: clock

class GPTConfig:
    def __init__(self, **sizes):
        self.sizes = sizes

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        sizes = config.sizes
        assert (sizes["n_layer"], sizes["n_head"], sizes["n_embd"], sizes["bias"]) == (2, 2, 64, True)
        self.embed, self.steps = torch.nn.Embedding(sizes["vocab_size"], 8), 0
        print("number of parameters: few")  # as nanoGPT's does

    def forward(self, x, y):
        assert x.shape == y.shape == (16, 64)
        global clock
        clock += 2 if torch.is_autocast_enabled("cpu") else 0.01
        return None, self.embed(x).square().mean()
"""


@pytest.fixture
def nanogpt(tmp_path, monkeypatch, bench):
    (tmp_path / "model.py").write_text(NANOGPT)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling is PyTorch's own work
    monkeypatch.setattr(bench_script, "cpu_has_bf16", lambda: True)
    return tmp_path


def test_peers_take_turns_with_ours(nanogpt, run, monkeypatch):
    laps, work = [], timing.WORK["pretrain"]

    def ours(setup, **options):
        assert options == dict(optimizer="muon")
        step = work.make_run(setup, **options)

        def lap():
            laps.append([step()])
            return laps[-1][0]

        return lap

    @contextlib.contextmanager
    def watched(*settings, peer=bench_script.peer):
        with peer(*settings) as run:

            def lap():
                laps[-1].append(run())
                return laps[-1][-1]

            yield lap

    monkeypatch.setitem(timing.WORK, "pretrain", dataclasses.replace(work, make_run=ours))
    monkeypatch.setattr(bench_script, "peer", watched)
    argv = cli("peers --nanogpt {} --new 9 --runs 3 --optimizer muon", nanogpt)
    result = run(*argv)["peers"]["pretrain"]
    assert [len(lap) for lap in laps] == [3] * 4  # ours, and each dtype; the first turn warms up
    turns = [float32_s / ours["step_s"] for ours, float32_s, _ in laps[1:]]
    assert result["ratio"] == pytest.approx(statistics.median(turns), abs=0.006)
    assert result["best"] == "float32" and result["peer_s"] == {"float32": 0.01, "bfloat16": 2}


def test_a_peer_that_fails_is_named_below_its_own_message(nanogpt, bench, capfd):
    (nanogpt / "model.py").write_text("raise SystemExit('no such model')")
    with pytest.raises(SystemExit):
        bench.main(["peers", "--nanogpt", str(nanogpt), "--new", "9"])
    message, _, named = capfd.readouterr().err.partition("error: ")
    assert "no such model" in message and "the peer nanogpt ended with status 1" in named


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["peers"], "peers needs --nanogpt DIR"),
        (["peers", "--nanogpt", "nowhere"], "with its model.py"),
        (["peers", "--trl", "nowhere"], "the interpreter of an environment"),
        (["peers", "--nanogpt", ".", "--batch", "2"], "leave out --batch"),
        (["ppo", "--trl", "python"], "only for `lab/bench.py peers`"),
    ],
)
def test_what_peers_needs_is_said(bench, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err
