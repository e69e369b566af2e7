"""The CUDA kernels: for which GPUs they can be compiled here, and if for none, why not."""

import functools
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tinystory.ops import build
from tinystory.run.errors import UserError

OLDEST = (8, 0)  # compute capability: mma of bfloat16, cp.async
ENTRY = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")  # of TORCH_CUDA_ARCH_LIST
INSTEAD = f"or use --device cpu, or {build.INSTEAD}"


@functools.cache
def load() -> None:
    """Register the CUDA kernels of the operators, built first if need be. Raises UserError where that cannot be."""
    build.load()
    home = toolkit()
    if (why := why_not()) or home is None:
        raise UserError(f"{why}, {INSTEAD}")
    capabilities, too_old = architectures()
    if too_old:
        print(f"tinystory: no CUDA kernels for {', '.join(too_old)}: only for numbers from 8.0 on", file=sys.stderr)
    sources = [path for path in sorted(build.CSRC.glob("cuda/*.c*")) if path.suffix != ".cuh"]
    try:
        build.build("tinystory_cuda", sources, ";".join(capabilities), version(home))
    except UserError as error:
        hint = "if nvcc refuses the C++ compiler, name an older one, as in CC=gcc-13 CXX=g++-13"
        raise UserError(f"{error}\n({hint}, {INSTEAD})") from None


def check(capability: tuple[int, int]) -> None:
    """Raise UserError for a GPU that the kernels do not run on."""
    number = "{}.{}".format(*capability)
    this = f"this GPU has compute capability {number}"
    if capability < OLDEST:
        raise UserError(f"{this}, and the CUDA kernels need 8.0 (Ampere) or more: use another GPU, {INSTEAD}")
    compiled, _ = architectures()
    if compiled and not any(runs_on(entry, capability) for entry in compiled):
        problem = f"and TORCH_CUDA_ARCH_LIST names {', '.join(compiled)} only"
        raise UserError(f"{this}, {problem}: add {number} to it or unset it, {INSTEAD}")


def runs_on(entry: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for an entry of TORCH_CUDA_ARCH_LIST runs on a GPU of this compute capability: machine code
    on the same major version with no smaller minor one, PTX on all newer ones too, 9.0a on 9.0 alone, 10.0f on 10.x."""
    match = ENTRY.fullmatch(entry)
    assert match, "architectures() returns no other"
    oldest = int(match[1]), int(match[2])
    if match[3] == "a":
        return oldest == capability
    newer_majors = bool(match[4]) and not match[3]
    return oldest <= capability and (newer_majors or oldest[0] == capability[0])


def why_not() -> str:
    """The reason why the CUDA kernels cannot be compiled here, with what to do, or ''."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA: install one with it to use a GPU"
    major = torch.version.cuda.split(".")[0]
    capabilities, too_old = architectures()
    if not capabilities:
        instead = "unset TORCH_CUDA_ARCH_LIST" if os.environ.get("TORCH_CUDA_ARCH_LIST") else "use another GPU"
        return f"the CUDA kernels need compute capability 8.0 (Ampere) or more, not {', '.join(too_old)}: {instead}"
    home = toolkit()
    if home is None:
        return (
            f"torch has CUDA {torch.version.cuda}, but there is no CUDA toolkit to compile the kernels with: install "
            f"version {major} and set CUDA_HOME to its folder"
        )
    release = re.search(r"release (\d+)\.\d+", version(home))
    if not release or release[1] != major:
        nvcc = release[0] if release else "an nvcc that does not say its version"
        return f"torch has CUDA {torch.version.cuda}, but {home} has {nvcc}: set CUDA_HOME to a toolkit of {major}"
    return ""


def toolkit() -> Path | None:
    """The folder of the CUDA toolkit that torch.utils.cpp_extension finds, or None if a part is missing."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns on import where no GPU is
    from torch.utils.cpp_extension import CUDA_HOME

    home = Path(CUDA_HOME or os.devnull)
    return home if all((home / part).exists() for part in ("bin/nvcc", "include/cuda_runtime.h")) else None


def version(home: Path) -> str:
    return subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout


def architectures() -> tuple[list[str], list[str]]:
    """Compute capabilities to compile for, and those that are too old or unknown: from TORCH_CUDA_ARCH_LIST, else from
    the GPUs here, else 8.0 and 9.0."""
    entries = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not entries and torch.cuda.is_available():
        gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        entries = [f"{major}.{minor}" for major, minor in sorted(gpus)]
    entries = entries or ["8.0", "9.0"]
    matches = {entry: ENTRY.fullmatch(entry) for entry in entries}
    capabilities = [entry for entry, match in matches.items() if match and (int(match[1]), int(match[2])) >= OLDEST]
    return capabilities, [entry for entry in entries if entry not in capabilities]
