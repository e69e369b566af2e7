"""Loads the CUDA kernels, and finds the GPUs for which they can be compiled here, or the reason if
they cannot."""

import functools
import os
import re
import subprocess
from pathlib import Path

import torch

from tinystory.ops import build
from tinystory.run.errors import UserError

OLDEST = (8, 0)  # minimum compute capability, for mma of bfloat16 and cp.async
INSTEAD = f"or use --device cpu, or {build.INSTEAD}"


@functools.cache
def load() -> None:
    """Register the CUDA kernels of the operators, which are built first if necessary. Raises
    UserError if they cannot be built."""
    build.load()
    problem = why_not()
    if problem:
        raise UserError(f"{problem}, {INSTEAD}")
    sources = sorted([*build.CSRC.glob("cuda/*.cu"), *build.CSRC.glob("cuda/*.cpp")])
    try:
        build.build("tinystory_cuda", sources, ";".join(architectures()), version())
    except UserError as error:
        hint = "if nvcc refuses the C++ compiler, name an older one, as in CC=gcc-13 CXX=g++-13"
        raise UserError(f"{error}\n({hint}, {INSTEAD})") from None


def why_not() -> str:
    """The reason why the CUDA kernels cannot be compiled here, with advice; "" if they can."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: to use a GPU, install PyTorch with CUDA"
    if not architectures():
        major, minor = torch.cuda.get_device_capability()
        return (
            f"this GPU has compute capability {major}.{minor}, and the CUDA kernels need 8.0 or more "
            "(Ampere, for tensor cores in bfloat16 and asynchronous copies): use another GPU"
        )
    release_needed = torch.version.cuda.split(".")[0]
    home = toolkit()
    release = re.search(r"release (\d+)", version())
    has_headers = (home / "include/cuda_runtime.h").exists()
    if release and release[1] == release_needed and has_headers:
        return ""
    problem = f"torch has CUDA {torch.version.cuda}, but {home} has no nvcc and headers of {release_needed}"
    return f"{problem}: install the CUDA toolkit of version {release_needed} and set CUDA_HOME to its folder"


def toolkit() -> Path:
    """The folder in which torch.utils.cpp_extension expects the CUDA toolkit; parts of it may be
    missing."""
    # here, because the import takes half a second
    from torch.utils.cpp_extension import CUDA_HOME

    return Path(CUDA_HOME or os.devnull)


def version() -> str:
    """The output of `nvcc --version`; "" without nvcc."""
    nvcc = toolkit() / "bin/nvcc"
    if not nvcc.exists():
        return ""
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout


def architectures() -> list[str]:
    """Compute capabilities to compile for: those of this machine's GPUs that are not too old;
    without a GPU, 8.0 and 9.0, so that the kernels can be compiled. TORCH_CUDA_ARCH_LIST is
    ignored, because containers set it for all GPUs."""
    if not torch.cuda.is_available():
        return ["8.0", "9.0"]
    gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(gpus) if (major, minor) >= OLDEST]
