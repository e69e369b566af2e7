import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinystory.data.shards import TokenFile
from tinystory.data.windows import PAUSE, Curriculum, Windows, pack, pieces
from tinystory.run.errors import UserError

EOS = 0
PACKING = st.sampled_from(["whole", "stream"])
# of documents, in tokens, with their end
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def file_of(lengths: list[int]) -> TokenFile:
    """Every token except the end tokens is different, and every second token begins a word."""
    offsets = np.array([0, *np.cumsum(lengths)])
    tokens = np.arange(1, offsets[-1] + 1)
    tokens[offsets[1:] - 1] = EOS
    return TokenFile(tokens, (tokens % 2).astype(np.uint8), offsets)


@given(lengths=LENGTHS, context=st.integers(2, 30), packing=PACKING, seed=st.integers(0, 9))
def test_every_token_is_packed_once_and_no_two_sequences_could_be_one(
    lengths, context, packing, seed
):
    file = file_of(lengths)
    cut = pieces(file, context, packing)
    packed = pack(cut, context, np.random.default_rng(seed).permutation(len(cut)))
    assert sorted(piece for sequence in packed for piece in sequence) == list(range(len(cut)))
    covered = [at for begin, end, _ in cut.tolist() for at in range(begin, end)]
    assert covered == list(range(packing == "stream", len(file)))
    sizes = sorted(sum(int(cut[p, 1] - cut[p, 0]) for p in sequence) for sequence in packed)
    assert all(size <= context for size in sizes)
    assert len(sizes) < 2 or sum(sizes[:2]) > context


@given(lengths=LENGTHS, context=st.integers(2, 30), seed=st.integers(0, 9))
def test_a_document_that_fits_is_read_whole_and_after_an_end(lengths, context, seed):
    file = file_of(lengths)
    if len(file) <= context:
        return
    windows = Windows(file, context, 1, seed, "whole")
    spans = set()
    for number in range(windows.count):
        (row,) = windows.batch(number)[0].tolist()
        ends = [i for i, token in enumerate(row) if token == EOS]
        spans |= {tuple(row[i : j + 1]) for i in ends for j in ends}
    for begin, length in zip(file.offsets[:-1], lengths, strict=True):
        if length <= context:
            assert (EOS, *file.tokens[begin : begin + length].tolist()) in spans


def test_an_epoch_holds_every_sequence_in_an_order_of_its_own():
    file = file_of([9, 4, 30, 7, 12, 12, 5, 8, 21, 3] * 4)
    windows = Windows(file, 16, 1, 0, "whole")
    reads = [
        [tuple(windows.batch(e * windows.count + i)[0][0].tolist()) for i in range(windows.count)]
        for e in (0, 1)
    ]
    again = Windows(file, 16, 1, 0, "whole")
    assert [
        tuple(again.batch(windows.count + i)[0][0].tolist()) for i in range(windows.count)
    ] == reads[1]
    assert reads[0] != reads[1] and len(set(reads[0])) == windows.count
    for read in reads:
        assert {token for row in read for token in row} == set(file.tokens.tolist())


def test_words_are_those_of_the_inputs_and_the_rest_of_a_sequence_is_filled():
    file = file_of([6, 5])
    batch, words = Windows(file, 8, 2, 0, "whole").batch(0)
    # Documents of 6 and 5 tokens do not fit into 8: each is followed by the beginning of the other.
    assert sorted(batch.tolist()) == [[0, 1, 2, 3, 4, 5, 0, 7, 8], [0, 7, 8, 9, 10, 0, 1, 2, 3]]
    assert words == sum(token % 2 for row in batch.tolist() for token in row[:-1])


def test_a_stream_is_cut_every_so_many_tokens_whatever_the_documents():
    file = file_of([9, 4, 30, 7])
    windows = Windows(file, 16, 1, 0, "stream")
    rows = sorted(windows.batch(i)[0][0].tolist() for i in range(windows.count))
    assert rows == sorted(file.tokens[start : start + 17].tolist() for start in (0, 16, 32))


def test_a_curriculum_reads_some_documents_alone_in_the_middle():
    file = file_of([10 + i % 4 for i in range(400)])  # a third of each sequence is filling
    whole = Windows(file, 16, 2, 0, "whole")
    middle = Windows(file.first(150), 16, 2, 0, "whole")
    total = 3 * file.word_count
    curriculum = Curriculum(whole, middle, total)
    begin = curriculum.batches_before
    end = begin + curriculum.batches_paused
    read, words = zip(*[curriculum.batch(number) for number in range(end + 9)], strict=True)
    for i, batch in enumerate(read[begin:end]):
        assert torch.equal(batch, middle.batch(i)[0])
        assert set(batch.flatten().tolist()) <= set(file.tokens[: len(middle.file)].tolist())
    for i, batch in enumerate(read[:begin] + read[end:]):
        assert torch.equal(batch, whole.batch(i)[0])
    # Each sequence begins with the token before it, here an end: fewer words than elsewhere.
    assert sum(words[:begin]) / total == pytest.approx(PAUSE[0], abs=0.03)
    assert sum(words[:end]) / total == pytest.approx(PAUSE[1], abs=0.06)


@pytest.mark.parametrize("packing", ["whole", "stream"])
def test_less_than_one_sequence_is_refused(packing):
    with pytest.raises(
        UserError, match="16 tokens to train on, fewer than one sequence of --context 16"
    ):
        Windows(file_of([9, 7]), 16, 1, 0, packing)
