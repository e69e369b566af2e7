"""What one step must compute and move on a GPU, and what it asks of the host: the table in
lab/gpu.md.

python lab/on_paper.py

FLOPs and bytes come from the shapes alone: GEMMs and causal attention (half of the square); each
operator of the path on a GPU reads its inputs once and writes its outputs once, whatever the caches
keep. Launches and host syncs are counted on the simulated device, by a step of as many layers,
micro-batches and updates on a student that is small otherwise.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cuda_device"))
import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
from machine import machine
from runtime import install, install_project

# isort: split
import torch

from lab.timing import RandomTokenizer
from tinystory.config import InteractConfig, PretrainConfig
from tinystory.config.presets import INTERACT_PRESETS, PRETRAIN_PRESETS
from tinystory.ops.compute import Compute
from tinystory.rl import ppo
from tinystory.rl.batch import collate
from tinystory.rl.start import new_policy
from tinystory.run.device import Download
from tinystory.student.generate import READ_TOGETHER, Story
from tinystory.student.model import Student, StudentConfig, ValueHead
from tinystory.student.optim import make_optimizer
from tinystory.student.token_step import Sampling, TokenStep
from train_pretrain import train_step

BANDWIDTH = 3.35e12  # H100 SXM: NVIDIA's data sheet, as the peaks of dense matmuls
PEAK = {torch.bfloat16: 989e12, torch.float32: 67e12}
NAMES = ("work", "dtype", "TFLOP", "GB", "lower bound, ms", "launches", "host syncs")
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Shape:
    L: int  # layers
    C: int  # width
    V: int  # vocabulary
    T: int  # context
    prompt: int  # tokens
    dtype: torch.dtype = torch.bfloat16

    @property
    def matrices(self) -> int:
        return 12 * self.L * self.C**2

    @property
    def parameters(self) -> int:
        return self.matrices + (self.V + self.T) * self.C + self.L * 13 * self.C

    def forward(self, tokens: float, length: float) -> float:
        """FLOPs of the trunk for tokens in rows of this length."""
        return tokens * (2 * self.matrices + 2 * self.L * length * self.C)

    def activations(self, tokens: float, trains: bool = False) -> float:
        """Bytes of a forward pass of the trunk. Two norms of a layer read and write the float32
        stream; the others are elements of the matmuls' dtype: of the norms 4 C, qkv 4 C, attention
        4 C, its projection 2 C, the MLP 10 C, and 8 C for a GELU that cuBLAS does not apply. A
        backward pass moves about twice as much."""
        gelu = 8 if trains or self.dtype == torch.float32 else 0
        return tokens * self.L * self.C * (16 + (24 + gelu) * self.dtype.itemsize)

    def weights(self, forward: int, backward: int, updates: int) -> float:
        """Bytes of weights and gradients in so many passes: a GEMM reads its weight, and writes its
        gradient in float32, which is added to that of the micro-batches before."""
        reads = (forward + backward) * self.dtype.itemsize
        copies = 6 * updates if self.dtype != torch.float32 else 0
        return self.parameters * (reads + 4 * backward + 12 * (backward - updates) + copies)

    def logits(self, trains: bool) -> int:
        """Bytes per logit of a forward pass of token_logprob, and of a backward pass, which
        computes it again."""
        return 8 + (8 + 3 * self.dtype.itemsize if trains else 0)


@dataclass(frozen=True)
class Work:
    name: str
    shape: Shape
    flops: float
    bytes: float
    launches: str
    waits: str

    def row(self) -> tuple[str, ...]:
        ms = 1e3 * max(self.flops / PEAK[self.shape.dtype], self.bytes / BANDWIDTH)
        numbers = (f"{float(f'{x:.3g}'):,g}" for x in (self.flops / 1e12, self.bytes / 1e9, ms))
        return (
            self.name,
            str(self.shape.dtype).removeprefix("torch."),
            *numbers,
            self.launches,
            self.waits,
        )


# --- on the simulated device ----------------------------------------------------------------------
def counted(f: Callable[[], object]) -> tuple[str, str]:
    """Launches and host syncs of f, when it has run before."""
    f()
    before = machine.launches.total(), machine.waits.total()
    f()
    return f"{machine.launches.total() - before[0]:,}", str(machine.waits.total() - before[1])


def small_student(s: Shape) -> Student:
    return Student(StudentConfig(s.L, 2, 64, 32, 320)).to(CUDA)


def count_pretraining(s: Shape, config: PretrainConfig) -> tuple[str, str]:
    parts = -(-config.batch_size // config.micro_batch_size)
    config, student = replace(config, batch_size=parts, micro_batch_size=1), small_student(s)
    optimizer, batch = (
        make_optimizer(student, config, s.dtype),
        torch.randint(320, (parts, 17), device=CUDA),
    )
    return counted(
        lambda: Download(
            torch.stack(train_step(student, optimizer, batch, config, s.dtype, 0))
        ).wait()
    )


def count_token_step(s: Shape, head: bool) -> int:
    student, critic = small_student(s), ValueHead(64).to(CUDA) if head else None
    with torch.no_grad(), autocast(s), student.lowered(s.dtype):
        step = TokenStep(student, critic, 3, 9, Sampling(8, eos=0, seed=0))
        step.start([torch.arange(9)], [0] * 3, 0)
        step.advance()
        step.advance()
    graph: Any = step.graphs[3]  # the simulated device's
    return len(graph.kernels)


def count_ppo(s: Shape, config: InteractConfig) -> tuple[str, str]:
    """From stories on the host to the updated policy."""
    micro = config.micro_batch_size
    rows, size = -(-config.stories_per_step // micro), -(-config.minibatch_size // micro)
    config = replace(config, stories_per_step=rows, minibatch_size=size, micro_batch_size=1)
    zeros, each = torch.zeros(12), dict(text="", ended="length")
    stories = [
        Story(
            i,
            "",
            prompt_ids=torch.arange(5),
            tokens=torch.randint(320, (12,)),
            logprobs=zeros - 5.8,
            values=zeros,
            entropies=zeros,
            **each,
        )
        for i in range(rows)
    ]
    student, reference = small_student(s), small_student(s)
    compute = Compute(CUDA, s.dtype, {})
    policy = new_policy(config, student, RandomTokenizer(320), {}, compute)

    def step() -> None:
        batch = ppo.with_reference(policy, collate(stories, CUDA), reference)
        ppo.step(policy, batch, [0.1 * i for i in range(rows)], config.kl_coef)

    return counted(step)


def autocast(s: Shape) -> torch.autocast:
    return Compute(CUDA, s.dtype, {}).autocast()


# --- on paper -------------------------------------------------------------------------------------
def pretraining(name: str, s: Shape, config: PretrainConfig) -> Work:
    rows, parts = config.batch_size, -(-config.batch_size // config.micro_batch_size)
    tokens = rows * s.T
    flops = 3 * s.forward(tokens, s.T) + 6 * tokens * s.V * s.C
    moved = 3 * s.activations(tokens, True) + 18 * tokens * s.V + s.weights(parts, parts, 1)
    moved += s.parameters * 32  # the norm, and AdamW
    if config.optimizer == "muon":
        m, heads = s.C, s.C // 64
        flops += s.L * (2 * (4 * 4 * m**3 + 18 * m**3) + 4 * heads * (4 * 64**2 * m + 18 * 64**3))
        # twice two momenta, the cast, Newton-Schulz and its Gram matrices, instead of AdamW
        moved += s.matrices * 30
    return Work(
        f"{name}: pretraining, {rows} x {s.T}", s, flops, moved, *count_pretraining(s, config)
    )


def rollout(name: str, s: Shape, rows: int, new: int, head: bool) -> Work:
    """All rows to their last token; cached keys and values are read anew for each."""
    flops = new * rows * (2 * s.matrices + 2 * s.V * s.C)
    weights = new * s.dtype.itemsize * (s.matrices + s.V * s.C)
    cache = rows * new * (s.prompt + new / 2) * 2 * s.C * s.L * s.dtype.itemsize
    moved = weights + cache + new * (s.activations(rows) + 8 * rows * s.V)
    graphs = f"{new} graphs of {count_token_step(s, head)}"
    waits = str(-(-new // READ_TOGETHER))
    return Work(f"{name}: rollout, {rows} x {new}", s, flops, moved, graphs, waits)


def learning(name: str, s: Shape, config: InteractConfig) -> Work:
    """The reference's pass, advantages, then epochs of forward and backward passes; token_logprob
    computes logits again to go back."""
    rows, new, epochs = config.stories_per_step, config.max_new_tokens, config.epochs
    updates = epochs * -(-rows // (config.minibatch_size or rows))
    tokens, written, parts = (
        rows * (s.prompt + new),
        rows * new,
        -(-rows // config.micro_batch_size),
    )
    trunk, logits = s.forward(tokens, s.prompt + new), 2 * written * s.V * s.C
    flops = trunk + logits + epochs * (3 * trunk + 4 * logits)
    moved = s.activations(tokens) + epochs * 3 * s.activations(tokens, True)
    moved += written * s.V * (s.logits(False) + epochs * s.logits(True))
    moved += s.weights(parts * (1 + epochs), parts * epochs, updates)
    moved += s.parameters * 40 * updates  # the norm, its factor, Adam
    if config.learner == "ridge":  # in float64, twice over features of 2 C + 5
        D = 2 * s.C + 5
        flops, moved = flops + written * 2 * D**2, moved + 2 * written * (24 * s.C + 44 * D)
    return Work(
        f"{name}: PPO, {rows} x {new}, {epochs} epochs", s, flops, moved, *count_ppo(s, config)
    )


def main() -> None:
    install()
    install_project()
    demo, large = Shape(3, 192, 2048, 256, prompt=8), Shape(12, 768, 16_000, 512, prompt=20)
    # micro-batches as on a large GPU: tinystory/student/memory.py
    ours = InteractConfig(micro_batch_size=96)
    paper_ppo = InteractConfig(**INTERACT_PRESETS["paper"], micro_batch_size=120)
    sixty_four = replace(paper_ppo, stories_per_step=64, micro_batch_size=64)
    paper32 = replace(large, dtype=torch.float32)
    table = [
        pretraining("demo", demo, PretrainConfig()),
        rollout("demo", demo, ours.stories_per_step, ours.max_new_tokens, False),
        learning("demo", demo, ours),
        pretraining("gpt2s", large, PretrainConfig(batch_size=32)),
        rollout("gpt2s", large, 360, 90, True),
        learning("gpt2s", large, sixty_four),
        pretraining("paper", large, PretrainConfig(**PRETRAIN_PRESETS["paper"])),
        rollout("paper", paper32, 360, 90, True),
        learning("paper", paper32, paper_ppo),
    ]
    print("| " + " | ".join(NAMES) + " |\n|" + "---|" * len(NAMES))
    for work in table:
        print("| " + " | ".join(work.row()) + " |")


if __name__ == "__main__":
    main()
