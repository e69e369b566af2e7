"""A student small enough to train within a test, and texts for it to read."""

import hypothesis
import pytest
import torch

from tinystory.data.tokenizer import Tokenizer
from tinystory.student.model import Student, StudentConfig

hypothesis.settings.register_profile("patient", deadline=None)  # a slow machine is no failure
hypothesis.settings.load_profile("patient")

NAMES = ("Tom", "Mia", "Ben", "Lily", "Max", "Ana", "Sam", "Eva")
THINGS = ("ball", "kite", "boat", "drum", "hat", "cake", "shell", "lamp")
PLACES = ("park", "wood", "house", "garden", "shop", "barn")


def tiny_stories(count: int) -> list[str]:
    stories = []
    for i in range(count):
        name, thing, place = NAMES[i % 8], THINGS[i // 8 % 8], PLACES[i // 64 % 6]
        stories.append(
            f"Once upon a time, {name} had a {thing}. {name} took the {thing} to the {place}. "
            f'"Where is my {thing}?" said {name}. It was in the {place} number {i}. {name} was happy.'
        )
    return stories


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(tiny_stories(200), 320)


@pytest.fixture
def student(tokenizer) -> Student:
    torch.manual_seed(0)
    student = Student(StudentConfig(n_layer=2, n_head=2, n_embd=64, context=64, vocab_size=tokenizer.vocab_size))
    for p in student.parameters():  # far enough from zero that every path matters
        torch.nn.init.normal_(p, std=0.2) if p.dim() >= 2 else torch.nn.init.normal_(p, mean=float(p[0] == 1), std=0.1)
    return student
