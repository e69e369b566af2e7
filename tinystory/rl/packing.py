"""Sequence packing with shared prefixes: no padding, and an opening that several stories share is
computed once."""

from dataclasses import dataclass
from typing import Any  # torch's ctx takes any attribute

import numpy as np
import torch
from torch import Tensor

from tinystory import ops
from tinystory.student.model import Student


@dataclass(frozen=True)
class Packing:
    """Int64 indices that pack (B, T) padded rows into one sequence of n tokens, each opening once.

    places (n,): position in (B * T) of each token of the sequence. source (B * T,): at each
    position the index of its token in the sequence, 0 for padding. copies (k,): padded positions of
    repeated opening tokens. shared (m,): indices in the sequence of the tokens that are repeated.
    owners (k,): index in `shared` of the token that each copy repeats."""

    places: Tensor
    source: Tensor
    shared: Tensor
    copies: Tensor
    owners: Tensor

    def hidden(self, student: Student, tokens: Tensor) -> Tensor:
        """The student's final hidden states, (n, C), for tokens (B, T)."""

        rows, columns = tokens.shape

        def attend(_: int, qkv: Tensor) -> Tensor:
            padded = Unpack.apply(qkv, self).unflatten(0, (rows, columns))
            out = ops.causal_attention(padded)
            return out.flatten(0, 1).index_select(0, self.places)

        sequence = tokens.flatten()[self.places]
        positions = self.places % columns
        return student.trunk(student.wte(sequence) + student.wpe(positions), attend)


class Unpack(torch.autograd.Function):
    """(n, ...) -> (B * T, ...): each token at all of its positions. The gradient sums over them, in
    float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x.index_select(0, packing.source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        packing = ctx.packing
        sum_dtype = torch.promote_types(grad.dtype, torch.float32)
        result = grad.index_select(0, packing.places)
        # Tokens of an opening that other rows repeat get the gradients of those rows as well.
        total = result.index_select(0, packing.shared).to(sum_dtype)
        of_copies = grad.index_select(0, packing.copies).to(sum_dtype)
        total.index_add_(0, packing.owners, of_copies)
        return result.index_copy_(0, packing.shared, total.to(grad.dtype)), None


def pack(openings: np.ndarray, prompt_lengths: np.ndarray, lengths: np.ndarray) -> Packing | None:
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
    is_copy = in_opening & ~is_owner

    number = is_computed.cumsum().reshape(is_computed.shape) - 1  # index in the sequence
    number_or_zero = np.where(is_computed, number, 0)
    source = np.where(is_copy, number[owner], number_or_zero).flatten()
    copies = np.flatnonzero(is_copy)
    shared, owners = np.unique(source[copies], return_inverse=True)
    return Packing(
        places=torch.from_numpy(np.flatnonzero(is_computed)),
        source=torch.from_numpy(source),
        shared=torch.from_numpy(shared),
        copies=torch.from_numpy(copies),
        owners=torch.from_numpy(owners),
    )
