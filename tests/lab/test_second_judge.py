"""A second judge: which stories are judged, and how much of a run's gain the report says that the
judge sees."""

import contextlib
import json
import runpy
import shutil

import numpy as np
import pytest
from conftest import ROOT, SHORT, fails

import train_interact
from lab import judge, second_judge
from lab.second_judge import (
    AFTER,
    BEFORE,
    BEST_OF_N,
    COLDER,
    GROUPS,
    JUDGED,
    REAL,
    best_of_n,
    conclusion,
    gain,
    judge_run,
    judged_rows,
    summary,
)
from tinystory.config import InteractConfig
from tinystory.evaluate.corruptions import unseen_stories
from tinystory.evaluate.likelihood import Likelihood
from tinystory.ops.compute import resolve
from tinystory.report.findings import read_findings
from tinystory.run.records import EVALUATIONS, read_records
from tinystory.student import checkpoint
from tinystory.teacher.grade import Grade, Grader

READER = ["--reader", "short-words"]


def teacher(place):
    """The options with which the run was started and that the folder may not name."""
    reward = f"{place / 'reward.py'}:score"
    return ["--reward", reward, "--corpus", str(place / "corpus.txt")]


class Reader:
    """A reader that gives short words the most coherence, and a story without words none."""

    def __init__(self, name, device="auto"):
        assert name == "short-words"

    def coherence(self, stories):
        return np.array(
            [
                -np.mean([len(word) for word in text.split()]) if text.split() else np.nan
                for _, text in stories
            ]
        )


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("judged") / "run"
    reward = f"{place / 'reward.py'}:score"
    train_interact.main([*SHORT, "--init", str(place / "p"), "--out", str(out), "--reward", reward])
    return out


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A finished run with a callable as the teacher, without a second judge's scores."""
    monkeypatch.setattr(judge, "Reader", Reader)
    return shutil.copytree(finished, tmp_path / "run")


def test_a_finished_run_is_judged_with_its_controls(place, run, capsys, monkeypatch):
    drawn = []  # scores by the teacher
    monkeypatch.setattr(
        second_judge, "best_of_n", lambda *args: [drawn.append(args[0]), best_of_n(*args)][1]
    )
    judge.main([str(run), str(run), *READER, *teacher(place)])
    printed = capsys.readouterr().out
    assert "2 runs: a gain in coherence of " in printed and "± 0.000 nats" in printed
    assert "not the teacher" in printed
    assert printed.count("real stories") >= 3
    records = list(read_records(run / JUDGED))
    evaluations = [record for record in read_records(run / EVALUATIONS) if record["step"] == 0]
    by_group = {name: [record for record in records if record["group"] == name] for name in GROUPS}
    assert all(len(group) == len(evaluations) == 4 for group in by_group.values())
    assert [record["story"] for record in by_group[BEFORE]] == [
        record["story"] for record in evaluations
    ]
    openings = [record["opening"] for record in evaluations]
    for name in (AFTER, *COLDER, BEST_OF_N):
        assert [record["opening"] for record in by_group[name]] == openings
    for i, (before, best) in enumerate(zip(by_group[BEFORE], by_group[BEST_OF_N], strict=True)):
        candidates = drawn[0][i :: len(openings)]
        assert len(candidates) == second_judge.BEST_OF
        assert candidates[0] == before["score"]
        assert max(candidates) == best["score"]
    page = (run / "report.html").read_text()
    assert "A judge that was not the teacher" in page and "0.5 of the temperature" in page
    (finding,) = read_findings(run)  # the second judgement replaces the first
    assert finding["step"] == 4 and finding["table"] == judged_rows(records)
    assert finding["sentences"][0] == conclusion(records)


def test_a_run_that_was_not_evaluated_is_refused(place, run, capsys):
    (run / EVALUATIONS).write_text("")
    argv = [str(run), *READER, *teacher(place)]
    assert "give a finished interaction" in fails(judge.main, argv, capsys)


def test_a_run_of_the_likelihood_control_is_judged_by_its_own_score(place, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "Reader", Reader)
    run = tmp_path / "run"
    start = ["--init", str(checkpoint.newest(place / "p")), "--out", str(run), "--steps", "1"]
    train_interact.main([*SHORT, *start, "--reward", "likelihood"])
    judge.main([str(run), *READER, *teacher(place)[2:]])
    records = [record for record in read_records(run / JUDGED) if record["group"] == BEFORE]
    student, tokenizer, _ = checkpoint.load(run / "checkpoints" / "start")
    config = InteractConfig(max_new_tokens=16)
    grader = Likelihood(student, tokenizer, ["Once"], config)
    grades = grader.grade_each([(record["opening"], record["story"]) for record in records])
    scores = [grade.score for grade in grades]
    assert len(scores) == 4 and [record["score"] for record in records] == pytest.approx(scores)


def test_the_coherence_of_anybodys_stories_is_shown_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judge, "Reader", Reader)
    for name, story in (("short", "a b c."), ("long", "abcdefgh abcdefgh.")):
        lines = [json.dumps({"opening": "Once", "story": story}) + "\n"] * 3
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    judge.main([str(tmp_path / f"{name}.jsonl") for name in ("short", "long")] + READER)
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header[0] == "stories"
    expected = [["short.jsonl", "3", "-1.33"], ["long.jsonl", "3", "-8.50"]]
    assert [row[:3] for row in rows] == expected


def test_a_reader_is_calibrated_as_a_teacher_is(capsys, monkeypatch, tmp_path):
    class Varied(Reader):
        def coherence(self, stories):
            return np.array([-len(set(story.split())) + 0.0 for _, story in stories])

    monkeypatch.setattr(judge, "Reader", Varied)
    (tmp_path / "c.txt").write_text("\n\n".join(unseen_stories(1900)))
    judge.main(["--calibrate", *READER, "--per-kind", "4", "--corpus", str(tmp_path / "c.txt")])
    lines = capsys.readouterr().out.splitlines()
    assert "short-words" in lines[0]
    shuffled = next(line for line in lines if "words shuffled" in line)
    assert shuffled.count("[") == 1  # the interval of its area
    assert lines[-1].startswith("the reader ")


def test_a_judged_storys_score_is_weighted_as_the_rubric_says(run):
    def grade(stories):  # with weights 3 and 1
        return [Grade({"humour": 3, "plot": 1}, 10 / 12)] * len(stories)

    config = InteractConfig(max_new_tokens=16)
    reader = Reader("short-words")
    records = judge_run(run, config, resolve("cpu", "float32"), reader, grade, ["builtin"])
    assert {round(record["score"], 6) for record in records} == {5}


def judged(**coherences):
    """Records of stories with this mean coherence and some noise, which is the same for all groups."""
    noise = np.random.default_rng(0).normal(0, 0.1, 40)
    noise -= noise.mean()
    groups = {
        BEFORE: -1.2,
        AFTER: -0.8,
        COLDER[0]: -1.1,
        COLDER[1]: -1.1,
        BEST_OF_N: -1.1,
        REAL: -0.7,
    } | coherences
    return [
        {
            "group": name,
            "index": i,
            "score": 5 + value,
            "coherence": mean + value * (1 if name == AFTER else -1),
        }
        for name, mean in groups.items()
        for i, value in enumerate(noise)
    ]


@pytest.mark.parametrize(
    "coherences, words",
    [
        ({}, "that is more than the +0.1"),
        (
            {COLDER[1]: -0.79},
            "that is no different from the +0.41 for “before, at 0.5 of the temperature”",
        ),
        ({COLDER[0]: -0.5}, "that is less than the +0.70 for “before, at 0.7 of the temperature”"),
        ({AFTER: -1.2}, "measures no gain in coherence from interaction"),
        ({AFTER: -1.5}, "measures no gain in coherence from interaction"),
    ],
)
def test_the_sentence_says_which_gain_the_reader_sees(coherences, words):
    records = judged(**coherences)
    assert words in conclusion(records)
    if not coherences:
        assert "80% of the way to real stories" in conclusion(records)


def test_no_fraction_of_a_way_that_is_none():
    """Untouched stories within the interval of real ones."""
    assert {row["gap"] for row in summary(judged(**{BEFORE: -0.7001}), "coherence").values()} == {
        None
    }


def test_stories_that_one_judge_did_not_score_are_left_out():
    records = judged()
    for record in records[::7]:
        record["coherence"] = None
    value, (low, high) = gain(records, AFTER, BEFORE)
    assert low < value < high and value == pytest.approx(0.4, abs=0.05)
    for record in records:
        record["score"] = None
    table = summary(records, "score")
    assert table[AFTER] == {"mean": None, "ci": None, "gap": None}
    assert len(judged_rows(records)) == 1 + len(GROUPS)
    assert json.dumps(judged_rows(records))


def test_the_best_of_n_is_the_largest_of_each_group_and_no_score_loses():
    assert best_of_n([0.1, 0.9, None, 0.5, 0.2, None], 3) == [3, 1, 2]
    assert best_of_n([0.4, None, 0.4, 0.0], 2) == [0, 3] and best_of_n([None, 3], 2) == [0, 1]
    assert best_of_n([(True, -9.0), (False, -1.0), (True, -2.0)], 1) == [2]


@pytest.fixture
def short_rubric(monkeypatch):
    class Rubric:
        def score(self, opening, story):
            return dict.fromkeys("abc", 3 if story else 0)

    monkeypatch.setattr("tinystory.rubric.rubric.Rubric", lambda documents: Rubric())


def test_two_judges_give_one_reward(short_rubric, monkeypatch):
    class Reader:
        def coherence(self, stories):
            return np.array([-0.5 if story else np.nan for _, story in stories])

    monkeypatch.setattr("lab.reader.Reader", lambda name: Reader())
    score = runpy.run_path(str(ROOT / "lab/two_judges.py"))["score"]
    assert score(["Once", "Once"], ["a b c d e.", ""]) == [0.75, 0]


def test_the_readers_part_is_given_at_the_last_word_of_each_sentence(short_rubric, monkeypatch):
    """The reader reads the first two sentences of the first story, and nothing of the second."""
    stories = ["Tom ran. Mia saw\na  ball! It was red.", "\u200b"]

    class Reader:
        def by_sentence(self, pairs):
            assert [story for _, story in pairs] == stories
            return [np.array([-0.4, 0.1]), np.zeros(0)]

    monkeypatch.setattr("lab.reader.Reader", lambda name: Reader())
    by_sentence = runpy.run_path(str(ROOT / "lab/two_judges.py"))["by_sentence"]
    first, second = by_sentence(["Once"] * 2, stories)
    # half the rubric's 1, and half the reader's 0.7
    assert first == pytest.approx([0, -0.2, 0, 0, 0, 0.05, 0, 0, 0, 0.85 - 0.05 + 0.2])
    assert second == [0, 0.5]


def test_the_second_of_two_judges_can_be_behind_an_endpoint(short_rubric, monkeypatch):
    """A story that it does not score has no reward."""

    class Teacher(Grader):
        def grade_each(self, pairs):
            return [Grade(None, None if "no" in story else 0.5) for _, story in pairs]

    opened = []

    def open_grader(config, *, corpus, examples):
        opened.append((config.teacher_url, config.teacher_prompt, corpus))
        return contextlib.nullcontext(Teacher({}))

    monkeypatch.setattr("tinystory.evaluate.open_grader.open_grader", open_grader)
    url = "http://127.0.0.1:9/v1"
    options = f"--teacher-url {url} --teacher-prompt examples --no-calibrate"
    monkeypatch.setenv("TEACHER", options)
    judges = runpy.run_path(str(ROOT / "lab/two_judges.py"))
    score = judges["score"]
    assert opened == [([url], "examples", ["builtin"])]
    assert score(["Once", "Once"], ["a b c.", "no"]) == [0.75, None]
    with pytest.raises(ValueError, match="unset TEACHER"):
        judges["by_sentence"](["Once"], ["a b c."])
