"""Presets: the paper's figures, and the limits of BabyLM's 2025 INTERACTION track."""

import json

import pytest
from conftest import SHORT, SMALL, fails, metrics

import train_interact as interact
import train_pretrain as pretrain
from tinystory.config import INTERACT_PRESETS, PRETRAIN_PRESETS, InteractConfig, PretrainConfig, parse
from tinystory.data import babylm
from tinystory.run.errors import UserError
from tinystory.student import checkpoint

# The settings of arXiv 2509.15714 and its code.
PAPER_PRETRAIN = dict(
    n_layer=12, n_head=12, n_embd=768, context=512, dropout=0.1, vocab_size=16_000, corpus=["babylm-100m"],
    val_fraction=0.1, words=11 * 90_000_000, beta1=0.9, beta2=0.999, weight_decay=0.0, learning_rate=5e-4,
    warmup=0.01, batch_size=256,
)  # fmt: skip
PAPER_INTERACT = dict(
    openings="Let me tell you a long, magical tale. Once upon a time, in a faraway land,", stories_per_step=360,
    max_new_tokens=90, temperature=1.0, teacher_temperature=0.2, teacher_max_tokens=6, length_weight=0.4,
    length_words=90, budget_words=10**6, budget_words_out=10**8, steps=920, epochs=4, minibatch_size=0,
    learning_rate=1e-6, adam_eps=1e-8, grad_clip=0.0, gamma=1.0, lam=0.95, clip_ratio=0.2, clip_value=0.2,
    value_coef=0.1, max_ratio=10.0, kl_coef=0.2, kl_target=6.0, kl_horizon=10_000.0,
    diversity=0.0, unfinished=1.0, stories_per_opening=1, eval_every=0,
)  # fmt: skip


def test_the_papers_preset_has_the_papers_figures():
    reading = parse(PretrainConfig, PRETRAIN_PRESETS, ["--preset", "paper"])
    assert {name: getattr(reading, name) for name in PAPER_PRETRAIN} == PAPER_PRETRAIN
    assert reading.batch_size * reading.context == 131_072
    for preset in ("paper", "babylm-2025"):
        writing = parse(InteractConfig, INTERACT_PRESETS, ["--preset", preset])
        assert {name: getattr(writing, name) for name in PAPER_INTERACT} == PAPER_INTERACT
    three_words_a_reply = 360 * 3 * 920 + len(writing.openings.split())
    assert three_words_a_reply <= writing.budget_words < three_words_a_reply + 10 * 360 * 3


def test_a_presets_fields_can_be_overridden(tmp_path):
    config = parse(InteractConfig, INTERACT_PRESETS, ["--preset", "paper", "--lam", "1", "--steps", "3"])
    assert (config.preset, config.lam, config.steps, config.kl_coef) == ("paper", 1.0, 3, 0.2)


@pytest.mark.parametrize("preset", ["paper", "babylm-2025"])
def test_the_presets_run(place, tmp_path, preset):
    reading = ["--preset", preset, "--corpus", str(place / "corpus.txt"), *SMALL, "--words", "2000"]
    pretrain.main([*reading, "--micro-batch-size", "4", "--out", str(tmp_path / "p")])
    config = json.loads((tmp_path / "p" / "config.json").read_text())["options"]
    assert (config["preset"], config["dropout"], config["n_embd"]) == (preset, 0.1, 64)
    init = checkpoint.newest(tmp_path / "p")
    assert json.loads((init / "model.json").read_text())["facts"]["corpus_words"] > 1000
    few = [*SHORT, "--stories-per-step", "8", "--steps", "1"]
    reward = ["--reward", f"{place / 'reward.py'}:score"]
    interact.main(["--preset", preset, "--init", str(init), *reward, *few, "--out", str(tmp_path / "i")])
    assert metrics(tmp_path / "i")[0]["kl_coef"] == 0.2


def test_the_tracks_limits_are_told_in_one_sentence(place, tmp_path, capsys):
    track = ["--preset", "babylm-2025"]
    corpus = ["--corpus", str(place / "corpus.txt"), *SMALL, "--out", str(tmp_path / "p")]
    assert "allows 10 epochs" in fails(pretrain.main, [*track, *corpus], capsys)
    assert not (tmp_path / "p").exists()
    start = ["--init", str(checkpoint.newest(place / "p")), *SHORT, "--out", str(tmp_path / "i")]
    for flag in ("--budget-words", "--budget-words-out"):
        line = fails(interact.main, [*track, *start, flag, "101M"], capsys)
        assert f"give {flag} " in line and "or fewer" in line
    assert not (tmp_path / "i").exists()


def test_a_track_counts_the_corpus_once_and_all_interaction():
    facts = dict(words=900_000_000, corpus_words=90_000_000)
    babylm.check_interaction(facts, 10_000_000, 100_000_000)
    with pytest.raises(UserError, match="--budget-words 10000000 or fewer"):
        babylm.check_interaction(facts, 10_000_001, 1)
    before = facts | dict(interaction_words_in=9_000_000, interaction_words_out=99_000_000)
    babylm.check_interaction(before, 1_000_000, 1_000_000)
    with pytest.raises(UserError, match="--budget-words-out 1000000 or fewer"):
        babylm.check_interaction(before, 1_000_000, 1_000_001)
    with pytest.raises(UserError, match="a corpus of 100,000,000 words"):
        babylm.check_pretraining(100_000_001, 1)
    with pytest.raises(UserError, match="--words 900000000 or fewer"):
        babylm.check_interaction(facts | dict(words=900_000_001), 1, 1)
    with pytest.raises(UserError, match="--words 899999990 or fewer"):  # what it reads on is a part of ten epochs too
        babylm.check_interaction(facts, 10, 1, reads=10)
    with pytest.raises(UserError, match="--words 999 or fewer"):  # the last step, of up to a word per token, must fit
        babylm.check_pretraining(100, 1000, last_step=1)
    with pytest.raises(UserError, match="does not say"):
        babylm.check_interaction(dict(words=1), 1, 1)


def test_checkpoints_have_the_official_names():
    names = [babylm.milestone_name(words) for words in babylm.MILESTONES]
    assert len(names) == 28
    assert (
        names[:3] + names[8:11] + names[-2:]
        == "chck_1M chck_2M chck_3M chck_9M chck_10M chck_20M chck_900M chck_1000M".split()
    )
    beyond = babylm.milestones_beyond(dict(words=9_400_000, interaction_words_in=100_000))
    assert list(beyond.items())[:2] == [("chck_10M", 500_000), ("chck_20M", 10_500_000)]
