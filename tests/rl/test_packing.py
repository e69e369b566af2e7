"""Stories that share an opening give what each gives alone: log-probabilities to the bit, gradients
up to rounding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ppo import random_batch

from tinystory.rl import ppo
from tinystory.rl.packing import Unpack, pack

A, B, C = torch.tensor([2, 9, 11]), torch.tensor([2, 9]), torch.tensor([2, 7, 7, 8])


def packing_of(batch):
    return pack(batch.openings, batch.prompt_lengths, batch.input_lengths)


def test_each_opening_and_each_token_of_a_story_stands_once():
    # 2 + 3, 1 + 1, 2 + 2, 1 + 2 inputs
    batch = random_batch([3, 1, 2, 2], 50, openings=[A, B, A, B])
    inputs, packing = batch.inputs.numpy(), packing_of(batch)
    T = inputs.shape[1]
    assert packing.positions.tolist() == [0, 1, 2, 3, 4, T, T + 1, 2 * T + 3, 3 * T + 2]
    own = inputs.flatten()[packing.positions]
    for row, length in enumerate(batch.input_lengths.tolist()):
        assert (
            own[packing.source[row * T : row * T + length]].tolist()
            == inputs[row, :length].tolist()
        )
    assert packing.copies.tolist() == [2 * T, 2 * T + 1, 2 * T + 2, 3 * T, 3 * T + 1]
    assert packing.shared[packing.owners].tolist() == [0, 1, 2, 5, 6]


@given(
    openings=st.lists(st.integers(0, 6), min_size=1, max_size=20),
    prompt_lengths=st.lists(st.integers(1, 6), min_size=7, max_size=7),
    data=st.data(),
)
def test_any_rows_are_read_from_the_sequence_and_nothing_stands_in_it_twice(
    openings, prompt_lengths, data
):
    prompts = np.array(prompt_lengths)[openings]
    stories = data.draw(st.lists(st.integers(0, 9), min_size=len(prompts), max_size=len(prompts)))
    lengths = prompts + stories
    packing = pack(np.array(openings), prompts, lengths)
    if len(set(openings)) == len(openings):
        assert packing is None
        return
    # what each padded position holds: a token of an opening, which rows share, or of a story
    rows = []
    for row, (opening, prompt, length) in enumerate(zip(openings, prompts, lengths, strict=True)):
        shared = [(opening, "opening", at) for at in range(prompt)]
        own = [(row, "story", at) for at in range(prompt, length)]
        rows.append([*shared, *own, *[None] * (max(lengths) - length)])
    held = [token for row in rows for token in row]

    sequence = [held[place] for place in packing.positions]
    assert sequence == list(dict.fromkeys(token for token in held if token))  # in the rows' order
    for token, source in zip(held, packing.source.tolist(), strict=True):
        assert sequence[source] == token if token else source == 0

    not_computed = set(range(len(held))) - set(packing.positions.tolist())
    assert packing.copies.tolist() == sorted(place for place in not_computed if held[place])
    originals = [sequence[token] for token in packing.shared[packing.owners]]
    assert originals == [held[copy] for copy in packing.copies]
    assert packing.shared.tolist() == sorted(set(packing.source[packing.copies].tolist()))


def test_there_is_no_packing_without_a_shared_opening():
    batch = random_batch([3, 1, 2], 50, openings=[A, B, C])
    assert packing_of(batch) is None


@pytest.mark.parametrize("openings", [[A] * 6, [A, B, A, C, B, A], [B, C, A, A, A, A]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_and_gradients_as_padded_rows(student, monkeypatch, openings, dtype):
    batch = random_batch([4, 9, 1, 7, 3, 12], student.config.vocab_size, openings=openings)
    weight, results = torch.randn(len(batch.logprobs)), []
    for packed in (True, False):
        if not packed:
            monkeypatch.setattr("tinystory.rl.packing.pack", lambda *_: None)
        student.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logprob, _ = ppo.response_logprobs(student, batch)
        (logprob * weight).sum().backward()
        results.append(
            (logprob.detach(), {name: p.grad.clone() for name, p in student.named_parameters()})
        )
    (ours, grads), (want, want_grads) = results
    assert torch.equal(ours, want)
    rounding = 2e-6 if dtype == torch.float32 else 3e-2
    for name, grad in grads.items():
        assert float((grad - want_grads[name]).abs().max()) <= rounding * float(
            want_grads[name].abs().max()
        ), name


def test_gradients_of_copies_are_added_in_float32():
    batch = random_batch([1] * 400, 50, openings=[B] * 400)
    packing = packing_of(batch)
    x = torch.zeros(len(packing.positions), 3, dtype=torch.bfloat16, requires_grad=True)
    Unpack.apply(x, packing).sum().backward()
    # in bfloat16: 256
    assert x.grad.tolist() == [[400.0] * 3] * 2 and np.array_equal(packing.positions, [0, 1])
