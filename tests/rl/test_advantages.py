"""The learners without values against plain loops, and the terms that are added to a minibatch's
gradient."""

import copy
import dataclasses
import math
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from test_ppo import CONFIG, OPENING, policy, random_batch

from tinystory.rl import ppo
from tinystory.rl.learners import best_against_worst, best_quarter, dr_grpo, grpo, rloo
from tinystory.rl.policy import SharpAdam
from tinystory.run import distributed

RETURNS = torch.tensor([0.1, 0.9, 0.4, 0.7, 0.2, 0.5])
# stories without a score are missing: one group has a single story
GROUPS = torch.tensor([0, 0, 0, 1, 4, 4])


@pytest.mark.parametrize("baseline", [rloo, grpo, dr_grpo])
def test_a_story_is_compared_with_its_group_alone(baseline):
    got = baseline(RETURNS, GROUPS).tolist()
    for i, value in enumerate(RETURNS.tolist()):
        group = RETURNS[GROUPS[i] == GROUPS].tolist()
        others = RETURNS[(GROUPS[i] == GROUPS) & (torch.arange(6) != i)].tolist()
        want = {
            "rloo": value - fmean(others) if others else 0.0,
            "dr_grpo": value - fmean(group),
            "grpo": (value - fmean(group)) / (stdev(group) + 1e-4) if others else 0.0,
        }
        assert got[i] == pytest.approx(want[baseline.__name__], abs=1e-5)


def test_the_best_quarter_is_rounded_up_and_keeps_its_order():
    for returns, rows in (
        (RETURNS, [1, 3]),
        (RETURNS[:4], [1]),
        (RETURNS[:1], [0]),
        (torch.full((5,), 0.5), [0, 1]),
    ):
        batch = random_batch([1] * len(returns), 300)
        assert best_quarter(dataclasses.replace(batch, rewards=returns)).tolist() == rows


def with_advantages(batch, advantages, ref_logprobs=None):
    zeros = torch.zeros_like(advantages)
    return dataclasses.replace(
        batch,
        advantages=advantages,
        ref_logprobs=batch.logprobs if ref_logprobs is None else ref_logprobs,
        values=zeros,
        returns=zeros,
    )


def gradient(student, config, batch, kl_coef=0.0) -> list[torch.Tensor]:
    student = copy.deepcopy(student)
    config = dataclasses.replace(config, kl_target=math.inf)  # no step is undone
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    before = [p.detach().clone() for p in student.parameters()]
    ppo.update(policy(student, torch.nn.Module(), optimizer, config), batch, kl_coef)
    return [a - b.detach() for a, b in zip(before, student.parameters(), strict=True)]


def test_k3_adds_its_gradient_to_the_losss(student):
    config = dataclasses.replace(CONFIG, epochs=1, micro_batch_size=2, clip_ratio=10.0)
    batch = random_batch([4, 6, 5], student.config.vocab_size)
    with torch.no_grad():
        batch.logprobs = ppo.response_logprobs(student, batch)[0]
    ref_logprobs = batch.logprobs + 0.3 * torch.randn(len(batch.logprobs))
    batch = with_advantages(batch, torch.randn(len(batch.logprobs)), ref_logprobs)
    plain = gradient(student, config, batch)
    in_loss = dataclasses.replace(config, kl_in="loss")
    both = gradient(student, in_loss, batch, kl_coef=0.4)

    logprobs = ppo.response_logprobs(student, batch)[0]
    ratio = (ref_logprobs - logprobs).exp()
    k3 = (ratio - 1 - ratio.log()).mean()
    expected_gradients = torch.autograd.grad(0.4 * k3, [*student.parameters()])
    for with_both, without, want in zip(both, plain, expected_gradients, strict=True):
        torch.testing.assert_close(with_both - without, want, rtol=2e-3, atol=2e-5)
    assert any(g.abs().max() > 1e-3 for g in plain)
    batch.advantages = torch.zeros_like(batch.advantages)
    assert not any(g.any() for g in gradient(student, config, batch))


def test_grpo_weighs_stories_alike_and_dr_grpo_their_tokens(student):
    """The gradient of one story beside a story without an advantage: with GRPO it shrinks only with
    the first story's length."""
    batch = random_batch([8, 2], student.config.vocab_size)
    with torch.no_grad():
        batch.logprobs = ppo.response_logprobs(student, batch)[0]
    norms = {}
    for learner in ("rloo", "grpo", "dr_grpo"):
        config = dataclasses.replace(CONFIG, epochs=1, learner=learner, max_new_tokens=16)
        for row in (0, 1):
            advantages = batch.unpadded(
                torch.tensor([[1.0], [0.0]] if row == 0 else [[0.0], [1.0]])
            )
            parts = gradient(student, config, with_advantages(batch, advantages))
            norms[learner, row] = float(torch.stack([g.norm() for g in parts]).norm())
    for row, length in ((0, 8), (1, 2)):
        assert norms["grpo", row] * length == pytest.approx(norms["dr_grpo", row] * 16, rel=1e-3)
        assert norms["rloo", row] == pytest.approx(norms["grpo", row] * length, rel=1e-3)


# ---- DPO -----------------------------------------------------------------------------------------

DPO = dataclasses.replace(
    CONFIG, epochs=1, learner="dpo", stories_per_opening=2, kl_coef=0.1, micro_batch_size=4
)


def test_the_best_story_of_a_group_wins_against_its_worst():
    returns = torch.tensor([0.4, 0.9, 0.1, 0.7, 0.5, 0.2, 0.5, 0.3, 0.3, 0.8, 0.8, 0.6, 0.6])
    groups = torch.tensor([0, 0, 0, 1, 2, 2, 2, 3, 3, 5, 5, 5, 5])
    # one story alone; the first of two equal best ones; all equal; the first of equal ones twice
    want = [0, 1, -1, 0, 1, -1, 0, 0, 0, 1, 0, -1, 0]
    assert best_against_worst(returns, groups).tolist() == want


def plain_dpo(student, batch, pairs, config) -> torch.Tensor:
    """DPO's loss (eq. 7) of pairs of rows, winner first, one story at a time."""
    opening_tokens = len(OPENING)
    log_ratios = []
    for row, reference in enumerate(batch.ref_logprobs.split(batch.lengths.tolist())):
        tokens = batch.tokens.split(batch.lengths.tolist())[row]
        logits = student(torch.cat([OPENING, tokens])[None])[0, opening_tokens - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        log_ratios.append(logprobs.sum() - reference.sum())
    losses = []
    for winner, loser in pairs:
        margin = config.kl_coef * (log_ratios[winner] - log_ratios[loser])
        losses.append(torch.log(1 + torch.exp(-margin)))
    return torch.stack(losses).mean()


def dpo_step(student, config, batch, rewards, optimizer=None):
    """The gradients of each update, and the step's statistics."""
    gradients = []
    optimizer = optimizer or torch.optim.SGD(student.parameters(), lr=0.0)
    step = optimizer.step
    optimizer.step = lambda: (
        gradients.append([p.grad.clone() for p in student.parameters()]),
        step(),
    )
    parts = policy(student, torch.nn.Module(), optimizer, config)
    stats = ppo.step(parts, batch, rewards, config.kl_coef)
    return gradients, stats


def sampled_batch(student, lengths):
    """A batch that the student wrote, with the tokens' log-probabilities under a reference near the
    student."""
    batch = random_batch(lengths, student.config.vocab_size)
    with torch.no_grad():
        batch.logprobs = ppo.response_logprobs(student, batch)[0]
    noise = torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(7))
    batch.ref_logprobs = batch.logprobs + 0.5 * noise
    return batch


def test_dpos_gradient_is_that_of_the_papers_loss(student):
    """Two pairs (the second story wins one of them), a tie, and a story with a partner that has no
    score."""
    config = dataclasses.replace(DPO, stories_per_step=8, micro_batch_size=2)
    batch = sampled_batch(student, [7, 2, 12, 5, 3, 3, 6, 4])
    rewards = [0.2, 0.7, 0.9, 0.4, 0.5, 0.5, None, 0.3]
    loss = plain_dpo(student, batch, [(1, 0), (2, 3)], config)
    expected_gradients = torch.autograd.grad(loss, [*student.parameters()])
    (got,), stats = dpo_step(student, config, batch, rewards)
    for ours, want in zip(got, expected_gradients, strict=True):
        torch.testing.assert_close(ours, want, rtol=2e-3, atol=2e-5)
    assert max(float(want.abs().max()) for want in expected_gradients) > 1e-3
    assert stats["policy_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert stats["pairs"] == 0.5 and stats["unscored"] == 1


def test_dpos_loss_and_metrics_by_hand(student):
    """The policy gives the first winner 3 nats more than the reference and the first loser 1 more,
    the second winner 2 less and the second loser 2 more."""
    batch = random_batch([2, 4, 4, 2], student.config.vocab_size)
    with torch.no_grad():
        batch.logprobs = ppo.response_logprobs(student, batch)[0]
    gains = batch.unpadded(torch.tensor([[3.0 / 2], [1.0 / 4], [-2.0 / 4], [2.0 / 2]]))
    batch.ref_logprobs = batch.logprobs - gains
    config = dataclasses.replace(DPO, stories_per_step=4, kl_coef=0.5)
    _, stats = dpo_step(student, config, batch, [0.9, 0.1, 0.6, 0.2])
    margins = (2.0, -4.0)
    losses = [math.log(1 + math.exp(-0.5 * margin)) for margin in margins]
    assert stats["policy_loss"] == pytest.approx(fmean(losses), abs=1e-5)
    assert stats["pair_margin"] == pytest.approx(0.5 * fmean(margins), abs=1e-5)
    assert (stats["pairs"], stats["pair_accuracy"]) == (1.0, 0.5)


@pytest.mark.parametrize("rewards", [[0.5, 0.5, 0.2, 0.2], [0.5, None, None, 0.2]])
def test_dpo_without_a_pair_updates_nothing(student, rewards):
    batch = sampled_batch(student, [4, 3, 5, 2])
    before = copy.deepcopy(student.state_dict())
    optimizer = SharpAdam(student, torch.nn.Module(), DPO)
    gradients, stats = dpo_step(student, DPO, batch, rewards, optimizer)
    assert gradients == [] and stats["pairs"] == 0 and math.isnan(stats["pair_margin"])
    assert all(torch.equal(before[name], x) for name, x in student.state_dict().items())


def test_minibatches_keep_pairs_together():
    for stories, size in ((10, 4), (10, 2), (10, 0), (10, 12)):
        minibatches = ppo.shuffled_minibatches(stories, size, together=2)
        assert sorted(row for rows in minibatches for row in rows) == list(range(stories))
        for rows in minibatches:
            firsts, seconds = rows[::2], rows[1::2]
            assert (firsts % 2 == 0).all() and (seconds == firsts + 1).all()
    assert ppo.shuffled_minibatches(0, 4, together=2) == []


def test_dpos_gradient_is_the_sum_over_two_processes(student, monkeypatch):
    """Each update takes whole pairs, in micro-batches of one pair, from a minibatch of three
    pairs."""
    config = dataclasses.replace(DPO, micro_batch_size=2)
    batch = sampled_batch(student, [7, 2, 12, 5, 3, 4])
    advantages = batch.unpadded(torch.tensor([[1.0], [-1.0]] * 3))
    batch = with_advantages(batch, advantages, batch.ref_logprobs)
    parts = policy(student, torch.nn.Module(), None, config)

    def gradients_and_sums():
        student.zero_grad()
        sums, _ = ppo.backward(parts, batch, np.array([4, 5, 0, 1, 2, 3]), 0.1)
        return [p.grad.clone() for p in student.parameters()], sums

    whole, whole_sums = gradients_and_sums()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        halves.append(gradients_and_sums())
    (left, left_sums), (right, right_sums) = halves
    torch.testing.assert_close(left_sums + right_sums, whole_sums)
    for a, b, want in zip(left, right, whole, strict=True):
        assert a.any() and b.any()
        torch.testing.assert_close(a + b, want, rtol=1e-4, atol=1e-6)
