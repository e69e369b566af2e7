"""One step of learning from stories: token rewards with a KL penalty, and the update of the policy.

The formulas follow TRL's PPOTrainer; learners.py has the parts that differ between learners.
Tensors are (n,), one entry per token of the stories."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tinystory import ops
from tinystory.config import InteractConfig
from tinystory.data.windows import by_length
from tinystory.rl.batch import Batch, Reference, Targets, spans
from tinystory.rl.learners import (
    LEARNERS,
    best_quarter,
    margins,
    policy_loss,
    story_weights,
    targets_of,
)
from tinystory.rl.packing import pack
from tinystory.rl.policy import Policy
from tinystory.run import distributed
from tinystory.run.device import upload
from tinystory.student.model import Student

# The clipping range of the value (cliprange_value in TRL 0.9.4), and the mean policy ratio above
# which a minibatch is skipped (ratio_threshold).
CLIP_VALUE = 0.2
MAX_RATIO = 10.0
# Metrics that `backward` sums over the tokens of a minibatch.
STATISTICS = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "mean_ratio")


def response_logprobs(student: Student, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the stories' tokens, (n,), and the hidden states that predict these
    tokens, (n, C). Columns that are padding in all rows are skipped. A CPU computes a shared
    opening once. A GPU does not, because there the sum of the opening's gradients would depend on
    the order of the threads."""
    columns = int(batch.input_lengths.max())
    tokens = batch.inputs[:, :columns]
    # The hidden state at position p predicts token p + 1, so the last token of the prompt predicts
    # the first token of the story.
    row_starts = np.arange(len(batch)) * columns
    predictors = spans(row_starts + batch.prompt_lengths - 1, batch.lengths)
    padded_positions = upload(predictors, tokens.device)

    packing = None
    if not ops.on_gpu(tokens):
        packing = pack(batch.openings, batch.prompt_lengths, batch.input_lengths)
    if packing is None:
        padded_hidden = student.hidden(tokens).flatten(0, 1)
        hidden = padded_hidden.index_select(0, padded_positions)
    else:
        packed_hidden = packing.hidden(student, tokens)
        hidden = packed_hidden.index_select(0, packing.source[padded_positions])
    logprobs, _ = ops.token_logprob(hidden, student.unembedding, batch.tokens)
    return logprobs, hidden


# ---- before the update ---------------------------------------------------------------------------


@torch.no_grad()
def read_reference(reference: Student, batch: Batch, config: InteractConfig) -> Reference:
    """Log-probabilities and hidden states of a step's stories under the frozen starting checkpoint,
    float32. The hidden states are (n, 0) unless the ridge critic or the score model uses them. The
    micro-batches are sharded over processes."""
    needs_hidden = config.learner == "ridge" or config.grades > 0
    width = reference.config.n_embd if needs_hidden else 0
    logprobs = torch.zeros_like(batch.logprobs)
    hidden = logprobs.new_zeros(len(logprobs), width)
    micro_batches = [*by_length(batch.input_lengths, config.micro_batch_size)]
    with reference.lowered(ops.matmul_dtype(reference.wte.weight)):
        for rows in distributed.shard_strided(micro_batches):
            part = batch.rows(rows)
            part_logprobs, part_hidden = response_logprobs(reference, part)
            logprobs[part.token_indices] = part_logprobs
            if needs_hidden:
                hidden[part.token_indices] = part_hidden.float()
    return Reference(distributed.all_reduce_sum(logprobs), distributed.all_reduce_sum(hidden))


def token_rewards(
    story_rewards: Tensor, batch: Batch, reference: Reference, kl_coef: float
) -> Tensor:
    """Token rewards, (n,): -kl_coef * (logprob - ref_logprob) at each token, plus the reward of the
    story at the story's last token. story_rewards: (B,)."""
    rewards = -kl_coef * (batch.logprobs - reference.logprobs)
    last_tokens = upload(batch.lengths.cumsum() - 1, rewards.device)
    rewards[last_tokens] += story_rewards
    return rewards


def next_kl_coef(coef: float, kl: float, stories: int, config: InteractConfig) -> float:
    """KL coefficient of the next step, from an adaptive controller (Ziegler et al. 2019, section
    2.2). kl: nats per story. stories: number of stories with a reward."""
    error = min(max(kl / config.kl_target - 1, -0.2), 0.2)
    return coef * (1 + error * stories / config.kl_horizon)


def step(
    policy: Policy,
    batch: Batch,
    reference: Reference,
    story_rewards: Sequence[float | None],
    kl_coef: float,
    steps: int = 0,
) -> dict[str, float]:
    """Metrics of one step: token rewards, advantages, and the update of the policy. reference: from
    `read_reference`. story_rewards: a story with None has no gradient. steps: number of steps done
    before this one."""
    config = policy.config
    # a function of the step, so that a resumed run repeats an uninterrupted one
    torch.manual_seed(config.seed * 1_000_003 + steps)
    scored = [row for row, reward in enumerate(story_rewards) if reward is not None]
    batch = batch.rows(np.array(scored))
    reference = reference.at(batch.token_indices)
    rewards = torch.tensor([story_rewards[row] for row in scored], device=batch.inputs.device)

    is_kl_in_loss = config.kl_in == "loss" or config.learner == "dpo"
    kl_in_reward = 0.0 if is_kl_in_loss else kl_coef
    kl_in_loss = kl_coef if is_kl_in_loss else 0.0
    mean_kl = float(batch.story_sums(batch.logprobs - reference.logprobs).mean())
    mean_reward = float(rewards.mean())
    statistics = {
        "reward_mean": mean_reward,
        "reward_std": float(rewards.std()),
        "unscored": len(story_rewards) - len(scored),
        "kl": mean_kl,
        "kl_coef": kl_coef,
        "objective": mean_reward - kl_coef * mean_kl,
    }

    per_token = token_rewards(rewards, batch, reference, kl_in_reward)
    if config.learner == "sft-best":
        selected = best_quarter(batch.story_sums(per_token)).cpu().numpy()
        batch = batch.rows(selected)
        reference = reference.at(batch.token_indices)
        per_token = per_token.index_select(0, batch.token_indices)
    targets = targets_of(config, policy.critic, batch, reference, per_token)
    if config.learner == "dpo":
        story_advantages = batch.padded(targets.advantages)[:, 0]
        batch = batch.rows(story_advantages.cpu().numpy().nonzero()[0])
        targets = targets.at(batch.token_indices)
        pair_margins = margins(config, batch, targets, batch.logprobs)
        openings = len(story_rewards) // config.stories_per_opening
        statistics |= {
            "pairs": len(pair_margins) / openings,
            "pair_accuracy": float((pair_margins > 0).float().mean()),
            "pair_margin": kl_coef * float(pair_margins.mean()),
        }
    return statistics | update(policy, batch, targets, kl_in_loss, steps)


# ---- the update ----------------------------------------------------------------------------------


def update(
    policy: Policy, batch: Batch, targets: Targets, kl_coef: float = 0.0, steps: int = 0
) -> dict[str, float]:
    """Mean metrics over the optimizer steps of one update: config.epochs passes over the batch,
    with one optimizer step per minibatch.

    kl_coef: weight of the KL penalty in the loss, or beta of DPO. steps: number of steps done
    before this one. PyTorch's global generator draws the order of the minibatches. Gradients are
    summed over micro-batches and processes, and divided by the number of tokens of the minibatch.
    So --micro-batch-size and the number of processes affect only memory and speed."""
    student, optimizer, config = policy.student, policy.optimizer, policy.config
    together = LEARNERS[config.learner].together
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with policy.autocast():
        dtype = ops.matmul_dtype(student.wte.weight)

    totals = dict.fromkeys((*STATISTICS, "grad_norm"), 0.0)
    ratio_error = 0.0
    updates = 0
    skipped = 0
    for epoch in range(config.epochs):
        minibatches = shuffled_minibatches(len(batch), config.minibatch_size, together)
        for i, minibatch in enumerate(minibatches):
            if config.lr_decay:  # linearly to 0
                epochs_done = epoch + i / len(minibatches)
                done = (steps + epochs_done / config.epochs) / config.steps
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * (1 - done)
            optimizer.zero_grad()
            with student.lowered(dtype):
                sums, largest_ratio_error = backward(policy, batch, targets, minibatch, kl_coef)
            # before the first optimizer step, only rounding makes a ratio differ from 1
            if epoch == 0 and i == 0:
                ratio_error = float(largest_ratio_error)
            sums = distributed.all_reduce_sum(sums)
            statistics = dict(zip(STATISTICS, sums.tolist(), strict=True))
            if not statistics["mean_ratio"] <= MAX_RATIO:  # also true for NaN
                skipped += 1
                continue

            distributed.all_reduce_gradients(parameters)
            max_norm = config.grad_clip or math.inf
            statistics["grad_norm"] = float(nn.utils.clip_grad_norm_(parameters, max_norm))
            optimizer.step()
            updates += 1
            for name in totals:
                totals[name] += statistics[name]
    optimizer.zero_grad()

    means = {name: total / max(updates, 1) for name, total in totals.items()}
    del means["mean_ratio"]
    explained_variance = math.nan  # fraction of the variance of the returns
    if LEARNERS[config.learner].critic:
        residual = targets.returns - targets.values
        explained_variance = 1 - float(residual.var() / targets.returns.var())
    return means | {
        "ratio_error": distributed.all_reduce_max(ratio_error),
        "skipped": skipped,
        "explained_variance": explained_variance,
    }


def shuffled_minibatches(stories: int, size: int, together: int = 1) -> list[np.ndarray]:
    """Rows of each minibatch of an epoch; no minibatch if there are no stories. size: stories per
    minibatch; 0: one minibatch of all stories, in order. together: number of neighbouring stories
    that stay side by side."""
    if stories == 0:
        return []
    if not 0 < size < stories:
        return [np.arange(stories)]
    first_rows = torch.randperm(stories // together).numpy() * together
    order = (first_rows[:, None] + np.arange(together)).flatten()
    return np.split(order, range(size, stories, size))


def backward(
    policy: Policy, batch: Batch, targets: Targets, minibatch: np.ndarray, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """Sums of STATISTICS over this process's tokens of a minibatch, divided by the number of tokens
    of the whole minibatch, (5,) float64, and the largest |ratio - 1|. Accumulates the gradients,
    which are divided in the same way.

    minibatch: rows of the batch. The results stay on the device, so that the host does not wait for
    a GPU."""
    config = policy.config
    together = LEARNERS[config.learner].together
    tokens = int(batch.lengths[minibatch].sum())
    sums = torch.zeros(len(STATISTICS), dtype=torch.float64, device=batch.inputs.device)
    largest_ratio_error = torch.zeros((), device=batch.inputs.device)
    units = minibatch.reshape(-1, together).tolist()  # stories, or pairs of stories
    shard = np.array(distributed.shard_strided(units), np.int64).reshape(-1, together)
    longest = batch.input_lengths[shard].max(1)
    for rows in by_length(longest, config.micro_batch_size // together):
        part = batch.rows(shard[rows].flatten())
        target = targets.at(part.token_indices)
        with policy.autocast():
            logprob, hidden = response_logprobs(policy.student, part)
            value = None if policy.value_head is None else policy.value_head(hidden)

        token_loss, is_clipped = policy_loss(config, part, target, logprob, kl_coef)
        if kl_coef and config.learner != "dpo":
            token_loss = token_loss + kl_coef * k3(target, logprob)
        if LEARNERS[config.learner].baseline:
            token_loss = token_loss * story_weights(config, part, tokens, len(minibatch))
        value_loss = squared_error(target, value)
        loss = (token_loss.sum() + config.value_coef * value_loss.sum()) / tokens
        loss.backward()

        with torch.no_grad():
            ratio = torch.exp(logprob - part.logprobs)
            approx_kl = (ratio - 1) - ratio.log()
            per_token = (token_loss, value_loss, is_clipped, approx_kl, ratio)
            sums += torch.stack([x.sum().double() for x in per_token]) / tokens
            largest_ratio_error = torch.maximum(largest_ratio_error, (ratio - 1).abs().max())
    return sums, largest_ratio_error


def k3(targets: Targets, logprob: Tensor) -> Tensor:
    """The k3 estimate of the KL from the reference, (n,) (Schulman 2020,
    joschu.net/blog/kl-approx.html), as in eq. 4 of GRPO."""
    log_ratio = targets.ref_logprobs - logprob
    return torch.exp(log_ratio) - log_ratio - 1


def squared_error(targets: Targets, value: Tensor | None) -> Tensor:
    """Half the squared error of the values, (n,). value: (n,), from the value head; the error is
    the larger one of this value and of this value clipped to within CLIP_VALUE of the old value.
    With None, the error is that of the ridge critic's values, without gradient."""
    if value is None:
        return 0.5 * (targets.values - targets.returns) ** 2
    change = (value - targets.values).clamp(-CLIP_VALUE, CLIP_VALUE)
    clipped = targets.values + change
    error = (value - targets.returns) ** 2
    clipped_error = (clipped - targets.returns) ** 2
    return 0.5 * torch.maximum(error, clipped_error)
