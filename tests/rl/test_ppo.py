"""PPO against plain loops written from the formulas, over one story and one token at a time."""

import copy
import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch

from tinystory.config import InteractConfig
from tinystory.config.presets import INTERACT_PRESETS
from tinystory.rl import learners, ppo
from tinystory.rl.batch import Batch, collate
from tinystory.rl.policy import Policy, SharpAdam
from tinystory.student.generate import Story, encode_opening
from tinystory.student.model import ValueHead

OPENING = torch.tensor([2, 9, 11, 30])


def with_openings(openings, tokens, lengths) -> Batch:
    """The batch of stories that continue these openings, (P_i,) each. tokens: (B, N), padded."""
    stories = []
    for i, (opening, row, n) in enumerate(zip(openings, tokens, lengths, strict=True)):
        zeros = torch.zeros(n)
        stories.append(
            Story(i, str(opening.tolist()), "", opening, row[:n], zeros, zeros, zeros, "length")
        )
    return collate(stories, torch.device("cpu"))


def policy(student, critic, optimizer, config) -> Policy:
    return Policy(
        student=student,
        learner=learners.LEARNERS[config.learner],
        critic=critic,
        optimizer=optimizer,
        config=config,
        tokenizer=None,
        history={},
    )


def with_targets(batch, advantages=None, returns=None) -> Batch:
    """The batch with these advantages and returns, by default its values."""
    return dataclasses.replace(
        batch,
        ref_logprobs=batch.logprobs,
        advantages=batch.values if advantages is None else advantages,
        returns=batch.values if returns is None else returns,
    )


CONFIG = InteractConfig(**INTERACT_PRESETS["paper"])


def random_batch(lengths, vocab, seed=0, openings=None) -> Batch:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, vocab, (len(lengths), max(lengths)), generator=g)
    batch = with_openings(openings or [OPENING] * len(lengths), tokens, lengths)
    logprobs, batch.values = torch.randn(2, sum(lengths), generator=g)
    batch.logprobs = -1 - logprobs.abs()
    return batch


def test_the_logit_scale_scales_all_logits_along_the_gradient(student):
    """The gradient of s is the derivative of the loss by the logarithm of a factor on the
    logits."""
    tokens = torch.arange(2 * 12).view(2, 12) % 50

    def loss(factor=1.0):
        return torch.nn.functional.cross_entropy(
            factor * student(tokens).flatten(0, 1), tokens.flatten()
        )

    with torch.no_grad():
        before, h = student(tokens), 1e-3
        slope = (loss(math.exp(h)) - loss(math.exp(-h))) / (2 * h)
    optimizer = SharpAdam(
        student, torch.nn.Module(), InteractConfig(learning_rate=0.0, logit_scale_lr=0.1)
    )
    loss().backward()
    optimizer.step()
    # Adam's first moment after one step
    moment = optimizer.state[optimizer.log_scale]["exp_avg"] / 0.1
    torch.testing.assert_close(moment, slope, rtol=1e-2, atol=0)
    after = student(tokens).detach()
    torch.testing.assert_close(after, before * math.exp(-0.1 * slope.sign()), rtol=1e-4, atol=1e-5)
    assert optimizer.log_scale == 0  # folded into the weights


def test_the_logit_scale_changes_no_value_and_takes_no_slope_from_them(student):
    tokens, head = torch.arange(2 * 12).view(2, 12) % 50, ValueHead(64)
    torch.nn.init.normal_(head.linear.weight)
    config = dataclasses.replace(CONFIG, learning_rate=1e-30, logit_scale_lr=0.1)

    def stepped(value_coef):
        copied, copied_head = copy.deepcopy(student), copy.deepcopy(head)
        optimizer = SharpAdam(copied, copied_head, config)
        hidden = copied.hidden(tokens)
        loss = torch.nn.functional.cross_entropy(
            copied.logits(hidden).flatten(0, 1), tokens.flatten()
        )
        (loss + value_coef * copied_head(hidden).square().mean()).backward()
        optimizer.step()
        return copied, copied_head, optimizer.state[optimizer.log_scale]["exp_avg"]

    moved, moved_head, slope = stepped(1.0)
    assert (moved.ln_f.weight - student.ln_f.weight).abs().max() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(
            moved_head(moved.hidden(tokens)), head(student.hidden(tokens)), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(slope, stepped(0.0)[2], rtol=1e-3, atol=1e-5)


def test_without_a_logit_scale_it_is_adam_bit_for_bit(student):
    start = student
    tokens = torch.arange(2 * 12).view(2, 12) % 50
    trained = []
    for make in (
        lambda s: torch.optim.Adam(s.parameters(), lr=1e-3, fused=True),
        lambda s: SharpAdam(
            s, torch.nn.Module(), InteractConfig(learning_rate=1e-3, logit_scale_lr=0.0)
        ),
    ):
        student = copy.deepcopy(start)
        optimizer = make(student)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(
                student(tokens).flatten(0, 1), tokens.flatten()
            ).backward()
            optimizer.step()
        trained.append(student.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(*(state.values() for state in trained), strict=True)
    )


def test_token_rewards_are_kl_at_each_token_and_the_storys_reward_at_the_last():
    batch = random_batch([3, 1], 300)
    batch.logprobs = torch.tensor([-1.0, -2.0, -3.0, -1.5])
    batch.ref_logprobs = torch.tensor([-1.5, -2.0, -2.0, -1.0])
    got = ppo.token_rewards(batch, torch.tensor([0.5, 0.25]), kl_coef=0.2)
    torch.testing.assert_close(got, torch.tensor([-0.1, 0.0, 0.2 + 0.5, 0.1 + 0.25]))


def random_tables(lengths):
    """Token rewards and values, (B, N) each."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(3)) * mask


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_advantages_are_the_discounted_sum_of_temporal_differences(gamma, lam):
    lengths = [5, 1, 8]
    rewards, table = random_tables(lengths)
    advantages, returns = ppo.advantages_and_returns(rewards, table, gamma, lam)
    for b, n in enumerate(lengths):
        values = [*table[b, :n].tolist(), 0.0]
        delta = [float(rewards[b, t]) + gamma * values[t + 1] - values[t] for t in range(n)]
        for t in range(n):
            want = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
            assert float(advantages[b, t]) == pytest.approx(want, abs=1e-5)
            assert float(returns[b, t]) == pytest.approx(want + values[t], abs=1e-5)
        assert not advantages[b, n:].any() and not returns[b, n:].any()


def test_whitening_sees_the_masked_entries_only():
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(1)) * 3 + 5
    kept = ppo.whiten(x, mask)[mask]
    # torch's var has Bessel's correction
    want = (x[mask] - x[mask].mean()) / math.sqrt(float(x[mask].var()) + 1e-8)
    torch.testing.assert_close(kept, want)
    poisoned = torch.where(mask, x, torch.full_like(x, 1e6))
    torch.testing.assert_close(ppo.whiten(poisoned, mask)[mask], want, rtol=1e-4, atol=1e-4)


def test_adaptive_kl_follows_the_formula():
    config = dataclasses.replace(CONFIG, kl_target=6.0, kl_horizon=10_000)
    for kl, error in ((6.6, 0.1), (60.0, 0.2), (0.0, -0.2)):  # the error is clipped at 0.2
        assert ppo.next_kl_coef(0.3, kl, 360, config) == pytest.approx(0.3 * (1 + error * 0.036))


@pytest.mark.parametrize("opening_lengths", [(4, 4, 4), (4, 9, 1)])
def test_story_stats_are_those_of_each_story_alone(student, opening_lengths):
    openings = [torch.arange(5, 5 + n) for n in opening_lengths]
    batch = random_batch([7, 2, 12], student.config.vocab_size, openings=openings)
    assert batch.input_lengths.tolist() == [
        p + n - 1 for p, n in zip(opening_lengths, (7, 2, 12), strict=True)
    ]
    head = ValueHead(64)
    torch.nn.init.normal_(head.linear.weight)
    with torch.no_grad():
        logprobs, states = ppo.response_logprobs(student, batch)
        columns = (x.split([7, 2, 12]) for x in (batch.tokens, logprobs, head(states)))
        for b, (tokens, logprob, value) in enumerate(zip(*columns, strict=True)):
            row, first = torch.cat([openings[b], tokens]), len(openings[b]) - 1
            logits = student(row[None])[0, first:-1].double()
            want = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(logprob.double(), want, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(
                value, head(student.hidden(row[None])[0, first:-1]), atol=1e-4, rtol=1e-4
            )


def plain_loss(student, head, batch, c) -> torch.Tensor:
    """TRL 0.9.4's PPO loss with equal weight per token, one story at a time."""
    policy, value_loss, count = 0.0, 0.0, 0
    columns = (batch.tokens, batch.logprobs, batch.values, batch.advantages, batch.returns)
    for tokens, logprobs, old, a, r in zip(
        *(x.split(batch.lengths.tolist()) for x in columns), strict=True
    ):
        row, n = torch.cat([OPENING, tokens]), len(tokens)
        hidden = student.hidden(row[None])[0, len(OPENING) - 1 : -1]
        new = student.logits(hidden).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        ratio, v = (new - logprobs).exp(), head(hidden)
        policy += torch.max(-a * ratio, -a * ratio.clamp(1 - c.clip_ratio, 1 + c.clip_ratio)).sum()
        clipped = torch.max(torch.min(v, old + ppo.CLIP_VALUE), old - ppo.CLIP_VALUE)
        value_loss += 0.5 * torch.max((v - r) ** 2, (clipped - r) ** 2).sum()
        count += n
    return (policy + c.value_coef * value_loss) / count


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_one_update_is_one_adam_step_on_the_plain_loss(student, micro_batch_size):
    import copy

    config = dataclasses.replace(CONFIG, epochs=1, micro_batch_size=micro_batch_size)
    batch = random_batch([7, 2, 12, 5, 9], student.config.vocab_size)
    head = ValueHead(64)
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    with torch.no_grad():
        now, _ = ppo.response_logprobs(student, batch)
    noise, advantages, returns = torch.randn(
        3, len(now), generator=torch.Generator().manual_seed(5)
    )
    batch.logprobs = now + 0.3 * noise
    batch = with_targets(batch, advantages, returns)

    twin, twin_head = copy.deepcopy(student), copy.deepcopy(head)
    plain = plain_loss(twin, twin_head, batch, config)
    plain.backward()
    grads = [p.grad for p in (*twin.parameters(), *twin_head.parameters())]

    seen = []
    optimizer = torch.optim.SGD([*student.parameters(), *head.parameters()], lr=0.0)
    step = optimizer.step
    optimizer.step = lambda: (
        seen.extend(p.grad.clone() for p in (*student.parameters(), *head.parameters())),
        step(),
    )
    stats = ppo.update(policy(student, head, optimizer, config), batch, 0.0)
    for got, want in zip(seen, grads, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-3)
    assert stats["policy_loss"] + config.value_coef * stats["value_loss"] == pytest.approx(
        plain.item(), abs=1e-4
    )
    assert stats["skipped"] == 0


def test_a_minibatch_with_a_wild_ratio_is_skipped(student):
    config = dataclasses.replace(CONFIG, epochs=2)
    batch = random_batch([4, 6], student.config.vocab_size)
    batch.logprobs = batch.logprobs - 40.0
    before = [p.clone() for p in student.parameters()]
    head = ValueHead(64)
    optimizer = torch.optim.Adam([*student.parameters(), *head.parameters()], lr=1e-2)
    stats = ppo.update(policy(student, head, optimizer, config), with_targets(batch), 0.0)
    assert stats["skipped"] == 2
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_step_that_moves_the_policy_too_far_is_undone_and_halves_the_rates(student, epochs):
    """The first optimizer step is too large; a second minibatch shows it, and if there is none, the
    first again."""
    config = dataclasses.replace(
        CONFIG, epochs=epochs, minibatch_size=0, learning_rate=0.05, lr_decay=False, kl_target=1 / 3
    )
    batch = random_batch([9, 12], student.config.vocab_size)
    with torch.no_grad():
        batch.logprobs, _ = ppo.response_logprobs(student, batch)
    before = copy.deepcopy(student.state_dict())
    head = ValueHead(student.config.n_embd)
    optimizer = SharpAdam(student, head, config)
    learner = policy(student, head, optimizer, config)
    batch = with_targets(batch, torch.randn(21, generator=torch.Generator().manual_seed(1)))
    stats = ppo.update(learner, batch, 0.0)
    assert stats["update_kl"] > 1 and stats["undone"] == 1
    assert all(torch.equal(before[name], x) for name, x in student.state_dict().items())
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [0.025, config.logit_scale_lr / 2]

    small = dataclasses.replace(config, learning_rate=1e-5)
    learner = policy(student, head, SharpAdam(student, head, small), small)
    stats = ppo.update(learner, batch, 0.0)
    assert stats["undone"] == 0 and stats["update_kl"] < 1
    assert not all(torch.equal(before[name], x) for name, x in student.state_dict().items())


def test_every_gradient_is_clipped(student, monkeypatch):
    monkeypatch.setattr(ppo, "MAX_RATIO", 1e9)
    monkeypatch.setattr(ppo, "MAX_UPDATE_KL", math.inf)
    config = dataclasses.replace(CONFIG, epochs=3, minibatch_size=1, grad_clip=1e-3)
    batch = random_batch([4, 6], student.config.vocab_size)
    head = ValueHead(student.config.n_embd)
    parameters = [*student.parameters(), *head.parameters()]
    optimizer, moved = torch.optim.SGD(parameters, lr=1.0), []
    step = optimizer.step

    def recorded():
        before = [p.detach().clone() for p in parameters]
        step()
        norms = [(p.detach() - b).norm() for p, b in zip(parameters, before, strict=True)]
        moved.append(float(torch.stack(norms).norm()))

    optimizer.step = recorded
    ppo.update(policy(student, head, optimizer, config), with_targets(batch), 0.0)
    assert moved == [pytest.approx(1e-3, rel=0.01)] * 6


def test_the_value_head_starts_at_zero(student):
    """So the first advantages are the returns, and value clipping has no effect at first."""
    assert not ValueHead(64)(torch.randn(3, 5, 64)).any()


def test_a_step_penalises_with_the_coefficient_that_it_logs(student):
    batch = random_batch([5, 3], student.config.vocab_size)
    with torch.no_grad():
        batch.logprobs, _ = ppo.response_logprobs(student, batch)
    batch.ref_logprobs = batch.logprobs - 2.0  # 10 and 6 nats
    head, seen = ValueHead(student.config.n_embd), {}
    optimizer = torch.optim.SGD([*student.parameters(), *head.parameters()], lr=0.0)

    def rewards(*arguments):
        seen["rewards"] = token_rewards(*arguments)
        return seen["rewards"]

    token_rewards = ppo.token_rewards
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "token_rewards", rewards)
        config = dataclasses.replace(CONFIG, epochs=1)
        learner = policy(student, head, optimizer, config)
        stats = ppo.step(learner, batch, [1.0, 0.5], 0.2)
    assert stats["kl"] == pytest.approx(8.0, abs=1e-4) and stats["kl_coef"] == 0.2
    want = torch.tensor([-0.4, -0.4, -0.4, -0.4, 0.6, -0.4, -0.4, 0.1])
    torch.testing.assert_close(seen["rewards"], want)


def test_a_story_without_a_reward_has_no_part_in_a_step(student):
    batch = random_batch([5, 3, 4], student.config.vocab_size)
    with torch.no_grad():
        batch.logprobs, _ = ppo.response_logprobs(student, batch)
    batch.ref_logprobs = batch.logprobs - 0.1
    ends, stats = [], []
    for rows, rewards in (([0, 1, 2], [1.0, None, 0.5]), ([0, 2], [1.0, 0.5])):
        copied, head = copy.deepcopy(student), ValueHead(student.config.n_embd)
        learner = policy(copied, head, SharpAdam(copied, head, CONFIG), CONFIG)
        stats.append(ppo.step(learner, batch.rows(np.array(rows)), rewards, 0.2))
        ends.append(copied.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert stats[0] == pytest.approx(stats[1] | {"unscored": 1}, rel=0, abs=0, nan_ok=True)


def test_one_story_has_a_standard_deviation_of_zero(student):
    batch = random_batch([5], student.config.vocab_size)
    with torch.no_grad():
        batch.logprobs, _ = ppo.response_logprobs(student, batch)
    batch.ref_logprobs = batch.logprobs
    head = ValueHead(student.config.n_embd)
    learner = policy(student, head, SharpAdam(student, head, CONFIG), CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ppo.step(learner, batch, [0.5], 0.2)["reward_std"] == 0


def test_learning_moves_the_policy_towards_what_is_rewarded(student):
    """One token is rewarded: its probability rises, and the value head learns to predict the
    return."""
    config = dataclasses.replace(CONFIG, epochs=4, kl_target=1e6)
    batch = random_batch([10] * 8, student.config.vocab_size)
    batch.tokens[::2] = 42
    head = ValueHead(64)
    optimizer = torch.optim.Adam([*student.parameters(), *head.parameters()], lr=1e-3)
    with torch.no_grad():
        batch.logprobs, states = ppo.response_logprobs(student, batch)
        batch.values = head(states)
    gain = torch.where(batch.tokens == 42, 1.0, -1.0)
    returns = torch.ones_like(gain)
    advantages = ppo.whiten(gain, torch.ones_like(gain).bool())
    batch = with_targets(batch, advantages, returns)
    first = ppo.update(policy(student, head, optimizer, config), batch, 0.0)
    assert first["ratio_error"] < 1e-5
    with torch.no_grad():
        after, states = ppo.response_logprobs(student, batch)
        value = head(states)
    assert float((after - batch.logprobs)[batch.tokens == 42].mean()) > 0
    assert float((after - batch.logprobs)[batch.tokens != 42].mean()) < 0
    assert float((value - returns).abs().mean()) < float((batch.values - returns).abs().mean())


def test_the_learning_rate_falls_linearly_over_all_updates_of_a_run(student, monkeypatch):
    config = dataclasses.replace(
        CONFIG, steps=2, epochs=2, minibatch_size=4, learning_rate=0.8, lr_decay=True
    )
    batch, head, rates = (
        random_batch([3] * 7, student.config.vocab_size),
        ValueHead(student.config.n_embd),
        [],
    )
    optimizer = SharpAdam(student, head, config)
    monkeypatch.setattr(ppo, "MAX_RATIO", 1e9)
    monkeypatch.setattr(ppo, "MAX_UPDATE_KL", math.inf)
    monkeypatch.setattr(optimizer, "step", lambda: rates.append(optimizer.param_groups[0]["lr"]))
    for steps in range(2):
        learner = policy(student, head, optimizer, config)
        ppo.update(learner, with_targets(batch), 0.0, steps)
    assert rates == pytest.approx([0.8 - 0.1 * update for update in range(8)])


def test_under_autocast_each_epoch_uses_the_weights_of_the_one_before(student, monkeypatch):
    """Autocast caches casts of the weights: two epochs under one autocast must equal one epoch
    under each of two."""
    monkeypatch.setattr(ppo, "MAX_RATIO", 1e9)
    monkeypatch.setattr(ppo, "MAX_UPDATE_KL", math.inf)
    batch = random_batch([12, 20], student.config.vocab_size)
    start, ends = copy.deepcopy(student.state_dict()), []
    for calls, epochs in ((1, 2), (2, 1)):
        student.load_state_dict(start)
        head = ValueHead(student.config.n_embd)
        optimizer = torch.optim.Adam([*student.parameters(), *head.parameters()], lr=1e-3)
        config = dataclasses.replace(CONFIG, epochs=epochs)
        for _ in range(calls):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                ppo.update(policy(student, head, optimizer, config), with_targets(batch), 0.0)
        ends.append(copy.deepcopy(student.state_dict()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)


def test_a_batch_holds_each_story_after_its_own_opening(tokenizer):
    openings, words = ["Once upon a time, Tom", "Mia had a kite."], ["had a ball.", "It was"]
    told = []
    for i, (opening, text) in enumerate(zip(openings, words, strict=True)):
        tokens = torch.tensor(tokenizer.encode(" " + text))
        numbers = torch.arange(len(tokens), dtype=torch.float32)
        ids = torch.tensor(encode_opening(tokenizer, opening))
        told.append(Story(i, opening, text, ids, tokens, -numbers, numbers, numbers, "length"))
    whole = collate(told, torch.device("cpu"))
    for b, story in enumerate(told):
        opening, n = encode_opening(tokenizer, story.opening), len(story.tokens)
        expected = [*opening, *story.tokens[:-1].tolist()]
        assert whole.inputs[b, : whole.input_lengths[b]].tolist() == expected
        assert (whole.prompt_lengths[b], whole.lengths[b]) == (len(opening), n)
        part = whole.rows(np.array([b]))
        assert part.tokens.tolist() == story.tokens.tolist() and part.indices.tolist() == [b]
        assert torch.equal(part.values, story.values) and torch.equal(part.logprobs, story.logprobs)
        assert torch.equal(whole.padded(whole.logprobs)[b, :n], story.logprobs)
    assert torch.equal(whole.unpadded(whole.padded(whole.values)), whole.values)
    assert whole.story_sums(whole.values).tolist() == [float(story.values.sum()) for story in told]
