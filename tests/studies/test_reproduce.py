"""The experiment: what it runs, that it does nothing twice and loses nothing, and what its report says."""

import json
import re

import pytest
from conftest import fails

from scripts import reproduce as command
from tinystory.config import INTERACT_PRESETS, PRETRAIN_PRESETS, InteractConfig, PretrainConfig, parse
from tinystory.report.charts import Line, chart, log_ticks
from tinystory.run.errors import UserError
from tinystory.studies import reproduce
from tinystory.studies.reproduce import BEFORE, INTERACT, MILLION, MORE, TrainingRun, run_all
from tinystory.teacher.callable import random_scores

# ---- the plan -------------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """Calls the command, which plans its interactions and runs nothing; returns the runs."""
    runs = []

    def stop_after_interactions(more):
        runs.extend(more)
        if len(runs) > 1:
            raise UserError("that is all")

    def plan(*argv):
        monkeypatch.setattr(reproduce, "run_all", stop_after_interactions)
        with pytest.raises(SystemExit):
            command.main(["--out", str(tmp_path), *argv])
        return runs

    return plan


def config_of(run):
    kinds = (PretrainConfig, PRETRAIN_PRESETS) if run.words else (InteractConfig, INTERACT_PRESETS)
    return parse(*kinds, [*run.argv, *run.again])


@pytest.mark.parametrize("name", reproduce.SCALES)
def test_every_scale_is_a_plan_of_options_that_the_commands_have(name, planned):
    pretraining, *interactions = planned("--scale", name)
    scale = reproduce.SCALES[name]
    assert config_of(pretraining).words == pretraining.words >= max(scale.starts) * MILLION
    assert {start * MILLION for start in scale.starts} <= set(reproduce.MILESTONES)
    assert len({run.folder for run in interactions}) == len(interactions) == 2 * len(scale.starts) * scale.seeds
    for run in interactions:
        config = config_of(run)
        assert (config.init.rpartition("/")[2], config.seed) == (f"chck_{run.start // MILLION}M", run.seed)
        assert {name: getattr(config, name) for name in ("diversity", "unfinished", "openings", "max_new_tokens")} == {
            name: INTERACT_PRESETS["paper"][name] for name in ("diversity", "unfinished", "openings", "max_new_tokens")
        }


def test_the_random_control_differs_in_the_reward_alone(planned):
    runs = [config_of(run) for run in planned("--scale", "small", "--interact", "--steps 7") if run.seed == 1]
    real, control = (next(run for run in runs if run.reward == reward) for reward in ("", "random"))
    assert {name for name, value in vars(control).items() if value != vars(real)[name]} == {"reward"}
    assert real.steps == 7


def test_a_start_without_a_checkpoint_is_refused_before_anything_is_written(tmp_path, capsys):
    assert "no checkpoint at 7 M" in fails(command.main, ["--milestones", "7", "--out", str(tmp_path / "out")], capsys)
    teacher = ["--teacher=--teacher-concurrency 0"]
    assert "--teacher-concurrency" in fails(command.main, [*teacher, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_other_settings_in_the_same_folder_are_refused(planned, tmp_path, capsys):
    planned("--scale", "tiny")
    capsys.readouterr()
    line = fails(command.main, ["--interact", "--lam 0.9", "--out", str(tmp_path)], capsys)
    assert "was begun with interact" in line and "--lam 0.9" in line and "another --out" in line


def test_the_student_compared_is_the_last_not_the_best(tmp_path):
    """Else every arm would be chosen by the score that it is judged by."""
    for name, step in (("best", 2), ("step_0000004", 4)):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "trainer.json").write_text(json.dumps({"step": step, "words_in": 7}))
    words, folder = reproduce.last_checkpoint(TrainingRun("random", MILLION, 0, tmp_path, (), ()))
    assert folder.name == "step_0000004" and words == MILLION + 7


def test_more_pretraining_goes_on_from_the_milestone_by_the_words_of_the_interaction(tmp_path):
    milestone = tmp_path / "pretrain" / "checkpoints" / "chck_1M"
    milestone.mkdir(parents=True)
    (milestone / "trainer.json").write_text('{"step": 3, "words": 1000000}')
    (tmp_path / "pretrain" / "config.json").write_text('{"options": {}}')
    interaction = TrainingRun(INTERACT, MILLION, 0, tmp_path / INTERACT / "1M-0", (), ())
    interaction.folder.mkdir(parents=True)
    (interaction.folder / "metrics.jsonl").write_text('{"step": 1, "words_in": 30, "words_out": 400}\n')
    half_copied = tmp_path / MORE / "1M-0" / "checkpoints"
    half_copied.mkdir(parents=True)
    run = reproduce.more_pretraining(interaction, milestone, ["--device", "cpu"])
    assert run.words == MILLION + 430 and run.again[:2] == ["--words", "1000430"] and not run.finished()
    assert (run.folder / "checkpoints" / "chck_1M" / "trainer.json").exists() and (run.folder / "config.json").exists()
    (run.folder / "checkpoints" / "chck_1M" / "trainer.json").write_text('{"step": 9, "words": 1000430}')
    assert reproduce.more_pretraining(interaction, milestone, []).finished()  # and is not copied again


def test_the_random_reward_is_a_teachers_scores_that_know_nothing():
    stories = [f"story {i}" for i in range(2000)]
    scores = random_scores(["Once"] * 2000, stories)
    assert scores == random_scores(["Never"] * 2000, stories)
    assert {round(score * 9, 6) for score in scores} == set(range(10))
    assert sum(scores) / len(scores) == pytest.approx(0.5, abs=0.02)


# ---- runs of commands that train nothing ----------------------------------------------------------------------------

FAKE = """
import json, sys
from pathlib import Path
options = dict(zip(sys.argv[1:], sys.argv[2:]))
out = Path(options["--out"])
trainer = out / "checkpoints" / "c" / "trainer.json"
step = json.loads(trainer.read_text())["step"] if trainer.exists() else 0
assert bool(step) == ("--resume" in sys.argv) == ("--epochs" not in sys.argv) and options["--device"] == "cpu"
trainer.parent.mkdir(parents=True, exist_ok=True)
(out / "config.json").write_text("{}")
with open(out.parent / f"calls-{out.name}", "a") as calls:
    calls.write(f"{step} ")
while step < 4:
    step += 1
    trainer.write_text(json.dumps({"step": step}))
    if step == 2 and (out.parent / "fail").exists():
        sys.exit(3)
(out / "samples.jsonl").write_text("")
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Three interactions."""
    (tmp_path / "train_interact.py").write_text(FAKE)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    folders = [tmp_path / INTERACT / f"{start}M-0" for start in (1, 2, 5)]
    return [TrainingRun(INTERACT, MILLION, 0, folder, ["--epochs", "1"], ["--device", "cpu"]) for folder in folders]


def calls(runs):
    return [(run.folder.parent / f"calls-{run.folder.name}").read_text() for run in runs]


def test_what_is_finished_is_not_done_again(fakes):
    run_all(fakes)
    assert all(run.finished() for run in fakes)
    run_all(fakes)
    assert calls(fakes) == ["0 ", "0 ", "0 "]


def test_a_run_that_ended_early_is_named_and_goes_on_where_it_was(fakes):
    mark = fakes[0].folder.parent / "fail"
    mark.parent.mkdir()
    mark.touch()
    with pytest.raises(UserError, match=r"interact/1M-0 ended with exit code 3 before .*interact/1M-0\.log says why"):
        run_all(fakes)
    assert not fakes[0].finished()
    mark.unlink()
    run_all(fakes)
    assert calls(fakes) == ["0 2 ", "0 ", "0 "]


# ---- the report -----------------------------------------------------------------------------------------------------


def record(arm, start, seed, words, score):
    stories = {"score_mean": score, "distinct_4": 0.9 - seed / 100, "story": "<script>"}
    return dict(arm=arm, start=start * MILLION, seed=seed, words=words, measures={"stories": stories})


def rows_of(page: str) -> list[list[str]]:
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]


def test_the_report_compares_the_arms_and_escapes_the_name_of_a_model(tmp_path):
    records = [record(BEFORE, m, 0, m * MILLION, score) for m, score in ((1, 1.0), (2, 2.0), (4, 3.0))]
    records += [record(INTERACT, 1, seed, MILLION + 9000, 1.4 + seed / 10) for seed in range(3)]
    records += [record(INTERACT, 4, seed, 4 * MILLION + 9000, 3.5) for seed in range(3)]
    records += [record("random", 1, 0, MILLION, 0.75), record(MORE, 1, 0, 1_250_000, None)]
    settings = {"preset": "demo", "scored by": "<b>"}
    page = reproduce.write_page(tmp_path, settings, [INTERACT, "random"], records).read_text()
    rows = rows_of(page)
    assert rows[0] == ["Student", "Seeds", "Score", "distinct_4"]
    assert rows[1:5] == [
        ["1 M pretrained", "1", "1.00", "0.90"],
        ["1 M + interaction", "3", "1.50 ± 0.06", "0.89 ± 0.01"],  # 0.1 / sqrt(3)
        ["1 M + more pretraining", "1", "–", "0.90"],
        ["1 M + --reward random", "1", "0.75", "0.90"],
    ]
    assert rows[-1] == ["4 M + interaction", "3", "3.50 ± 0.00", "0.89 ± 0.01"]
    assert "&lt;b&gt;" in page and "<b>" not in page and "<script" not in page and "<svg" in page


def test_a_chart_with_error_bars_over_a_logarithm():
    line = Line([1e6, 1e7, 1e8], [1.0, 2.0, 3.0], "reward", "seeds", [0.5, None, 2.0])
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
def test_the_whole_experiment(tmp_path):
    small = "--words 1M --n-layer 1 --n-head 1 --n-embd 32 --vocab-size 320 --batch-size 32 --learning-rate 1e-2"
    argv = ["--out", str(tmp_path), "--device", "cpu", "--milestones", "1", "--stories", "16", "--pretrain", small]
    argv += ["--interact", "--steps 2 --stories-per-step 8 --max-new-tokens 40"]
    command.main(argv)
    runs = {"pretrain", *(f"{arm}/1M-{seed}" for arm in (INTERACT, "random") for seed in (0, 1)), "more/1M-0"}
    assert {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("config.json")} == runs
    rows = rows_of((tmp_path / "report.html").read_text())
    assert [row[:2] for row in rows[1:]] == [
        ["1 M pretrained", "1"], ["1 M + interaction", "2"], ["1 M + more pretraining", "1"],
        ["1 M + --reward random", "2"],
    ]  # fmt: skip

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    command.main(argv)
    changed = {path.name for path, time in written.items() if path.stat().st_mtime_ns != time}
    assert changed == {"experiment.json"}
