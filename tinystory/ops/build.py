"""Compiles csrc/ for this machine at first use, with torch.utils.cpp_extension and ninja, and loads
the libraries.

There are two libraries. The CPU library defines every operator of `torch.ops.tinystory`. The CUDA
library (cuda.py) is built only when a GPU is first used, so that no problem with a GPU or a CUDA
toolkit affects a CPU run. Each library has a folder `cache_dir()/kernels/<name>-<key>`; the key is
a hash of everything that the machine code depends on, sources included. An operating-system lock
guards the folder. This lock ends with the process, unlike PyTorch's lock file."""

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import filelock
import ninja
import pybind11
import torch
from tqdm import tqdm

from tinystory import __version__
from tinystory.ops import fake
from tinystory.run.errors import UserError
from tinystory.run.files import file_hash
from tinystory.run.paths import ROOT, cache_dir

# the folder of a clone, or of an installed wheel
CSRC = ROOT / "csrc" if (ROOT / "csrc").is_dir() else ROOT / "tinystory/csrc"
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    # a loop of a micro-kernel that started in the middle of a cache line cost 3 % of a step
    "-falign-loops=64",
    # sampling needs each float operation as written; kernels use fma() explicitly
    "-ffp-contract=off",
]
INSTEAD = "set TINYSTORY_KERNELS=reference to run in plain PyTorch"
NAME = "tinystory_cpu"
MINUTES = "a minute or more"
LAUNCHERS = ("ccache", "sccache", "distcc")
OLD = ".old"  # suffix of folders to remove
# hides a warning about nvcc without a GPU
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


@functools.cache
def load() -> ModuleType:
    """The module of the CPU kernels, which is built first if necessary. Registers the operators.
    Raises UserError if the build fails."""
    module = build(NAME, cpu_sources())
    fake.register()
    return module


def cpu_sources() -> list[Path]:
    """The source files of the CPU library."""
    return sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")])


def build(
    name: str,
    sources: list[Path],
    gpus: str = "",
    toolkit: str = "",
    defines: Sequence[str] = (),
) -> ModuleType:
    """The module of a library, which is compiled first if necessary. gpus: compute capabilities of
    a CUDA library, such as "8.0;9.0". toolkit: version of nvcc, part of the key. defines: flags of
    the preprocessor. Raises UserError if the library cannot be built; if a build has failed before
    with the same key, at once with the same message."""
    folder = library_folder(name, sources, gpus, toolkit, defines)
    library = folder / f"{name}.so"
    failed = folder / "failed"
    with locked(folder):
        try:
            if intact(library):
                with contextlib.suppress(ImportError):
                    return imported(name, library)
            if failed.exists():
                raise UserError(failed.read_text())
            target = "kernels for this processor"
            if gpus:
                target = f"{name.removeprefix('tinystory_')} kernels for {gpus}"
            with announced(folder, target, len(sources)):
                module = compiled(name, sources, folder, gpus, defines)
            # mark the library as built, unless a source was changed during the build
            if library_folder(name, sources, gpus, toolkit, defines) == folder:
                (folder / "built").write_text(file_hash(library))
            return module
        except (RuntimeError, OSError, ImportError, ValueError) as error:
            problem = build_problem(str(error), folder)
            passing = any(
                words in str(error) for words in ("No space left", "Killed", "out of memory")
            )
            if gpus and not passing:  # nvcc takes minutes to fail
                failed.write_text(problem)
            raise UserError(problem) from None


# What nvcc or PyTorch says if it does not fit the machine, and what to do.
MISFITS = {
    "exception specification is incompatible": (
        "this CUDA toolkit does not know the C library of this system (glibc 2.42 needs CUDA 13.2): "
        "install a newer CUDA toolkit"
    ),
    "unsupported gpu architecture": (
        "nvcc does not know this GPU: install a newer CUDA toolkit, and a PyTorch for its version"
    ),
    "unknown cuda arch": "this PyTorch does not know this GPU: install a newer PyTorch",
    "unsupported gnu version": (
        "nvcc refuses this C++ compiler: name an older one, as in CC=gcc-13 CXX=g++-13"
    ),
}


def build_problem(output: str, folder: Path) -> str:
    """The message of a failed build: why in the first line, then the end of the compiler's
    output."""
    lowered = output.lower()
    reasons = [sentence for words, sentence in MISFITS.items() if words in lowered]
    errors = [line.strip() for line in output.splitlines() if re.search(r"\berror\b", line)]
    reason = (reasons or errors or output.splitlines() or ["no message"])[0]
    again = f"to try again, delete {folder}"
    return (
        f"the kernels cannot be built here: {reason[:500]}\n{output[-4000:]}\n({again}; {INSTEAD})"
    )


def say(sentence: str) -> None:
    """Print a line on stderr, above any progress bar."""
    tqdm.write(f"tinystory: {sentence}", file=sys.stderr)


@contextlib.contextmanager
def announced(folder: Path, target: str, count: int) -> Iterator[None]:
    """Context for compiling in a new, empty folder. Prints a line on stderr before and after; on a
    terminal, shows a progress bar of compiled files, because PyTorch reports no progress."""
    reason = "again, because they are damaged" if (folder / "built").exists() else "once"
    say(f"compiling the {target} ({reason}, {MINUTES})")
    renew(folder)
    started = time.monotonic()
    bar = tqdm(total=count, desc="compiling", unit="file", leave=False, disable=None)
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.5):
            bar.n = len(list(folder.glob("*.o")))
            bar.refresh()

    watcher = threading.Thread(target=watch)
    watcher.start()
    outcome = "failed"
    try:
        yield
        outcome = f"took {time.monotonic() - started:.0f} s"
    finally:
        finished.set()
        watcher.join()
        bar.close()
        say(f"compiling {outcome}")


def renew(folder: Path) -> None:
    """Replace this folder by an empty one. Compilers of a killed build may still write to the old
    folder; then a later build removes the old folder."""
    folder.rename(tempfile.mkdtemp(OLD, dir=folder.parent))
    folder.mkdir()
    for old in folder.parent.glob(f"*{OLD}"):
        shutil.rmtree(old, ignore_errors=True)


def intact(library: Path) -> bool:
    """Whether a library is unchanged since the build. Loading a truncated library would end Python
    with SIGBUS."""
    built = library.with_name("built")
    return library.exists() and built.exists() and built.read_text() == file_hash(library)


def compiled(
    name: str, sources: list[Path], folder: Path, gpus: str, defines: Sequence[str]
) -> ModuleType:
    """The module of a library, compiled in this folder."""
    from torch.utils import cpp_extension  # here, because the import takes half a second

    compiler, *flags = command()
    settings = {
        "CXX": compiler,
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",  # no warning about unknown compilers
        # no ccache: a cache that is shared with other machines does not know for which processor
        # -march=native was compiled
        "TORCH_NO_COMPILER_WRAPPER": "1",
        "TORCH_CUDA_ARCH_LIST": gpus,
        "PATH": f"{ninja.BIN_DIR}:{os.environ.get('PATH', os.defpath)}",
    }
    # PyTorch's copy of pybind11, with which PyTorch is built, has priority. The package pybind11 is
    # for builds of PyTorch without a copy (conda-forge, Debian).
    pybind = f"-isystem {shlex.quote(pybind11.get_include())}"
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        return cpp_extension.load(
            name,
            [str(source) for source in sources],
            extra_cflags=[*flags, pybind, *defines],
            extra_cuda_cflags=["-std=c++20", "-O3", *defines],
            extra_ldflags=flags[-1:],
            build_directory=str(folder),
            with_cuda=bool(gpus),
        )
    finally:
        os.environ.clear()
        os.environ.update(before)


def imported(name: str, library: Path) -> ModuleType:
    """The module in the file `library`, after importing it."""
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command() -> list[str]:
    """The C++ compiler ($CXX, or the first of c++, g++, clang++) and our flags. The last flag is
    the one for threads. A launcher before the compiler, such as ccache, is left out. The code is for
    this processor, unless $CXX names another processor, such as "c++ -march=x86-64-v3". Raises
    UserError if there is no compiler."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen and Path(chosen[0]).name in LAUNCHERS:
        del chosen[0]
    names = chosen[:1] or ["c++", "g++", "clang++"]
    found = [name for name in names if shutil.which(name)]
    if not found:
        install = "Debian, Ubuntu: apt install g++; macOS: xcode-select --install"
        advice = f"install one ({install}), name it in CXX, or {INSTEAD}"
        raise UserError(f"no C++ compiler found, looked for {', '.join(names)}: {advice}")
    compiler = found[:1] + chosen[1:]
    native: list[str] = []
    if not re.search("-m(arch|cpu)=", " ".join(compiler)):
        known = [flag for flag in ("-march=native", "-mcpu=native") if macros([*compiler, flag])]
        native = known[:1]
    # GCC's OpenMP runtime is also PyTorch's. Other compilers have another runtime, or none; with
    # them, csrc/cpu/thread_pool.h provides threads.
    threads = "-pthread" if "__clang__" in macros(compiler) else "-fopenmp"
    return compiler + FLAGS + native + [threads]


def macros(command: list[str]) -> str:
    """The predefined macros of a compiler, which include the version and the instruction sets; ""
    if the compiler rejects a flag."""
    process = subprocess.run(
        [*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True
    )
    return process.stdout if process.returncode == 0 else ""


def library_folder(
    name: str,
    sources: list[Path],
    gpus: str = "",
    toolkit: str = "",
    defines: Sequence[str] = (),
) -> Path:
    """The folder of a library. The name contains a hash of everything that the machine code depends
    on."""
    parts = [__version__, torch.__version__, str(torch.version.git_version), sys.version]
    compiler = command()
    parts += compiler
    parts += [macros(compiler), gpus, toolkit, *defines]
    files: list[Path] = []
    for folder in {CSRC} | {source.parent for source in sources}:
        files += folder.glob("[!.]*.[ch]*")  # without hidden copies of an editor
    for file in sorted(files):
        parts.append(f"{file.relative_to(CSRC)} {file_hash(file)}")
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return cache_dir().absolute() / "kernels" / f"{name}-{digest[:16]}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context that holds the lock of a folder. Raises UserError if the folder cannot be written or
    locked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.with_suffix(".lock"))
        try:
            held = lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"waiting for another process or thread that is compiling the kernels ({MINUTES})")
            held = lock.acquire()
    except OSError as error:
        problem = f"{folder} cannot be written or locked ({error.strerror})"
        advice = f"set TINYSTORY_CACHE to a writable folder on a local disk, or {INSTEAD}"
        raise UserError(f"{problem}: {advice}") from None
    with held:
        yield
