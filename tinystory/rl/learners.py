"""The learners in one table: how each turns rewards into advantages, and its loss.

Formulas follow TRL: the PPOTrainer of 0.9.4, which the paper used (arXiv 2509.15714), after Ziegler
et al. 2019 (arXiv 1909.08593), and the trainers of 1.16.0 for RLOO, GRPO, Dr. GRPO, DPO and
fine-tuning.
Tensors are (n,), one entry per story token of a batch, or padded tables (B, N), one row per story,
with a mask that is True at tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tinystory.config import InteractConfig, changed_options
from tinystory.rl.batch import Batch, Reference, Targets
from tinystory.rl.critic import RidgeCritic
from tinystory.run.device import upload
from tinystory.run.errors import UserError
from tinystory.student.model import ValueHead

# ---- the loss ------------------------------------------------------------------------------------


def policy_loss(
    config: InteractConfig, batch: Batch, targets: Targets, logprob: Tensor, kl_coef: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(n,): each token's loss, and whether it is clipped. logprob: (n,), the policy's. kl_coef:
    DPO's beta.

    -min(r A, clip(r, 1 - c, 1 + c) A), where r is the probability ratio: PPO (Schulman et al. 2017,
    arXiv 1707.06347, eq. 7), also for GRPO and Dr. GRPO. For RLOO the whole story is one action
    (Ahmadian et al. 2024, arXiv 2402.14740). RAFT (Dong et al. 2023, arXiv 2304.06767, algorithm 1)
    fine-tunes on the best stories: -log p. DPO: -log sigmoid(beta margin) of the pair, for every
    token of its two stories (Rafailov et al. 2023, arXiv 2305.18290, eq. 7)."""
    not_clipped = torch.zeros_like(logprob, dtype=torch.bool)
    if config.learner == "sft-best":
        return -logprob, not_clipped
    if config.learner == "dpo":
        pair_losses = -nn.functional.logsigmoid(kl_coef * margins(config, batch, targets, logprob))
        story_losses = pair_losses[:, None].expand(-1, 2).flatten()
        return batch.packed(story_losses[:, None]), not_clipped
    log_ratio = logprob - batch.logprobs
    if config.learner == "rloo":
        story_ratios = torch.exp(batch.story_sums(log_ratio))
        ratio = batch.packed(story_ratios[:, None])
    else:
        ratio = torch.exp(log_ratio)
    clipped_ratio = ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
    loss = -targets.advantages * ratio
    loss_of_clipped = -targets.advantages * clipped_ratio
    is_clipped = loss_of_clipped.detach() > loss.detach()
    return torch.maximum(loss, loss_of_clipped), is_clipped


def margins(config: InteractConfig, batch: Batch, targets: Targets, logprob: Tensor) -> Tensor:
    """(B / 2,): of each pair, two neighbours in the batch, the winner's log-ratio of policy and
    reference less the loser's. Sums over the tokens, or with --length-normalised means, as in SimPO
    (Meng et al. 2024, arXiv 2405.14734, eq. 4), which has no reference. logprob: (n,), the
    policy's."""
    signed_log_ratios = targets.advantages * (logprob - targets.ref_logprobs)
    stories = batch.story_sums(signed_log_ratios)
    if config.length_normalised:
        stories = stories / upload(batch.lengths, logprob.device)
    return stories.view(-1, 2).sum(1)


def story_weights(config: InteractConfig, batch: Batch, tokens: int, stories: int) -> Tensor:
    """(n,): weights of the tokens in the mean over a minibatch of this size, for learners that
    compare stories.

    1/G sum_i 1/|o_i| sum_t: the mean of stories' token means, GRPO (Shao et al. 2024, arXiv
    2402.03300, eq. 3), and for DPO of pairs' losses; for Dr. GRPO (Liu et al. 2025, arXiv
    2503.20783, figure 1) with the most tokens of a story in place of |o_i|."""
    lengths = batch.lengths
    if config.learner == "dr_grpo":
        lengths = np.full_like(lengths, config.max_new_tokens)
    weights = (tokens / (stories * lengths)).astype(np.float32)
    return batch.packed(upload(weights, batch.inputs.device)[:, None])


# ---- targets -------------------------------------------------------------------------------------


def targets_of(
    config: InteractConfig, critic: nn.Module, batch: Batch, reference: Reference, rewards: Tensor
) -> Targets:
    """From token rewards (n,), see `ppo.token_rewards`: whitened advantage estimates from the
    values of the rollout or of the ridge critic, and the returns that a value head learns;
    advantages by the learner's baseline, the same for all tokens of a story; or 1 everywhere."""
    learner = LEARNERS[config.learner]
    if learner.critic is None:
        zeros = torch.zeros_like(rewards)
        advantages = torch.ones_like(rewards)
        if learner.baseline:
            groups = upload(batch.indices // config.stories_per_opening, rewards.device)
            story_advantages = learner.baseline(batch.story_sums(rewards), groups)
            advantages = batch.packed(story_advantages[:, None])
        return Targets(advantages, reference.logprobs, zeros, zeros)

    values = batch.values
    reward_table = batch.padded(rewards)
    if isinstance(critic, RidgeCritic):
        observed_returns = batch.packed(discounted(reward_table, config.gamma))
        values = critic.estimate(batch, reference, observed_returns)
    mask = batch.padded(torch.ones_like(rewards)).bool()
    table, returns = advantages_and_returns(
        reward_table, batch.padded(values), config.gamma, config.lam
    )
    advantages = batch.packed(whiten(table, mask))
    return Targets(advantages, reference.logprobs, values, batch.packed(returns))


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


def best_against_worst(returns: Tensor, groups: Tensor) -> Tensor:
    """(B,): 1 for the story with the highest return of its group, -1 for the one with the lowest, 0
    for the others, and in a group without two different returns.

    One pair per opening, as in SimPO (arXiv 2405.14734, section 3). Its returns differ most, so
    noise in the scores swaps it least often, and no story is in two pairs."""
    same_group = groups[:, None] == groups
    row = torch.arange(len(returns), device=returns.device)
    best = torch.where(same_group, returns, -math.inf).argmax(1)  # the first of equal ones
    worst = torch.where(same_group, returns, math.inf).argmin(1)
    return (best == row).to(returns.dtype) - (worst == row).to(returns.dtype)


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
    """(B, N): for each token t, the sum of factor^(u - t) x[u] over u >= t. One product with a
    triangular matrix instead of a loop."""
    token = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
    steps_ahead = token[:, None] - token  # [u, t] is u - t
    weights = factor ** steps_ahead.clamp(min=0)
    return x @ weights.tril()


def advantages_and_returns(
    rewards: Tensor, values: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (Schulman et al. 2015, arXiv 1506.02438, eq. 16) and returns
    = advantages + values, all (B, N) and 0 after a story's end."""
    next_values = nn.functional.pad(values[:, 1:], (0, 1))
    errors = rewards + gamma * next_values - values  # the temporal differences, delta in eq. 12
    advantages = discounted(errors, gamma * lam)
    return advantages, advantages + values


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learner:
    """critic: its class, made from the student's width, or None. baseline: (returns (B,), groups
    (B,)) -> advantages (B,), for learners that compare the stories of a step to the same opening.
    reads: the options that it reads and some other learner does not. together: neighbours in the
    batch that its loss compares, so that they stay in one micro-batch."""

    critic: type[RidgeCritic] | type[ValueHead] | None = None
    baseline: Callable[[Tensor, Tensor], Tensor] | None = None
    reads: tuple[str, ...] = ("clip_ratio", "kl_in")
    together: int = 1


LEARNERS = {
    "ridge": Learner(RidgeCritic, reads=("clip_ratio", "kl_in", "gamma", "lam")),
    "gae": Learner(ValueHead, reads=("clip_ratio", "kl_in", "gamma", "lam", "value_coef")),
    "rloo": Learner(baseline=rloo),
    "grpo": Learner(baseline=grpo),
    "dr_grpo": Learner(baseline=dr_grpo),
    "dpo": Learner(baseline=best_against_worst, reads=("length_normalised",), together=2),
    "sft-best": Learner(reads=("kl_in",)),
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
    if LEARNERS[name].baseline and (group < 2 or config.stories_per_step % group):
        raise UserError(
            f"--learner {name} compares the stories to an opening: give --stories-per-opening 2 or more, and "
            "--stories-per-step a multiple of it"
        )
    if name == "dpo" and not config.kl_coef:
        raise UserError(
            "--learner dpo has no gradient with --kl-coef 0, its beta: give one above 0, such as 0.1"
        )
    if name == "dpo" and (config.minibatch_size % 2 or config.micro_batch_size % 2):
        raise UserError(
            "--learner dpo compares two stories at a time: give an even --minibatch-size and an even "
            "--micro-batch-size"
        )
    if name == "ridge" and config.stories_per_step < 2:
        raise UserError(
            "--learner ridge learns from the other stories of a step: give --stories-per-step 2 or more"
        )
