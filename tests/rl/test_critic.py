"""The critic against numpy's least squares, and the data that must not affect a story's own
estimate."""

import numpy as np
import pytest
import torch

from tinystory.rl.batch import Batch
from tinystory.rl.critic import DECAY, PRIOR, RidgeCritic, features

WIDTH = 6


def stories(seed, count=20, longest=40, width=WIDTH):
    """Random (states, logprobs, returns, mask): a story's states and return depend on one hidden
    number, with noise."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=g)
    mask = torch.arange(longest) < lengths[:, None]
    thing = torch.randn(count, 1, width, generator=g)
    states = (thing + torch.randn(count, longest, width, generator=g)) * mask[..., None]
    logprobs = -torch.rand(count, longest, generator=g) * mask
    returns = (5 * thing[..., 0] + 1 + 0.1 * torch.randn(count, longest, generator=g)) * mask
    return states, logprobs, returns, mask


def estimate(critic, states, logprobs, returns, mask):
    """(B, N): the critic's estimates of a batch of these stories."""
    count, longest = mask.shape
    sizes = dict(
        indices=np.arange(count), openings=np.arange(count), prompt_lengths=np.ones(count, int)
    )
    batch = Batch(
        inputs=torch.zeros(count, longest, dtype=torch.int64),
        tokens=torch.zeros(int(mask.sum()), dtype=torch.int64),
        logprobs=logprobs[mask],
        values=logprobs[mask],
        ref_logprobs=logprobs[mask],
        ref_hidden=states[mask],
        rewards=returns[mask],
        advantages=returns[mask],
        returns=returns[mask],
        lengths=mask.sum(1).numpy(),
        longest=longest,
        **sizes,
    )
    return batch.padded(critic.estimate(batch, returns[mask]))


def test_features_are_what_is_known_before_each_token():
    states, logprobs, _, _ = stories(0, count=2)
    x = features(states, logprobs)
    for b in range(2):
        for t in (0, 1, 7):
            before = float(logprobs[b, :t].sum()) / (t + 1)
            at = (t + 1) / 100
            want = [1, at, at**2, before, before * at, *states[b, t], *states[b, : t + 1].mean(0)]
            torch.testing.assert_close(
                x[b, t], torch.tensor([float(value) for value in want]), rtol=1e-4, atol=1e-5
            )


def test_estimates_are_the_ridge_regressions_of_the_other_half_and_all_before_by_their_age():
    critic, earlier = RidgeCritic(WIDTH), []
    for seed in range(3):
        states, logprobs, returns, mask = stories(seed)
        values = estimate(critic, states, logprobs, returns, mask)
        x = features(states, logprobs).double().numpy()
        for half in (0, 1):
            other = mask.clone()
            other[half::2] = False
            batches = [*earlier, (x[other.numpy()], returns[other].double().numpy())]
            known, target, weight = (
                np.concatenate(parts)
                for parts in zip(
                    *(
                        (a, b, np.full(len(a), DECAY ** (seed - i)))
                        for i, (a, b) in enumerate(batches)
                    ),
                    strict=True,
                )
            )
            variance = (
                np.average(known**2, axis=0, weights=weight)
                - np.average(known, axis=0, weights=weight) ** 2
            )
            # As rows of further data: each weight but the first is seen to be 0, with the weight of
            # the prior.
            prior, root = np.diag(np.sqrt(PRIOR * variance.clip(0))), np.sqrt(weight)
            rows = np.concatenate([known * root[:, None], prior])
            weights = np.linalg.lstsq(rows, np.pad(target * root, (0, len(prior))), rcond=None)[0]
            want = (x[half::2] @ weights) * mask[half::2].numpy()
            np.testing.assert_allclose(values[half::2].numpy(), want, atol=1e-4)
        earlier.append((x[mask.numpy()], returns[mask].double().numpy()))


def test_what_was_true_long_ago_is_forgotten():
    critic, (states, logprobs, returns, mask) = RidgeCritic(WIDTH), stories(5)
    for sign in [1] * 10 + [-1] * 30:
        values = estimate(critic, states, logprobs, sign * returns, mask)
    fresh = RidgeCritic(WIDTH)
    for _ in range(30):
        want = estimate(fresh, states, logprobs, -returns, mask)
    errors = [float(((v + returns) ** 2)[mask].mean()) for v in (values, want)]
    assert errors[0] < 1.1 * errors[1]


def test_no_story_has_a_part_in_its_own_estimate():
    states, logprobs, returns, mask = stories(1)
    plain = estimate(RidgeCritic(WIDTH), states, logprobs, returns, mask)
    returns[4] += 100 * mask[4]
    other = estimate(RidgeCritic(WIDTH), states, logprobs, returns, mask)
    assert torch.equal(other[::2], plain[::2])
    assert (other[1::2] != plain[1::2])[mask[1::2]].all()


def test_what_comes_later_in_a_story_has_no_part_in_an_estimate():
    states, logprobs, returns, mask = stories(2)
    mask[0] = True
    plain = estimate(RidgeCritic(WIDTH), states, logprobs, returns, mask)
    states[0, 9:], logprobs[0, 9:] = 3.0, -2.0
    later = estimate(RidgeCritic(WIDTH), states, logprobs, returns, mask)
    assert torch.equal(later[0, :9], plain[0, :9]) and not torch.equal(later[0, 9:], plain[0, 9:])


def test_padding_changes_no_estimate():
    states, logprobs, returns, mask = stories(3)
    narrow = estimate(RidgeCritic(WIDTH), states, logprobs, returns, mask)
    pad = torch.nn.functional.pad
    wide = estimate(
        RidgeCritic(WIDTH),
        pad(states, (0, 0, 0, 5), value=7.0),
        pad(logprobs, (0, 5), value=-7.0),
        pad(returns, (0, 5), value=7.0),
        pad(mask, (0, 5)),
    )
    torch.testing.assert_close(wide[:, :40], narrow, atol=1e-5, rtol=1e-5)
    assert not wide[:, 40:].any() and not narrow[~mask].any()


def test_it_learns_what_can_be_expected():
    critic = RidgeCritic(WIDTH)
    for seed in range(4):
        states, logprobs, returns, mask = stories(seed, count=400)
        values = estimate(critic, states, logprobs, returns, mask)
    errors = [
        float((values - returns)[:, t][mask[:, t]].var() / returns[:, t][mask[:, t]].var())
        for t in (0, 30)
    ]
    # one state is informative about a part of it, the mean of thirty about nearly all
    assert errors[0] < 0.8 and errors[1] < 0.3
    constant = estimate(
        RidgeCritic(WIDTH), states, logprobs, torch.full_like(returns, 0.7) * mask, mask
    )
    assert constant[mask].numpy() == pytest.approx(0.7, abs=1e-5)


def test_two_stories_are_enough():
    values = estimate(RidgeCritic(WIDTH), *(x[:2] for x in stories(4)))
    assert torch.isfinite(values).all()
