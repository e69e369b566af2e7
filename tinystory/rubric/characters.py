"""Coreference in a story: whether names are introduced before they are used, and whether pronouns
agree with their characters.

Both are learned by counting. Known names occur in other contexts ("said Pip") than new names ("a
mouse named Pip", "his friend Pip"). The contexts of "he" and "she" are counted in the corpus, and
in a copy of the corpus with half of the pronouns flipped."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from tinystory.rubric.lexicon import Lexicon
from tinystory.rubric.ngram import BOUNDARY, first_occurrences, lookup

# Sex 0 is he, 1 is she. The forms of a pronoun are subject (0), object (1) and possessive (2);
# "her" (3) is object or possessive.
PRONOUNS = (
    {"he": 0, "him": 1, "his": 2, "himself": 1},
    {"she": 0, "her": 3, "hers": 2, "herself": 1},
)
NOUNS = (
    "boy man dad daddy papa father grandpa grandfather brother uncle king prince wizard son".split(),
    "girl woman mom mommy mama mother grandma granny grandmother sister aunt queen princess witch daughter".split(),
)
FLIPPED = {
    "he": "she",
    "him": "her",
    "his": "her",
    "himself": "herself",
    "she": "he",
    "her": "his",
    "herself": "himself",
}
STORIES = 1500  # stories from which agreement is learned
PRIOR = 4  # number of pseudo-observations from the coarser estimate
MAX_EVIDENCE = 3.0  # nats, limit of the evidence of one mention
# kinds of mentions of a character
NAME, PRONOUN, NOUN, NOBODY = range(4)
# the character with the pronoun's sex: the last one, an earlier one, none in the story
LAST, EARLIER, ABSENT = range(3)


class Mention(NamedTuple):
    """A mention of a character: the kind of mention, the character's sex, and the number of the
    sentence."""

    kind: int
    sex: int
    sentence: int


class Characters:
    def __init__(self, lexicon: Lexicon):
        size = len(lexicon)
        self._form = np.full(size, -1)
        self._sex = np.full(size, -1)
        for sex, nouns in enumerate(NOUNS):
            self._sex[lexicon.members(nouns)] = sex
        self.name = lexicon.name & (self._sex < 0)  # "Mom" needs no introduction
        for sex, forms in enumerate(PRONOUNS):
            for word, form in forms.items():
                pronoun = lexicon.members([word])
                self._form[pronoun] = form
                self._sex[pronoun] = sex
        he_or_she = np.maximum(lexicon.pronoun_given[:, :2].sum(1), 1e-9)
        she = lexicon.pronoun_given[:, 1] / he_or_she
        frequent = self.name & (np.bincount(lexicon.ids, minlength=size) >= 20)
        self._sex[frequent & (she > 0.75)] = 1
        self._sex[frequent & (she < 0.25)] = 0
        self._sentence_end = lexicon.members(".!?")
        self._relevant = self._sentence_end | self.name | (self._sex >= 0)
        self._flipped = np.arange(size)
        for word, other in FLIPPED.items():
            if other in lexicon.index:
                self._flipped[lexicon.members([word])] = lexicon.index[other]
        self._masked = np.where(self.name, size, np.arange(size))  # all names count as one word
        self._learn_introductions(lexicon.ids)
        self._learn_agreement(lexicon.ids)

    def introduction(self, ids: ndarray, start: int = 0) -> float | None:
        """Mean nats per mentioned name by which the words around the name fit its status, known or
        new; None without a name. ids: (T,) opening and story; the story begins at `start`, and only
        its names are measured."""
        at = np.flatnonzero(self.name[ids])
        in_story = at >= start
        if not in_story.any():
            return None
        log_odds = np.zeros(len(at))  # in nats, for a new name
        for side, tables in zip(self._contexts(ids, at), self._tables, strict=True):
            expected = self._prior
            for keys, (table, table_counts) in zip(side, tables, strict=True):
                counts = lookup(table, table_counts, keys)
                smoothed = counts + PRIOR * expected
                expected = smoothed / (counts.sum(1, keepdims=True) + PRIOR)
            log = np.log(expected / self._prior)
            log_odds += log[:, 1] - log[:, 0]
        new = first_occurrences(ids[at])
        evidence = np.where(new, log_odds, -log_odds)
        return float(np.clip(evidence, -MAX_EVIDENCE, MAX_EVIDENCE)[in_story].mean())

    def agreement(self, ids: ndarray, start: int = 0) -> float | None:
        """Mean nats per he or she, from `start` on, by which the text resembles the corpus more
        than the copy with flipped pronouns; None without he or she."""
        evidence = [self._agreement[case] for case in self._cases(ids, start)]
        return float(np.mean(evidence)) if evidence else None

    def flipped(self, ids: ndarray, rng: np.random.Generator) -> ndarray:
        """`ids` with a random half of he and she exchanged."""
        return np.where(rng.random(len(ids)) < 0.5, self._flipped[ids], ids)

    def renamed(self, ids: ndarray, rng: np.random.Generator) -> ndarray:
        """`ids` with a random name in place of each mention of a name."""
        names = np.flatnonzero(self.name)
        if not len(names):
            return ids
        return np.where(self.name[ids], rng.choice(names, len(ids)), ids)

    def _contexts(self, ids: ndarray, at: ndarray) -> list[list[ndarray]]:
        """Keys, (n,) int64, of the contexts before and after each of n positions: of the nearest
        token, and of the nearest two tokens."""
        padded = self._masked[np.pad(ids, 2, constant_values=BOUNDARY)]
        size = len(self._masked) + 1
        sides = []
        for step in (-1, 1):
            nearest = padded[at + 2 + step]
            sides.append([nearest, nearest * size + padded[at + 2 + 2 * step]])
        return sides

    def _learn_introductions(self, ids: ndarray) -> None:
        """Count known names (column 0) and new names (column 1) in each context."""
        at = np.flatnonzero(self.name[ids])
        story = np.cumsum(ids == BOUNDARY)[at]
        new = first_occurrences(story * len(self._masked) + ids[at])
        self._prior = (np.bincount(new, minlength=2) + 1) / (len(new) + 2)
        self._tables = []
        for side in self._contexts(ids, at):
            tables = []
            for keys in side:
                table, row = np.unique(keys, return_inverse=True)
                counts = np.bincount(2 * row + new, minlength=2 * len(table))
                tables.append((table, counts.reshape(-1, 2)))
            self._tables.append(tables)

    def _learn_agreement(self, ids: ndarray) -> None:
        rng = np.random.default_rng(0)
        counts = np.ones((2, 4, 4, 3, 3))  # of the cases in the corpus, and in the flipped copy
        boundaries = np.flatnonzero(ids == BOUNDARY)[: STORIES + 1]
        for boundary, end in pairwise(boundaries.tolist()):
            story = ids[boundary + 1 : end]
            for copy, text in enumerate((story, self.flipped(story, rng))):
                for case in self._cases(text, 0):
                    counts[copy][case] += 1
        real, flipped = np.log(counts / counts.sum(-1, keepdims=True))
        self._agreement = np.clip(real - flipped, -MAX_EVIDENCE, MAX_EVIDENCE)

    def _cases(self, ids: ndarray, start: int) -> Iterator[tuple[int, int, int, int]]:
        """A tuple for each he and she from `start` on: the form of the pronoun, the kind of the
        last mention of a character, the distance from that mention in sentences (0, 1, or 2 for
        more), and the character with the pronoun's sex (LAST, EARLIER or ABSENT)."""
        sexes: dict[int, int] = {}  # of the names in this story
        present: set[int] = set()  # sexes of the characters so far
        last = Mention(NOBODY, sex=-1, sentence=0)
        unsexed: int | None = None  # the last name, as long as its sex is unknown
        sentence = 0
        for at in np.flatnonzero(self._relevant[ids]).tolist():
            word = int(ids[at])
            if self._sentence_end[word]:
                sentence += 1
                continue

            sex = int(self._sex[word])
            if self._form[word] >= 0:
                if unsexed is not None:  # the name gets the pronoun's sex
                    sexes[unsexed] = sex
                    unsexed = None
                    present.add(sex)
                    last = Mention(NAME, sex, sentence)
                if at >= start:
                    distance = min(sentence - last.sentence, 2)
                    yield int(self._form[word]), last.kind, distance, _owner(sex, last, present)
                kind = PRONOUN
            elif self.name[word]:
                sex = sexes.get(word, sex)
                if sex < 0 and last.kind == NOUN and last.sentence == sentence:
                    sex = last.sex  # "a girl named Pip"
                if sex < 0:
                    unsexed = word
                    continue
                sexes[word] = sex
                unsexed = None
                kind = NAME
            else:
                kind = NOUN
            present.add(sex)
            last = Mention(kind, sex, sentence)


def _owner(sex: int, last: Mention, present: set[int]) -> int:
    """The character with the pronoun's sex: LAST, EARLIER or ABSENT."""
    if sex == last.sex:
        return LAST
    return EARLIER if sex in present else ABSENT
