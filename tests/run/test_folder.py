"""The run's folder after a kill, on a full disk, with a second run and with unusual values."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fails, story_record, tiny_stories
from hypothesis import given
from hypothesis import strategies as st

from scripts import evaluate, export_hf, sample
from tinystory.data.tokenizer import Tokenizer
from tinystory.run.errors import UserError, cannot_write
from tinystory.run.files import atomic_file, atomic_folder, atomic_write
from tinystory.run.folder import locked, read_config, require_output
from tinystory.run.journal import Journal
from tinystory.run.log import RunLog
from tinystory.run.records import (
    EVALUATIONS,
    STORIES,
    STORY_FIELDS,
    plain,
    read_metrics,
    read_records,
    read_stories,
)
from tinystory.student import gguf


def a_run(folder, steps):
    with RunLog(folder, resume_step=None) as log:
        log.config({"seed": 1, "device": "cpu"})
        for step in range(1, steps + 1):
            log.metrics(step=step, reward_mean=step / 7)
            log.append(STORIES, [story_record(step, i) for i in range(3)])


def test_what_is_written_is_read(tmp_path):
    a_run(tmp_path, 4)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert read_metrics(tmp_path)[0] == {"step": 1, "reward_mean": 0.1428571}
    stories = list(read_stories(tmp_path))
    assert len(stories) == 12 and stories[0]["story"] == "Tim said “no”.\nHe ran."
    assert read_metrics(tmp_path / "nowhere") == []
    assert list(read_stories(tmp_path / "nowhere")) == []


def test_config_records_what_is_needed_to_repeat_the_run(tmp_path):
    with RunLog(tmp_path, resume_step=None) as log:
        log.config({"out": tmp_path, "teacher_url": "https://me:secret@host/v1", "device": "cpu"})
    config = read_config(tmp_path)
    assert config["options"]["out"] == str(tmp_path)
    assert {"python", "torch", "numpy", "tinystory"} <= set(config["versions"])
    assert config["versions"]["torch"] == torch.__version__
    assert "thread" in config["device"]
    assert "git_commit" in config
    assert config["started"]
    assert config["resumed"] == []
    assert "secret" not in (tmp_path / "config.json").read_text()
    assert config["options"]["teacher_url"] == "https://host/v1"


def test_config_holds_no_key_of_the_environment_whoever_names_it(tmp_path, monkeypatch):
    """A server may echo the key as the model's name, and a key may need escapes in JSON."""
    monkeypatch.setenv("OPENAI_API_KEY", "planted0123")
    monkeypatch.setenv("GATEWAY_SECRET", 'pl"anted\\x')
    for step in (None, 0):
        with RunLog(tmp_path, resume_step=step) as log:
            log.config({"teacher": {"model": "gpt-planted0123", "notes": ['pl"anted\\x']}})
        teacher = read_config(tmp_path)["options"]["teacher"]
        assert teacher == {"model": "gpt-[key]", "notes": ["[key]"]}


def test_a_new_run_never_writes_over_an_old_one(tmp_path):
    a_run(tmp_path, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    error = pytest.raises(
        UserError, match=r"already holds a run: continue it with --resume or choose another --out"
    )
    with error, locked(tmp_path, new=True):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


STARTED = """
import sys, types
from tinystory.run.folder import locked_run
config = types.SimpleNamespace(out=sys.argv[1], resume=False, given=set())
print("ready", flush=True)
sys.stdin.readline()
with locked_run(config) as config:
    print(config.out, flush=True)
    sys.stdin.read()
"""


def test_runs_that_start_at_once_without_out_take_a_folder_each(tmp_path):
    """A new run takes no folder that holds a run."""
    a_run(tmp_path / "run-3", 1)
    processes = []
    for _ in range(4):
        command = [sys.executable, "-c", STARTED, str(tmp_path / "run")]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(subprocess.Popen(command, cwd=ROOT, **pipes))
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        folders = [read_printed_folder(process) for process in processes]
    finally:
        for process in processes:
            process.communicate()
    assert sorted(folders) == ["run", "run-2", "run-4", "run-5"]


def read_printed_folder(process: subprocess.Popen) -> str:
    line = process.stdout.readline()
    if "is taken" in line:
        line = process.stdout.readline()
    return os.path.basename(line.strip())


def test_a_folder_with_other_files_in_it_is_accepted(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    a_run(tmp_path, 1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resume_cuts_back_to_the_checkpoint_and_goes_on_as_if_never_stopped(tmp_path):
    a_run(tmp_path / "whole", 5)
    a_run(tmp_path / "killed", 4)
    started = read_config(tmp_path / "killed")["started"]
    with RunLog(tmp_path / "killed", resume_step=2) as log:
        log.config({"seed": 1, "device": "cpu"})
        for step in range(3, 6):
            log.metrics(step=step, reward_mean=step / 7)
            log.append(STORIES, [story_record(step, i) for i in range(3)])
    for name in ("metrics.jsonl", "stories.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    config = read_config(tmp_path / "killed")
    assert config["started"] == started and [each["step"] for each in config["resumed"]] == [2]


def test_another_number_of_threads_is_warned_of_on_resume(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    with RunLog(tmp_path, resume_step=None) as log:
        log.config({"device": "cpu"})
    RunLog(tmp_path, resume_step=0).config({"device": "cpu"})
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    RunLog(tmp_path, resume_step=0).config({"device": "cpu"})
    output = capsys.readouterr().out
    assert output.startswith("warning: this resume has 2 threads and the run had 1,")
    assert "OMP_NUM_THREADS" in output and output.count("\n") == 1


def test_resume_cuts_evaluations_back_too(tmp_path):
    """The evaluation of step n is on disk before the checkpoint of step n, but for n = 0."""
    for resume_step, kept in ((2, [0, 2]), (1, [0]), (0, [])):
        folder = tmp_path / str(resume_step)
        with RunLog(folder, resume_step=None) as log:
            for step in (0, 2, 4):
                log.append(EVALUATIONS, [story_record(step)])
        RunLog(folder, resume_step=resume_step).close()
        assert [record["step"] for record in read_records(folder / "evaluations.jsonl")] == kept


def test_a_record_cut_short_anywhere_is_skipped_and_dropped_on_resume(tmp_path):
    """Cut the file after each byte: readers and a resumed run see exactly the complete records."""
    a_run(tmp_path, 3)
    path = tmp_path / "stories.jsonl"
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        # A record that lacks only the newline is complete.
        expected = sum(end <= cut for end in ends)
        assert len(list(read_stories(tmp_path))) == expected
        RunLog(tmp_path, resume_step=3).close()
        assert path.read_bytes() == whole[: ends[expected - 1] + 1 if expected else 0]


def test_zeros_after_a_power_cut_are_a_torn_line(tmp_path):
    a_run(tmp_path, 2)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\0" * 100)
    assert len(read_metrics(tmp_path)) == 2


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    a_run(tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{oops\n" + path.read_bytes())
    with pytest.raises(UserError, match=r"line 1 of .*metrics\.jsonl"):
        read_metrics(tmp_path)
    before = path.read_bytes()
    with pytest.raises(UserError):
        RunLog(tmp_path, resume_step=2)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_values_of_any_number_type(tmp_path):
    with RunLog(tmp_path, resume_step=None) as log:
        log.metrics(
            step=1,
            a=torch.tensor(0.1),
            b=np.float32(1 / 3),
            c=np.int64(7),
            d=math.nan,
            e=-math.inf,
            f=None,
            g=True,
            h=123456789,
        )
    assert read_metrics(tmp_path) == [
        {
            "step": 1,
            "a": 0.1,
            "b": 0.3333333,
            "c": 7,
            "d": None,
            "e": None,
            "f": None,
            "g": True,
            "h": 123456789,
        }
    ]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.just("\ud800\u2028</script>\0"),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


other_names = st.text().filter(lambda name: name not in STORY_FIELDS)


@given(st.dictionaries(other_names, json_values), st.text() | st.just("\ud800\u2028</script>\0"))
def test_any_story_record_comes_back(tmp_path_factory, record, text):
    record |= story_record(1, story=text, reply=text)
    folder = tmp_path_factory.mktemp("run")
    with RunLog(folder, resume_step=None) as log:
        log.append(STORIES, [record, record])
    assert list(read_stories(folder)) == [plain(record)] * 2
    assert len((folder / "stories.jsonl").read_bytes().splitlines()) == 2


def test_a_full_disk_is_one_clear_sentence():
    full = Path("/dev/full")  # every write to it fails as on a full disk
    if not os.path.exists(full):
        pytest.skip("no /dev/full here")
    journal = Journal(full)
    with pytest.raises(UserError, match="No space left on device"):
        journal.append({"step": 1})
    journal.close()


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("move", [shutil.rmtree, lambda run: run.rename(run.with_name("moved"))])
def test_a_run_whose_folder_is_moved_or_deleted_meanwhile_does_not_go_on(tmp_path, move, replaced):
    run = tmp_path / "run"
    with RunLog(run, resume_step=None) as log:
        log.metrics(step=1)
        move(run)
        if replaced:
            run.mkdir()
            (run / "metrics.jsonl").touch()
        with pytest.raises(UserError, match=r"metrics\.jsonl was moved or deleted while it was"):
            log.metrics(step=2)
    assert run.exists() == replaced


def test_no_such_folder_and_a_file_in_the_way(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        atomic_write(tmp_path / "nowhere" / "x", "text")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        RunLog(tmp_path / "file", resume_step=None)


def test_what_cannot_be_written_is_said_with_its_cause(tmp_path):
    for code, words in (
        (errno.EMFILE, "ulimit -n"),
        (errno.ENAMETOOLONG, "shorter"),
        (errno.EACCES, "another folder"),
    ):
        message = str(cannot_write(tmp_path, OSError(code, os.strerror(code))))
        assert os.strerror(code) in message
        assert words in message
        assert "free some space" not in message
    assert "free some space" in str(cannot_write(tmp_path, OSError(errno.ENOSPC, "No space left")))
    with (
        pytest.raises(UserError, match="File name too long; choose a shorter name"),
        locked(tmp_path / ("a" * 300)),
    ):
        pass


def test_atomic_file_leaves_the_old_content_when_its_writer_fails(tmp_path):
    path = tmp_path / "model.json"
    atomic_write(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half of the ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model.json"]
    atomic_write(path, b"new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["model.json"]
    os.umask(mask := os.umask(0))
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_reader_of_a_file_being_rewritten_sees_one_complete_version(tmp_path):
    """A process rewrites a file in a loop and is killed in the middle: the file parses at any
    moment."""
    program = """
import sys
from pathlib import Path
from tinystory.run.files import atomic_write
n = 0
while True:
    n += 1
    atomic_write(Path(sys.argv[1]), '{"n": %d, "pad": "%s"}' % (n, "x" * 2_000_000))
    if n == 1:
        print("going", flush=True)
"""
    path = tmp_path / "state.json"
    writer = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
    try:
        assert writer.stdout.readline() == b"going\n"
        seen = {json.loads(path.read_bytes())["n"] for _ in range(200)}
        while len(seen) < 2 and writer.poll() is None:  # on a busy machine
            seen.add(json.loads(path.read_bytes())["n"])
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    assert len(seen) > 1 and json.loads(path.read_bytes())["n"] >= max(seen)


def test_a_durable_journal_waits_for_the_disk_at_each_record(tmp_path, monkeypatch):
    """A human's grade, which nobody gives twice."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    for durable in (False, True):
        journal = Journal(tmp_path / f"{durable}.jsonl", durable)
        journal.append({"a": 1})
        journal.append({"a": 2})
        journal.close()
    assert synced == [18, 9, 18, 18]  # and at the end


@pytest.mark.parametrize(
    "content, after",
    [
        (b'{"a": 1}\n{"a": 2', b'{"a": 1}\n{"b": 1}\n'),  # half of a record
        (b'{"a": 1}\n{', b'{"a": 1}\n{"b": 1}\n'),
        (b'{"a": 1}\n{"a": 2}', b'{"a": 1}\n{"a": 2}\n{"b": 1}\n'),  # all but its end
        (b'{"a": 1}\n\0\0\0', b'{"a": 1}\n{"b": 1}\n'),  # as after a power cut
        (b"a note", None),
        (b'{"a": 1}\na note', None),
        (b'[{"a": 1}]', None),
        (b"{\n  a note }", None),
        (b"{a}", None),
    ],
)
def test_a_journal_cuts_off_half_a_record_or_zeros_and_no_other_line(tmp_path, content, after):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    if after is None:
        with pytest.raises(UserError, match=r"notes\.txt ends in a line that is not a record"):
            Journal(path)
    else:
        journal = Journal(path)
        journal.append({"b": 1})
        journal.close()
    assert path.read_bytes() == (after or content)


def test_a_last_line_that_is_whole_and_of_another_kind_is_not_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"text": "another file"}')
    with pytest.raises(UserError, match="line 2 of "):
        read_metrics(tmp_path)


def test_a_read_only_file_system_is_one_clear_sentence(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr("pathlib.Path.unlink", refused)  # refused even for a missing file
    with pytest.raises(UserError, match="Read-only file system; choose another folder"):
        atomic_write(tmp_path / "x", "text")


@pytest.mark.parametrize("out", ["file/report.json", "folder"])
def test_an_out_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, capsys, out):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    begun = lambda path: pytest.fail("it has begun to work")  # noqa: E731
    monkeypatch.setattr("tinystory.student.checkpoint.find", begun)
    for command, argv in ((evaluate, ["run", "--corpus", "builtin"]), (sample, ["run"])):
        assert "cannot write" in fails(command.main, [*argv, "--out", str(tmp_path / out)], capsys)


OF_A_RUN = (
    "config.json metrics.jsonl stories.jsonl samples.jsonl replies.jsonl report.html "
    "checkpoints checkpoints/new checkpoints/chck_1M/model.safetensors"
).split()


@pytest.mark.parametrize("name", OF_A_RUN)
def test_an_out_among_the_files_of_a_run_is_refused_before_the_work(
    tmp_path, monkeypatch, capsys, name
):
    a_run(tmp_path / "run", 1)
    (tmp_path / "run" / "checkpoints" / "chck_1M").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.setattr(export_hf.checkpoint, "find", lambda path: path)
    monkeypatch.setattr(export_hf.checkpoint, "load", lambda *_: pytest.fail("it began to work"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for out in (str(tmp_path / "run" / name), str(tmp_path / "link" / name)):
        for command, argv in (
            (evaluate, ["run", "--corpus", "builtin", "--out", out]),
            (sample, ["run", "--out", out]),
            (export_hf, ["run", "--gguf", out]),
            (export_hf, ["run", out]),
        ):
            assert "among the files of a run" in fails(command.main, argv, capsys)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_out_of_another_name_may_lie_beside_a_run(tmp_path):
    a_run(tmp_path / "run", 1)
    for name in ("evaluation.json", "ours.jsonl", "new/config.json"):
        require_output(tmp_path / "run" / name)


def test_a_folder_appears_when_it_is_whole(tmp_path):
    (tmp_path / ".out.partial").mkdir()  # of a process that was killed
    (tmp_path / ".out.partial" / "half").touch()
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as partial:
        partial.mkdir()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "out") as partial:
        partial.mkdir()
        (partial / "file").touch()
        assert not (tmp_path / "out").exists()
    expected = ["out", "out/file"]
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == expected


@pytest.mark.parametrize("code, advice", [(errno.EFBIG, "ulimit -f"), (errno.EDQUOT, "free some")])
def test_a_lock_that_cannot_be_written_is_one_clear_sentence(tmp_path, monkeypatch, code, advice):
    """A quota, or a limit of a file's size: an empty file may still be made."""

    def refused(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("pathlib.Path.write_text", refused)
    with pytest.raises(UserError, match=f"cannot write .*{advice}"), locked(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())


def links_to(folder, target):
    """Symbolic links from every name that a temporary file in `folder` could be guessed to have."""
    names = ["config.json", "report.html", "student.gguf"]
    for name in names:
        for number in ("", f".{os.getpid()}"):
            (folder / f".{name}{number}.tmp").symlink_to(target)
    return names


def test_a_file_is_not_written_through_a_link_in_place_of_its_temporary_one(tmp_path, student):
    """Somebody who sends a folder could have put such a link there."""
    private = tmp_path / "private"
    private.write_text("mine")
    (tmp_path / "run").mkdir()
    names = links_to(tmp_path / "run", private)
    for name in names[:2]:
        atomic_write(tmp_path / "run" / name, "{}")
    gguf.write(tmp_path / "run" / names[2], student, Tokenizer.train(tiny_stories(200), 320))
    assert private.read_text() == "mine"
    assert not any((tmp_path / "run" / name).is_symlink() for name in names)


def test_an_output_never_replaces_a_pipe_or_a_device(tmp_path):
    """As root, a rename would replace /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="it is not a regular file"):
        require_output(pipe)
