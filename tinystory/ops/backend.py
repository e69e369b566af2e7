"""Choice of the implementation of each operator: a compiled kernel (csrc/); on a Mac, PyTorch's
matmul for the three operators in MATMULS; or the definition in plain PyTorch (reference.py)."""

import os
import sys
from types import ModuleType

import torch
from torch import Tensor

from tinystory.ops import build, cuda
from tinystory.run.errors import UserError

REFERENCE = "plain PyTorch runs in place of the kernels"

# Operators that spend nearly all time in a matmul. On a Mac, PyTorch's float32 matmul is
# Accelerate, which uses Apple's matrix units.
MATMULS = ("cross_entropy", "linear", "token_logprob")
ATTENTION = ("causal_attention", "decode_attention")  # compiled by dtype and head size
ACCELERATE = sys.platform == "darwin"


def from_environment() -> str:
    """The value of TINYSTORY_KERNELS: "auto" (default), "ours" (our kernels, even on a Mac) or
    "reference". Raises UserError for any other value."""
    kernels = os.environ.get("TINYSTORY_KERNELS") or "auto"
    if kernels not in ("auto", "ours", "reference"):
        advice = "unset it, or set it to 'reference' or 'ours'"
        raise UserError(f"TINYSTORY_KERNELS={kernels!r} is not a known value: {advice}")
    return kernels


_current: str | None = None


def current() -> str:
    """The value of TINYSTORY_KERNELS at the first call. The first call prints a note on stderr if
    the value is "reference"."""
    global _current
    if _current is None:
        _current = from_environment()
        if _current == "reference":
            print(f"tinystory: TINYSTORY_KERNELS=reference: {REFERENCE}", file=sys.stderr)
    return _current


def implementation(op: str, x: Tensor) -> str:
    """The implementation that runs an operator on x: "kernel", "pytorch" or "reference"."""
    head_size = x.shape[-1] if op in ATTENTION and x.is_cuda else 0
    return _implementation(op, x.device.type, x.dtype, head_size)


@torch.compiler.assume_constant_result
def _implementation(op: str, device: str, dtype: torch.dtype, head_size: int) -> str:
    kernels = current()
    if kernels == "reference":
        return "reference"
    build.load()
    if device == "cuda":
        cuda.load()
        if head_size:
            cuda.load_attention(str(dtype).removeprefix("torch."), head_size)
    accelerated = ACCELERATE and device == "cpu" and dtype == torch.float32
    if accelerated and kernels == "auto" and op in MATMULS:
        return "pytorch"
    return "kernel"


def load() -> ModuleType | None:
    """The module of the CPU kernels (csrc/module.cpp), which is built first if necessary; None with
    TINYSTORY_KERNELS=reference."""
    return None if current() == "reference" else build.load()
