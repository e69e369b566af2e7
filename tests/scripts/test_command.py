"""What all commands share, `errors.command`: errors in one sentence, and output that cannot be
printed."""

import errno
import gc
import io
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, fails

from lab import babylm, compare
from scripts import doctor, evaluate, export_hf, sample
from tinystory.evaluate.stories import read_samples
from tinystory.run import errors, paths, startup
from tinystory.run.errors import UserError, command
from tinystory.student import checkpoint

COMMAND = """
import os, sys
from tinystory.run.errors import Stop, UserError, command

stop = Stop()

@command
def main():
    if "opens" in sys.argv:
        with open(sys.argv[1], "w"):
            os.write(1, b"out"), os.write(2, b"err")
    for _ in range(100_000 if "prints" in sys.argv else 1):
        print("Ça va? 猫", flush="prints" in sys.argv)
        print("line", file=sys.stderr)
        if "saves" in sys.argv and stop.requested:
            open(sys.argv[1], "w").write("saved")
            return
    if "fails" in sys.argv:
        raise UserError("naïve")

main()
"""


def run(shell: str, path, *what: str, **options) -> subprocess.CompletedProcess:
    """COMMAND as "$@" of a shell's line."""
    program = [sys.executable, "-c", COMMAND, str(path), *what]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    environment |= options.pop("variables", {})
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    shell_line = ["bash", "-c", f"set -o pipefail; {shell}", "bash", *program]
    return subprocess.run(shell_line, env=environment, text=True, **streams)


@pytest.mark.parametrize(
    "shell", ['"$@" 2>&1 | head -1', '"$@" | head -1', '"$@" 2> >(head -1 >&2) | head -1']
)
@pytest.mark.parametrize("saves", [["saves"], []])
def test_a_command_whose_reader_has_gone_saves_and_ends_quietly(tmp_path, shell, saves):
    done = run(shell, tmp_path / "file", "prints", *saves)
    assert done.returncode == 128 + signal.SIGPIPE
    assert "Error" not in done.stdout + done.stderr and "Exception" not in done.stdout + done.stderr
    assert (tmp_path / "file").exists() == bool(saves)
    assert not saves or (tmp_path / "file").read_text() == "saved"


def test_a_reader_that_has_gone_at_the_end_hides_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = run('"$@"', tmp_path, "fails", stdout=writer)
    os.close(writer)
    assert done.returncode == 2 and done.stderr.splitlines() == ["line", "error: naïve"]


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error_and_no_file_takes_its_place(tmp_path, closed):
    done = run(f'"$@" {closed}', tmp_path / "file", "opens", "fails")
    assert done.returncode == 2
    assert "Error" not in done.stderr
    assert not (tmp_path / "file").read_text()
    assert done.stdout.splitlines() == (
        [] if ">&- " in f"{closed} ".replace("2>", "") else ["outÇa va? 猫"]
    )
    assert ("error: naïve" in done.stderr) == ("2>&-" not in closed)


def test_what_the_encoding_lacks_is_escaped(tmp_path):
    done = run('"$@"', tmp_path, "fails", variables={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and done.stdout == "\\xc7a va? \\u732b\n"
    assert done.stderr.splitlines() == ["line", "error: na\\xefve"]


def raises(error: BaseException):
    @command
    def main(argv: object) -> None:
        raise error

    return main


OUT_OF = [
    (MemoryError(), "not enough memory"),
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        "8 bytes",
    ),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "smaller sizes"),
    (RuntimeError("can't start new thread"), "ulimit -u"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "ulimit -v"),
    (
        OSError(errno.EMFILE, "Too many open files", "x"),
        "Too many open files: 'x'; raise the limit on open files",
    ),
    (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), "'aaa'; choose a shorter name"),
    (MemoryError("\x1b[2Jno room"), "([2Jno room)"),
    (
        PermissionError(errno.EACCES, "Permission denied", "run"),
        "Permission denied: 'run'; ask the owner",
    ),
    (
        OSError(errno.EROFS, "Read-only file system", "run"),
        "Read-only file system: 'run'; choose another folder",
    ),
]


@pytest.mark.parametrize("error, words", OUT_OF)
def test_what_the_machine_has_no_more_of_is_one_sentence(error, words, capsys):
    assert words in fails(raises(error), [], capsys)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), FileNotFoundError(errno.ENOENT, "No such file")]
)
def test_a_mistake_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        raises(error)([])


@pytest.mark.parametrize(
    "interrupt, code", [(KeyboardInterrupt(), 130), (KeyboardInterrupt(signal.SIGTERM), 143)]
)
def test_a_signal_ends_without_a_traceback(interrupt, code):
    with pytest.raises(SystemExit) as caught:
        raises(interrupt)([])
    assert caught.value.code == code


INTERRUPTED = """
import signal, sys

class CtrlC:
    def find_spec(self, name, *_):
        if name in ("torch", "tinystory.run.errors"):
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
"""
LAB = "babylm bench compare copied judge recipes reproduce track".split()
COMMANDS = [ROOT / "train_pretrain.py", ROOT / "train_interact.py"]
COMMANDS += sorted(ROOT.glob("scripts/*.py"))
COMMANDS = [path for path in COMMANDS if path.stem != "gpu_day"]  # the standard library alone


def test_a_command_to_be_copied_has_no_escape_sequences():
    assert paths.hint("train_interact.py", "--out", "run\x1b[2J").isprintable()


def interrupted(program, folder) -> subprocess.CompletedProcess:
    """A program that gets Ctrl-C during the imports."""
    (folder / "sitecustomize.py").write_text(INTERRUPTED)
    path = os.pathsep.join([str(folder), str(ROOT)])
    command = [sys.executable, str(program), "--help"]
    variables = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("program", COMMANDS, ids=lambda path: path.stem)
def test_ctrl_c_during_a_commands_imports_is_no_traceback(program, tmp_path):
    done = interrupted(program, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_during_an_entry_points_imports_is_no_traceback(tmp_path):
    (tmp_path / "tinystory-sample").write_text("from scripts.sample import main\nmain()\n")
    done = interrupted(tmp_path / "tinystory-sample", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_another_program_keeps_its_handler_of_ctrl_c(tmp_path):
    (tmp_path / "mine.py").write_text("import scripts.sample\nscripts.sample.main([])\n")
    done = interrupted(tmp_path / "mine.py", tmp_path)
    assert "KeyboardInterrupt" in done.stderr


def test_a_command_that_has_begun_handles_ctrl_c_itself():
    before = signal.signal(signal.SIGINT, startup.end_by)
    try:
        with pytest.raises(SystemExit, match="130"):
            command(signal.raise_signal)(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_garbage_is_collected_from_the_beginning_of_a_command_on():
    gc.disable()  # as while it imports
    try:
        assert command(gc.isenabled)()
    finally:
        gc.enable()
        gc.unfreeze()


def test_one_process_of_torchrun_says_what_is_wrong_and_a_rank_that_was_left_in_the_environment_too(
    monkeypatch, capsys
):
    monkeypatch.setenv("RANK", "1")
    assert fails(raises(UserError("x")), [], capsys) == "error: x"
    for name in set(errors.TORCHRUN) - {"RANK"}:
        monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit):
        raises(UserError("x"))([])
    assert not capsys.readouterr().err


def test_without_a_home_the_cache_is_asked_for(monkeypatch):
    for name in ("HOME", "TINYSTORY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    # raises KeyError, as for a uid without an entry
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(UserError, match=r"no home folder .* set HOME, or TINYSTORY_CACHE"):
        paths.cache_dir()


WRONG = """--stories 0|--stories -1|--temperature nan|--temperature -1|--temperature 1e9|--top-p 5
--top-p 0|--top-p nan|--top-k -3|--top-k 1e30
--seed 1180591620717411303424|--seed -1|--max-new-tokens -5"""


@pytest.mark.parametrize("argv", WRONG.replace("\n", "|").split("|"))
def test_a_number_out_of_range_is_refused_by_every_command_that_has_the_option(
    argv, tmp_path, capsys
):
    flag, value = argv.split()
    mains = (
        [sample.main]
        if flag.startswith("--top") or argv == "--stories 0"
        else [sample.main, evaluate.main]
    )
    for main in mains:  # for evaluate 0 stories are none
        assert fails(main, [str(tmp_path), f"{flag}={value}"], capsys).startswith(
            f"error: {flag} must be "
        )


@pytest.mark.parametrize(
    "main, word, words",
    [
        (export_hf.main, "--guff=out.gguf", "no option --guff: did you mean --gguf?"),
        (sample.main, "--temprature", "no option --temprature: did you mean --temperature?"),
        (evaluate.main, "--zzz", "no option --zzz: --help lists them all"),
        (compare.main, "--teacher_url", "did you mean --teacher-url?"),
    ],
)
def test_an_unknown_option_of_a_script_is_told_with_the_one_that_was_meant(
    main, word, words, tmp_path, capsys
):
    assert words in fails(main, [str(tmp_path), word], capsys)


def test_what_is_no_number_is_refused(tmp_path, capsys):
    for value in ("2.5", "x", "1e400", ""):
        line = fails(sample.main, [str(tmp_path), f"--stories={value}"], capsys)
        assert (
            line.startswith("error: --stories must be a whole number") and f"not '{value}'" in line
        )


def test_numbers_of_the_other_scripts_have_ranges_too(capsys):
    for main, argv in (
        (babylm.main, "--coreference=-1"),
        (evaluate.main, "--teacher-concurrency=0"),
        (doctor.main, "--teacher-max-tokens=0"),
    ):
        assert fails(main, [argv], capsys).startswith(f"error: {argv.split('=')[0]} must be ")


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def one_opening(monkeypatch):
    """Used instead of the built-in openings, which do not fit the context of the tests' student."""
    monkeypatch.setattr(sample, "Openings", lambda texts, seed: SimpleNamespace(held_out=["Once"]))


@pytest.mark.parametrize("end", ["\nnever read\n", ""])
def test_in_a_terminal_one_opening_after_another_is_asked_for(
    place, one_opening, capsys, monkeypatch, end
):
    """Until an empty line or the end of the input. Openings have another colour than stories."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    too_long = "a b c d e f g " * 20
    keyboard = Keyboard(f"Tom had a kite.\n{too_long}\nTom had a kite.\n{end}")
    monkeypatch.setattr(sys, "stdin", keyboard)
    options = "--stories 2 --max-new-tokens 8 --device cpu --temperature 9".split()
    sample.main([str(checkpoint.newest(place / "p")), *options])

    own, first, refused, again, *_ = re.split("Your opening .*?: ", capsys.readouterr().out)
    assert own.count("\x1b[36mOnce\x1b[0m") == 2
    for printed in (first, again):
        assert printed.count("\x1b[36mTom had a kite.\x1b[0m") == 2
    stories = re.findall(r"\x1b\[0m(.*?)\n(?:\n|$)", first + again, re.S)
    assert len(set(stories)) == 4, "each has random numbers of its own"
    assert refused.startswith("error: the opening (") and "story" not in refused.split("\n")[1]
    if end:
        assert keyboard.read() == "never read\n"


def test_no_opening_is_asked_for_beside_one_that_was_given(place, one_opening, capsys, monkeypatch):
    """Nor without a terminal, where the output has no colours."""
    run = str(checkpoint.newest(place / "p"))
    options = "--stories 1 --max-new-tokens 8 --device cpu".split()
    monkeypatch.setattr(sys, "stdin", Keyboard("Tom\n"))
    sample.main([run, *options])
    printed = capsys.readouterr().out
    assert "Your opening" not in printed and "\x1b" not in printed
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sample.main([run, *options, "--opening", "Once"])
    assert "Your opening" not in capsys.readouterr().out


@pytest.mark.parametrize("temperature", ["0", "1e-9", "100"])
def test_the_ends_of_a_range_are_of_use(place, temperature, capsys):
    more = f"--opening Once --stories 2 --max-new-tokens 4 --temperature {temperature} --top-k 1000000000 --top-p 1e-9"
    sample.main([str(checkpoint.newest(place / "p")), *more.split(), "--device", "cpu"])
    assert capsys.readouterr().out.count("--- story") == 2


def test_a_samples_file_is_read_by_evaluate(place, tmp_path, capsys):
    run, out = str(checkpoint.newest(place / "p")), tmp_path / "ours.jsonl"
    (tmp_path / "openings.txt").write_text("Tom had\nMia saw\n")
    more = ["--stories", "3", "--max-new-tokens", "4", "--device", "cpu", "--out", str(out)]
    sample.main([run, "--opening", str(tmp_path / "openings.txt"), *more])
    assert [story.opening for story in read_samples(out)] == ["Tom had", "Mia saw", "Tom had"]
    printed = capsys.readouterr().out
    assert printed.startswith(f"3 stories are in {out}\n") and "scripts/evaluate.py" in printed


HELP_OF_EACH = """
import contextlib, runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
path, files = list(sys.path), sys.argv[1:]
sys.argv[1:] = ["--help"]
for file in files:
    with contextlib.suppress(SystemExit):
        runpy.run_path(file, run_name="__main__")
    sys.path[:] = path  # so that the next command has to find the project by itself
    for name in [name for name in sys.modules if name.startswith(("tinystory", "lab", "train_"))]:
        del sys.modules[name]
"""


def test_a_command_finds_the_package_of_its_own_clone():
    """An environment with tinystory's dependencies alone. The finder of an editable install is left
    out."""
    files = [f"{ROOT}/scripts/{name}.py" for name in ("doctor", "watch")]
    files += [f"{ROOT}/lab/{name}.py" for name in LAB]
    command = [sys.executable, "-I", "-c", HELP_OF_EACH, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and done.stdout.count("usage: ") == len(files), done.stderr
