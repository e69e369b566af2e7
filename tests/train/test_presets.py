"""Presets: the paper's figures, and the limits of BabyLM's tracks of 2026."""

import json
import shutil

import pytest
import torch
from conftest import SHORT, SMALL, cli, fails, metrics

import train_interact as interact
import train_pretrain as pretrain
from lab.reproduce import SCALES
from tinystory.config import InteractConfig, PretrainConfig
from tinystory.config.command_line import parse
from tinystory.config.presets import PRETRAIN_PRESETS
from tinystory.data import babylm
from tinystory.evaluate.temperature import TEMPERATURES
from tinystory.ops import cuda
from tinystory.run.errors import UserError
from tinystory.run.folder import read_config
from tinystory.run.records import write_manifest
from tinystory.student import checkpoint, memory

# The settings of arXiv 2509.15714 and of the paper's code.
PAPER_PRETRAIN = dict(n_layer=12, n_head=12, n_embd=768, context=512, dropout=0.1)
PAPER_PRETRAIN |= dict(vocab_size=16_000, corpus=["babylm-100m"], val_fraction=0.1, batch_size=256)
PAPER_PRETRAIN |= dict(words=11 * 90_000_000, beta2=0.999, weight_decay=0.0, learning_rate=5e-4)
PAPER_PRETRAIN |= dict(warmup=0.01)
PAPER_INTERACT = dict(
    openings="Let me tell you a long, magical tale. Once upon a time, in a faraway land,"
)
PAPER_INTERACT |= dict(stories_per_step=360, stories_per_opening=1, max_new_tokens=90)
PAPER_INTERACT |= dict(temperature=1.0, teacher_temperature=0.2, teacher_max_tokens=6)
PAPER_INTERACT |= dict(length_weight=0.4, length_words=90, diversity=0.0, unfinished=1.0)
PAPER_INTERACT |= dict(budget_words=10**6, budget_words_out=10**8, steps=920, eval_every=0)
PAPER_INTERACT |= dict(epochs=4, minibatch_size=0, learning_rate=1e-6, grad_clip=0.0)
PAPER_INTERACT |= dict(gamma=1.0, lam=0.95, clip_ratio=0.2, value_coef=0.1)
PAPER_INTERACT |= dict(kl_coef=0.2, kl_target=6.0, kl_horizon=10_000.0)


def test_the_papers_preset_has_the_papers_figures():
    reading = parse(PretrainConfig, ["--preset", "paper"])
    assert {name: getattr(reading, name) for name in PAPER_PRETRAIN} == PAPER_PRETRAIN
    assert reading.batch_size * reading.context == 131_072
    for preset in ("paper", *babylm.TRACKS):
        writing = parse(InteractConfig, ["--preset", preset])
        assert {name: getattr(writing, name) for name in PAPER_INTERACT} == PAPER_INTERACT
    three_words_a_reply = 360 * 3 * 920 + len(writing.openings.split())
    assert three_words_a_reply <= writing.budget_words < three_words_a_reply + 10 * 360 * 3


def test_every_preset_and_scale_has_heads_for_the_cuda_kernels():
    options = [["--preset", name] for name in PRETRAIN_PRESETS]
    options += [scale.pretrain.split() for scale in SCALES.values()]
    configs = [parse(PretrainConfig, argv) for argv in options]
    assert {config.n_embd // config.n_head for config in configs} <= set(cuda.HEAD_SIZES)


def test_a_presets_fields_can_be_overridden(tmp_path):
    config = parse(InteractConfig, "--preset paper --lam 1 --steps 3".split())
    assert (config.preset, config.lam, config.steps, config.kl_coef) == ("paper", 1.0, 3, 0.2)


@pytest.mark.parametrize("preset", ["paper", *babylm.TRACKS])
def test_the_presets_run(place, tmp_path, preset):
    reading = ["--preset", preset, "--corpus", str(place / "corpus.txt"), *SMALL, "--words", "2000"]
    pretrain.main([*reading, "--micro-batch-size", "4", "--out", str(tmp_path / "p")])
    config = json.loads((tmp_path / "p" / "config.json").read_text())["options"]
    assert (config["preset"], config["dropout"], config["n_embd"]) == (preset, 0.1, 64)
    init = checkpoint.newest(tmp_path / "p")
    assert json.loads((init / "model.json").read_text())["history"]["corpus_words"] > 1000
    few = [*SHORT, "--stories-per-step", "8", "--steps", "1"]
    reward = ["--reward", f"{place / 'reward.py'}:score"]
    interact.main(
        [*cli("--preset {} --init {}", preset, init), *reward, *few, "--out", str(tmp_path / "i")]
    )
    assert metrics(tmp_path / "i")[0]["kl_coef"] == 0.2


def test_the_english_preset_chooses_the_temperature(place, tmp_path):
    reading = ["--preset", "english", "--corpus", str(place / "corpus.txt"), *SMALL]
    pretrain.main([*reading, "--words", "2000", "--out", str(tmp_path / "p")])
    few = [*SHORT, "--steps", "1", "--reward", "constant", "--init", str(tmp_path / "p")]
    interact.main(["--preset", "english", *few, "--out", str(tmp_path / "i")])
    options = read_config(tmp_path / "i")["options"]
    assert options["temperature"] in TEMPERATURES
    assert set(options["tried_temperatures"]) == set(map(str, TEMPERATURES))


def test_the_tracks_limits_are_told_in_one_sentence(place, tmp_path, capsys):
    track = ["--preset", "babylm-2026-strict"]
    corpus = ["--corpus", str(place / "corpus.txt"), *SMALL, "--out", str(tmp_path / "p")]
    assert "allows 10 epochs" in fails(pretrain.main, [*track, *corpus], capsys)
    assert not (tmp_path / "p").exists()
    start = ["--init", str(checkpoint.newest(place / "p")), *SHORT, "--out", str(tmp_path / "i")]
    line = fails(interact.main, [*track, *start, "--budget-words", "101M"], capsys)
    assert "give --budget-words " in line and "or fewer" in line
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize(
    "track, unit", [("babylm-2026-strict", 10**6), ("babylm-2026-strict-small", 10**5)]
)
def test_a_track_counts_the_corpus_once_and_all_interaction(track, unit):
    history = dict(words=900 * unit, corpus_words=90 * unit)
    babylm.check_interaction(track, history, 10 * unit)
    with pytest.raises(UserError, match=f"--budget-words {10 * unit} or fewer"):
        babylm.check_interaction(track, history, 10 * unit + 1)
    before = history | dict(interaction_words_in=9 * unit)
    babylm.check_interaction(track, before, unit)
    with pytest.raises(UserError, match=f"--budget-words {unit} or fewer"):
        babylm.check_interaction(track, before, unit + 1)
    with pytest.raises(UserError, match=f"a corpus of {100 * unit:,} words"):
        babylm.check_pretraining(track, 100 * unit + 1, 1)
    with pytest.raises(UserError, match=f"--words {900 * unit} or fewer"):
        babylm.check_interaction(track, history | dict(words=900 * unit + 1), 1)
    # the last step, of up to a word per token, must fit
    with pytest.raises(UserError, match="--words 999 or fewer"):
        babylm.check_pretraining(track, 100, 1000, last_step=1)
    with pytest.raises(UserError, match="does not say"):
        babylm.check_interaction(track, dict(words=1), 1)


@pytest.mark.parametrize("track", babylm.TRACKS)
def test_a_tracks_preset_leaves_the_teacher_its_words(track):
    reading = parse(PretrainConfig, ["--preset", track])
    writing = parse(InteractConfig, ["--preset", track])
    corpus = round((1 - reading.val_fraction) * babylm.TRACKS[track])
    babylm.check_pretraining(track, corpus, reading.words, reading.batch_size * reading.context)
    babylm.check_interaction(
        track, dict(words=reading.words, corpus_words=corpus), writing.budget_words
    )
    assert reading.corpus == ["babylm-10m" if track.endswith("small") else "babylm-100m"]


def test_checkpoints_have_the_official_names():
    names = [babylm.milestone_name(words) for words in babylm.MILESTONES]
    assert len(names) == 28 and names.index("chck_100M") == 18  # of Strict-Small's ten epochs: 19
    assert (
        names[:3] + names[8:11] + names[-2:]
        == "chck_1M chck_2M chck_3M chck_9M chck_10M chck_20M chck_900M chck_1000M".split()
    )
    beyond = babylm.milestones_beyond(dict(words=9_400_000, interaction_words_in=100_000))
    assert list(beyond.items())[:2] == [("chck_10M", 500_000), ("chck_20M", 10_500_000)]


def test_a_student_of_another_preset_is_noticed(place, tmp_path, capsys):
    """The preset is recorded in the checkpoint, and kept by an interaction."""
    small = cli("--corpus {} --words 50 --out {}", place / "corpus.txt", tmp_path / "p") + SMALL
    pretrain.main([*small, "--preset", "english"])
    short = [*SHORT, *"--reward constant --steps 1".split()]
    interact.main([*short, "--init", str(tmp_path / "p"), "--out", str(tmp_path / "i")])
    printed = capsys.readouterr().out
    assert printed.count("this student was pretrained with --preset english, and") == 1
    _, _, history = checkpoint.load(checkpoint.find(tmp_path / "i"))
    assert history["preset"] == "english"


@pytest.mark.parametrize("preset", ["gone", 3, ""])
def test_a_checkpoint_names_one_of_the_presets(place, tmp_path, preset):
    folder = tmp_path / "p"
    shutil.copytree(checkpoint.newest(place / "p"), folder)
    record = json.loads((folder / "model.json").read_text())
    record["history"]["preset"] = preset
    (folder / "model.json").write_text(json.dumps(record))
    write_manifest(folder)
    with pytest.raises(UserError, match="impossible history of the student: its 'preset' is"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "argv, memory_gb, device, size",
    [
        ([], 80, "cpu", 32),
        ([], 80, "cuda", 96),
        ([], 8, "cuda", 32),
        (["--preset", "paper"], 80, "cuda", 120),  # a third of 360
        (["--minibatch-size", "0", "--stories-per-step", "129"], 80, "cuda", 66),  # even
        (["--max-new-tokens", "1000"], 80, "cuda", 32),
        (["--micro-batch-size", "8"], 80, "cuda", 8),
        (["--minibatch-size", "20"], 80, "cuda", 20),
    ],
)
def test_a_large_gpu_reads_more_stories_at_once_unless_a_number_is_given(
    argv, memory_gb, device, size, monkeypatch
):
    monkeypatch.setattr(memory, "total", lambda device: memory_gb << 30)
    config = parse(InteractConfig, argv)
    assert memory.micro_batch_size(config, torch.device(device)) == size
