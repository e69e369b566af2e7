"""Known stories, whose order is beyond dispute before any judge sees them: real ones, corruptions of them, and texts
that are no stories at all."""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tinystory.data.corpus import BUILTIN, open_corpus
from tinystory.evaluate.coreference import unseen_stories

REAL, SENTENCES, WORDS = "real", "sentences shuffled", "words shuffled"
LENGTHS = (60, 90, 120, 150, 180)  # words to which stories are cut, at the end of a sentence
FEWEST_SENTENCES = 6  # with fewer, another order may be no worse
DOCUMENTS = 1500  # documents of a corpus among which stories are drawn

_NOUN = re.compile(
    r"\b(?:the|an?|his|her|my|their) ([a-z]{3,})(?=[.,!?;]| (?:and|was|is|in|to|of|with|that|on|had|were)\b)"
)


class KnownStory(NamedTuple):
    """A story of known quality. The writer was given `opening`; the judge is to grade `story`."""

    kind: str
    opening: str
    story: str


class Pool(NamedTuple):
    """The nouns, without repeats, and the words of many stories."""

    nouns: Sequence[str]
    words: Sequence[str]


def _reordered(parts: list[str], rng: random.Random) -> list[str]:
    """The parts in another order, at random, if there is one."""
    out = list(parts)
    while len(set(parts)) > 1 and out == parts:
        rng.shuffle(out)
    return out


def _replaced(sentences: list[str], replace: Callable[[str], str]) -> list[str]:
    return [re.sub(r"[A-Za-z]+", lambda match: replace(match[0]), sentence) for sentence in sentences]


def _new_nouns(sentences: list[str], nouns: Sequence[str], rng: random.Random) -> list[str]:
    return _replaced(sentences, lambda w: rng.choice(nouns) if w in nouns and rng.random() < 0.3 else w)


# Given a story's sentences s and those of another story, sentences or words to be joined by spaces.
CORRUPTIONS: dict[str, Callable[[list[str], Sequence[str], Pool, random.Random], list[str]]] = {
    SENTENCES: lambda s, other, pool, rng: _reordered(s, rng),
    WORDS: lambda s, other, pool, rng: _reordered(" ".join(s).split(), rng),
    "halves of two stories": lambda s, other, pool, rng: [*s[: len(s) // 2], *other[len(other) // 2 :]],
    "30 % of nouns replaced": lambda s, other, pool, rng: _new_nouns(s, pool.nouns, rng),
    "10 % of words replaced": lambda s, other, pool, rng: _replaced(
        s, lambda word: rng.choice(pool.words) if rng.random() < 0.1 else word
    ),
}
# Texts that are no stories. index: of the story in whose place they stand.
NO_STORIES: dict[str, Callable[[int, random.Random], str]] = {
    "generic sentences": lambda index, rng: " ".join(rng.sample(split_sentences(*_paragraphs("generic")), 14)),
    "essay: full marks": lambda index, rng: _essay(index),
}
KINDS = (REAL, *CORRUPTIONS, *NO_STORIES)


def known_stories(
    documents: Iterable[str], count: int, kinds: Sequence[str] = KINDS, seed: int = 0
) -> list[KnownStory]:
    """`count` stories of each kind; those of one index have one opening, the first sentence. A corruption that changes
    nothing is left out. Half of the real ones are ours while they last, the others are a corpus's (real_stories)."""
    usable = _usable_of(documents, count)
    ours = [_first_sentences(text, i) for i, text in enumerate(_paragraphs("stories")[: count // 2])]
    texts = [*ours, *real_stories(usable, count - len(ours), seed)]
    text = " ".join(usable[:300])
    pool = Pool(sorted(set(_NOUN.findall(text))), re.findall(r"[a-z]+", text))
    stories = []
    for i, (opening, *sentences) in enumerate(texts):
        other, real = texts[(i + len(texts) // 2) % len(texts)][1:], " ".join(sentences)
        for kind in kinds:
            draw = random.Random(f"{seed} {kind} {i}")  # the same text whatever the other kinds are
            if kind in CORRUPTIONS:
                story = " ".join(CORRUPTIONS[kind](sentences, other, pool, draw))
            else:
                story = NO_STORIES[kind](i, draw) if kind in NO_STORIES else real
            if kind == REAL or story != real:
                stories.append(KnownStory(kind, opening, story))
    return stories


def real_stories(documents: Iterable[str], count: int, seed: int = 0) -> list[list[str]]:
    """The first sentences of `count` stories, drawn from the first DOCUMENTS; of the grammar, if too few are usable."""
    drawn = random.Random(seed).sample(_usable_of(documents, count), count)
    return [_first_sentences(text, i) for i, text in enumerate(drawn)]


def _usable_of(documents: Iterable[str], count: int) -> list[str]:
    def usable(texts: Iterable[str]) -> list[str]:
        return [t for t in texts if len(split_sentences(t)) > FEWEST_SENTENCES and len(t.split()) >= min(LENGTHS)]

    found = usable(itertools.islice(documents, DOCUMENTS))
    return found if len(found) >= count else usable(unseen_stories(DOCUMENTS))


def split_sentences(text: str) -> list[str]:
    return re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"”']))\s+(?=[\"“'A-Z])", " ".join(text.split()))


def _first_sentences(text: str, index: int) -> list[str]:
    """The first sentences, at least FEWEST_SENTENCES, up to the length of the story with this index."""
    sentences, end = split_sentences(text), FEWEST_SENTENCES
    while end < len(sentences) and len(" ".join(sentences[:end]).split()) < LENGTHS[index % len(LENGTHS)]:
        end += 1
    return sentences[:end]


def _paragraphs(name: str) -> list[str]:
    """The texts of a file in known/, which are separated by blank lines."""
    text = (Path(__file__).with_name("known") / f"{name}.txt").read_text("utf-8")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def _essay(index: int) -> str:
    """An essay; once all are used, they are repeated with another sentence first."""
    essays = _paragraphs("essays")
    sentences = split_sentences(essays[index % len(essays)])
    shift = index // len(essays) % len(sentences)
    return " ".join(sentences[shift:] + sentences[:shift])


def corpus_documents(names: Sequence[str]) -> Iterator[str]:
    """The documents from which calibration draws: of files, interleaved; of the built-in grammar, unseen stories."""
    files = [name for name in names if name not in BUILTIN]
    return open_corpus(files).mixed() if files else iter(unseen_stories(DOCUMENTS))
