"""One step of learning from stories: token rewards with a KL penalty, and the update of PPO and its
kin.

Formulas follow TRL's PPOTrainer; learners.py has what differs. Tensors are (n,), one entry per
token of the stories."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tinystory import ops
from tinystory.config import InteractConfig
from tinystory.rl.batch import Batch, by_length, spans
from tinystory.rl.learners import LEARNERS, Size
from tinystory.rl.packing import pack
from tinystory.rl.policy import Policy
from tinystory.rl.replay import Texts
from tinystory.run import distributed
from tinystory.run.device import upload
from tinystory.student.loss import next_token_loss
from tinystory.student.model import Student

MEANS = ("policy_loss", "value_loss", "clip_fraction", "approx_kl")


def token_rewards(story_rewards: Tensor, batch: Batch, kl_coef: float) -> Tensor:
    """(n,): -kl_coef * (logprob - ref_logprob) at each token, plus the story's reward, (B,), at its
    last token."""
    rewards = -kl_coef * (batch.logprobs - batch.ref_logprobs)
    rewards[upload(batch.lengths.cumsum() - 1, rewards.device)] += story_rewards
    return rewards


def next_kl_coef(coef: float, kl: float, stories: int, config: InteractConfig) -> float:
    """The next step's KL coefficient. kl: nats per story (adaptive controller: Ziegler et al. 2019,
    section 2.2)."""
    error = min(max(kl / config.kl_target - 1, -0.2), 0.2)
    return coef * (1 + error * stories / config.kl_horizon)


def response_logprobs(student: Student, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """(n,) log-probabilities of the stories' tokens, and (n, C) the states that predict them.
    Columns that are padding in all rows are skipped. A shared opening is computed once on a CPU,
    but not on a GPU, whose sums of its gradients would depend on the threads' order."""
    T = int(batch.input_lengths.max())
    tokens, places = (
        batch.inputs[:, :T],
        spans(np.arange(len(batch)) * T + batch.prompt_lengths - 1, batch.lengths),
    )
    packing = (
        None
        if ops.on_gpu(tokens)
        else pack(batch.openings, batch.prompt_lengths, batch.input_lengths)
    )
    if packing is None:
        states = student.hidden(tokens).flatten(0, 1).index_select(0, upload(places, tokens.device))
    else:
        states = packing.hidden(student, tokens).index_select(0, packing.source[places])
    return ops.token_logprob(states / temperature, student.wte.weight, batch.tokens)[0], states


@torch.no_grad()
def read_reference(
    reference: Student, batch: Batch, config: InteractConfig, states: bool | None = None
) -> Batch:
    """The batch with ref_logprobs under the frozen starting checkpoint, and with ref_states if
    `states`, by default if the ridge critic or the score model reads them."""
    if states is None:
        states = config.learner == "ridge" or config.graded > 0
    logprobs = torch.zeros_like(batch.logprobs)
    all_states = logprobs.new_zeros(len(logprobs), reference.config.n_embd) if states else None
    with reference.lowered(ops.matmul_dtype(reference.wte.weight)):
        for rows in distributed.shard_strided(
            [*by_length(batch.input_lengths, config.micro_batch_size)]
        ):
            part = batch.rows(rows)
            logprobs[part.places], part_states = response_logprobs(
                reference, part, config.temperature
            )
            if all_states is not None:
                all_states[part.places] = part_states.float()
    all_states = None if all_states is None else distributed.all_reduce_sum(all_states)
    return dataclasses.replace(
        batch, ref_logprobs=distributed.all_reduce_sum(logprobs), ref_states=all_states
    )


@torch.no_grad()
def reread(policy: Policy, batch: Batch) -> Batch:
    """The batch with the policy's own logprobs and values, for stories that were sampled with
    dropout."""
    head = policy.value_head
    own = read_reference(policy.student, batch, policy.config, states=head is not None)
    values = batch.values if head is None else head(own.ref_states)
    return dataclasses.replace(batch, logprobs=own.ref_logprobs, values=values)


def step(
    policy: Policy,
    batch: Batch,
    story_rewards: Sequence[float | None],
    kl_coef: float,
    steps: int = 0,
    texts: Texts = (),
) -> dict[str, float]:
    """One step: token rewards, advantages, the update. Returns its statistics. batch: from
    `read_reference`. story_rewards: a story without one gives no gradient. steps: done before this
    one. texts: see `update`."""
    config, learner = policy.config, LEARNERS[policy.config.learner]
    batch = batch.rows([row for row, reward in enumerate(story_rewards) if reward is not None])
    rewards = torch.tensor(
        [reward for reward in story_rewards if reward is not None], device=batch.inputs.device
    )
    mean_kl = float(batch.story_sums(batch.logprobs - batch.ref_logprobs).mean())
    reward_mean = float(rewards.mean())
    stats = dict(
        reward_mean=reward_mean,
        reward_std=float(rewards.std()),
        unscored=len(story_rewards) - len(rewards),
    )
    stats |= dict(kl=mean_kl, kl_coef=kl_coef, objective=reward_mean - kl_coef * mean_kl)
    in_reward, in_loss = (kl_coef, 0.0) if config.kl_in == "reward" else (0.0, kl_coef)
    batch = learner.advantages(
        config, policy.critic, batch, token_rewards(rewards, batch, in_reward)
    )
    batch = dataclasses.replace(batch, ref_states=None)  # no micro-batch needs its part of them
    return stats | update(policy, batch, in_loss, steps, texts)


def update(
    policy: Policy, batch: Batch, kl_coef: float = 0.0, steps: int = 0, texts: Texts = ()
) -> dict[str, float]:
    """config.epochs passes over the batch, with one optimizer step per minibatch. Returns their
    statistics.

    kl_coef: the KL penalty's weight in the loss. texts: one batch of the corpus per minibatch,
    whose gradient is added. torch's global generator draws the order of minibatches. Gradients are
    accumulated over micro-batches and processes and divided by the minibatch's tokens, so that both
    affect only memory and speed."""
    student, optimizer, config, device = (
        policy.student,
        policy.optimizer,
        policy.config,
        batch.inputs.device,
    )
    size = min(config.minibatch_size or len(batch), len(batch))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sums = dict.fromkeys((*MEANS, "grad_norm", "replay_loss"), 0.0)
    ratio_error, updates, skipped, words = 0.0, 0, 0, 0
    with policy.autocast():
        dtype = ops.matmul_dtype(student.wte.weight)
    for epoch in range(config.epochs):
        order = np.arange(len(batch)) if size == len(batch) else torch.randperm(len(batch)).numpy()
        minibatches = np.split(order, range(size, len(batch), size))
        for i, minibatch in enumerate(minibatches):
            done = steps + (epoch + i / len(minibatches)) / config.epochs
            for group in optimizer.param_groups if config.lr_decay else ():
                group["lr"] = group["initial_lr"] * (1 - done / config.steps)
            optimizer.zero_grad(set_to_none=True)
            with student.lowered(dtype):
                total, error = backward(policy, batch, minibatch, kl_coef)
            if epoch == i == 0:  # no update yet: any ratio other than 1 is rounding
                ratio_error = float(error)
            *means, mean_ratio = distributed.all_reduce_sum(total).tolist()
            if not mean_ratio <= config.max_ratio:  # also true for NaN
                skipped += 1
                continue
            replay_loss = math.nan
            if texts:
                tokens, text_words = texts[updates + skipped]
                replayed = next_token_loss(
                    student,
                    upload(tokens, device),
                    config.micro_batch_size,
                    dtype,
                    weight=config.replay_weight,
                )
                replay_loss, words = float(replayed), words + text_words
            distributed.all_reduce_gradients(parameters)
            norm = float(nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf))
            optimizer.step()
            updates += 1
            for name, value in zip(sums, (*means, norm, replay_loss), strict=True):
                sums[name] += value
    optimizer.zero_grad(set_to_none=True)
    # the fraction of the returns' variance that the values explain; without values, nan
    explained = math.nan
    if batch.returns is not None and len(batch.returns) > 1:
        explained = 1 - float(
            (batch.returns - batch.values).var() / batch.returns.var().clamp(min=1e-12)
        )
    return {name: value / max(updates, 1) for name, value in sums.items()} | {
        "ratio_error": distributed.all_reduce_max(ratio_error),
        "skipped": skipped,
        "words_replayed": words,
        "explained_variance": explained,
    }


def backward(
    policy: Policy, batch: Batch, minibatch: np.ndarray, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """Add the gradients of this process's stories of a minibatch, rows of the batch, divided by the
    minibatch's tokens.

    Returns sums over the tokens, divided alike, of MEANS and the ratio, (5,) float64, and the
    largest |ratio - 1|. Both stay on the device, so that a GPU runs ahead."""
    config, learner = policy.config, LEARNERS[policy.config.learner]
    size = Size(int(batch.lengths[minibatch].sum()), len(minibatch))
    sums = torch.zeros(5, dtype=torch.float64, device=batch.inputs.device)
    max_ratio_error = torch.zeros((), device=batch.inputs.device)
    shard = np.array(distributed.shard_strided(minibatch.tolist()), np.int64)
    for rows in by_length(batch.input_lengths[shard], config.micro_batch_size):
        part = batch.rows(shard[rows])
        with policy.autocast():
            logprob, states = response_logprobs(policy.student, part, config.temperature)
            value = None if policy.value_head is None else policy.value_head(states)
        policy_loss, clipped = learner.loss(config, part, logprob)
        if kl_coef:
            policy_loss = policy_loss + kl_coef * k3(part, logprob)
        if learner.weights:
            policy_loss = policy_loss * learner.weights(config, part, size)
        values_loss = value_loss(config, part, value)
        loss = (policy_loss.sum() + config.value_coef * values_loss.sum()) / size.tokens
        loss.backward()
        with torch.no_grad():
            ratio = torch.exp(logprob - part.logprobs)
            max_ratio_error = torch.maximum(max_ratio_error, (ratio - 1).abs().max())
            parts = (policy_loss, values_loss, clipped, (ratio - 1) - ratio.log(), ratio)
            sums += torch.stack([x.sum().double() for x in parts]) / size.tokens
    return sums, max_ratio_error


def k3(batch: Batch, logprob: Tensor) -> Tensor:
    """(n,): estimated KL from the reference (Schulman 2020, joschu.net/blog/kl-approx.html), as in
    GRPO's eq. 4."""
    log_ratio = batch.ref_logprobs - logprob
    return torch.exp(log_ratio) - log_ratio - 1


def value_loss(config: InteractConfig, batch: Batch, value: Tensor | None) -> Tensor:
    """(n,): half the squared error of the value head, whose values are clipped to within clip_value
    of the old ones if that error is larger; half the ridge critic's squared error, without
    gradient; 0 without values."""
    if batch.returns is None:
        return torch.zeros_like(batch.logprobs)
    if value is None:
        return 0.5 * (batch.values - batch.returns) ** 2
    clipped = batch.values + (value - batch.values).clamp(-config.clip_value, config.clip_value)
    return 0.5 * torch.maximum((value - batch.returns) ** 2, (clipped - batch.returns) ** 2)
