"""Checks that a run fits memory before anything is allocated; each `require*` raises UserError if
it does not. Only what is certain counts: weights, gradients, optimizer state, and the largest
tensors that the options multiply."""

import os
from pathlib import Path

import torch

from tinystory.config import InteractConfig, PretrainConfig
from tinystory.run import distributed
from tinystory.run.errors import UserError
from tinystory.student.model import Student, StudentConfig

FLOAT = 4  # bytes
TRAINED = 3 * FLOAT  # per parameter: itself, its gradient and one moment at least
# 16-bit values that a layer keeps per token and unit of width for its backward pass, at least
ACTIVATIONS = 10
STORY = 1024  # bytes of the objects that hold a story, at least


def parameters(shape: StudentConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Student(shape).parameters())


def total(device: torch.device) -> int:
    """Bytes of the device's memory; for the CPU, what the machine and its control group allow."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    file = Path("/sys/fs/cgroup/memory.max")
    if file.is_file():
        limit = file.read_text().strip()
        if limit.isdigit():  # not "max"
            return min(machine, int(limit))
    return machine


def require(needed: int, device: torch.device, advice: str) -> None:
    available = total(device)
    if needed > available:
        raise UserError(
            f"this run needs at least {needed / 2**30:,.1f} GB of memory and {device} has "
            f"{available / 2**30:,.1f}: lower {advice}"
        )


def require_for_pretraining(config: PretrainConfig, device: torch.device) -> None:
    shape = StudentConfig(
        config.n_layer, config.n_head, config.n_embd, config.context, config.vocab_size
    )
    tokens = min(config.micro_batch_size, config.batch_size) * config.context
    activations = tokens * config.n_layer * config.n_embd * ACTIVATIONS * 2
    batch = config.batch_size * 8 * (config.context + 1)
    advice = "--batch-size, --micro-batch-size, --context, --vocab-size, --n-layer or --n-embd"
    require(parameters(shape) * TRAINED + batch + activations, device, advice)


def require_for_stories(
    stories: int,
    tokens: int,
    shape: StudentConfig,
    device: torch.device,
    advice: str,
    copies: int = 1,
) -> None:
    """For writing so many stories of so many tokens. copies: of the parameters."""
    story = STORY + tokens * (8 + 3 * FLOAT)
    if device.type == "cuda":  # which writes all at the same time
        story += tokens * shape.n_layer * 2 * shape.n_embd * 2  # KV cache
    require(parameters(shape) * FLOAT * copies + stories * story, device, advice)


def require_for_interaction(
    config: InteractConfig, shape: StudentConfig, device: torch.device
) -> None:
    stories = max(config.stories_per_step, config.eval_stories) // distributed.world_size()
    advice = "--stories-per-step, --eval-stories or --max-new-tokens"
    # the student with gradients and Adam's moments, and the reference
    require_for_stories(stories, config.max_new_tokens, shape, device, advice, copies=4 + 1)
