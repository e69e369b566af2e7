"""--control: a finished run, repeated with the scores in another order."""

import json
import re
import shutil

import pytest
from conftest import SHORT, assert_same_bits, cli, fails, metrics, read_lines
from runs import interrupted_at, run_interact

import train_interact as interact
from tinystory.config import InteractConfig
from tinystory.config.command_line import parse
from tinystory.data.openings import Openings
from tinystory.evaluate.control import COMPARISON, note_on_grades, read_comparisons
from tinystory.run.errors import UserError
from tinystory.run.folder import newest_run
from tinystory.student import checkpoint
from tinystory.teacher.grade import Grader


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A run that random scores taught."""
    out = tmp_path_factory.mktemp("control") / "run"
    init = str(checkpoint.newest(place / "p"))
    interact.main(["--init", init, "--reward", "random", "--out", str(out), *SHORT])
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run, without controls."""
    return shutil.copytree(finished, tmp_path / "run")


def control(run, *more):
    interact.main(["--control", str(run), *more])
    return run / "controls" / "shuffled"


def of_step(run, step):
    return [story for story in read_lines(run / "stories.jsonl") if story["step"] == step]


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_each_step_has_the_runs_scores_in_another_order(run, capsys):
    folder = control(run)
    for step in range(1, 5):
        own = [story["score"] for story in of_step(run, step)]
        given = [story["score"] for story in of_step(folder, step)]
        assert sorted(given) == sorted(own)
    texts = [[story["story"] for story in of_step(each, 1)] for each in (run, folder)]
    assert texts[0] == texts[1], "start and random numbers are the run's"
    scores = [
        [story["score"] for story in read_lines(each / "stories.jsonl")] for each in (run, folder)
    ]
    assert scores[0] != scores[1]
    options = [json.loads((each / "config.json").read_text())["options"] for each in (run, folder)]
    assert {name for name in options[0] if options[0][name] != options[1][name]} == {
        *("control", "out", "init", "temperature", "budget_words_out", "scored_by"),
    }
    # the terminal and the run's report state the same gain
    said = [line for line in capsys.readouterr().out.splitlines() if "mean reward" in line]
    page = (run / "report.html").read_text()
    assert said and said[-1][:40] in page and "needs 3 controls" in page


def test_a_second_control_has_another_order_and_constant_has_none(run, capsys):
    folder = control(run)
    control(run)
    second = folder.with_name("shuffled-2")
    orders = [
        [story["score"] for story in read_lines(each / "stories.jsonl")]
        for each in (folder, second)
    ]
    assert orders[0] != orders[1]
    assert "2 controls: scores in random order" in capsys.readouterr().out
    control(run)
    printed = capsys.readouterr().out
    assert "3 controls: scores in random order" in printed and "needs 3 controls" not in printed
    control(run, "constant")
    constant = run / "controls" / "constant"
    for step in range(1, 5):
        own = [story["score"] for story in of_step(run, step)]
        assert [story["score"] for story in of_step(constant, step)] == pytest.approx(
            [sum(own) / 6] * 6
        )
    assert "already holds a run" in fails(
        interact.main, ["--control", str(run), "constant"], capsys
    )


def test_a_resumed_control_has_the_bits_of_one_that_nothing_stopped(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    whole = control(run)
    with interrupted_at(interact, 2):
        control(other)
    stopped = other / "controls" / "shuffled"
    assert f"--resume --control {other} shuffled" in capsys.readouterr().out
    assert metrics(stopped)[-1]["step"] == 2 and not (stopped / COMPARISON).exists()
    control(other, "--resume")
    assert_same_bits(whole, stopped)
    for name in ("stories.jsonl", "evaluations.jsonl", COMPARISON):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()


def test_rows_without_a_score_stay_so_and_the_teacher_is_not_needed(place, tmp_path):
    reward = tmp_path / "reward.py"
    shutil.copy(place / "reward.py", reward)
    run = tmp_path / "run"
    init = str(checkpoint.newest(place / "p"))
    argv = cli("--init {} --reward {}:some --max-unscored 0.9 --out {}", init, reward, run)
    interact.main([*argv, *SHORT])
    unscored = [
        story["index"] for story in read_lines(run / "stories.jsonl") if story["score"] is None
    ]
    reward.unlink()
    folder = control(run, "--corpus", str(place / "corpus.txt"))
    stories = read_lines(folder / "stories.jsonl")
    assert unscored and [story["index"] for story in stories if story["score"] is None] == unscored
    assert all(
        isinstance(record["judge"], float) for record in read_lines(folder / "evaluations.jsonl")
    )
    assert "second judge" in (run / "report.html").read_text()


def test_with_grades_the_score_model_learns_from_the_reordered_grades(place, tmp_path):
    run = tmp_path / "run"
    init = str(checkpoint.newest(place / "p"))
    argv = ["--init", init, "--reward", "random", "--out", str(run), *SHORT]
    interact.main([*argv, "--stories-per-step", "20", "--grades", "16"])
    folder = control(run)
    for step in range(1, 5):
        graded = [
            [s for s in of_step(each, step) if s["score"] is not None] for each in (run, folder)
        ]
        assert sorted(s["score"] for s in graded[0]) == sorted(s["score"] for s in graded[1])
        assert all(s["reward"] is not None for s in of_step(folder, step))
    assert [m["predicted"] for m in metrics(folder)] == [m["predicted"] for m in metrics(run)]


def test_a_control_ends_after_as_many_steps_as_its_run(run, capsys):
    edit(run / "config.json", lambda record: record["options"].update(stop_on_collapse=True))
    assert not parse(InteractConfig, ["--control", str(run)]).stop_on_collapse
    lines = (run / "stories.jsonl").read_text().splitlines(keepends=True)
    (run / "stories.jsonl").write_text("".join(lines[:18]))  # as if a budget had ended the run
    assert len(metrics(control(run))) == 3
    assert f"the record of {run} does not suffice for another step" in capsys.readouterr().out


def test_likelihood_scores_the_stories_and_the_newest_run_is_no_control(run, tmp_path, monkeypatch):
    control(run, "likelihood")
    scores = {story["score"] for story in of_step(run / "controls" / "likelihood", 1)}
    assert scores != {story["score"] for story in of_step(run, 1)}
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    assert newest_run().name == "mine"


def test_the_teacher_in_the_record_is_neither_asked_nor_needed(run):
    def taught(record):
        record["options"] |= {
            "teacher_url": ["http://127.0.0.1:9/v1"],
            "teacher_model": ["secret"],
            "teacher_prompt": "event",
            "reward": "",
        }

    edit(run / "config.json", taught)
    config = parse(InteractConfig, ["--control", str(run)])
    assert (config.teacher_url, config.teacher_model, config.teacher_prompt) == ([], [], "")
    assert (config.eval_graded, config.judge, config.temperature) == (False, "rubric", 1.0)
    with pytest.raises(UserError, match="give these options again"):  # --teacher-model too
        parse(
            InteractConfig,
            ["--control", str(run), "--teacher-url", "http://x/v1"],
        )


def test_how_many_grades_the_runs_teacher_would_give_is_said(run):
    """Three evaluations and three students, of four stories each."""

    def taught(record):
        record["options"] |= {"teacher_url": ["http://127.0.0.1:9/v1"], "reward": ""}

    edit(run / "config.json", taught)
    config = parse(InteractConfig, ["--control", str(run)])
    note = note_on_grades(config, Grader({"scored_by": ""}), Openings(["Once"], 0))
    assert "second judge (rubric)" in note and "for 24 grades by that teacher" in note


def unfinished(run):
    (run / "samples.jsonl").unlink()


def a_control(run):
    edit(run / "config.json", lambda record: record["options"].update(control=["r", "shuffled"]))


def too_high(run):
    path = run / "stories.jsonl"
    path.write_text(path.read_text().replace('"score": 0', '"score": 7', 1))


def cut(run):
    path = run / "stories.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def renamed(run):
    path = run / "stories.jsonl"
    path.write_text(path.read_text().replace('"opening": "Once"', '"opening": "Twice"'))


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        (unfinished, "", "holds no finished interaction"),
        (a_control, "", "is a control"),
        (too_high, "", "not a number from 0 to 1"),
        (cut, "", "its last step is not complete"),
        (renamed, "", "another opening"),
        (None, "--learning-rate 1", "--learning-rate does not go with --control"),
        (None, "--out elsewhere", "--out does not go with --control"),
        (None, "--resume --out elsewhere", "elsewhere is no control of"),
        (None, "--steps 2", "--steps does not go with --control"),
    ],
)
def test_a_run_that_cannot_be_repeated_is_refused(run, change, more, said, capsys):
    if change:
        change(run)
    assert said in fails(interact.main, ["--control", str(run), *more.split()], capsys)
    assert not (run / "controls").exists()


def test_the_names_of_controls(run, capsys):
    assert "did you mean shuffled?" in fails(
        interact.main, ["--control", str(run), "shufled"], capsys
    )


def test_a_damaged_comparison_is_named(run, capsys):
    folder = control(run)
    edit(folder / COMPARISON, lambda record: record["run"].update(words=["many"]))
    assert "its 'words' is not a list of numbers" in fails(
        interact.main, ["--control", str(run)], capsys
    )


def test_a_run_says_how_to_get_a_control(place, tmp_path, capsys):
    run_interact(place, tmp_path / "run")
    command = f"train_interact.py --control {tmp_path / 'run'}"
    assert command in capsys.readouterr().out
    report = (tmp_path / "run" / "report.html").read_text()
    assert command in re.sub("<[^>]+>", "", report)


def test_the_next_control_is_graded_as_this_one(place, tmp_path, capsys):
    reward = tmp_path / "my_reward.py"
    reward.write_text("def score(opening, stories):\n    return [0.5 for story in stories]\n")
    run = tmp_path / "run"
    init = str(checkpoint.newest(place / "p"))
    interact.main(["--init", init, "--reward", str(reward), "--out", str(run), *SHORT])
    control(run, "--reward", str(reward))
    printed = capsys.readouterr().out.splitlines()
    line = next(line for line in printed if "another control: " in line)
    assert f"--control {run} shuffled --reward {reward}" in line
    by_rubric = json.loads((run / "controls" / "shuffled" / COMPARISON).read_text())
    for student in ("before", "run", "control"):
        by_rubric[student]["judge"] = [0.5] * len(by_rubric[student]["judge"])
    again = run / "controls" / "shuffled-2"
    again.mkdir()
    (again / COMPARISON).write_text(json.dumps(by_rubric))
    (comparison,) = read_comparisons(run)
    assert len(comparison.controls) == 1
