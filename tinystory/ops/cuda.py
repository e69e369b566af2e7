"""Loads the CUDA kernels, and finds the GPUs for which they can be compiled here, or the reason if
they cannot.

Attention kernels take most of the time to compile, so there is one library of them per dtype and
head size, which is built when an operator first needs it."""

import functools
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from tinystory.ops import build
from tinystory.run.errors import UserError

DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # and their names in csrc/
HEAD_SIZES = (32, 64, 128)
OLDEST = (8, 0)  # minimum compute capability, for mma of bfloat16 and cp.async
INSTEAD = f"or use --device cpu, or {build.INSTEAD}"


@functools.cache
def load() -> ModuleType:
    """The module of the CUDA kernels (csrc/cuda/ops.cpp), which is built first if necessary.
    Registers the operators. Raises UserError if the kernels cannot be built."""
    build.load()
    problem = why_not()
    if problem:
        raise UserError(f"{problem}, {INSTEAD}")
    return built("tinystory_cuda", [*cuda_sources() - attention_sources()])


@functools.cache
def load_attention(dtype: str, head_size: int) -> None:
    """Add the attention kernels for a dtype and a head size to the operators, built first if
    necessary. Does nothing for those without kernels, which the operators refuse."""
    if dtype not in DTYPES or head_size not in HEAD_SIZES:
        return
    name = DTYPES[dtype]
    defines = [f"-DTINYSTORY_DTYPE={name}", f"-DTINYSTORY_HEAD_SIZE={head_size}"]
    library = f"tinystory_attention_{name}_{head_size}"
    load().add_attention(built(library, [*attention_sources()], defines).kernels())


def cuda_sources() -> set[Path]:
    return {*build.CSRC.glob("cuda/*.cu"), *build.CSRC.glob("cuda/*.cpp")}


def attention_sources() -> set[Path]:
    return {path for path in cuda_sources() if path.name.startswith("attention_")}


def built(name: str, sources: list[Path], defines: Sequence[str] = ()) -> ModuleType:
    """The module of a CUDA library for the GPUs here. Raises UserError if it cannot be built."""
    try:
        return build.build(name, sorted(sources), ";".join(architectures()), version(), defines)
    except UserError as error:
        raise UserError(f"{error}\n({INSTEAD})") from None


def why_not() -> str:
    """The reason why the CUDA kernels cannot be compiled here, with advice; "" if they can."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: to use a GPU, install PyTorch with CUDA"
    if not architectures():
        return "no GPU here has compute capability 8.0 or more: use another GPU"
    release_needed = torch.version.cuda.split(".")[0]
    home = toolkit()
    release = re.search(r"release (\d+)", version())
    has_headers = (home / "include/cuda_runtime.h").exists()
    if release and release[1] == release_needed and has_headers:
        return ""
    problem = f"torch has CUDA {torch.version.cuda}, but {home} has no nvcc and headers of {release_needed}"
    return f"{problem}: install the CUDA toolkit of version {release_needed} and set CUDA_HOME to its folder"


def require_capability(device: torch.device) -> None:
    """Raises UserError if this GPU is too old for the kernels."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST:
        raise UserError(
            f"this GPU has compute capability {major}.{minor}, and the CUDA kernels need 8.0 or more "
            "(Ampere, for tensor cores in bfloat16 and asynchronous copies): "
            f"use another GPU, {INSTEAD}"
        )


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
