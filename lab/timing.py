"""Timed work with random weights (pretraining step, rollout, PPO iteration), and the limit set by
PyTorch's GEMMs."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from tinystory.config import INTERACT_PRESETS, InteractConfig, PretrainConfig
from tinystory.data.tokenizer import Tokenizer
from tinystory.ops.compute import Compute
from tinystory.rl import ppo
from tinystory.rl.batch import collate
from tinystory.rl.policy import Policy, SharpAdam
from tinystory.run.device import now
from tinystory.student.generate import Story, generate
from tinystory.student.model import Student, StudentConfig, ValueHead
from tinystory.student.optim import make_optimizer
from train_pretrain import train_step

SHAPES = {
    "small": StudentConfig(n_layer=4, n_head=4, n_embd=256, context=256, vocab_size=8192),
    "gpt2s": StudentConfig(n_layer=12, n_head=12, n_embd=768, context=512, vocab_size=16_000),
}
PROMPT = 20  # tokens
Run: TypeAlias = Callable[[], dict[str, float]]  # does the work once; returns seconds, and `tokens`


@dataclass(frozen=True)
class Setup:
    """batch: sequences or stories; new: tokens per story."""

    config: StudentConfig
    batch: int
    new: int
    compute: Compute


class RandomTokenizer(Tokenizer):
    """Encodes every opening as the same PROMPT - 1 random tokens; words are token ids."""

    eos, pad = 2, 1

    def __init__(self, vocab_size: int):
        self.opening = torch.randint(5, vocab_size, (PROMPT - 1,)).tolist()

    def encode(self, text: str) -> list[int]:
        return self.opening

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))


def pretrain_step(setup: Setup, optimizer: str = PretrainConfig.optimizer) -> Run:
    """Forward, backward and optimizer, as in train_pretrain.py."""
    config, device = setup.config, setup.compute.device
    options = PretrainConfig(batch_size=setup.batch, optimizer=optimizer)
    student = Student(config).to(device)
    optim = make_optimizer(student, options, setup.compute.dtype)
    batch = torch.randint(0, config.vocab_size, (setup.batch, config.context + 1), device=device)
    tokens = setup.batch * config.context

    def run() -> dict[str, float]:
        start = now(device)
        train_step(student, optim, batch, options, setup.compute.dtype, step=0)
        seconds = now(device) - start
        return dict(tokens_per_s=tokens / seconds, step_s=seconds, tokens=tokens)

    return run


def write(setup: Setup, student: Student, head: ValueHead, tokenizer: Tokenizer) -> list[Story]:
    openings = [""] * setup.batch
    with setup.compute.autocast():
        return generate(
            student, head, tokenizer, openings, first_index=0, max_new_tokens=setup.new, seed=0
        )


def rollout(setup: Setup) -> Run:
    """Stories from one opening, without the teacher."""
    config, device = setup.config, setup.compute.device
    student, head = Student(config).to(device), ValueHead(config.n_embd).to(device)
    tokenizer = RandomTokenizer(config.vocab_size)

    def run() -> dict[str, float]:
        start = now(device)
        stories = write(setup, student, head, tokenizer)
        seconds = now(device) - start
        # with random weights, one token in V ends a story
        tokens = sum(len(story.tokens) for story in stories)
        return dict(tokens_per_s=tokens / seconds, rollout_s=seconds, tokens=tokens)

    return run


def ppo_iteration(setup: Setup) -> Run:
    """Rollout, reference pass and four PPO epochs, with a constant reward."""
    config, device = setup.config, setup.compute.device
    sizes = dict(stories_per_step=setup.batch, max_new_tokens=setup.new)
    options = InteractConfig(**INTERACT_PRESETS["paper"] | sizes | dict(epochs=4))
    student, head = Student(config).to(device), ValueHead(config.n_embd).to(device)
    tokenizer = RandomTokenizer(config.vocab_size)
    reference = Student(config).to(device).requires_grad_(False)
    reference.load_state_dict(student.state_dict())
    policy = Policy(
        student=student,
        critic=head,
        optimizer=SharpAdam(student, head, options),
        config=options,
        autocast=setup.compute.autocast,
        tokenizer=tokenizer,
        history={},
    )
    rewards = [0.5] * setup.batch

    def run() -> dict[str, float]:
        start = now(device)
        stories = write(setup, student, head, tokenizer)
        batch = collate(stories, device)
        after_rollout = now(device)
        with policy.autocast():
            seen = ppo.read_reference(reference, batch, options)
        after_reference = now(device)
        ppo.step(policy, batch, seen, rewards, options.kl_coef)
        end = now(device)
        seconds = dict(total_s=end - start, rollout_s=after_rollout - start)
        seconds |= dict(update_s=end - after_rollout, reference_s=after_reference - after_rollout)
        return seconds | dict(tokens=sum(len(story.tokens) for story in stories))

    return run


# By name: the function that makes its run, the key of its seconds, the default batch size by shape.
WORK: dict[str, tuple[Callable[..., Run], str, dict[str, int]]] = {
    "pretrain": (pretrain_step, "step_s", {"small": 16, "gpt2s": 4}),
    "rollout": (rollout, "rollout_s", {"small": 64, "gpt2s": 64}),
    "ppo": (ppo_iteration, "total_s", {"small": 64, "gpt2s": 16}),
}


def gemm_limit(work: str, setup: Setup, runs: int = 5) -> float:
    """Tokens per second of pretraining or of a rollout if PyTorch's GEMMs were all that took
    time."""
    config, device, backward = setup.config, setup.compute.device, work == "pretrain"
    rows = setup.batch * config.context if backward else setup.batch
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    total = 0.0
    for k, n, times in ((C, 3 * C, L), (C, C, L), (C, 4 * C, L), (4 * C, C, L), (C, V, 1)):
        for m, inner, out in (
            [(rows, k, n), (rows, n, k), (n, rows, k)] if backward else [(rows, k, n)]
        ):
            x, w = (
                torch.randn(size, inner, dtype=setup.compute.dtype, device=device)
                for size in (m, out)
            )
            laps = []
            for _ in range(runs):
                start = now(device)
                F.linear(x, w)
                laps.append(now(device) - start)
            total += times * statistics.median(laps)
    return round(rows / total, 1)
