"""What could be earned at a given KL from the starting student, estimated from its own stories' rewards.

Two ways that need no training, and so a measure of what PPO makes of its nats.
"""

import math
from collections.abc import Sequence

import numpy as np

Curve = list[tuple[float, float]]  # (KL to the start in nats per story, mean reward)


def tilt(rewards: Sequence[float]) -> Curve:
    """The most that can be earned at each KL: by p(x) exp(r(x) / beta) for falling beta, the policy that maximises
    E[r] - beta KL (Korbak et al. 2022, arXiv 2206.00761). rewards: of the starting student's stories.

    Each story is weighted by exp(r / beta). It ends where the weights rest on fewer than a tenth of the stories (by
    effective sample size), for beyond that the sample says nothing."""
    r = np.asarray(rewards, float)
    curve = [(0.0, float(r.mean()))]
    spread = float(r.std())
    for strength in np.linspace(0, 4, 41)[1:] if spread else ():
        w = np.exp(strength * (r - r.max()) / spread)
        w /= w.sum()
        if 1 / (w @ w) < len(r) / 10:
            break
        curve.append((float(w @ np.log(np.maximum(len(r) * w, 1e-300))), float(w @ r)))
    return curve


def best_of_n(rewards: Sequence[float], most: int = 16) -> Curve:
    """The best of n stories to an opening, n = 1, 2, 4 ...: its KL is at most log n - (n - 1) / n (Beirami et al. 2024,
    arXiv 2401.01879), its reward the mean of the largest of n rewards drawn from `rewards`."""
    r = np.sort(np.asarray(rewards, float))
    below = np.arange(len(r) + 1) / len(r)
    powers = [2**k for k in range(int(math.log2(most)) + 1)]
    return [(math.log(n) - (n - 1) / n, float(np.diff(below**n) @ r)) for n in powers]
