"""The back-end: what runs each operator. It is a compiled kernel (csrc/), on a Mac PyTorch's matmul
for three operators (MATMULS), or the operator's definition in plain PyTorch (reference.py)."""

import functools
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
    global _current
    if _current is None:
        _current = from_environment()
        if _current == "reference":
            run_reference("TINYSTORY_KERNELS=reference")
    return _current


def run_reference(reason: str) -> None:
    """Let plain PyTorch run every operator from now on; stderr says why."""
    global _current
    _current = "reference"
    print(f"tinystory: {reason}: {REFERENCE}", file=sys.stderr)


def implementation(op: str, x: Tensor) -> str:
    """What runs an operator on x: "kernel", "pytorch" or "reference"."""
    return _implementation(op, x.device.type, x.dtype)


@torch.compiler.assume_constant_result
def _implementation(op: str, device: str, dtype: torch.dtype) -> str:
    kernels = current()
    if kernels == "reference" or not has_kernel(op, device):
        return "reference"
    accelerated = ACCELERATE and device == "cpu" and dtype == torch.float32
    if accelerated and kernels == "auto" and op in MATMULS:
        return "pytorch"
    return "kernel"


@functools.cache
def has_kernel(op: str, device: str) -> bool:
    """Whether the operator has a kernel for this kind of device, built first if need be. If not,
    stderr says so."""
    load()
    if device == "cuda":
        cuda.load()
    key = torch._C._dispatch_key_for_device(device)
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"tinystory::{op}", key):
        return True
    print(f"tinystory: no {device} kernel of {op} here, so plain PyTorch runs it", file=sys.stderr)
    return False


def load() -> ModuleType | None:
    """The module of the CPU kernels (csrc/module.cpp), built first if need be; None if the
    reference runs."""
    return None if current() == "reference" else build.load()


def keep_freed_memory() -> None:
    """Let this process keep the memory that its tensors free, which the next training step
    allocates again (csrc/memory.h). Builds the kernels if need be; with the reference, does
    nothing."""
    if module := load():
        module.keep_freed_memory()
