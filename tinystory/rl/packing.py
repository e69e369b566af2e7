"""Sequence packing with shared prefixes: stories without padding, in which an opening that several share is computed
once."""

from dataclasses import dataclass
from typing import Any  # torch's ctx takes any attribute

import numpy as np
import torch
from torch import Tensor

from tinystory import ops
from tinystory.student.model import Student


@dataclass(frozen=True)
class Packing:
    """The tokens of (B, T) padded stories in one sequence of n, without padding, each opening once. All int64.

    places: (n,), their places in (B * T). source: (B * T,), for each place its token in the sequence, 0 for padding.
    shared: (m,), the tokens with several places; copies: (k,), those places of theirs that `places` does not name;
    owners: (k,), whose copies they are, as indices into shared."""

    places: Tensor
    source: Tensor
    shared: Tensor
    copies: Tensor
    owners: Tensor

    def hidden(self, student: Student, tokens: Tensor) -> Tensor:
        """The student's final hidden states, (n, C), of tokens (B, T)."""

        def attend(_: int, qkv: Tensor) -> Tensor:
            out = ops.causal_attention(Unpack.apply(qkv, self).unflatten(0, tokens.shape))
            return out.flatten(0, 1).index_select(0, self.places)

        x = student.wte(tokens.flatten()[self.places]) + student.wpe(self.places % tokens.shape[1])
        return student.trunk(x, attend)


class Unpack(torch.autograd.Function):
    """(n, ...) -> (B * T, ...): every token at each of its places. Its gradient is the sum of theirs, in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x.index_select(0, packing.source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), p = grads, ctx.packing
        own, wide = grad.index_select(0, p.places), torch.promote_types(grad.dtype, torch.float32)
        total = own.index_select(0, p.shared).to(wide)
        total.index_add_(0, p.owners, grad.index_select(0, p.copies).to(wide))
        return own.index_copy_(0, p.shared, total.to(grad.dtype)), None


def pack(inputs: np.ndarray, openings: np.ndarray, lengths: np.ndarray) -> Packing | None:
    """The packing of inputs (B, T), or None if no two rows have the same opening. openings: (B,), the tokens of each
    row's opening; lengths: (B,), of each row without its padding."""
    B, T = inputs.shape
    rows, columns = np.arange(B), np.arange(T)
    first: dict[bytes, int] = {}
    owner = np.array([first.setdefault(inputs[row, : openings[row]].tobytes(), row) for row in range(B)])
    if len(first) == B:
        return None
    in_opening, is_owner = columns < openings[:, None], (owner == rows)[:, None]
    is_computed = np.where(in_opening, is_owner, columns < lengths[:, None])
    number = is_computed.cumsum().reshape(B, T) - 1
    is_copy = in_opening & ~is_owner
    source = np.where(is_copy, number[owner], np.where(is_computed, number, 0)).flatten()
    copies = np.flatnonzero(is_copy)
    shared, owners = np.unique(source[copies], return_inverse=True)
    return Packing(*map(torch.from_numpy, (np.flatnonzero(is_computed), source, shared, copies, owners)))
