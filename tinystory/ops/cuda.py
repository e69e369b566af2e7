"""The CUDA kernels: for which GPUs they can be compiled here, and if for none, why not."""

import functools
import os
import re
import subprocess
from pathlib import Path

import torch

from tinystory.ops import build
from tinystory.run.errors import UserError

OLDEST = (8, 0)  # compute capability: mma of bfloat16, cp.async
NEEDS = "the CUDA kernels need 8.0 (Ampere) or more"
INSTEAD = f"or use --device cpu, or {build.INSTEAD}"


@functools.cache
def load() -> None:
    """Register the CUDA kernels of the operators, built first if need be. Raises UserError if they
    cannot be."""
    build.load()
    if why := why_not():
        raise UserError(f"{why}, {INSTEAD}")
    sources = [path for path in sorted(build.CSRC.glob("cuda/*.c*")) if path.suffix != ".cuh"]
    try:
        build.build("tinystory_cuda", sources, ";".join(architectures()), version())
    except UserError as error:
        hint = "if nvcc refuses the C++ compiler, name an older one, as in CC=gcc-13 CXX=g++-13"
        raise UserError(f"{error}\n({hint}, {INSTEAD})") from None


def why_not() -> str:
    """Why the CUDA kernels cannot be compiled here, with advice, or ""."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA: install one with it to use a GPU"
    major = torch.version.cuda.split(".")[0]
    if not architectures():
        return f"no GPU here can run them, {NEEDS}: use another GPU"
    home = toolkit()
    if not all((home / part).exists() for part in ("bin/nvcc", "include/cuda_runtime.h")):
        return (
            f"torch has CUDA {torch.version.cuda}, but there is no CUDA toolkit to compile the kernels with: install "
            f"version {major} and set CUDA_HOME to its folder"
        )
    release = re.search(r"release (\d+)\.\d+", version())
    if not release or release[1] != major:
        nvcc = release[0] if release else "an nvcc that does not say its version"
        return f"torch has CUDA {torch.version.cuda}, but {home} has {nvcc}: set CUDA_HOME to a toolkit of {major}"
    return ""


def toolkit() -> Path:
    """The folder in which torch.utils.cpp_extension expects the CUDA toolkit; parts of it may be
    missing."""
    # here, because it takes half a second to import
    from torch.utils.cpp_extension import CUDA_HOME

    return Path(CUDA_HOME or os.devnull)


def version() -> str:
    return subprocess.run(
        [toolkit() / "bin/nvcc", "--version"], capture_output=True, text=True
    ).stdout


def architectures() -> list[str]:
    """Compute capabilities to compile for: the GPUs' here, if not too old; without a GPU 8.0 and
    9.0, so that the kernels can be compiled. TORCH_CUDA_ARCH_LIST, which containers set for all
    GPUs, is not read."""
    if not torch.cuda.is_available():
        return ["8.0", "9.0"]
    gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(gpus) if (major, minor) >= OLDEST]
