"""What fits in memory: a check before pretraining allocates anything, with a lower bound (weights,
gradients, optimizer state, and the largest tensors), and the micro-batch of an interaction."""

import math
import os
from pathlib import Path

import torch

from tinystory.config import InteractConfig, PretrainConfig
from tinystory.run.errors import UserError
from tinystory.student.model import Student, student_config

TRAINED = 3 * 4  # bytes per parameter: itself, its gradient and one moment at least
# 16-bit values that a layer keeps per token and unit of width for its backward pass, at least
ACTIVATIONS = 10
# A GPU with LARGE bytes reads up to STORIES and NEW_TOKENS in a forward pass of the interaction:
# launches take longer than the work of few stories of a small student. GPT-2-small needs 12 GB.
STORIES = 128
NEW_TOKENS = 20_000
LARGE = 15 << 30


def total(device: torch.device) -> int:
    """The device's memory in bytes; for the CPU, the limit of the machine and its control group."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    file = Path("/sys/fs/cgroup/memory.max")
    if file.is_file():
        limit = file.read_text().strip()
        if limit.isdigit():  # not "max"
            return min(machine, int(limit))
    return machine


def micro_batch_size(config: InteractConfig, device: torch.device) -> int:
    """The number of stories per forward pass: on a large GPU, unless it is given, equal parts of the
    minibatch."""
    if "micro_batch_size" in config.given or device.type != "cuda" or total(device) < LARGE:
        return config.micro_batch_size
    minibatch = config.minibatch_size or config.stories_per_step
    most = max(config.micro_batch_size, min(STORIES, NEW_TOKENS // config.max_new_tokens))
    parts = math.ceil(minibatch / most)
    part = math.ceil(minibatch / parts)
    return part + part % 2  # pairs of stories stay together


def require_for_pretraining(config: PretrainConfig, device: torch.device) -> None:
    """Raises UserError if the run does not fit in the device's memory."""
    shape = student_config(config, config.vocab_size)
    tokens = min(config.micro_batch_size, config.batch_size) * config.context
    activations = tokens * config.n_layer * config.n_embd * ACTIVATIONS * 2
    batch = config.batch_size * 8 * (config.context + 1)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Student(shape).parameters())
    needed = parameters * TRAINED + batch + activations
    available = total(device)
    if needed > available:
        raise UserError(
            f"this run needs at least {needed / 2**30:,.1f} GB of memory and {device} has "
            f"{available / 2**30:,.1f}: lower --batch-size, --micro-batch-size, --context, "
            "--vocab-size, --n-layer or --n-embd"
        )
