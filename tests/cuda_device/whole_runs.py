"""Both commands whole on the simulated device, beside the CPU: the same losses and stories, no race, no stale memory (a
read of either raises), and no wait of the host where docs/kernels.md promises none. test_cuda_device.py starts it.
"""

import shutil

import pytest
import torch
from conftest import metrics, read_lines, save_eager, tiny_stories, weights
from plugin import waits_within

import train_interact as interact
import train_pretrain as pretrain
from tinystory.student.generate import generate
from tinystory.student.model import Student, StudentConfig

PRETRAIN = "--n-layer 2 --n-head 2 --n-embd 64 --context 64 --vocab-size 320 --batch-size 4 --micro-batch-size 2"
PRETRAIN = f"{PRETRAIN} --dropout 0.1 --words 1200 --eval-every 5 --save-every 6 --dtype float32".split()
INTERACT = "--stories-per-step 80 --max-new-tokens 20 --steps 3 --save-every 2 --eval-every 2 --eval-stories 4"
INTERACT = f"{INTERACT} --no-calibrate --dtype float32".split()
OPENINGS = "Once upon a time,\nMia said\nThen Tom had a boat\nOnce\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus, a reward and openings; pretrained students of both devices; and one that ends its stories soon."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "corpus.txt").write_text("\n<|endoftext|>\n".join(tiny_stories(150)))
    (folder / "openings.txt").write_text(OPENINGS)
    (folder / "reward.py").write_text(
        "def score(opening, stories):\n    return [min(1.0, len(set(s.split())) / 12) for s in stories]\n"
    )
    for device in ("cpu", "cuda"):
        out = ["--out", str(folder / device), "--device", device]
        pretrain.main(["--corpus", str(folder / "corpus.txt"), *PRETRAIN, *out])
    save_eager(folder / "cpu", folder / "init")
    return folder


def interaction(place, name, device, *options) -> None:
    files = ["--openings", str(place / "openings.txt"), "--reward", f"{place / 'reward.py'}:score"]
    out = ["--init", str(place / "init"), "--out", str(place / name), "--device", device]
    interact.main([*files, *out, *INTERACT, *options])


def resumed(run, main, *options):
    """A copy of the run, cut to its checkpoint before the newest and run to its end again."""
    again = shutil.copytree(run, run.with_name(f"{run.name}_again"))
    checkpoints = sorted((again / "checkpoints").glob("step_*"))
    assert len(checkpoints) > 1
    shutil.rmtree(checkpoints[-1])
    main(["--resume", "--out", str(again), *options])
    return again


def test_pretraining_is_the_cpus(place):
    here, there = metrics(place / "cpu"), metrics(place / "cuda")
    assert len(here) == len(there) == 10
    for a, b in zip(here, there, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["lr"] == b["lr"]
        assert (a["val_loss"] is None) == (b["val_loss"] is None)
        assert a["val_loss"] is None or a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-4)


def test_a_pretraining_step_waits_for_nothing_and_a_resumed_run_ends_with_the_same_bits(place, device_machine):
    again = resumed(place / "cuda", pretrain.main)
    assert device_machine.launches["cross_entropy"] == 8
    for name in ("train_step", "load_batch"):
        assert waits_within(name) == []
    before, after = weights(place / "cuda"), weights(again)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_interaction_is_the_cpus_and_waits_where_it_says(place, device_machine):
    """With stories that end apart, the batch compacted, graphs replayed in every later rollout, and evaluations between
    rollouts."""
    interaction(place, "here", "cpu")
    device_machine.waits.clear()
    interaction(place, "there", "cuda")
    for name in ("stories.jsonl", "evaluations.jsonl"):
        here, there = ([x["story"] for x in read_lines(place / run / name)] for run in ("here", "there"))
        assert here == there and len(here) >= 12
    stories = read_lines(place / "there" / "stories.jsonl")
    assert len({x["ended"] for x in stories}) == 2
    for a, b in zip(metrics(place / "here"), metrics(place / "there"), strict=True):
        assert a["kl"] == pytest.approx(b["kl"], abs=1e-4) and a["policy_loss"] == pytest.approx(
            b["policy_loss"], abs=1e-4
        )
    assert device_machine.captures > 1 and device_machine.replays > 10 * device_machine.captures
    for name in ("advance", "start", "keep", "prefill", "response_stats"):
        assert waits_within(name) == [], name
    assert {kind for kind, _, _ in waits_within("generate")} == {"event"}
    again = resumed(place / "there", interact.main, "--reward", f"{place / 'reward.py'}:score")
    before, after = weights(place / "there"), weights(again)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_lines(again / "stories.jsonl") == stories


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Student(StudentConfig(2, 2, 64, 64, 320), "unit").to("cuda")


@torch.no_grad()
def rollout(student, tokenizer, openings, new=8):
    return generate(student, None, tokenizer, openings, first_index=0, max_new_tokens=new, seed=1)


def test_a_rollout_waits_once_per_token_and_once_per_token_that_ends_stories(student, tokenizer, device_machine):
    stories = rollout(student, tokenizer, ["Once", "Mia said", "The boat"] * 40, 30)
    endings = {len(story.tokens) for story in stories}
    assert sum(device_machine.waits.values()) == max(endings) + len(endings)
    assert {kind for kind, _ in device_machine.waits} == {"event"}


def test_an_evaluation_with_longer_prompts_and_fewer_stories_costs_no_capture_per_rollout(
    student, tokenizer, device_machine
):
    texts = [f"Once upon a time, there was a boat number {i}, and nobody" for i in range(50)]
    assert sum(len(tokenizer.encode(text)) for text in texts) > 1024
    before = []
    for _ in range(3):
        rollout(student, tokenizer, ["Once"] * 80), rollout(student, tokenizer, texts)
        before.append(device_machine.captures)
    assert before[1] == before[2]


def test_a_default_device_of_the_caller_changes_nothing(student, tokenizer):
    plain = rollout(student, tokenizer, ["Once"] * 3)
    for device in ("cpu", "cuda"):
        with torch.device(device):
            assert all(
                torch.equal(a.tokens, b.tokens)
                for a, b in zip(plain, rollout(student, tokenizer, ["Once"] * 3), strict=True)
            )
