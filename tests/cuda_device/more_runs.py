"""The runs that whole_runs.py leaves out because they take longer: every learner and dtype, the
scripts, and the CUDA kernels of the SIMT machine under a policy's own likelihood.
test_cuda_device.py starts it, with those kernels and without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHORT, SMALL, cli, metrics, read_lines, tiny_stories
from plugin import waits_within

import train_interact as interact
import train_pretrain as pretrain
from tinystory import ops
from tinystory.ops.compute import pick_dtype
from tinystory.student import checkpoint

sys.path[:0] = [str(ROOT), str(ROOT / "tests/train")]
from test_learners import LEARNERS  # noqa: E402

KERNELS = "CUDA_DEVICE_KERNELS" in os.environ
needs_kernels = pytest.mark.skipif(not KERNELS, reason="only the CUDA kernels show it")


def on(device: str, options: list[str], *more: str) -> list[str]:
    """The same options for this device."""
    at = options.index("--device") + 1
    return [*options[:at], device, *options[at + 1 :], *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus and a reward, and a small student and the demo's, pretrained a little by the CPU's
    kernels."""
    folder = tmp_path_factory.mktemp("more")
    (folder / "corpus.txt").write_text("\n<|endoftext|>\n".join(tiny_stories(150)))
    (folder / "reward.py").write_text(
        "def score(opening, stories):\n    return [min(1.0, len(set(s.split())) / 12) for s in stories]\n"
    )
    small = ["--corpus", str(folder / "corpus.txt"), "--words", "2500", *SMALL]
    for name, options in (("p", small), ("demo", ["--words", "60000", "--device", "cpu"])):
        script = [sys.executable, str(ROOT / "train_pretrain.py")]
        script += cli("--dtype float32 --out {}", folder / name)
        subprocess.run([*script, *options], check=True)
    return folder


def run(place: Path, out: Path, device: str, *options: str, student: str = "p") -> list[dict]:
    init = checkpoint.newest(place / student)
    files = cli("--init {} --reward {}:score --out {}", init, place / "reward.py", out)
    interact.main([*files, *on(device, SHORT, *options)])
    return metrics(out)


@pytest.mark.skipif(KERNELS, reason="beside the CPU, whose operators are the CUDA ones then")
@pytest.mark.parametrize("options", LEARNERS)
def test_every_learner_is_the_cpus(place, tmp_path, device_machine, options):
    options = f"{options} --dtype float32 --steps 2".split()
    here, there = (run(place, tmp_path / device, device, *options) for device in ("cpu", "cuda"))
    for a, b in zip(here, there, strict=True):
        for name in ("kl", "policy_loss", "value_loss", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), name
    stories = (
        [x["story"] for x in read_lines(tmp_path / device / "stories.jsonl")]
        for device in ("cpu", "cuda")
    )
    assert next(stories) == next(stories)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_commands_run_in_every_dtype(place, tmp_path, device_machine, monkeypatch, dtype):
    decode, decoded = ops.decode_attention, set()
    monkeypatch.setattr(
        ops, "decode_attention", lambda qkv, *more: (decoded.add(qkv.dtype), decode(qkv, *more))[1]
    )
    corpus = ["--corpus", str(place / "corpus.txt"), "--words", "1500", "--dtype", dtype]
    pretrain.main(
        [*corpus, "--out", str(tmp_path / "p"), *on("cuda", SMALL, "--optimizer", "muon")]
    )
    losses = [record["loss"] for record in metrics(tmp_path / "p")]
    assert losses[-1] < losses[0] - 0.3
    assert decoded == {pick_dtype(dtype, torch.device("cuda"))}  # of the closing story
    steps = run(place, tmp_path / "i", "cuda", "--dtype", dtype, "--steps", "2")
    assert all(record["ratio_error"] < (1e-3 if dtype == "float32" else 0.05) for record in steps)


def test_the_papers_preset_runs(place, tmp_path, device_machine):
    """The options of the preset `paper` at a small size, AdamW and dropout among them."""
    paper = "--preset paper --micro-batch-size 2".split()
    files = cli("--corpus {} --words 600 --out {}", place / "corpus.txt", tmp_path / "p")
    pretrain.main([*paper, *files, *on("cuda", SMALL)])
    assert waits_within("train_step") == []
    files = cli("--init {} --out {}", tmp_path / "p", tmp_path / "i")
    files += cli("--reward {}:score", place / "reward.py")
    interact.main([*paper, *files, *on("cuda", SHORT, "--steps", "2")])
    assert len(metrics(tmp_path / "i")) == 2


@needs_kernels
@pytest.mark.parametrize("options", ["", "--learner rloo --stories-per-opening 4"])
def test_a_policy_that_was_not_updated_is_the_sampler(place, tmp_path, device_machine, options):
    """In bfloat16, with logits in float32 on both sides, the difference is 8e-6; with logits of the
    sampler that were rounded to bfloat16, it was 3e-5. One epoch of one minibatch is measured
    before the update."""
    options = (
        f"{options} --dtype bfloat16 --steps 1 --stories-per-step 16 --max-new-tokens 90 --epochs 1"
    )
    (step,) = run(
        place, tmp_path / "i", "cuda", *options.split(), "--minibatch-size", "0", student="demo"
    )
    assert step["approx_kl"] < 1.6e-5 and step["clip_fraction"] == 0


def test_scripts_run(place, tmp_path, device_machine, capsys):
    from lab import bench
    from scripts import evaluate, sample

    where, files = ["--device", "cuda"], [str(checkpoint.newest(place / "p"))]
    (tmp_path / "openings.txt").write_text("Once\n")
    sample.main([*files, "--stories", "3", "--max-new-tokens", "8", "--opening", "Once", *where])
    openings = ["--openings", str(tmp_path / "openings.txt")]
    evaluate.main([*files, "--stories", "4", "--max-new-tokens", "8", *openings, *where])
    for name in ("pretrain", "rollout", "ppo"):
        bench.main([name, "--batch", "2", "--new", "4", "--runs", "1", *where])
    assert device_machine.replays
