"""A human's lesson of half an hour: the time that is left, what the student learned, and the
comparisons at the end, after restarts and with a damaged run folder."""

import asyncio
import contextlib
import json
import re
import shutil
from unittest import mock

import pytest
from conftest import read_lines, story_record
from test_grading_queue import GOOD, Clock, asked, grade, no_room

from tinystory.config import InteractConfig
from tinystory.evaluate.intervals import wilson
from tinystory.human import grading_queue
from tinystory.human import lesson as lessons
from tinystory.human.grading_queue import GRACE_S, GradingQueue
from tinystory.human.lesson import Lesson, lesson_folder
from tinystory.human.progress import COMPARED, Pair, read_progress
from tinystory.report.ending import print_interaction
from tinystory.report.findings import read_findings
from tinystory.report.run import write_report
from tinystory.run.folder import locked
from tinystory.run.log import RunLog
from tinystory.run.records import EVALUATIONS, PAIRS, SAMPLES, STORIES
from tinystory.student import checkpoint
from tinystory.teacher.chat_server import Refused
from tinystory.teacher.grade import NOT_ASKED
from tinystory.teacher.grades import Grades
from tinystory.teacher.probe import HUMAN_S

URL = "http://127.0.0.1:8500"
OPTIONS = {
    "steps": 2,
    "grades": 16,
    "stories_per_step": 40,
    "eval_stories": COMPARED + 2,
    "teacher": {"model": "human"},
    "device": "cpu",
}


class Run:
    """A run's folder, as the trainer fills it."""

    def __init__(self, folder):
        self.folder = folder
        with RunLog(folder, resume_step=None) as log:
            log.config(OPTIONS)

    def evaluate(self, step, stories=()):
        stories = stories or [f"story {step} {i}" for i in range(COMPARED + 2)]
        records = []
        for i, story in enumerate(stories):
            records.append(story_record(step, i, opening=f"Opening {i}", story=story, reward=None))
        with RunLog(self.folder, resume_step=None) as log:
            log.append(EVALUATIONS, records)
        return records

    def end_step(self, step, skipped=0, seconds=10.0):
        """Eight stories of a step were sent to the human."""
        records = []
        for i in range(40):
            sent = {"scores": None, "reply": NOT_ASKED.error}
            if i < 8:
                sent = {"scores": GOOD, "reply": "3 2 1"}
            if i < skipped:
                sent = {"scores": None, "reply": "The human skipped this story."}
            records.append(story_record(step, i, **sent))
        with RunLog(self.folder, resume_step=None) as log:
            log.append(STORIES, records)
            log.metrics(
                step=step, reward_mean=0.5, rollout_s=seconds, teacher_s=900.0, update_s=seconds
            )

    def finish(self, before=(), after=()):
        lines = ""
        for when, step, stories in (("before", 0, before), ("after", 2, after)):
            for record in self.evaluate(step, stories):
                lines += json.dumps({"when": when} | record) + "\n"
        (self.folder / SAMPLES).write_text(lines)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "interact")


@pytest.fixture
def finished(run):
    run.evaluate(0)
    run.end_step(1)
    run.end_step(2, skipped=1)
    run.finish()
    return run


@contextlib.contextmanager
def taught(run):
    """Yields a lesson, as teach.py begins one, and the lesson's clock."""
    clock = Clock()
    queue = GradingQueue(run.folder.parent / "grades.jsonl", Grades())
    with (
        mock.patch.object(grading_queue, "time", clock),
        mock.patch.object(lessons, "time", clock),
        contextlib.closing(queue),
    ):
        yield Lesson(queue, run.folder, ["--grades", "16"]), clock


def prefer(lesson, side):
    """Answer the pair on the page; returns the pair."""
    pair = lesson.state(URL)["pair"]
    lesson.do("ada", "prefer", {"key": pair["key"], "side": side})
    return pair


def side_of(pair, step):
    return "left" if pair["left"].startswith(f"story {step}") else "right"


def test_the_trainer_says_where_pairs_wait_for_the_person(finished, place, capsys):
    shutil.copytree(checkpoint.newest(place / "p"), finished.folder / "checkpoints" / "best")
    print_interaction(InteractConfig(out=str(finished.folder), teacher_url=[f"{URL}/v1"]))
    text = capsys.readouterr().out
    assert f"\nnext:   compare {COMPARED} pairs of stories at {URL}\nthen:   " in text
    assert "Opening 17" in text and not any(f"Opening {i} " in text for i in range(COMPARED))


def test_answers_left_and_minutes_follow_each_answer_and_each_step(run):
    async def scene():
        with taught(run) as (lesson, clock), locked(run.folder):
            state = lesson.state(URL)
            assert state["answers_left"] == 16 + COMPARED
            assert state["minutes"] == -(-32 * HUMAN_S // 60)
            tasks = await asked(lesson.queue, *"abcdefgh")
            for left in range(8, 0, -1):
                assert lesson.state(URL)["answers_left"] == 8 + left + COMPARED
                item = lesson.state(URL)["item"]
                lesson.do("ada", "grade", {**item, "scores": GOOD})
            clock.now += GRACE_S
            await lesson.tick()
            await asyncio.gather(*tasks)
            assert lesson.state(URL)["answers_left"] == 8 + COMPARED
            run.end_step(1, skipped=2)
            state = lesson.state(URL)
            # a skipped story is not asked about again
            assert state["answers_left"] == 8 + COMPARED
            # 24 answers, and 20 seconds of the machine's
            assert state["minutes"] == -(-(24 * HUMAN_S + 20) // 60)

    asyncio.run(scene())


def test_the_page_says_what_the_machine_does_while_no_story_waits(run):
    async def scene():
        with taught(run) as (lesson, clock):
            state = lesson.state(URL)
            assert "stopped after step 0" in state["now"]
            assert state["command"] == lesson.command(URL)
            with locked(run.folder):
                assert lesson.state(URL)["command"] == ""
                clock.now += 12
                now = lesson.state(URL)["now"]
                assert now == "The student is writing 40 stories: step 1 of 2, 15 seconds so far."
                tasks = await asked(lesson.queue, "a")
                assert lesson.state(URL)["now"] == ""
                grade(lesson.queue, "ada")
                clock.now += GRACE_S
                await lesson.tick()
                await asyncio.gather(*tasks)
                assert "learning from your grades: step 1 of 2" in lesson.state(URL)["now"]
                run.end_step(1)
                clock.now += 7
                now = lesson.state(URL)["now"]
                assert (
                    now == "The student is writing 40 stories: step 2 of 2, about 15 seconds left."
                )
                clock.now += 60
                assert lesson.state(URL)["now"].endswith("step 2 of 2, almost done.")
                run.end_step(2)
                assert "that you will compare" in lesson.state(URL)["now"]

    asyncio.run(scene())


def test_it_shows_what_was_learned_by_stories_that_are_not_compared_later(run):
    with taught(run) as (lesson, _):
        run.evaluate(0)
        assert lesson.state(URL)["learned"] is None
        for step in (1, 2):
            run.evaluate(step)
            index = COMPARED + step - 1
            assert lesson.state(URL)["learned"] == {
                "opening": f"Opening {index}",
                "before": f"story 0 {index}",
                "after": f"story {step} {index}",
                "step": step,
            }


def test_pairs_are_asked_unnamed_in_either_order_when_the_run_is_over(finished):
    with taught(finished) as (lesson, _):
        with locked(finished.folder):
            assert lesson.state(URL)["pair"] is None  # the trainer of the lesson has not ended yet
        sides = []
        for place in range(1, COMPARED + 1):
            state = lesson.state(URL)
            assert state["answers_left"] == COMPARED - place + 1
            assert state["pair"]["place"] == place
            assert not re.search("before|after", json.dumps(state["pair"]))
            sides.append(side_of(state["pair"], 2))
            prefer(lesson, "neither")
        assert set(sides) == {"left", "right"}
        assert lesson.state(URL)["pair"] is None
    records = read_lines(finished.folder / PAIRS)
    assert [record["index"] for record in records] == list(range(COMPARED))
    assert {record["by"] for record in records} == {"ada"}


def test_which_story_is_before_does_not_decide_the_order():
    pairs = [Pair(i, "Once", f"a {i}", f"b {i}") for i in range(200)]
    swapped = [Pair(pair.index, "Once", pair.after, pair.before) for pair in pairs]
    before_left = sum(pair.names["left"] == "before" for pair in pairs)
    assert 60 < before_left < 140
    same_story_left = 0
    for pair, other in zip(pairs, swapped, strict=True):
        same_story_left += pair.names["left"] != other.names["left"]
    assert 60 < same_story_left < 140


def test_the_side_that_is_preferred_is_kept_as_before_or_after(finished):
    with taught(finished) as (lesson, _):
        for step in (2, 0, 2):
            prefer(lesson, side_of(lesson.state(URL)["pair"], step))
    preferred = [record["preferred"] for record in read_lines(finished.folder / PAIRS)]
    assert preferred == ["after", "before", "after"]


def test_a_restart_in_the_middle_keeps_answers_and_asks_no_pair_twice(finished):
    keys = []
    for _ in range(2):
        with taught(finished) as (lesson, _):
            for _ in range(COMPARED // 2):
                keys.append(prefer(lesson, "left")["key"])
        with open(finished.folder / PAIRS, "ab") as file:
            file.write(b'{"key": "half a li')  # the process was killed while it wrote
    with taught(finished) as (lesson, _):
        assert lesson.state(URL)["pair"] is None
    assert len(set(keys)) == COMPARED


def test_the_answer_to_a_pair_can_be_taken_back_until_the_result_is_reported(finished):
    with taught(finished) as (lesson, clock):
        assert not lesson.state(URL)["back"]
        with pytest.raises(Refused, match="nothing to go back to"):
            lesson.do("ada", "back", {})
        first = prefer(lesson, "left")
        second = lesson.state(URL)["pair"]
        assert lesson.state(URL)["back"]
        lesson.do("ada", "back", {})
        assert lesson.state(URL)["pair"] == first and not lesson.state(URL)["back"]
        prefer(lesson, "right")
        assert lesson.state(URL)["pair"] == second
        for _ in range(COMPARED - 1):
            last = prefer(lesson, "neither")
        asyncio.run(lesson.tick())
        lesson.do("ada", "back", {})  # within GRACE_S, the last answer too
        assert prefer(lesson, "left") == last
        clock.now += GRACE_S
        asyncio.run(lesson.tick())
        assert lesson.state(URL)["report"] and not lesson.state(URL)["back"]
    sides = {record["key"]: record["preferred"] for record in read_lines(finished.folder / PAIRS)}
    names = {pair.key: pair.names for pair in read_progress(finished.folder).pairs}
    assert sides[first["key"]] == names[first["key"]]["right"]
    assert sides[last["key"]] == names[last["key"]]["left"]
    (finding,) = read_findings(finished.folder)
    assert "neither in 14" in finding["sentences"][0]


def answer_all(lesson, after, before):
    for number in range(COMPARED):
        side = "neither"
        if number < after + before:
            side = side_of(lesson.state(URL)["pair"], 2 if number < after else 0)
        prefer(lesson, side)


def test_the_report_says_who_taught_and_what_the_comparisons_say(finished):
    write_report(finished.folder)
    with taught(finished) as (lesson, clock):
        answer_all(lesson, after=11, before=3)
        result = lesson.state(URL)["result"]
        assert lesson.state(URL)["report"] == ""
        clock.now += GRACE_S
        asyncio.run(lesson.tick())
        assert lesson.state(URL)["report"] == str(finished.folder / "report.html")
    low, high = wilson(12, COMPARED)
    assert result.startswith("A person gave 15 grades. The person compared 16 pairs ")
    assert "preferred in 11, the story before in 3, and neither in 2" in result
    assert f"interval {low:.2f} to {high:.2f} (Wilson)" in result
    (finding,) = read_findings(finished.folder)
    assert finding["sentences"] == [result] and finding["step"] == 2
    assert result in (finished.folder / "report.html").read_text()


def test_equal_and_empty_pairs_are_left_out_and_said(run):
    before = [f"story 0 {i}" for i in range(COMPARED)]
    after = [" ", before[1], *(f"story 2 {i}" for i in range(2, COMPARED))]
    run.evaluate(0, before)
    run.finish(before, after)
    with taught(run) as (lesson, _):
        for _ in range(COMPARED - 2):
            assert lesson.state(URL)["pair"]["left_out"] == 2
            prefer(lesson, "left")
        assert "2 pairs of equal or empty stories were left out" in lesson.state(URL)["result"]


def test_a_run_without_pairs_is_reported_as_well(run):
    stories = ["the same"] * COMPARED
    run.evaluate(0, stories)
    run.finish(stories, stories)
    with taught(run) as (lesson, _):
        asyncio.run(lesson.tick())
        assert "16 pairs of equal" in lesson.state(URL)["result"]
    assert len(read_findings(run.folder)) == 1


def test_a_lesson_goes_on_in_its_folder_until_all_pairs_are_compared(tmp_path, run):
    folder = run.folder
    assert lesson_folder(tmp_path / "free") == tmp_path / "free"
    assert lesson_folder(folder) == folder
    with taught(run) as (lesson, _):
        assert "--resume" in lesson.command(URL) and "--grades" not in lesson.command(URL)
    run.evaluate(0)
    run.finish()
    assert lesson_folder(folder) == folder
    with taught(run) as (lesson, _):
        assert lesson.is_over()
        answer_all(lesson, after=1, before=1)
    assert lesson_folder(folder) == folder  # killed before it was reported
    with taught(run) as (lesson, _):
        asyncio.run(lesson.tick())
    assert lesson_folder(folder) == tmp_path / "interact-2"


def test_an_idle_lesson_reads_no_file_again(finished, monkeypatch):
    with taught(finished) as (lesson, _):
        monkeypatch.setattr(lessons, "read_progress", lambda folder: pytest.fail("it was read"))
        for _ in range(20):
            asyncio.run(lesson.tick())
            assert lesson.state(URL)["pair"]


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "stories.jsonl", "evaluations.jsonl", "samples.jsonl"]
)
def test_a_damaged_run_is_said_and_grading_goes_on(finished, name):
    async def scene():
        with taught(finished) as (lesson, clock):
            (finished.folder / name).write_text('{"step": -1}\n')
            assert name in lesson.state(URL)["now"]
            (task,) = await asked(lesson.queue, "a")
            grade(lesson.queue, "ada")
            clock.now += GRACE_S
            await lesson.tick()
            assert await task == GOOD

    asyncio.run(scene())


@pytest.mark.parametrize(
    "request_", [{}, {"key": ["x"]}, {"key": "none", "side": "left"}, {"side": "before"}]
)
def test_what_is_no_answer_is_not_kept(finished, request_):
    with taught(finished) as (lesson, _):
        key = lesson.state(URL)["pair"]["key"]
        with pytest.raises(Refused):
            lesson.do("ada", "prefer", {"key": key} | request_)
    assert not (finished.folder / PAIRS).exists()


def test_an_answer_that_cannot_be_kept_is_said_and_can_be_given_again(finished):
    with taught(finished) as (lesson, _):
        with (
            no_room(),
            pytest.raises(Refused, match=r"not saved yet: cannot write .*give the answer again"),
        ):
            prefer(lesson, "left")
        assert prefer(lesson, "right")["place"] == 1
    assert len(read_lines(finished.folder / PAIRS)) == 1


def test_a_stranger_s_stories_reach_the_page_without_what_cannot_be_seen(run):
    run.evaluate(0, ["a\x1b[31m\u202e b"] * COMPARED)
    run.finish(["a\x1b[31m\u202e b"] * COMPARED, ["x" * 10**6] * COMPARED)
    pair = read_progress(run.folder).pairs[0]
    assert pair.before == "a[31m b" and len(pair.after) < 10**4
