"""Openings (prompts) that stories continue: a single text, the built-in list, or the lines of a
file."""

import functools
import os
import random
from pathlib import Path

from tinystory.data.builtin import grammar
from tinystory.run.errors import UserError
from tinystory.run.files import read_text

HELD_OUT = 10  # every tenth opening of a file, and at least one, is held out from training
BUILTIN = 180  # built-in openings that are trained on
BUILTIN_HELD_OUT = 200
LONGEST = 30  # words of a built-in opening


class Openings:
    """`train`: openings for PPO; `held_out`: openings for evaluation. A single opening is both."""

    def __init__(self, texts: list[str], seed: int, per_opening: int = 1):
        self.seed = seed
        self.per_opening = per_opening
        self.held_out = texts[HELD_OUT - 1 :: HELD_OUT] or texts[-1:]
        if texts == builtin_openings():  # every tenth would be too few to distinguish two students
            self.held_out = texts[BUILTIN:]
        held_out = set(self.held_out)
        self.train = [text for text in texts if text not in held_out] or texts

    def __getitem__(self, index: int) -> str:
        """The opening of story `index`. `per_opening` stories in a row share an opening; each epoch
        shuffles all openings by `seed`."""
        epoch, index_in_epoch = divmod(index // self.per_opening, len(self.train))
        return self.train[_order(len(self.train), self.seed, epoch)[index_in_epoch]]

    def new_words(self, first_index: int, count: int) -> int:
        """The number of words in the openings that these stories use for the first time in the
        run."""
        first_epoch = len(self.train) * self.per_opening
        words = 0
        for index in range(first_index, min(first_index + count, first_epoch)):
            if index % self.per_opening == 0:
                words += len(self[index].split())
        return words


@functools.lru_cache(2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def names_file(name: str) -> bool:
    """Whether `load_openings` reads `name` as a file, no matter whether the file exists: a value
    that a run's config.json records as a text must never become a file."""
    one_word = len(name.split()) == 1
    return (
        name.startswith(("/", "./", "../")) or name.endswith(".txt") or ("/" in name and one_word)
    )


def load_openings(name: str) -> list[str]:
    """Distinct openings: the built-in ones, the lines of a file (UserError if it has none), or
    `name` itself. Raises UserError for a text that is also the name of a file."""
    if name == "builtin":
        return builtin_openings()
    path = Path(name)
    if name.strip() and not names_file(name):
        if os.path.exists(name):
            raise UserError(
                f"--openings {name} could be a text or the file of this name: give ./{name} to read the "
                "file, or another opening"
            )
        return [name]
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
        texts = [line for line in dict.fromkeys(lines) if line]
        if not texts:
            raise UserError(f"{name} holds no opening")
    except UserError as error:
        raise UserError(
            f"--openings {error}; give builtin, a text file with one opening per line, or an opening"
        ) from None
    return texts


@functools.cache
def builtin_openings() -> list[str]:
    """First sentences of the grammar's stories, up to the hero's name: they say who, often where,
    and introduce the problem. They are drawn with another seed than the corpus. Still, 30 of the 200
    held-out ones begin a document of the corpus too, with a continuation of its own."""
    rng = random.Random("openings")
    openings: list[str] = []
    while len(openings) < BUILTIN + BUILTIN_HELD_OUT:
        opening = grammar.opening(*grammar.generate(rng))
        if len(opening.split()) <= LONGEST and opening not in openings:
            openings.append(opening)
    return openings
