"""The table of learners: what each learner puts in the place of PPO's advantages and loss (ppo.py).

RLOO, GRPO, Dr. GRPO, DPO and fine-tuning follow the trainers of TRL 1.16.0. Tensors are (n,), one
entry per story token of a batch, or (B,), one entry per story."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinystory.config import InteractConfig
from tinystory.rl.batch import Batch
from tinystory.rl.critic import RidgeCritic
from tinystory.rl.policy import Learner
from tinystory.rl.ppo import clipped, clipped_loss, gae_targets, ridge_targets
from tinystory.run.device import upload
from tinystory.run.errors import UserError
from tinystory.student.model import ValueHead

Baseline = Callable[[Tensor, Tensor], Tensor]

# ---- learners that compare the stories with the same opening -------------------------------------


def group_targets(
    baseline: Baseline, config: InteractConfig, critic: nn.Module, batch: Batch
) -> Batch:
    """The batch with the same advantage for all tokens of a story. baseline: advantages (B,) from
    the stories' returns (B,) and groups (B,) int64, which are equal for stories with the same
    opening."""
    groups = upload(batch.indices // config.stories_per_opening, batch.inputs.device)
    story_advantages = baseline(batch.story_sums(batch.rewards), groups)
    return without_critic(batch, batch.unpadded(story_advantages[:, None]))


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


def _group_sums(x: Tensor, groups: Tensor) -> Tensor:
    """Sum of x over the group of each entry, (B,). Computed as a matrix product, because a GPU adds
    the terms of a matrix product in a fixed order."""
    same_group = groups[:, None] == groups
    return (same_group.double() @ x.double()).to(x.dtype)


def story_ratio_loss(
    config: InteractConfig, batch: Batch, logprob: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """RLOO's loss of each token, (n,), and whether it is clipped, (n,) bool: the clipped loss with
    the ratio of the whole story, which is one action (Ahmadian et al. 2024, arXiv 2402.14740)."""
    story_ratios = torch.exp(batch.story_sums(logprob - batch.logprobs))
    return clipped(config, batch, batch.unpadded(story_ratios[:, None]))


def per_story(config: InteractConfig, batch: Batch, tokens: int, stories: int) -> Tensor:
    """Weights of the tokens, (n,), in a minibatch of `tokens` tokens and `stories` stories: the
    loss is a mean over stories of the mean over a story's tokens, 1/G sum_i 1/|o_i| sum_t, as in
    GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3). For DPO this is the mean over pairs."""
    return token_weights(batch, tokens / (stories * batch.lengths))


def per_token_limit(config: InteractConfig, batch: Batch, tokens: int, stories: int) -> Tensor:
    """The weights of `per_story` with --max-new-tokens in place of |o_i|, as in Dr. GRPO (Liu et al.
    2025, arXiv 2503.20783, figure 1)."""
    limits = np.full_like(batch.lengths, config.max_new_tokens)
    return token_weights(batch, tokens / (stories * limits))


def token_weights(batch: Batch, story_weights: np.ndarray) -> Tensor:
    """The weight of each token's story, (n,). story_weights: (B,)."""
    weights = upload(story_weights.astype(np.float32), batch.inputs.device)
    return batch.unpadded(weights[:, None])


# ---- DPO -----------------------------------------------------------------------------------------


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


def in_a_pair(batch: Batch) -> np.ndarray:
    """Rows of the stories with a sign of `best_against_worst`: the two stories of a pair are
    neighbours."""
    signs = batch.padded(batch.advantages)[:, 0]
    return signs.cpu().numpy().nonzero()[0]


def pair_loss(
    config: InteractConfig, batch: Batch, logprob: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """DPO's loss, (n,), for every token of both stories of a pair: -log sigmoid(beta margin)
    (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), and that it is never clipped. kl_coef: beta."""
    pair_losses = -nn.functional.logsigmoid(kl_coef * margins(batch, logprob))
    story_losses = pair_losses[:, None].expand(-1, 2).flatten()
    return batch.unpadded(story_losses[:, None]), torch.zeros_like(logprob, dtype=torch.bool)


def margins(batch: Batch, logprob: Tensor) -> Tensor:
    """Margins of the pairs, (B / 2,): log-ratio of policy and reference of the winner minus that of
    the loser. logprob: (n,), under the policy."""
    signed_log_ratios = batch.advantages * (logprob - batch.ref_logprobs)
    return batch.story_sums(signed_log_ratios).view(-1, 2).sum(1)


def pair_statistics(config: InteractConfig, batch: Batch, kl_coef: float) -> dict[str, float]:
    """Metrics of the pairs before the update."""
    pair_margins = margins(batch, batch.logprobs)
    openings = config.stories_per_step // config.stories_per_opening
    return {
        "pairs": len(pair_margins) / openings,
        "pair_accuracy": float((pair_margins > 0).float().mean()),
        "pair_margin": kl_coef * float(pair_margins.mean()),
    }


# ---- fine-tuning on the best stories -------------------------------------------------------------


def equal_targets(config: InteractConfig, critic: nn.Module, batch: Batch) -> Batch:
    """The batch with advantages of 1."""
    return without_critic(batch, torch.ones_like(batch.rewards))


def best_quarter(batch: Batch) -> np.ndarray:
    """Rows, in order, of the quarter of the stories with the highest returns, rounded up. RAFT
    instead takes the best story of each opening."""
    returns = batch.story_sums(batch.rewards)
    count = math.ceil(len(returns) / 4)
    best_first = returns.argsort(descending=True, stable=True)
    return best_first[:count].sort().values.cpu().numpy()


def likelihood_loss(
    config: InteractConfig, batch: Batch, logprob: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """-log p of each token, (n,), as in RAFT (Dong et al. 2023, arXiv 2304.06767, algorithm 1), and
    that it is never clipped."""
    return -logprob, torch.zeros_like(logprob, dtype=torch.bool)


def without_critic(batch: Batch, advantages: Tensor) -> Batch:
    """The batch of a learner without a critic: values and returns are 0."""
    zeros = torch.zeros_like(batch.rewards)
    return replace(batch, advantages=advantages, values=zeros, returns=zeros)


# ---- the table -----------------------------------------------------------------------------------

# Learners that compare stories, with the clipped ratio of PPO.
IN_GROUPS: dict[str, Any] = {"compares": True, "options": ("clip_ratio", "kl_in")}

LEARNERS = {
    "ridge": Learner(
        ridge_targets,
        clipped_loss,
        critic=RidgeCritic,
        options=("clip_ratio", "kl_in", "gamma", "lam"),
    ),
    "gae": Learner(
        gae_targets,
        clipped_loss,
        critic=ValueHead,
        options=("clip_ratio", "kl_in", "gamma", "lam", "value_coef"),
    ),
    "rloo": Learner(partial(group_targets, rloo), story_ratio_loss, weights=per_story, **IN_GROUPS),
    "grpo": Learner(partial(group_targets, grpo), clipped_loss, weights=per_story, **IN_GROUPS),
    "dr_grpo": Learner(
        partial(group_targets, dr_grpo), clipped_loss, weights=per_token_limit, **IN_GROUPS
    ),
    "dpo": Learner(
        partial(group_targets, best_against_worst),
        pair_loss,
        weights=per_story,
        compares=True,
        select=in_a_pair,
        statistics=pair_statistics,
        together=2,
        kl_in_loss=True,
    ),
    "sft-best": Learner(
        equal_targets,
        likelihood_loss,
        select=best_quarter,
        options=("kl_in",),
    ),
}


def check(config: InteractConfig) -> None:
    """Raises UserError for options that do not go with the learner."""
    name = config.learner
    learner = LEARNERS[name]
    group = config.stories_per_opening
    for option, flag in config.changed_options().items():
        readers = [each for each in LEARNERS if option in LEARNERS[each].options]
        if readers and name not in readers:
            raise UserError(
                f"{flag} has no effect with --learner {name}, only with "
                f"{' or '.join(readers)}: leave {flag} out, or change --learner"
            )
    if learner.compares and (group < 2 or config.stories_per_step % group):
        raise UserError(
            f"--learner {name} compares stories with the same opening, but --stories-per-opening is "
            f"{group} and --stories-per-step {config.stories_per_step}: give --stories-per-opening 2 or "
            "more, and --stories-per-step a multiple of --stories-per-opening"
        )
    if learner.kl_in_loss and not config.kl_coef:
        raise UserError(
            f"--learner {name} has no gradient with --kl-coef 0, which is beta of its loss: give "
            "--kl-coef above 0, such as 0.1"
        )
    sizes = config.minibatch_size, config.micro_batch_size
    if learner.together == 2 and any(size % 2 for size in sizes):
        raise UserError(
            f"--learner {name} compares two stories at a time, but --minibatch-size is "
            f"{config.minibatch_size} and --micro-batch-size {config.micro_batch_size}: make both even"
        )
    if learner.critic is RidgeCritic and config.stories_per_step < 2:
        raise UserError(
            f"--learner {name} estimates the value of a story from other stories of the step: give "
            f"--stories-per-step 2 or more instead of {config.stories_per_step}"
        )
