"""The CUDA kernels: whether they can be compiled here, for which GPUs, and if not, why not."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tinystory.errors import UserError
from tinystory.ops import build

OLDEST = (8, 0)  # compute capability: mma of bfloat16, cp.async
INSTEAD = "or use --device cpu, or set TINYSTORY_KERNELS=reference to run in plain PyTorch"


@functools.cache
def load() -> None:
    """Register the CUDA kernels of the operators, built first if need be. Raises UserError where that cannot be."""
    build.load()
    if why := why_not():
        raise UserError(f"{why}, {INSTEAD}")
    gpus, dropped = architectures()
    if dropped:
        print(f"tinystory: no CUDA kernels for {', '.join(dropped)}: they need 8.0 or more", file=sys.stderr)
    build.build("tinystory_cuda", [*build.CSRC.glob("cuda/*.c*")], ";".join(gpus), nvcc_version(toolkit()))


def why_not() -> str:
    """Why the CUDA kernels cannot be compiled here, with what to do, or ''."""
    wanted = torch.version.cuda
    if wanted is None:
        return "this torch is built without CUDA: install one with it to use a GPU"
    if not architectures()[0]:
        what = ", ".join(architectures()[1])
        return f"the CUDA kernels need compute capability 8.0 (Ampere) or more, not {what}: use another GPU"
    home = toolkit()
    if home is None:
        return (
            f"torch has CUDA {wanted}, but there is no nvcc to compile the kernels: install CUDA's toolkit of version "
            f"{wanted.split('.')[0]} and set CUDA_HOME to its folder"
        )
    found = re.search(r"release (\d+)\.\d+", nvcc_version(home))
    if not found or found[1] != wanted.split(".")[0]:
        return (
            f"torch has CUDA {wanted}, but {home} has {found[0] if found else 'an nvcc without a version'}: set "
            f"CUDA_HOME to a toolkit of version {wanted.split('.')[0]}"
        )
    return ""


def toolkit() -> Path | None:
    """The CUDA toolkit that torch.utils.cpp_extension finds, if it is whole."""
    from torch.utils.cpp_extension import CUDA_HOME

    home = Path(CUDA_HOME or os.devnull)
    return home if all((home / part).exists() for part in ("bin/nvcc", "include/cuda_runtime.h")) else None


def nvcc_version(home: Path) -> str:
    return subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout


def architectures() -> tuple[list[str], list[str]]:
    """Compute capabilities to compile for, and those that the kernels cannot serve: of TORCH_CUDA_ARCH_LIST, else of
    the GPUs here, else 8.0 and 9.0."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted and torch.cuda.is_available():
        here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        wanted = [f"{major}.{minor}" for major, minor in sorted(here)]
    wanted = wanted or ["8.0", "9.0"]
    numbers = {name: re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name) for name in wanted}
    kept = [name for name, found in numbers.items() if found and (int(found[1]), int(found[2])) >= OLDEST]
    return kept, [name for name in wanted if name not in kept]
