"""ops.token_logprob and ops.cross_entropy by PyTorch's matmul, which on a Mac is Accelerate, faster than our kernels.

Rows are computed in chunks, and again in the backward pass, so that the (N, V) logits never exist at once.
"""

from torch import Tensor, cat
from torch.utils.checkpoint import checkpoint

from tinystory.ops import reference

CHUNK = 1 << 24  # logits that exist at a time


def token_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logprob and entropy, both (N,) float32: hidden (N, C) float32, weight (V, C), targets (N,) int64."""
    rows = max(1, CHUNK // len(weight))
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    results = [checkpoint(reference.token_logprob, part, weight, ids, use_reentrant=False) for part, ids in parts]
    return cat([logprob for logprob, _ in results]), cat([entropy for _, entropy in results])


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean of -logprob."""
    return -token_logprob(hidden, weight, targets)[0].mean()
