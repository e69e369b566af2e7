"""The device and the dtype of the matmuls of a run, from --device and --dtype."""

import sys
from dataclasses import dataclass

import torch

from tinystory.ops import backend, cuda
from tinystory.run.device import cpu_has_bf16
from tinystory.run.errors import UserError


@dataclass(frozen=True)
class Compute:
    """Device and matmul dtype of a run. recorded: both for config.json, with auto resolved, so that
    a resumed run uses the same."""

    device: torch.device
    dtype: torch.dtype
    recorded: dict[str, str]

    def autocast(self) -> torch.autocast:
        """Context in which matmuls have `dtype`."""
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )


def resolve(device_name: str, dtype_name: str) -> Compute:
    """The device and dtype that --device and --dtype name. Also lets the process keep freed memory.
    Raises UserError if the device or the dtype cannot be used, or the kernels cannot be built."""
    device = pick_device(device_name)
    module = backend.load()
    if module:  # because the next training step allocates the same memory again (csrc/memory.h)
        module.keep_freed_memory()
    dtype = pick_dtype(dtype_name, device)
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype_name == "tf32" else "ieee"
    if dtype_name == "auto":
        dtype_name = str(dtype).removeprefix("torch.")
    return Compute(device, dtype, dict(device=str(device), dtype=dtype_name))


def pick_device(name: str) -> torch.device:
    """The device that --device names. auto: a GPU if PyTorch sees one and the kernels can be
    compiled for it, else the CPU; if the CPU is chosen despite a GPU, the reason is printed on
    stderr. Raises UserError for an unusable device."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        try:
            return pick_device("cuda")
        except UserError as error:
            problem = str(error).splitlines()[0]
        print(f"tinystory: --device auto uses the CPU, not the GPU: {problem}", file=sys.stderr)
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
        if torch.version.cuda:
            cuda.require_capability(device)
        cuda.load()
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the matmuls' operands. auto: bfloat16 if the hardware supports it, else float32.
    Raises UserError for TF32 without a GPU that has it."""
    if name == "tf32":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError(
                f"--dtype tf32 needs an NVIDIA GPU of compute capability 8.0 or more, and the run is "
                f"on {device}: use --dtype float32"
            )
        return torch.float32
    if name != "auto":
        return getattr(torch, name)
    has_bf16 = cpu_has_bf16()
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)  # older GPUs emulate it
    return torch.bfloat16 if has_bf16 else torch.float32
