"""Tensors of a step's stories: padded rows for attention, one entry per story token for everything
else."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinystory.run.device import upload
from tinystory.student.generate import Story

T = TypeVar("T", bound="PerToken")


@dataclass(kw_only=True)
class Batch:
    """B stories with n tokens in all, as they were sampled.

    inputs: (B, T) int64, right-padded; each row has the opening and the story without the last
    token. The other tensors have one entry per story token, in the order of the stories:
    tokens: (n,) int64.
    logprobs, values: (n,) float32, from the time of sampling.
    token_indices: (n,) int64, the index of each token in the batch from which `rows` selected.

    The NumPy arrays, (B,) int64, stay on the host, so that no micro-batch waits for a GPU:
    indices: the stories' indices in the run.
    openings: equal for equal openings.
    prompt_lengths, lengths: number of tokens of opening and story.

    longest: number of columns of a padded table, the same for all parts of a step."""

    inputs: Tensor
    tokens: Tensor
    logprobs: Tensor
    values: Tensor
    token_indices: Tensor
    indices: ndarray
    openings: ndarray
    prompt_lengths: ndarray
    lengths: ndarray
    longest: int

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def input_lengths(self) -> ndarray:
        """Number of tokens in each row of `inputs`, (B,) int64: opening and story, without the
        story's last token, which predicts nothing."""
        return self.prompt_lengths + self.lengths - 1

    def rows(self, rows: ndarray) -> "Batch":
        """The batch of the stories in these rows."""
        starts = self.lengths.cumsum() - self.lengths
        device = self.inputs.device
        token_indices = upload(spans(starts[rows], self.lengths[rows]), device)
        return Batch(
            inputs=self.inputs.index_select(0, upload(rows, device)),
            tokens=self.tokens.index_select(0, token_indices),
            logprobs=self.logprobs.index_select(0, token_indices),
            values=self.values.index_select(0, token_indices),
            token_indices=token_indices,
            indices=self.indices[rows],
            openings=self.openings[rows],
            prompt_lengths=self.prompt_lengths[rows],
            lengths=self.lengths[rows],
            longest=self.longest,
        )

    def padded(self, x: Tensor) -> Tensor:
        """Padded table (B, longest, ...) of per-token entries x, (n, ...) float32; 0 where a story
        has no token."""
        table = torch.zeros(len(self) * self.longest, *x.shape[1:], device=x.device)
        table = table.index_copy(0, self._table_positions, x)
        return table.unflatten(0, (len(self), self.longest))

    def unpadded(self, table: Tensor) -> Tensor:
        """Per-token entries (n, ...) of a padded table, the inverse of `padded`. A table (B, 1,
        ...) is broadcast to each story's tokens."""
        full_table = table.expand(-1, self.longest, *table.shape[2:])
        return full_table.flatten(0, 1).index_select(0, self._table_positions)

    def story_sums(self, x: Tensor) -> Tensor:
        """Sum of x, (n,), over the tokens of each story, (B,)."""
        return self.padded(x).sum(1)

    @cached_property
    def _table_positions(self) -> Tensor:
        row_starts = np.arange(len(self)) * self.longest
        return upload(spans(row_starts, self.lengths), self.inputs.device)


class PerToken:
    """Base class of dataclasses of tensors with one entry per story token."""

    def at(self: T, indices: Tensor) -> T:
        """The entries of the tokens at these indices, (m,) int64."""
        columns = {name: column.index_select(0, indices) for name, column in vars(self).items()}
        return type(self)(**columns)


@dataclass(frozen=True)
class Reference(PerToken):
    """Outputs of the frozen starting checkpoint for a batch, float32: logprobs (n,) of the stories'
    tokens, and the hidden states (n, C) that predict these tokens, or (n, 0) if no learner or model
    uses them."""

    logprobs: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Targets(PerToken):
    """Inputs of a learner's loss, (n,) float32 each. advantages: of the sampled tokens.
    ref_logprobs: log-probabilities under the reference. values: predicted before the update.
    returns: the regression targets of the values. values and returns are 0 for learners without a
    critic."""

    advantages: Tensor
    ref_logprobs: Tensor
    values: Tensor
    returns: Tensor


def spans(starts: ndarray, lengths: ndarray) -> ndarray:
    """The concatenated ranges start, ..., start + length - 1."""
    return np.repeat(starts + lengths - lengths.cumsum(), lengths) + np.arange(lengths.sum())


def collate(stories: Sequence[Story], device: torch.device) -> Batch:
    """The stories of a step as one batch on the device."""
    inputs = [torch.cat([story.prompt_ids, story.tokens[:-1]]) for story in stories]
    lengths = np.array([len(story.tokens) for story in stories])
    _, openings = np.unique([story.opening for story in stories], return_inverse=True)
    return Batch(
        inputs=upload(pad_sequence(inputs, batch_first=True), device),
        tokens=upload(torch.cat([story.tokens for story in stories]), device),
        logprobs=upload(torch.cat([story.logprobs for story in stories]), device),
        values=upload(torch.cat([story.values for story in stories]), device),
        token_indices=torch.arange(lengths.sum(), device=device),
        indices=np.array([story.index for story in stories]),
        openings=openings,
        prompt_lengths=np.array([len(story.prompt_ids) for story in stories]),
        lengths=lengths,
        longest=int(lengths.max()),
    )
