"""What a step must compute and move on a GPU, from the shapes alone: the table in docs/kernels.md.

python tests/cuda_device/on_paper.py

FLOPs of GEMMs and of causal attention (half of the square). Bytes: each operator of the path on a GPU reads its inputs
once and writes its outputs once, whatever the caches keep. bfloat16, residual stream and logits in float32.
"""

from dataclasses import dataclass

FLOPS, BANDWIDTH = 989e12, 3.35e12  # H100 SXM, dense bfloat16 and HBM3: NVIDIA's data sheet
NAMES = ("work", "TFLOP", "GB", "at least, ms", "launches", "waits")


@dataclass(frozen=True)
class Shape:
    L: int  # layers
    C: int  # width
    V: int  # vocabulary
    T: int  # context

    @property
    def matrices(self) -> int:
        return 12 * self.L * self.C**2

    @property
    def parameters(self) -> int:
        return self.matrices + (self.V + self.T) * self.C + self.L * 13 * self.C

    def forward(self, tokens: float, length: float) -> float:
        """FLOPs of the trunk for tokens in rows of this length."""
        return tokens * (2 * self.matrices + 2 * self.L * length * self.C)

    def activations(self, tokens: float) -> float:
        """Bytes of a forward pass: per layer two norms (12 C each), qkv 8 C, attention 8 C, its projection 4 C, the MLP
        36 C. A backward pass moves about twice as much."""
        return tokens * self.L * 80 * self.C


@dataclass(frozen=True)
class Work:
    """launches: as tests/train/test_dispatched.py counts them, per micro-batch or token. waits: as the simulated device
    counts them."""

    name: str
    flops: float
    bytes: float
    launches: str
    waits: str

    def row(self) -> tuple[str, ...]:
        ms = 1e3 * max(self.flops / FLOPS, self.bytes / BANDWIDTH)
        return self.name, f"{self.flops / 1e12:.3g}", f"{self.bytes / 1e9:.3g}", f"{ms:.3g}", self.launches, self.waits


def pretraining(name: str, s: Shape, rows: int, micro: int, launches: int) -> Work:
    tokens, parts = rows * s.T, -(-rows // micro)
    logits = 2 * tokens * s.V * s.C
    flops = 3 * s.forward(tokens, s.T) + 3 * logits
    optimizer = s.parameters * (28 + 6 + 8 * parts)  # AdamW, copies in 16 bits, gradients added up
    moved = 3 * s.activations(tokens) + 18 * tokens * s.V + optimizer
    return Work(f"{name}: pretraining, {rows} x {s.T}", flops, moved, f"{parts} x {launches}", "1")


def rollout(name: str, s: Shape, rows: int, new: int, launches: int) -> Work:
    """All rows to their last token; cached keys and values are read anew for each."""
    flops = new * rows * (2 * s.matrices + 2 * s.V * s.C)
    weights = new * 2 * (s.matrices + s.V * s.C)
    cache = rows * new * new / 2 * 4 * s.C * s.L
    moved = weights + cache + new * (s.activations(rows) + 8 * rows * s.V)
    return Work(f"{name}: rollout, {rows} x {new}", flops, moved, f"{new} graphs of {launches}", f"{new} + endings")


def ppo(name: str, s: Shape, rows: int, new: int, epochs: int, micro: int, updates: int, launches: int) -> Work:
    """The reference's pass, then epochs of forward and backward; token_logprob computes logits again to go back."""
    tokens, length, parts = rows * (new + 8), new + 8, epochs * -(-rows // micro)
    trunk, logits = s.forward(tokens, length), 2 * rows * new * s.V * s.C
    flops = trunk + logits + epochs * (3 * trunk + 4 * logits)
    moved = s.activations(tokens) * (1 + 3 * epochs) + rows * new * s.V * (8 + 22 * epochs)
    moved += s.parameters * (34 * updates + 8 * parts)
    return Work(
        f"{name}: PPO, {rows} x {new}, {epochs} epochs", flops, moved, f"{parts} x {launches}", f"{2 * updates + 8}"
    )


def main() -> None:
    demo, gpt2s, paper = Shape(3, 192, 2048, 256), Shape(12, 768, 16_000, 512), Shape(12, 768, 16_000, 512)
    table = [
        pretraining("demo", demo, 8, 16, DEMO[0]), rollout("demo", demo, 768, 200, DEMO[2]),
        ppo("demo", demo, 768, 200, 1, 32, 8, DEMO[1]),
        pretraining("gpt2s", gpt2s, 32, 32, GPT2[0]), rollout("gpt2s", gpt2s, 360, 90, GPT2[2]),
        ppo("gpt2s", gpt2s, 64, 90, 4, 32, 4, GPT2[1]),
        pretraining("paper", paper, 256, 32, GPT2[3]), rollout("paper", paper, 360, 90, GPT2[2]),
        ppo("paper", paper, 360, 90, 4, 32, 4, GPT2[1]),
    ]  # fmt: skip
    print("| " + " | ".join(NAMES) + " |\n|" + "---|" * len(NAMES))
    for work in table:
        print("| " + " | ".join(work.row()) + " |")


# Launches per pretraining micro-batch, PPO micro-batch, token step and pretraining micro-batch with dropout.
DEMO, GPT2 = (136, 230, 41, 146), (460, 554, 104, 470)

if __name__ == "__main__":
    main()
