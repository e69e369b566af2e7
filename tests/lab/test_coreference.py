"""Coreference, measured on a student that knows, on one that does not, and on text without names
and pronouns."""

import pytest
import torch

from lab.coreference import NAMES, coreference
from tinystory.data.builtin import grammar
from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.corruptions import unseen_stories
from tinystory.student.model import Student, StudentConfig


@pytest.fixture(scope="module")
def names_tokenizer() -> Tokenizer:
    return Tokenizer.train(list(grammar.stories(60_000, seed=3)), 2048)


class Oracle(Student):
    """Sees the next token, and prefers it by `sure` nats to any other."""

    def __init__(self, config, sure):
        super().__init__(config)
        self.sure = sure
        with torch.no_grad():
            self.wte.weight.copy_(torch.eye(config.vocab_size, config.n_embd))

    def hidden(self, tokens, dropout=0.0, seed=0):
        following = torch.cat([tokens[:, 1:], self.last[: len(tokens), None]], 1)
        return self.sure * self.wte(following)


def test_chance_and_certainty(names_tokenizer, monkeypatch):
    size = names_tokenizer.vocab_size
    stories = unseen_stories(8)
    oracle = Oracle(StudentConfig(1, 1, size, 400, size), 0.0)
    oracle.last = torch.zeros(16, dtype=torch.int64)
    blind = coreference(oracle, names_tokenizer, stories)
    assert blind["names"] > 10 and blind["pronouns"] > 10
    assert blind["he_or_she"] == pytest.approx(0.5)
    assert blind["repeated_name"] < 0.05 < 3 * blind["introduced_name"] < 0.5
    oracle.sure = 30.0
    sure = coreference(oracle, names_tokenizer, stories)
    assert sure["repeated_name"] > 0.95
    assert sure["introduced_name"] > 0.95
    assert sure["he_or_she"] > 0.95
    assert (sure["names"], sure["pronouns"]) == (blind["names"], blind["pronouns"])


def test_a_story_is_read_after_the_token_that_begins_each_document(names_tokenizer, monkeypatch):
    size = names_tokenizer.vocab_size
    student = Student(StudentConfig(1, 1, 64, 64, size))
    first_tokens = set()
    hidden = student.hidden

    def recorded(tokens):
        first_tokens.update(tokens[:, 0].tolist())
        return hidden(tokens)

    monkeypatch.setattr(student, "hidden", recorded)
    coreference(student, names_tokenizer, unseen_stories(20))
    assert first_tokens == {names_tokenizer.eos}


def test_only_repeated_names_count(names_tokenizer):
    size = names_tokenizer.vocab_size
    student = Student(StudentConfig(1, 1, 64, 64, size))
    once = "There was a fox who saw Lily. There was a bear who saw Tom."
    again = f"{once} So the fox gave Lily a hug, and the bear gave Lily a pie."
    assert coreference(student, names_tokenizer, [once])["names"] == 0
    assert coreference(student, names_tokenizer, [again])["names"] == 2
    nothing = coreference(student, names_tokenizer, ["A fox sat on a stone.", "x"])
    assert nothing["repeated_name"] is None and nothing["he_or_she"] is None


def test_unseen_stories_are_not_in_the_corpus():
    assert len(NAMES) == 52
    assert not set(unseen_stories(20)) & set(grammar.stories(100_000, seed=0))
