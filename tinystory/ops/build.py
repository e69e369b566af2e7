"""Compiles csrc/ for this machine through torch.utils.cpp_extension and ninja, at first use, and loads it.

There are two libraries: the CPU's, which defines every operator of `torch.ops.tinystory`, and the GPU's (cuda.py),
which is built only when a GPU is first used: so no GPU or CUDA toolkit can keep a CPU run from working.

Each has a folder `cache_dir()/kernels/<name>-<key>`. The key covers all that the machine code depends on except what
the sources say, which ninja follows, so that it compiles only what changed. A lock of the operating system guards the
folder. It ends with its holders: a killed build never blocks the next, and torch's own lock file, which such a build
leaves behind, is removed under it.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import ninja
import pybind11
import torch

from tinystory.errors import UserError
from tinystory.paths import cache_dir

PACKAGE = Path(__file__).resolve().parents[1]
CSRC = next((p for p in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if p.is_dir()), PACKAGE / "csrc")  # wheel, clone
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-ffp-contract=off"]  # sampling needs each float step as written; kernels write fma() where they want one
INSTEAD = "set TINYSTORY_KERNELS=reference to run in plain PyTorch"


@functools.cache
def load() -> ModuleType:
    """The Python module of the CPU kernels, built first if need be; importing it registers the operators with torch.

    Raises UserError if there is no C++ compiler, or with the compiler's message if it fails."""
    return build("tinystory_cpu", [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")])


def build(name: str, sources: list[Path], gpus: str = "", toolkit: str = "") -> ModuleType:
    """Compile and load a library: with `gpus`, as in TORCH_CUDA_ARCH_LIST, one for CUDA."""
    compiler = find_compiler()
    flags = machine_flags(compiler)
    folder = library_folder(name, sources, [compiler[0], *flags], gpus, toolkit)
    bundled_later = f"-isystem {shlex.quote(pybind11.get_include())}"  # see pyproject.toml
    settings = {"CXX": compiler[0], "PATH": os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])}
    # Without these, torch writes about compilers that it does not know, and takes ccache, which may hold the code of
    # another machine that shares this home.
    settings |= {"TORCH_DONT_CHECK_COMPILER_ABI": "1", "TORCH_NO_COMPILER_WRAPPER": "1", "TORCH_CUDA_ARCH_LIST": gpus}
    with locked(folder), environment(settings), progress(folder / f"{name}.so", sources, gpus):
        from torch.utils import cpp_extension  # here, because it takes half a second to import

        try:
            return cpp_extension.load(
                name,
                [str(source) for source in sorted(sources)],
                extra_cflags=[*flags, bundled_later],
                extra_cuda_cflags=["-std=c++20", "-O3"],
                extra_ldflags=[flag for flag in flags if flag in ("-fopenmp", "-pthread")],
                build_directory=str(folder),
                with_cuda=bool(gpus),
            )
        except ImportError as error:
            raise UserError(f"cannot load the kernels ({error}); delete {folder} and start again") from None
        except (RuntimeError, OSError) as error:
            failed = re.findall(r"^FAILED: .*\n.*\n((?:(?!\[\d+/|ninja: ).*\n)*)", str(error), re.MULTILINE)
            said = "".join(failed).strip() or str(error)
            raise UserError(f"the kernels do not compile; the compiler says:\n{said[:4000]}\n({INSTEAD})") from None


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else the first of c++, g++, clang++."""
    names = shlex.split(os.environ.get("CXX", ""))
    if names and not shutil.which(names[0]):
        raise UserError(f"CXX names {names[0]}, which is not there; unset CXX or name a C++ compiler")
    found = names or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not found:
        raise UserError(
            f"no C++ compiler found: install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install),"
            f" or {INSTEAD}"
        )
    return found


def machine_flags(compiler: list[str]) -> list[str]:
    """The rest of the command: its own flags, FLAGS, and what it knows for this processor and for threads."""
    native = [flag for flag in ("-march=native", "-mcpu=native") if macros([*compiler, flag])][:1]
    # GCC's OpenMP is torch's too. Another compiler has another or none: there, csrc/cpu/parallel.h starts threads.
    threads = "-pthread" if "__clang__" in macros(compiler) else "-fopenmp"
    return [*compiler[1:], *FLAGS, *native, threads]


def macros(command: list[str]) -> str:
    """What the compiler predefines, its version and the processor's instructions among it; '' for unknown flags."""
    command = [*command, "-dM", "-E", "-x", "c++", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def library_folder(name: str, sources: list[Path], command: list[str], *more: str) -> Path:
    """Keyed by everything that the machine code depends on, except what the sources say."""
    parts = [torch.__version__, str(torch.version.git_version), sys.version, *command, macros(command)]
    parts += [*more, *map(str, sorted(sources))]
    return cache_dir().absolute() / "kernels" / f"{name}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process and, as their standard input, the compilers that it starts: after a kill of
    this process alone the lock lasts until they end."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("tinystory: waiting for another process that compiles the kernels", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        stdin = os.dup(0)
        os.dup2(file.fileno(), 0)
        try:
            (folder / "lock").unlink(missing_ok=True)  # torch's, of a build that was killed
            yield
        finally:
            os.dup2(stdin, 0)
            os.close(stdin)


@contextlib.contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def progress(library: Path, sources: list[Path], gpus: str) -> Iterator[None]:
    """One line on stderr if there is something to compile: what, and how long it took."""
    built = library.stat().st_mtime if library.exists() else 0
    changed = [p.name for d in {CSRC, *(s.parent for s in sources)} for p in d.glob("*.*") if p.stat().st_mtime > built]
    if changed:
        kind = f"CUDA kernels for compute capability {gpus}" if gpus else "kernels for this CPU"
        why = f"after a change in {', '.join(changed)}" if built else f"({len(sources)} files, once)"
        print(f"tinystory: compiling the {kind} {why} ...", end=" ", file=sys.stderr, flush=True)
    started, outcome = time.monotonic(), "failed"
    try:
        yield
        outcome = f"{time.monotonic() - started:.0f} s"
    finally:
        if changed:
            print(outcome, file=sys.stderr)
