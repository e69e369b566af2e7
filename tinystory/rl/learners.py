"""The learners in one table: how each turns rewards into advantages, and its loss.

Formulas follow TRL: the PPOTrainer of 0.9.4, which the paper used (arXiv 2509.15714), after Ziegler
et al. 2019 (arXiv 1909.08593), and the trainers of 1.16.0 for RLOO, GRPO, Dr. GRPO and fine-tuning.
Tensors are (n,), one entry per story token of a batch, or padded tables (B, N), one row per story,
with a mask that is True at tokens."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tinystory.config import InteractConfig, changed_options
from tinystory.rl.batch import Batch
from tinystory.rl.critic import RidgeCritic
from tinystory.run.device import upload
from tinystory.run.errors import UserError
from tinystory.student.model import ValueHead

Baseline = Callable[[Tensor, Tensor], Tensor]  # (returns (B,), groups (B,)) -> advantages (B,)

# ---- losses (n,) per token, before weighting, and whether each is clipped (n,). logprob: (n,), the policy's.


def ppo_loss(
    config: InteractConfig, batch: Batch, logprob: Tensor, ratio: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - c, 1 + c) A), where r is `ratio`, by default the token's probability
    ratio. PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7); also for GRPO and Dr. GRPO."""
    ratio = torch.exp(logprob - batch.logprobs) if ratio is None else ratio
    loss = -batch.advantages * ratio
    clipped = -batch.advantages * ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
    return torch.maximum(loss, clipped), clipped.detach() > loss.detach()


def rloo_loss(config: InteractConfig, batch: Batch, logprob: Tensor) -> tuple[Tensor, Tensor]:
    """`ppo_loss` with the ratio of the whole story, which is one action (Ahmadian et al. 2024,
    arXiv 2402.14740)."""
    log_ratios = batch.story_sums(logprob - batch.logprobs)
    return ppo_loss(config, batch, logprob, batch.packed(torch.exp(log_ratios)[:, None]))


def cross_entropy(config: InteractConfig, batch: Batch, logprob: Tensor) -> tuple[Tensor, Tensor]:
    """-log p: RAFT (Dong et al. 2023, arXiv 2304.06767, algorithm 1) fine-tunes on the best
    stories."""
    return -logprob, torch.zeros_like(logprob, dtype=torch.bool)


# ---- weights (n,) of the tokens in the mean over a minibatch, by default all 1 -------------------


class Size(NamedTuple):
    """A minibatch's size, over all processes."""

    tokens: int
    stories: int


def story_mean(config: InteractConfig, batch: Batch, size: Size) -> Tensor | float:
    """1/G sum_i 1/|o_i| sum_t: the mean of stories' token means. GRPO (Shao et al. 2024, arXiv
    2402.03300, eq. 3)."""
    weights = size.tokens / (size.stories * batch.lengths)
    return batch.packed(upload(weights.astype(np.float32), batch.inputs.device)[:, None])


def longest_mean(config: InteractConfig, batch: Batch, size: Size) -> Tensor | float:
    """1/G sum_i 1/L sum_t, L the most tokens of a story. Dr. GRPO (Liu et al. 2025, arXiv
    2503.20783, figure 1)."""
    return size.tokens / (size.stories * config.max_new_tokens)


# ---- advantages from token rewards (n,), see `ppo.token_rewards` ---------------------------------


def gae(config: InteractConfig, critic: nn.Module, batch: Batch, rewards: Tensor) -> Batch:
    """Generalised advantage estimates, whitened, and the returns that a value head learns."""
    values, mask = batch.padded(batch.values), batch.padded(torch.ones_like(rewards)).bool()
    advantages, returns = advantages_and_returns(
        batch.padded(rewards), values, mask, config.gamma, config.lam
    )
    advantages = whiten(advantages, mask)
    return dataclasses.replace(
        batch, advantages=batch.packed(advantages), returns=batch.packed(returns)
    )


def ridge(config: InteractConfig, critic: nn.Module, batch: Batch, rewards: Tensor) -> Batch:
    """`gae` with values from the critic's regression on the reference's states."""
    assert isinstance(critic, RidgeCritic)
    batch = dataclasses.replace(
        batch, returns=batch.packed(discounted(batch.padded(rewards), config.gamma))
    )
    return gae(config, critic, dataclasses.replace(batch, values=critic.estimate(batch)), rewards)


def grouped(
    baseline: Baseline, config: InteractConfig, critic: nn.Module, batch: Batch, rewards: Tensor
) -> Batch:
    """Advantages that compare the stories to an opening by `baseline`, the same for all tokens of a
    story."""
    groups = upload(batch.indices // config.stories_per_opening, rewards.device)
    return dataclasses.replace(
        batch, advantages=batch.packed(baseline(batch.story_sums(rewards), groups)[:, None])
    )


def best_stories(config: InteractConfig, critic: nn.Module, batch: Batch, rewards: Tensor) -> Batch:
    """The best quarter of the step, without advantages. RAFT takes the best of each opening."""
    return batch.rows(best_quarter(batch.story_sums(rewards)).cpu().numpy())


def rloo(returns: Tensor, groups: Tensor) -> Tensor:
    """(B,): each story's return minus the mean of the others in its group; 0 if it is alone. RLOO
    (Ahmadian et al. 2024, arXiv 2402.14740). returns: (B,), reward and KL penalty; groups: (B,)
    int64, equal within a group."""
    count, total = _group_sums(torch.ones_like(returns), groups), _group_sums(returns, groups)
    return torch.where(count > 1, returns - (total - returns) / (count - 1).clamp(min=1), 0.0)


def dr_grpo(returns: Tensor, groups: Tensor) -> Tensor:
    """(B,): each story's return minus the mean of its group. Dr. GRPO (Liu et al. 2025, arXiv
    2503.20783, figure 1)."""
    return returns - _group_sums(returns, groups) / _group_sums(torch.ones_like(returns), groups)


def grpo(returns: Tensor, groups: Tensor) -> Tensor:
    """(B,): `dr_grpo` over the group's standard deviation. GRPO (Shao et al. 2024, arXiv
    2402.03300, section 4.1.2); Bessel's correction and 1e-4 added, as in TRL."""
    centred, count = dr_grpo(returns, groups), _group_sums(torch.ones_like(returns), groups)
    return centred / ((_group_sums(centred**2, groups) / (count - 1).clamp(min=1)).sqrt() + 1e-4)


def _group_sums(x: Tensor, groups: Tensor) -> Tensor:
    """(B,): the sum over each entry's group, as a matrix product, which a GPU adds up in a fixed
    order."""
    return ((groups[:, None] == groups).double() @ x.double()).to(x.dtype)


def best_quarter(returns: Tensor) -> Tensor:
    """Indices, in order, of the highest quarter of returns, (B,), rounded up."""
    return returns.argsort(descending=True, stable=True)[: -(-len(returns) // 4)].sort().values


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
    places = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
    away = places[:, None] - places
    return x @ torch.where(away < 0, 0.0, factor ** away.clamp(min=0))


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (Schulman et al. 2015, arXiv 1506.02438, eq. 16) and returns
    = advantages + values, both (B, N) and 0 off the mask. rewards: (B, N), per token."""
    values, rewards = values * mask, rewards * mask
    next_values = nn.functional.pad(values[:, 1:], (0, 1))
    advantages = discounted(rewards + gamma * next_values - values, gamma * lam)
    return advantages * mask, (advantages + values) * mask


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learner:
    """critic: its class, made from the student's width, or None. groups: whether it compares the
    stories of a step to the same opening. reads: the options that it reads and some other learner
    does not."""

    advantages: Callable[[InteractConfig, nn.Module, Batch, Tensor], Batch]
    loss: Callable[[InteractConfig, Batch, Tensor], tuple[Tensor, Tensor]]
    weights: Callable[[InteractConfig, Batch, Size], Tensor | float] | None = None
    critic: type[RidgeCritic] | type[ValueHead] | None = None
    groups: bool = False
    reads: tuple[str, ...] = ("clip_ratio",)


GAE = ("clip_ratio", "gamma", "lam")
LEARNERS = {
    "ridge": Learner(ridge, ppo_loss, critic=RidgeCritic, reads=GAE),
    "gae": Learner(gae, ppo_loss, critic=ValueHead, reads=(*GAE, "clip_value", "value_coef")),
    "rloo": Learner(partial(grouped, rloo), rloo_loss, story_mean, groups=True),
    "grpo": Learner(partial(grouped, grpo), ppo_loss, story_mean, groups=True),
    "dr_grpo": Learner(partial(grouped, dr_grpo), ppo_loss, longest_mean, groups=True),
    "sft-best": Learner(best_stories, cross_entropy, reads=()),
}


def check(config: InteractConfig) -> None:
    """Raises UserError for options that do not go with the learner."""
    name, group, changed = config.learner, config.stories_per_opening, changed_options(config)
    for option in dict.fromkeys(
        option for learner in LEARNERS.values() for option in learner.reads
    ):
        readers = [name for name, learner in LEARNERS.items() if option in learner.reads]
        if option in changed and name not in readers:
            raise UserError(
                f"{changed[option]} is read by --learner {' or '.join(readers)} only: leave it out"
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
