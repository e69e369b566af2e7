"""Stories come out the same whatever they are batched with, and carry the numbers that PPO
needs."""

import math

import pytest
import torch

from tinystory import ops
from tinystory.rl import ppo
from tinystory.rl.batch import collate
from tinystory.run.errors import UserError
from tinystory.student import generate as generation
from tinystory.student.generate import StudentDecoder, encode_opening, generate, require_room
from tinystory.student.model import KVCache, ValueHead
from tinystory.student.token_step import Sampling

OPENING = "Once upon a time,"


def write(student, tokenizer, head=None, **how):
    how = dict(openings=[OPENING] * 24, first_index=0, max_new_tokens=30, seed=7) | how
    return generate(student, head, tokenizer, **how)


def end_at_rate(student, eos, rate):
    """Changes the student: whatever the text so far, the end token has about this probability."""
    with torch.no_grad():
        # The first feature of the states is 1 everywhere, and no other token's logit depends on
        # that feature.
        student.ln_f.weight[0] = 0
        student.ln_f.bias[0] = 1
        student.unembedding[:, 0] = 0
        student.unembedding[eos] = 0
        logits = student(torch.randint(student.config.vocab_size, (8, 32)))
        student.unembedding[eos, 0] = logits.logsumexp(-1).mean() + math.log(rate)


@pytest.fixture
def eager_to_end(student, tokenizer):
    """A student that ends about half of the stories within 30 tokens."""
    end_at_rate(student, tokenizer.eos, 1 / 40)
    return student


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize(
    "openings", [[OPENING], [OPENING, "Ben", "Once upon a time, Mia had a ball.", "Tom"]]
)
def test_a_story_is_the_same_in_any_batch(eager_to_end, tokenizer, monkeypatch, openings, engine):
    """A story depends on its opening and index alone, not on the other stories of the batch, on the
    engine and without."""
    if not engine:
        monkeypatch.setattr(generation, "engine_runs", lambda device, dtype: False)
    openings = [openings[i % len(openings)] for i in range(24)]
    together = write(eager_to_end, tokenizer, openings=openings)
    assert {s.ended for s in together} == {"eos", "length"}
    assert [s.index for s in together] == list(range(24))
    assert [s.opening for s in together] == openings
    for story in together[::5]:
        alone = write(eager_to_end, tokenizer, openings=[story.opening], first_index=story.index)[0]
        assert torch.equal(alone.tokens, story.tokens) and alone.text == story.text
        torch.testing.assert_close(alone.logprobs, story.logprobs, atol=1e-4, rtol=1e-4)


def test_how_many_stories_are_written_at_once_changes_nothing(eager_to_end, tokenizer, monkeypatch):
    openings = [["Ben", OPENING][i % 2] for i in range(24)]
    together, sent = write(eager_to_end, tokenizer, openings=openings), []
    monkeypatch.setattr(generation, "rows_at_once", lambda count, weights, device: min(count, 7))
    apart = write(
        eager_to_end, tokenizer, openings=openings, on_story=lambda story: sent.append(story.index)
    )
    for a, b in zip(together, apart, strict=True):
        assert (a.index, a.opening, a.text, a.ended) == (b.index, b.opening, b.text, b.ended)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logprobs, b.logprobs)
    assert sorted(sent) == list(range(24))
    assert all(index < 7 + ended for ended, index in enumerate(sent))


@pytest.mark.parametrize(
    "prompt, advice",
    [(60, "lower --max-new-tokens to 4, or"), (64, "64 tokens.*shorten the opening")],
)
def test_an_opening_that_leaves_no_room_is_to_be_shortened(student, prompt, advice):
    with pytest.raises(UserError, match=advice):
        require_room(student, prompt, 8)


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
        # pickle writes whole storages, so no column may be a view of a larger tensor
        for column in (story.tokens, story.logprobs, story.values, story.entropies):
            assert column.untyped_storage().nbytes() == column.nbytes


def test_the_score_stands_on_the_last_token_that_was_drawn(eager_to_end, tokenizer):
    """The reward is on the end token if there is one, never on padding; and no sample is edited
    before PPO."""
    stories = write(eager_to_end, tokenizer)
    batch = collate(stories, torch.device("cpu"))
    scores = torch.arange(1.0, 25.0)
    batch.ref_logprobs = batch.logprobs
    token_rewards = ppo.token_rewards(batch, scores, 0.2)
    columns = (x.split(batch.lengths.tolist()) for x in (batch.tokens, token_rewards))
    for story, score, tokens, rewards in zip(stories, scores, *columns, strict=True):
        n = len(story.tokens)
        assert tokens.equal(story.tokens)
        assert rewards.nonzero().tolist() == [[n - 1]]
        assert rewards[n - 1] == score
        assert (int(tokens[n - 1]) == tokenizer.eos) == (story.ended == "eos")


def test_logprobs_and_values_are_those_of_the_trainer(eager_to_end, tokenizer):
    """PPO computes the sampler's log-probabilities again: the first ratio is 1."""
    head = ValueHead(64)
    torch.nn.init.normal_(head.linear.weight)
    stories = write(eager_to_end, tokenizer, head, openings=[OPENING, "Once", "Ben said"] * 8)
    batch = collate(stories, torch.device("cpu"))
    with torch.no_grad():
        logprobs, states = ppo.response_logprobs(eager_to_end, batch)
        values = head(states)
    torch.testing.assert_close(batch.logprobs, logprobs, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(batch.values, values, atol=2e-3, rtol=1e-3)
    assert all(s.prompt_ids.tolist() == encode_opening(tokenizer, s.opening) for s in stories)


def test_each_story_is_handed_over_once_as_it_ends(eager_to_end, tokenizer):
    seen = []
    stories = write(eager_to_end, tokenizer, on_story=seen.append)
    assert sorted(s.index for s in seen) == list(range(24))
    lengths = [len(s.tokens) for s in seen]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    assert {id(s) for s in seen} == {id(s) for s in stories}


def test_greedy_at_temperature_zero(student, tokenizer):
    stories = write(student, tokenizer, temperature=0.0, openings=[OPENING] * 2)
    assert torch.equal(stories[0].tokens, stories[1].tokens)
    row = torch.tensor(encode_opening(tokenizer, OPENING))
    for token in stories[0].tokens[:5].tolist():
        assert int(student(row[None])[0, -1].argmax()) == token
        row = torch.cat([row, torch.tensor([token])])


def test_a_context_too_short_is_an_error(student, tokenizer):
    with pytest.raises(UserError, match="--max-new-tokens"):
        write(student, tokenizer, max_new_tokens=64)


# --- StudentDecoder without graphs; tests/cuda_device has it with ---------------------------------
PROMPTS, COUNT, NEW = ((5, 6, 7), (8,), (9, 6, 5, 7, 8, 5)), 100, 30
FIRST_ROW = 11
DRAWS = dict(seed=3, temperature=0.9, top_k=200, top_p=0.99)


def always(alive, rows):
    return alive


def at_half(alive, rows):
    return alive if 2 * alive <= rows else rows


def never(alive, rows):
    return rows


@pytest.fixture
def ends_soon(student, tokenizer):
    end_at_rate(student, tokenizer.eos, 1 / 10)
    return student


@pytest.fixture
def head():
    head = ValueHead(64)
    torch.nn.init.normal_(head.linear.weight)
    return head


def steps_of(student, head, eos, dtype=torch.float32):
    """The columns of all stories, 0 behind a story's end, and the rows that ended with each
    step."""
    outputs, ended = (
        [torch.zeros(COUNT, NEW, dtype=t) for t in (torch.int64, *[torch.float32] * 3)],
        [],
    )
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        decoder = StudentDecoder(student, head, Sampling(NEW, eos, **DRAWS))
        decoder.start(
            [torch.tensor(prompt) for prompt in PROMPTS],
            [i % len(PROMPTS) for i in range(COUNT)],
            FIRST_ROW,
        )
        while sum(map(len, ended)) < COUNT:
            stories = decoder.step()
            ended.append([row for row, _ in stories])
            for row, columns in stories:
                assert all(len(column) == len(ended) for column in columns)
                for output, column in zip(outputs, columns, strict=True):
                    output[row, : len(ended)] = column
    return outputs, ended + [[]] * (NEW - len(ended))


@torch.no_grad()
def steps_by_definition(student, head, eos, dtype):
    """Every row continues to the last step, and the tokens after the row's end are set to 0."""
    rows, prompt_of = torch.arange(COUNT), torch.arange(COUNT) % len(PROMPTS)
    spans = torch.tensor([[0, 3], [3, 4], [4, 10]])[prompt_of]
    cache = KVCache(student.config, spans, NEW, dtype, prefix=10)
    columns, hidden = (
        [],
        student.prefill([torch.tensor(prompt) for prompt in PROMPTS], cache)[prompt_of],
    )
    for t in range(NEW):
        drawn, logprobs, entropies = ops.sample(
            student.logits(hidden), rows=rows + FIRST_ROW, step=t, **DRAWS
        )
        columns.append((drawn, logprobs, head(hidden), entropies))
        hidden = student.step(drawn, cache)
    outputs = [torch.stack(column, 1) for column in zip(*columns, strict=True)]
    last = torch.tensor([row.index(eos) if eos in row else NEW - 1 for row in outputs[0].tolist()])
    outputs = [column.masked_fill(torch.arange(NEW) > last[:, None], 0) for column in outputs]
    return outputs, [(last == t).nonzero()[:, 0].tolist() for t in range(NEW)]


@pytest.mark.parametrize(
    "rule, dtype",
    [
        (always, torch.float32),
        (at_half, torch.float32),
        (never, torch.float32),
        (never, torch.float16),
    ],
)
def test_rows_that_have_ended_change_nothing(ends_soon, head, tokenizer, monkeypatch, rule, dtype):
    """However long they stay in the batch."""
    monkeypatch.setattr(generation, "next_batch_size", rule)
    outputs, ended = steps_of(ends_soon, head, tokenizer.eos, dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        defined, ended_there = steps_by_definition(ends_soon, head, tokenizer.eos, dtype)
    assert ended == ended_there and sum(map(bool, ended)) > 5
    assert torch.equal(outputs[0], defined[0])
    for column, same in zip(outputs[1:], defined[1:], strict=True):
        exact = rule is never  # every product has the same shape then
        torch.testing.assert_close(
            column, same, atol=0 if exact else 1e-4, rtol=0 if exact else 1e-4
        )
