"""Runs with a faulty teacher: nothing is lost or paid for twice, and the recorded replies suffice
to repeat a run."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import LIMIT_S, ROOT, SHORT, assert_same_bits, cli, fails, metrics
from fault_server import KEY, FaultServer, counted, error

import train_interact as interact
from tests.train.runs import interrupted_at
from tinystory.run.records import read_stories
from tinystory.student import checkpoint
from tinystory.teacher import pool
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Submission
from tinystory.teacher.named_protocols import NAME
from tinystory.teacher.probe import FIRST_STORY
from tinystory.teacher.prompt import CRITERIA

pytestmark = pytest.mark.usefixtures("short_pauses")


class Arrivals(dict):
    """Numbers stories in the order of their first requests. The number decides what happens to a
    story, whatever the words are, and the same words always have the same number."""

    def __missing__(self, story: str) -> int:
        self[story] = len(self)
        return self[story]


def honest(story: str) -> str:
    digest = hashlib.sha256(story.encode()).digest()
    return f"{digest[0] % 4} {digest[1] % 4} {digest[2] % 4}"


@pytest.fixture(scope="module")
def init(tokenizer, tmp_path_factory) -> str:
    """A checkpoint of an untrained student."""
    import torch

    from tinystory.student.model import Student, StudentConfig

    torch.manual_seed(0)
    student = Student(
        StudentConfig(n_layer=2, n_head=2, n_embd=64, context=64, vocab_size=tokenizer.vocab_size)
    )
    folder = tmp_path_factory.mktemp("init") / "start"
    checkpoint.save(
        folder, student, tokenizer, history={"corpus": ["builtin"]}, state={}, counters={"step": 0}
    )
    return str(folder)


def arguments(init: str, out: Path, url: str = "") -> list[str]:
    teacher = ["--teacher-url", url, "--teacher-concurrency", "3"] if url else []
    return ["--init", init, "--out", str(out), *teacher, *SHORT]


def resumed(out: Path, url: str) -> list[str]:
    return ["--resume", "--out", str(out), "--teacher-url", url]


@pytest.fixture(scope="module")
def unbroken(init, tmp_path_factory) -> Path:
    """A run of four steps with a teacher that answers every request."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    with FaultServer(lambda story, n: honest(story)) as server:
        interact.main(arguments(init, out, server.url))
    return out


def test_a_run_stopped_within_a_step_pays_for_no_reply_twice_and_ends_the_same(
    init, unbroken, tmp_path
):
    """It is stopped by Ctrl-C in the second of four steps of six stories, then by kill -9 in the
    third. The student is evaluated, by four stories, before the first step and after the second."""
    stopped = tmp_path / "stopped"
    answered = alive = 0

    def script(story, n):
        nonlocal answered
        if answered == alive:
            return "hang"
        answered += 1
        return honest(story)

    def stop_at(replies: int, how: signal.Signals, *argv: str) -> tuple[int, str]:
        """Signal a run once so many replies are cached and three are in flight. Returns the run's
        exit code and output."""
        nonlocal alive
        alive = replies
        command = [sys.executable, str(ROOT / "train_interact.py"), *argv]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        until = threading.Timer(LIMIT_S, process.kill)  # so that the wait for its output ends
        until.start()
        kept = stopped / "replies.jsonl"
        # The probe's record is also a line of the file.
        while not (
            kept.exists()
            and kept.read_text().count('"reply"') - 1 == alive
            and server.in_flight == 3
        ):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        until.cancel()
        process.send_signal(how)
        output = process.communicate()[0]
        while server.in_flight:  # the server sees every connection closed
            time.sleep(0.01)
        return process.returncode, output

    with FaultServer(script) as server:
        code, output = stop_at(4 + 8, signal.SIGINT, *arguments(init, stopped, server.url))
        assert code == -signal.SIGINT
        assert "stopped after step 1, everything is saved" in output
        assert checkpoint.newest(stopped).name == "step_0000001"
        code, output = stop_at(4 + 12 + 4 + 2, signal.SIGKILL, *resumed(stopped, server.url))
        assert code == -signal.SIGKILL and len(metrics(stopped)) == 2
        alive = -1
        interact.main(resumed(stopped, server.url))
        paid = {story: times for story, times in server.good.items() if story}
        assert set(paid.values()) == {1} and len(paid) >= 4 * 6
    assert_same_bits(unbroken, stopped)
    for name in ("stories.jsonl", "evaluations.jsonl", "samples.jsonl"):
        assert (unbroken / name).read_text() == (stopped / name).read_text()


def test_a_run_whose_teacher_gave_no_scores_goes_on_once_it_is_mended(init, tmp_path, capsys):
    """The teacher first answers in sentences; later, half of the stories of the failed step get
    scores."""
    out, mended = tmp_path / "out", False
    arrivals = Arrivals()

    def script(story, n):
        is_scored = arrivals[story] % 2 == 1
        return honest(story) if mended or is_scored else "I loved it!"

    with FaultServer(script) as server:
        server.first = lambda: "2 1 3" if mended else "Lovely."
        for _ in range(2):
            argv = resumed(out, server.url) if out.exists() else arguments(init, out, server.url)
            line = fails(interact.main, argv, capsys)
            assert "stories got no score" in line and line.count("I loved it!") <= 1
        mended, arrived = True, dict(arrivals)
        interact.main(resumed(out, server.url))
        scored_before = [story for story, number in arrived.items() if number % 2 == 1]
        # paid for once
        assert scored_before and all(server.good[story] == 1 for story in scored_before)
    assert len(metrics(out)) == 4 and all(record["unscored"] == 0 for record in metrics(out))
    assert "I loved it!" in (out / "replies.jsonl").read_text()


@pytest.mark.parametrize("counts", [True, False])
def test_a_resumed_run_ends_its_budget_at_the_step_of_an_unbroken_one(init, tmp_path, counts):
    """Whether the server counts tokens or not: then a request costs what it could at most."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--steps", "12", "--price-in", "1", "--budget-cost", "0.2", "--eval-every", "0"]
    with FaultServer(lambda s, n: counted(honest(s), 2000) if counts else honest(s)) as server:
        interact.main([*arguments(init, whole, server.url), *flags])
        steps = len(metrics(whole))
        assert 2 < steps < 12
        server.seen.clear()  # the probe of this run is answered as that of the uninterrupted run
        with interrupted_at(interact, step=steps // 2):
            interact.main([*arguments(init, parts, server.url), *flags])
        assert len(metrics(parts)) == steps // 2
        interact.main(resumed(parts, server.url))
        assert len(metrics(parts)) == steps
        assert metrics(parts)[-1]["teacher_cost"] == metrics(whole)[-1]["teacher_cost"]
    assert_same_bits(whole, parts)


def test_a_teacher_that_refuses_during_an_evaluation_costs_no_step(
    init, unbroken, tmp_path, capsys
):
    """The teacher's quota ends with the second step, before the evaluation that follows. The
    resumed run then ends like a run that was never stopped: with the same weights, and with no
    reply paid for twice."""
    stopped = tmp_path / "stopped"
    with FaultServer() as server:
        left = 4 + 6 + 6

        def until_empty(story, n):
            nonlocal left
            left -= 1
            return honest(story) if left >= 0 else error(402, "no quota")

        server.script = until_empty
        line = fails(interact.main, arguments(init, stopped, server.url), capsys)
        assert "no quota" in line
        assert len(metrics(stopped)) == 2
        assert checkpoint.newest(stopped).name == "step_0000002"
        left = 10**6
        interact.main(resumed(stopped, server.url))
        assert max(times for story, times in server.good.items() if story) == 1
    assert_same_bits(unbroken, stopped)
    assert metrics(unbroken)[-1]["words_in"] == metrics(stopped)[-1]["words_in"]


def test_a_run_that_predicts_scores_ends_the_same_when_its_teacher_fails_within_a_step(
    init, tmp_path, capsys
):
    """Half of the grades are spent in the first step. Some stories never get a score, and some
    replies come late; then the quota ends."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = ["--stories-per-step", "20", "--grades", "40", "--max-unscored", "0.6"]
    left = 10**6
    arrivals = Arrivals()

    def script(story, n):
        nonlocal left
        left -= 1
        if left < 0:
            return error(402, "no quota")
        return graded_now_and_then(story, arrivals[story], n)

    with FaultServer(script) as server:
        interact.main([*arguments(init, whole, server.url), *flags])
        answered = set(server.good) - {"", FIRST_STORY[1]}  # without what the probe asks
        assert len(answered) <= 4 * 10 + 3 * 4  # what is not sent costs nothing
        printed = capsys.readouterr().out
        assert "forecast: 52 stories" in printed and "with --grades" not in printed
    with FaultServer(script) as server:
        left = 40
        assert "no quota" in fails(
            interact.main, [*arguments(init, stopped, server.url), *flags], capsys
        )
        assert len(metrics(stopped)) in (1, 2)
        left = 10**6
        interact.main(resumed(stopped, server.url))
        assert_same_bits(whole, stopped)
    assert (whole / "stories.jsonl").read_text() == (stopped / "stories.jsonl").read_text()
    steps, stories = metrics(whole), list(read_stories(whole))
    unscored = [story for story in stories if "What a tale" in story["reply"]]
    others = [story for story in stories if "was not asked" in story["reply"]]
    assert unscored
    assert all(
        story["predicted"] is story["scores"] is story["reward"] is None for story in unscored
    )
    assert len(others) == 4 * 10 and all(story["scores"] is None for story in others)
    assert all((story["reward"] is None) == (story["predicted"] is None) for story in others)
    assert sum(record["predicted"] for record in steps) == sum(
        story["predicted"] is not None for story in stories
    )
    assert [record["scored"] + record["unscored"] for record in steps] == [20, 7, 7, 6]
    assert steps[0]["score_r_squared"] is not None and steps[0]["score_error"] is not None


def graded_now_and_then(story: str, number: int, n: int) -> str:
    """A teacher that first replies to a third of the stories without scores, and to some of them
    always."""
    mood = number % 9
    return "What a tale" if mood == 0 or (mood < 3 and n == 0) else honest(story)


def test_a_run_is_repeated_from_its_replies_without_a_server(init, tmp_path, capsys, monkeypatch):
    """Also the stories that were given up: some after replies without scores, some after errors."""

    arrivals = Arrivals()

    def script(story, n):
        number = arrivals[story]
        if number % 9 == 3:
            return "500"
        return graded_now_and_then(story, number, n)

    run, again = tmp_path / "run", tmp_path / "again"
    with FaultServer(script) as server:
        argv = [*arguments(init, run, server.url), "--max-unscored", "0.9"]
        interact.main(argv)
    again.mkdir()
    shutil.copy(run / "replies.jsonl", again)
    capsys.readouterr()
    argv += ["--teacher-model", "first"]
    interact.main([*argv, "--out", str(again)])
    assert "cannot be reached" in capsys.readouterr().out  # said, since other options would need it
    assert_same_bits(run, again)
    assert (run / "stories.jsonl").read_text() == (again / "stories.jsonl").read_text()
    for a, b in zip(metrics(run), metrics(again), strict=True):
        for name in ("reward_mean", "score_mean", "kl", "words_in", "words_out", "unscored"):
            assert a[name] == b[name], name
    assert sum(record["teacher_requests"] for record in metrics(again)) == 0
    assert any("HTTP 500" in story["reply"] for story in read_stories(run))
    # Another seed gives other stories, for which there are no replies: an error, not a guess.
    (tmp_path / "other").mkdir()
    shutil.copy(run / "replies.jsonl", tmp_path / "other")
    line = fails(interact.main, [*argv, "--out", str(tmp_path / "other"), "--seed", "1"], capsys)
    assert "cannot be reached" in line and server.url in line


def test_a_story_that_was_given_up_stays_so_until_the_teacher_is_mended(tmp_path):
    """Also a story with the same words: without a server as with one."""
    script = lambda story, n: "500" if n < pool.FAILURES else "1 1 1"  # noqa: E731
    submissions = [Submission("Once", "A cat ran.", number) for number in (1, 2)]
    with FaultServer(script) as server:
        for _ in range(2):
            with Teacher([server.url], cache=tmp_path / "replies.jsonl") as teacher:
                grades = [teacher.grades([submission])[0] for submission in submissions]
            assert [grade.scores for grade in grades] == [None, None]
            assert server.seen["A cat ran."] == pool.FAILURES
        with Teacher([server.url], cache=tmp_path / "replies.jsonl", max_unscored=0.5) as teacher:
            # asked again, since too few have a score
            assert teacher.grades(submissions[:1])[0].scores is not None
        assert server.seen["A cat ran."] == pool.FAILURES + 1
    with Teacher(
        [server.url], ["first"], cache=tmp_path / "replies.jsonl"
    ) as teacher:  # so it stays
        assert [grade.scores is None for grade in teacher.grades(submissions)] == [False, False]


def test_a_run_with_custom_criteria_stays_within_its_budget_and_leaks_no_key(
    init, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    levels = ["no", "a bit", "yes", "very"]
    criteria = [
        {"name": name, "question": "Is it?", "levels": levels} for name in ("humour", "suspense")
    ]
    criteria[0]["weight"] = 3
    (tmp_path / "prompt.json").write_text(json.dumps({"criteria": criteria}))

    arrivals = Arrivals()

    def script(story, n):  # it echoes the key wherever it can
        if n == 0 and arrivals[story] % 3 == 0:
            return error(500, f"your key {KEY} is fine")
        return counted("3 1", 400, 5)

    out = tmp_path / "run"
    flags = cli("--teacher-prompt {} --price-in 10 --budget-cost 0.7", tmp_path / "prompt.json")
    flags += ["--diversity", "0", "--unfinished", "1", "--steps", "16"]
    with FaultServer(script) as server:
        server.first = lambda: counted("2 2", 400, 5)
        interact.main([*arguments(init, out, server.url), *flags])
        rubric = server.requests[-1]["messages"][0]["content"]
    assert "humour, suspense" in rubric and "readability" not in rubric
    records = metrics(out)
    assert 0 < len(records) < 16, "the budget holds some of the steps"
    means = {
        key.removesuffix("_mean") for record in records for key in record if key.endswith("_mean")
    }
    # no criterion can replace them
    assert not any(map(NAME.fullmatch, means - {*CRITERIA, "humour", "suspense"}))
    for record in records:
        assert record["humour_mean"] == 3
        assert record["suspense_mean"] == 1
        assert record["readability_mean"] is None
        # with weights 3 and 1 five of six, where the unweighted sum is four
        assert record["score_mean"] == pytest.approx(5)
        assert record.get("held_out_score_mean", 5) == pytest.approx(5)
        assert record["teacher_tokens_in"] >= 6 * 400 and record["teacher_cost"] <= 0.7
    story = json.loads((out / "stories.jsonl").read_text().splitlines()[0])
    length = 0.4 * min(story["words"] / 90, 1)
    assert story["reward"] == pytest.approx(((3 * 3 + 1) / 12 + length) / 1.4)
    output = capsys.readouterr()
    assert "forecast: 132 stories" in output.out
    assert "with --grades 64 --steps 8 --eval-every 0: 72 stories" in output.out
    assert "--budget-cost 0.7 does not suffice for another step" in output.out + output.err
    assert json.loads((out / "config.json").read_text())["options"]["teacher"]["scored"] is True
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert KEY not in output.out + output.err
    assert not any(KEY.encode() in content for content in written)
