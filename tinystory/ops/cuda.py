"""The CUDA kernels: whether they can be compiled here, for which GPUs, and if not, why not."""

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
    if why := why_not():
        raise UserError(f"{why}, {INSTEAD}")
    gpus, dropped = architectures()
    if dropped:
        print(f"tinystory: no CUDA kernels for {', '.join(dropped)}: only for numbers from 8.0 on", file=sys.stderr)
    home = toolkit()
    assert home is not None, "why_not would have said so"
    try:
        sources = sorted(build.CSRC.glob("cuda/*.c*"))
        build.build("tinystory_cuda", [s for s in sources if s.suffix != ".cuh"], ";".join(gpus), version(home))
    except UserError as error:
        hint = "if nvcc refuses the C++ compiler, name an older one, as in CC=gcc-13 CXX=g++-13"
        raise UserError(f"{error}\n({hint}, {INSTEAD})") from None


def check(capability: tuple[int, int]) -> None:
    """Raise UserError for a GPU that the kernels do not run on."""
    number = "{}.{}".format(*capability)
    this = f"this GPU has compute capability {number}"
    if capability < OLDEST:
        raise UserError(f"{this}, and the CUDA kernels need 8.0 (Ampere) or more: use another GPU, {INSTEAD}")
    kept, _ = architectures()
    if kept and not any(runs_on(entry, capability) for entry in kept):
        said = f"and TORCH_CUDA_ARCH_LIST names {', '.join(kept)} only"
        raise UserError(f"{this}, {said}: add {number} to it or unset it, {INSTEAD}")


def runs_on(entry: str, capability: tuple[int, int]) -> bool:
    """Whether what is compiled for an entry of TORCH_CUDA_ARCH_LIST runs on such a GPU: machine code on GPUs of the
    same major version whose minor one is no smaller, PTX on all newer ones too, 9.0a on 9.0 alone, 10.0f on 10.x."""
    found = ENTRY.fullmatch(entry)
    assert found, "architectures() keeps no other"
    oldest = int(found[1]), int(found[2])
    if found[3] == "a":
        return oldest == capability
    newer_majors = bool(found[4]) and not found[3]
    return oldest <= capability and (newer_majors or oldest[0] == capability[0])


def why_not() -> str:
    """Why the CUDA kernels cannot be compiled here, with what to do, or ''."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA: install one with it to use a GPU"
    wanted = torch.version.cuda.split(".")[0]
    kept, dropped = architectures()
    if not kept:
        instead = "unset TORCH_CUDA_ARCH_LIST" if os.environ.get("TORCH_CUDA_ARCH_LIST") else "use another GPU"
        return f"the CUDA kernels need compute capability 8.0 (Ampere) or more, not {', '.join(dropped)}: {instead}"
    home = toolkit()
    if home is None:
        return (
            f"torch has CUDA {torch.version.cuda}, but there is no CUDA toolkit to compile the kernels with: install "
            f"version {wanted} and set CUDA_HOME to its folder"
        )
    found = re.search(r"release (\d+)\.\d+", version(home))
    if not found or found[1] != wanted:
        said = found[0] if found else "an nvcc that does not say its version"
        return f"torch has CUDA {torch.version.cuda}, but {home} has {said}: set CUDA_HOME to a toolkit of {wanted}"
    return ""


def toolkit() -> Path | None:
    """The folder of the CUDA toolkit that torch.utils.cpp_extension finds, if it is whole."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns on import where no GPU is
    from torch.utils.cpp_extension import CUDA_HOME

    home = Path(CUDA_HOME or os.devnull)
    return home if all((home / part).exists() for part in ("bin/nvcc", "include/cuda_runtime.h")) else None


def version(home: Path) -> str:
    return subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout


def architectures() -> tuple[list[str], list[str]]:
    """Compute capabilities to compile for, and those that the kernels cannot serve: of TORCH_CUDA_ARCH_LIST, else of
    the GPUs here, else 8.0 and 9.0."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted and torch.cuda.is_available():
        here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        wanted = [f"{major}.{minor}" for major, minor in sorted(here)]
    wanted = wanted or ["8.0", "9.0"]
    numbers = {name: ENTRY.fullmatch(name) for name in wanted}
    kept = [name for name, found in numbers.items() if found and (int(found[1]), int(found[2])) >= OLDEST]
    return kept, [name for name in wanted if name not in kept]
