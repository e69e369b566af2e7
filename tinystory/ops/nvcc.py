"""nvcc: whether the CUDA kernels can be compiled for this torch, for which cards, and by which commands.

nvcc also compiles the binding and links, because it knows where its toolkit's headers and libraries are.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from tinystory.errors import UserError

FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC"]
OLDEST = (8, 0)  # mma of bfloat16, cp.async
INSTEAD = "or use --device cpu, or set TINYSTORY_KERNELS=reference to run in plain PyTorch"


@dataclass(frozen=True)
class Nvcc:
    path: str
    version: str  # what it says of itself
    architectures: tuple[str, ...]  # compute capabilities: "9.0", or "9.0+PTX" to run on newer cards too

    def command(self, host: list[str]) -> list[str]:
        """nvcc with the C++ compiler that compiles the rest, too."""
        rest = [part for flag in host[1:] for part in ("-Xcompiler", flag)]
        return [self.path, "-ccbin", host[0], *rest, *FLAGS, *targets(self.architectures)]

    def __str__(self) -> str:
        return f"CUDA {release(self.version)} for {', '.join(self.architectures)}"


def find() -> Nvcc | None:
    """nvcc, if this torch has CUDA and nvcc is there and fits it: else None, and `why_not` says why."""
    path = locate()
    if torch.version.cuda is None or path is None or why_not():
        return None
    return Nvcc(path, said_version(path), architectures())


def why_not() -> str:
    """Why the CUDA kernels cannot be compiled, with what to do, or ''."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA: install one with it to use a GPU"
    path, wanted = locate(), torch.version.cuda
    if path is None:
        home = os.environ.get("CUDA_HOME")
        where = f"in CUDA_HOME={home}" if home else "on PATH or in /usr/local/cuda"
        return (
            f"torch has CUDA {wanted}, but there is no nvcc {where} to compile the kernels: install CUDA's toolkit of "
            f"version {wanted.split('.')[0]} and set CUDA_HOME, {INSTEAD}"
        )
    found = release(said_version(path))
    if found.split(".")[0] != wanted.split(".")[0]:
        return (
            f"torch has CUDA {wanted}, but {path} is of CUDA {found}: set CUDA_HOME to a toolkit of version "
            f"{wanted.split('.')[0]}, {INSTEAD}"
        )
    return ""


def locate() -> str | None:
    """In $CUDA_HOME if that is set, else on PATH, else in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def said_version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True).stdout


def release(version: str) -> str:
    found = re.search(r"release (\d+\.\d+)", version)
    return found[1] if found else "an unknown version"


def architectures() -> tuple[str, ...]:
    """From TORCH_CUDA_ARCH_LIST, else of the cards here, else 8.0 and 9.0. Raises UserError for what cannot be."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted and torch.cuda.is_available():
        cards = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        wanted = [f"{major}.{minor}" for major, minor in sorted(cards)]
    for name in wanted:
        number = re.fullmatch(r"(\d+)\.(\d)a?(\+PTX)?", name)
        if not number or (int(number[1]), int(number[2])) < OLDEST:
            raise UserError(
                f"the CUDA kernels need compute capability 8.0 or more, as in TORCH_CUDA_ARCH_LIST='8.0;9.0', not "
                f"{name!r}: name others, {INSTEAD}"
            )
    return tuple(wanted) or ("8.0", "9.0")


def targets(architectures: tuple[str, ...]) -> list[str]:
    """nvcc's flags for them."""
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
