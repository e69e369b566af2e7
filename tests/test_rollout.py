"""Stories come out the same whatever they are batched with, and carry the numbers that PPO needs."""

import pytest
import torch

from tinystory.errors import UserError
from tinystory.rl import ppo
from tinystory.rl.rollout import collate, distinct_ngrams, encode_opening, rollout
from tinystory.student.model import ValueHead

OPENING = "Once upon a time,"


def write(student, tokenizer, head=None, **how):
    how = dict(count=24, first_index=0, max_new_tokens=30, seed=7) | how
    return rollout(student, head, tokenizer, OPENING, **how)


@pytest.fixture
def eager_to_end(student, tokenizer):
    """A student that ends many of its stories early."""
    with torch.no_grad():
        student.ln_f.bias += 1.2 * student.wte.weight[tokenizer.eos]
    return student


def test_a_story_is_the_same_in_any_batch(eager_to_end, tokenizer):
    together = write(eager_to_end, tokenizer)
    assert {s.ended for s in together} == {"eos", "length"}
    assert [s.index for s in together] == list(range(24))
    for story in together[::5]:
        alone = write(eager_to_end, tokenizer, count=1, first_index=story.index)[0]
        assert torch.equal(alone.tokens, story.tokens) and alone.text == story.text
        torch.testing.assert_close(alone.logprobs, story.logprobs, atol=1e-4, rtol=1e-4)


def test_threads_change_nothing(eager_to_end, tokenizer):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = write(eager_to_end, tokenizer)
        torch.set_num_threads(2)
        two = write(eager_to_end, tokenizer)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, two, strict=True))


def test_another_seed_or_index_is_another_story(student, tokenizer):
    stories = write(student, tokenizer) + write(student, tokenizer, seed=8)
    assert len({tuple(s.tokens.tolist()) for s in stories}) == 48


def test_stories_end_at_the_end_token_and_keep_it(eager_to_end, tokenizer):
    for story in write(eager_to_end, tokenizer):
        assert tokenizer.eos not in story.tokens[:-1]
        assert (story.ended == "eos") == (int(story.tokens[-1]) == tokenizer.eos)
        assert story.ended == "eos" or len(story.tokens) == 30
        assert len(story.tokens) == len(story.logprobs) == len(story.values) == len(story.entropies)
        assert story.text == tokenizer.decode(story.tokens.tolist()).strip()


def test_the_score_stands_on_the_last_token_that_was_drawn(eager_to_end, tokenizer):
    """On the end token where there is one, never on padding; and no sample is edited on its way to PPO."""
    stories = write(eager_to_end, tokenizer)
    batch = collate(stories, tokenizer, OPENING, torch.device("cpu"))
    scores = torch.arange(1.0, 25.0)
    rewards = ppo.token_rewards(scores, batch.logprobs, batch.logprobs, batch.mask, 0.2)
    for row, story in enumerate(stories):
        n = len(story.tokens)
        assert batch.tokens[row, :n].equal(story.tokens) and int(batch.mask[row].sum()) == n
        assert batch.mask[row, :n].all() and rewards[row].nonzero().tolist() == [[n - 1]]
        assert float(rewards[row, n - 1]) == scores[row]
        assert (int(batch.tokens[row, n - 1]) == tokenizer.eos) == (story.ended == "eos")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_values_are_those_of_the_trainer(eager_to_end, tokenizer, temperature):
    """What the sampler saw is what PPO reads again: the first ratio is 1."""
    head = ValueHead(64)
    torch.nn.init.normal_(head.linear.weight)
    batch = collate(
        write(eager_to_end, tokenizer, head, temperature=temperature), tokenizer, OPENING, torch.device("cpu")
    )
    with torch.no_grad():
        logprobs, values = ppo.response_stats(eager_to_end, head, batch, temperature)
    torch.testing.assert_close(batch.logprobs, logprobs, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(batch.values, values, atol=2e-3, rtol=1e-3)


def test_each_story_is_handed_over_once_as_it_ends(eager_to_end, tokenizer):
    seen = []
    stories = write(eager_to_end, tokenizer, on_story=seen.append)
    assert sorted(s.index for s in seen) == list(range(24))
    lengths = [len(s.tokens) for s in seen]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    assert {id(s) for s in seen} == {id(s) for s in stories}


def test_greedy_at_temperature_zero(student, tokenizer):
    stories = write(student, tokenizer, temperature=0.0, count=2)
    assert torch.equal(stories[0].tokens, stories[1].tokens)
    row = torch.tensor(encode_opening(tokenizer, OPENING))
    for token in stories[0].tokens[:5].tolist():
        assert int(student(row[None])[0, -1].argmax()) == token
        row = torch.cat([row, torch.tensor([token])])


def test_a_context_too_short_is_told(student, tokenizer):
    with pytest.raises(UserError, match="--max-new-tokens"):
        write(student, tokenizer, max_new_tokens=64)


def test_distinct_ngrams_tell_collapse():
    assert distinct_ngrams(["a b c d e", "f g h i"]) == 1.0
    assert distinct_ngrams(["a b c d e"] * 4) == 0.25
    assert distinct_ngrams(["a b", ""]) is None
