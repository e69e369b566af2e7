"""The interaction's optimizer: Adam, with one direction more."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tinystory.config import InteractConfig
from tinystory.student.model import Student, ValueHead


class SharpAdam(torch.optim.Adam):
    """Adam with one more direction: s, the logarithm of a factor on all logits, with a learning rate of its own.

    The correlation between a story's log-ratio along a direction and its reward bounds what a step along it can gain,
    and of 70 directions that scale a part of the student this is the only one that 256 stories tell from noise
    (LOG.md). The gain and bias of the final norm, into which s is folded after each step, can go there too, but at
    Adam's rate they go as fast in 255 directions of noise. `readers`, the weights that read the norm's output besides
    the logits (a value head's), are divided by the same factor, so s changes no value.
    """

    def __init__(
        self, norm: nn.LayerNorm, parameters: Iterable[nn.Parameter], lr: float, rate: float, eps: float,
        readers: Sequence[Tensor] = (),
    ):  # fmt: skip
        self.norm, self.readers = norm, readers
        self.sharpness = nn.Parameter(torch.zeros((), device=norm.weight.device))
        groups = [dict(params=list(parameters), lr=lr), dict(params=[self.sharpness], lr=rate)]
        super().__init__([group | {"initial_lr": group["lr"]} for group in groups], eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody passes a closure
        scaled = (self.norm.weight, self.norm.bias)
        slopes = [(p.grad * p).sum() for p in scaled if p.grad is not None]
        slopes += [-(p.grad * p).sum() for p in self.readers if p.grad is not None]
        self.sharpness.grad = torch.stack(slopes).sum()
        super().step()
        for p in scaled:
            p.mul_(self.sharpness.exp())
        for weight in self.readers:
            weight.div_(self.sharpness.exp())
        self.sharpness.zero_()


def make_optimizer(student: Student, critic: nn.Module, config: InteractConfig) -> tuple[SharpAdam, list[str]]:
    """The optimizer of student and critic, and its parameters' names, in order."""
    parameters = dict(student.named_parameters()) | {f"critic.{name}": p for name, p in critic.named_parameters()}
    readers = [critic.linear.weight] if isinstance(critic, ValueHead) else []
    rates = config.learning_rate, config.sharpness_rate
    optimizer = SharpAdam(student.ln_f, parameters.values(), *rates, config.adam_eps, readers)
    return optimizer, [*parameters, "sharpness"]


def set_learning_rate(optimizer: torch.optim.Optimizer, config: InteractConfig, steps: float) -> None:
    """Constant, or with --lr-decay linear from the initial rate to 0 over all updates of --steps. steps: done so far,
    with the fraction of the present step's updates."""
    for group in optimizer.param_groups if config.lr_decay else ():
        group["lr"] = group["initial_lr"] * (1 - steps / config.steps)
