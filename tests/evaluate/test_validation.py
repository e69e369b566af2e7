"""Validation against plain sums of log-probabilities."""

import math

import numpy as np
import pytest
import torch

from tinystory.data.shards import TokenFile
from tinystory.evaluate.validation import validate
from tinystory.student.model import Student, StudentConfig


def test_a_short_validation_reads_from_all_of_the_file():
    """In a corpus of several files, the first sequences would all come from the first file."""
    torch.manual_seed(0)
    student = Student(StudentConfig(n_layer=1, n_head=1, n_embd=32, context=8, vocab_size=64))
    tokens = torch.randint(64, (4 * 8 + 1,)).numpy()
    sizes, empty = np.ones(64, np.int64), np.empty(0)

    def nats(tokens, sequences=None):
        file = TokenFile(tokens=tokens, words=empty, offsets=empty)
        return validate(student, file, sizes, sequences, batch=3, packing="stream")[0]

    quarters = [nats(tokens[start : start + 9]) for start in (0, 8, 16, 24)]
    assert nats(tokens, 2) == pytest.approx((quarters[0] + quarters[2]) / 2)
    assert nats(tokens, 3) == pytest.approx((quarters[0] + quarters[1] + quarters[2]) / 3)
    assert nats(tokens) == nats(tokens, 9) == pytest.approx(sum(quarters) / 4)


def test_validation_of_whole_documents_counts_each_token_once():
    torch.manual_seed(0)
    student = Student(StudentConfig(n_layer=1, n_head=1, n_embd=32, context=8, vocab_size=64))
    lengths = [3, 5, 8, 2, 11]
    tokens, offsets = (
        torch.randint(1, 64, (sum(lengths),)).numpy(),
        np.array([0, *np.cumsum(lengths)]),
    )
    tokens[offsets[1:] - 1] = 0
    file = TokenFile(tokens=tokens, words=np.empty(0), offsets=offsets)
    nats, bits = validate(student, file, np.full(64, 4), None, batch=3, packing="whole")
    assert bits == pytest.approx(nats / math.log(2) / 4)
    # The longest document is cut after eight tokens; the rest goes before the two documents that
    # fit beside it.
    total = 0.0
    for parts in ([(0, 3), (3, 8)], [(8, 16)], [(18, 26)], [(26, 29), (16, 18)]):
        row = [
            int(tokens[parts[0][0] - 1]),
            *(int(t) for part in parts for t in tokens[slice(*part)]),
        ]
        logprobs = student(torch.tensor([row[:-1]])).log_softmax(-1)[0]
        total -= float(logprobs[torch.arange(len(row) - 1), row[1:]].detach().sum())
    assert nats == pytest.approx(total / len(tokens))
