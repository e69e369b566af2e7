"""Whether a run can fit memory at all, asked before anything is allocated.

The estimates are lower bounds: weights, gradients, the optimiser's state, and the largest tensors that sizes of the
command line multiply. A run that passes may still need more than there is; one that is refused could never have run.
"""

import os
from pathlib import Path

import torch

from tinystory.config import InteractConfig, PretrainConfig
from tinystory.run import distributed
from tinystory.run.errors import UserError
from tinystory.student.model import StudentConfig

FLOAT = 4  # bytes
TRAINED = 3 * FLOAT  # per parameter: itself, its gradient and one moment at least
ACTIVATIONS = 10  # 16-bit values that a layer keeps per token and unit of width for its backward pass, at least


def parameters(shape: StudentConfig) -> int:
    """The number of a student's parameters."""
    C = shape.n_embd
    return (shape.vocab_size + shape.context + 2) * C + shape.n_layer * (12 * C + 13) * C


def total(device: torch.device) -> int:
    """Bytes of the device's memory; of the CPU's, what the machine and its control group allow."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    file = Path("/sys/fs/cgroup/memory.max")
    limit = file.read_text().strip() if file.is_file() else ""
    return min(machine, int(limit)) if limit.isdigit() else machine


def require(needed: int, device: torch.device, advice: str) -> None:
    """Raises UserError if the device has less memory than `needed` bytes."""
    needed_gb, gb = needed / 2**30, total(device) / 2**30
    if needed_gb > gb:
        raise UserError(
            f"this run needs at least {needed_gb:,.1f} GB of memory and {device} has {gb:,.1f}: lower {advice}"
        )


def require_for_pretraining(config: PretrainConfig, device: torch.device) -> None:
    """Raises UserError if such a run cannot fit."""
    shape = StudentConfig(config.n_layer, config.n_head, config.n_embd, config.context, config.vocab_size)
    rows = min(config.micro_batch_size, config.batch_size)
    batch = config.batch_size * 8 * (config.context + 1)
    activations = rows * config.context * config.n_layer * config.n_embd * ACTIVATIONS * 2
    advice = "--batch-size, --micro-batch-size, --context, --vocab-size, --n-layer or --n-embd"
    require(parameters(shape) * TRAINED + batch + activations, device, advice)


def require_for_interaction(config: InteractConfig, shape: StudentConfig, device: torch.device) -> None:
    """Raises UserError if such a run of a student of this shape cannot fit."""
    stories = max(config.stories_per_step, config.stories_per_evaluation) // distributed.world_size()
    advice = "--stories-per-step, --eval-stories, --eval-best-of or --max-new-tokens"
    require_for_stories(stories, config.max_new_tokens, shape, device, advice, parameters(shape) * TRAINED)


def require_for_stories(
    stories: int, max_new_tokens: int, shape: StudentConfig, device: torch.device, advice: str, more: int = 0
) -> None:
    """Raises UserError if so many stories cannot be written at once. more: bytes that are needed besides."""
    outputs = stories * max_new_tokens * (8 + 3 * FLOAT)
    cache = stories * max_new_tokens * shape.n_layer * 2 * shape.n_embd * 2
    require(parameters(shape) * FLOAT + outputs + cache + more, device, advice)
