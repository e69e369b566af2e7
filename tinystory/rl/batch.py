"""Tensors of a step's stories: padded rows for attention, one entry per story token for everything
else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinystory.run.device import upload
from tinystory.student.generate import Story

# Columns of a batch with one entry per story token.
PER_TOKEN = (
    *("tokens", "logprobs", "values", "ref_logprobs", "ref_hidden"),
    *("rewards", "advantages", "returns"),
)


@dataclass(kw_only=True)
class Batch:
    """B stories with n tokens in all, as they were sampled.

    inputs: (B, T) int64, right-padded; each row has the opening and the story without the last
    token. The other tensors have one entry per story token, in the order of the stories:
    tokens: (n,) int64.
    logprobs, values: (n,) float32, from the time of sampling. The ridge critic replaces the values.
    ref_logprobs: (n,) float32, log-probabilities under the frozen starting checkpoint.
    ref_hidden: (n, C) float32, the hidden states of this checkpoint that predict the tokens; (n, 0)
    if nothing reads them.
    rewards: (n,) float32, at first those of `rl.reward.word_rewards`, or 0; `ppo.step` adds the others.
    advantages, returns: (n,) float32; returns are the targets of the values.
    A column is NaN until it is computed.

    The NumPy arrays, (B,) int64, stay on the host, so that no micro-batch waits for a GPU:
    indices: the stories' indices in the run.
    openings: equal for equal openings.
    prompt_lengths, lengths: number of tokens of opening and story.

    longest: number of columns of a padded table, the same for all parts of a step."""

    inputs: Tensor
    tokens: Tensor
    logprobs: Tensor
    values: Tensor
    ref_logprobs: Tensor
    ref_hidden: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
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

    def token_indices(self, rows: ndarray) -> Tensor:
        """Indices of the tokens of the stories in these rows, (m,) int64."""
        starts = self.lengths.cumsum() - self.lengths
        return upload(spans(starts[rows], self.lengths[rows]), self.inputs.device)

    def rows(self, rows: ndarray) -> "Batch":
        """The batch of the stories in these rows."""
        indices = self.token_indices(rows)
        columns = {name: getattr(self, name).index_select(0, indices) for name in PER_TOKEN}
        return replace(
            self,
            **columns,
            inputs=self.inputs.index_select(0, upload(rows, self.inputs.device)),
            indices=self.indices[rows],
            openings=self.openings[rows],
            prompt_lengths=self.prompt_lengths[rows],
            lengths=self.lengths[rows],
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


def spans(starts: ndarray, lengths: ndarray) -> ndarray:
    """The concatenated ranges start, ..., start + length - 1."""
    return np.repeat(starts + lengths - lengths.cumsum(), lengths) + np.arange(lengths.sum())


def collate(stories: Sequence[Story], device: torch.device) -> Batch:
    """The stories of a step as one batch on the device."""
    inputs = [torch.cat([story.prompt_ids, story.tokens[:-1]]) for story in stories]
    lengths = np.array([len(story.tokens) for story in stories])
    _, openings = np.unique([story.opening for story in stories], return_inverse=True)
    logprobs = upload(torch.cat([story.logprobs for story in stories]), device)
    not_computed = torch.full_like(logprobs, torch.nan)
    return Batch(
        inputs=upload(pad_sequence(inputs, batch_first=True), device),
        tokens=upload(torch.cat([story.tokens for story in stories]), device),
        logprobs=logprobs,
        values=upload(torch.cat([story.values for story in stories]), device),
        ref_logprobs=not_computed,
        ref_hidden=logprobs.new_empty(len(logprobs), 0),
        rewards=torch.zeros_like(logprobs),
        advantages=not_computed,
        returns=not_computed,
        indices=np.array([story.index for story in stories]),
        openings=openings,
        prompt_lengths=np.array([len(story.prompt_ids) for story in stories]),
        lengths=lengths,
        longest=int(lengths.max()),
    )
