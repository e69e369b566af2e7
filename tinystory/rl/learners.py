"""The learners in one table: how each turns rewards into advantages, and its loss.

Formulas follow TRL: the PPOTrainer of 0.9.4, which the paper used (arXiv 2509.15714), after Ziegler
et al. 2019 (arXiv 1909.08593), and the trainers of 1.16.0 for RLOO, GRPO, Dr. GRPO and fine-tuning.
Tensors are (n,), one entry per story token of a batch, or padded tables (B, N), one row per story,
with a mask that is True at tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tinystory.config import InteractConfig, changed_options
from tinystory.rl.batch import Batch, Reference, Targets
from tinystory.rl.critic import RidgeCritic
from tinystory.run.device import upload
from tinystory.run.errors import UserError
from tinystory.student.model import ValueHead

Baseline = Callable[[Tensor, Tensor], Tensor]  # (returns (B,), groups (B,)) -> advantages (B,)
# ---- losses (n,) per token, before weighting, and whether each is clipped (n,) -------------------
# logprob: (n,), the policy's.


def clipped_loss(
    config: InteractConfig, advantages: Tensor, ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - c, 1 + c) A), where r is the probability ratio. PPO (Schulman et al.
    2017, arXiv 1707.06347, eq. 7)."""
    clipped_ratio = ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
    loss = -advantages * ratio
    loss_of_clipped = -advantages * clipped_ratio
    is_clipped = loss_of_clipped.detach() > loss.detach()
    return torch.maximum(loss, loss_of_clipped), is_clipped


def ppo_loss(
    config: InteractConfig, batch: Batch, targets: Targets, logprob: Tensor
) -> tuple[Tensor, Tensor]:
    """`clipped_loss` of each token's ratio; also for GRPO and Dr. GRPO."""
    return clipped_loss(config, targets.advantages, torch.exp(logprob - batch.logprobs))


def rloo_loss(
    config: InteractConfig, batch: Batch, targets: Targets, logprob: Tensor
) -> tuple[Tensor, Tensor]:
    """`clipped_loss` of the ratio of the whole story, which is one action (Ahmadian et al. 2024,
    arXiv 2402.14740)."""
    story_ratios = torch.exp(batch.story_sums(logprob - batch.logprobs))
    return clipped_loss(config, targets.advantages, batch.packed(story_ratios[:, None]))


def cross_entropy(
    config: InteractConfig, batch: Batch, targets: Targets, logprob: Tensor
) -> tuple[Tensor, Tensor]:
    """-log p: RAFT (Dong et al. 2023, arXiv 2304.06767, algorithm 1) fine-tunes on the best
    stories."""
    return -logprob, torch.zeros_like(logprob, dtype=torch.bool)


# ---- weights (n,) of the tokens in the mean over a minibatch, by default all 1 -------------------


class Size(NamedTuple):
    """A minibatch's size, over all processes."""

    tokens: int
    stories: int


def story_mean_weights(config: InteractConfig, batch: Batch, size: Size) -> Tensor | float:
    """1/G sum_i 1/|o_i| sum_t: the mean of stories' token means. GRPO (Shao et al. 2024, arXiv
    2402.03300, eq. 3)."""
    weights = size.tokens / (size.stories * batch.lengths)
    return batch.packed(upload(weights.astype(np.float32), batch.inputs.device)[:, None])


def longest_mean_weights(config: InteractConfig, batch: Batch, size: Size) -> Tensor | float:
    """1/G sum_i 1/L sum_t, L the most tokens of a story. Dr. GRPO (Liu et al. 2025, arXiv
    2503.20783, figure 1)."""
    return size.tokens / (size.stories * config.max_new_tokens)


# ---- targets from token rewards (n,), see `ppo.token_rewards` ------------------------------------


def gae(
    config: InteractConfig,
    critic: nn.Module,
    batch: Batch,
    reference: Reference,
    rewards: Tensor,
    values: Tensor | None = None,
) -> Targets:
    """Generalised advantage estimates, whitened, and the returns that a value head learns. values:
    (n,), by default those of the rollout."""
    if values is None:
        values = batch.values
    mask = batch.padded(torch.ones_like(rewards)).bool()
    advantages, returns = advantages_and_returns(
        batch.padded(rewards), batch.padded(values), mask, config.gamma, config.lam
    )
    return Targets(
        advantages=batch.packed(whiten(advantages, mask)),
        ref_logprobs=reference.logprobs,
        values=values,
        returns=batch.packed(returns),
    )


def ridge(
    config: InteractConfig, critic: nn.Module, batch: Batch, reference: Reference, rewards: Tensor
) -> Targets:
    """`gae` with values from the critic's regression on the reference's states."""
    assert isinstance(critic, RidgeCritic)
    observed_returns = batch.packed(discounted(batch.padded(rewards), config.gamma))
    values = critic.estimate(batch, reference, observed_returns)
    return gae(config, critic, batch, reference, rewards, values)


def grouped(
    baseline: Baseline,
    config: InteractConfig,
    critic: nn.Module,
    batch: Batch,
    reference: Reference,
    rewards: Tensor,
) -> Targets:
    """Advantages that compare the stories to an opening by `baseline`, the same for all tokens of a
    story."""
    groups = upload(batch.indices // config.stories_per_opening, rewards.device)
    advantages = baseline(batch.story_sums(rewards), groups)
    return Targets(batch.packed(advantages[:, None]), reference.logprobs)


def alike(
    config: InteractConfig, critic: nn.Module, batch: Batch, reference: Reference, rewards: Tensor
) -> Targets:
    """No story and no token is better than another."""
    return Targets(torch.ones_like(rewards), reference.logprobs)


def rloo(returns: Tensor, groups: Tensor) -> Tensor:
    """(B,): each story's return minus the mean of the others in its group; 0 if it is alone. RLOO
    (Ahmadian et al. 2024, arXiv 2402.14740). returns: (B,), reward and KL penalty; groups: (B,)
    int64, equal within a group."""
    count = _group_sums(torch.ones_like(returns), groups)
    sum_of_others = _group_sums(returns, groups) - returns
    mean_of_others = sum_of_others / (count - 1).clamp(min=1)
    return torch.where(count > 1, returns - mean_of_others, 0.0)


def dr_grpo(returns: Tensor, groups: Tensor) -> Tensor:
    """(B,): each story's return minus the mean of its group. Dr. GRPO (Liu et al. 2025, arXiv
    2503.20783, figure 1)."""
    count = _group_sums(torch.ones_like(returns), groups)
    return returns - _group_sums(returns, groups) / count


def grpo(returns: Tensor, groups: Tensor) -> Tensor:
    """(B,): `dr_grpo` over the group's standard deviation. GRPO (Shao et al. 2024, arXiv
    2402.03300, section 4.1.2); Bessel's correction and 1e-4 added, as in TRL."""
    centred = dr_grpo(returns, groups)
    count = _group_sums(torch.ones_like(returns), groups)
    variance = _group_sums(centred**2, groups) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-4)


def _group_sums(x: Tensor, groups: Tensor) -> Tensor:
    """(B,): the sum over each entry's group, as a matrix product, which a GPU adds up in a fixed
    order."""
    same_group = groups[:, None] == groups
    return (same_group.double() @ x.double()).to(x.dtype)


def best_quarter(returns: Tensor) -> Tensor:
    """Indices, in order, of the highest quarter of returns, (B,), rounded up. RAFT takes the best
    of each opening."""
    count = math.ceil(len(returns) / 4)
    best_first = returns.argsort(descending=True, stable=True)
    return best_first[:count].sort().values


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the masked entries (Bessel's correction,
    epsilon 1e-8)."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean) ** 2 * mask).sum() / count
    variance = variance * count / (count - 1).clamp(min=1)
    return (x - mean) * torch.rsqrt(variance + 1e-8)


def discounted(x: Tensor, factor: float) -> Tensor:
    """(B, N): the discounted sum of x from each token on, as one product with a triangular matrix
    instead of a loop."""
    position = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
    distance = position[:, None] - position
    weights = torch.where(distance < 0, 0.0, factor ** distance.clamp(min=0))
    return x @ weights


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (Schulman et al. 2015, arXiv 1506.02438, eq. 16) and returns
    = advantages + values, both (B, N) and 0 off the mask. rewards: (B, N), per token."""
    values = values * mask
    rewards = rewards * mask
    next_values = nn.functional.pad(values[:, 1:], (0, 1))
    errors = rewards + gamma * next_values - values  # the temporal differences, delta in eq. 12
    advantages = discounted(errors, gamma * lam)
    return advantages * mask, (advantages + values) * mask


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learner:
    """select: indices of the stories of a step that it learns from, of their returns, (B,); None:
    all. critic: its class, made from the student's width, or None. groups: whether it compares the
    stories of a step to the same opening. reads: the options that it reads and some other learner
    does not."""

    targets: Callable[[InteractConfig, nn.Module, Batch, Reference, Tensor], Targets]
    loss: Callable[[InteractConfig, Batch, Targets, Tensor], tuple[Tensor, Tensor]]
    weights: Callable[[InteractConfig, Batch, Size], Tensor | float] | None = None
    select: Callable[[Tensor], Tensor] | None = None
    critic: type[RidgeCritic] | type[ValueHead] | None = None
    groups: bool = False
    reads: tuple[str, ...] = ("clip_ratio",)


READ_BY_GAE = ("clip_ratio", "gamma", "lam")
READ_BY_VALUE_HEAD = (*READ_BY_GAE, "value_coef")
LEARNERS = {
    "ridge": Learner(ridge, ppo_loss, critic=RidgeCritic, reads=READ_BY_GAE),
    "gae": Learner(gae, ppo_loss, critic=ValueHead, reads=READ_BY_VALUE_HEAD),
    "rloo": Learner(partial(grouped, rloo), rloo_loss, story_mean_weights, groups=True),
    "grpo": Learner(partial(grouped, grpo), ppo_loss, story_mean_weights, groups=True),
    "dr_grpo": Learner(partial(grouped, dr_grpo), ppo_loss, longest_mean_weights, groups=True),
    "sft-best": Learner(alike, cross_entropy, select=best_quarter, reads=()),
}


def check(config: InteractConfig) -> None:
    """Raises UserError for options that do not go with the learner."""
    name = config.learner
    group = config.stories_per_opening
    for option, flag in changed_options(config).items():
        readers = [name for name, learner in LEARNERS.items() if option in learner.reads]
        if readers and name not in readers:
            raise UserError(
                f"{flag} is read by --learner {' or '.join(readers)} only: leave it out"
            )
    if LEARNERS[name].groups and (group < 2 or config.stories_per_step % group):
        raise UserError(
            f"--learner {name} compares the stories to an opening: give --stories-per-opening 2 or more, and "
            "--stories-per-step a multiple of it"
        )
    if name == "ridge" and config.stories_per_step < 2:
        raise UserError(
            "--learner ridge learns from the other stories of a step: give --stories-per-step 2 or more"
        )
    if name == "gae" and not config.value_coef:
        raise UserError(
            "--learner gae learns from the value loss alone: give --value-coef, say 0.1"
        )
