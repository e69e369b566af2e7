"""Compiles csrc/ for this machine with torch.utils.cpp_extension and ninja, at first use, and loads
it.

There are two libraries: the CPU's, which defines every operator of `torch.ops.tinystory`, and the
GPU's (cuda.py), which is built only when a GPU is first used, so that no GPU or CUDA toolkit can
keep a CPU run from working. Each has a folder `cache_dir()/kernels/<name>-<key>`; the key is a hash
of all that the machine code depends on, sources included. An operating-system lock guards it, which
ends with its process, unlike torch's lock file."""

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
from collections.abc import Iterator
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

# a clone's, or a wheel's
CSRC = ROOT / "csrc" if (ROOT / "csrc").is_dir() else ROOT / "tinystory/csrc"
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    # a micro-kernel's loop that began in the middle of a cache line cost 3 % of a step
    "-falign-loops=64",
    # sampling needs each float step as written; kernels write fma() where they want one
    "-ffp-contract=off",
]
INSTEAD = "set TINYSTORY_KERNELS=reference to run in plain PyTorch"
NAME = "tinystory_cpu"
MINUTES = "a minute or more"
OLD = ".old"  # suffix of folders that are to be removed
# it warns of nvcc without a GPU
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


@functools.cache
def load() -> ModuleType:
    """The CPU kernels' module, built first if need be; registers the operators. Raises UserError on
    failure."""
    module = build(NAME, cpu_sources())
    fake.register()
    return module


def cpu_sources() -> list[Path]:
    return sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")])


def build(name: str, sources: list[Path], gpus: str = "", toolkit: str = "") -> ModuleType:
    """Load a library, compiled first if need be. gpus: compute capabilities, "8.0;9.0", of a CUDA
    library."""
    folder = library_folder(name, sources, gpus, toolkit)
    library = folder / f"{name}.so"
    with locked(folder):
        try:
            if intact(library):
                with contextlib.suppress(ImportError):
                    return imported(name, library)
            target = f"CUDA kernels for {gpus}" if gpus else "kernels for this processor"
            with announced(folder, target, len(sources)):
                module = compiled(name, sources, folder, gpus)
            # no source has changed meanwhile
            if library_folder(name, sources, gpus, toolkit) == folder:
                (folder / "built").write_text(file_hash(library))
            return module
        except (RuntimeError, OSError, ImportError) as error:
            raise UserError(
                f"the kernels cannot be built here:\n{str(error)[-4000:]}\n({INSTEAD})"
            ) from None


def say(sentence: str) -> None:
    """Print a line on stderr, above any bar."""
    tqdm.write(f"tinystory: {sentence}", file=sys.stderr)


@contextlib.contextmanager
def announced(folder: Path, target: str, count: int) -> Iterator[None]:
    """Compile in the block, in a new folder: a line on stderr before and after, and on a terminal
    a bar of the files that are compiled, since torch returns when all are."""
    reason = "again, since they are damaged" if (folder / "built").exists() else "once"
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
    one, which a later build then removes."""
    folder.rename(tempfile.mkdtemp(OLD, dir=folder.parent))
    folder.mkdir()
    for old in folder.parent.glob(f"*{OLD}"):
        shutil.rmtree(old, ignore_errors=True)


def intact(library: Path) -> bool:
    """Whether a library is as it was built: a truncated one would end Python with SIGBUS."""
    built = library.with_name("built")
    return library.exists() and built.exists() and built.read_text() == file_hash(library)


def compiled(name: str, sources: list[Path], folder: Path, gpus: str) -> ModuleType:
    from torch.utils import cpp_extension  # here, because it takes half a second to import

    compiler, *flags = command()
    settings = {
        "CXX": compiler,
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",  # no warning of unknown compilers
        # no objects out of a ccache that other machines share: it does not know which processor
        # -march=native meant
        "TORCH_NO_COMPILER_WRAPPER": "1",
        "TORCH_CUDA_ARCH_LIST": gpus,
        "PATH": f"{ninja.BIN_DIR}:{os.environ.get('PATH', os.defpath)}",
    }
    # torch's own copy of pybind11, which its libraries are built with, comes before the package's,
    # which serves builds of torch that have no copy (conda-forge, Debian).
    pybind = f"-isystem {shlex.quote(pybind11.get_include())}"
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        return cpp_extension.load(
            name,
            [str(source) for source in sources],
            extra_cflags=[*flags, pybind],
            extra_cuda_cflags=["-std=c++20", "-O3"],
            extra_ldflags=flags[-1:],
            build_directory=str(folder),
            with_cuda=bool(gpus),
        )
    finally:
        os.environ.clear()
        os.environ.update(before)


def imported(name: str, library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command() -> list[str]:
    """The C++ compiler ($CXX, or the first of c++, g++, clang++) and our flags; the last one is for
    threads. They are for this processor, unless $CXX names another: "c++ -march=x86-64-v3"."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    names = chosen[:1] or ["c++", "g++", "clang++"]
    found = [name for name in names if shutil.which(name)]
    if not found:
        install = "Debian, Ubuntu: apt install g++; macOS: xcode-select --install"
        advice = f"install one ({install}), name it in CXX, or {INSTEAD}"
        raise UserError(f"no C++ compiler found, for there is no {' or '.join(names)}: {advice}")
    compiler = found[:1] + chosen[1:]
    native: list[str] = []
    if not re.search("-m(arch|cpu)=", " ".join(compiler)):
        known = [flag for flag in ("-march=native", "-mcpu=native") if macros([*compiler, flag])]
        native = known[:1]
    # GCC's OpenMP is torch's too. Other compilers have another or none: there,
    # csrc/cpu/thread_pool.h has threads.
    threads = "-pthread" if "__clang__" in macros(compiler) else "-fopenmp"
    return compiler + FLAGS + native + [threads]


def macros(command: list[str]) -> str:
    """The compiler's predefined macros, which tell its version and the instruction sets; "" for an
    unknown flag."""
    process = subprocess.run(
        [*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True
    )
    return process.stdout if process.returncode == 0 else ""


def library_folder(name: str, sources: list[Path], gpus: str = "", toolkit: str = "") -> Path:
    """The folder of a library, named after all that its machine code depends on."""
    parts = [__version__, torch.__version__, str(torch.version.git_version), sys.version]
    compiler = command()
    parts += compiler
    parts += [macros(compiler), gpus, toolkit]
    files: list[Path] = []
    for folder in {CSRC} | {source.parent for source in sources}:
        files += folder.glob("[!.]*.[ch]*")  # no editor's hidden copies
    for file in sorted(files):
        parts.append(f"{file.relative_to(CSRC)} {file_hash(file)}")
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return cache_dir().absolute() / "kernels" / f"{name}-{digest[:16]}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process. Raises UserError where it cannot be written or locked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.with_suffix(".lock"))
        try:
            held = lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"waiting for another process that compiles the kernels: {MINUTES}")
            held = lock.acquire()
    except OSError as error:
        problem = f"{folder} cannot be written or locked ({error.strerror})"
        advice = f"set TINYSTORY_CACHE to a folder on a local disk that can, or {INSTEAD}"
        raise UserError(f"{problem}: {advice}") from None
    with held:
        yield
