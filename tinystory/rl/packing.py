"""Sequence packing with shared prefixes: no padding, and each opening is computed once, however
many stories share the opening."""

from dataclasses import dataclass
from typing import Any  # torch's ctx takes any attribute

import numpy as np
import torch
from torch import Tensor

from tinystory import ops
from tinystory.rl.batch import spans
from tinystory.student.model import Student


def hidden_at(
    student: Student,
    tokens: Tensor,
    positions: Tensor,
    openings: np.ndarray,
    prompt_lengths: np.ndarray,
    lengths: np.ndarray,
) -> Tensor:
    """The student's final hidden states at n padded positions of tokens (B, T): (n, C). positions:
    (n,) int64. The other arguments are those of `pack`.

    A CPU computes a shared opening once. A GPU does not, because there the sum of the opening's
    gradients would depend on the order of the threads."""
    packing = None
    if not ops.on_gpu(tokens):
        packing = pack(openings, prompt_lengths, lengths)
    if packing is None:
        return student.hidden(tokens).flatten(0, 1).index_select(0, positions)
    packed_hidden = packing.hidden(student, tokens)
    return packed_hidden.index_select(0, packing.source[positions])


@dataclass(frozen=True)
class Packing:
    """Int64 indices that pack (B, T) padded rows into one sequence of n tokens, each opening once.

    positions: (n,), padded position (0 to B * T - 1) of each token of the sequence.
    source: (B * T,), index in the sequence of the token at each padded position, 0 for padding.
    copies: (k,), padded positions of repeated opening tokens.
    shared: (m,), indices in the sequence of the tokens that are repeated.
    owners: (k,), index in `shared` of the token that each copy repeats."""

    positions: Tensor
    source: Tensor
    shared: Tensor
    copies: Tensor
    owners: Tensor

    def hidden(self, student: Student, tokens: Tensor) -> Tensor:
        """The student's final hidden states of the packed sequence, (n, C), for tokens (B, T)."""
        rows, columns = tokens.shape

        def attend(_: int, qkv: Tensor) -> Tensor:
            padded = Unpack.apply(qkv, self).unflatten(0, (rows, columns))
            out = ops.causal_attention(padded)
            return out.flatten(0, 1).index_select(0, self.positions)

        sequence = tokens.flatten()[self.positions]
        return student.trunk(student.embed(sequence, self.positions % columns), attend)


class Unpack(torch.autograd.Function):
    """Copies each packed token, (n, ...), to all padded positions of the token, (B * T, ...). The
    backward pass sums the gradients over these positions, in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x.index_select(0, packing.source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        packing = ctx.packing
        sum_dtype = torch.promote_types(grad.dtype, torch.float32)
        result = grad.index_select(0, packing.positions)
        # A token of a repeated opening also receives the gradients of the rows that repeat the
        # opening.
        total = result.index_select(0, packing.shared).to(sum_dtype)
        of_copies = grad.index_select(0, packing.copies).to(sum_dtype)
        total.index_add_(0, packing.owners, of_copies)
        return result.index_copy_(0, packing.shared, total.to(grad.dtype)), None


def pack(openings: np.ndarray, prompt_lengths: np.ndarray, lengths: np.ndarray) -> Packing | None:
    """The packing of B padded rows; None if no opening repeats. The first row with an opening
    computes the opening for all rows that share it.

    All arguments are (B,) int64. openings: equal for equal openings. prompt_lengths: number of
    tokens of the opening. lengths: number of tokens of the row, which has opening and story."""
    _, first_rows, group = np.unique(openings, return_index=True, return_inverse=True)
    if len(first_rows) == len(openings):
        return None
    rows = np.arange(len(openings))
    owner = first_rows[group]  # (B,): the row that computes each row's opening
    # (B,): the number of tokens of each row that another row computes
    copied = np.where(owner == rows, 0, prompt_lengths)

    columns = int(lengths.max())
    row_starts = rows * columns
    copies = spans(row_starts, copied)
    originals = spans(owner * columns, copied)
    positions = spans(row_starts + copied, lengths - copied)

    source = np.zeros(len(openings) * columns, np.int64)
    source[positions] = np.arange(len(positions))
    source[copies] = source[originals]
    shared, owners = np.unique(source[copies], return_inverse=True)
    return Packing(
        positions=torch.from_numpy(positions),
        source=torch.from_numpy(source),
        shared=torch.from_numpy(shared),
        copies=torch.from_numpy(copies),
        owners=torch.from_numpy(owners),
    )
