"""The experiment: the options of its runs, that it does nothing twice and loses nothing, and what
the report says."""

import contextlib
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import cli, fails

from lab import reproduce, runs
from lab.reproduce import BEFORE, INTERACT, MILLION, MORE
from tinystory.config import InteractConfig, PretrainConfig
from tinystory.config.presets import INTERACT_PRESETS
from tinystory.data.babylm import MILESTONES
from tinystory.data.builtin import dull
from tinystory.report.charts import Line, chart
from tinystory.run.folder import locked
from tinystory.student import checkpoint
from tinystory.teacher.callable import CallableGrader, random_scores
from tinystory.teacher.grade import Grade, Grader


@pytest.mark.parametrize("name", reproduce.SCALES)
def test_every_scale_has_options_that_the_commands_know(name):
    scale = reproduce.SCALES[name]
    pretrain = runs.pretrain_config(shlex.split(scale.pretrain))
    assert {start * MILLION for start in scale.starts} <= {
        words for words in MILESTONES if words <= pretrain.words
    }
    interact = runs.interact_config(shlex.split(scale.interact))
    paper = INTERACT_PRESETS["paper"]
    names = ("diversity", "unfinished", "openings")
    assert name == "tiny" or all(getattr(interact, each) == paper[each] for each in names)


def test_a_start_without_a_checkpoint_is_refused_before_anything_is_written(tmp_path, capsys):
    assert "no checkpoint at 7 M" in fails(
        reproduce.main, ["--milestones", "7", "--out", str(tmp_path / "out")], capsys
    )
    teacher = ["--teacher=--teacher-concurrency 0"]
    assert "--teacher-concurrency" in fails(
        reproduce.main, [*teacher, "--out", str(tmp_path / "out")], capsys
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--out", ""], "--out must be given: it is empty"),
        (["--out", "file/x"], "cannot write"),
        (["--pretrain", "'x"], "'x\": no closing quotation"),
        (["--interact", "'x"], "'x\": no closing quotation"),
        (["--teacher", "'x"], '--teacher "\'x": no closing quotation'),
        (["--interact", "--openings nowhere.txt"], "nowhere.txt"),
        (["--blimp", "nowhere"], "nowhere cannot be read as BabyLM's sentence tasks"),
        (["--blimp", "empty"], "--blimp empty holds no .jsonl"),
        (["--blimp", "wug.jsonl"], "give wug tests to --wug"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(
    argv, complaint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "train", lambda *_: pytest.fail("it has begun to work"))
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "wug.jsonl").write_text('{"sentences": "a\\tb", "ratio": 0.5}')
    before = sorted(tmp_path.rglob("*"))
    assert complaint in fails(reproduce.main, argv, capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_two_commands_do_not_work_on_one_experiment(tmp_path, capsys):
    with locked(tmp_path):
        assert "is in use by process" in fails(reproduce.main, ["--out", str(tmp_path)], capsys)


# ---- runs that train nothing ---------------------------------------------------------------------

SMALLEST = "--milestones 1 --seeds 1 --controls --device cpu --out".split()


class Trainer:
    """Replaces both train commands: writes the files of a finished run, and keeps the options. A
    run in `stopped` does not reach its end."""

    def __init__(self):
        self.calls = []  # (folder, the options after --out FOLDER)
        self.stopped = set()

    def __call__(self, argv):
        out = Path(dict(itertools.pairwise(argv))["--out"])
        assert ("--resume" in argv) == (out / "config.json").exists()
        self.calls.append((out, argv[2:]))
        if out.name == "pretrain":
            words = {f"chck_{count // MILLION}M": count for count in MILESTONES}
            first_step = 1
        else:
            words = {"step_9": 10**9 if out.parent.name == MORE else 0}
            first_step = 99
        for step, name in enumerate(words, first_step):
            counters = {"step": step, "words": words[name], "words_in": 30, "words_out": 400}
            folder = out / "checkpoints" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "trainer.json").write_text(json.dumps(counters))
        (out / "config.json").write_text("{}")
        if out.parent.name == INTERACT and out.name not in self.stopped:
            (out / "samples.jsonl").write_text("")


@pytest.fixture
def trainer(monkeypatch):
    trainer = Trainer()
    monkeypatch.setattr(runs.train_pretrain, "main", trainer)
    monkeypatch.setattr(runs.train_interact, "main", trainer)
    monkeypatch.setattr(reproduce, "measure", lambda *_: {"score": 1.0})
    grader = CallableGrader(random_scores, "<b>")
    monkeypatch.setattr(reproduce, "open_grader", lambda *_, **__: contextlib.nullcontext(grader))
    return trainer


def test_what_is_finished_is_not_done_again_and_what_was_stopped_goes_on(trainer, tmp_path, capsys):
    argv = [*SMALLEST, str(tmp_path)]
    trainer.stopped = {"1M-0"}
    assert "interact/1M-0 was stopped before its end" in fails(reproduce.main, argv, capsys)
    trainer.stopped.clear()
    reproduce.main(argv)
    assert [out.name for out, _ in trainer.calls] == ["pretrain", "1M-0", "1M-0", "1M-0"]
    assert trainer.calls[2][1] == ["--resume", "--device", "cpu"]
    reproduce.main(argv)
    assert len(trainer.calls) == 4


def test_more_pretraining_goes_on_from_the_milestone_by_the_words_of_the_interaction(
    trainer, tmp_path
):
    half_copied = tmp_path / MORE / "1M-0" / "checkpoints" / "chck_2M"
    half_copied.mkdir(parents=True)
    reproduce.main([*SMALLEST, str(tmp_path)])
    out, options = trainer.calls[-1]
    assert out == tmp_path / MORE / "1M-0"
    assert options == "--resume --words 1000430 --device cpu".split()
    assert (out / "checkpoints" / "chck_1M" / "trainer.json").exists() and not half_copied.exists()
    evaluated = [json.loads(path.read_text()) for path in (tmp_path / "evaluation").glob("*.json")]
    assert {(each["arm"], each["start"], each["words"]) for each in evaluated} == {
        *((BEFORE, words, words) for words in MILESTONES),
        (INTERACT, MILLION, MILLION + 30),
        (MORE, MILLION, MILLION + 430),
    }


@pytest.mark.parametrize("content", ["{", "[]", "\udc80"])
def test_a_damaged_record_is_named_and_nothing_is_trained(trainer, tmp_path, capsys, content):
    argv = [*SMALLEST, str(tmp_path)]
    reproduce.main(argv)
    calls = len(trainer.calls)
    evaluation = next((tmp_path / "evaluation").glob("*.json"))
    for path in (evaluation, tmp_path / "experiment.json"):
        whole = path.read_bytes()
        path.write_bytes(content.encode(errors="surrogateescape"))
        assert str(path) in fails(reproduce.main, argv, capsys)
        path.write_bytes(whole)
    assert len(trainer.calls) == calls


def test_other_settings_in_the_same_folder_are_refused(trainer, tmp_path, capsys):
    reproduce.main([*SMALLEST, str(tmp_path)])
    capsys.readouterr()
    line = fails(reproduce.main, ["--interact", "--lam 0.9", "--out", str(tmp_path)], capsys)
    assert "was begun with interact" in line and "--lam 0.9" in line and "another --out" in line


# ---- the report ----------------------------------------------------------------------------------


def test_the_random_reward_is_a_teachers_scores_that_know_nothing():
    stories = [f"story {i}" for i in range(2000)]
    scores = random_scores(["Once"] * 2000, stories)
    assert scores == random_scores(["Never"] * 2000, stories)
    assert {round(score * 9, 6) for score in scores} == set(range(10))
    assert sum(scores) / len(scores) == pytest.approx(0.5, abs=0.02)


class Half(Grader):
    """Gives every story half of the highest score, an empty one too."""

    def grades(self, questions, stop=None):
        return [Grade(None, 0.5)] * len(questions)


def test_a_student_of_the_built_in_corpus_has_columns_of_its_own(place, tmp_path, monkeypatch):
    student, tokenizer, _ = checkpoint.load(checkpoint.newest(place / "p"))
    history = {"corpus": ["builtin", "dull"]}
    monkeypatch.setattr(checkpoint, "load", lambda *_: (student, tokenizer, history))
    monkeypatch.setattr(reproduce.recipes, "COREFERENCE", 4)
    grader = Half({})
    pretrain = PretrainConfig(corpus=[str(place / "corpus.txt")], device="cpu", vocab_size=300)
    (tmp_path / "openings.txt").write_text("Tom had a ball.\nMia sat.\n")
    config = InteractConfig(
        max_new_tokens=12, openings=str(tmp_path / "openings.txt"), device="cpu"
    )
    settings = {"stories": 6, "blimp": ""}
    columns = reproduce.measure(
        reproduce.recipes.Row("", place / "p"), grader, pretrain, config, settings
    )
    assert {
        *dull.STYLES,
        "repeated_name",
        "he_or_she",
        "bits_per_byte",
    } < columns.keys()
    assert columns["score"] == 4.5
    history["corpus"] = ["elsewhere"]
    others = reproduce.measure(
        reproduce.recipes.Row("", place / "p"), grader, pretrain, config, settings
    )
    assert others.keys() == {*reproduce.OF_STORIES, "bits_per_byte"}
    assert {name: others[name] for name in reproduce.OF_STORIES} == {
        name: columns[name] for name in reproduce.OF_STORIES
    }
    assert others["bits_per_byte"] != columns["bits_per_byte"]


# ---- the report ----------------------------------------------------------------------------------


def record(arm, start, seed, words, score):
    measures = {"score": score, "rewards": [0.5], "distinct_4": 0.9 - seed / 100}
    return dict(arm=arm, start=start * MILLION, seed=seed, words=words, measures=measures)


def rows_of(page: str) -> list[list[str]]:
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]


def test_the_report_compares_the_arms_and_escapes_the_name_of_a_model(tmp_path):
    records = [
        record(BEFORE, m, 0, m * MILLION, score) for m, score in ((1, 1.0), (2, 2.0), (4, 3.0))
    ]
    records += [record(INTERACT, 1, seed, MILLION + 9000, 1.4 + seed / 10) for seed in range(3)]
    records += [record(INTERACT, 4, seed, 4 * MILLION + 9000, 3.5) for seed in range(3)]
    records += [record("random", 1, 0, MILLION, 0.75), record(MORE, 1, 0, 1_250_000, None)]
    settings = {"preset": "demo", "scored by": "<b>"}
    page = reproduce.write_page(tmp_path, settings, [INTERACT, "random"], records).read_text()
    rows = rows_of(page)
    assert rows[0] == ["Student", "Seeds", "score", "distinct_4"]
    assert rows[1:5] == [
        ["1 M pretrained", "1", "1", "0.9"],
        ["1 M + interaction", "3", "1.5 ± 0.0577", "0.89 ± 0.00577"],  # 0.1 / sqrt(3)
        ["1 M + more pretraining", "1", "–", "0.9"],
        ["1 M + --reward random", "1", "0.75", "0.9"],
    ]
    assert rows[-1] == ["4 M + interaction", "3", "3.5 ± 0", "0.89 ± 0.00577"]
    assert "&lt;b&gt;" in page and "<b>" not in page and "<script" not in page and "<svg" in page


def test_a_chart_with_error_bars():
    line = Line([1e6, 2e6, 3e6], [1.0, 2.0, 3.0], "reward", "seeds", [0.5, None, 2.0])
    drawing = chart("Score", [line])
    x = [float(each) for each in re.findall(r'cx="([\d.]+)"', drawing)]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)
    bars = re.findall(r'class="error" d="M([\d.]+),([\d.]+)V([\d.]+)"', drawing)
    lengths = [float(low) - float(high) for _, low, high in bars]
    assert [float(at) for at, _, _ in bars] == [x[0], x[2]]
    assert lengths[1] == pytest.approx(4 * lengths[0], abs=0.3)


@pytest.mark.slow
def test_the_whole_experiment(tmp_path):
    small = "--words 1M --n-layer 1 --n-head 1 --n-embd 32 --vocab-size 320 --batch-size 32 --learning-rate 1e-2"
    argv = cli("--out {} --device cpu --milestones 1 --stories 16 --pretrain {}", tmp_path, small)
    argv += ["--controls", "random"]
    argv += ["--interact", "--steps 2 --stories-per-step 8 --max-new-tokens 40"]
    reproduce.main(argv)
    folders = {
        "pretrain",
        *(f"{arm}/1M-{seed}" for arm in (INTERACT, "random") for seed in (0, 1)),
        "more/1M-0",
    }
    assert {
        str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("config.json")
    } == folders
    rows = rows_of((tmp_path / "report.html").read_text())
    assert [row[:2] for row in rows[1:]] == [
        ["1 M pretrained", "1"],
        ["1 M + interaction", "2"],
        ["1 M + more pretraining", "1"],
        ["1 M + --reward random", "2"],
    ]

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    reproduce.main(argv)
    changed = {path.name for path, time in written.items() if path.stat().st_mtime_ns != time}
    assert changed == {"experiment.json"}
