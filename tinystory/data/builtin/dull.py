"""Dull tellers: they open as the plots do, and then no story comes of it.

Most text that a child hears, or that a BabyLM reads, is no story: talk and errands, lists, the same
thing again, a picture book that is looked at and not read. These tellers are in dull.txt: one tells
a routine, one lists what there was, one has two characters talk about nothing, one repeats a
sentence, and one looks at a picture with a child, in the child-directed speech that CHILDES
records. Each is grammatical, in the plots' own names, places and food, and more predictable than a
story. So a student of both (`--corpus builtin dull`) finds the dull continuation of an
opening the likelier one, and only a teacher can tell it which of its tellers is worth listening to.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator

from tinystory.data.builtin import grammar

TOLD = 0.85  # probability of a sentence between a teller's first and last, which are always told
STORY = "story"  # the kind of teller whose sentences are not in dull.txt


class _Teller:
    """Source: the kind, one "name = values" per fact of its own, then a sentence per line."""

    def __init__(self, source: str):
        self.kind, *lines = source.strip().split("\n")
        self.facts = {}
        self.sentences = []
        for line in lines:
            if " = " in line:
                name, values = line.split(" = ", maxsplit=1)
                self.facts[name] = [cell for (cell,) in grammar.table(values)]
            else:
                self.sentences.append(grammar.parse(line))
        self.pattern = re.compile("|".join(map(self._pattern, self.sentences)))

    def tell(self, rng: random.Random, facts: dict[str, str]) -> str:
        """What follows an opening with these facts."""
        telling = grammar.Telling(rng, 0.0)
        telling.facts.update(facts)
        for name, values in self.facts.items():
            telling.facts[name] = telling.expand(telling.pick(values))
        sentences = []
        for i, sentence in enumerate(self.sentences):
            is_end = i in (0, len(self.sentences) - 1)
            if is_end or rng.random() < TOLD:
                sentences.append(sentence)
        text = " ".join(map(telling.expand, sentences))
        return grammar.ARTICLE.sub(r"\1n ", text)

    def _pattern(self, parts: list[grammar.Part]) -> str:
        """A regular expression of a sentence, in which a fact is one word or several."""
        pattern = ""
        for kind, content in parts:
            if kind == "text":
                pattern += re.escape(content)
            elif kind == "fact" and content not in self.facts:
                pattern += r"[\w' ]+"
            else:
                options = self.facts[content] if kind == "fact" else content
                patterns = "|".join(map(self._pattern, options))
                pattern += f"(?:{patterns})"
        return pattern


_TELLERS = [_Teller(source) for source in grammar.source("dull").split("\n== ")[1:]]
KINDS = (STORY, *(teller.kind for teller in _TELLERS))


def documents(words: int, seed: int) -> Iterator[str]:
    """Dull documents, until they have at least `words` whitespace-separated words. Same seed, same
    bytes."""
    rng = random.Random(f"dull {seed}")
    while words > 0:
        story, facts = grammar.tell(rng)
        teller = _TELLERS[int(rng.random() * len(_TELLERS))]
        opening = grammar.opening(story, facts)
        if opening.count('"') % 2 == 0:  # nobody is still speaking
            document = f"{opening} {teller.tell(rng, facts)}"
            words -= len(document.split())
            yield document


def kind_of(story: str) -> str:
    """Which of KINDS tells a story that goes on from its opening: the one with the most of its
    sentences, a dull one only if it has more than the story has of its own."""
    kinds = Counter(map(_kind_of_sentence, grammar.segments(story)))
    return max(KINDS, key=kinds.__getitem__)


def _kind_of_sentence(sentence: str) -> str:
    for teller in _TELLERS:
        if teller.pattern.fullmatch(sentence):
            return teller.kind
    return STORY
