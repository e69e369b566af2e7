"""The learners without values against plain loops, and what is added to a minibatch's gradient."""

import copy
import dataclasses
from statistics import fmean, stdev

import pytest
import torch
from test_ppo import CONFIG, policy, random_batch

from tinystory.rl import ppo
from tinystory.rl.batch import Targets
from tinystory.rl.learners import best_quarter, dr_grpo, grpo, rloo

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
    assert best_quarter(RETURNS).tolist() == [1, 3]
    assert best_quarter(RETURNS[:4]).tolist() == [1] and best_quarter(RETURNS[:1]).tolist() == [0]
    assert best_quarter(torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5])).tolist() == [0, 1]


def gradient(student, config, batch, advantages, ref_logprobs=None, **more) -> list[torch.Tensor]:
    student = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    before = [p.detach().clone() for p in student.parameters()]
    zeros = torch.zeros_like(advantages)
    ppo.update(
        policy(student, torch.nn.Module(), optimizer, config),
        batch,
        Targets(advantages, batch.logprobs if ref_logprobs is None else ref_logprobs, zeros, zeros),
        **more,
    )
    return [a - b.detach() for a, b in zip(before, student.parameters(), strict=True)]


def test_k3_adds_its_gradient_to_the_losss(student):
    config = dataclasses.replace(CONFIG, epochs=1, micro_batch_size=2, clip_ratio=10.0)
    batch = random_batch([4, 6, 5], student.config.vocab_size)
    with torch.no_grad():
        batch.logprobs = ppo.response_logprobs(student, batch)[0]
    ref_logprobs = batch.logprobs + 0.3 * torch.randn(len(batch.logprobs))
    zeros, advantages = torch.zeros(len(batch.logprobs)), torch.randn(len(batch.logprobs))
    plain = gradient(student, config, batch, advantages)
    both = gradient(student, config, batch, advantages, ref_logprobs, kl_coef=0.4)

    logprobs = ppo.response_logprobs(student, batch)[0]
    ratio = (ref_logprobs - logprobs).exp()
    k3 = (ratio - 1 - ratio.log()).mean()
    wanted = torch.autograd.grad(0.4 * k3, [*student.parameters()])
    for with_both, without, want in zip(both, plain, wanted, strict=True):
        torch.testing.assert_close(with_both - without, want, rtol=2e-3, atol=2e-5)
    assert any(g.abs().max() > 1e-3 for g in plain)
    assert not any(g.any() for g in gradient(student, config, batch, zeros))


def test_grpo_weighs_stories_alike_and_dr_grpo_their_tokens(student):
    """The gradient of one story beside another that has no advantage: GRPO's shrinks with its own
    length only."""
    batch = random_batch([8, 2], student.config.vocab_size)
    with torch.no_grad():
        batch.logprobs = ppo.response_logprobs(student, batch)[0]
    norms = {}
    for learner in ("rloo", "grpo", "dr_grpo"):
        config = dataclasses.replace(CONFIG, epochs=1, learner=learner, max_new_tokens=16)
        for row in (0, 1):
            advantages = batch.packed(torch.tensor([[1.0], [0.0]] if row == 0 else [[0.0], [1.0]]))
            parts = gradient(student, config, batch, advantages)
            norms[learner, row] = float(torch.stack([g.norm() for g in parts]).norm())
    for row, length in ((0, 8), (1, 2)):
        assert norms["grpo", row] * length == pytest.approx(norms["dr_grpo", row] * 16, rel=1e-3)
        assert norms["rloo", row] == pytest.approx(norms["grpo", row] * length, rel=1e-3)
