"""watch.py: a running and a finished run in the terminal, whatever a model wrote."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import fails, story_record

from scripts import watch
from tinystory.run.errors import UserError
from tinystory.run.folder import LOCK, in_use, locked
from tinystory.run.log import RunLog
from tinystory.run.records import EVALUATIONS, STORIES


@pytest.fixture
def run(tmp_path):
    with RunLog(tmp_path / "i", resume_step=None) as log:
        log.config({"steps": 16, "kl_target": 1.0})
        for step in range(1, 13):
            log.metrics(step=step, reward_mean=step / 10, kl=step, score_mean=None, rollout_s=30.0)
        log.append(
            STORIES,
            [
                story_record(12, i, story=f"story {i} \x1b[31mred\nblue", reward=i or None)
                for i in range(9)
            ],
        )
    return tmp_path / "i"


def test_a_run_that_is_over_is_printed_once(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    watch.main([str(run)])
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "step 12, over" in " ".join(lines[:2]) and all(len(line) <= 80 for line in lines)
    assert "reward 0.1 → 1.2" in text and "KL, nats 1 → 12" in text and "score " not in text
    assert "▁" in text
    assert "█" in text
    assert "Warning at step 4: the KL far exceeds its target" in " ".join(text.split())
    assert [line for line in lines if line.startswith("Step 12")] == [
        f"Step 12, reward {i}: Once story {i} [31mred blue" for i in (6, 7, 8)
    ]


@pytest.mark.parametrize("lock", ["pipe", "link"])
def test_a_lock_that_is_none_of_ours_is_neither_waited_for_nor_written(run, tmp_path, lock):
    private = tmp_path / "private"
    private.write_text("mine")
    if lock == "pipe":
        os.mkfifo(run / LOCK)
    else:
        (run / LOCK).symlink_to(private)
    assert not in_use(run)
    with pytest.raises(UserError, match=r"\.lock: it is not a regular file"), locked(run):
        pass
    assert private.read_text() == "mine"


def test_a_run_that_goes_on_is_shown_until_it_is_over(run, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(watch.shutil, "get_terminal_size", lambda *_: os.terminal_size((50, 10)))
    with locked(run):
        pauses = []

        def sleep(seconds):
            pauses.append(seconds)
            if len(pauses) == 2:
                (run / LOCK).unlink()  # as the run does at its end

        monkeypatch.setattr(watch.time, "sleep", sleep)
        watch.main([str(run)])
    _, first, second, last = capsys.readouterr().out.split(watch.CLEAR)
    assert " step 12, running" in " ".join(first.split())
    assert first.count("\n") == last.count("\n") == 9
    assert second == first
    assert "step 12, over" in " ".join(last.split())
    assert len(pauses) == 2
    assert last.endswith("...\n")


def test_it_shows_the_stories_of_a_pretraining(tmp_path):
    with RunLog(tmp_path, resume_step=None) as log:
        log.metrics(step=100, words=1000, loss=6.0)
        for step in (0, 100):
            log.append(
                EVALUATIONS, [story_record(step, story=f"story {step}", reply=None, reward=None)]
            )
    lines = watch.page(tmp_path, 80, running=False)
    assert lines[-3:] == ["Step 0: Once story 0", "", "Step 100: Once story 100"]


def test_a_narrow_terminal_and_an_endless_story_fit(run, capsys, monkeypatch):
    with RunLog(run, resume_step=12) as log:
        log.append(STORIES, [story_record(12, 9, story="word " * 1_000_000)])
    lines = watch.page(run, 20, running=False)
    assert max(map(len, lines)) <= 20 and len(lines) < 500 and lines[0].startswith(str(run)[:5])


def test_without_a_folder_the_newest_run_is_shown(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert "there is no run under runs/" in fails(watch.main, [], capsys)
    for i, name in enumerate(("runs/old", "runs/demo/interact", "runs/exported")):
        folder = Path(shutil.copytree(run, name))
        for path in folder.iterdir():
            os.utime(path, (1000 + i, 1000 + i))
    (Path("runs/exported") / "model.safetensors").touch()  # by export_hf.py
    watch.main([])
    assert capsys.readouterr().out.startswith("runs/demo/interact: step 12, over")


def test_a_lock_that_a_killed_run_left_does_not_count_and_looking_takes_none(tmp_path, monkeypatch):
    assert not in_use(tmp_path)
    gone = subprocess.Popen(["true"])
    gone.wait()
    for holder, used in (
        (f"process {gone.pid} on {socket.gethostname()}", False),
        ("process 1 on elsewhere", True),
    ):
        (tmp_path / LOCK).write_text(f"{holder} since 2026-01-01T00:00:00+00:00\n")
        assert in_use(tmp_path) == used
    (tmp_path / LOCK).write_text("\x1b[31m")
    assert not in_use(tmp_path)
    with locked(tmp_path):
        monkeypatch.setattr("fcntl.flock", None)
        assert in_use(tmp_path) and in_use(tmp_path)
        monkeypatch.undo()
    assert not in_use(tmp_path)


def test_pretraining_a_run_without_steps_and_no_run(tmp_path, capsys):
    with RunLog(tmp_path / "p", resume_step=None) as log:
        log.config({"words": 1000})
        watch.main([str(tmp_path / "p")])
        assert capsys.readouterr().out == f"{tmp_path / 'p'}: no step yet, over\n"
        for step in range(1, 9):
            log.metrics(
                step=step,
                words=100 * step,
                tokens=130 * step,
                loss=9 - step,
                val_loss=None,
                tokens_per_s=9.5,
            )
    watch.main([str(tmp_path / "p")])
    text = capsys.readouterr().out
    assert "loss, nats per token 8 → 1" in text
    assert "validation" not in text
    assert "tokens per second 9.5 → 9.5" in text
    assert "holds no run" in fails(watch.main, [str(tmp_path)], capsys)
