"""PPO: token rewards with a KL penalty, generalised advantage estimates, the clipped loss, and the
update of the policy. This is the step of every learner; a row of the table in learners.py replaces
the advantages and the loss.

The formulas follow the PPOTrainer of TRL 0.9.4, which the paper used (arXiv 2509.15714), after
Ziegler et al. 2019 (arXiv 1909.08593). Tensors are (n,), one entry per token of the stories, or
padded tables (B, N), one row per story, with a mask that is True at tokens."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from tinystory import ops
from tinystory.config import InteractConfig
from tinystory.data.batches import by_length
from tinystory.rl.batch import Batch, spans
from tinystory.rl.critic import RidgeCritic
from tinystory.rl.packing import hidden_at
from tinystory.rl.policy import Policy
from tinystory.run import distributed
from tinystory.run.device import upload
from tinystory.student.model import Student

# The clipping range of the value (cliprange_value in TRL 0.9.4), and the mean policy ratio above
# which a minibatch is skipped (ratio_threshold).
CLIP_VALUE = 0.2
MAX_RATIO = 10.0
# An optimizer step is undone if the KL from the rollout policy exceeds this multiple of --kl-target.
# The demo's first update reaches 16 nats per story, 2.7 times its target, and its students improve.
MAX_UPDATE_KL = 3.0
# Metrics that `backward` sums over the tokens of a minibatch.
STATISTICS = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "mean_ratio")


def response_logprobs(student: Student, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the stories' tokens, (n,), and the hidden states that predict these
    tokens, (n, C). Columns that are padding in all rows are skipped."""
    columns = int(batch.input_lengths.max())
    tokens = batch.inputs[:, :columns]
    # The hidden state at position p predicts token p + 1, so the last token of the prompt predicts
    # the first token of the story.
    row_starts = np.arange(len(batch)) * columns
    predictors = spans(row_starts + batch.prompt_lengths - 1, batch.lengths)
    hidden = hidden_at(
        student,
        tokens,
        upload(predictors, tokens.device),
        batch.openings,
        batch.prompt_lengths,
        batch.input_lengths,
    )
    logprobs, _ = ops.token_logprob(hidden, student.unembedding, batch.tokens)
    return logprobs, hidden


# ---- before the update ---------------------------------------------------------------------------


@torch.no_grad()
def with_reference(policy: Policy, batch: Batch, reference: Student) -> Batch:
    """The batch with ref_logprobs and, if the ridge critic or the score model reads them, with
    ref_hidden. reference: the frozen starting checkpoint. The micro-batches are sharded over
    processes."""
    config = policy.config
    needs_hidden = isinstance(policy.critic, RidgeCritic) or config.grades > 0
    width = reference.config.n_embd if needs_hidden else 0
    logprobs = torch.zeros_like(batch.logprobs)
    hidden = logprobs.new_zeros(len(logprobs), width)
    micro_batches = [*by_length(batch.input_lengths, config.micro_batch_size)]
    with policy.autocast(), reference.lowered(ops.matmul_dtype(reference.wte.weight)):
        for rows in distributed.shard_strided(micro_batches):
            part_logprobs, part_hidden = response_logprobs(reference, batch.rows(rows))
            indices = batch.token_indices(rows)
            logprobs[indices] = part_logprobs
            if needs_hidden:
                hidden[indices] = part_hidden.float()
    return replace(
        batch,
        ref_logprobs=distributed.all_reduce_sum(logprobs),
        ref_hidden=distributed.all_reduce_sum(hidden),
    )


def token_rewards(batch: Batch, story_rewards: Tensor, kl_coef: float) -> Tensor:
    """Token rewards, (n,): -kl_coef * (logprob - ref_logprob) at each token, plus the reward of the
    story at the story's last token, or in parts at the words that the teacher scored.
    story_rewards: (B,)."""
    rewards = batch.rewards - kl_coef * (batch.logprobs - batch.ref_logprobs)
    last_tokens = upload(batch.lengths.cumsum() - 1, rewards.device)
    rewards[last_tokens] += story_rewards
    return rewards


def ridge_targets(config: InteractConfig, critic: nn.Module, batch: Batch) -> Batch:
    """`gae_targets` with the values of the ridge critic instead of the rollout's."""
    assert isinstance(critic, RidgeCritic)
    observed_returns = batch.unpadded(discounted(batch.padded(batch.rewards), config.gamma))
    values = critic.estimate(batch, observed_returns)
    return gae_targets(config, critic, replace(batch, values=values))


def gae_targets(config: InteractConfig, critic: nn.Module, batch: Batch) -> Batch:
    """The batch with whitened generalised advantage estimates and returns, from its rewards and
    values."""
    mask = batch.padded(torch.ones_like(batch.rewards)).bool()
    table, returns = advantages_and_returns(
        batch.padded(batch.rewards), batch.padded(batch.values), config.gamma, config.lam
    )
    advantages = batch.unpadded(whiten(table, mask))
    return replace(batch, advantages=advantages, returns=batch.unpadded(returns))


def advantages_and_returns(
    rewards: Tensor, values: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (Schulman et al. 2015, arXiv 1506.02438, eq. 16), and returns
    = advantages + values. All tables are (B, N) and 0 after the end of a story."""
    next_values = nn.functional.pad(values[:, 1:], (0, 1))
    errors = rewards + gamma * next_values - values  # the temporal differences, delta in eq. 12
    advantages = discounted(errors, gamma * lam)
    return advantages, advantages + values


def discounted(x: Tensor, factor: float) -> Tensor:
    """Discounted sums, (B, N): for each token t, the sum of factor^(u - t) x[u] over u >= t.
    Computed as one product with a triangular matrix instead of a loop."""
    token = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
    steps_ahead = token[:, None] - token  # [u, t] is u - t
    weights = factor ** steps_ahead.clamp(min=0)
    return x @ weights.tril()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x shifted and scaled to mean 0 and variance 1 over the entries where mask is True (Bessel's
    correction, epsilon 1e-8)."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean) ** 2 * mask).sum() / count
    variance = variance * count / (count - 1).clamp(min=1)
    return (x - mean) * torch.rsqrt(variance + 1e-8)


def next_kl_coef(coef: float, kl: float, stories: int, config: InteractConfig) -> float:
    """KL coefficient of the next step, from an adaptive controller (Ziegler et al. 2019, section
    2.2). kl: nats per story. stories: number of stories with a reward."""
    error = min(max(kl / config.kl_target - 1, -0.2), 0.2)
    return coef * (1 + error * stories / config.kl_horizon)


def step(
    policy: Policy,
    batch: Batch,
    story_rewards: Sequence[float | None],
    kl_coef: float,
    steps: int = 0,
) -> dict[str, float]:
    """Metrics of one step: token rewards, advantages, and the update of the policy. batch: a result
    of `with_reference`. story_rewards: a story with None has no gradient. steps: number of steps done
    before this one."""
    config, learner = policy.config, policy.learner
    # a function of the step, so that a resumed run repeats an uninterrupted one
    torch.manual_seed(config.seed * 1_000_003 + steps)
    scored = [row for row, reward in enumerate(story_rewards) if reward is not None]
    batch = batch.rows(np.array(scored))
    rewards = torch.tensor([story_rewards[row] for row in scored], device=batch.inputs.device)

    mean_kl = float(batch.story_sums(batch.logprobs - batch.ref_logprobs).mean())
    mean_reward = float(rewards.mean())
    statistics = {
        "reward_mean": mean_reward,
        "reward_std": float(rewards.std(correction=int(len(scored) > 1))),
        "unscored": len(story_rewards) - len(scored),
        "kl": mean_kl,
        "kl_coef": kl_coef,
        "objective": mean_reward - kl_coef * mean_kl,
    }

    is_kl_in_reward = config.kl_in == "reward" and not learner.kl_in_loss
    per_token = token_rewards(batch, rewards, kl_coef if is_kl_in_reward else 0.0)
    batch = learner.targets(config, policy.critic, replace(batch, rewards=per_token))
    if learner.select:
        batch = batch.rows(learner.select(batch))
    if learner.statistics:
        statistics |= learner.statistics(config, batch, kl_coef)
    return statistics | update(policy, batch, kl_coef, steps)


# ---- the update ----------------------------------------------------------------------------------


def update(policy: Policy, batch: Batch, kl_coef: float, steps: int = 0) -> dict[str, float]:
    """Mean metrics over the optimizer steps of one update: config.epochs passes over the batch,
    with one optimizer step per minibatch.

    kl_coef: weight of the KL penalty with --kl-in loss, or beta of DPO. steps: number of steps done
    before this one. An optimizer step is undone, and the learning rates are halved for the rest of
    the run, if the next minibatch shows a KL from the rollout policy above MAX_UPDATE_KL times
    --kl-target: a student that another rate would suit is not destroyed by a few updates. The
    last minibatch shows it for the last step.

    PyTorch's global generator draws the order of the minibatches. Gradients are
    summed over micro-batches and processes, and divided by the number of tokens of the minibatch.
    So --micro-batch-size and the number of processes affect only memory and speed."""
    student, optimizer, config = policy.student, policy.optimizer, policy.config
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with policy.autocast():
        dtype = ops.matmul_dtype(student.wte.weight)

    totals = dict.fromkeys((*STATISTICS, "grad_norm"), 0.0)
    ratio_error = 0.0
    update_kl = 0.0
    largest_kl = MAX_UPDATE_KL * config.kl_target
    updates = 0
    skipped = 0
    undone = 0
    weights_before: list[Tensor] = []  # before the last optimizer step

    def undo() -> None:
        with torch.no_grad():
            torch._foreach_copy_(parameters, weights_before)
        weights_before.clear()
        policy.halve_learning_rates()

    for epoch in range(config.epochs):
        minibatches = shuffled_minibatches(
            len(batch), config.minibatch_size, policy.learner.together
        )
        for i, minibatch in enumerate(minibatches):
            if config.lr_decay:  # linearly to 0
                epochs_done = epoch + i / len(minibatches)
                done = (steps + epochs_done / config.epochs) / config.steps
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * (1 - done)
            optimizer.zero_grad()
            with student.lowered(dtype):
                sums, largest_ratio_error = backward(policy, batch, minibatch, kl_coef)
            # before the first optimizer step, only rounding makes a ratio differ from 1
            if epoch == 0 and i == 0:
                ratio_error = float(largest_ratio_error)
            sums = distributed.all_reduce_sum(sums)
            statistics = dict(zip(STATISTICS, sums.tolist(), strict=True))
            kl = statistics["approx_kl"] * float(batch.lengths[minibatch].mean())
            update_kl = max(update_kl, kl)
            if weights_before and not kl <= largest_kl:  # also true for NaN
                undo()
                undone += 1
                continue
            if not statistics["mean_ratio"] <= MAX_RATIO:
                skipped += 1
                continue

            distributed.all_reduce_gradients(parameters)
            max_norm = config.grad_clip or math.inf
            statistics["grad_norm"] = float(nn.utils.clip_grad_norm_(parameters, max_norm))
            weights_before = [p.detach().clone() for p in parameters]
            optimizer.step()
            updates += 1
            for name in totals:
                totals[name] += statistics[name]
    optimizer.zero_grad()
    if weights_before:
        kl = kl_from_rollout(policy, batch, minibatch)
        update_kl = max(update_kl, kl)
        if not kl <= largest_kl:
            undo()
            undone += 1

    means = {name: total / max(updates, 1) for name, total in totals.items()}
    del means["mean_ratio"]
    explained_variance = math.nan  # fraction of the variance of the returns
    if policy.learner.critic:
        residual = batch.returns - batch.values
        explained_variance = 1 - float(residual.var() / batch.returns.var())
    return means | {
        "ratio_error": distributed.all_reduce_max(ratio_error),
        "skipped": skipped,
        "undone": undone,
        "update_kl": update_kl,
        "explained_variance": explained_variance,
    }


@torch.no_grad()
def kl_from_rollout(policy: Policy, batch: Batch, minibatch: np.ndarray) -> float:
    """KL(rollout policy || student), nats per story, estimated by k3. minibatch: rows of the
    batch."""
    shard = np.array(distributed.shard_strided(minibatch.tolist()), np.int64)
    total = torch.zeros((), dtype=torch.float64, device=batch.inputs.device)
    with policy.autocast(), policy.student.lowered(ops.matmul_dtype(policy.student.wte.weight)):
        for rows in by_length(batch.input_lengths[shard], policy.config.micro_batch_size):
            part = batch.rows(shard[rows])
            logprob, _ = response_logprobs(policy.student, part)
            total += k3(logprob - part.logprobs).sum()
    return float(distributed.all_reduce_sum(total)) / len(minibatch)


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
    policy: Policy, batch: Batch, minibatch: np.ndarray, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """Sums of STATISTICS over this process's tokens of a minibatch, divided by the number of tokens
    of the whole minibatch, (5,) float64, and the largest |ratio - 1|. Accumulates the gradients,
    which are divided in the same way.

    minibatch: rows of the batch. The results stay on the device, so that the host does not wait for
    a GPU."""
    config, learner = policy.config, policy.learner
    tokens = int(batch.lengths[minibatch].sum())
    sums = torch.zeros(len(STATISTICS), dtype=torch.float64, device=batch.inputs.device)
    largest_ratio_error = torch.zeros((), device=batch.inputs.device)
    # stories, or pairs of stories
    units = minibatch.reshape(-1, learner.together).tolist()
    shard = np.array(distributed.shard_strided(units), np.int64).reshape(-1, learner.together)
    longest = batch.input_lengths[shard].max(1)
    for rows in by_length(longest, config.micro_batch_size // learner.together):
        part = batch.rows(shard[rows].flatten())
        with policy.autocast():
            logprob, hidden = response_logprobs(policy.student, part)
            value = None if policy.value_head is None else policy.value_head(hidden)

        token_loss, is_clipped = learner.loss(config, part, logprob, kl_coef)
        if config.kl_in == "loss":
            token_loss = token_loss + kl_coef * k3(part.ref_logprobs - logprob)
        if learner.weights:
            token_loss = token_loss * learner.weights(config, part, tokens, len(minibatch))
        value_loss = squared_error(part, value)
        loss = (token_loss.sum() + config.value_coef * value_loss.sum()) / tokens
        loss.backward()

        with torch.no_grad():
            ratio = torch.exp(logprob - part.logprobs)
            approx_kl = (ratio - 1) - ratio.log()
            per_token = (token_loss, value_loss, is_clipped, approx_kl, ratio)
            sums += torch.stack([x.sum().double() for x in per_token]) / tokens
            largest_ratio_error = torch.maximum(largest_ratio_error, (ratio - 1).abs().max())
    return sums, largest_ratio_error


def clipped_loss(
    config: InteractConfig, batch: Batch, logprob: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """PPO's loss of each token, (n,), and whether it is clipped, (n,) bool: -min(r A, clip(r, 1 - c,
    1 + c) A), where r is the probability ratio of the token (Schulman et al. 2017, arXiv
    1707.06347, eq. 7). logprob: (n,), under the policy."""
    return clipped(config, batch, torch.exp(logprob - batch.logprobs))


def clipped(config: InteractConfig, batch: Batch, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """The clipped loss for given ratios, (n,), and whether it is clipped, (n,) bool."""
    clipped_ratio = ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
    loss = -batch.advantages * ratio
    loss_of_clipped = -batch.advantages * clipped_ratio
    is_clipped = loss_of_clipped.detach() > loss.detach()
    return torch.maximum(loss, loss_of_clipped), is_clipped


def k3(log_ratio: Tensor) -> Tensor:
    """The k3 estimate of a KL, (n,) (Schulman 2020, joschu.net/blog/kl-approx.html), as in eq. 4 of
    GRPO. log_ratio: (n,), the other policy's log-probability minus that of the policy that wrote
    the tokens."""
    return torch.exp(log_ratio) - log_ratio - 1


def squared_error(batch: Batch, value: Tensor | None) -> Tensor:
    """Half the squared error of the values, (n,). value: (n,), from the value head; the error is
    the larger one of this value and of this value clipped to within CLIP_VALUE of the old value.
    With None, the error is that of the batch's values, without gradient."""
    if value is None:
        return 0.5 * (batch.values - batch.returns) ** 2
    change = (value - batch.values).clamp(-CLIP_VALUE, CLIP_VALUE)
    clipped_value = batch.values + change
    error = (value - batch.returns) ** 2
    clipped_error = (clipped_value - batch.returns) ** 2
    return 0.5 * torch.maximum(error, clipped_error)
