"""Every learner, and replay of the corpus, as a user runs them: stopped and resumed, counted,
refused."""

import json
import shutil
import weakref

import pytest
import torch
from conftest import SHORT, assert_same_bits, fails, metrics
from test_train import interrupted_at

import train_interact as interact
from tinystory.config import INTERACT_PRESETS, InteractConfig, parse
from tinystory.data.corpus import open_corpus
from tinystory.data.shards import prepare
from tinystory.rl.learners import check
from tinystory.rl.policy import load_policy
from tinystory.rl.replay import CorpusReplay
from tinystory.run.errors import UserError
from tinystory.run.records import write_manifest
from tinystory.student import checkpoint

REPLAY = "--replay-weight 0.3 --replay-batch 3"
LEARNERS = [
    "--learner gae",
    "--learner rloo --stories-per-opening 3",
    f"--learner sft-best {REPLAY}",
    "--learner grpo --stories-per-opening 2 --kl-in loss",
    "--learner dr_grpo --stories-per-opening 2 --epochs 2",
    f"--minibatch-size 2 {REPLAY}",
]


@pytest.fixture
def run(place, monkeypatch):
    """A short run of train_interact.py with more options; shards in the cache of the test's
    corpus."""
    monkeypatch.setattr("tinystory.data.shards.cache_dir", lambda: place / "cache")
    monkeypatch.setattr("tinystory.run.collapse.WINDOW", 100)  # no advice about these runs
    start = [
        "--init",
        str(checkpoint.newest(place / "p")),
        "--reward",
        f"{place / 'reward.py'}:score",
        *SHORT,
    ]
    return lambda out, *more: interact.main([*start, "--out", str(out), *more])


@pytest.mark.parametrize("options", LEARNERS)
def test_a_stopped_run_resumes_to_the_same_bits(run, tmp_path, options):
    run(tmp_path / "whole", *options.split())
    with interrupted_at(interact, step=3):
        run(tmp_path / "parts", *options.split())
    assert checkpoint.newest(tmp_path / "parts").name == "step_0000003"
    run(tmp_path / "parts", *options.split(), "--resume")
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [record["words_in"] for record in whole] == [record["words_in"] for record in parts]
    assert any(record["grad_norm"] > 0 for record in whole)  # stories of equal reward have none


def test_a_value_head_learns_and_the_other_learners_have_none(run, tmp_path):
    for learner, more in (("gae", []), ("rloo", ["--stories-per-opening", "2"])):
        run(tmp_path / learner, "--learner", learner, *more)
        state = checkpoint.load_file(checkpoint.newest(tmp_path / learner) / "trainer.safetensors")
        assert ("critic.linear.weight" in state) == (learner == "gae")
        if learner == "gae":
            assert state["critic.linear.weight"].abs().max() > 0
            assert all(record["value_loss"] > 0 for record in metrics(tmp_path / learner))
        else:
            assert not any(name.startswith("critic.") for name in state)
            assert metrics(tmp_path / learner)[-1]["explained_variance"] is None


def test_what_is_read_counts_as_words_in_and_keeps_within_the_budget(run, place, tmp_path):
    run(tmp_path / "off")
    run(tmp_path / "on", *REPLAY.split())
    off, on = metrics(tmp_path / "off"), metrics(tmp_path / "on")
    assert all(record["words_replayed"] == 0 and record["replay_loss"] is None for record in off)
    assert all(record["words_replayed"] > 0 and record["replay_loss"] > 0 for record in on)
    total = 0
    for without, record in zip(off, on, strict=True):
        total += record["words_replayed"]
        assert record["words_in"] == without["words_in"] + total
    budget = on[1]["words_in"] + on[2]["words_replayed"] - 1  # one word too few for the third step
    run(tmp_path / "short", *REPLAY.split(), "--budget-words", str(budget))
    assert len(metrics(tmp_path / "short")) == 2


def test_what_a_step_has_read_is_let_go_before_the_next_step_reads(run, tmp_path, monkeypatch):
    batches, read, held = CorpusReplay.batches, [], []

    def watched(replay, step):
        held.extend(tokens() for tokens in read)
        texts = batches(replay, step)
        read[:] = [weakref.ref(tokens) for tokens, _ in texts]
        return texts

    monkeypatch.setattr(CorpusReplay, "batches", watched)
    run(tmp_path / "on", *REPLAY.split())
    assert len(held) > 1 and set(held) == {None}


def test_no_document_that_pretraining_held_out_is_read(place, monkeypatch):
    monkeypatch.setattr("tinystory.data.shards.cache_dir", lambda: place / "cache")
    student, tokenizer, history = checkpoint.load(checkpoint.newest(place / "p"))
    config = InteractConfig(
        replay_weight=1.0, replay_batch=4, stories_per_step=6, minibatch_size=2, epochs=2
    )
    replay = CorpusReplay(config, history, tokenizer, student.config.context)
    data = prepare(open_corpus(history["corpus"]), vocab_size=320, val_fraction=0.05, seed=0)
    assert replay.windows.file.word_count == data.train.word_count == history["corpus_words"]
    assert replay.updates == 6 and replay.windows.file.tokens.tolist() == data.train.tokens.tolist()
    first, again, second = replay.batches(0), replay.batches(0), replay.batches(1)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], second[0][0])
    ends = sum(text.count(tokenizer.eos) for text in first[0][0].tolist())
    assert first[0][0].shape == (4, student.config.context + 1) and first[0][1] > 0 and ends


def test_a_start_that_does_not_say_what_it_was_trained_on_is_refused(place, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(checkpoint.newest(place / "p"), old)
    record = json.loads((old / "model.json").read_text())
    del record["history"]["val_fraction"]
    (old / "model.json").write_text(json.dumps(record))
    write_manifest(old)
    argv = ["--init", str(old), "--trust", "--reward", "random", *SHORT, *REPLAY.split()]
    line = fails(interact.main, [*argv, "--out", "x"], capsys)
    assert "val_fraction" in line and "--replay-weight" in line


def test_a_refusal_names_what_to_give():
    for argv, words in (
        ("--learner gae --value-coef 0", ("--learner gae", "--value-coef")),
        ("--value-coef 1", ("--value-coef", "gae")),
        ("--learner grpo", ("--stories-per-opening 2", "--stories-per-step")),
        ("--learner sft-best --lam 0.5", ("--lam", "--learner ridge or gae")),
    ):
        with pytest.raises(UserError) as error:
            check(parse(InteractConfig, INTERACT_PRESETS, argv.split()))
        assert all(word in str(error.value) for word in words)


def test_a_policy_has_the_critic_of_its_learner(place):
    compute = interact.resolve("cpu", "float32")
    for options, parts in (
        (dict(), 2),
        (dict(learner="gae"), 2),
        (dict(learner="grpo"), 0),
        (dict(learner="sft-best"), 0),
    ):
        policy = load_policy(InteractConfig(**options), checkpoint.newest(place / "p"), compute)
        assert len(policy.critic.state_dict()) == parts
