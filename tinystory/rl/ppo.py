"""PPO on stories: per-token rewards, advantages, the clipped losses, the adaptive KL coefficient.

Formulas follow TRL 0.9.4's PPOTrainer, which the paper used (arXiv 2509.15714), itself after Ziegler et al. 2019
(arXiv 1909.08593); PPO is Schulman et al. 2017 (arXiv 1707.06347), GAE Schulman et al. 2015 (arXiv 1506.02438). The
losses of RLOO, GRPO, Dr. GRPO and of fine-tuning on the best stories follow TRL 1.16.0.
Tensors are (B, N): one row per story, one column per response token; `mask` is True at tokens, False at padding.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tinystory import ops
from tinystory.config import InteractConfig
from tinystory.rl.advantages import GROUPED, Critic, best_quarter
from tinystory.rl.packing import pack
from tinystory.run import distributed
from tinystory.run.device import upload
from tinystory.student.generate import Story
from tinystory.student.loss import next_token_loss
from tinystory.student.model import Student, ValueHead


@dataclass
class Learner:
    """What PPO trains, and how. critic: an empty module for learners without values. autocast: the context of the
    forward passes, and of them alone: inside it the backward pass would round the value head's float32 gradient."""

    student: Student
    critic: Critic | ValueHead | nn.Module
    optimizer: torch.optim.Optimizer
    config: InteractConfig
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    @property
    def value_head(self) -> ValueHead | None:
        return self.critic if isinstance(self.critic, ValueHead) else None


@dataclass
class Batch:
    """The stories of one step, right-padded. inputs: (B, T) int64, opening and story but for its last token; predicts:
    (B, T) bool, True where the next token is the story's; tokens: (B, N) int64; mask: (B, N) bool; logprobs, values,
    entropies: (B, N) float32, from when the token was sampled; ref_logprobs: (B, N), the reference's, for k3."""

    inputs: Tensor
    predicts: Tensor
    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    entropies: Tensor
    ref_logprobs: Tensor | None = None

    @cached_property
    def host(self) -> tuple[np.ndarray, np.ndarray]:
        """predicts and mask, for sizes that the host must know: read once, so that no micro-batch waits for a GPU."""
        return self.predicts.cpu().numpy(), self.mask.cpu().numpy()

    @property
    def host_lengths(self) -> np.ndarray:
        """(B,): the inputs of each row, padding not counted."""
        predicts, _ = self.host
        return (predicts * np.arange(1, predicts.shape[1] + 1)).max(1)

    @property
    def lengths(self) -> Tensor:
        """host_lengths as (B,) int64, on the CPU."""
        return torch.from_numpy(self.host_lengths)

    @cached_property
    def places(self) -> Tensor:
        """(tokens,) int64: where the stories' tokens are in (B * N)."""
        return true_places(self.host[1], self.mask.device)

    def packed(self, x: Tensor) -> Tensor:
        """(B, N) -> (tokens,): the entries on the mask, in order."""
        return x.flatten().index_select(0, self.places)

    def padded(self, x: Tensor) -> Tensor:
        """(tokens, ...) float32 -> (B, N, ...), 0 off the mask."""
        zeros = torch.zeros(self.mask.numel(), *x.shape[1:], device=x.device)
        return zeros.index_copy(0, self.places, x).unflatten(0, self.mask.shape)

    def rows(self, rows: Tensor) -> "Batch":
        """rows: int64, on the CPU."""
        at = upload(rows, self.mask.device)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        part = Batch(**{name: x[at] for name, x in fields.items() if x is not None})
        part.host = self.host[0][np.asarray(rows)], self.host[1][np.asarray(rows)]
        return part


def true_places(mask: np.ndarray, device: torch.device) -> Tensor:
    """(n,) int64, on the device: flat indices of a mask's True entries, computed on the host so that no GPU is waited
    for."""
    return upload(torch.from_numpy(np.flatnonzero(mask)), device)


def collate(stories: Sequence[Story], device: torch.device) -> Batch:
    """Stack stories into right-padded tensors."""
    fields = []
    for story in stories:
        opening = story.prompt_ids
        mask = torch.ones(len(story.tokens), dtype=torch.bool)
        predicts = torch.cat([mask.new_zeros(len(opening) - 1), mask])
        inputs = torch.cat([opening, story.tokens[:-1]])
        fields.append((inputs, predicts, story.tokens, mask, story.logprobs, story.values, story.entropies))
    return Batch(*(pad_sequence(list(rows), batch_first=True).to(device) for rows in zip(*fields, strict=True)))


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the masked entries (Bessel's correction, epsilon 1e-8)."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean) ** 2 * mask).sum() / count
    variance = variance * count / (count - 1).clamp(min=1)
    return (x - mean) * torch.rsqrt(variance + 1e-8)


def token_rewards(
    story_rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """(B, N): -kl_coef * (logprob - ref_logprob) at each token, plus the story's reward, (B,), at its last token."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    rows = torch.arange(len(story_rewards), device=story_rewards.device)
    rewards[rows, mask.sum(1) - 1] += story_rewards
    return rewards


def discounted(x: Tensor, factor: float) -> Tensor:
    """(B, N): at each token the sum of x from there on, each token counting `factor` times the one before. As a product
    with a triangular matrix it is one kernel, not one per token."""
    places = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
    away = places[:, None] - places
    return x @ torch.where(away < 0, 0.0, factor ** away.clamp(min=0))


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (eq. 16 of the GAE paper) and returns = advantages + values, both (B, N) and 0
    off the mask. rewards: (B, N), per token."""
    values, rewards = values * mask, rewards * mask
    next_values = nn.functional.pad(values[:, 1:], (0, 1))
    advantages = discounted(rewards + gamma * next_values - values, gamma * lam)
    return advantages * mask, (advantages + values) * mask


class SharpAdam(torch.optim.Adam):
    """Adam with one more direction: s, the logarithm of a factor on all logits, with a learning rate of its own.

    The correlation between a story's log-ratio along a direction and its reward bounds what a step along it can gain,
    and of 70 directions that scale a part of the student this is the only one that 256 stories tell from noise
    (LOG.md). The gain and bias of the final norm, into which s is folded after each step, can go there too, but at
    Adam's rate they go as fast in 255 directions of noise.
    """

    def __init__(self, norm: nn.LayerNorm, parameters: Iterable[nn.Parameter], lr: float, rate: float, eps: float):
        self.norm, self.sharpness = norm, nn.Parameter(torch.zeros((), device=norm.weight.device))
        groups = [dict(params=list(parameters), lr=lr), dict(params=[self.sharpness], lr=rate)]
        super().__init__([group | {"initial_lr": group["lr"]} for group in groups], eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody passes a closure
        scaled = (self.norm.weight, self.norm.bias)
        self.sharpness.grad = torch.stack([(p.grad * p).sum() for p in scaled if p.grad is not None]).sum()
        super().step()
        for p in scaled:
            p.mul_(self.sharpness.exp())
        self.sharpness.zero_()


def make_optimizer(student: Student, critic: nn.Module, config: InteractConfig) -> tuple[SharpAdam, list[str]]:
    """The optimizer of student and critic, and its parameters' names, in order."""
    parameters = dict(student.named_parameters()) | {f"critic.{name}": p for name, p in critic.named_parameters()}
    rates = config.learning_rate, config.sharpness_rate
    return SharpAdam(student.ln_f, parameters.values(), *rates, config.adam_eps), [*parameters, "sharpness"]


def set_learning_rate(optimizer: torch.optim.Optimizer, config: InteractConfig, steps: float) -> None:
    """Constant, or with --lr-decay falling linearly from the initial rates after no step to 0 after --steps; a part of
    a step is the part of its updates that are done."""
    for group in optimizer.param_groups if config.lr_decay else ():
        group["lr"] = group["initial_lr"] * (1 - steps / config.steps)


def response_states(student: Student, batch: Batch) -> Tensor:
    """(tokens, C): forward pass over whole stories, the state from which each response token is predicted, in the order
    of the mask. Columns that are padding in every row are not computed, and on a CPU no opening twice (on a GPU, whose
    sums of gradients by index depend on the threads' order, it is)."""
    lengths, (predicts, _) = batch.host_lengths, batch.host
    T = int(lengths.max())
    tokens, places = batch.inputs[:, :T], true_places(predicts[:, :T], batch.inputs.device)
    packing = None if ops.on_gpu(tokens) else pack(tokens.numpy(), predicts.argmax(1) + 1, lengths)
    if packing is None:
        return student.hidden(tokens).flatten(0, 1).index_select(0, places)
    return packing.hidden(student, tokens).index_select(0, packing.source[places])


def response_stats(
    student: Student, value_head: ValueHead | None, batch: Batch, temperature: float
) -> tuple[Tensor, Tensor]:
    """The log-probability and value (0 without a value head) of every response token, (B, N) each, 0 off the mask."""
    states = response_states(student, batch)
    logprob = token_logprobs(student, states, batch, temperature)
    value = torch.zeros_like(logprob) if value_head is None else value_head(states)
    return batch.padded(logprob), batch.padded(value)


def token_logprobs(student: Student, states: Tensor, batch: Batch, temperature: float) -> Tensor:
    """(tokens,) log-probabilities of the response tokens, given `response_states`."""
    return ops.token_logprob(states / temperature, student.wte.weight, batch.packed(batch.tokens))[0]


def next_kl_coef(coef: float, kl: float, stories: int, config: InteractConfig) -> float:
    """The coefficient of the KL penalty for the next step (adaptive controller: Ziegler et al. 2019, section 2.2)."""
    error = min(max(kl / config.kl_target - 1, -0.2), 0.2)
    return coef * (1 + error * stories / config.kl_horizon)


@torch.no_grad()
def read_reference(
    reference: Student, batch: Batch, temperature: float, micro_batch_size: int, *, states: bool
) -> tuple[Tensor, Tensor]:
    """The stories under the frozen starting checkpoint: (B, N) log-probabilities of their tokens, and the states from
    which it predicts them, (B, N, C) or, if they are not wanted, (B, N, 0); 0 off the mask, float32 both."""
    logprobs = torch.zeros_like(batch.logprobs)
    all_states = logprobs.new_zeros(*logprobs.shape, reference.config.n_embd if states else 0)
    with reference.lowered(ops.matmul_dtype(reference.wte.weight)):
        for rows in distributed.shard_strided(by_length(batch.lengths, micro_batch_size)):
            part = batch.rows(rows)
            part_states = response_states(reference, part)
            at = upload(rows, logprobs.device)
            logprobs[at] = part.padded(token_logprobs(reference, part_states, part, temperature))
            if states:
                all_states[at] = part.padded(part_states.float())
    return distributed.all_reduce_sum(logprobs), distributed.all_reduce_sum(all_states) if states else all_states


@torch.no_grad()
def reread(learner: Learner, batch: Batch) -> Batch:
    """The batch with the policy's own log-probabilities and values, for stories that were sampled with dropout."""
    config, head = learner.config, learner.value_head
    temperature, rows = config.temperature, config.micro_batch_size
    logprobs, states = read_reference(learner.student, batch, temperature, rows, states=head is not None)
    return dataclasses.replace(batch, logprobs=logprobs, values=head(states) * batch.mask if head else batch.values)


def by_length(lengths: Tensor, size: int) -> list[Tensor]:
    """Indices of `lengths` in groups of at most `size`, similar ones together, so that little padding is computed."""
    return [rows for rows in lengths.argsort(stable=True).split(size) if len(rows)]


def step(
    learner: Learner,
    batch: Batch,
    reference: tuple[Tensor, Tensor],
    story_rewards: Sequence[float | None],
    kl_coef: float,
    steps: int = 0,
    reading: Sequence[tuple[Tensor, int]] = (),
) -> dict[str, float]:
    """One PPO step: token rewards, advantages, the update. Returns the step's statistics. reference: the log-probs and
    states of `read_reference`. story_rewards: per row; a row without one gives no gradient. steps: done before this
    one; reading: of `update`."""
    config, critic = learner.config, learner.critic
    scored = torch.tensor([row for row, reward in enumerate(story_rewards) if reward is not None])
    at = scored.to(batch.mask.device)
    batch, ref_logprobs, ref_states = batch.rows(scored), *(x[at] for x in reference)
    rewards = torch.tensor([reward for reward in story_rewards if reward is not None], device=at.device)
    in_reward, in_loss = (kl_coef, 0.0) if config.kl_in == "reward" else (0.0, kl_coef)
    batch.ref_logprobs = ref_logprobs
    per_token = token_rewards(rewards, batch.logprobs, ref_logprobs, batch.mask, in_reward)
    mean_kl = float(((batch.logprobs - ref_logprobs) * batch.mask).sum(1).mean())
    reward_mean = float(rewards.mean())
    stats = dict(reward_mean=reward_mean, reward_std=float(rewards.std()), unscored=len(story_rewards) - len(rewards))
    stats |= dict(kl=mean_kl, kl_coef=kl_coef, objective=reward_mean - kl_coef * mean_kl)
    if config.learner in ("ridge", "gae"):
        if isinstance(critic, Critic):
            targets = discounted(per_token, config.gamma) * batch.mask
            batch = dataclasses.replace(batch, values=critic.estimate(ref_states, ref_logprobs, targets, batch.mask))
        advantages, returns = advantages_and_returns(per_token, batch.values, batch.mask, config.gamma, config.lam)
        advantages = whiten(advantages, batch.mask)
    elif config.learner in GROUPED:  # one advantage per story
        of_story = GROUPED[config.learner](per_token.sum(1), at // config.stories_per_opening)
        advantages, returns = of_story[:, None] * batch.mask, batch.values
    else:
        batch = batch.rows(best_quarter(per_token.sum(1)).cpu())
        advantages, returns = batch.mask.float(), batch.values
    return stats | update(learner, batch, advantages, returns, steps, in_loss, reading)


def update(
    learner: Learner, batch: Batch, advantages: Tensor, returns: Tensor, steps: int = 0, kl_coef: float = 0.0,
    reading: Sequence[tuple[Tensor, int]] = (),
) -> dict[str, float]:  # fmt: skip
    """config.epochs passes of PPO over the batch. advantages: already whitened. Returns the step's statistics. kl_coef:
    of the penalty in the loss. reading: of `Reading.batches`, one per minibatch, to whose gradient its own is added.

    The order of minibatches is drawn from torch's global generator. The gradient of a minibatch is accumulated over
    micro-batches and processes and divided by the number of its tokens, so both affect only memory and speed.
    """
    student, optimizer, config, B = learner.student, learner.optimizer, learner.config, len(batch.tokens)
    minibatch = config.minibatch_size or B
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "grad_norm", "reading_loss")
    sums, ratio_error, updates, skipped, words_read = dict.fromkeys(names, 0.0), 0.0, 0, 0, 0
    with learner.autocast():
        dtype = ops.matmul_dtype(student.wte.weight)
    for epoch in range(config.epochs):
        order = torch.arange(B) if minibatch >= B else torch.randperm(B)
        minibatches = order.split(minibatch)
        for i, chosen in enumerate(minibatches):
            set_learning_rate(optimizer, config, steps + (epoch + i / len(minibatches)) / config.epochs)
            optimizer.zero_grad(set_to_none=True)
            rows = upload(chosen, batch.tokens.device)
            size = batch.mask[rows].sum(), len(rows)
            with student.lowered(dtype):
                shard = distributed.shard_strided(chosen)
                total, error = backward(learner, batch, shard, size, advantages, returns, kl_coef)
            if epoch == i == 0:  # no update yet: any ratio other than 1 is rounding
                ratio_error = float(error)
            *means, mean_ratio = distributed.all_reduce_sum(total).tolist()
            if not mean_ratio <= config.max_ratio:  # also true for NaN
                skipped += 1
                continue
            reading_loss = math.nan
            if reading:
                tokens, words = reading[updates + skipped]
                tokens, weight = upload(tokens, rows.device), config.reading_weight
                reading_loss = float(next_token_loss(student, tokens, config.micro_batch_size, dtype, weight=weight))
                words_read += words
            distributed.all_reduce_gradients(parameters)
            norm = float(nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf))
            optimizer.step()
            updates += 1
            for name, value in zip(sums, (*means, norm, reading_loss), strict=True):
                sums[name] += value
    optimizer.zero_grad(set_to_none=True)
    targets, unexplained = batch.packed(returns), math.nan
    if len(targets) > 1 and config.learner in ("ridge", "gae"):  # one has no variance
        unexplained = float((targets - batch.packed(batch.values)).var() / targets.var().clamp(min=1e-12))
    return {name: value / max(updates, 1) for name, value in sums.items()} | {
        "ratio_error": distributed.all_reduce_max(ratio_error),
        "skipped": skipped,
        "words_read": words_read,
        "explained_variance": 1 - unexplained,
    }


def backward(
    learner: Learner, batch: Batch, shard: Tensor, size: tuple[Tensor, int], advantages: Tensor, returns: Tensor,
    kl_coef: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add to the parameters' gradients those of the stories in `shard`, divided by the minibatch's size: its tokens, or
    for the learners of `GROUPED` its stories. kl_coef: of the penalty in the loss.

    shard: rows of the batch, int64, on the CPU. Returns sums over their tokens, also divided, (5,) float64: policy and
    value loss, clipped, approx_kl and ratio; and the largest |ratio - 1|. Both stay on the device, so that a GPU runs
    ahead."""
    config, value_head, device, (count, n) = learner.config, learner.value_head, batch.tokens.device, size
    sums, max_ratio_error = torch.zeros(5, dtype=torch.float64, device=device), torch.zeros((), device=device)
    for part in by_length(batch.lengths[shard], config.micro_batch_size):
        old, rows = batch.rows(shard[part]), upload(shard[part], device)
        mask = old.mask
        with learner.autocast():
            logprob, value = response_stats(learner.student, value_head, old, config.temperature)
        value = old.values if value_head is None else value
        log_ratio = torch.where(mask, logprob - old.logprobs, 0.0)
        ratio, weight = torch.exp(log_ratio), mask
        # With RLOO one action is the whole story.
        of_action = torch.exp(log_ratio.sum(1, keepdim=True)).expand_as(ratio) if config.learner == "rloo" else ratio
        clipped_ratio = of_action.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
        if config.learner in GROUPED:  # per story the mean over its tokens; Dr. GRPO: the sum, over the most there are
            length = config.max_new_tokens if config.learner == "dr_grpo" else mask.sum(1, keepdim=True)
            weight = mask * (count / (n * length))
        clipped_values = old.values + (value - old.values).clamp(-config.clip_value, config.clip_value)
        advantage, target = advantages[rows], returns[rows]
        policy_loss = torch.maximum(-advantage * of_action, -advantage * clipped_ratio) * weight
        if config.learn == "sft-best":
            policy_loss, clipped_ratio = -logprob * mask, ratio
        if kl_coef and old.ref_logprobs is not None:  # k3 (Schulman 2020), as in GRPO (its eq. 4)
            log_ratio = old.ref_logprobs - logprob
            policy_loss = policy_loss + kl_coef * (torch.exp(log_ratio) - log_ratio - 1) * weight
        value_loss = torch.maximum((value - target) ** 2, (clipped_values - target) ** 2) * mask
        loss = (policy_loss.sum() + config.value_coef * 0.5 * value_loss.sum()) / count
        loss.backward()
        with torch.no_grad():
            max_ratio_error = torch.maximum(max_ratio_error, ((ratio - 1).abs() * mask).max())
            clipped = (-advantage * clipped_ratio > -advantage * of_action) & mask
            approx_kl = ((ratio - 1) - ratio.log()) * mask
            parts = (policy_loss, 0.5 * value_loss, clipped, approx_kl, ratio * mask)
            sums += torch.stack([part.sum().double() for part in parts]) / count
    return sums, max_ratio_error
