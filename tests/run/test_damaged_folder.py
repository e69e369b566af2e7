"""Accidents of a run's folder: two commands at once, kills before the first checkpoint, files that
are missing, damaged or of another kind."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SHORT, SMALL, assert_same_bits, cli, damage, fails, metrics, story_record
from hypothesis import given
from hypothesis import strategies as st

import train_interact as interact
import train_pretrain as pretrain
from tinystory.evaluate.held_out import write_samples
from tinystory.report.before_after import summary
from tinystory.report.run import write_report
from tinystory.run.errors import UserError
from tinystory.run.folder import locked, read_config
from tinystory.run.log import RunLog
from tinystory.run.records import read_metrics, read_records
from tinystory.student import checkpoint

HOLDER = """
import sys, time
from pathlib import Path
from tinystory.run.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def reading(place, out, *more):
    return [*cli("--corpus {} --words 2000 --out {}", place / "corpus.txt", out), *SMALL, *more]


def writing(place, out, *more):
    init = checkpoint.newest(place / "p")
    return [*cli("--reward random --init {} --out {}", init, out), *SHORT, *more]


def test_a_second_command_is_refused_until_the_first_is_gone(place, tmp_path, capsys):
    shutil.copytree(place / "p", tmp_path / "p")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "p"], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        line = fails(
            pretrain.main,
            cli("--resume --words 2600 --corpus {} --out {}", place / "corpus.txt", tmp_path / "p"),
            capsys,
        )
        assert f"in use by process {holder.pid} on " in line and "--out" in line
        assert "in use by" in fails(pretrain.main, reading(place, tmp_path / "p"), capsys)
        assert "in use by" in fails(interact.main, writing(place, tmp_path / "p"), capsys)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    # a kill has released it
    pretrain.main(
        cli("--resume --words 2600 --corpus {} --out {}", place / "corpus.txt", tmp_path / "p")
    )
    assert not (tmp_path / "p" / ".lock").exists()
    assert len(metrics(tmp_path / "p")) > len(metrics(place / "p"))


def test_a_lock_leaves_no_trace_of_a_block_that_wrote_nothing(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "note").write_text("")
        with (
            pytest.raises(UserError, match=rf"in use by process {os.getpid()} "),
            locked(tmp_path / "a"),
        ):
            pass
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["note"]


@pytest.mark.parametrize("command", [pretrain, interact])
def test_a_run_without_a_checkpoint_starts_again_by_itself(place, tmp_path, command, capsys):
    """A folder as a kill or a full disk before the first checkpoint leaves it."""
    arguments = reading if command is pretrain else writing
    command.main(arguments(place, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints")
    (tmp_path / "killed" / "checkpoints" / ".step_0000005").mkdir(parents=True)
    (tmp_path / "killed" / "report.html").unlink()
    assert "--resume" in fails(command.main, arguments(place, tmp_path / "killed"), capsys)
    given = ["--corpus", str(place / "corpus.txt")]
    if command is interact:
        given = ["--init", str(checkpoint.newest(place / "p"))]
        line = fails(command.main, ["--resume", "--out", str(tmp_path / "killed")], capsys)
        assert given[1] in line and "--init" in line
    command.main(["--resume", *given, "--out", str(tmp_path / "killed")])
    assert "starts from the beginning" in capsys.readouterr().out
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")
    for name in ("stories.jsonl", "evaluations.jsonl") if command is interact else ():
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert len(metrics(tmp_path / "whole")) == len(metrics(tmp_path / "killed"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_resumed_to_the_same_bits(
    place, tmp_path, capsys
):
    more = ["--save-every", "4"]
    pretrain.main(reading(place, tmp_path / "whole", *more))
    shutil.copytree(tmp_path / "whole", tmp_path / "harmed")
    last = checkpoint.newest(tmp_path / "harmed")
    data = bytearray((last / "trainer.safetensors").read_bytes())
    data[-5] ^= 16
    (last / "trainer.safetensors").write_bytes(data)
    pretrain.main(
        ["--resume", "--corpus", str(place / "corpus.txt"), "--out", str(tmp_path / "harmed")]
    )
    assert f"{last / 'trainer.safetensors'} does not match manifest.json" in capsys.readouterr().err
    assert_same_bits(tmp_path / "whole", tmp_path / "harmed")
    assert len(metrics(tmp_path / "whole")) == len(metrics(tmp_path / "harmed"))


@pytest.mark.parametrize(
    "harm", ["gone", "", "null", "{", "[]", '{"options": null}', '{"options": {"seed": "x"}}']
)
def test_a_run_whose_options_are_not_known_is_not_resumed(place, tmp_path, capsys, harm):
    """Otherwise another run would continue under the same name, with other options and another
    teacher."""
    shutil.copytree(place / "p", tmp_path / "p")
    config = tmp_path / "p" / "config.json"
    config.unlink() if harm == "gone" else config.write_text(harm)
    before = sorted(path for path in (tmp_path / "p").rglob("*"))
    for command in (pretrain, interact):
        line = fails(command.main, ["--resume", "--out", str(tmp_path / "p")], capsys)
        assert str(config) in line and ("restore it" in line or "correct the value" in line)
    assert sorted(path for path in (tmp_path / "p").rglob("*")) == before


def test_nothing_to_resume_is_said(tmp_path, capsys):
    for command in (pretrain, interact):
        assert "no run" in fails(command.main, ["--resume", "--out", str(tmp_path / "new")], capsys)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(place, tmp_path, capsys):
    if os.geteuid() == 0:
        os.mkdir(tmp_path / "p")
        (tmp_path / "p" / ".lock").mkdir()  # a superuser may write anywhere, but not this
        shutil.copy(place / "p" / "config.json", tmp_path / "p")
    else:
        shutil.copytree(place / "p", tmp_path / "p")
        (tmp_path / "p").chmod(0o555)
    assert "cannot write" in fails(
        pretrain.main,
        ["--resume", "--corpus", str(place / "corpus.txt"), "--out", str(tmp_path / "p")],
        capsys,
    )


BETTER = "Tim said yes, and he ran home."
RECORDS = {
    "metrics.jsonl": [
        dict(step=i, reward_mean=0.1 * i, score_mean=1.0, kl=None, teacher_cost=0.5)
        for i in (1, 2, 3)
    ],
    "stories.jsonl": [story_record(i // 2, i, scores=dict(a=i % 4, b=1.5)) for i in range(6)],
    "evaluations.jsonl": [
        story_record(i, 7, story=f"{BETTER} {i}", score=0.5, difference=1.0, predicted=None)
        for i in range(3)
    ],
    "samples.jsonl": [
        story_record(0, 7, when="before"),
        story_record(1, 7, when="after", story=BETTER),
    ],
    "findings.jsonl": [
        dict(title="Judged", step=2, sentences=["A gain."], table=[["", "sense"], ["after", "1"]]),
        dict(title="Compared", step=3, sentences=["Ada preferred it."], table=[]),
    ],
}


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with RunLog(folder, resume_step=None) as log:
        log.config({"seed": 1, "device": "cpu", "teacher": {"model": "a"}})
    for name, records in RECORDS.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@given(data=st.data())
def test_no_harm_to_a_record_is_a_traceback(a_run, tmp_path_factory, data):
    """Bytes cut, flipped and inserted, values of other types, keys that are missing."""
    folder = tmp_path_factory.mktemp("harmed")
    shutil.copytree(a_run, folder, dirs_exist_ok=True)
    path = folder / data.draw(st.sampled_from([*RECORDS, "config.json"]))
    damage(path, data)
    for use in (
        lambda: read_config(folder),
        lambda: read_metrics(folder),
        lambda: [list(read_records(folder / name)) for name in RECORDS],
        lambda: write_report(folder),
        lambda: write_samples(folder, 1),
        lambda: summary(folder),
        lambda: RunLog(folder, resume_step=1).config({"device": "cpu"}),
    ):
        with contextlib.suppress(UserError):
            use()


def test_a_sample_of_an_unknown_time_is_left_out_of_the_report(a_run, tmp_path):
    shutil.copytree(a_run, tmp_path, dirs_exist_ok=True)
    samples = tmp_path / "samples.jsonl"
    samples.write_text(samples.read_text().replace('"after"', '"later"'))
    assert "later" not in write_report(tmp_path).read_text()  # and no traceback


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("tinystory.run.files.LONGEST", 1 << 16)
    monkeypatch.setattr("tinystory.run.records.LONGEST", 1 << 16)
    with open(tmp_path / "metrics.jsonl", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"line 1 of .* is over"):
        read_metrics(tmp_path)
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="is over"):
        read_config(tmp_path)
