"""The default learner's baseline: ridge regression of returns on the frozen reference's hidden
states.

A value head on the student's trunk learns slowly and disturbs it. The reference reads every story
anyway, and a linear function of its states explains most of the variance of the rewards after one
step (lab/LOG.md)."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from tinystory.rl.batch import Batch, Reference

# Ridge prior, in tokens: after PRIOR tokens (about 40 stories) the weights are shrunk by half. The
# best value on held-out stories.
PRIOR = 5000
DECAY = 0.9  # of the accumulated statistics per PPO step; older returns come from an older policy
# Stories per chunk of features: on a CPU a quarter faster than a whole step's at once (lab/LOG.md).
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
    def estimate(self, batch: Batch, reference: Reference, returns: Tensor) -> Tensor:
        """(n,) float32: the expected return before each token. Then adds the batch's returns, (n,),
        to the statistics. Each half of the batch is estimated from the other half and all earlier
        batches, so that no story has a part in its own estimate."""
        even = np.arange(0, len(batch), 2)
        odd = np.arange(1, len(batch), 2)
        even_gram, even_moment = self.statistics(batch, reference, returns, even)
        odd_gram, odd_moment = self.statistics(batch, reference, returns, odd)

        even_weights = ridge_weights(self.gram + odd_gram, self.moment + odd_moment)
        odd_weights = ridge_weights(self.gram + even_gram, self.moment + even_moment)
        values = torch.zeros_like(batch.logprobs)
        for rows, weights in ((even, even_weights), (odd, odd_weights)):
            for x, places in chunks(batch, reference, rows):
                values[places] = (x @ weights).to(values.dtype)

        self.gram.add_(even_gram + odd_gram).mul_(DECAY)
        self.moment.add_(even_moment + odd_moment).mul_(DECAY)
        return values

    def statistics(
        self, batch: Batch, reference: Reference, returns: Tensor, rows: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """These stories' share of gram and moment."""
        gram = torch.zeros_like(self.gram)
        moment = torch.zeros_like(self.moment)
        for x, places in chunks(batch, reference, rows):
            gram.addmm_(x.T, x)
            moment.addmv_(x.T, returns[places].double())
        return gram, moment


def chunks(batch: Batch, reference: Reference, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (m, D) float64 of these stories' tokens, CHUNK stories at a time, and the tokens'
    places in the batch, (m,)."""
    for first in range(0, len(rows), CHUNK):
        part = batch.rows(rows[first : first + CHUNK])
        part_reference = reference.at(part.places)
        table = features(part.padded(part_reference.states), part.padded(part_reference.logprobs))
        yield part.packed(table).double(), part.places


def features(states: Tensor, logprobs: Tensor) -> Tensor:
    """(B, N, 2C + 5), known before each token: 1; its position n, from 1, and n^2; the sum of the
    log-probabilities of the n - 1 tokens before it over n, alone and times n; the reference's state,
    and the mean of its states so far. (Over n - 1 it explains less: lab/LOG.md.)"""
    stories, length, _ = states.shape
    position = torch.arange(1, length + 1, device=states.device, dtype=states.dtype)[:, None]
    scaled_position = (position / 100).expand(stories, -1, 1)
    logprobs_before = logprobs.cumsum(1) - logprobs
    mean_logprob = logprobs_before[..., None] / position
    columns = [
        torch.ones_like(scaled_position),
        scaled_position,
        scaled_position**2,
        mean_logprob,
        mean_logprob * scaled_position,
        states,
        states.cumsum(1) / position,
    ]
    return torch.cat(columns, dim=2)


def ridge_weights(gram: Tensor, moment: Tensor) -> Tensor:
    """(D,). The penalty of a weight is proportional to its feature's variance: about 0 for the
    constant, which is the first feature."""
    count = gram[0, 0].clamp(min=1)
    mean = gram[0] / count
    mean_square = gram.diagonal() / count
    variance = (mean_square - mean**2).clamp(min=0)
    penalty = PRIOR * variance + 1e-9
    return torch.linalg.solve(gram + torch.diag(penalty), moment)
