"""The default learner's baseline: ridge regression of returns on the frozen reference's hidden
states.

A value head on the student's trunk learns slowly and disturbs it. The reference reads every story
anyway, and a linear function of its states explains most of the variance of the rewards after one
step (lab/LOG.md)."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from tinystory.rl.batch import Batch

# tokens after which the weights are shrunk by half: about 40 stories, the best value on held-out
# ones
PRIOR = 5000
DECAY = 0.9  # of the accumulated statistics per PPO step; older returns come from an older policy
# stories per chunk of features; on a CPU a quarter faster than a whole step's at once (lab/LOG.md)
CHUNK = 32


class RidgeCritic(nn.Module):
    """Sufficient statistics of a regression of returns on features, accumulated over the steps of a
    run."""

    # (D, D) float64: sum over tokens of the features' outer product, decayed by DECAY per step
    gram: Tensor
    moment: Tensor  # (D,) float64: the same sum of features times return

    def __init__(self, width: int):
        super().__init__()
        size = 2 * width + 5
        self.register_buffer("gram", torch.zeros(size, size, dtype=torch.float64))
        self.register_buffer("moment", torch.zeros(size, dtype=torch.float64))

    @torch.no_grad()
    def estimate(self, batch: Batch) -> Tensor:
        """(n,) float32: the expected return before each token, from ref_states and ref_logprobs.
        Then adds the batch's returns to the statistics. Each half of the batch is estimated from
        the other half and all earlier batches, so that no story has a part in its own estimate."""
        halves = [np.arange(half, len(batch), 2) for half in (0, 1)]
        sums = []
        for half in halves:
            gram, moment = torch.zeros_like(self.gram), torch.zeros_like(self.moment)
            for x, returns, _ in chunks(batch, half):
                gram.addmm_(x.T, x)
                moment.addmv_(x.T, returns)
            sums.append((gram, moment))
        values = torch.zeros_like(batch.logprobs)
        for half, (gram, moment) in zip(halves, reversed(sums), strict=True):
            weights = ridge_weights(self.gram + gram, self.moment + moment)
            for x, _, places in chunks(batch, half):
                values[places] = (x @ weights).to(values.dtype)
        for total, parts in zip((self.gram, self.moment), zip(*sums, strict=True), strict=True):
            total.add_(sum(parts)).mul_(DECAY)
        return values


def chunks(batch: Batch, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features (n, D), returns (n,) and places in the batch of these stories' tokens, CHUNK stories
    at a time."""
    for first in range(0, max(len(rows), 1), CHUNK):
        part = batch.rows(rows[first : first + CHUNK])
        x = part.packed(features(part.padded(part.ref_states), part.padded(part.ref_logprobs)))
        yield x.double(), part.returns.double(), part.places


def features(states: Tensor, logprobs: Tensor) -> Tensor:
    """(B, N, 2C + 5), known before each token: 1; its position n, and n^2; the mean log-probability
    of the tokens before it, alone and times n; the reference's state, and the mean of its states so
    far."""
    n = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=states.dtype)[:, None]
    surprise = (logprobs.cumsum(1) - logprobs)[..., None] / n
    at = (n / 100).expand(len(states), -1, 1)
    return torch.cat(
        [torch.ones_like(at), at, at**2, surprise, surprise * at, states, states.cumsum(1) / n], 2
    )


def ridge_weights(gram: Tensor, moment: Tensor) -> Tensor:
    """(D,). The penalty of a weight is proportional to its feature's variance: about 0 for the
    constant."""
    second, mean = gram.diagonal() / gram[0, 0].clamp(min=1), gram[0] / gram[0, 0].clamp(min=1)
    penalty = PRIOR * (second - mean**2).clamp(min=0) + 1e-9
    return torch.linalg.solve(gram + torch.diag(penalty), moment)
