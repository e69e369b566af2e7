"""open_grader: from the options to the grader."""

import contextlib
import signal

import pytest
from fault_server import FaultServer, graded, written

from tinystory.config import InteractConfig
from tinystory.config.command_line import parse
from tinystory.config.presets import INTERACT_PRESETS
from tinystory.evaluate.open_grader import open_grader
from tinystory.run.errors import Interrupted, Stop, UserError

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_a_teacher_grades_the_stories_of_a_step_and_those_of_an_evaluation(tmp_path, capsys):
    script = lambda story, n: "3 3 3" if "dog" in story else "0 0 3"  # noqa: E731
    replies = tmp_path / "replies.jsonl"
    with FaultServer(script) as server:
        config = InteractConfig(teacher_url=[server.url], openings="Once", teacher_max_tokens=10)
        with open_grader(config, replies=replies) as grader:
            assert grader.facts["scored_by"] == f"first at {server.url}"
            assert grader.facts["teacher"]["scored"]
            assert grader.most_words == 30 and grader.affords(10**6)
            assert grader.forecast(7, "Once").startswith("7 stories")
            for index, text in ((4, "A dog ran."), (3, "A cat ran.")):
                grader.send(written(index, "Once", text))
            grades = grader.collect(Stop())
            assert [grade.score for grade in grades] == [pytest.approx(1 / 3), 1.0]
            assert [grade.reply_words for grade in grades] == [3, 3]
            assert [grade.score for grade in graded(grader, "One day,", ["A dog.", ""])] == [
                1.0,
                0.0,
            ]
    assert len(replies.read_text().splitlines()) == 1 + 3  # the probe and three stories
    assert "teacher: first at" in capsys.readouterr().out


def test_the_wait_for_grades_ends_when_a_stop_is_requested():
    stop = Stop()
    stop.signum = signal.SIGINT
    with FaultServer(lambda story, n: "hang") as server:
        config = InteractConfig(teacher_url=[server.url])
        with open_grader(config) as grader:
            grader.send(written(0, "Once", "A dog ran."))
            with pytest.raises(Interrupted):
                grader.collect(stop)


def test_a_callable_scores_and_costs_nothing(tmp_path):
    (tmp_path / "r.py").write_text(
        "def f(opening, stories): return [len(opening + s) / 10 if s != '?' else None for s in stories]\n"
    )
    config = InteractConfig(reward=f"{tmp_path / 'r.py'}:f")
    with open_grader(config) as grader:
        grader.send(written(1, "One", "abc"))
        grader.send(written(0, "Two", "?"))
        grader.send(written(2, "One", "abcd"))
        grades = grader.collect(Stop())
        assert [grade.score for grade in grades] == [None, 0.6, 0.7] and grades[1].scores is None
        assert grader.collect(Stop()) == []
        assert grader.facts == {"scored_by": config.reward}
        assert grader.most_words == 0
        assert grader.forecast(9, "Once") == ""


def test_an_empty_story_scores_0_whoever_grades(tmp_path):
    """No function is called for an empty story, because the function may divide by the length."""
    (tmp_path / "r.py").write_text(
        "def f(openings, stories): return [1 / len(s.split()) for s in stories][: 1 // len(stories)]\n"
    )
    empty = ["", " \n\t", "\x00\u200b"]
    with FaultServer(lambda story, n: "3 3 3") as server:
        graders = [{"teacher_url": [server.url]}]
        graders += [{"reward": name} for name in ("random", "constant", f"{tmp_path / 'r.py'}:f")]
        for options in graders:
            with open_grader(InteractConfig(**options), corpus=None) as grader:
                *zeros, one = graded(grader, "Once", [*empty, "One."])
                assert [grade.score for grade in zeros] == [0.0] * 3 and one.score is not None
                assert [grade.score for grade in graded(grader, "Once", empty)] == [0.0] * 3


def test_the_builtin_teacher_measures_by_the_stories_of_the_students_corpus(tmp_path, monkeypatch):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("A dog ran.\n")
    corpora = []

    @contextlib.contextmanager
    def start(names):
        corpora.append(names)
        yield server.url

    monkeypatch.setattr("tinystory.evaluate.open_grader.builtin_teacher", start)
    with (
        FaultServer() as server,
        open_grader(InteractConfig(), corpus=[str(corpus), "dull"]) as grader,
    ):
        assert graded(grader, "Once", ["A dog ran."])[0].scores
    assert corpora == [[str(corpus)]]
    with (
        pytest.raises(UserError, match="there is no file"),
        open_grader(InteractConfig(), corpus=["missing.txt"]),
    ):
        pass


@pytest.mark.parametrize("preset", ["demo", "babylm-2026-strict"])
def test_a_reward_function_on_a_babylm_track_is_warned_of_probabilities(preset, tmp_path, capsys):
    (tmp_path / "r.py").write_text("def score(o, stories): return [0.5 for _ in stories]\n")
    config = InteractConfig(preset=preset, reward=str(tmp_path / "r.py"))
    with open_grader(config) as grader:
        assert graded(grader, "Once", ["a dog ran."])[0].score == 0.5
    warned = (
        "does not allow a model's probabilities to reach the student" in capsys.readouterr().out
    )
    assert warned == (preset != "demo")


@pytest.mark.parametrize("flags", ["--teacher-temperature 1", "--teacher-max-tokens 99"])
def test_an_option_of_grades_is_refused_beside_a_question(flags):
    url = ["--teacher-url", "http://127.0.0.1:9", "--teacher-prompt", "event"]
    config = parse(InteractConfig, [*url, *flags.split()])
    with (
        pytest.raises(UserError, match=f"{flags.split()[0]} has no effect .* event, which asks"),
        open_grader(config),
    ):
        pass


@pytest.mark.parametrize(
    "flags",
    ["--teacher-model x", "--teacher-temperature 1", "--price-in 1", '--teacher-extra {"a":1}'],
)
def test_an_option_of_a_teacher_is_refused_where_a_reward_takes_its_place(flags):
    with pytest.raises(UserError, match=f"{flags.split()[0]} has no effect with --reward"):
        parse(InteractConfig, ["--reward", "random", *flags.split()])
    for preset in INTERACT_PRESETS:  # which set options of a teacher too
        flags = ["--preset", preset, "--reward", "random", "--teacher-timeout", "9"]
        assert parse(InteractConfig, flags).teacher_timeout == 9
