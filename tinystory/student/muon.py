"""Muon for the blocks' matrices, AdamW for everything else: what pretraining uses.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) steps along the orthogonalised momentum, so that directions
with a small gradient, such as copying a name, move as fast as those with a large one. torch.optim.Muon does the same
matrix by matrix and in bfloat16, which takes longer than the rest of the step on a processor without bfloat16.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
# The odd quintic that drives singular values from (0, 1] to about 1 in five steps (Jordan et al.).
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but that matrices of the first group take Muon's steps, with their own rate and no weight decay."""

    def __init__(self, matrices: Iterable[nn.Parameter], others: list[dict[str, Any]], **options: Any):
        super().__init__([dict(params=list(matrices), weight_decay=0.0, muon=True), *others], **options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody passes a closure
        group = self.param_groups[0]
        updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if "momentum" not in state:
                state["step"] = torch.zeros(())  # AdamW expects one in every state that it loads
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            updates.setdefault(p.shape, []).append((p, p.grad.lerp(state["momentum"], MOMENTUM)))  # Nesterov's
            p.grad = None  # AdamW leaves it alone
        for (rows, columns), pairs in updates.items():
            stacked = matrices(torch.stack([update for _, update in pairs]))
            scale = max(1.0, stacked.shape[-2] / columns) ** 0.5
            for (p, _), update in zip(pairs, orthogonalize(stacked).view(-1, rows, columns), strict=True):
                p.add_(update, alpha=-group["lr"] * scale)
        super().step()

    def flops(self) -> int:
        """Floating-point operations of the matmuls of a step, counted without computing them."""
        from torch.utils.flop_counter import FlopCounterMode  # here, because it takes a tenth of a second to import

        with FlopCounterMode(display=False) as counter:
            for p in self.param_groups[0]["params"]:
                orthogonalize(matrices(torch.empty(1, *p.shape, device="meta")))
        return counter.get_total_flops()


def matrices(x: Tensor) -> Tensor:
    """(n, rows, columns) -> the matrices that are orthogonalised: queries, keys and values are three."""
    rows, columns = x.shape[1:]
    return x.view(-1, columns if rows == 3 * columns else rows, columns)


def orthogonalize(x: Tensor) -> Tensor:
    """(n, rows, columns) -> about U V^T of each matrix's singular value decomposition U S V^T, by Newton-Schulz.

    An iteration is x <- p x with p = a + b g + c g^2 of the Gram matrix g = x x^T, which becomes p g p. Of a matrix
    with a longer side it is therefore enough to follow g and the product of all p, which are smaller."""
    a, b, c = COEFFICIENTS
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    if x.shape[-2] == x.shape[-1]:
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    gram, product = x @ x.mT, torch.eye(x.shape[-2], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    for i in range(ITERATIONS):
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # p - a
        product = torch.baddbmm(product, rest, product, beta=a) if i else a * product + rest
        if i + 1 < ITERATIONS:
            half = torch.baddbmm(gram, rest, gram, beta=a)
            gram = torch.baddbmm(half, half, rest, beta=a)
    x = product @ x
    return x.mT if tall else x
