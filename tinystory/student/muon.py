"""The optimizer of pretraining: Muon for the blocks' matrices, AdamW for all other parameters.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) steps along the orthogonalised
momentum. So directions with a small gradient, such as copying a name, move as fast as directions
with a large one. We do not use torch.optim.Muon, which works matrix by matrix in bfloat16: on a
processor without bfloat16 this takes longer than the rest of the step."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.9  # 0.95: more bits per byte after the demo (lab/LOG.md)
# Composed, these odd quintics map singular values from 0.01 to 1 to within 0.27 of 1. Each quintic
# is the minimax approximation of 1 on the interval to which the previous quintic maps (Polar
# Express, Amsel et al. 2025, arXiv 2505.16932).
COEFFICIENTS = ((8.0934, -23.6205, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))

LARGE = 2**20  # elements above which a matrix and its intermediates fill a CPU's L2 cache


@dataclass
class Update:
    """A step for one parameter. weights (n, rows, columns): view of the parameter as n matrices.
    direction: momentum in this shape and in the dtype of the matmuls, not yet orthogonal. rate:
    learning rate."""

    weights: Tensor
    direction: Tensor
    rate: float


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but Muon for the matrices of the first parameter group, with that group's learning
    rate and without weight decay. heads: number of attention heads; the queries, keys, values and
    projection of each head are separate matrices. dtype: dtype of Muon's matmuls."""

    def __init__(
        self,
        matrices: Iterable[Any],
        others: list[dict[str, Any]],
        *,
        heads: int,
        dtype: torch.dtype,
        **options: Any,
    ):
        muon = dict(params=list(matrices), weight_decay=0.0, muon=True)
        super().__init__([muon, *others], **options)
        self.heads = heads
        self.dtype = dtype
        # the gradient is divided by this, as in AdamW's fused step
        self.grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody passes a closure
        """Muon's step for the matrices, AdamW's for the other parameters."""
        for batch in self.batches():
            directions = orthogonalize(torch.cat([update.direction for update in batch]))
            counts = [len(update.weights) for update in batch]
            for update, direction in zip(batch, directions.split(counts), strict=True):
                update.weights.add_(direction, alpha=-update.rate)
        super().step()

    def batches(self) -> list[list[Update]]:
        """The updates of all parameters with a gradient, in batches that are orthogonalised
        together. The matrices of a batch have the same shape or its transpose. On a CPU a large
        matrix is a batch by itself, which stays in the caches. The gradients are removed, so that
        AdamW does not update these parameters."""
        alone: list[list[Update]] = []
        by_shape: dict[torch.Size, list[Update]] = {}
        for p, momentum in self.momentum().items():
            p.grad = None
            weights = matrices(p, self.heads)
            direction = matrices(momentum, self.heads).to(self.dtype)
            rate = self.param_groups[0]["lr"]
            if len(weights) == 1:
                rows, columns = p.shape
                rate *= max(1.0, rows / columns) ** 0.5
            if p.device.type == "cpu" and p.numel() > LARGE:
                alone.append([Update(weights, direction, rate)])
                continue
            if weights.shape[1] > weights.shape[2]:
                weights = weights.mT
                direction = direction.mT
            shape = weights.shape[1:]
            by_shape.setdefault(shape, []).append(Update(weights, direction, rate))
        return [*alone, *by_shape.values()]

    def momentum(self) -> dict[Tensor, Tensor]:
        """Nesterov's momentum for each matrix with a gradient, in the gradient's memory."""
        gradients: dict[Tensor, Tensor] = {}
        momenta = []
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if "momentum" not in state:
                state["step"] = torch.zeros(())  # AdamW expects one in every state that it loads
                state["momentum"] = torch.zeros_like(p)
            momenta.append(state["momentum"])
            gradients[p] = p.grad
        directions = list(gradients.values())
        if self.grad_scale is not None:
            torch._foreach_div_(directions, self.grad_scale)
        torch._foreach_lerp_(momenta, directions, 1 - MOMENTUM)
        torch._foreach_lerp_(directions, momenta, MOMENTUM)
        return gradients


def matrices(x: Tensor, heads: int) -> Tensor:
    """A view of a parameter (rows, columns) as the matrices to orthogonalise, (n, ...). Queries,
    keys and values: the rows of each head. The attention's projection, which is square: the columns
    of each head. Others: one matrix."""
    rows, columns = x.shape
    if rows == 3 * columns:
        return x.view(3 * heads, -1, columns)
    if rows == columns:
        return x.view(rows, heads, -1).transpose(0, 1)
    return x[None]


def orthogonalize(x: Tensor) -> Tensor:
    """Approximately U V^T, from each matrix's singular value decomposition U S V^T, (n, rows,
        columns), by Newton-Schulz iterations.

    An iteration is x <- p x, with p = a + b g + c g^2 and the Gram matrix g = x x^T. The new Gram
    matrix is p g p. So it is enough to iterate g and the product of all p, which are smaller than
    x. A fourth iteration would have to compute g from x again: rounded to bfloat16, g can have
    small negative eigenvalues, which each iteration multiplies."""
    tall = x.shape[-2] > x.shape[-1]
    gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)  # matmul would copy x.mT
    # The norm of the Gram matrix is an upper bound of the largest eigenvalue, and a much tighter
    # one than the trace, which is the squared norm of x.
    bound = 1.02 * gram.norm(dim=(-2, -1), keepdim=True) + 1e-30
    gram = gram / bound
    product = bound.rsqrt()
    for i, (a, b, c) in enumerate(COEFFICIENTS):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        product = p @ product if i else p * product  # a number per matrix at first
        if i + 1 < len(COEFFICIENTS):
            gram = p @ gram @ p
    return x @ product if tall else product @ x
