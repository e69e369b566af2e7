"""The policy (student, critic and optimizer), the run state in the policy's checkpoints, and
rollouts."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor, nn

from tinystory.config import InteractConfig
from tinystory.data.tokenizer import Tokenizer
from tinystory.rl.batch import Batch
from tinystory.rl.critic import RidgeCritic
from tinystory.rl.score_model import ScoreModel
from tinystory.run import distributed
from tinystory.student import checkpoint, hf
from tinystory.student.generate import Story, generate
from tinystory.student.model import Student, ValueHead

EPS = 1e-8  # epsilon of Adam, as in PyTorch and TRL 0.9.4
# Advice for a user after an update made weights that are not finite.
TOO_LARGE = (
    "lower --learning-rate, --logit-scale-lr, --kl-coef or --value-coef, or give --grad-clip 1"
)


@dataclass
class RunState:
    """Counters of a run, saved in each checkpoint. written: number of stories so far. asked: number
    of stories sent to the teacher. words_in: words of the openings, each opening counted once, and
    words of the teacher's replies (arXiv 2509.15714). words_out: words that the student wrote."""

    kl_coef: float
    step: int = 0
    written: int = 0
    asked: int = 0
    words_in: int = 0
    words_out: int = 0
    best_step: int = 0
    undone: int = 0  # optimizer steps that were undone; each halved the learning rates
    evaluated_before: int = 0  # evaluations of earlier steps are counted in the words

    def spend(self, stories: Sequence[Story], words_in: int) -> None:
        """Count words in, and the stories' words as words out."""
        self.words_in += words_in
        self.words_out += sum(story.words for story in stories)

    def end_step(self, stories: Sequence[Story], words_in: int, asked: int) -> None:
        """Count a finished step. asked: number of the step's stories sent to the teacher."""
        self.spend(stories, words_in)
        self.step += 1
        self.written += len(stories)
        self.asked += asked


class SharpAdam(torch.optim.Adam):
    """Adam for student, critic, and s. s is the logarithm of the logit scale (a factor on all
    logits) and has its own learning rate, --logit-scale-lr.

    70 directions that each scale a part of the student were measured. s is the only direction with
    a gradient from 256 stories that is above noise (lab/LOG.md). After each step, s is folded into
    the final norm. Adam could learn the same scale in the final norm, but at one rate the norm
    would also move along 255 directions of noise. `readers` are weights that are applied to the
    norm's output besides the unembedding: the weight of a value head. They are divided by the same
    factor, so that s changes no value."""

    def __init__(self, student: Student, critic: nn.Module, config: InteractConfig):
        self.norm = student.ln_f
        self.log_scale = nn.Parameter(torch.zeros((), device=student.ln_f.weight.device))
        self.readers = [critic.linear.weight] if isinstance(critic, ValueHead) else []
        named = list(student.named_parameters())
        named += [(f"critic.{name}", parameter) for name, parameter in critic.named_parameters()]
        groups: list[dict[str, Any]] = [
            {"params": named, "lr": config.learning_rate},
            {"params": [("log_scale", self.log_scale)], "lr": config.logit_scale_lr},
        ]
        super().__init__(groups, eps=EPS, fused=True)
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody passes a closure
        """Update all parameters and s by Adam; then fold s into norm and readers and reset s to
        0."""
        multiplied = [self.norm.weight, self.norm.bias]
        divided = self.readers
        # e^s multiplies the norm and divides the readers. So at s = 0 the derivative of the loss
        # with respect to s is the sum of gradient times parameter, negated for the readers.
        slopes = [(p.grad * p).sum() for p in multiplied if p.grad is not None]
        slopes += [-(p.grad * p).sum() for p in divided if p.grad is not None]
        self.log_scale.grad = torch.stack(slopes).sum()
        super().step()

        factor = self.log_scale.exp()
        for p in multiplied:
            p.mul_(factor)
        for weight in divided:
            weight.div_(factor)
        self.log_scale.zero_()


@dataclass(frozen=True)
class Learner:
    """A learning algorithm, as a row of the table in learners.py.

    targets(config, critic, batch): the batch with advantages, and with the values and returns of
    the critic, or with zeros.
    loss(config, batch, logprob, kl_coef): the loss of each token, (n,), and whether it is clipped,
    (n,) bool. logprob: (n,), under the policy.
    critic: class of the critic, constructed with the student's width.
    weights(config, batch, tokens, stories): weights of the tokens, (n,), in a minibatch of `tokens`
    tokens and `stories` stories; None: every token has the same weight.
    select(batch): rows of the stories in the update; None: all.
    statistics(config, batch, kl_coef): further metrics of a step.
    compares: whether the targets compare the stories of a step with the same opening.
    together: number of neighbouring stories that the loss compares, which stay in one micro-batch.
    kl_in_loss: whether the loss has the KL penalty (--kl-coef is beta of DPO), so that the rewards
    have none.
    options: options that this learner uses and some other learner does not."""

    targets: Callable[[InteractConfig, nn.Module, Batch], Batch]
    loss: Callable[[InteractConfig, Batch, Tensor, float], tuple[Tensor, Tensor]]
    critic: type[RidgeCritic] | type[ValueHead] | None = None
    weights: Callable[[InteractConfig, Batch, int, int], Tensor] | None = None
    select: Callable[[Batch], ndarray] | None = None
    statistics: Callable[[InteractConfig, Batch, float], dict[str, float]] | None = None
    compares: bool = False
    together: int = 1
    kl_in_loss: bool = False
    options: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Policy:
    """Student, learner, critic and optimizer. critic: an empty module for learners without values.
    autocast: context of the forward passes only; in this context, the backward pass would round the
    float32 gradient of the value head. history: the student's training history, for model.json."""

    student: Student
    learner: Learner
    critic: nn.Module
    optimizer: torch.optim.Optimizer
    config: InteractConfig
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    tokenizer: Tokenizer
    history: dict[str, Any]
    score_model: ScoreModel = field(default_factory=ScoreModel)  # with --grades

    def __post_init__(self) -> None:
        self.value_head = self.critic if isinstance(self.critic, ValueHead) else None

    def save(self, folder: Path, state: RunState, *, replace: bool = False) -> None:
        """Write a checkpoint, and delete older ones."""
        # another rank would delete the checkpoint that rank 0 is writing
        if not distributed.is_rank0():
            return
        history = dict(self.history)  # includes the words of earlier interactions
        if state.step:
            words_in_before = history.get("interaction_words_in", 0)
            words_out_before = history.get("interaction_words_out", 0)
            history["interaction_words_in"] = words_in_before + state.words_in
            history["interaction_words_out"] = words_out_before + state.words_out
        checkpoint.save(
            folder,
            self.student,
            self.tokenizer,
            history=history,
            state=self.trainer_state(),
            counters=asdict(state),
            replace=replace,
        )
        checkpoint.drop_older(folder)

    def trainer_state(self) -> dict[str, Tensor]:
        """Tensors that a bit-identical resume needs besides the student: optimizer, critic and
        score model."""
        tensors = checkpoint.pack_optimizer(self.optimizer)
        tensors |= {f"critic.{name}": tensor for name, tensor in self.critic.state_dict().items()}
        return tensors | self.score_model.tensors()

    def require_finite(self, step: int) -> None:
        """Raises UserError if the step made weights that are not finite, or too large."""
        hf.require_finite(step, self.student, self.trainer_state(), TOO_LARGE)

    def halve_learning_rates(self, times: int = 1) -> None:
        """Halve the learning rates `times` times, for the rest of the run."""
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5**times
            group["initial_lr"] *= 0.5**times

    def restore(self, folder: Path) -> RunState:
        """The run state of a checkpoint, after loading all tensors of the policy from it."""
        checkpoint.restore(self.student, folder)
        tensors, state = checkpoint.load_trainer(folder, RunState)
        with checkpoint.restoring(folder):
            names = self.critic.state_dict()
            self.critic.load_state_dict({name: tensors[f"critic.{name}"] for name in names})
            self.score_model.restore(tensors, self.student.config.n_embd)
            checkpoint.unpack_optimizer(self.optimizer, tensors)
        self.halve_learning_rates(state.undone)
        return state


def rollout(
    policy: Policy,
    openings: Sequence[str],
    first_index: int,
    on_story: Callable[[Story], None] | None = None,
    temperature: float = 1.0,
) -> list[Story]:
    """Stories that continue these openings, with indices first_index, first_index + 1, ..., on
    every rank. on_story is called on rank 0 only: for a story of rank 0's shard as soon as the
    story ends, for all other stories afterwards. temperature: relative to the temperature that is
    folded into the student."""
    shard = distributed.shard_contiguous(len(openings))
    is_rank0 = distributed.is_rank0()
    with policy.autocast():
        own_stories = generate(
            policy.student,
            policy.value_head,
            policy.tokenizer,
            openings[shard.start : shard.stop],
            first_index=first_index + shard.start,
            seed=policy.config.seed,
            max_new_tokens=policy.config.max_new_tokens,
            temperature=temperature,
            on_story=on_story if is_rank0 else None,
        )
    stories = distributed.all_gather_list(own_stories)
    if is_rank0 and on_story:
        for story in stories:
            if story.index - first_index not in shard:
                on_story(story)
    return stories
