"""The scale of answers to yes-or-no questions: a run that is killed at any instant, and resumed
without a calibration, ends with the same bits."""

import hashlib
import math
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SHORT, assert_same_bits, cli, read_lines
from fault_server import FaultServer

import train_interact as interact
from tests.teacher.test_answers import with_logprobs
from tinystory.evaluate.calibration import known_texts
from tinystory.evaluate.corruptions import REAL
from tinystory.run.folder import read_config
from tinystory.run.records import EVALUATIONS
from tinystory.student import checkpoint

pytestmark = pytest.mark.usefixtures("short_pauses")
REALS = {text.story for text in known_texts(["builtin"]) if text.kind == REAL}
PROBES = 4  # requests of a probe, at most


class Answers(FaultServer):
    """Gives probabilities of yes, which are high for a real story, until `is_down()`."""

    def __init__(self):
        super().__init__(other=self.answer)
        self.is_down = lambda: False
        self.held = 0  # number of requests that are not answered

    def answer(self, body):
        if self.is_down():
            self.held += 1
            return "hang"
        text = body["messages"][-1]["content"].split("===")[2].strip()
        p = 0.9 if text in REALS else 0.1 + 0.6 * hashlib.sha256(text.encode()).digest()[0] / 255
        return with_logprobs("no", [("Yes", math.log(p)), ("no", math.log(1 - p))])


def test_a_killed_run_is_resumed_without_a_calibration_to_the_same_bits(place, tmp_path):
    """It is killed while the scale is fitted, then within the second of four steps. The judge is
    asked a question too."""
    with Answers() as server, Answers() as judge:
        teachers = cli("--teacher-url {} --judge {}", server.url, judge.url)
        argv = cli("--init {} --teacher-prompt event", checkpoint.newest(place / "p"))
        argv += ["--judge-prompt", "sense", *SHORT]
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        interact.main([*argv, *teachers, "--calibrate", "--out", str(whole)])

        argv += [*teachers, "--no-calibrate", "--out", str(killed)]
        first = len(server.others) + PROBES + 20
        kill_when(server, lambda: len(server.others) > first, argv)
        assert not (killed / "config.json").exists()
        records = killed / "metrics.jsonl"
        kill_when(server, lambda: records.exists() and records.read_text(), argv)
        assert len(read_lines(records)) == 1
        asked = len(server.others)
        interact.main([*teachers, "--resume", "--out", str(killed)])
        assert len(server.others) - asked <= PROBES + 3 * 6 + 2 * 4  # none about known texts
    assert_same_bits(whole, killed)
    assert read_lines(whole / EVALUATIONS) == read_lines(killed / EVALUATIONS)
    options = [read_config(run)["options"] for run in (whole, killed)]
    for name, question in (("answer_scale", "event"), ("judge_scale", "sense")):
        (scale,) = [options[0][name]]
        assert list(scale) == [question] and scale == options[1][name]


def kill_when(server: Answers, is_down, argv: list[str]) -> None:
    """Run the command until it waits for an answer of a server that is down, and kill it."""
    server.is_down, server.held = is_down, 0
    process = subprocess.Popen([sys.executable, str(ROOT / "train_interact.py"), *argv], cwd=ROOT)
    while not server.held:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    server.is_down = lambda: False
