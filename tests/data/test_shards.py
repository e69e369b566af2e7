import hashlib
import os
import random
import signal
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystory.data import shards
from tinystory.data.builtin import grammar
from tinystory.data.corpus import Corpus, Part, open_corpus
from tinystory.data.shards import encode, prepare
from tinystory.data.tokenizer import Tokenizer
from tinystory.run.errors import UserError

AWKWARD = (
    "\n \x1c \x1f \x85 \u00a0 \u200b \u2028 \u3000 \ufeff !\x1c! a é 猫 🐈‍⬛ </s> <pad>".split(" ")
)
AWKWARD += [" ", " a"]
TEXT = st.lists(st.one_of(st.text(max_size=6), st.sampled_from(AWKWARD)), max_size=12).map("".join)


def corpus_of(documents, fail=False) -> Corpus:
    """A corpus in memory. With `fail`, the corpus has the same fingerprint and raises when it is
    read."""
    identity = hashlib.sha256(repr(documents).encode()).hexdigest()
    return Corpus([Part(identity, (lambda: 1 / 0) if fail else (lambda: iter(documents)))])


STORIES = [*grammar.stories(20_000, 0), "猫が 猫が 好きです", "a\u3000b \x1c c", "</s> is text"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(STORIES, 600)


# Word counts.


def words_one_by_one(tokenizer: Tokenizer, text: str) -> list[int]:
    """The definition, spelled out: for each token, the number of words that begin in the token."""
    begins, byte, in_word = [], 0, False
    for char in text:
        if not char.isspace() and not in_word:
            begins.append(byte)
        in_word, byte = not char.isspace(), byte + len(char.encode())
    counts, at = [], 0
    for id in tokenizer.encode(text):
        end = at + len(tokenizer.token_bytes[id])
        counts.append(sum(at <= begin < end for begin in begins))
        at = end
    return counts


@given(documents=st.lists(TEXT, max_size=4))
def test_words_are_counted_exactly(tokenizer, documents):
    tokens, words = encode(tokenizer, documents)
    expected_tokens, expected_words = [], []
    for document in documents:
        expected_tokens += [*tokenizer.encode(document), tokenizer.eos]
        expected_words += [*words_one_by_one(tokenizer, document), 0]
    assert tokens.tolist() == expected_tokens and words.tolist() == expected_words
    assert words.sum() == sum(len(document.split()) for document in documents)


def test_every_white_space_of_python_parts_words(tokenizer):
    spaces = [chr(c) for c in range(sys.maxunicode + 1) if chr(c).isspace()]
    assert len(spaces) == 29
    text = "a" + "a".join(spaces) + "a"
    assert encode(tokenizer, [text])[1].sum() == len(text.split()) == 30


# The folder.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for shards."""
    monkeypatch.setenv("TINYSTORY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


def test_prepare_holds_every_document_in_order(cache):
    data = prepare(corpus_of(STORIES), vocab_size=600, val_fraction=0.2, seed=3)
    assert data.tokenizer.vocab_size == 600
    assert data.train.tokens.dtype == np.uint16 and data.train.words.dtype == np.uint8
    assert data.train.offsets.dtype == np.int64
    told = []
    for split in (data.train, data.val):
        tokens, words = [], []
        for a, b in zip(split.offsets[:-1], split.offsets[1:], strict=True):
            tokens.append(split.tokens[a:b])
            words.append(int(split.words[a:b].sum()))
        texts = [data.tokenizer.decode(ids[:-1]) for ids in tokens]
        assert all(
            ids[-1] == data.tokenizer.eos and data.tokenizer.eos not in ids[:-1] for ids in tokens
        )
        assert texts == [story for story in STORIES if story in set(texts)]
        assert words == [len(text.split()) for text in texts]
        assert split.word_count == sum(words)
        assert len(split) == len(split.tokens) == len(split.words) == split.offsets[-1]
        told += texts
    assert sorted(told) == sorted(STORIES)
    assert 0.1 < (len(data.val.offsets) - 1) / len(STORIES) < 0.3
    assert [path.name for path in cache.iterdir()] == [data.path.name]


def test_the_second_time_opens_what_is_there(cache):
    first = prepare(corpus_of(STORIES), vocab_size=600)
    again = prepare(corpus_of(STORIES, fail=True), vocab_size=600)
    assert again.path == first.path
    assert np.array_equal(again.train.tokens, first.train.tokens)


def test_anything_that_matters_gives_another_folder(cache):
    def path(documents=STORIES, **changes):
        return prepare(corpus_of(documents), **{"vocab_size": 600, **changes}).path

    paths = [path(), path(STORIES[1:]), path(vocab_size=500), path(seed=1), path(val_fraction=0.2)]
    assert len(set(paths)) == len(paths)


def test_a_large_vocabulary_takes_four_bytes(cache):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(21_000)]
    data = prepare(corpus_of([" ".join(words)] * 3), vocab_size=66_000)
    assert data.tokenizer.vocab_size > 1 << 16
    assert data.train.tokens.dtype == np.uint32 and data.train.tokens.max() >= 1 << 16
    assert data.tokenizer.decode(data.train.tokens[: data.train.offsets[1]]) == " ".join(words)


# The split.


def test_documents_that_pause_stand_after_the_others(cache):
    pausing = [f"No story {i}." for i in range(30)]
    parts = [*corpus_of(STORIES).parts, *corpus_of(pausing).parts]
    data = prepare(Corpus([parts[0], parts[1]._replace(pauses=True)]), vocab_size=600)
    middle = data.tokenizer.decode(data.middle.tokens)
    train = data.tokenizer.decode(data.train.tokens)
    assert train.startswith(middle) and "No story" not in middle
    assert train[len(middle) :].startswith("No story")
    stories = [
        data.tokenizer.decode(data.train.tokens[begin : end - 1]) in STORIES
        for begin, end in pairwise(data.train.offsets)
    ]
    assert len(data.middle.offsets) - 1 == sum(stories)
    assert data.middle.word_count == int(data.middle.words.sum())
    assert [part.pauses for part in open_corpus(["dull", "builtin"]).parts] == [False, True]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_a_few_documents_still_fill_both_splits(cache, count, seed, fraction):
    documents = [f"Story number {i}." for i in range(count)]
    data = prepare(corpus_of(documents), vocab_size=300, val_fraction=fraction, seed=seed)
    assert len(data.train.offsets) + len(data.val.offsets) == count + 2
    assert min(len(data.train), len(data.val)) > 0


def test_growing_the_corpus_moves_no_document_to_the_other_split(cache):
    def validation(count):
        corpus = corpus_of([f"Story {i}." for i in range(count)])
        data = prepare(corpus, vocab_size=300)
        return data.tokenizer.decode(data.val.tokens)

    assert validation(400).startswith(validation(200))


def test_a_single_document_can_not_be_split(cache):
    with pytest.raises(UserError, match=r"blank lines or <\|endoftext\|>"):
        prepare(corpus_of(["One story."]), vocab_size=300)
    assert list(cache.iterdir()) == []


def test_the_folder_does_not_depend_on_the_batches(cache, tmp_path, monkeypatch):
    whole = prepare(corpus_of(STORIES), vocab_size=600).path
    monkeypatch.setenv("TINYSTORY_CACHE", str(tmp_path / "batched"))
    monkeypatch.setattr(shards, "BATCH", 300)
    batched = prepare(corpus_of(STORIES), vocab_size=600).path
    assert batched != whole
    for name in shards.FILES:
        assert (batched / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_tokenizer_has_not_seen_the_validation_documents(cache):
    documents = [f"{'abcdefghij'[i % 10] * 3} " * 50 for i in range(10)]
    data = prepare(corpus_of(documents), vocab_size=400, val_fraction=0.3, seed=1)
    for letter in "abcdefghij":
        trained = letter.encode() * 3 in data.tokenizer.token_bytes
        assert trained == (letter in data.tokenizer.decode(data.train.tokens))


# Accidents.


def test_an_error_while_building_leaves_nothing(cache, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"Once upon a time.\n\n" * 1000 + b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(open_corpus([str(bad)]), vocab_size=300)
    assert list(cache.iterdir()) == []


BUILD = """
import os, signal, sys
from tinystory.data import shards
from tinystory.data.corpus import open_corpus
encode, calls = shards.encode, []
def killed(*arguments):
    calls.append(0)
    if len(calls) > 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*arguments)
if "kill" in sys.argv:
    shards.encode, shards.BATCH = killed, 50
print(shards.prepare(open_corpus([sys.argv[1]]), vocab_size=400).path)
"""


def build(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def tale(tmp_path):
    path = tmp_path / "tale.txt"
    path.write_text("\n\n".join(STORIES), encoding="utf-8")
    return path


def test_a_kill_while_building_leaves_nothing_that_looks_whole(cache, tale):
    killed = build(tale, "kill")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    data = prepare(open_corpus([str(tale)]), vocab_size=400)
    assert sum(split.word_count for split in (data.train, data.val)) == sum(
        len(s.split()) for s in STORIES
    )


def test_two_processes_that_build_at_once_agree(cache, tale):
    both = [build(tale) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert [str(path) for path in cache.iterdir()] == [outputs[0][0].strip()]


@pytest.mark.parametrize("name", [*shards.FILES, "manifest.json"])
def test_a_flipped_bit_is_noticed_and_no_student_is_trained_on_it(cache, name):
    path = prepare(corpus_of(STORIES), vocab_size=600).path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"delete {path.parent} and run this again") as caught:
        prepare(corpus_of(STORIES), vocab_size=600)
    assert name in str(caught.value)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TINYSTORY_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="TINYSTORY_CACHE"):
        prepare(corpus_of(STORIES), vocab_size=600)
