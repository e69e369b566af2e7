"""The reward that can be had at a given KL to the initial student, estimated from the rewards of its own stories.

Neither way needs training, so both are a yardstick for PPO.
"""

import math
from collections.abc import Sequence

import numpy as np

Curve = list[tuple[float, float]]  # (KL to the initial student in nats per story, mean reward)


def tilt(rewards: Sequence[float]) -> Curve:
    """The highest mean reward at each KL: that of p(x) exp(r(x) / beta) for falling beta, the policy that maximises
    E[r] - beta KL (Korbak et al. 2022, arXiv 2206.00761). rewards: of the initial student's stories.

    Each story is weighted by exp(r / beta). The curve ends where the effective sample size falls below a tenth of the
    stories, since the estimate is meaningless beyond that."""
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
    """Best of n stories for n = 1, 2, 4 ... `most`: the upper bound log n - (n - 1) / n of the KL (Beirami et al. 2024,
    arXiv 2401.01879), and the mean of the largest of n rewards drawn from `rewards`."""
    r = np.sort(np.asarray(rewards, float))
    below = np.arange(len(r) + 1) / len(r)
    powers = [2**k for k in range(int(math.log2(most)) + 1)]
    return [(math.log(n) - (n - 1) / n, float(np.diff(below**n) @ r)) for n in powers]
