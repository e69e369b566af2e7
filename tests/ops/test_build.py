"""The build's failure modes: the real compiler and ninja on a library of two short files, in a cache of each test's.
A slow test compiles the kernels themselves.

Nothing here is timed: steps are held by files, and LIMIT only ends a test that hangs."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinystory.errors import UserError
from tinystory.ops import build

MODULE = """
#include <Python.h>
int answer();
static PyMethodDef methods[] = {
    {"answer", [](PyObject*, PyObject*) { return PyLong_FromLong(answer()); }, METH_NOARGS, nullptr}, {}};
static PyModuleDef module{PyModuleDef_HEAD_INIT, "tinystory_cpu", nullptr, -1, methods};
PyMODINIT_FUNC PyInit_tinystory_cpu() { return PyModule_Create(&module); }
"""
LIMIT = 1800  # seconds
RUN = "from tinystory.ops import build; from pathlib import Path; build.CSRC = Path({!r}); print(build.load().answer())"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with csrc/, and cc, a compiler that notes its calls. The first to find a file hold-<step> for its step,
    a source's name or link, renames it to `held`, waits until that is gone, compiles, and makes a file `released`."""
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/module.cpp").write_text(MODULE)
    (tmp_path / "csrc/cpu/answer.cpp").write_text('#include "answer.h"\nint answer() { return ANSWER; }\n')
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
        process.wait()
    STARTED.clear()
    (tmp_path / "held").unlink(missing_ok=True)  # compilers, which ninja gives process groups of their own, go on


STARTED: list[subprocess.Popen] = []


def start(place: Path) -> subprocess.Popen:
    words = [sys.executable, "-c", RUN.format(str(place / "csrc"))]
    pipe = subprocess.PIPE
    STARTED.append(subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, start_new_session=True))
    return STARTED[-1]


def run(place: Path) -> tuple[str, str]:
    """What the module answers, and stderr."""
    process = start(place)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    return out.strip(), err


def calls(place: Path) -> list[str]:
    """The compiler's calls since the last look."""
    path = place / "calls"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return sorted(found)


def test_it_compiles_what_changed_and_says_so_in_one_line(place):
    out, err = run(place)
    assert out == "42" and calls(place) == ["answer", "link", "module"]
    assert re.fullmatch(r"tinystory: compiling the kernels for this processor \(2 files, once\) \.\.\. \d+ s\n", err)
    assert run(place) == ("42", "") and calls(place) == []
    (place / "csrc/cpu/answer.h").write_text("#define ANSWER 43\n")
    out, err = run(place)
    assert out == "43" and calls(place) == ["answer", "link"] and "after a change in answer.h ..." in err


def test_the_compilers_message_reaches_the_user_and_the_next_build_goes_on(place):
    (place / "csrc/cpu/answer.h").write_text("#define ANSWER no_such_name\n")
    process = start(place)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode and "... failed" in err and "TINYSTORY_KERNELS=reference" in err
    said = err[err.index("UserError") :]
    assert "no_such_name" in said and "answer.cpp" in said and "-ffp-contract" not in said  # no command lines
    (place / "csrc/cpu/answer.h").write_text("#define ANSWER 7\n")
    assert run(place)[0] == "7"


def wait_for(file: Path, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + LIMIT
    while not file.exists():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.02)


def start_and_hold(place: Path, step: str) -> tuple[subprocess.Popen, Path, Path]:
    """A build that has come to this step and stays there, the file that holds it, and torch's lock."""
    (place / f"hold-{step}").touch()
    process = start(place)
    wait_for(place / "held", process)
    (lock,) = (place / "cache").rglob("lock")
    return process, place / "held", lock


def kill_at(place: Path, step: str) -> Path:
    """Kill a build that has come to this step, and ninja: no chance to tidy up. Returns torch's lock."""
    process, held, lock = start_and_hold(place, step)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    held.unlink()
    return lock


@pytest.mark.parametrize("step", ["module", "answer", "link"])
def test_a_killed_build_does_not_hinder_the_next(place, step):
    lock = kill_at(place, step)
    assert lock.exists(), "it stays behind"
    out, err = run(place)
    assert out == "42" and "waiting" not in err and not lock.exists()


def test_a_build_killed_before_it_compiles_or_after_it_does_not_hinder_the_next(place):
    assert run(place)[0] == "42"
    (library,) = (place / "cache").rglob("*.so")
    for left in ("", library.read_bytes()[:5000]):  # a lock alone; a lock, and a library that was not written whole
        (library.parent / "lock").touch()
        if left:
            library.write_bytes(left)
            (library.parent / ".ninja_log").unlink()
        assert run(place)[0] == "42"


def test_compilers_that_outlive_a_killed_build_do_not_reach_the_next(place):
    """An object that such a compiler writes would look newer than a source that was changed meanwhile."""
    process, held, _ = start_and_hold(place, "answer")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (place / "csrc/cpu/answer.h").write_text("#define ANSWER 43\n")
    assert run(place)[0] == "43"
    calls(place)
    held.unlink()
    wait_for(place / "released")
    assert run(place) == ("43", "") and "answer" not in calls(place)


def test_a_source_that_changes_while_others_compile_is_compiled_by_the_next_build(place):
    first, held, _ = start_and_hold(place, "link")
    (place / "csrc/cpu/answer.h").write_text("#define ANSWER 43\n")
    held.unlink()
    assert first.communicate(timeout=LIMIT)[0] == "42\n"
    assert run(place)[0] == "43"


def test_an_unchanged_library_is_loaded_without_torchs_builder(place):
    """It takes half a second to import."""
    assert run(place)[0] == "42"
    code = RUN.format(str(place / "csrc")) + "; import sys; print('torch.utils.cpp_extension' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "42\nFalse\n"


def two_at_once(place: Path) -> str:
    """Start a second build while the first links. Returns what both answer."""
    first, held, _ = start_and_hold(place, "link")
    second = start(place)
    assert "waiting for another process" in second.stderr.readline()
    held.unlink()
    said = [process.communicate(timeout=LIMIT) for process in (first, second)]
    assert said[0][0] == said[1][0] and said[1][1] == ""
    return said[0][0].strip()


def test_two_builds_at_once_build_once(place):
    assert two_at_once(place) == "42" and calls(place) == ["answer", "link", "module"]


@pytest.mark.slow
def test_the_kernels_survive_five_kills_and_two_builds_at_once_and_compile_what_changed(place):
    """The sources of csrc/, several minutes of compiling. Each build starts on what the last one, killed, has left."""
    shutil.rmtree(place / "csrc")
    shutil.copytree(build.CSRC, place / "csrc")
    module = place / "csrc/module.cpp"
    module.write_text(module.read_text().replace('m.def("instructions"', 'm.def("answer"'))
    for step in ("module", "attention", "engine_weights", "token_logprob", "link"):
        kill_at(place, step)
    calls(place)
    instructions = two_at_once(place)
    assert re.search("AVX|NEON|vectors", instructions)
    assert calls(place) == sorted([*(source.stem for source in build.cpu_sources()), "link"])
    (place / "csrc/cpu/sampling.cpp").touch()
    assert run(place)[0] == instructions and calls(place) == ["link", "sampling"]


def test_every_input_is_in_the_key(place, monkeypatch):
    sources = [place / "csrc/module.cpp", place / "csrc/cpu/answer.cpp"]
    folders = [build.library_folder("x", sources), build.library_folder("x", sources[:1])]
    folders += [build.library_folder("y", sources), build.library_folder("x", sources, "9.0")]
    monkeypatch.setattr(build, "macros", lambda command: "another processor, or compiler")
    folders.append(build.library_folder("x", sources))
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
    folders.append(build.library_folder("x", sources))
    monkeypatch.setattr(build.torch, "__version__", "9.9")
    folders.append(build.library_folder("x", sources))
    monkeypatch.setattr(build, "__version__", "9.9")  # an installer may give newer sources an older time
    folders.append(build.library_folder("x", sources))
    assert len(set(folders)) == len(folders)


def test_no_compiler_is_one_sentence_that_says_what_to_install(place, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match=r"no C\+\+ compiler found: install one .*apt install g\+\+"):
        build.command()
    monkeypatch.setenv("CXX", "/nonexistent/c++ -m64")
    with pytest.raises(UserError, match="CXX names /nonexistent/c"):
        build.command()
    assert not (place / "cache").exists()


def test_a_library_that_does_not_load_is_one_sentence(place):
    assert run(place)[0] == "42"
    library = next((place / "cache").rglob("*.so"))
    library.write_text("no machine code")
    process = start(place)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode and f"delete {library.parent} and start again" in err


def test_flags_are_those_that_the_compiler_knows(tmp_path, monkeypatch):
    """As Apple's clang on ARM was: no -march=native, no OpenMP."""
    script = tmp_path / "clang"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *-march=native*|*-fopenmp*) exit 1;; *) echo "#define __clang__ 1";; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"{script} -m64")
    assert build.command() == [str(script), "-m64", *build.FLAGS, "-mcpu=native", "-pthread"]


def test_reference_runs_without_a_compiler_and_says_so_once(tmp_path):
    code = (
        "import torch; from tinystory import ops; x = torch.randn(1, 5, 3, 1, 32);"
        "ops.causal_attention(x); ops.causal_attention(x); print(bool(ops.load()))"
    )
    env = {**os.environ, "TINYSTORY_KERNELS": "reference", "TINYSTORY_CACHE": str(tmp_path), "PATH": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n" and done.stderr.count("TINYSTORY_KERNELS=reference") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_or_locked_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    words = r"cannot be written or locked \({}\): set TINYSTORY_CACHE .*, or set TINYSTORY_KERNELS=reference"
    with pytest.raises(UserError, match=words.format("Not a directory")), build.locked(tmp_path / "file/kernels"):
        pytest.fail("no folder is there")

    def mkdir(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=words.format("Read-only file system")):
        patch.setattr(Path, "mkdir", mkdir)  # permissions do not stop root
        with build.locked(tmp_path / "kernels"):
            pytest.fail("no folder is there")

    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)  # as some network file systems do
    with pytest.raises(UserError, match=words.format("No locks available")), build.locked(tmp_path / "kernels"):
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
    """A Python as on macOS: without sched_getaffinity, /proc and sys.platform == 'linux'. The short library is built
    and loaded."""
    code = (
        "import torch; from pathlib import Path; from scripts import doctor; from tinystory import device, ops, runlog;"
        "doctor.main([]); print(device.peak_memory_mb(torch.device('cpu')), runlog.device_name('cpu'));"
        f"ops.build.CSRC = Path({str(place / 'csrc')!r}); print(ops.build.load().answer())"
    )
    done = subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\n42\n"), done.stderr
    assert "torch threads" in done.stdout
