"""Stories of known quality: real ones, corruptions of them, and texts that are no stories at
all."""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tinystory.data.builtin import grammar
from tinystory.data.corpus import BUILTIN, open_corpus

REAL, SENTENCES, WORDS = "real", "sentences shuffled", "words shuffled"
LENGTHS = (60, 90, 120, 150, 180)  # words to which stories are cut, at the end of a sentence
FEWEST_SENTENCES = 6  # with fewer, another order may be no worse
DOCUMENTS = 1500  # documents of a corpus among which stories are drawn
UNSEEN_SEED = 20_251_125  # for stories that are not in the built-in corpus

_NOUN = re.compile(
    r"\b(?:the|an?|his|her|my|their) ([a-z]{3,})(?=[.,!?;]| (?:and|was|is|in|to|of|with|that|on|had|were)\b)"
)


class KnownStory(NamedTuple):
    """The writer was given `opening`; a judge grades `story`."""

    kind: str
    opening: str
    story: str


class Pool(NamedTuple):
    """Distinct nouns, and all words, of many stories, from which replacements are drawn."""

    nouns: Sequence[str]
    words: Sequence[str]


def _reordered(parts: list[str], rng: random.Random) -> list[str]:
    """The parts in a random order that differs from the given one, if there is one."""
    out = list(parts)
    while len(set(parts)) > 1 and out == parts:
        rng.shuffle(out)
    return out


def _replaced(sentences: list[str], replace: Callable[[str], str]) -> list[str]:
    return [
        re.sub(r"[A-Za-z]+", lambda match: replace(match[0]), sentence) for sentence in sentences
    ]


# (the story's sentences, another story's sentences, pool, rng) -> sentences or words to be joined
# by spaces.
CORRUPTIONS: dict[str, Callable[[list[str], Sequence[str], Pool, random.Random], list[str]]] = {
    SENTENCES: lambda s, other, pool, rng: _reordered(s, rng),
    WORDS: lambda s, other, pool, rng: _reordered(" ".join(s).split(), rng),
    "halves of two stories": lambda s, other, pool, rng: [
        *s[: len(s) // 2],
        *other[len(other) // 2 :],
    ],
    "30 % of nouns replaced": lambda s, other, pool, rng: _replaced(
        s,
        lambda word: rng.choice(pool.nouns) if word in pool.nouns and rng.random() < 0.3 else word,
    ),
    "10 % of words replaced": lambda s, other, pool, rng: _replaced(
        s, lambda word: rng.choice(pool.words) if rng.random() < 0.1 else word
    ),
}
# (index of the story that is replaced, rng) -> a text that is no story.
NO_STORIES: dict[str, Callable[[int, random.Random], str]] = {
    "generic sentences": lambda index, rng: " ".join(
        rng.sample(split_sentences(*_paragraphs("generic")), 14)
    ),
    "essay: full marks": lambda index, rng: _essay(index),
}
KINDS = (REAL, *CORRUPTIONS, *NO_STORIES)


def known_stories(
    documents: Iterable[str], count: int, kinds: Sequence[str] = KINDS, seed: int = 0
) -> list[KnownStory]:
    """`count` stories of each kind. Those with the same index share the opening, their first
    sentence. Half of the real ones are ours while they last, the others come from `documents`. A
    corruption that changes nothing is left out."""
    usable = _usable_of(documents, count)
    ours = [
        _first_sentences(text, i) for i, text in enumerate(_paragraphs("stories")[: count // 2])
    ]
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
    """First sentences of `count` stories drawn from the first DOCUMENTS; if too few are usable,
    from the grammar."""
    drawn = random.Random(seed).sample(_usable_of(documents, count), count)
    return [_first_sentences(text, i) for i, text in enumerate(drawn)]


def _usable_of(documents: Iterable[str], count: int) -> list[str]:
    def usable(texts: Iterable[str]) -> list[str]:
        return [
            t
            for t in texts
            if len(split_sentences(t)) > FEWEST_SENTENCES and len(t.split()) >= min(LENGTHS)
        ]

    stories = usable(itertools.islice(documents, DOCUMENTS))
    return stories if len(stories) >= count else usable(unseen_stories(DOCUMENTS))


def split_sentences(text: str) -> list[str]:
    return re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"”']))\s+(?=[\"“'A-Z])", " ".join(text.split()))


def _first_sentences(text: str, index: int) -> list[str]:
    """At least FEWEST_SENTENCES sentences, until they have LENGTHS[index] words (cyclic index)."""
    sentences, end = split_sentences(text), FEWEST_SENTENCES
    while (
        end < len(sentences)
        and len(" ".join(sentences[:end]).split()) < LENGTHS[index % len(LENGTHS)]
    ):
        end += 1
    return sentences[:end]


def _paragraphs(name: str) -> list[str]:
    text = (Path(__file__).with_name("known") / f"{name}.txt").read_text("utf-8")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def _essay(index: int) -> str:
    """An essay; once all are used, they repeat, beginning with another sentence."""
    essays = _paragraphs("essays")
    sentences = split_sentences(essays[index % len(essays)])
    shift = index // len(essays) % len(sentences)
    return " ".join(sentences[shift:] + sentences[:shift])


def unseen_stories(count: int) -> list[str]:
    """Stories of the built-in grammar that are in no corpus."""
    return list(itertools.islice(grammar.stories(10**9, UNSEEN_SEED), count))


def corpus_documents(names: Sequence[str]) -> Iterator[str]:
    """The documents from which calibration draws: the files' interleaved, or unseen stories of the
    built-in grammar."""
    files = [name for name in names if name not in BUILTIN]
    return open_corpus(files).mixed() if files else iter(unseen_stories(DOCUMENTS))
