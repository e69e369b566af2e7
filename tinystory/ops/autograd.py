"""The only gradient implemented in Python: token_logprob on a Mac. csrc/autograd.cpp has the other
gradients."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinystory.ops import reference

CHUNK = 1 << 24  # maximum number of logits per chunk in `chunked_token_logprob`


def chunked_token_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.token_logprob` with PyTorch's matmul, which on a Mac is Accelerate and faster than our
    kernel. Rows are computed in chunks, and again in the backward pass, so that the (N, V) logits
    are never in memory as a whole."""
    rows = max(1, CHUNK // len(weight))
    parts = []
    for part, ids in zip(hidden.split(rows), targets.split(rows), strict=True):
        parts.append(checkpoint(reference.token_logprob, part, weight, ids, use_reentrant=False))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
