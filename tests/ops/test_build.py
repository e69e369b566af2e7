"""The build's failure modes: the real compiler and ninja on a library of two short files, in a
cache of each test's.

Nothing here is timed: steps are held by files, and LIMIT only ends a test that hangs."""

import contextlib
import errno
import fcntl
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinystory.ops import build
from tinystory.run.errors import UserError

MODULE = """
#include <Python.h>
int answer();
static PyMethodDef methods[] = {
    {"answer", [](PyObject*, PyObject*) { return PyLong_FromLong(answer()); }, METH_NOARGS, nullptr}, {}};
static PyModuleDef module{PyModuleDef_HEAD_INIT, "tinystory_cpu", nullptr, -1, methods};
PyMODINIT_FUNC PyInit_tinystory_cpu() { return PyModule_Create(&module); }
"""
LIMIT = 1800  # seconds


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with csrc/, and cc, a compiler that records each call. A step is the name of a
    source, or link. The first call that finds a file hold-<step> renames the file to `held`, waits
    until `held` is gone, compiles, and makes a file `released`."""
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/module.cpp").write_text(MODULE)
    (tmp_path / "csrc/cpu/answer.cpp").write_text(
        '#include "answer.h"\nint answer() { return ANSWER; }\n'
    )
    (tmp_path / "csrc/cpu/answer.h").write_text("#define ANSWER 42\n")
    script = tmp_path / "cc"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *-dM*) exec c++ "$@";; esac\nwhat=link\n'
        'for word; do case $word in *.cpp) what=$(basename "$word" .cpp);; esac; done\n'
        f"echo $what >> {tmp_path}/calls\n"
        f'mv {tmp_path}/hold-$what {tmp_path}/held 2>/dev/null || exec c++ "$@"\n'
        f"while [ -e {tmp_path}/held ]; do sleep 0.1; done\n"
        f'c++ "$@"; code=$?; touch {tmp_path}/released; exit $code\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("TINYSTORY_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    for process in STARTED:  # that a failed test has left running
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    STARTED.clear()
    # compilers, which ninja gives process groups of their own, go on
    (tmp_path / "held").unlink(missing_ok=True)


# importing torch takes seconds: here once for all
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tinystory.ops.build", "torch.utils.cpp_extension"])
STARTED: list[multiprocessing.Process] = []


class Build(FORKED.Process):
    """A process that builds and loads the library, and writes the library's answer to a file."""

    def __init__(self, place: Path):
        super().__init__()
        self.place, self.environment = place, dict(os.environ)
        self.out, self.err = place / f"out{len(STARTED)}", place / f"err{len(STARTED)}"
        STARTED.append(self)
        self.start()

    def run(self) -> None:
        os.setsid()
        os.environ.update(self.environment)
        for number, file in ((1, self.out), (2, self.err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        build.CSRC = self.place / "csrc"
        print(build.build(build.NAME, build.cpu_sources()).answer())

    def output(self) -> tuple[str, str]:
        self.join(LIMIT)
        assert not self.is_alive()
        return self.out.read_text().strip(), self.err.read_text()


def run(place: Path) -> tuple[str, str]:
    """What the module answers, and stderr."""
    process = Build(place)
    out, err = process.output()
    assert process.exitcode == 0, err
    return out, err


def calls(place: Path) -> list[str]:
    """The compiler's calls since the last look."""
    path = place / "calls"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return sorted(names)


def test_it_compiles_once_for_each_content_of_the_sources_and_says_so_before_and_after(place):
    out, err = run(place)
    assert out == "42" and calls(place) == ["answer", "link", "module"]
    assert re.fullmatch(
        r"tinystory: compiling the kernels for this processor \(once, a minute or more\)\n"
        r"tinystory: compiling took \d+ s\n",
        err,
    )
    assert run(place) == ("42", "") and calls(place) == []
    header = place / "csrc/cpu/answer.h"
    older = header.stat().st_mtime - 1000
    # of the same size, and older, as an archive restores it
    header.write_text("#define ANSWER 43\n")
    os.utime(header, (older, older))
    assert run(place)[0] == "43" and calls(place) == ["answer", "link", "module"]
    header.write_text("#define ANSWER 42\n")
    assert run(place) == ("42", "") and calls(place) == []


def test_the_compilers_message_reaches_the_user_and_the_next_build_goes_on(place):
    (place / "csrc/cpu/answer.h").write_text("#define ANSWER no_such_name\n")
    process = Build(place)
    _, err = process.output()
    assert process.exitcode and "compiling failed\n" in err and "TINYSTORY_KERNELS=reference" in err
    message = err[err.index("UserError") :]
    assert "no_such_name" in message and "answer.cpp" in message
    (place / "csrc/cpu/answer.h").write_text("#define ANSWER 7\n")
    assert run(place)[0] == "7"


def wait_until(condition, process: Build | None = None) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.is_alive())
        time.sleep(0.02)


def test_a_terminal_sees_how_many_files_are_compiled(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    folder = tmp_path / "folder"
    folder.mkdir()
    with build.announced(folder, "kernels", 3):
        (folder / "answer.o").touch()
        wait_until(lambda: "1/3" in terminal.getvalue())


def start_and_hold(place: Path, step: str) -> tuple[Build, Path, Path]:
    """A build that waits at this step, the file that holds the build, and torch's lock."""
    (place / f"hold-{step}").touch()
    process = Build(place)
    wait_until((place / "held").exists, process)
    (lock,) = (place / "cache").rglob("lock")
    return process, place / "held", lock


def kill_at(place: Path, step: str) -> Path:
    """Kill a build at this step, and ninja, so that neither can tidy up. Returns torch's lock."""
    process, held, lock = start_and_hold(place, step)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    held.unlink()
    return lock


@pytest.mark.parametrize("step", ["module", "answer", "link"])
def test_a_killed_build_does_not_hinder_the_next(place, step):
    lock = kill_at(place, step)
    assert lock.exists(), "it stays behind"
    lock.write_text("killed")
    out, err = run(place)
    assert out == "42" and "waiting" not in err
    # torch 2.15 leaves a new one, which nothing holds
    assert not lock.exists() or lock.read_text() != "killed"


def test_a_damaged_library_is_built_again_and_not_loaded(place):
    assert run(place)[0] == "42"
    (library,) = (place / "cache").rglob("*.so")
    sound = library.read_bytes()
    # the first ended Python with SIGBUS
    for damaged in (sound[:5000], sound[:-1] + b"x", b"no machine code"):
        library.write_bytes(damaged)
        out, err = run(place)
        assert out == "42" and "(again, because they are damaged, " in err and err.count("\n") == 2
    assert run(place) == ("42", "")


def test_compilers_that_outlive_a_killed_build_do_not_reach_the_next(place):
    process, held, _ = start_and_hold(place, "answer")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert run(place)[0] == "42"
    (objects,) = {path.parent for path in (place / "cache").rglob("*.o")}
    before = {path.name: path.stat().st_mtime_ns for path in objects.iterdir()}
    held.unlink()
    wait_until((place / "released").exists)
    assert {path.name: path.stat().st_mtime_ns for path in objects.iterdir()} == before


ORPHAN = """
import itertools
for i in itertools.count():
    open(f"object{i % 100}", "w").close()
"""


def test_a_build_beside_a_compiler_that_keeps_writing_succeeds_and_the_next_sweeps_what_is_left(
    place,
):
    assert run(place)[0] == "42"
    (library,) = (place / "cache").rglob("*.so")
    library.write_text("no machine code")
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN], cwd=library.parent, stderr=subprocess.DEVNULL
    ) as orphan:
        try:
            wait_until((library.parent / "object99").exists)
            assert run(place)[0] == "42"
        finally:
            orphan.kill()
    assert not list(library.parent.glob("object*"))
    library.write_text("no machine code")
    assert run(place)[0] == "42"
    assert not list(library.parent.parent.glob(f"*{build.OLD}"))


def test_a_source_that_changes_while_others_compile_is_compiled_by_the_next_build(place):
    first, held, _ = start_and_hold(place, "link")
    (place / "csrc/cpu/answer.h").write_text("#define ANSWER 43\n")
    held.unlink()
    assert first.output()[0] == "42"
    assert run(place)[0] == "43"
    (place / "csrc/cpu/answer.h").write_text("#define ANSWER 42\n")
    calls(place)
    assert run(place)[0] == "42" and "answer" in calls(place), (
        "what was compiled of both is not kept"
    )


def test_an_unchanged_library_is_loaded_without_torchs_builder(place, monkeypatch):
    """It takes half a second to import."""
    assert run(place)[0] == "42"
    monkeypatch.setattr(build, "CSRC", place / "csrc")
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)  # importing it fails
    assert build.build(build.NAME, build.cpu_sources()).answer() == 42


def two_at_once(place: Path) -> str:
    """Start a second build while the first links. Returns the answers of both."""
    first, held, _ = start_and_hold(place, "link")
    second = Build(place)
    wait_until(lambda: second.err.exists() and second.err.read_text(), second)
    held.unlink()
    (answer, _), (same, err) = first.output(), second.output()
    assert answer == same and re.fullmatch("tinystory: waiting for another process .*\n", err)
    return answer


def test_two_builds_at_once_build_once(place):
    assert two_at_once(place) == "42" and calls(place) == ["answer", "link", "module"]


def test_every_input_is_in_the_key(place, monkeypatch):
    sources = [place / "csrc/module.cpp", place / "csrc/cpu/answer.cpp"]
    monkeypatch.setattr(build, "CSRC", place / "csrc")
    folders = [build.library_folder("x", sources), build.library_folder("x", sources[:1])]
    for source in (place / "csrc/cpu/answer.h", sources[1]):
        source.write_text(source.read_text() + "//\n")
        folders.append(build.library_folder("x", sources))
    folders += [build.library_folder("y", sources), build.library_folder("x", sources, "9.0")]
    monkeypatch.setattr(build, "macros", lambda command: "another processor, or compiler")
    folders.append(build.library_folder("x", sources))
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
    folders.append(build.library_folder("x", sources))
    monkeypatch.setattr(build.torch, "__version__", "9.9")
    folders.append(build.library_folder("x", sources))
    monkeypatch.setattr(build, "__version__", "9.9")
    folders.append(build.library_folder("x", sources))
    assert len(set(folders)) == len(folders)


def test_no_compiler_is_one_sentence_that_says_what_to_install(place, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(
        UserError,
        match=r"no C\+\+ compiler found, .* c\+\+, g\+\+, clang\+\+: .*apt install g\+\+",
    ):
        build.command()
    monkeypatch.setenv("CXX", "/nonexistent/c++ -m64")
    with pytest.raises(UserError, match=r"looked for /nonexistent/c\+\+: .*CXX"):
        build.command()
    assert not (place / "cache").exists()


def test_a_library_that_does_not_load_is_built_again(place):
    assert run(place)[0] == "42"
    (library,) = (place / "cache").rglob("*.so")
    library.write_text("no machine code")
    library.with_name("built").write_text(build.file_hash(library))
    out, err = run(place)
    assert out == "42" and "(again, because they are damaged, " in err
    assert run(place) == ("42", "")


def test_flags_are_those_that_the_compiler_knows(tmp_path, monkeypatch):
    """Like Apple's old clang on ARM: no -march=native, no OpenMP."""
    script = tmp_path / "clang"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *-march=native*|*-fopenmp*) exit 1;; *) echo "#define __clang__ 1";; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"{script} -m64")
    assert build.command() == [str(script), "-m64", *build.FLAGS, "-mcpu=native", "-pthread"]


def test_a_launcher_before_the_compiler_is_left_out(monkeypatch):
    monkeypatch.setenv("CXX", "/usr/bin/ccache c++ -m64")
    assert build.command()[:2] == ["c++", "-m64"]


def test_the_users_processor_takes_the_place_of_this_one(monkeypatch):
    monkeypatch.setenv("CXX", "c++ -march=x86-64-v3")
    assert not any("native" in flag for flag in build.command())


def test_reference_runs_without_a_compiler_and_says_so_once(tmp_path):
    code = (
        "import torch; from tinystory import ops; x = torch.randn(1, 5, 3, 1, 32);"
        "ops.causal_attention(x); ops.causal_attention(x); print(bool(ops.load()))"
    )
    env = {
        **os.environ,
        "TINYSTORY_KERNELS": "reference",
        "TINYSTORY_CACHE": str(tmp_path),
        "PATH": "/nonexistent",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n" and done.stderr.count("TINYSTORY_KERNELS=reference") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_or_locked_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    words = r"cannot be written or locked \({}\): set TINYSTORY_CACHE .*, or set TINYSTORY_KERNELS=reference"
    with (
        pytest.raises(UserError, match=words.format("Not a directory")),
        build.locked(tmp_path / "file/kernels"),
    ):
        pytest.fail("no folder is there")

    def mkdir(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=words.format("Read-only file system")),
    ):
        patch.setattr(Path, "mkdir", mkdir)  # permissions do not stop root
        with build.locked(tmp_path / "kernels"):
            pytest.fail("no folder is there")

    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)  # as some network file systems do
    with (
        pytest.raises(UserError, match=words.format("No locks available")),
        build.locked(tmp_path / "kernels"),
    ):
        pytest.fail("it is not locked")


def test_windows_is_one_sentence_that_names_wsl():
    code = "import sys; sys.platform = 'win32'; sys.modules.update(fcntl=None, resource=None); import tinystory.config"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "WSL" in done.stderr and done.stderr.count("\n") == 1


WITHOUT = """
import os, sys, sysconfig
import torch.utils.cpp_extension  # while sys.platform is still true: it goes by the linker that is here
sysconfig.get_config_vars()  # and this by the file of the Python that is here
for name in ("sched_getaffinity", "sched_setaffinity", "pidfd_open", "posix_fadvise"):
    if hasattr(os, name): delattr(os, name)
import builtins, io
real = io.open
def without_proc(path, *args, **kwargs):
    if str(path).startswith("/proc"): raise FileNotFoundError(path)
    return real(path, *args, **kwargs)
builtins.open = io.open = without_proc
sys.platform = "darwin"
"""


def test_nothing_needs_what_only_linux_has(place):
    """A Python as on macOS: without sched_getaffinity, /proc and sys.platform == 'linux'. The short
    library is built and loaded."""
    code = (
        "import torch; from pathlib import Path; from scripts import doctor; from tinystory import ops;"
        "from tinystory.run import device;"
        "doctor.main([]); print(device.peak_memory_mb(torch.device('cpu')), device.device_name('cpu'));"
        f"ops.build.CSRC = Path({str(place / 'csrc')!r}); "
        "print(ops.build.build(ops.build.NAME, ops.build.cpu_sources()).answer())"
    )
    done = subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\n42\n"), done.stderr
    assert "torch threads" in done.stdout
