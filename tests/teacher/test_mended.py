"""The requests that are repeated once a teacher works again."""

import pytest
from conftest import read_lines
from fault_server import FaultServer, graded, written

from tinystory.config import InteractConfig
from tinystory.evaluate.open_grader import open_grader
from tinystory.run.errors import Stop, UserError
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import require_scores

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_replies_and_a_probe_without_scores_are_asked_again_once_the_teacher_is_mended(tmp_path):
    replies = tmp_path / "replies.jsonl"
    mended = False

    def script(story, n):
        return (
            "2 1 3" if mended or story in ("Dog 0 ran.", "Dog 1 ran.") else "What a lovely story!"
        )

    def steps(again):
        config = InteractConfig(teacher_url=[server.url])
        with open_grader(config, replies=replies) as grader:
            for i in range(4):
                grader.send(written(i, "Once", f"Dog {i} ran."))
            grades = grader.collect(again)
            return grades, grader

    with FaultServer(script) as server:
        server.first = lambda: script("", 0)
        grades, grader = steps(Stop())
        assert [grade.score is None for grade in grades] == [False, False, True, True]
        assert not grader.facts["teacher"]["scored"]
        with pytest.raises(UserError, match="2 of 4 stories got no score"):
            require_scores(grades, 0.1)
        asked = dict(server.good)
        mended = True
        grades, grader = steps(Stop())
        assert all(grade.score is not None for grade in grades)
        expected = [0, 0, 1, 1]
        assert [server.good[f"Dog {i} ran."] - asked[f"Dog {i} ran."] for i in range(4)] == expected
        sent = len(server.requests)
        again, _ = steps(Stop())  # the new replies count, now and later
        assert [(a.scores, a.reply_words) for a in again] == [
            (g.scores, g.reply_words) for g in grades
        ]
        assert len(server.requests) == sent
    lines = read_lines(replies)
    # the old ones stay in the record
    assert sum(line["reply"] == "What a lovely story!" for line in lines) == 6


def test_a_probe_without_scores_is_made_again_until_there_are_scores(tmp_path):
    replies = tmp_path / "replies.jsonl"
    first = "Nice!"
    with FaultServer() as server:
        server.script, server.first = (lambda story, n: first), (lambda: first)
        for reply in ("Nice!", "2 1 3", "Oh"):
            first = reply
            with Teacher([server.url], cache=replies) as teacher:
                assert teacher.probes[0].scored == (reply != "Nice!") or reply == "Oh"
                # that one is kept
                assert teacher.probes[0].reply == ("2 1 3" if reply == "Oh" else reply)


def test_a_step_that_was_only_killed_is_resumed_from_every_reply(tmp_path):
    """A story without scores among enough that have some stays without: the run had gone on so."""
    script = lambda story, n: "Nice!" if story == "Dog 7 ran." else "2 1 3"  # noqa: E731
    with FaultServer(script) as server:
        for _ in range(2):
            config = InteractConfig(teacher_url=[server.url])
            with open_grader(config, replies=tmp_path / "replies.jsonl") as grader:
                for i in range(20):
                    grader.send(written(i, "Once", f"Dog {i} ran."))
                grades = grader.collect(Stop())
                assert [i for i, grade in enumerate(grades) if grade.score is None] == [7]
        assert server.good["Dog 7 ran."] == 3


def test_what_the_teacher_said_is_told_once():
    refusal = "I am sorry, but I cannot grade this."
    with FaultServer(lambda story, n: refusal) as server, Teacher([server.url]) as teacher:
        grades = graded(teacher, "Once", [f"Dog {i} ran." for i in range(5)])
    with pytest.raises(UserError) as caught:
        require_scores(grades, 0.1)
    assert str(caught.value).count(refusal) == 1
