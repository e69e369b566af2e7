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
    owners (k,): index in `shared` of the token that a copy repeats."""

    places: Tensor
    source: Tensor
    shared: Tensor
    copies: Tensor
    owners: Tensor

    def hidden(self, student: Student, tokens: Tensor) -> Tensor:
        """The student's final hidden states, (n, C), for tokens (B, T)."""

        def attend(_: int, qkv: Tensor) -> Tensor:
            out = ops.causal_attention(Unpack.apply(qkv, self).unflatten(0, tokens.shape))
            return out.flatten(0, 1).index_select(0, self.places)

        x = student.wte(tokens.flatten()[self.places]) + student.wpe(self.places % tokens.shape[1])
        return student.trunk(x, attend)


class Unpack(torch.autograd.Function):
    """(n, ...) -> (B * T, ...): each token at all of its positions. The gradient sums over them, in
    float32."""

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


def pack(openings: np.ndarray, prompt_lengths: np.ndarray, lengths: np.ndarray) -> Packing | None:
    """None if no opening repeats. All (B,): the opening's identifier, its length, and the row's
    unpadded length."""
    _, first, group = np.unique(openings, return_index=True, return_inverse=True)
    if len(first) == len(openings):
        return None
    rows, columns, owner = np.arange(len(openings)), np.arange(lengths.max()), first[group]
    in_opening, is_owner = columns < prompt_lengths[:, None], (owner == rows)[:, None]
    is_computed = np.where(in_opening, is_owner, columns < lengths[:, None])
    number = is_computed.cumsum().reshape(is_computed.shape) - 1
    is_copy = in_opening & ~is_owner
    source = np.where(is_copy, number[owner], np.where(is_computed, number, 0)).flatten()
    copies = np.flatnonzero(is_copy)
    shared, owners = np.unique(source[copies], return_inverse=True)
    return Packing(
        *map(torch.from_numpy, (np.flatnonzero(is_computed), source, shared, copies, owners))
    )
