"""Sequence packing with shared prefixes: no padding, and an opening that several stories share is
computed once."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from tinystory import ops
from tinystory.student.model import Student


@dataclass(frozen=True)
class Packing:
    """Int64 indices that pack (B, T) padded rows into one sequence of n tokens, each opening once.

    places (n,): position in (B * T) of each token of the sequence. source (B * T,): at each
    position the index of its token in the sequence, 0 for padding."""

    places: Tensor
    source: Tensor

    def hidden(self, student: Student, tokens: Tensor) -> Tensor:
        """The student's final hidden states, (n, C), for tokens (B, T)."""

        def attend(_: int, qkv: Tensor) -> Tensor:
            padded = self.unpacked(qkv).unflatten(0, tokens.shape)
            out = ops.causal_attention(padded)
            return out.flatten(0, 1).index_select(0, self.places)

        sequence = tokens.flatten()[self.places]
        positions = self.places % tokens.shape[1]
        return student.trunk(student.wte(sequence) + student.wpe(positions), attend)

    def unpacked(self, x: Tensor) -> Tensor:
        """(n, ...) -> (B * T, ...): each token at all of its positions. The gradient sums over them
        in float32; that of padding is 0."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide.index_select(0, self.source).to(x.dtype)


def pack(openings: ndarray, prompt_lengths: ndarray, lengths: ndarray) -> Packing | None:
    """None if no opening repeats. All (B,): the opening's identifier, its length, and the row's
    unpadded length."""
    _, first_rows, group = np.unique(openings, return_index=True, return_inverse=True)
    if len(first_rows) == len(openings):
        return None
    owner = first_rows[group]  # (B,): the row in which each row's opening is computed
    is_owner = (owner == np.arange(len(openings)))[:, None]
    columns = np.arange(lengths.max())
    in_opening = columns < prompt_lengths[:, None]
    in_row = columns < lengths[:, None]
    is_computed = np.where(in_opening, is_owner, in_row)

    number = is_computed.cumsum().reshape(is_computed.shape) - 1  # index in the sequence
    number_or_zero = np.where(is_computed, number, 0)
    source = np.where(in_opening, number[owner], number_or_zero)
    return Packing(
        places=torch.from_numpy(np.flatnonzero(is_computed)),
        source=torch.from_numpy(source.flatten()),
    )
