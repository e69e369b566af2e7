"""The stories of a step as tensors: padded rows for attention, one entry per token everywhere
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

    inputs (B, T) int64, right-padded: the opening and the story without its last token. The other
    tensors have one entry per story token, in the stories' order: tokens (n,) int64; logprobs and
    values (n,) float32; places (n,) int64, indices into the batch from which `rows` took them.

    NumPy arrays (B,) int64 stay on the host, so that no micro-batch waits for a GPU: indices of the
    stories; openings, equal for the same opening; prompt_lengths, lengths: tokens of opening and
    story. longest: columns of a padded table, the same for all parts of a step."""

    inputs: Tensor
    tokens: Tensor
    logprobs: Tensor
    values: Tensor
    places: Tensor
    indices: ndarray
    openings: ndarray
    prompt_lengths: ndarray
    lengths: ndarray
    longest: int

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def input_lengths(self) -> ndarray:
        """(B,) int64: tokens in each row of inputs. The last of a story predicts nothing."""
        return self.prompt_lengths + self.lengths - 1

    def rows(self, rows: ndarray) -> "Batch":
        """The batch of these stories alone."""
        starts = self.lengths.cumsum() - self.lengths
        device = self.inputs.device
        places = upload(spans(starts[rows], self.lengths[rows]), device)
        return Batch(
            inputs=self.inputs.index_select(0, upload(rows, device)),
            tokens=self.tokens.index_select(0, places),
            logprobs=self.logprobs.index_select(0, places),
            values=self.values.index_select(0, places),
            places=places,
            indices=self.indices[rows],
            openings=self.openings[rows],
            prompt_lengths=self.prompt_lengths[rows],
            lengths=self.lengths[rows],
            longest=self.longest,
        )

    def padded(self, x: Tensor) -> Tensor:
        """(n, ...) float32 -> (B, longest, ...), 0 where there is no token."""
        table = torch.zeros(len(self) * self.longest, *x.shape[1:], device=x.device)
        table = table.index_copy(0, self._table_places, x)
        return table.unflatten(0, (len(self), self.longest))

    def packed(self, table: Tensor) -> Tensor:
        """The inverse of `padded`. A table (B, 1, ...) is broadcast to each story's tokens."""
        full_table = table.expand(-1, self.longest, *table.shape[2:])
        return full_table.flatten(0, 1).index_select(0, self._table_places)

    def story_sums(self, x: Tensor) -> Tensor:
        """(n,) -> (B,): the sum over each story's tokens."""
        return self.padded(x).sum(1)

    @cached_property
    def _table_places(self) -> Tensor:
        row_starts = np.arange(len(self)) * self.longest
        return upload(spans(row_starts, self.lengths), self.inputs.device)


class PerToken:
    """Tensors with one entry per story token."""

    def at(self: T, places: Tensor) -> T:
        """The entries of these tokens, (m,) int64."""
        columns = {name: column.index_select(0, places) for name, column in vars(self).items()}
        return type(self)(**columns)


@dataclass(frozen=True)
class Reference(PerToken):
    """What the frozen starting checkpoint sees of a batch: logprobs (n,) of the stories' tokens, and
    the states (n, C) that predict them; (n, 0) if nobody reads them. Both are float32."""

    logprobs: Tensor
    states: Tensor


@dataclass(frozen=True)
class Targets(PerToken):
    """What a learner's loss compares the policy with, (n,) float32 each: advantages; ref_logprobs,
    the reference's; values, as they were before the update, and returns, which they should have
    been, both 0 for learners without values."""

    advantages: Tensor
    ref_logprobs: Tensor
    values: Tensor
    returns: Tensor


def spans(starts: ndarray, lengths: ndarray) -> ndarray:
    """start, ..., start + length - 1 for each of the starts, concatenated."""
    return np.repeat(starts + lengths - lengths.cumsum(), lengths) + np.arange(lengths.sum())


def collate(stories: Sequence[Story], device: torch.device) -> Batch:
    inputs = [torch.cat([story.prompt_ids, story.tokens[:-1]]) for story in stories]
    lengths = np.array([len(story.tokens) for story in stories])
    _, openings = np.unique([story.opening for story in stories], return_inverse=True)
    return Batch(
        inputs=upload(pad_sequence(inputs, batch_first=True), device),
        tokens=upload(torch.cat([story.tokens for story in stories]), device),
        logprobs=upload(torch.cat([story.logprobs for story in stories]), device),
        values=upload(torch.cat([story.values for story in stories]), device),
        places=torch.arange(lengths.sum(), device=device),
        indices=np.array([story.index for story in stories]),
        openings=openings,
        prompt_lengths=np.array([len(story.prompt_ids) for story in stories]),
        lengths=lengths,
        longest=int(lengths.max()),
    )
