"""Both commands whole on the simulated device, beside the CPU: the same losses and stories, no
race, no stale memory (a read of either raises), and no wait of the host where docs/kernels.md
promises none. test_cuda_device.py starts it.
"""

import copy
import dataclasses
import gc
import shutil
import weakref

import pytest
import torch
from conftest import metrics, read_lines, save_eager, tiny_stories, weights
from plugin import waits_within

import train_interact as interact
import train_pretrain as pretrain
from tinystory.data.tokenizer import Tokenizer
from tinystory.student.generate import StudentDecoder, generate
from tinystory.student.model import Student, StudentConfig, ValueHead
from tinystory.student.token_step import TOKEN_STEPS, TokenStep

PRETRAIN = "--n-layer 2 --n-head 2 --n-embd 64 --context 64 --vocab-size 320 --batch-size 4 --micro-batch-size 2"
PRETRAIN = (
    f"{PRETRAIN} --dropout 0.1 --words 1200 --eval-every 5 --save-every 6 --dtype float32".split()
)
INTERACT = "--stories-per-step 80 --max-new-tokens 20 --steps 3 --save-every 2 --eval-every 2 --eval-stories 4"
INTERACT = f"{INTERACT} --no-calibrate --dtype float32".split()
OPENINGS = "Once upon a time,\nMia said\nThen Tom had a boat\nOnce\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus, a reward, openings, a pretrained student per device, and a student
    that ends stories soon."""
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


def files(place) -> list[str]:
    return ["--openings", str(place / "openings.txt"), "--reward", f"{place / 'reward.py'}:score"]


def interaction(place, name, device, *options) -> None:
    out = ["--init", str(place / "init"), "--out", str(place / name), "--device", device]
    interact.main([*files(place), *out, *INTERACT, *options])


def resumed(run, main, *options):
    """A copy of the run, cut to the checkpoint before the newest and run to the end again."""
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


def test_a_pretraining_step_waits_for_nothing_and_a_resumed_run_ends_with_the_same_bits(
    place, device_machine
):
    again = resumed(place / "cuda", pretrain.main, "--corpus", str(place / "corpus.txt"))
    assert device_machine.launches["cross_entropy"] == 8
    for name in ("train_step", "load_batch"):
        assert waits_within(name) == []
    before, after = weights(place / "cuda"), weights(again)
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


def test_interaction_is_the_cpus_and_waits_where_it_says(place, device_machine):
    """Stories end at different steps, the batch is compacted, graphs are replayed in every later
    rollout, and evaluations come between rollouts."""
    interaction(place, "here", "cpu")
    device_machine.waits.clear()
    interaction(place, "there", "cuda")
    for name in ("evaluations.jsonl", "stories.jsonl"):
        here, there = (
            [x["story"] for x in read_lines(place / run / name)] for run in ("here", "there")
        )
        same = [a == b for a, b in zip(here, there, strict=True)]
        assert sum(same) >= 0.9 * len(same) >= 10  # on some processor rounding may turn a draw
    stories = read_lines(place / "there" / "stories.jsonl")
    assert len({x["ended"] for x in stories}) == 2
    for a, b in zip(metrics(place / "here"), metrics(place / "there"), strict=True):
        for name in ("kl", "policy_loss"):
            assert a[name] == pytest.approx(b[name], abs=1e-4 if all(same) else 0.1)
    assert device_machine.captures > 1 and device_machine.replays > 10 * device_machine.captures
    inside = {
        name: waits_within(name)
        for name in "advance start keep prefill backward with_reference".split()
    }
    assert not any(inside.values()), inside
    assert {kind for kind, _, _ in waits_within("generate")} == {"event"}
    again = resumed(place / "there", interact.main, *files(place))
    before, after = weights(place / "there"), weights(again)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_lines(again / "stories.jsonl") == stories


# --- rollouts -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizer():
    """The student's vocabulary is no multiple of 64, so rows of logits are padded."""
    return Tokenizer.train(tiny_stories(200), 333)


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Student(StudentConfig(2, 2, 64, 64, 333, tied=False), "unit").to("cuda")


def rollout(student, tokenizer, openings, new=8, head=None, seed=1):
    return generate(
        student, head, tokenizer, openings, first_index=0, max_new_tokens=new, seed=seed
    )


def alike(stories, others) -> bool:
    """Whether both lists have stories of the same tokens, with other values that differ only by
    rounding."""
    pairs = [*zip(stories, others, strict=True)]
    for a, b in pairs:
        for name in ("logprobs", "values", "entropies"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-4, rtol=1e-4)
    return all(torch.equal(a.tokens, b.tokens) for a, b in pairs)


def test_a_rollout_waits_once_per_eight_tokens(student, tokenizer, device_machine):
    stories = rollout(student, tokenizer, ["Once", "Mia said", "The boat"] * 40, 30)
    longest = max(len(story.tokens) for story in stories)
    assert sum(device_machine.waits.values()) == -(-longest // 8)
    assert {kind for kind, _ in device_machine.waits} == {"event"}


def test_the_host_reads_a_step_when_later_ones_are_launched(student, tokenizer, monkeypatch):
    launched, launched_at_read = [], []
    advance, step = TokenStep.advance, StudentDecoder.step
    monkeypatch.setattr(TokenStep, "advance", lambda self: (launched.append(self), advance(self)))
    monkeypatch.setattr(
        StudentDecoder, "step", lambda self: (step(self), launched_at_read.append(len(launched)))[0]
    )
    with torch.no_grad():
        student.ln_f.bias -= 9 * student.unembedding[tokenizer.eos]  # no story ends early
    rollout(student, tokenizer, ["Once"] * 3, 20)
    assert launched_at_read == [15, 19, 19]  # `start` draws the first token


def test_graphs_follow_the_weights_and_weights_elsewhere_are_captured_anew(
    student, tokenizer, device_machine
):
    """Stories are those of a student that has no graph yet."""
    head = ValueHead(64).to("cuda")
    torch.nn.init.normal_(head.linear.weight)
    openings = ["Once", "Mia said"] * 40
    for captured_anew in (True, False, False, True):
        if captured_anew:
            # at another address
            student.wpe.weight = torch.nn.Parameter(student.wpe.weight.detach() * 1.5)
        before = device_machine.captures
        stories = rollout(student, tokenizer, openings, head=head)
        assert (device_machine.captures > before) == captured_anew
        assert alike(stories, rollout(copy.deepcopy(student), tokenizer, openings, head=head))
        with torch.no_grad():
            student.wpe.weight.mul_(1.5)
    step = TOKEN_STEPS[student]
    assert step.fits(head, 79, 9, step.sampling)
    other = dataclasses.replace(step.sampling, seed=4)
    for wrong in (
        (None, 80, 9, step.sampling),
        (head, 81, 9, step.sampling),
        (head, 80, 2000, step.sampling),
    ):
        assert not step.fits(*wrong)
    assert not step.fits(head, 80, 9, other)
    with torch.autocast("cuda", torch.bfloat16):
        assert not step.fits(head, 80, 9, step.sampling)


def test_an_error_in_a_capture_is_not_hidden_by_that_of_the_broken_capture(
    student, tokenizer, monkeypatch
):
    run, capture_end = TokenStep.run, torch.cuda.CUDAGraph.capture_end

    def fails_in_a_capture(step):
        run(step)
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("the cause")

    def breaks(graph):
        capture_end(graph)
        raise RuntimeError("capture_end: the capture is invalid")

    monkeypatch.setattr(TokenStep, "run", fails_in_a_capture)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", breaks)
    with pytest.raises(ValueError, match="the cause"):
        rollout(student, tokenizer, ["Once"])


def test_only_waits_of_autograds_threads_count_as_waits_in_backward(device_machine):
    on_device = torch.ones(3).to("cuda")  # waits in the test itself
    assert device_machine.waits.total() == 1 and waits_within("backward") == []
    x = on_device.requires_grad_()
    copies: list[torch.Tensor] = []
    x.register_hook(lambda grad: copies.append(grad.cpu()))
    x.sum().backward()
    assert [(kind, n) for kind, _, n in waits_within("backward")] == [("copy to the host", 1)]


def test_a_student_that_is_gone_keeps_no_step(tokenizer):
    student = Student(StudentConfig(1, 2, 64, 40, 333)).to("cuda")
    rollout(student, tokenizer, ["Once"])
    step = weakref.ref(TOKEN_STEPS[student])
    assert step() is not None
    del student
    gc.collect()
    assert step() is None


def test_an_evaluation_with_longer_prompts_and_fewer_stories_costs_no_capture_per_rollout(
    student, tokenizer, device_machine
):
    texts = [f"Once upon a time, there was a boat number {i}, and nobody" for i in range(50)]
    assert sum(len(tokenizer.encode(text)) for text in texts) > 1024
    captures = []
    for _ in range(3):
        rollout(student, tokenizer, ["Once"] * 80), rollout(student, tokenizer, texts)
        captures.append(device_machine.captures)
    assert captures[1] == captures[2]


def test_a_default_device_of_the_caller_changes_nothing(student, tokenizer):
    plain = rollout(student, tokenizer, ["Once"] * 3)
    for device in ("cpu", "cuda"):
        with torch.device(device):
            assert alike(plain, rollout(student, tokenizer, ["Once"] * 3))
