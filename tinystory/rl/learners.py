"""The table of learners: how each learner turns rewards into advantages, and the loss of each.

Formulas follow TRL. PPO follows the PPOTrainer of TRL 0.9.4, which the paper used (arXiv
2509.15714), after Ziegler et al. 2019 (arXiv 1909.08593). RLOO, GRPO, Dr. GRPO, DPO and fine-tuning
follow the trainers of TRL 1.16.0.

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
    """Loss of each token, (n,), and whether the loss is clipped, (n,) bool.

    logprob: (n,), log-probabilities under the policy. kl_coef: beta of DPO.

    PPO, GRPO and Dr. GRPO: -min(r A, clip(r, 1 - c, 1 + c) A), where r is the probability ratio of
    the token (Schulman et al. 2017, arXiv 1707.06347, eq. 7). RLOO: the same with the ratio of the
    whole story, which is one action (Ahmadian et al. 2024, arXiv 2402.14740). sft-best: -log p of
    the best stories, as in RAFT (Dong et al. 2023, arXiv 2304.06767, algorithm 1). DPO: -log
    sigmoid(beta margin), for every token of both stories of a pair (Rafailov et al. 2023, arXiv
    2305.18290, eq. 7)."""
    not_clipped = torch.zeros_like(logprob, dtype=torch.bool)
    if config.learner == "sft-best":
        return -logprob, not_clipped
    if config.learner == "dpo":
        pair_losses = -nn.functional.logsigmoid(kl_coef * margins(config, batch, targets, logprob))
        story_losses = pair_losses[:, None].expand(-1, 2).flatten()
        return batch.unpadded(story_losses[:, None]), not_clipped
    log_ratio = logprob - batch.logprobs
    if config.learner == "rloo":
        story_ratios = torch.exp(batch.story_sums(log_ratio))
        ratio = batch.unpadded(story_ratios[:, None])
    else:
        ratio = torch.exp(log_ratio)
    clipped_ratio = ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
    loss = -targets.advantages * ratio
    loss_of_clipped = -targets.advantages * clipped_ratio
    is_clipped = loss_of_clipped.detach() > loss.detach()
    return torch.maximum(loss, loss_of_clipped), is_clipped


def margins(config: InteractConfig, batch: Batch, targets: Targets, logprob: Tensor) -> Tensor:
    """Margins of the pairs, (B / 2,): log-ratio of policy and reference of the winner minus that of
    the loser. The two stories of a pair are neighbours in the batch.

    A log-ratio is summed over the tokens of a story. With --length-normalised it is averaged
    instead, as in SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 4), which has no reference.
    logprob: (n,), log-probabilities under the policy."""
    signed_log_ratios = targets.advantages * (logprob - targets.ref_logprobs)
    stories = batch.story_sums(signed_log_ratios)
    if config.length_normalised:
        stories = stories / upload(batch.lengths, logprob.device)
    return stories.view(-1, 2).sum(1)


def story_weights(config: InteractConfig, batch: Batch, tokens: int, stories: int) -> Tensor:
    """Weights of the tokens, (n,), in the mean over a minibatch of `tokens` tokens and `stories`
    stories, for learners that compare stories.

    The loss is a mean over stories of the mean over a story's tokens, 1/G sum_i 1/|o_i| sum_t, as
    in GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3). For DPO this is the mean over pairs. Dr.
    GRPO (Liu et al. 2025, arXiv 2503.20783, figure 1) replaces |o_i| by --max-new-tokens."""
    lengths = batch.lengths
    if config.learner == "dr_grpo":
        lengths = np.full_like(lengths, config.max_new_tokens)
    weights = (tokens / (stories * lengths)).astype(np.float32)
    return batch.unpadded(upload(weights, batch.inputs.device)[:, None])


# ---- targets -------------------------------------------------------------------------------------


def targets_of(
    config: InteractConfig, critic: nn.Module, batch: Batch, reference: Reference, rewards: Tensor
) -> Targets:
    """Targets of the learner's loss, from token rewards (n,) of `ppo.token_rewards`.

    With a critic, the advantages are whitened generalised advantage estimates, from the values of
    the rollout (value head) or of the ridge critic. With a baseline, all tokens of a story have the
    story's advantage. Otherwise all advantages are 1."""
    learner = LEARNERS[config.learner]
    if learner.critic is None:
        zeros = torch.zeros_like(rewards)
        advantages = torch.ones_like(rewards)
        if learner.baseline:
            groups = upload(batch.indices // config.stories_per_opening, rewards.device)
            story_advantages = learner.baseline(batch.story_sums(rewards), groups)
            advantages = batch.unpadded(story_advantages[:, None])
        return Targets(advantages, reference.logprobs, zeros, zeros)

    values = batch.values
    reward_table = batch.padded(rewards)
    if isinstance(critic, RidgeCritic):
        observed_returns = batch.unpadded(discounted(reward_table, config.gamma))
        values = critic.estimate(batch, reference, observed_returns)
    mask = batch.padded(torch.ones_like(rewards)).bool()
    table, returns = advantages_and_returns(
        reward_table, batch.padded(values), config.gamma, config.lam
    )
    advantages = batch.unpadded(whiten(table, mask))
    return Targets(advantages, reference.logprobs, values, batch.unpadded(returns))


def rloo(returns: Tensor, groups: Tensor) -> Tensor:
    """Advantages of RLOO, (B,): each story's return minus the mean return of the other stories in
    the group; 0 for a group of one (Ahmadian et al. 2024, arXiv 2402.14740). returns: (B,), reward
    minus KL penalty. groups: (B,) int64, equal within a group."""
    count = _group_sums(torch.ones_like(returns), groups)
    sum_of_others = _group_sums(returns, groups) - returns
    mean_of_others = sum_of_others / (count - 1).clamp(min=1)
    return torch.where(count > 1, returns - mean_of_others, 0.0)


def dr_grpo(returns: Tensor, groups: Tensor) -> Tensor:
    """Advantages of Dr. GRPO, (B,): each story's return minus the mean return of the group (Liu et
    al. 2025, arXiv 2503.20783, figure 1)."""
    count = _group_sums(torch.ones_like(returns), groups)
    return returns - _group_sums(returns, groups) / count


def grpo(returns: Tensor, groups: Tensor) -> Tensor:
    """Advantages of GRPO, (B,): those of `dr_grpo` divided by the standard deviation of the group
    (Shao et al. 2024, arXiv 2402.03300, section 4.1.2). As in TRL, the standard deviation has
    Bessel's correction, and 1e-4 is added."""
    centred = dr_grpo(returns, groups)
    count = _group_sums(torch.ones_like(returns), groups)
    variance = _group_sums(centred**2, groups) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-4)


def best_against_worst(returns: Tensor, groups: Tensor) -> Tensor:
    """Signs for DPO, (B,): in each group 1 for the story with the highest return, -1 for the story
    with the lowest, and 0 for the others; 0 for all stories of a group if their returns are equal.

    There is one pair per opening, as in SimPO (arXiv 2405.14734, section 3). The returns of this
    pair differ most, so noise in the scores swaps winner and loser least often, and no story is in
    two pairs."""
    same_group = groups[:, None] == groups
    row = torch.arange(len(returns), device=returns.device)
    best = torch.where(same_group, returns, -math.inf).argmax(1)  # the first of equal returns
    worst = torch.where(same_group, returns, math.inf).argmin(1)
    return (best == row).to(returns.dtype) - (worst == row).to(returns.dtype)


def _group_sums(x: Tensor, groups: Tensor) -> Tensor:
    """Sum of x over the group of each entry, (B,). Computed as a matrix product, because a GPU adds
    the terms of a matrix product in a fixed order."""
    same_group = groups[:, None] == groups
    return (same_group.double() @ x.double()).to(x.dtype)


def best_quarter(returns: Tensor) -> Tensor:
    """Indices, in order, of the quarter of the stories with the highest returns, rounded up.
    returns: (B,). RAFT instead takes the best story of each opening."""
    count = math.ceil(len(returns) / 4)
    best_first = returns.argsort(descending=True, stable=True)
    return best_first[:count].sort().values


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x shifted and scaled to mean 0 and variance 1 over the entries where mask is True (Bessel's
    correction, epsilon 1e-8)."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean) ** 2 * mask).sum() / count
    variance = variance * count / (count - 1).clamp(min=1)
    return (x - mean) * torch.rsqrt(variance + 1e-8)


def discounted(x: Tensor, factor: float) -> Tensor:
    """Discounted sums, (B, N): for each token t, the sum of factor^(u - t) x[u] over u >= t.
    Computed as one product with a triangular matrix instead of a loop."""
    token = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
    steps_ahead = token[:, None] - token  # [u, t] is u - t
    weights = factor ** steps_ahead.clamp(min=0)
    return x @ weights.tril()


def advantages_and_returns(
    rewards: Tensor, values: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (Schulman et al. 2015, arXiv 1506.02438, eq. 16), and returns
    = advantages + values. All tables are (B, N) and 0 after the end of a story."""
    next_values = nn.functional.pad(values[:, 1:], (0, 1))
    errors = rewards + gamma * next_values - values  # the temporal differences, delta in eq. 12
    advantages = discounted(errors, gamma * lam)
    return advantages, advantages + values


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learner:
    """Properties of a learner. critic: class of the critic, constructed with the student's width;
    None without a critic. baseline: function from returns (B,) and groups (B,) to advantages (B,),
    for learners that compare the stories of a step with the same opening. reads: options that this
    learner uses and some other learner does not. together: number of neighbouring stories that the
    loss compares, which therefore stay in one micro-batch."""

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
                f"{flag} has no effect with --learner {name}, only with "
                f"{' or '.join(readers)}: leave {flag} out, or change --learner"
            )
    if LEARNERS[name].baseline and (group < 2 or config.stories_per_step % group):
        raise UserError(
            f"--learner {name} compares stories with the same opening, but --stories-per-opening is "
            f"{group} and --stories-per-step {config.stories_per_step}: give --stories-per-opening 2 or "
            "more, and --stories-per-step a multiple of --stories-per-opening"
        )
    if name == "dpo" and not config.kl_coef:
        raise UserError(
            "--learner dpo has no gradient with --kl-coef 0, which is beta of DPO: give --kl-coef above "
            "0, such as 0.1"
        )
    if name == "dpo" and (config.minibatch_size % 2 or config.micro_batch_size % 2):
        raise UserError(
            "--learner dpo compares two stories at a time, but --minibatch-size is "
            f"{config.minibatch_size} and --micro-batch-size {config.micro_batch_size}: make both even"
        )
    if name == "ridge" and config.stories_per_step < 2:
        raise UserError(
            "--learner ridge estimates the value of a story from other stories of the step: give "
            f"--stories-per-step 2 or more instead of {config.stories_per_step}"
        )
