"""SIGKILL at random moments, over both commands, until the run is done: the same bits as a run that
nothing stopped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SHORT, SMALL, assert_same_bits, cli, metrics

import train_interact as interact
import train_pretrain as pretrain
from tinystory.run.errors import UserError
from tinystory.student import checkpoint

KILLS = int(os.environ.get("TINYSTORY_KILLS", "10"))  # per command
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


@pytest.fixture
def run(place, tmp_path):
    """Returns run(command, argv, seconds), which returns the command's exit code and output, and
    kills the command after so many seconds."""
    forks = subprocess.Popen(
        [sys.executable, "-c", FORKS, place / "cache"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(command, argv, seconds=None):
        log = tmp_path / "log"
        forks.stdin.write(json.dumps([command.__name__, argv, str(log)]) + "\n")
        forks.stdin.flush()
        child = int(forks.stdout.readline())
        assert child > 1, "else the kill would reach others"
        if seconds is not None:
            time.sleep(seconds)
            # the process is waited for only after this, so the number is not reused
            os.kill(child, signal.SIGKILL)
        forks.stdin.write("\n")
        forks.stdin.flush()
        return int(forks.stdout.readline()), log.read_text() if log.exists() else ""

    yield run
    forks.stdin.close()
    forks.stdout.close()
    forks.wait()


def arguments(place, command, out):
    if command is pretrain:
        return SMALL + cli(
            "--corpus {} --words 6000 --save-every 7 --out {}", place / "corpus.txt", out
        )
    init = str(checkpoint.newest(place / "p"))
    return ["--init", init, "--reward", "random", *SHORT, "--steps", "20", "--out", str(out)]


def given_again(place, command):
    """The options that no record may name: those of an interaction, until the first checkpoint."""
    if command is pretrain:
        return ["--corpus", str(place / "corpus.txt")]
    return ["--init", str(checkpoint.newest(place / "p"))]


def all_whole(out) -> bool:
    try:
        for _, folder in checkpoint.checkpoints(out):
            checkpoint.require_whole(folder, checkpoint.FILES)
        return True
    except UserError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("command", [pretrain, interact])
def test_killed_again_and_again_it_ends_as_if_never_stopped(place, tmp_path, run, command):
    """Some kills come before the first checkpoint, some while one is written; one bit of the newest
    one is flipped now and then. A run that ends before all kills begins again, from nothing or from
    the last checkpoint but one."""
    whole, out, rng, kills, ends = tmp_path / "whole", tmp_path / "killed", random.Random(0), 0, 0
    began = time.monotonic()
    assert run(command, arguments(place, command, whole))[0] == 0
    longest = time.monotonic() - began
    seen = set()  # what was there when a kill came: 2 is a checkpoint
    while (goes_on := kills < KILLS or 2 not in seen) or not ends:
        argv = (
            ["--resume", *given_again(place, command), "--out", str(out)]
            if (out / "config.json").exists()
            else arguments(place, command, out)
        )
        code, stderr = run(command, argv, rng.uniform(0, longest / 2) if goes_on else None)
        assert code in (0, -signal.SIGKILL), stderr
        assert "Traceback" not in stderr
        newest = checkpoint.newest(out)
        if code == 0:
            longest /= 1.5 if goes_on else 1  # the kill came too late
            assert_same_bits(whole, out)
            assert len(metrics(out)) == len(metrics(whole))
            for name in (
                ("stories.jsonl", "evaluations.jsonl", "samples.jsonl")
                if command is interact
                else ()
            ):
                assert (whole / name).read_bytes() == (out / name).read_bytes()
            assert not list((out / "checkpoints").glob(".*")), (
                "half-written checkpoints are cleared away"
            )
            ends += 1
            shutil.rmtree(out if rng.random() < 0.7 else newest)
            continue
        kills += 1
        seen.add((out / "config.json").exists() + (newest is not None))
        longest *= 1 if 2 in seen else 1.1  # or too early
        if len(checkpoint.checkpoints(out)) > 1 and rng.random() < 0.2 and all_whole(out):
            path = newest / rng.choice(checkpoint.FILES)
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
    print(f"{command.__name__}: {kills} kills, {ends} ends, {seen}")
