"""Where a run computes: the device and the dtype of its matmuls, from --device and --dtype."""

import sys
from dataclasses import dataclass

import torch

from tinystory.ops import backend, cuda
from tinystory.run.device import cpu_has_bf16
from tinystory.run.errors import UserError


@dataclass(frozen=True)
class Compute:
    """recorded: device and dtype for config.json, with auto resolved, so that a resumed run
    computes as before."""

    device: torch.device
    dtype: torch.dtype
    recorded: dict[str, str]

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )


def resolve(device_name: str, dtype_name: str) -> Compute:
    """Resolves --device and --dtype, and lets the process keep freed memory. Raises UserError if
    one cannot be used or the kernels cannot be built."""
    device = pick_device(device_name)
    module = backend.load()
    if module:  # the next training step allocates the same again (csrc/memory.h)
        module.keep_freed_memory()
    dtype = pick_dtype(dtype_name, device)
    if dtype_name == "auto":
        dtype_name = str(dtype).removeprefix("torch.")
    return Compute(device, dtype, dict(device=str(device), dtype=dtype_name))


def pick_device(name: str) -> torch.device:
    """The device of --device. auto: a GPU if torch sees one and the kernels can be compiled for it,
    else the CPU; if it is the CPU despite a GPU, stderr says why. Raises UserError for an unusable
    device."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        try:
            return pick_device("cuda")
        except UserError as error:
            problem = str(error).splitlines()[0]
        print(f"tinystory: --device auto is the CPU here, not the GPU: {problem}", file=sys.stderr)
        return torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("no kernels for it")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        problem = f"--device {name} cannot be used here ({reason})"
        raise UserError(f"{problem}; try --device cpu") from error
    if device.type == "cuda" and backend.load() is not None:
        cuda.load()
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """dtype of the matmuls. auto: bfloat16 where the hardware has it."""
    if name != "auto":
        return getattr(torch, name)
    has_bf16 = cpu_has_bf16()
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # older GPUs emulate it
    return torch.bfloat16 if has_bf16 else torch.float32
