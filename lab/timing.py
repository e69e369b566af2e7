"""Times work with random weights (pretraining step, rollout, PPO iteration), and computes the limit
set by PyTorch's GEMMs."""

import functools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from tinystory.config import InteractConfig, PretrainConfig
from tinystory.config.presets import INTERACT_PRESETS
from tinystory.data.tokenizer import Tokenizer
from tinystory.ops.compute import Compute
from tinystory.rl import ppo
from tinystory.rl.batch import collate
from tinystory.rl.start import new_policy
from tinystory.run.device import now
from tinystory.student.generate import Story, generate
from tinystory.student.model import Student, StudentConfig, ValueHead
from tinystory.student.optim import make_optimizer
from train_pretrain import train_step

SHAPES = {
    # to try the commands
    "tiny": StudentConfig(n_layer=2, n_head=1, n_embd=64, context=64, vocab_size=320),
    "small": StudentConfig(n_layer=4, n_head=4, n_embd=256, context=256, vocab_size=8192),
    "gpt2s": StudentConfig(n_layer=12, n_head=12, n_embd=768, context=512, vocab_size=16_000),
}
PROMPT = 20  # tokens of a prompt
GEMM_RUNS = 5
GEMM_CALLS = 20  # of a run on a GPU
SLEEP = 2_000_000  # clock cycles, a millisecond, in which the host queues work for the GPU
# Function that does the work once and returns seconds and `tokens`.
Run: TypeAlias = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Setup:
    """Settings of a timed work. batch: number of sequences or stories; new: tokens per story."""

    config: StudentConfig
    batch: int
    new: int
    compute: Compute


class RandomTokenizer(Tokenizer):
    """A tokenizer that encodes every opening as the same PROMPT - 1 random tokens, and decodes
    tokens to their ids."""

    eos, pad = 2, 1

    def __init__(self, vocab_size: int):
        self.opening = torch.randint(5, vocab_size, (PROMPT - 1,)).tolist()

    def encode(self, text: str) -> list[int]:
        return self.opening

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))


def pretrain_step(setup: Setup, optimizer: str = PretrainConfig.optimizer) -> Run:
    """Forward, backward and optimizer, as in train_pretrain.py."""
    config = setup.config
    device = setup.compute.device
    dtype = setup.compute.dtype
    options = PretrainConfig(batch_size=setup.batch, optimizer=optimizer)
    student = Student(config).to(device)
    optim = make_optimizer(student, options, dtype)
    batch = torch.randint(0, config.vocab_size, (setup.batch, config.context + 1), device=device)
    tokens = setup.batch * config.context

    def run() -> dict[str, float]:
        start = now(device)
        train_step(student, optim, batch, options, dtype, step=0)
        seconds = now(device) - start
        return {"tokens_per_s": tokens / seconds, "step_s": seconds, "tokens": tokens}

    return run


def write(
    setup: Setup, student: Student, head: ValueHead | None, tokenizer: Tokenizer
) -> list[Story]:
    openings = [""] * setup.batch
    sampling: dict[str, Any] = {"first_index": 0, "max_new_tokens": setup.new, "seed": 0}
    with setup.compute.autocast():
        return generate(student, head, tokenizer, openings, **sampling)


def rollout(setup: Setup) -> Run:
    """Generation of stories for one opening, without the teacher."""
    config = setup.config
    device = setup.compute.device
    student = Student(config).to(device)
    head = ValueHead(config.n_embd).to(device)
    tokenizer = RandomTokenizer(config.vocab_size)

    def run() -> dict[str, float]:
        start = now(device)
        stories = write(setup, student, head, tokenizer)
        seconds = now(device) - start
        # with random weights, one token in V ends a story
        tokens = sum(len(story.tokens) for story in stories)
        return {"tokens_per_s": tokens / seconds, "rollout_s": seconds, "tokens": tokens}

    return run


def ppo_iteration(setup: Setup) -> Run:
    """Rollout, reference pass and four PPO epochs, with a constant reward."""
    config = setup.config
    device = setup.compute.device
    recipe = INTERACT_PRESETS["paper"] | {
        "stories_per_step": setup.batch,
        "max_new_tokens": setup.new,
        "epochs": 4,
    }
    options = InteractConfig(**recipe)
    student = Student(config).to(device)
    tokenizer = RandomTokenizer(config.vocab_size)
    reference = Student(config).to(device).requires_grad_(False)
    reference.load_state_dict(student.state_dict())
    policy = new_policy(options, student, tokenizer, {}, setup.compute)
    rewards = [0.5] * setup.batch

    def run() -> dict[str, float]:
        start = now(device)
        stories = write(setup, student, policy.value_head, tokenizer)
        batch = collate(stories, device)
        after_rollout = now(device)
        batch = ppo.with_reference(policy, batch, reference)
        after_reference = now(device)
        ppo.step(policy, batch, rewards, options.kl_coef)
        end = now(device)
        return {
            "total_s": end - start,
            "rollout_s": after_rollout - start,
            "update_s": end - after_rollout,
            "reference_s": after_reference - after_rollout,
            "tokens": sum(len(story.tokens) for story in stories),
        }

    return run


@dataclass(frozen=True)
class Work:
    """A kind of work. make_run: function that sets up the work and returns a Run; seconds_key: key
    of the seconds that the Run returns; batch: default batch size by shape."""

    make_run: Callable[..., Run]
    seconds_key: str
    batch: dict[str, int]


WORK = {
    "pretrain": Work(pretrain_step, "step_s", {"tiny": 4, "small": 16, "gpt2s": 4}),
    "rollout": Work(rollout, "rollout_s", {"tiny": 8, "small": 64, "gpt2s": 64}),
    "ppo": Work(ppo_iteration, "total_s", {"tiny": 4, "small": 64, "gpt2s": 16}),
}


def gemm_limit(work: str, setup: Setup) -> float:
    """Tokens per second of pretraining or of a rollout if only PyTorch's GEMMs took time."""
    config = setup.config
    trains = work == "pretrain"
    rows = setup.batch * config.context if trains else setup.batch
    C = config.n_embd
    V = config.vocab_size
    total = gemm_seconds(setup, rows, C, V, trains)
    for k, n in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)):
        total += config.n_layer * gemm_seconds(setup, rows, k, n, trains)
    return round(rows / total, 1)


def gemm_seconds(setup: Setup, rows: int, k: int, n: int, trains: bool) -> float:
    """Median seconds of a linear layer from k to n features, with both gradients if `trains`."""
    products = [(rows, k, n)]
    if trains:
        products += [(rows, n, k), (n, rows, k)]
    device = setup.compute.device
    seconds = 0.0
    for m, inner, out in products:
        x = torch.randn(m, inner, dtype=setup.compute.dtype, device=device)
        weight = torch.randn(out, inner, dtype=setup.compute.dtype, device=device)
        product = functools.partial(F.linear, x, weight)
        calls = GEMM_CALLS if device.type == "cuda" else 1
        laps = [timed(product, device, calls)[0] for _ in range(GEMM_RUNS)]
        seconds += statistics.median(laps)
    return seconds


def timed(work: Callable[[], Any], device: torch.device, calls: int = 1) -> tuple[float, Any]:
    """Seconds per call, and the last result. On a GPU the time is between two events, and the GPU
    sleeps before the first while the host queues the calls, so that no time is the host's."""
    result = None
    if device.type != "cuda":
        before = time.perf_counter()
        for _ in range(calls):
            result = work()
        return (time.perf_counter() - before) / calls, result
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SLEEP)
    start.record()
    for _ in range(calls):
        result = work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls, result
