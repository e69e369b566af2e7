"""Compiles csrc/ once for this machine and loads it: the operators `torch.ops.tinystory.*`.

csrc/cuda is compiled too where torch has CUDA and nvcc is there (tinystory/ops/nvcc.py), and only there.

The library lies in `cache_dir()/kernels/<key>`, where the key says all that the machine code depends on. A build works
in a folder of its own and appears under its key by one rename, so there is no lock: an interrupted build cannot block
or spoil the next, and of two at once the first to finish wins. (torch.utils.cpp_extension says where torch's headers
and libraries are; its `load` would leave a lock that a killed build never opens.)
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tinystory.errors import UserError
from tinystory.ops import nvcc
from tinystory.paths import cache_dir

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = [
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # sampling needs each float step as written; kernels write fma() where they want one
]
TORCH_FLAGS = ["-fopenmp"]  # only for the files that know torch: at::parallel_for is a template over OpenMP


def load() -> None:
    """Build the kernels if need be and register them with torch.

    Raises UserError if there is no C++ compiler, or with its message if it fails."""
    library = build()
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise UserError(f"cannot load the kernels ({error}); delete {library.parent} and start again") from None


def build() -> Path:
    """Path of the compiled library, built first if it is not in the cache."""
    if not CSRC.is_dir():
        raise UserError(f"no kernel sources in {CSRC}: install with `pip install -e .` from a clone of the repository")
    compiler, cuda = find_compiler(), nvcc.find()
    home = cache_dir().absolute() / "kernels"  # the compilers run in another folder
    folder = home / cache_key(compiler, cuda)
    library = folder / "tinystory.so"
    if library.exists():
        return library

    started = time.monotonic()
    also = f", with {cuda}" if cuda else ""
    print(f"tinystory: compiling the kernels once for this machine{also} ...", end=" ", file=sys.stderr, flush=True)
    home.mkdir(parents=True, exist_ok=True)
    remove_leftovers(home)
    with tempfile.TemporaryDirectory(dir=home, prefix="building-", ignore_cleanup_errors=True) as temporary:
        work = Path(temporary)
        compile_all(compiler, cuda, work)
        with open(work / library.name, "rb") as file:
            os.fsync(file.fileno())
        finished = work / "finished"
        finished.mkdir()
        os.rename(work / library.name, finished / library.name)
        try:
            os.rename(finished, folder)
        except OSError:
            if not library.exists():  # else another process built the same at the same time
                raise
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    return library


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else the first of c++, g++, clang++."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if not shutil.which(command[0]):
            raise UserError(f"CXX names {command[0]}, which is not there; unset CXX or name a C++ compiler")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise UserError(
        "no C++ compiler found: install one (Debian, Ubuntu: apt install g++), or set TINYSTORY_KERNELS=reference"
        " to run in plain PyTorch"
    )


def cache_key(compiler: list[str], cuda: nvcc.Nvcc | None) -> str:
    """Hash of everything the machine code depends on."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    parts = [torch.__version__, *compiler, version, *FLAGS, *TORCH_FLAGS, cpu()]
    if cuda:
        parts += [torch.version.cuda, cuda.version, *cuda.command(compiler)]
    for source in sorted(CSRC.rglob("*")):
        if source.suffix in (".cpp", ".h", ".cu", ".cuh"):
            parts += [source.name, source.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def cpu() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def compile_all(compiler: list[str], cuda: nvcc.Nvcc | None, work: Path) -> None:
    """Compile each source and link work/tinystory.so."""
    from torch.utils import cpp_extension  # here, because it takes a while to import

    includes = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    patterns = ["*.cpp", "cpu/*.cpp", *(["cuda/*.cpp", "cuda/*.cu"] if cuda else [])]

    def compile_one(source: Path) -> str:
        name = source.relative_to(CSRC)
        target = str(work / f"{'-'.join(name.parts)}.o")
        if name.parts[0] == "cuda":
            command = cuda.command(compiler) + (includes if source.suffix == ".cpp" else [])
        else:
            command = [*compiler, *FLAGS] + ([*TORCH_FLAGS, *includes] if source.name == "ops.cpp" else [])
        run([*command, abi, "-c", str(source), "-o", target], work)
        return target

    with ThreadPoolExecutor(max_workers=jobs()) as pool:
        objects = list(pool.map(compile_one, [source for p in patterns for source in sorted(CSRC.glob(p))]))
    libraries = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", "-Xlinker", f"-rpath={path}")]
    if cuda:
        command = [
            *cuda.command(compiler),
            "-cudart=shared",
            *(f for flag in TORCH_FLAGS for f in ("-Xcompiler", flag)),
        ]
        libraries += ["-lc10_cuda"]
    else:
        command = [*compiler, *TORCH_FLAGS]
    libraries += ["-ltorch_cpu", "-lc10"]
    run([*command, "-shared", *objects, *libraries, "-o", str(work / "tinystory.so")], work)


def jobs() -> int:
    """Compilers at once: $MAX_JOBS, else the processors this process may use, at most 8 (an ops.cpp takes 1.5 GB)."""
    wanted = os.environ.get("MAX_JOBS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else min(8, len(os.sched_getaffinity(0)))


def run(command: list[str], work: Path) -> None:
    result = subprocess.run(command, cwd=work, capture_output=True, text=True)
    if result.returncode:
        print("failed", file=sys.stderr)
        said = (result.stderr or result.stdout).strip()
        raise UserError(
            f"the kernels do not compile; {command[0]} says:\n{said[:4000]}\n"
            "(set TINYSTORY_KERNELS=reference to run in plain PyTorch)"
        )


def remove_leftovers(home: Path) -> None:
    """Folders of builds that were killed more than an hour ago."""
    for folder in home.glob("building-*"):
        if time.time() - folder.stat().st_mtime > 3600:
            shutil.rmtree(folder, ignore_errors=True)
