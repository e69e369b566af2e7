"""The default learner's baseline: ridge regression of returns on the frozen reference's hidden
states.

A value head on the student's trunk learns slowly, and its gradients disturb the trunk. The
reference processes every story anyway, and a linear function of the reference's hidden states
explains most of the variance of the rewards after one step (lab/LOG.md)."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from tinystory.rl.batch import Batch

# Ridge prior, in tokens: after PRIOR tokens (about 40 stories) the weights are shrunk by half. This
# value was the best one on held-out stories.
PRIOR = 5000
# Factor on the accumulated statistics per PPO step, because older returns come from an older
# policy.
DECAY = 0.9
# Stories per chunk of features. On a CPU, chunks are a quarter faster than one whole step
# (lab/LOG.md).
CHUNK = 32


class RidgeCritic(nn.Module):
    """Ridge regression of returns on features. The buffers are the sufficient statistics,
    accumulated over the steps of a run."""

    # (D, D) float64: sum over tokens of the features' outer product, decayed by DECAY per step
    gram: Tensor
    moment: Tensor  # (D,) float64: the same sum of features times return

    def __init__(self, width: int):
        super().__init__()
        size = 2 * width + 5
        self.register_buffer("gram", torch.zeros(size, size, dtype=torch.float64))
        self.register_buffer("moment", torch.zeros(size, dtype=torch.float64))

    @torch.no_grad()
    def estimate(self, batch: Batch, returns: Tensor) -> Tensor:
        """The expected return before each token, (n,) float32. Afterwards adds the batch's returns,
        (n,), to the statistics. Each half of the batch is estimated from the other half and all
        earlier batches, so that a story has no influence on its own estimate."""
        even = np.arange(0, len(batch), 2)
        odd = np.arange(1, len(batch), 2)
        even_gram, even_moment = self.statistics(batch, returns, even)
        odd_gram, odd_moment = self.statistics(batch, returns, odd)

        even_weights = ridge_weights(self.gram + odd_gram, self.moment + odd_moment)
        odd_weights = ridge_weights(self.gram + even_gram, self.moment + even_moment)
        values = torch.zeros_like(batch.logprobs)
        for rows, weights in ((even, even_weights), (odd, odd_weights)):
            for x, indices in chunks(batch, rows):
                values[indices] = (x @ weights).to(values.dtype)

        self.gram.add_(even_gram + odd_gram).mul_(DECAY)
        self.moment.add_(even_moment + odd_moment).mul_(DECAY)
        return values

    def statistics(self, batch: Batch, returns: Tensor, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Contributions to gram and moment of the stories in these rows."""
        gram = torch.zeros_like(self.gram)
        moment = torch.zeros_like(self.moment)
        for x, indices in chunks(batch, rows):
            gram.addmm_(x.T, x)
            moment.addmv_(x.T, returns[indices].double())
        return gram, moment


def chunks(batch: Batch, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields features, (m, D) float64, and indices in the batch, (m,), of the tokens of these
    stories, CHUNK stories at a time."""
    for first in range(0, len(rows), CHUNK):
        chunk = rows[first : first + CHUNK]
        part = batch.rows(chunk)
        table = features(part.padded(part.ref_hidden), part.padded(part.ref_logprobs))
        yield part.unpadded(table).double(), batch.token_indices(chunk)


def features(hidden: Tensor, logprobs: Tensor) -> Tensor:
    """Features known before each token, (B, N, 2C + 5), in this order, for the token at position n,
    counted from 1: the constant 1; n / 100; the square of n / 100; the mean log-probability, which
    is the sum over the n - 1 tokens before divided by n; this mean times n / 100; the reference's
    hidden state; the mean of the hidden states up to position n.

    hidden: (B, N, C); logprobs: (B, N). Division by n - 1 instead of n explains less variance
    (lab/LOG.md)."""
    stories, length, _ = hidden.shape
    position = torch.arange(1, length + 1, device=hidden.device, dtype=hidden.dtype)[:, None]
    scaled_position = (position / 100).expand(stories, -1, 1)
    logprobs_before = logprobs.cumsum(1) - logprobs
    mean_logprob = logprobs_before[..., None] / position
    columns = [
        torch.ones_like(scaled_position),
        scaled_position,
        scaled_position**2,
        mean_logprob,
        mean_logprob * scaled_position,
        hidden,
        hidden.cumsum(1) / position,
    ]
    return torch.cat(columns, dim=2)


def ridge_weights(gram: Tensor, moment: Tensor) -> Tensor:
    """Weights of the regression, (D,). The penalty of a weight is proportional to the variance of
    the feature, so it is about 0 for the constant, which is the first feature."""
    count = gram[0, 0].clamp(min=1)
    mean = gram[0] / count
    mean_square = gram.diagonal() / count
    variance = (mean_square - mean**2).clamp(min=0)
    penalty = PRIOR * variance + 1e-9
    return torch.linalg.solve(gram + torch.diag(penalty), moment)
