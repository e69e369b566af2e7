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
    """Why the CUDA kernels cannot be compiled here, with advice, or ""."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA: install one with it to use a GPU"
    if not architectures():
        return f"no GPU here can run them, {NEEDS}: use another GPU"
    major = torch.version.cuda.split(".")[0]
    problem = f"torch has CUDA {torch.version.cuda}, but"
    home = toolkit()
    if not (home / "bin/nvcc").exists() or not (home / "include/cuda_runtime.h").exists():
        advice = f"install version {major} and set CUDA_HOME to its folder"
        return f"{problem} there is no CUDA toolkit to compile the kernels with: {advice}"
    advice = f"set CUDA_HOME to a toolkit of {major}"
    release = re.search(r"release (\d+)\.\d+", version())
    if release is None:
        return f"{problem} {home} has an nvcc that does not say its version: {advice}"
    if release[1] != major:
        return f"{problem} {home} has {release[0]}: {advice}"
    return ""


def toolkit() -> Path:
    """The folder in which torch.utils.cpp_extension expects the CUDA toolkit; parts of it may be
    missing."""
    # here, because it takes half a second to import
    from torch.utils.cpp_extension import CUDA_HOME

    return Path(CUDA_HOME or os.devnull)


def version() -> str:
    command = [str(toolkit() / "bin/nvcc"), "--version"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def architectures() -> list[str]:
    """Compute capabilities to compile for: the GPUs' here, if not too old; without a GPU 8.0 and
    9.0, so that the kernels can be compiled. TORCH_CUDA_ARCH_LIST, which containers set for all
    GPUs, is not read."""
    if not torch.cuda.is_available():
        return ["8.0", "9.0"]
    gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(gpus) if (major, minor) >= OLDEST]
