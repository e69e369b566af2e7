"""scripts/bench.py on a tiny shape: one line of JSON that adds up, through the product's own functions."""

import json
import statistics
from xml.etree import ElementTree

import pytest
import torch

from scripts import bench as bench_script
from tinystory.student.model import StudentConfig
from tinystory.studies import peers


@pytest.fixture
def bench(monkeypatch):
    tiny = StudentConfig(n_layer=2, n_head=2, n_embd=64, context=64, vocab_size=300)
    monkeypatch.setitem(bench_script.SHAPES, "small", tiny)
    return bench_script


@pytest.fixture
def run(bench, capsys):
    def run(*argv: str) -> dict:
        bench.main(["--device", "cpu", "--json", "--runs", "1", *argv])
        out, err = capsys.readouterr()
        assert out.count("\n") == 1 and err == ""
        return json.loads(out)

    return run


def test_rollout_counts_the_tokens_that_were_written(run):
    r = run("rollout", "--batch", "6", "--new", "9")
    assert r["bench"] == "rollout" and r["batch"] == 6 and r["new"] == 9 and r["runs"] == 1
    assert 0 < r["tokens"] <= 54
    assert r["tokens_per_s"] == pytest.approx(r["tokens"] / r["rollout_s"], rel=0.1)  # times are rounded
    assert r["gemm_limit_tokens_per_s"] > 0 and r["peak_mb"] > 50


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_is_a_whole_iteration(run, bench, monkeypatch, dtype):
    updates, epochs = bench.ppo.update, []

    def update(*args):
        stats = updates(*args)
        epochs.append(args[0].config.epochs)
        assert stats["skipped"] == 0
        return stats

    monkeypatch.setattr(bench.ppo, "update", update)
    r = run("ppo", "--batch", "4", "--new", "8", "--dtype", dtype)
    assert epochs == [4, 4]  # one that is not timed, one that is
    assert r["dtype"] == dtype
    assert 0 < r["reference_s"] < r["update_s"] < r["total_s"]
    assert r["total_s"] == pytest.approx(r["rollout_s"] + r["update_s"], rel=0.2, abs=0.01)


def test_pretraining_is_train_pretrains_own_step(run, monkeypatch):
    import train_pretrain  # found where scripts/bench.py looks for it

    steps, seen = train_pretrain.train_step, []

    def step(student, optimizer, tokens, *rest, **how):
        seen.append(tuple(tokens.shape))
        return steps(student, optimizer, tokens, *rest, **how)

    monkeypatch.setattr(train_pretrain, "train_step", step)
    r = run("pretrain", "--batch", "3")
    assert seen == [(3, 65)] * 2
    assert r["tokens_per_s"] == pytest.approx(3 * 64 / r["step_s"], rel=0.1)  # times are rounded


def test_kernels_are_all_beside_pytorchs(run):
    r = run("kernels", "--batch", "2", "--dtype", "float32")
    logprobs = {"token_logprob", "token_logprob_entropy", "cross_entropy"}
    assert set(r["kernels"]) == {"attention", "sample", "decode_attention"} | logprobs
    for figures in r["kernels"].values():
        assert figures["ours_ms"] > 0 and figures["torch_ms"] > 0 and figures["ratio"] > 0


def test_growth_is_measured_and_drawn(run, tmp_path):
    file = tmp_path / "growth.svg"
    r = run("growth", "--batch", "2", "--new", "4", "--plot", str(file))
    assert r["base"] == dict(batch=2, context=64, vocabulary=300, length=4)
    varied = {
        "batch": ([1, 2, 4, 8, 16], {"reading", "writing", "update"}),
        "context": ([8, 16, 32, 64, 128], {"reading"}),  # a longer one leaves no whole sequence of a step's 128 tokens
        "vocabulary": ([37, 75, 150, 300, 600, 1200, 2400], {"reading", "writing", "update"}),
        "length": ([1, 2, 4, 8, 16, 32], {"writing", "update"}),
    }
    assert set(r["growth"]) == set(varied)
    for quantity, (values, parts) in varied.items():
        assert set(r["growth"][quantity]) == parts
        for points in r["growth"][quantity].values():
            assert points["x"] == values and len(points["us_per_token"]) == len(values)
            assert min(points["us_per_token"]) > 0

    root = ElementTree.parse(file).getroot()
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    for title in ("batch, 1 at 2", "context, 1 at 64", "vocabulary, 1 at 300", "length, 1 at 4"):
        assert f"Time per token against {title}" in texts
    paths = [each.get("class") for each in root.iter("{http://www.w3.org/2000/svg}path")]
    assert paths.count("line") == 9
    for part in ("reading", "writing", "update"):
        assert sum(text.startswith(f"{part} ") for text in texts) == 3


def test_what_cannot_be_is_one_sentence(bench, capsys):
    for argv, message in (
        (["rollout", "--new", "60"], "--new 60 does not fit: small has room for 44 tokens"),
        (["rollout", "--batch", "-3"], "must be at least 1"),
        (["ppo", "--runs", "0"], "must be at least 1"),
        (["ppo", "--plot", "ppo.svg"], "needs the bench growth"),
        (["growth", "--plot", "no/such/folder/growth.svg"], "a folder that exists"),
    ):
        with pytest.raises(SystemExit) as exit:
            bench.main(argv)
        assert exit.value.code == 2 and message in capsys.readouterr().err


def test_a_profile_names_the_engines_phases(bench, capsys):
    if not bench.ops.load():
        pytest.skip("the kernels are not compiled")
    bench.main(["rollout", "--batch", "4", "--new", "5", "--device", "cpu", "--runs", "1", "--profile"])
    out, err = capsys.readouterr()
    assert json.loads(out)["bench"] == "rollout"
    for phase in ("engine: qkv", "engine: attention", "engine: draw"):
        assert phase in err


def test_memory_held_is_that_of_the_call(bench):
    held = bench.held_mb(lambda: torch.ones(32 * 2**18).sum(), torch.device("cpu"))
    if held is None:
        pytest.skip("the system does not tell")
    assert 30 < held < 60


# --- peers ------------------------------------------------------------------------------------------------------------
NANOGPT = """
import time
import torch

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
        time.sleep(2 if torch.is_autocast_enabled("cpu") else 0.01)
        return None, self.embed(x).square().mean()
"""


@pytest.fixture
def nanogpt(tmp_path, monkeypatch, bench):
    (tmp_path / "model.py").write_text(NANOGPT)
    # Compiling is PyTorch's own work; with bfloat16 the stand-in is slow.
    monkeypatch.setitem(bench.PEERS, "pretrain", ("step_s", "nanogpt", ("eager-float32", "eager-bfloat16")))
    monkeypatch.setattr(bench, "cpu_has_bf16", lambda: True)
    return tmp_path


@pytest.mark.parametrize("optimizer", [[], ["--optimizer", "muon"]], ids=["adamw", "muon"])
def test_peers_take_turns_and_a_slow_mode_is_measured_once(nanogpt, run, bench, monkeypatch, optimizer):
    order, seconds, make = [], {"ours": [], "peer": []}, bench.RUNS["pretrain"]

    def ours(*arguments, **options):
        assert options == dict(optimizer=(optimizer or ["adamw"])[-1])  # nanoGPT's, or ours
        step = make(*arguments, **options)

        def lap():
            order.append("ours")
            lap = step()
            seconds["ours"].append(lap["step_s"])
            return lap

        return lap

    class Watched(peers.Peer):
        def run(self):
            order.append("peer")
            seconds["peer"].append(super().run())
            return seconds["peer"][-1]

    monkeypatch.setitem(bench.RUNS, "pretrain", ours)
    monkeypatch.setattr(peers, "Peer", Watched)
    found = run("peers", "--nanogpt", str(nanogpt), "--new", "9", "--runs", "3", *optimizer)["peers"]["pretrain"]
    assert order == ["ours"] + ["ours", "peer"] * 3  # one to warm up
    turns = [peer / our for peer, our in zip(seconds["peer"], seconds["ours"][1:], strict=True)]
    assert found["ratio"] == pytest.approx(statistics.median(turns), abs=0.006)
    assert found["best"] == "eager-float32"
    assert found["peer_s"]["eager-bfloat16"] >= 2 > found["peer_s"]["eager-float32"]
    assert found["tokens_per_s"] == pytest.approx(16 * 64 / found["ours_s"], rel=0.01)
    assert peers.table_row("pretrain", found).endswith(
        f"{found['ratio']:.2f}x | {found['gemm_limit_tokens_per_s']:,.0f} tokens/s |"
    )


def test_a_peer_that_fails_is_quoted(nanogpt, bench, capsys):
    (nanogpt / "model.py").write_text("raise SystemExit('no such model')")
    with pytest.raises(SystemExit):
        bench.main(["peers", "--nanogpt", str(nanogpt), "--new", "9", "--json"])
    assert "the peer nanogpt ended with status 1 and said: no such model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["peers"], "peers needs --nanogpt DIR"),
        (["peers", "--nanogpt", "nowhere"], "nowhere has no model.py"),
        (["peers", "--trl", "nowhere"], "nowhere is no file"),
        (["peers", "--nanogpt", ".", "--batch", "2"], "leave out --batch"),
        (["ppo", "--trl", "python"], "go with the bench peers"),
    ],
)
def test_what_peers_needs_is_said(bench, capsys, arguments, said):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert said in capsys.readouterr().err
