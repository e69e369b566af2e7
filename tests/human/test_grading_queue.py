"""The queue: every story is asked about once, every grade is kept, and no grade is submitted while
it can be changed."""

import asyncio
import contextlib
import json
import resource
from unittest import mock

import pytest
from conftest import read_lines

from tinystory.human import grading_queue
from tinystory.human.grading_queue import GradingQueue
from tinystory.run.errors import UserError
from tinystory.teacher.chat_server import Refused
from tinystory.teacher.grades import Grades
from tinystory.teacher.prompt import Criterion

GOOD = {"readability": 3, "coherence": 2, "creativity": 1}
POOR = {"readability": 0, "coherence": 0, "creativity": 1}


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


def run(scene, tmp_path, **options):
    """Run a scene at a queue, with a clock that only the scene moves."""

    async def play():
        clock = Clock()
        with mock.patch.object(grading_queue, "time", clock):
            queue = GradingQueue(tmp_path / "grades.jsonl", Grades(), **options)
            try:
                await scene(queue, clock)
            finally:
                queue.close()

    asyncio.run(play())


async def asked(queue, *stories):
    """Trainers' requests for these stories, begun."""
    tasks = [asyncio.ensure_future(queue.ask("Once", story)) for story in stories]
    await asyncio.sleep(0)
    return tasks


async def later(queue, clock, seconds=grading_queue.GRACE_S):
    clock.now += seconds
    queue.tick()
    await asyncio.sleep(0)


def grade(queue, who, scores=GOOD, **more):
    """Grade the story that this person sees; returns the story."""
    item = queue.state()["item"]
    queue.do(who, "grade", {**item, "scores": scores, **more})
    return item["story"]


def lines(tmp_path):
    return read_lines(tmp_path / "grades.jsonl")


def test_stories_come_in_order_and_are_handed_in_together(tmp_path):
    async def scene(queue, clock):
        tasks = await asked(queue, "a", "b")
        state = queue.state()
        assert state["left"] == 2 and [each["name"] for each in state["criteria"]] == list(GOOD)
        assert grade(queue, "ada") == "a"
        assert lines(tmp_path)[0]["scores"] == GOOD  # kept at once
        await later(queue, clock)
        assert not tasks[0].done() and queue.state()["left"] == 1
        assert grade(queue, "ada", POOR) == "b"
        assert queue.state()["handing_in"] and queue.state()["item"] is None
        await later(queue, clock, grading_queue.GRACE_S / 2)
        assert not tasks[0].done()
        await later(queue, clock)
        assert [task.result() for task in tasks] == [GOOD, POOR]

    run(scene, tmp_path)


def test_what_was_graded_is_never_asked_again_not_even_after_a_kill(tmp_path):
    async def before(queue, clock):
        tasks = await asked(queue, "a", "b", "c")
        grade(queue, "ada")
        queue.do("ada", "skip", queue.state()["item"])
        for task in tasks:
            task.cancel()

    run(before, tmp_path)
    with open(tmp_path / "grades.jsonl", "ab") as file:
        file.write(b'{"key": "half a li')  # the process was killed while it wrote

    async def after(queue, clock):
        assert (await queue.ask("Once", "a"), await queue.ask("Once", "b")) == (GOOD, None)
        (task,) = await asked(queue, "c")
        assert grade(queue, "ada", POOR) == "c" and queue.state()["done"] == 3
        await later(queue, clock)
        assert task.result() == POOR

    run(after, tmp_path)
    assert [record["story"] for record in lines(tmp_path)] == ["a", "b", "c"]


def test_the_way_back_leads_to_the_story_before_until_all_are_handed_in(tmp_path):
    async def scene(queue, clock):
        tasks = await asked(queue, "a", "b", "c")
        grade(queue, "ada"), grade(queue, "ada")
        queue.do("ada", "back", {})
        item = queue.state()["item"]
        assert item["story"] == "b" and item["scores"] == GOOD and item["again"]
        queue.do("ada", "back", {})
        assert grade(queue, "ada", POOR) == "a" and grade(queue, "ada") == "c"
        await later(queue, clock)
        assert [task.result() for task in tasks] == [POOR, GOOD, GOOD]
        with pytest.raises(Refused, match="nothing to go back to"):
            queue.do("ada", "back", {})

    run(scene, tmp_path)


def test_a_story_that_was_taken_back_holds_the_others_until_it_is_graded_or_left(tmp_path):
    async def scene(queue, clock):
        (task,) = await asked(queue, "a")
        grade(queue, "ada")
        queue.do("ada", "back", {})
        assert queue.state()["left"] == 1 and not queue.state()["handing_in"]
        await later(queue, clock)
        assert not task.done()
        queue.do("ada", "pause", {})
        await later(queue, clock)
        assert task.result() == GOOD

    run(scene, tmp_path)


def test_two_pages_show_the_same_story_and_the_later_grade_counts(tmp_path):
    async def scene(queue, clock):
        tasks = await asked(queue, "a", "b")
        item = queue.state()["item"]
        assert queue.state()["item"] == item and item["story"] == "a"
        queue.do("ada", "grade", {**item, "scores": GOOD})
        queue.do("ben", "grade", {**item, "scores": POOR})
        assert grade(queue, "ben") == "b" and queue.state()["item"] is None
        await later(queue, clock)
        assert [task.result() for task in tasks] == [POOR, GOOD]
        assert await queue.ask("Once", "a") == POOR  # and gets what it got before

    run(scene, tmp_path)
    assert [record["by"] for record in lines(tmp_path)] == ["ada", "ben", "ben"]


def test_a_trainer_that_hangs_up_takes_its_story_along_and_no_grade_is_lost(tmp_path):
    async def scene(queue, clock):
        (task,) = await asked(queue, "a")
        queue.state()
        task.cancel()
        await asyncio.sleep(0)
        assert queue.state()["item"] is None and queue.state()["left"] == 0
        (task,) = await asked(queue, "a")
        grade(queue, "ada")
        await later(queue, clock)
        assert task.result() == GOOD
        (task,) = await asked(queue, "b")
        item = queue.state()["item"]
        task.cancel()
        await asyncio.sleep(0)
        queue.do("ada", "grade", {**item, "scores": GOOD})  # by a page that has not noticed
        assert await queue.ask("Once", "b") == GOOD
        with pytest.raises(Refused, match="load the page again"):
            queue.do("ada", "grade", {**item, "story": "another", "scores": GOOD})

    run(scene, tmp_path)


@pytest.mark.parametrize(
    "scores",
    [
        None,
        {},
        {**GOOD, "humour": 1},
        {**GOOD, "coherence": 4},
        {**GOOD, "coherence": True},
        [3, 2, 1],
    ],
)
def test_what_is_no_grade_is_not_kept(tmp_path, scores):
    async def scene(queue, clock):
        await asked(queue, "a")
        with pytest.raises(Refused):
            grade(queue, "ada", scores)
        with pytest.raises(Refused):
            queue.do("ada", "burn", {})
        with pytest.raises(Refused, match="nothing to go back to"):
            queue.do("ada", "back", {})

    run(scene, tmp_path)
    assert lines(tmp_path) == []


@pytest.mark.parametrize("more", [{"opening": ["Once"]}, {"story": 3}])
def test_what_the_next_start_would_refuse_is_not_kept(tmp_path, more):
    async def scene(queue, clock):
        await asked(queue, "a")
        item = {**queue.state()["item"], "scores": GOOD, **more}
        with pytest.raises(Refused):
            queue.do(
                "ada", "grade", item | {"key": queue.key(str(item["opening"]), str(item["story"]))}
            )

    run(scene, tmp_path)
    assert lines(tmp_path) == []


def test_other_criteria_make_another_question(tmp_path):
    humour = Grades((Criterion("humour", "Is it funny?", ("no", "a bit", "yes", "very")),))
    queue = GradingQueue(tmp_path / "grades.jsonl", humour)
    other = GradingQueue(tmp_path / "others.jsonl", Grades())
    assert (
        queue.key("Once", "a")
        != other.key("Once", "a")
        == GradingQueue(tmp_path / "x.jsonl", Grades()).key("Once", "a")
    )


@pytest.mark.parametrize("text", ["buy milk", '{"step": 1}', '{"key": "a"}\nbuy milk', "x" * 99])
def test_a_file_of_something_else_is_refused_as_it_is(tmp_path, text):
    """Also a file with one incomplete line, as a killed process leaves it."""
    notes = tmp_path / "notes.txt"
    notes.write_text(text)
    with pytest.raises(UserError, match=r"notes\.txt .*choose another"):
        GradingQueue(notes, Grades())
    assert notes.read_text() == text


def test_a_grade_without_one_of_the_criteria_is_named_before_a_trainer_asks_for_it(tmp_path):
    path = tmp_path / "grades.jsonl"
    with contextlib.closing(GradingQueue(tmp_path / "other.jsonl", Grades())) as queue:
        key = queue.key("Once", "a")
    line = {"key": key, "by": "me", "opening": "Once", "story": "a", "scores": {"coherence": 1}}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(
        UserError, match=r"line 1 of .*grades\.jsonl .*criteria of its scores are not readability"
    ):
        GradingQueue(path, Grades())
    path.write_text(json.dumps(line | {"key": "of other criteria"}) + "\n")
    GradingQueue(path, Grades()).close()


@pytest.mark.parametrize("torn", ["", "{", '{"key": "0f', "\0" * 9])
def test_what_a_kill_or_a_power_cut_leaves_is_a_file_of_grades(tmp_path, torn):
    (tmp_path / "grades.jsonl").write_text(torn)
    with contextlib.closing(GradingQueue(tmp_path / "grades.jsonl", Grades())) as queue:
        assert queue.state()["done"] == 0


@contextlib.contextmanager
def no_room():
    """A full disk: files may not grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_grade_that_cannot_be_kept_is_said_and_can_be_given_again(tmp_path):
    async def scene(queue, clock):
        (task,) = await asked(queue, "a")
        with (
            no_room(),
            pytest.raises(Refused, match=r"not saved yet: cannot write .*give the answer again"),
        ):
            grade(queue, "ada")
        await later(queue, clock)
        assert not task.done() and lines(tmp_path) == []
        assert grade(queue, "ada", POOR) == "a"
        await later(queue, clock)
        assert task.result() == POOR

    run(scene, tmp_path)
    assert [record["scores"] for record in lines(tmp_path)] == [POOR]
