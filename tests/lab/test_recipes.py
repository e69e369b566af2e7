"""lab/recipes.py: what it measures of a student, which stories are the best of several, and the
table it prints."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import SHORT, SMALL, fails

from lab import recipes
from tinystory.config import PretrainConfig
from tinystory.data.builtin import dull
from tinystory.data.corpus import open_corpus
from tinystory.ops.compute import resolve
from tinystory.run.folder import read_config
from tinystory.student import checkpoint
from tinystory.teacher.callable import CallableGrader

OPENINGS = ["Once", "Tom", "Mia had", "Ben"] * 6


@pytest.fixture
def settings(monkeypatch):
    config = dataclasses.replace(recipes.CONFIG, max_new_tokens=12, diversity=0.0)
    monkeypatch.setattr(recipes, "CONFIG", config)
    monkeypatch.setattr(recipes, "resolve", lambda *_: resolve("cpu", "float32"))
    monkeypatch.setattr(recipes, "OPENINGS", OPENINGS)
    monkeypatch.setattr(recipes, "COREFERENCE", 4)


def test_the_best_of_several_is_by_reward_or_by_likelihood(settings, place):
    grader = CallableGrader(
        lambda opening, stories: [min(len(set(s)) / 30, 1.0) for s in stories], "letters"
    )
    start = checkpoint.newest(place / "p")
    plain, ended, likeliest, best = (
        recipes.measure(
            recipes.Row("", start, n=4, chosen_by=choice), grader, recipes.CONFIG, OPENINGS
        )
        for choice in ("first", "ended", "likelihood", "reward")
    )
    assert plain.keys() == likeliest.keys() == best.keys()
    assert best["reward"] >= max(plain["reward"], likeliest["reward"])  # of the same candidates
    assert likeliest["ended"] == ended["ended"] >= plain["ended"]
    alone = recipes.measure(recipes.Row("", start), grader, recipes.CONFIG, OPENINGS)
    assert alone == plain and plain["bits_per_byte"] > 0
    assert sum(plain[kind] for kind in dull.STYLES) == pytest.approx(1)
    assert len(plain["rewards"]) == len(OPENINGS)


def test_unseen_text_is_read_at_the_temperature_of_the_row(place):
    start, texts = checkpoint.newest(place / "p"), recipes.unseen_stories(4)
    plain, sharp = (recipes.unseen_measures(start, temperature, texts) for temperature in (1, 0.5))
    assert plain["bits_per_byte"] != pytest.approx(sharp["bits_per_byte"], rel=1e-3)
    assert plain["best_bits"] == pytest.approx(sharp["best_bits"], rel=1e-3)


def test_a_corpus_without_the_grammar_is_measured_on_its_own_validation(place):
    corpus = [str(place / "corpus.txt")]
    config = PretrainConfig(corpus=corpus, vocab_size=320, val_fraction=0.3)
    documents = list(open_corpus(corpus).documents())
    texts = recipes.unseen_texts(config)
    assert texts and len(texts) < len(documents) and set(texts) <= set(documents)


def test_a_reader_adds_the_coherence_of_the_first_five_sentences(settings, place):
    class Length:
        def coherence(self, stories):
            return np.array([len(story) for _, story in stories], dtype=float)

    assert recipes.beginning("A dog ran. " * 7) == " ".join(["A dog ran."] * 5)

    grader = CallableGrader(lambda opening, stories: [0.5] * len(stories), "constant")
    row = recipes.Row("", checkpoint.newest(place / "p"))
    measures = recipes.measure(row, grader, recipes.CONFIG, OPENINGS, Length())
    without = recipes.measure(row, grader, recipes.CONFIG, OPENINGS)
    coherences = measures.pop("coherences")
    assert len(coherences) == len(OPENINGS) and np.mean(coherences) == pytest.approx(
        measures.pop("coherence")
    )
    assert measures == without


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--out", ""], "--out must be given: it is empty"),
        (["--out", "file/x"], "cannot write"),
        (["--options", "'x"], '--options "\'x": no closing quotation'),
        (["--options", "", "--lam 7"], "--lam must be"),
        (["--options", "--openings nowhere.txt"], "nowhere.txt"),
        (["--options", "mean: --seed=7"], "have seeds of their own: leave --seed out"),
        (["--seeds", "1", "-1"], "--seed must be"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(
    argv, complaint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(recipes, "train", lambda *_, **__: pytest.fail("it has begun to work"))
    assert complaint in fails(recipes.main, argv, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_control_is_trained_beside_its_run(place, tmp_path):
    words = f"--reward random {' '.join(SHORT)}"
    arms = {text: recipes.arm_of(text) for text in (words, f"shuffled: {words}")}
    pretraining = ["--corpus", str(place / "corpus.txt"), "--words", "400", *SMALL]
    _, _, _, run, control = recipes.train_students(tmp_path, 1, pretraining, arms, ())
    assert control.folder == run.folder / "controls" / "shuffled"
    assert [row.name for row in (run, control)] == [f"`{text}`" for text in arms]
    assert (control.folder / "comparison.json").exists()


def test_the_mean_is_of_two_runs_that_differ_by_their_seed(place, tmp_path, monkeypatch):
    words = f"--reward random {' '.join(SHORT)}"
    arms = {text: recipes.arm_of(text) for text in (words, f"mean: {words}")}
    pretraining = ["--corpus", str(place / "corpus.txt"), "--words", "400", *SMALL]
    *_, run, mean = recipes.train_students(tmp_path, 1, pretraining, arms, ())
    second = tmp_path / f"{run.folder.name}-second"
    seeds = [read_config(folder)["options"]["seed"] for folder in (run.folder, second)]
    assert seeds == [1, 1 + recipes.SECOND]
    student, _, _ = checkpoint.load(mean.folder)
    students = [checkpoint.load(checkpoint.newest(folder))[0] for folder in (run.folder, second)]
    weights = [student.wte.weight.double() for student in students]
    assert torch.equal(student.wte.weight, (sum(weights) / 2).float())
    # nothing is trained or averaged again
    monkeypatch.setattr(recipes.average, "main", lambda *_: pytest.fail("again"))
    assert recipes.train_students(tmp_path, 1, pretraining, arms, ())[-1] == mean


def test_the_table_has_means_over_the_seeds_and_an_error_over_the_openings(capsys):
    seeds = [
        {"name": name, "seed": seed, "rewards": rewards, "reward": np.mean(rewards), "bits": bits}
        for seed, rewards in ((1, [0.2, 0.4]), (2, [0.4, 0.8]))
        for name, bits in (("before interaction", 0.1 * seed), ("best of 4", None))
    ]
    rows = recipes.table(seeds)
    before = rows["before interaction"]
    assert before.pop("reward_by_seed") == pytest.approx([0.3, 0.6])
    # openings have 0.3 and 0.6: a standard deviation of 0.212, divided by the root of 2
    assert before == pytest.approx({"reward": 0.45, "bits": 0.15, "standard_error": 0.15})
    before["reward_by_seed"] = [0.3, 0.6]
    assert rows["best of 4"]["bits"] is None
    recipes.print_table(rows)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "| | reward | bits | standard_error |"
    assert printed[2:] == [
        "| before interaction | 0.450 | 0.150 | 0.150 |",
        "| best of 4 | 0.450 |  | 0.150 |",
    ]
    assert recipes.draw(rows).startswith("<svg xmlns")
