"""The back-end: what runs each operator. It is a compiled kernel (csrc/), on a Mac PyTorch's matmul
for three operators (MATMULS), or the operator's definition in plain PyTorch (reference.py)."""

import os
import sys
from types import ModuleType

import torch
from torch import Tensor

from tinystory.ops import build, cuda
from tinystory.run.errors import UserError

REFERENCE = "plain PyTorch runs in place of the kernels"

# Operators that are nearly all matmul. On a Mac PyTorch's float32 matmul is Accelerate, on Apple's
# matrix units.
MATMULS = ("cross_entropy", "linear", "token_logprob")
ACCELERATE = sys.platform == "darwin"


def from_environment() -> str:
    """TINYSTORY_KERNELS: "auto", "ours" (also on a Mac) or "reference". Raises UserError for
    another value."""
    kernels = os.environ.get("TINYSTORY_KERNELS") or "auto"
    if kernels not in ("auto", "ours", "reference"):
        advice = "unset it, or set it to 'reference' or 'ours'"
        raise UserError(f"TINYSTORY_KERNELS={kernels!r} is not known; {advice}")
    return kernels


_current: str | None = None


def current() -> str:
    """The value of TINYSTORY_KERNELS at the first call, which says on stderr if that is the
    reference."""
    global _current
    if _current is None:
        _current = from_environment()
        if _current == "reference":
            print(f"tinystory: TINYSTORY_KERNELS=reference: {REFERENCE}", file=sys.stderr)
    return _current


def implementation(op: str, x: Tensor) -> str:
    """What runs an operator on x: "kernel", "pytorch" or "reference"."""
    return _implementation(op, x.device.type, x.dtype)


@torch.compiler.assume_constant_result
def _implementation(op: str, device: str, dtype: torch.dtype) -> str:
    kernels = current()
    if kernels == "reference":
        return "reference"
    build.load()
    if device == "cuda":
        cuda.load()
    accelerated = ACCELERATE and device == "cpu" and dtype == torch.float32
    if accelerated and kernels == "auto" and op in MATMULS:
        return "pytorch"
    return "kernel"


def load() -> ModuleType | None:
    """The module of the CPU kernels (csrc/module.cpp), built first if need be; None if the
    reference runs."""
    return None if current() == "reference" else build.load()
