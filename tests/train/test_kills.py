"""SIGKILL at random moments, over both commands, until the run is done: the same bits as a run that
nothing stopped."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import LIMIT_S, ROOT, SHORT, SMALL, assert_same_bits, cli, metrics
from fault_server import FaultServer

import train_interact as interact
import train_pretrain as pretrain
from tinystory.evaluate.calibration import CHEAP, CHEAP_KINDS
from tinystory.run.errors import UserError
from tinystory.student import checkpoint

KILLS = int(os.environ.get("TINYSTORY_KILLS", "10"))  # per command
CALIBRATION_TEXTS = CHEAP * len(CHEAP_KINDS)
STAGES = ("calibration", "trial of temperatures", "first evaluation")  # before the first step
# Runs a command in a fork of a process that has imported torch, which would take longer than the
# command.
FORKS = """
import json, os, sys
from pathlib import Path
import train_interact, train_pretrain
from tinystory.data import shards
shards.cache_dir = lambda: Path(sys.argv[1])
while line := sys.stdin.readline():
    name, argv, log = json.loads(line)
    child = os.fork()
    if not child:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        code = 0
        try:
            sys.modules[name].main(argv)
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Starts commands, one at a time, and kills them."""

    def __init__(self, place, log):
        self.log = log
        self.is_started = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKS, place / "cache"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, command, argv, seconds=None):
        """The exit code and the output of a command, which is killed after so many seconds."""
        self._write(json.dumps([command.__name__, argv, str(self.log)]))
        self.child = int(self.process.stdout.readline())
        assert self.child > 1, "else the kill would reach others"
        self.is_started.set()
        if seconds is not None:
            time.sleep(seconds)
            self.kill()
        self._write("")  # only now the process is waited for, so its number is not reused before
        code = int(self.process.stdout.readline())
        self.is_started.clear()
        return code, self.log.read_text() if self.log.exists() else ""

    def kill(self):
        """For another thread too, in which a request of the command is answered."""
        assert self.is_started.wait(LIMIT_S)
        os.kill(self.child, signal.SIGKILL)

    def _write(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture
def forks(place, tmp_path):
    forks = Forks(place, tmp_path / "log")
    yield forks
    forks.close()


def ignored(stage):
    pass


class KillingTeacher(FaultServer):
    """Grades a story by its letters, and low if its words are shuffled. Before it answers, it calls
    `on_request(stage)`, where the stage is what the run in `out` is doing."""

    def __init__(self):
        super().__init__(script=self.reply, models=["graders"])
        self.out = Path()
        self.on_request = ignored

    def reply(self, story, n):
        self.on_request(self.stage())
        is_shuffled = re.search(r"\. [a-z]", story)
        sense = 0 if is_shuffled else 2 + len(story) % 2
        return f"{sense} {sense} {story.count('e') % 4}"

    def stage(self):
        if (self.out / "evaluations.jsonl").exists():
            return "steps"
        if (self.out / "checkpoints/start").exists():
            return "first evaluation"
        is_calibrated = len(self.seen) > CALIBRATION_TEXTS
        return "trial of temperatures" if is_calibrated else "calibration"


@pytest.fixture
def teacher():
    with KillingTeacher() as server:
        yield server


def pretraining(place, out):
    """The words of the command, and of those that are given again with --resume, because no record
    may name them."""
    again = cli("--corpus {} --out {}", place / "corpus.txt", out)
    return [*SMALL, *again, *cli("--words 6000 --save-every 7")], again


def interaction(place, out, teacher, steps):
    """As `pretraining`. Until the first checkpoint, --init is given again too."""
    init = checkpoint.newest(place / "p")
    again = cli("--init {} --teacher-url {} --out {}", init, teacher.url, out)
    again += cli("--corpus {} --teacher-model graders", place / "corpus.txt")
    teacher.out = out
    teacher.seen.clear()
    new = [*SHORT, *again, *cli("--steps {} --temperature 0 --calibrate", steps)]
    return new, again


def next_words(out, new, again):
    return ["--resume", *again] if (out / "config.json").exists() else new


def assert_equal_runs(whole, out):
    assert_same_bits(whole, out)
    counters = [checkpoint.read_counters(checkpoint.newest(run)) for run in (whole, out)]
    assert counters[0] == counters[1]
    assert len(metrics(out)) == len(metrics(whole))
    for name in ("stories.jsonl", "evaluations.jsonl", "samples.jsonl"):
        if (whole / name).exists():
            assert (whole / name).read_bytes() == (out / name).read_bytes()
    assert not list((out / "checkpoints").glob(".*")), "half-written checkpoints are cleared away"


def all_whole(out) -> bool:
    try:
        for _, folder in checkpoint.checkpoints(out):
            checkpoint.require_whole(folder, checkpoint.FILES)
        return True
    except UserError:
        return False


def killing_at(forks, stage, number):
    """A function for KillingTeacher that kills the command at a request of a stage."""
    requests = itertools.count(1)

    def on_request(present):
        if present == stage and next(requests) == number:
            forks.kill()

    return on_request


def test_killed_before_its_first_step_an_interaction_ends_as_if_never_stopped(
    place, tmp_path, forks, teacher
):
    whole = tmp_path / "whole"
    new, _ = interaction(place, whole, teacher, steps=1)
    code, output = forks.run(interact, new)
    assert code == 0, output
    for stage in STAGES:
        out = tmp_path / stage
        new, again = interaction(place, out, teacher, steps=1)
        teacher.on_request = killing_at(forks, stage, 3)
        code, _ = forks.run(interact, new)
        assert code == -signal.SIGKILL
        teacher.on_request = ignored
        code, output = forks.run(interact, next_words(out, new, again))
        assert code == 0, output
        assert_equal_runs(whole, out)


@pytest.mark.slow
@pytest.mark.parametrize("command", [pretrain, interact])
def test_killed_again_and_again_it_ends_as_if_never_stopped(
    place, tmp_path, forks, teacher, command
):
    """The first kill of an interaction comes in one of STAGES. All others come at random times:
    some before the first checkpoint, some while one is written. One bit of the newest checkpoint is
    flipped now and then. A run that ends before all kills begins again, from nothing or from the
    last checkpoint but one."""
    whole, out, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)

    def words_of(run):
        if command is pretrain:
            return pretraining(place, run)
        return interaction(place, run, teacher, steps=20)

    began = time.monotonic()
    assert forks.run(command, words_of(whole)[0])[0] == 0
    longest = time.monotonic() - began
    new, again = words_of(out)
    kills, ends, resumed = Counter(), 0, 0
    while (goes_on := kills.total() < KILLS or not kills["with a checkpoint"]) or not ends:
        words = next_words(out, new, again)
        resumed += "--resume" in words
        stage, seconds = "", None
        if command is interact and not out.exists():
            stage = STAGES[ends % len(STAGES)]
            teacher.seen.clear()
            teacher.on_request = killing_at(forks, stage, rng.randint(1, 4))
        elif goes_on:
            seconds = rng.uniform(0, longest / 2)
        code, output = forks.run(command, words, seconds)
        teacher.on_request = ignored
        assert code in (0, -signal.SIGKILL), output
        assert "Traceback" not in output
        newest = checkpoint.newest(out)
        if code == 0:
            longest /= 1.5 if goes_on else 1  # the kill came too late
            assert_equal_runs(whole, out)
            ends += 1
            shutil.rmtree(out if rng.random() < 0.7 else newest)
            continue
        kills[stage or ("with a checkpoint" if newest else "without")] += 1
        longest *= 1 if kills["with a checkpoint"] else 1.1  # or too early
        if len(checkpoint.checkpoints(out)) > 1 and rng.random() < 0.2 and all_whole(out):
            path = newest / rng.choice(checkpoint.FILES)
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
    print(f"{command.__name__}: {dict(kills)}, resumed {resumed} times, {ends} equal ends")
