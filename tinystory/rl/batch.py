"""The stories of a step as tensors: padded rows for attention, one entry per token everywhere
else."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinystory.run.device import upload
from tinystory.student.generate import Story

Rows = Sequence[int] | np.ndarray
Later = Tensor | Any  # None until it is computed


@dataclass(kw_only=True)
class Batch:
    """B stories with n tokens in all.

    inputs (B, T) int64, right-padded: the opening and the story without its last token. All other
    tensors have one entry per story token, in the stories' order: tokens (n,) int64; logprobs,
    values (n,) float32, as sampled; ref_logprobs (n,) and ref_states (n, C), the reference's;
    advantages, returns (n,), the learner's; places (n,) int64, indices into the batch from which
    `rows` took them.

    NumPy arrays (B,) int64 stay on the host, so that no micro-batch waits for a GPU: indices of the
    stories; openings, equal for the same opening; prompt_lengths, lengths: tokens of opening and
    story; input_lengths: unpadded rows of inputs. longest: columns of a padded table, the same for
    all parts of a step."""

    inputs: Tensor
    tokens: Tensor
    logprobs: Tensor
    values: Tensor
    ref_logprobs: Later = None
    ref_states: Later = None
    advantages: Later = None
    returns: Later = None
    places: Later = None
    indices: np.ndarray
    openings: np.ndarray
    prompt_lengths: np.ndarray
    lengths: np.ndarray
    input_lengths: np.ndarray
    longest: int

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, rows: Rows) -> "Batch":
        chosen: dict[str, Any] = {}
        at = upload(np.asarray(rows, np.int64), self.inputs.device)
        starts = self.lengths.cumsum() - self.lengths
        places = upload(spans(starts[rows], self.lengths[rows]), self.inputs.device)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                chosen[field.name] = value[rows]
            elif isinstance(value, Tensor) and field.name != "places":
                chosen[field.name] = value.index_select(0, at if field.name == "inputs" else places)
        return dataclasses.replace(self, **chosen, places=places)

    def padded(self, x: Tensor) -> Tensor:
        """(n, ...) float32 -> (B, longest, ...), 0 where there is no token."""
        table = torch.zeros(len(self) * self.longest, *x.shape[1:], device=x.device)
        return table.index_copy(0, self._table_places, x).unflatten(0, (len(self), self.longest))

    def packed(self, table: Tensor) -> Tensor:
        """The inverse of `padded`. A table (B, 1, ...) is broadcast to each story's tokens."""
        return (
            table.expand(-1, self.longest, *table.shape[2:])
            .flatten(0, 1)
            .index_select(0, self._table_places)
        )

    def story_sums(self, x: Tensor) -> Tensor:
        """(n,) -> (B,): the sum over each story's tokens."""
        return self.padded(x).sum(1)

    @cached_property
    def _table_places(self) -> Tensor:
        return upload(spans(np.arange(len(self)) * self.longest, self.lengths), self.inputs.device)


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, ..., start + length - 1 for each of the starts, concatenated."""
    return np.repeat(starts + lengths - lengths.cumsum(), lengths) + np.arange(lengths.sum())


def collate(stories: Sequence[Story], device: torch.device) -> Batch:
    first: dict[str, int] = {}
    inputs = [torch.cat([story.prompt_ids, story.tokens[:-1]]) for story in stories]
    lengths = np.array([len(story.tokens) for story in stories])
    tokens, logprobs, values = (
        upload(torch.cat([getattr(story, name) for story in stories]), device)
        for name in ("tokens", "logprobs", "values")
    )
    return Batch(
        inputs=upload(pad_sequence(inputs, batch_first=True), device),
        tokens=tokens,
        logprobs=logprobs,
        values=values,
        indices=np.array([story.index for story in stories]),
        openings=np.array(
            [first.setdefault(story.opening, row) for row, story in enumerate(stories)]
        ),
        prompt_lengths=np.array([len(story.prompt_ids) for story in stories]),
        lengths=lengths,
        input_lengths=np.array([*map(len, inputs)]),
        longest=int(lengths.max()),
    )


def by_length(lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Indices in groups of at most `size` of similar length, so that little padding is computed."""
    order = lengths.argsort(kind="stable")
    return (order[first : first + size] for first in range(0, len(order), size))
