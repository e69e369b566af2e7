"""Coreference in a story: whether names are introduced before they are used, and pronouns agree
with their characters. Both are learned by counting. Known names occur in other contexts ("said
Pip") than new ones ("a mouse named Pip", "his friend Pip"). The cases of "he" and "she" are counted
in the corpus, and in a copy with half of its pronouns flipped."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tinystory.rubric.lexicon import Lexicon
from tinystory.rubric.ngram import BOUNDARY, first_occurrences, lookup

HE, SHE = range(2)
# The forms of a pronoun: subject, object, possessive (0, 1, 2); "her" (3) is either of the last
# two.
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
PRIOR = 4  # pseudo-observations from the coarser estimate
MAX_EVIDENCE = 3.0  # nats, limit for one mention
# how a character was mentioned
NAME, PRONOUN, NOUN, NOBODY = range(4)
# who has the pronoun's sex: last character, earlier one, nobody in the story
LAST, EARLIER, ABSENT = range(3)


class Case(NamedTuple):
    """A he or she in a story."""

    form: int
    mention: int  # of the last character
    distance: int  # from that mention, in sentences: 0, 1, or 2 for more
    outcome: int


class Context(NamedTuple):
    """Keys of the tokens on one side of each of n positions: (n,) int64."""

    one: np.ndarray  # the nearest token
    two: np.ndarray  # the nearest two


class Characters:
    def __init__(self, lexicon: Lexicon):
        size = len(lexicon)
        self._form = np.full(size, -1)
        self._sex = np.full(size, -1)
        for sex, forms in enumerate(PRONOUNS):
            for word, form in forms.items():
                pronoun = lexicon.members([word])
                self._form[pronoun] = form
                self._sex[pronoun] = sex
            self._sex[lexicon.members(NOUNS[sex])] = sex
        # "Mom" needs no introduction
        self.name = lexicon.name & ~lexicon.members(NOUNS[HE] + NOUNS[SHE])
        he_or_she = np.maximum(lexicon.pronoun_given[:, :2].sum(1), 1e-9)
        she = lexicon.pronoun_given[:, SHE] / he_or_she
        frequent = self.name & (np.bincount(lexicon.ids, minlength=size) >= 20)
        self._sex[frequent & (she > 0.75)] = SHE
        self._sex[frequent & (she < 0.25)] = HE
        self._sentence_end = lexicon.members(".!?")
        self._relevant = self._sentence_end | self.name | (self._sex >= 0)
        self._flipped = np.arange(size)
        for word, other in FLIPPED.items():
            if other in lexicon.index:
                self._flipped[lexicon.members([word])] = lexicon.index[other]
        self._masked = np.where(self.name, size, np.arange(size))  # all names count as one word
        self._learn_introductions(lexicon.ids)
        self._learn_agreement(lexicon.ids)

    def introduction(self, ids: np.ndarray, start: int = 0) -> float | None:
        """Mean nats per name mentioned from `start` on by which the words around it fit its status,
        known or new; None without a name. ids: (T,) opening and story, which begins at `start`."""
        at = np.flatnonzero(self.name[ids])
        in_story = at >= start
        if not in_story.any():
            return None
        before, after = self._contexts(ids, at)
        log_odds = self._before.log_odds(before) + self._after.log_odds(after)
        new = first_occurrences(ids[at])
        evidence = np.where(new, log_odds, -log_odds)
        return float(np.clip(evidence, -MAX_EVIDENCE, MAX_EVIDENCE)[in_story].mean())

    def agreement(self, ids: np.ndarray, start: int = 0) -> float | None:
        """Mean nats per he or she from `start` on by which the text resembles the corpus more than
        the flipped copy; None without he or she."""
        evidence = [self._agreement[case] for case in self._cases(ids, start)]
        return float(np.mean(evidence)) if evidence else None

    def flipped(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`ids` with half of their he and she exchanged at random."""
        return np.where(rng.random(len(ids)) < 0.5, self._flipped[ids], ids)

    def renamed(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`ids` with a random name in place of each mention of a name."""
        names = np.flatnonzero(self.name)
        if not len(names):
            return ids
        return np.where(self.name[ids], rng.choice(names, len(ids)), ids)

    def _contexts(self, ids: np.ndarray, at: np.ndarray) -> tuple[Context, Context]:
        """The tokens before each position, and those after it."""
        padded = self._masked[np.pad(ids, 2, constant_values=BOUNDARY)]
        size = len(self._masked) + 1
        before = padded[at + 1]
        after = padded[at + 3]
        two_before = before * size + padded[at]
        two_after = after * size + padded[at + 4]
        return Context(before, two_before), Context(after, two_after)

    def _learn_introductions(self, ids: np.ndarray) -> None:
        at = np.flatnonzero(self.name[ids])
        story = np.cumsum(ids == BOUNDARY)[at]
        new = first_occurrences(story * len(self._masked) + ids[at])
        before, after = self._contexts(ids, at)
        self._before = _Side(before, new)
        self._after = _Side(after, new)

    def _learn_agreement(self, ids: np.ndarray) -> None:
        rng = np.random.default_rng(0)
        real = np.ones((4, 4, 3, 3))  # as Case
        flipped = np.ones_like(real)
        boundaries = np.flatnonzero(ids == BOUNDARY)[: STORIES + 1]
        for boundary, end in pairwise(boundaries.tolist()):
            story = ids[boundary + 1 : end]
            for case in self._cases(story, 0):
                real[case] += 1
            for case in self._cases(self.flipped(story, rng), 0):
                flipped[case] += 1
        real /= real.sum(-1, keepdims=True)
        flipped /= flipped.sum(-1, keepdims=True)
        self._agreement = np.clip(np.log(real) - np.log(flipped), -MAX_EVIDENCE, MAX_EVIDENCE)

    def _cases(self, ids: np.ndarray, start: int) -> Iterator[Case]:
        """Each he and she from `start` on."""
        sexes: dict[int, int] = {}  # of names in this story
        present = [False, False]  # whether somebody of this sex was mentioned
        last = -1  # the sex of the last character
        mention = NOBODY
        sentence = 0
        last_sentence = 0  # of the last mention
        unsexed = -1  # the last name whose sex is not known yet
        for at in np.flatnonzero(self._relevant[ids]).tolist():
            word = int(ids[at])
            if self._sentence_end[word]:
                sentence += 1
                continue
            sex = int(self._sex[word])
            if self._form[word] >= 0:
                if unsexed >= 0:  # the pronoun tells it
                    sexes[unsexed] = sex
                    unsexed = -1
                    last = sex
                    present[sex] = True
                    mention = NAME
                    last_sentence = sentence
                if at >= start:
                    outcome = EARLIER if present[sex] else ABSENT
                    if sex == last:
                        outcome = LAST
                    distance = min(sentence - last_sentence, 2)
                    yield Case(int(self._form[word]), mention, distance, outcome)
                mention = PRONOUN
            elif self.name[word]:
                sex = sexes.get(word, sex)
                if sex < 0 and mention == NOUN and last_sentence == sentence:  # "a girl named Pip"
                    sex = last
                if sex < 0:
                    unsexed = word
                    continue
                sexes[word] = sex
                unsexed = -1
                mention = NAME
            else:
                mention = NOUN
            last = sex
            last_sentence = sentence
            present[sex] = True


class _Side:
    """What stands on one side of known and new names."""

    def __init__(self, context: Context, new: np.ndarray):
        self.one = _Table(context.one, new)
        self.two = _Table(context.two, new)

    def log_odds(self, context: Context) -> np.ndarray:
        """(n,) evidence in nats for a new name in a context of two tokens, backed off to one."""
        prior = self.one.prior
        coarse = self.one.probability(context.one, prior)
        log = np.log(self.two.probability(context.two, coarse) / prior)
        return log[:, 1] - log[:, 0]


class _Table:
    """Counts of known and new names in each context."""

    def __init__(self, keys: np.ndarray, new: np.ndarray):
        self.keys, inverse = np.unique(keys, return_inverse=True)
        known_counts = np.bincount(inverse, weights=~new, minlength=len(self.keys))
        new_counts = np.bincount(inverse, weights=new, minlength=len(self.keys))
        self.counts = np.stack([known_counts, new_counts], 1)
        self.prior = (self.counts.sum(0) + 1) / (len(keys) + 2)

    def probability(self, keys: np.ndarray, prior: np.ndarray) -> np.ndarray:
        """(n, 2) probabilities of known and new in each context, smoothed towards the prior."""
        counts = lookup(self.keys, self.counts, keys)
        return (counts + PRIOR * prior) / (counts.sum(1, keepdims=True) + PRIOR)
