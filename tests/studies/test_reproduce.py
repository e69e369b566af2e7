"""The experiment: what it plans, that it does nothing twice and loses nothing, and what its report says."""

import contextlib
import json
import math
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import LIMIT_S, fails

from scripts import reproduce as command
from tinystory.config import INTERACT_PRESETS, PRETRAIN_PRESETS, InteractConfig, parse
from tinystory.report.charts import Line, chart, log_ticks
from tinystory.run.errors import UserError
from tinystory.studies import parts as running
from tinystory.studies import reproduce
from tinystory.studies.page import equivalent_words, write_experiment_report
from tinystory.studies.parts import MILLION, Part, locked, run_parts
from tinystory.teacher.callable import random_scores

ROOT = Path(__file__).resolve().parents[2]


# ---- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", reproduce.SCALES)
def test_every_scale_is_a_plan_of_options_that_the_commands_have(name, tmp_path):
    scale = reproduce.SCALES[name]
    pretrain, *others = reproduce.plan(scale, tmp_path, {}, "cpu")
    words = reproduce.PretrainConfig(**pretrain.options).words
    assert {start * MILLION for start in scale.starts} <= {m for m in reproduce.MILESTONES if m <= words}
    assert len(others) == len(scale.starts) * (scale.seeds + scale.random_seeds)
    assert len({part.name for part in others}) == len(others)
    for part in others:
        assert InteractConfig(**part.options).init.endswith(f"chck_{part.start // MILLION}M")
        given = parse(InteractConfig, INTERACT_PRESETS, part.command(tmp_path, scale.preset)[2:])
        assert {name: getattr(given, name) for name in part.options} == part.options
    given = parse(reproduce.PretrainConfig, PRETRAIN_PRESETS, pretrain.command(tmp_path, scale.preset)[2:])
    assert {name: getattr(given, name) for name in pretrain.options} == pretrain.options


def test_the_objective_is_the_papers_unless_told_otherwise(tmp_path, monkeypatch, capsys):
    planned = []

    def no_more(scale, out, teacher, **how):
        planned.append(reproduce.plan(scale, out, teacher, "cpu"))
        return out

    monkeypatch.setattr(command, "reproduce", no_more)
    for flags in ([], ["--objective", "demo"]):
        command.main(["--scale", "small", "--out", str(tmp_path), *flags])
    paper, demo = (InteractConfig(**parts[1].options) for parts in planned)
    want = {name: reproduce.INTERACT_PRESETS["paper"][name] for name in reproduce.OBJECTIVES["paper"]}
    assert {name: getattr(paper, name) for name in want} == want
    assert {name: getattr(demo, name) for name in want} == {name: getattr(InteractConfig, name) for name in want}
    printed = capsys.readouterr().out
    assert "objective paper: openings 'Let me tell you" in printed and "objective demo: openings 'builtin'" in printed


def test_a_start_without_a_checkpoint_is_refused_before_anything_is_written(tmp_path, capsys):
    assert "no checkpoint at 7 M" in fails(command.main, ["--milestones", "7", "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_the_student_compared_is_the_last_not_the_best(tmp_path):
    """Else every arm would be chosen by the score that it is judged by."""
    part = Part("random", MILLION, 0, {})
    for name, step in (("best", 2), ("step_0000004", 4)):
        folder = tmp_path / part.name / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "trainer.json").write_text(json.dumps({"step": step, "words_in": 7}))
    (subject,) = reproduce.subjects([Part("pretrain", 0, 0, {}), part], tmp_path)
    assert subject.folder.name == "step_0000004" and subject.words == MILLION + 7


def test_the_random_control_differs_in_the_reward_alone(tmp_path):
    _, *others = reproduce.plan(reproduce.SCALES["small"], tmp_path, {}, "cpu")
    by_name = {part.name: part.options for part in others}
    real, control = by_name["interact/5M-1"], by_name["random/5M-1"]
    assert {name for name in control if control[name] != real.get(name)} == {"reward"}


def test_the_random_reward_is_a_teachers_scores_that_know_nothing():
    stories = [f"story {i}" for i in range(2000)]
    scores = random_scores(["Once"] * 2000, stories)
    assert scores == random_scores(["Never"] * 2000, stories)
    assert {round(score * 9, 6) for score in scores} == set(range(10))
    assert sum(scores) / len(scores) == pytest.approx(0.5, abs=0.02)


# ---- running the parts, with commands that train nothing ------------------------------------------------------------

FAKE = """
import json, sys
from pathlib import Path
options = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(sys.argv[1:], sys.argv[2:])}
out = Path(options["out"])
step = int(json.loads(p.read_text())["step"]) if (p := out / "checkpoints/c/trainer.json").exists() else 0
assert bool(step) == ("--resume" in sys.argv), "resumed exactly where there is a checkpoint"
steps = 4
(out / "checkpoints/c").mkdir(parents=True, exist_ok=True)
with open(out.parent / f"calls-{out.name}", "a") as calls, open(out / "metrics.jsonl", "a") as metrics:
    calls.write(f"{step} ")
    while step < steps:
        step += 1
        metrics.write(json.dumps({"step": step}) + "\\n")
        (out / "checkpoints/c/trainer.json").write_text(json.dumps({"step": step}))
        if step == 2 and (out.parent / "fail").exists():
            sys.exit(3)
(out / "config.json").write_text(json.dumps({"options": {"steps": 4, "epochs": int(options["epochs"])},
    "started": "2026-01-01T00:00:00+00:00", "device": "cpu", "resumed": []}))
(out / "samples.jsonl").write_text("")
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    (tmp_path / "train_interact.py").write_text(FAKE)
    monkeypatch.setattr(running, "ROOT", tmp_path)
    (tmp_path / "out" / "interact").mkdir(parents=True)
    return tmp_path / "out"


def some_parts(**options):
    settings = dict(steps=4, stories_per_step=2, epochs=1) | options
    return [Part("interact", start * MILLION, 0, settings) for start in (1, 2, 5)]


def run(parts, out, jobs=2):
    with locked(out) as lock:
        run_parts(parts, out, "demo", jobs, lock)


def calls(out):
    return [(out / "interact" / f"calls-{start}M-0").read_text() for start in (1, 2, 5)]


def test_what_is_finished_is_not_done_again(fakes):
    run(some_parts(), fakes)
    assert all(part.finished(fakes) for part in some_parts())
    run(some_parts(), fakes)
    assert calls(fakes) == ["0 ", "0 ", "0 "]


def test_a_part_that_ended_early_is_named_and_goes_on_where_it_was(fakes):
    (fakes / "interact" / "fail").touch()
    with pytest.raises(UserError, match=r"interact/1M-0 ended with exit code 3 before .*logs/interact-1M-0\.txt"):
        run(some_parts(), fakes, jobs=1)
    assert not some_parts()[0].finished(fakes)
    (fakes / "interact" / "fail").unlink()
    run(some_parts(), fakes)
    assert calls(fakes) == ["0 2 ", "0 ", "0 "]


def test_a_part_killed_before_its_first_checkpoint_starts_anew(fakes):
    folder = fakes / "interact" / "1M-0"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    run(some_parts(), fakes)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_folder_of_other_settings_is_refused(fakes):
    run(some_parts(), fakes)
    with pytest.raises(UserError, match="epochs 1, not 3"):
        run(some_parts(epochs=3), fakes)


@contextlib.contextmanager
def shut_out_of(out):
    """Somebody else who wants to work in `out`, cannot while the block lasts, and can after it."""
    entered = threading.Event()

    def work():
        with locked(out):
            entered.set()

    other = threading.Thread(target=work)
    other.start()
    assert not entered.wait(0.2)
    yield
    other.join(LIMIT_S)
    assert entered.is_set()


def test_one_call_at_a_time(tmp_path, capsys):
    with contextlib.ExitStack() as other, locked(tmp_path):
        other.enter_context(shut_out_of(tmp_path))
    assert "waiting for it to end" in capsys.readouterr().out


def test_a_part_that_outlives_a_killed_parent_is_waited_for(tmp_path):
    with locked(tmp_path) as lock:
        part = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with shut_out_of(tmp_path):
        part.communicate(b"end")


# ---- the report -----------------------------------------------------------------------------------------------------


def test_pretraining_that_scores_as_much():
    words, scores = [1e6, 2e6, 4e6, 8e6], [1.0, 2.0, 1.8, 4.0]
    equivalents = {1.5: f"{math.sqrt(2):.3g} M", 2.0: "2 M", 3.0: "5.84 M", 0.9: "at most 1 M", 4.1: "more than 8 M"}
    for score, text in equivalents.items():  # of 2.0 the first time that the curve gets there
        assert equivalent_words(score, words, scores) == text


def record(arm, start, seed, words, score):
    stories = {"score_mean": score, "distinct_4": 0.9 - seed / 100, "story": "<script>"}
    facts = {"arm": arm, "start": start, "seed": seed, "words": words, "settings": {"stories": 8}}
    return {**facts, "measures": {"stories": stories}}


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "evaluation").mkdir()
    records = [record("before", 0, 0, m * MILLION, score) for m, score in ((1, 1.0), (2, 2.0), (4, 3.0))]
    records += [record("interact", MILLION, seed, MILLION + 9000, 1.4 + seed / 10) for seed in range(3)]
    records += [record("interact", 4 * MILLION, seed, 4 * MILLION + 9000, 3.5) for seed in range(3)]
    records += [record("random", MILLION, 0, MILLION, 0.75), record("reading", MILLION, 0, 1_250_000, 1.25)]
    records += [record("random", MILLION, 1, MILLION, 9.0) | {"settings": {"stories": 4}}]  # of an earlier call
    for i, each in enumerate(records):
        (tmp_path / "evaluation" / f"{i}.json").write_text(json.dumps(each))
    described = dict(scale="tiny", teacher="<b>", device="cpu", evaluation={"stories": 8})
    (tmp_path / "experiment.json").write_text(json.dumps(described))
    return tmp_path


def rows_of(page: str) -> list[list[str]]:
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]


def test_the_report_compares_the_arms(experiment):
    page = write_experiment_report(experiment).read_text()
    rows = rows_of(page)
    low, like, high = (f"{2**t:.3g} M" for t in (0.4, 0.5, 0.6))
    assert ["1 M", "1.00", "1.50 ± 0.10", "0.75", "1.25", "9,000", like, f"{low} to {high}"] in rows
    beyond = next(row for row in rows if row[0] == "4 M")
    assert beyond[2:] == ["3.50 ± 0.00", "–", "–", "9,000", "more than 4 M", "more than 4 M"]
    assert next(row for row in rows if row[0] == "1 M + interaction")[1:3] == ["1.50 ± 0.10", "0.89 ± 0.01"]


def test_the_published_curves_are_drawn_beside_the_papers_experiment_and_its_rehearsal(experiment):
    for scale, drawn in (("tiny", False), ("paper", True), ("rehearsal", True)):
        facts = json.loads((experiment / "experiment.json").read_text()) | {"scale": scale}
        (experiment / "experiment.json").write_text(json.dumps(facts))
        page = write_experiment_report(experiment).read_text()
        assert ("published, + interaction" in page) == drawn


def test_the_report_escapes_the_name_of_a_model(experiment):
    page = write_experiment_report(experiment).read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page and "<script" not in page


class CountingEvaluator:
    def __init__(self, **settings):
        self.settings, self.measured = settings, []

    def measure(self, folder):
        self.measured.append(folder.name)
        return {"bits_per_byte": 1.0}


def test_a_checkpoint_is_evaluated_once_for_the_same_settings(tmp_path):
    (tmp_path / "evaluation").mkdir()
    subjects = [reproduce.Subject("before", 0, 0, m * MILLION, Path(f"chck_{m}M")) for m in (1, 2)]

    def measured(**settings):
        evaluator = CountingEvaluator(**settings)
        reproduce.evaluate(subjects, tmp_path, evaluator)
        return evaluator.measured

    assert measured(stories=8) == ["chck_1M", "chck_2M"]
    assert measured(stories=8) == []
    (tmp_path / "evaluation" / "before-2M-0.json").unlink()
    assert measured(stories=8) == ["chck_2M"]
    assert measured(stories=16) == ["chck_1M", "chck_2M"]


def test_a_chart_with_error_bars_over_a_logarithm():
    line = Line([1e6, 1e7, 1e8], [1.0, 2.0, 3.0], "reward", "seeds", False, [0.5, None, 2.0])
    drawing = chart("Score", [line], log_x=True)
    x = [float(each) for each in re.findall(r'cx="([\d.]+)"', drawing)]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)
    bars = re.findall(r'class="error" d="M([\d.]+),([\d.]+)V([\d.]+)M', drawing)
    lengths = [float(low) - float(high) for _, low, high in bars]
    assert [float(at) for at, _, _ in bars] == [x[0], x[2]] and lengths[1] == pytest.approx(4 * lengths[0], abs=0.3)
    assert log_ticks(1e6, 1e7) == [1e6, 2e6, 5e6, 1e7]
    assert log_ticks(2e7, 9e8) == [2e7, 5e7, 1e8, 2e8, 5e8]
    assert log_ticks(1, 1e9) == [10.0**p for p in range(10)]


@pytest.mark.slow
def test_the_whole_experiment(tmp_path, monkeypatch):
    small = dict(words=MILLION, n_layer=1, n_head=1, n_embd=32, vocab_size=320, batch_size=32, learning_rate=1e-2)
    scale = reproduce.Scale("demo", small, dict(steps=2, stories_per_step=8, max_new_tokens=40), (1,), 2, 1, 16)
    monkeypatch.setitem(reproduce.SCALES, "tiny", scale)
    command.main(["--out", str(tmp_path), "--device", "cpu"])
    parts = {"pretrain", "interact/1M-0", "interact/1M-1", "random/1M-0", "reading/1M-0"}
    assert {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("config.json")} == parts
    rows = rows_of((tmp_path / "report.html").read_text())
    assert [row[0] for row in rows if row[0].startswith("1 M ")] == [
        "1 M pretrained", "1 M + interaction", "1 M + random reward", "1 M + more pretraining"
    ]  # fmt: skip

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    command.main(["--out", str(tmp_path), "--device", "cpu"])
    changed = {path.name for path, time in written.items() if path.stat().st_mtime_ns != time}
    assert changed == {"experiment.json"}
