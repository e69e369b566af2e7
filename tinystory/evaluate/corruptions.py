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

_NUMBERS = "One Two Three Four Five Six Seven Eight Nine Ten Eleven Twelve".split()
_SWAPS = dict(he="she", she="he", his="her", her="his", him="her", himself="herself", herself="himself")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}")  # capitalised within a sentence
_NOUN = re.compile(
    r"\b(?:the|an?|his|her|my|their) ([a-z]{3,})(?=[.,!?;]| (?:and|was|is|in|to|of|with|that|on|had|were)\b)"
)


class KnownStory(NamedTuple):
    """A story of known quality. The writer was given `opening`; the judge is to grade `story`."""

    kind: str
    opening: str
    story: str


class Source(NamedTuple):
    """What corruptions draw from: the sentences of another story; names, nouns and words of all stories."""

    other: Sequence[str]
    names: Sequence[str]
    nouns: Sequence[str]
    words: Sequence[str]


def _alien_sentence(sentences: list[str], source: Source, rng: random.Random) -> list[str]:
    at = rng.randrange(1, len(sentences) - 1)
    return [*sentences[:at], source.other[len(source.other) // 2], *sentences[at + 1 :]]


def _dropped(sentences: list[str], rng: random.Random) -> list[str]:
    rows = rng.sample(range(len(sentences)), max(round(0.6 * len(sentences)), 1))
    return [sentences[row] for row in sorted(rows)]


def _new_nouns(sentences: list[str], source: Source, rng: random.Random) -> list[str]:
    nouns = set(source.nouns)
    return _replaced(sentences, lambda word: rng.choice(source.nouns) if word in nouns and rng.random() < 0.3 else word)


def _new_words(sentences: list[str], source: Source, rng: random.Random) -> list[str]:
    return _replaced(sentences, lambda word: rng.choice(source.words) if rng.random() < 0.1 else word)


def _new_names(sentences: list[str], source: Source, rng: random.Random) -> list[str]:
    known = set(names(" ".join(sentences)))
    return _replaced(sentences, lambda word: rng.choice(source.names) if word in known else word)


def _flipped(sentences: list[str], source: Source, rng: random.Random) -> list[str]:
    def flip(word: str) -> str:
        other = _SWAPS.get(word.lower())
        if other is None or rng.random() < 0.5:
            return word
        return other.capitalize() if word[0].isupper() else other

    return _replaced(sentences, flip)


def _replaced(sentences: list[str], replace: Callable[[str], str]) -> list[str]:
    return [re.sub(r"[A-Za-z]+", lambda match: replace(match[0]), sentence) for sentence in sentences]


def _reordered(parts: list[str], rng: random.Random) -> list[str]:
    """The parts in another order, at random, if there is one."""
    out = list(parts)
    while len(set(parts)) > 1 and out == parts:
        rng.shuffle(out)
    return out


def _rhyme(rng: random.Random) -> str:
    animals, place = rng.choice("ducks mice frogs hens bees cats".split()), rng.choice("wall log hill roof".split())
    return " ".join(f"{number} little {animals} sat on the {place}." for number in _NUMBERS)


# Of a story's sentences s; each gives sentences or words, to be joined by spaces.
CORRUPTIONS: dict[str, Callable[[list[str], Source, random.Random], list[str]]] = {
    SENTENCES: lambda s, source, rng: _reordered(s, rng),
    WORDS: lambda s, source, rng: _reordered(" ".join(s).split(), rng),
    "halves of two stories": lambda s, source, rng: [*s[: len(s) // 2], *source.other[len(source.other) // 2 :]],
    "alien sentence": _alien_sentence,
    "alien ending": lambda s, source, rng: [*s[:-2], *source.other[-2:]],
    "40 % of sentences dropped": lambda s, source, rng: _dropped(s, rng),
    "cut in the middle": lambda s, source, rng: " ".join(s).split()[: len(" ".join(s).split()) // 2],
    "30 % of nouns replaced": _new_nouns,
    "10 % of words replaced": _new_words,
    "names replaced": _new_names,
    "he and she flipped": _flipped,
}
# Texts that are no stories. index: of the story in whose place they stand.
NO_STORIES: dict[str, Callable[[list[str], int, random.Random], str]] = {
    "one word repeated": lambda s, index, rng: " ".join([rng.choice(" ".join(s).split())] * len(" ".join(s).split())),
    "one sentence repeated": lambda s, index, rng: " ".join([rng.choice(s)] * len(s)),
    "generic sentences": lambda s, index, rng: " ".join(rng.sample(split_sentences(*_paragraphs("generic")), 14)),
    "counting rhyme": lambda s, index, rng: _rhyme(rng),
    "another language": lambda s, index, rng: _nth("other_languages", index),
    "essay: full marks": lambda s, index, rng: _nth("essays", index),
}
KINDS = (REAL, *CORRUPTIONS, *NO_STORIES)


def known_stories(
    documents: Iterable[str], count: int, kinds: Sequence[str] = KINDS, seed: int = 0
) -> list[KnownStory]:
    """`count` stories of each kind; those of one index have one opening, the first sentence. A corruption that changes
    nothing, as of names where there are none, is left out. Half of the real ones are ours while they last, the others
    are a corpus's (see real_stories)."""
    usable = _usable_of(documents, count)
    ours = [_first_sentences(text, LENGTHS[i % len(LENGTHS)]) for i, text in enumerate(_paragraphs("stories"))]
    texts = [*ours[: count // 2], *real_stories(usable, count - len(ours[: count // 2]), seed)]
    pool = " ".join(usable[:300])
    all_names, nouns, words = names(pool), sorted(set(_NOUN.findall(pool))), re.findall(r"[a-z]+", pool)
    stories = []
    for i, (opening, *sentences) in enumerate(texts):
        source = Source(texts[(i + len(texts) // 2) % len(texts)][1:], all_names, nouns, words)
        for kind in kinds:
            draw = random.Random(f"{seed} {kind} {i}")  # the same text whatever the other kinds are
            if kind in CORRUPTIONS:
                story = " ".join(CORRUPTIONS[kind](sentences, source, draw))
                if story == " ".join(sentences):
                    continue
            else:
                story = NO_STORIES[kind](sentences, i, draw) if kind in NO_STORIES else " ".join(sentences)
            stories.append(KnownStory(kind, opening, story))
    return stories


def real_stories(documents: Iterable[str], count: int, seed: int = 0) -> list[list[str]]:
    """The first sentences of `count` stories, drawn from the first documents of a corpus, or from the built-in grammar
    if too few of those have several sentences."""
    drawn = random.Random(seed).sample(_usable_of(documents, count), count)
    return [_first_sentences(text, LENGTHS[i % len(LENGTHS)]) for i, text in enumerate(drawn)]


def _usable_of(documents: Iterable[str], count: int) -> list[str]:
    usable = [text for text in itertools.islice(documents, DOCUMENTS) if _usable(text)]
    return usable if len(usable) >= count else [text for text in unseen_stories(DOCUMENTS) if _usable(text)]


def split_sentences(text: str) -> list[str]:
    return re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"”']))\s+(?=[\"“'A-Z])", " ".join(text.split()))


def names(text: str) -> list[str]:
    """The distinct names of a text, in order of appearance: its words that are capitalised within a sentence."""
    return list(dict.fromkeys(_NAME.findall(text)))


def _first_sentences(text: str, words: int) -> list[str]:
    """The first sentences that have at least so many words together, and no fewer than FEWEST_SENTENCES."""
    sentences = split_sentences(text)
    end = FEWEST_SENTENCES
    while end < len(sentences) and len(" ".join(sentences[:end]).split()) < words:
        end += 1
    return sentences[:end]


def _usable(text: str) -> bool:
    return len(split_sentences(text)) > FEWEST_SENTENCES and len(text.split()) >= min(LENGTHS)


def _paragraphs(name: str) -> list[str]:
    """The texts of a file in known/, which are separated by blank lines."""
    text = (Path(__file__).with_name("known") / f"{name}.txt").read_text("utf-8")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def _nth(name: str, index: int) -> str:
    """The text of this index in a file; once all are used, they are repeated with another sentence first."""
    paragraphs = _paragraphs(name)
    sentences = split_sentences(paragraphs[index % len(paragraphs)])
    shift = index // len(paragraphs) % len(sentences)
    return " ".join(sentences[shift:] + sentences[:shift])


def corpus_documents(names: Sequence[str]) -> Iterator[str]:
    """The documents from which calibration draws: of a named corpus, interleaved; of the built-in grammar, stories that
    are in no corpus."""
    files = [name for name in names if name not in BUILTIN]
    return open_corpus(files).mixed() if files else iter(unseen_stories(DOCUMENTS))
