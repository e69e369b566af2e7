"""Baselines and advantages: group baselines over the stories of one opening (RLOO, GRPO, Dr. GRPO), the best quarter
of a step (RAFT), and the default's value baseline for GAE (`ppo.advantages_and_returns`): ridge regression of returns
on the frozen reference's hidden states.

A value head on the student's trunk learns slowly and disturbs the trunk. The reference reads every story anyway, for
the KL penalty, and a linear function of its states explains most of the variance of the rewards after one step
(LOG.md). With a value at each token, GAE credits the sentences that changed it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# The prior, in tokens: with data of as many the regression goes half of the way. About 40 stories, the best of the
# values tried on stories held out.
PRIOR = 5000
# What a step weighs beside the one after it: the policy, and so its returns, moves on.
DECAY = 0.9
CHUNK = 32  # stories per chunk of features; on a CPU a quarter faster than a whole step's at once (LOG.md)


def rloo(returns: Tensor, groups: Tensor) -> Tensor:
    """(B,): each story's return minus the mean of the others' of its group; 0 for one alone. RLOO (Ahmadian et al.
    2024, arXiv 2402.14740, "RLOO"). returns: (B,), reward and KL penalty; groups: (B,) int64, equal within a group."""
    count, total = _group_sums(torch.ones_like(returns), groups), _group_sums(returns, groups)
    return torch.where(count > 1, returns - (total - returns) / (count - 1).clamp(min=1), 0.0)


def dr_grpo(returns: Tensor, groups: Tensor) -> Tensor:
    """(B,): each story's return minus the mean of its group. Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, figure 1)."""
    return returns - _group_sums(returns, groups) / _group_sums(torch.ones_like(returns), groups)


def grpo(returns: Tensor, groups: Tensor) -> Tensor:
    """(B,): the same, divided by the group's standard deviation. GRPO (Shao et al. 2024, arXiv 2402.03300, section
    4.1.2); Bessel's correction and 1e-4 added, as in TRL."""
    centred, count = dr_grpo(returns, groups), _group_sums(torch.ones_like(returns), groups)
    return centred / ((_group_sums(centred**2, groups) / (count - 1).clamp(min=1)).sqrt() + 1e-4)


GROUPED = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}


def _group_sums(x: Tensor, groups: Tensor) -> Tensor:
    """(B,): at each entry the sum over its group; as a product, which a GPU adds up in one order."""
    return ((groups[:, None] == groups).double() @ x.double()).to(x.dtype)


def best_quarter(returns: Tensor) -> Tensor:
    """Indices of the quarter with the highest returns, (B,), rounded up, in order. RAFT (Dong et al. 2023, arXiv
    2304.06767, algorithm 1) trains on the best of each opening; here it is the best of the step."""
    return returns.argsort(descending=True, stable=True)[: -(-len(returns) // 4)].sort().values


class Critic(nn.Module):
    """Accumulates the sufficient statistics of a regression of returns on features, over the steps of a run."""

    gram: Tensor  # (D, D) float64: the sum of products of the features of a token, each step's times DECAY per step
    moment: Tensor  # (D,) float64: the same sum of features times return

    def __init__(self, width: int):
        super().__init__()
        size = 2 * width + 5
        self.register_buffer("gram", torch.zeros(size, size, dtype=torch.float64))
        self.register_buffer("moment", torch.zeros(size, dtype=torch.float64))

    @torch.no_grad()
    def estimate(self, states: Tensor, logprobs: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        """(B, N) float32: the expected return before each token, 0 off the mask; then the batch is added to the sums.

        states: (B, N, C), the reference's, from which it predicts each token; logprobs, returns: (B, N). No story has a
        part in its own estimate: one half of the batch is estimated from the other half and all earlier batches.
        """

        def chunks(half: int) -> Iterator[tuple[Tensor, ...]]:
            return zip(*(x[half::2].split(CHUNK) for x in (states, logprobs, returns, mask)), strict=True)

        sums = []
        for half in (0, 1):
            gram, moment = torch.zeros_like(self.gram), torch.zeros_like(self.moment)
            for chunk_states, chunk_logprobs, chunk_returns, chunk_mask in chunks(half):
                x = features(chunk_states, chunk_logprobs)[chunk_mask].double()
                gram.addmm_(x.T, x)
                moment.addmv_(x.T, chunk_returns[chunk_mask].double())
            sums.append((gram, moment))
        values = torch.zeros_like(returns)
        for half, (gram, moment) in enumerate(reversed(sums)):
            weights = _ridge(self.gram + gram, self.moment + moment)
            estimates = [features(x, logprob).double() @ weights for x, logprob, _, _ in chunks(half)]
            values[half::2] = torch.cat(estimates).to(values.dtype)
        for total, parts in zip((self.gram, self.moment), zip(*sums, strict=True), strict=True):
            total.add_(sum(parts)).mul_(DECAY)
        return values * mask


def features(states: Tensor, logprobs: Tensor) -> Tensor:
    """(B, N, 2C + 5): what is known before each token. 1, its position n and n^2; the mean log-probability of the
    tokens before it, alone and times n; the reference's state, and the mean of its states so far."""
    n = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=states.dtype)[:, None]
    surprise = (logprobs.cumsum(1) - logprobs)[..., None] / n
    at = (n / 100).expand(len(states), -1, 1)
    return torch.cat([torch.ones_like(at), at, at**2, surprise, surprise * at, states, states.cumsum(1) / n], 2)


def _ridge(gram: Tensor, moment: Tensor) -> Tensor:
    """(D,) weights: each but the first, the constant's, is drawn to 0 in proportion to its feature's variance."""
    second, mean = gram.diagonal() / gram[0, 0].clamp(min=1), gram[0] / gram[0, 0].clamp(min=1)
    penalty = PRIOR * (second - mean**2).clamp(min=0) + 1e-9
    return torch.linalg.solve(gram + torch.diag(penalty), moment)
