"""A relative judge: ranks as scores, whatever the judge thinks of places; masked, counted and
cached."""

import re
import shutil

import pytest
from conftest import SHORT, assert_same_bits, metrics
from fault_server import FaultServer
from hypothesis import given
from hypothesis import strategies as st

import train_interact
from tinystory.run.errors import Stop
from tinystory.run.records import read_stories
from tinystory.teacher.client import Teacher
from tinystory.teacher.endpoint import constraint
from tinystory.teacher.prompt import DEFAULT, Criterion, Template, clean, instructions
from tinystory.teacher.rank import Ranked, joined, ranking, ranks

pytestmark = pytest.mark.usefixtures("short_pauses")
STORIES = ["A dog ran.", "A dog ran and ran.", "Mud.", "The dog ran home and the sun was warm."]


def texts(joint: str) -> list[str]:
    """The stories in the text to grade, in its order."""
    return [text.strip() for text in re.split(r"^-+ story_\d+$", joint, flags=re.M)[1:]]


def longest_first(joint: str, n: int = 0) -> str:
    """A judge that prefers long stories, wherever they stand; anything but a ranking gets three
    grades."""
    lengths = [len(text.split()) for text in texts(joint)]
    return " ".join(str(min(3, sum(a > b for b in lengths))) for a in lengths) or "2 1 3"


def first_places(joint: str, n: int = 0) -> str:
    """A judge that only looks at places, and likes the second best."""
    return " ".join(str(grade) for grade in (2, 3, 0, 1)[: len(texts(joint))]) or "2 1 3"


def graded(teacher, stories=STORIES, size=4):
    ranked = Ranked(teacher, size)
    for index, story in enumerate(stories):
        ranked.send(index, "Once", story)
    return ranked.collect(Stop()), ranked.stats()


def rotated(story_grades, place_grades):
    n = len(story_grades)
    return [[story_grades[(i + j) % n] + place_grades[j] for j in range(n)] for i in range(n)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=2, max_size=8))
def test_ranks_do_not_depend_on_what_a_judge_gives_a_place(pairs):
    story_grades, place_grades = zip(*pairs, strict=True)
    scores = ranks(rotated(story_grades, place_grades))
    assert scores == ranks(rotated(story_grades, [0] * len(pairs))) and sum(
        scores
    ) == pytest.approx(len(pairs) / 2)
    for a, x in zip(story_grades, scores, strict=True):
        assert all((x > y) == (a > b) for b, y in zip(story_grades, scores, strict=True))


def test_a_consistent_judge_ranks_and_a_planted_bias_comes_out_neutral():
    with FaultServer(longest_first) as server, Teacher(server.url) as teacher:
        grades, stats = graded(teacher)
        assert [grade.score for grade in grades] == pytest.approx([1 / 3, 2 / 3, 0, 1])
        assert stats["rank_position_bias"] == 0 and {grade.scores for grade in grades} == {None}
        assert [grade.reply_words for grade in grades] == [4] * 4
        # and the probe
        assert stats["teacher_requests"] - len(server.others) - 1 == 4 == len(server.requests) - 1
        seen = [texts(joint) for joint in server.seen if "story_1" in joint]
        # each story in each place
        assert all({group[place] for group in seen} == set(STORIES) for place in range(4))
    with FaultServer(first_places) as server, Teacher(server.url) as teacher:
        grades, stats = graded(teacher)
        assert [grade.score for grade in grades] == [0.5] * 4 and stats["rank_position_bias"] == 1


def test_an_empty_story_scores_0_wherever_it_ranks():
    with FaultServer(first_places) as server, Teacher(server.url) as teacher:
        grades, _ = graded(teacher, [*STORIES[:3], ""])
        assert [grade.score for grade in grades] == [0.5, 0.5, 0.5, 0.0]


def test_a_group_with_a_malformed_ranking_has_no_scores_and_is_counted():
    def script(joint, n):
        return "1 2" if "Mud." in texts(joint)[:1] else longest_first(joint)

    with FaultServer(script) as server, Teacher(server.url) as teacher:
        grades, stats = graded(teacher, STORIES + STORIES[:2] * 2)
        assert [grade.score for grade in grades[:4]] == [None] * 4 and None not in [
            g.score for g in grades[4:]
        ]
        assert [grade.attempts for grade in grades] == [1, 1, 3, 1] + [1] * 4
        assert "no scores in 3 replies" in grades[2].error and stats["rank_position_bias"] == 0
        assert stats["teacher_requests"] - len(server.others) - 1 == 10
        assert Ranked(teacher, 4).stats()["rank_position_bias"] is None


def test_rankings_are_cached_and_need_no_server_then(tmp_path):
    kept = tmp_path / "replies.jsonl"

    def script(joint, n):
        return "hm" if n == 0 and "Mud." in texts(joint)[:1] else longest_first(joint)

    with FaultServer(script) as server:
        with Teacher(server.url, cache=kept) as teacher:
            before, _ = graded(teacher)
        with Teacher(server.url, cache=kept) as teacher:
            after, stats = graded(teacher)
        assert stats["teacher_requests"] == 0 and stats["teacher_cached"] == 5
    with Teacher(server.url, cache=kept) as teacher:  # which is down
        offline, _ = graded(teacher)
    rows = [
        [(g.score, g.reply, g.attempts, g.reply_words) for g in grades]
        for grades in (before, after, offline)
    ]
    assert rows[0] == rows[1] == rows[2] and rows[0][2][2] == 2


def test_a_group_that_was_given_up_is_given_up_without_a_server(tmp_path):
    def script(joint, n):
        return "500" if "Mud." in texts(joint)[:1] else longest_first(joint)

    with (
        FaultServer(script) as server,
        Teacher(server.url, cache=tmp_path / "replies.jsonl") as teacher,
    ):
        before, _ = graded(teacher)
    with Teacher(server.url, cache=tmp_path / "replies.jsonl") as teacher:
        after, _ = graded(teacher)
    assert [(g.score, g.reply_words) for g in before] == [(g.score, g.reply_words) for g in after]
    assert {g.score for g in after} == {None}


@given(st.lists(st.text(alphabet="- story_1\n\u200b", max_size=60), min_size=2, max_size=4))
def test_no_story_can_pretend_to_be_several(stories):
    joint = joined(stories)
    mark = joint.split(" ")[0]
    assert joint.count(mark) == len(stories) and clean(joint) == joint


def test_the_question_names_every_criterion_and_a_constrained_reply_every_story():
    own = Template((Criterion("humour", "Is it funny?", ("no", "a bit", "yes", "very"), 2.0),))
    assert "Humour (weight 2): Is it funny?" in instructions(ranking(own, 3))
    assert "story_1, story_2, story_3" in instructions(ranking(DEFAULT, 3))
    schema = constraint("json", ranking(DEFAULT, 3).names)["response_format"]["json_schema"][
        "schema"
    ]
    assert schema["required"] == ["story_1", "story_2", "story_3"]


def test_a_run_is_ranked_resumed_and_repeated_offline_to_the_same_bits(place, tmp_path, capsys):
    more = [
        "--teacher-mode",
        "rank",
        "--stories-per-opening",
        "3",
        "--init",
        str(place / "p"),
        "--no-lr-decay",
    ]

    def interact(out, *own):
        train_interact.main([*SHORT, *more, "--out", str(tmp_path / out), *own])

    with FaultServer(longest_first) as server:
        teacher = ["--teacher-url", server.url]
        interact("whole", *teacher)
        interact("parts", *teacher, "--steps", "2")
        train_interact.main(["--out", str(tmp_path / "parts"), "--resume", "--steps", "4"])
    assert "forecast: 36 stories" in capsys.readouterr().out
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "whole" / "replies.jsonl", tmp_path / "again")
    interact("again", *teacher)  # the server is down
    for run in ("parts", "again"):
        assert_same_bits(tmp_path / "whole", tmp_path / run)
    steps = metrics(tmp_path / "whole")
    assert [step["rank_position_bias"] for step in steps] == [0] * 4 and {
        step["unscored"] for step in steps
    } == {0}
    assert all(step["score_mean"] == pytest.approx(0.5) for step in steps)
    assert steps[-1]["held_out_score_mean"] == 6  # evaluations are scored, not ranked
    counts = [step["teacher_requests"] + step["teacher_cached"] for step in steps]
    assert counts[1:] == [6 + 4, 6, 6 + 4]  # one request per story, and those of the evaluations
    records = list(read_stories(tmp_path / "whole"))
    assert {record["scores"] for record in records} == {None}
    assert sum(record["score"] for record in records) == pytest.approx(12)  # of 24
