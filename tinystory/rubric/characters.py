"""Coreference in a story: whether names are introduced before they are used, and pronouns agree
with their characters. Both are learned by counting. Known names occur in other contexts ("said
Pip") than new ones ("a mouse named Pip", "his friend Pip"). The cases of "he" and "she" are counted
in the corpus, and in a copy with half of its pronouns flipped."""

from collections.abc import Iterator

import numpy as np

from tinystory.rubric.lexicon import Lexicon
from tinystory.rubric.ngram import BOUNDARY, first_occurrences, lookup

HE, SHE = 0, 1
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
FLIPPED = {"he": "she", "him": "her", "his": "her", "himself": "herself"}
FLIPPED |= {"she": "he", "her": "his", "herself": "himself"}
STORIES = 1500  # stories from which agreement is learned
PRIOR = 4  # pseudo-observations from the coarser estimate
MAX_EVIDENCE = 3.0  # nats, limit for one mention
# The case of a pronoun: its form, how the last character was mentioned, and how many sentences ago
# (0, 1, more).
NAME, PRONOUN, NOUN, NOBODY = range(4)
# who has the pronoun's sex: last character, earlier one, nobody in the story
LAST, EARLIER, ABSENT = range(3)


class Characters:
    def __init__(self, lexicon: Lexicon):
        size = len(lexicon)
        self._form, self._sex = np.full(size, -1), np.full(size, -1)
        for sex, forms in enumerate(PRONOUNS):
            for word in forms.keys() & lexicon.index.keys():
                self._form[lexicon.index[word]], self._sex[lexicon.index[word]] = forms[word], sex
            self._sex[lexicon.members(NOUNS[sex])] = sex
        # "Mom" needs no introduction
        self.name = lexicon.name & ~lexicon.members([*NOUNS[HE], *NOUNS[SHE]])
        she = lexicon.pronoun_given[:, 1] / np.maximum(lexicon.pronoun_given[:, :2].sum(1), 1e-9)
        common = self.name & (np.bincount(lexicon.ids, minlength=size) >= 20)
        self._sex[common & (she > 0.75)], self._sex[common & (she < 0.25)] = SHE, HE
        self._sentence_end = lexicon.members(".!?")
        self._relevant = self._sentence_end | self.name | (self._sex >= 0)
        self._flipped = np.arange(size)
        for word in FLIPPED.keys() & lexicon.index.keys():
            self._flipped[lexicon.index[word]] = lexicon.index.get(
                FLIPPED[word], lexicon.index[word]
            )
        self._masked = np.where(self.name, size, np.arange(size))  # all names count as one word
        self._learn_introductions(lexicon.ids, size)
        self._learn_agreement(lexicon.ids)

    def introduction(self, ids: np.ndarray, start: int = 0) -> float | None:
        """Mean nats per name mentioned from `start` on by which the words around it fit its status,
        known or new; None without a name. ids: (T,) opening and story, which begins at `start`."""
        at = np.flatnonzero(self.name[ids])
        if not (at >= start).any():
            return None
        new = first_occurrences(ids[at])
        sides = zip(self._tables, self._contexts(ids, at), strict=True)
        log_odds = sum(_log_odds(*tables, *keys) for tables, keys in sides)
        evidence = np.where(new, log_odds, -log_odds)
        return float(np.clip(evidence, -MAX_EVIDENCE, MAX_EVIDENCE)[at >= start].mean())

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
        return np.where(self.name[ids], rng.choice(names, len(ids)), ids) if len(names) else ids

    def _contexts(self, ids: np.ndarray, at: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Keys of the one token and of the two tokens before each position; the same for those
        after it."""
        padded = self._masked[np.pad(ids, 2, constant_values=BOUNDARY)]
        size = len(self._masked) + 1
        before, after = padded[at + 1], padded[at + 3]
        return [(before, before * size + padded[at]), (after, after * size + padded[at + 4])]

    def _learn_introductions(self, ids: np.ndarray, size: int) -> None:
        at = np.flatnonzero(self.name[ids])
        new = first_occurrences(np.cumsum(ids == BOUNDARY)[at] * size + ids[at])
        self._tables = [
            (_Table(one, new), _Table(two, new)) for one, two in self._contexts(ids, at)
        ]

    def _learn_agreement(self, ids: np.ndarray) -> None:
        rng = np.random.default_rng(0)
        starts = np.flatnonzero(ids == BOUNDARY)[: STORIES + 1]
        counts = np.ones((2, 4, 4, 3, 3))  # real or flipped; form, last mention, distance; outcome
        for first, end in zip(starts[:-1] + 1, starts[1:], strict=True):
            for version, story in enumerate((ids[first:end], self.flipped(ids[first:end], rng))):
                for case in self._cases(story, 0):
                    cell = version, *case
                    counts[cell] += 1
        real, flipped = np.log(counts / counts.sum(-1, keepdims=True))
        self._agreement = np.clip(real - flipped, -MAX_EVIDENCE, MAX_EVIDENCE)

    def _cases(self, ids: np.ndarray, start: int) -> Iterator[tuple[int, int, int, int]]:
        """(form, mention of the last character, its distance in sentences, outcome) of he and she
        from `start` on."""
        sexes: dict[int, int] = {}  # of names in this story
        present = [False, False]
        last, mention, sentence, last_sentence = -1, NOBODY, 0, 0
        unsexed = -1  # the last name whose sex is not known yet
        for at in np.flatnonzero(self._relevant[ids]).tolist():
            word = int(ids[at])
            if self._sentence_end[word]:
                sentence += 1
                continue
            sex = int(self._sex[word])
            if self._form[word] >= 0:
                if unsexed >= 0:
                    sexes[unsexed], unsexed = sex, -1
                    last, mention, last_sentence, present[sex] = sex, NAME, sentence, True
                if at >= start:
                    outcome = LAST if sex == last else EARLIER if present[sex] else ABSENT
                    yield int(self._form[word]), mention, min(sentence - last_sentence, 2), outcome
                mention = PRONOUN
            elif self.name[word]:
                sex = sexes.get(word, sex)
                if sex < 0 and mention == NOUN and last_sentence == sentence:  # "a girl named Pip"
                    sex = last
                if sex < 0:
                    unsexed = word
                    continue
                sexes[word], unsexed, mention = sex, -1, NAME
            else:
                mention = NOUN
            last, last_sentence, present[sex] = sex, sentence, True


class _Table:
    """Counts of known and new names in each context."""

    def __init__(self, keys: np.ndarray, new: np.ndarray):
        self.keys, inverse = np.unique(keys, return_inverse=True)
        counts = [
            np.bincount(inverse, weights=status, minlength=len(self.keys)) for status in (~new, new)
        ]
        self.counts = np.stack(counts, 1)
        self.prior = (self.counts.sum(0) + 1) / (len(keys) + 2)

    def probability(self, keys: np.ndarray, prior: np.ndarray) -> np.ndarray:
        """(n, 2) probabilities of known and new in each context, smoothed towards the prior."""
        counts = lookup(self.keys, self.counts, keys)
        return (counts + PRIOR * prior) / (counts.sum(1, keepdims=True) + PRIOR)


def _log_odds(one: _Table, two: _Table, one_keys: np.ndarray, two_keys: np.ndarray) -> np.ndarray:
    """(n,) evidence in nats for a new name in a context of two tokens, backed off to one."""
    log = np.log(two.probability(two_keys, one.probability(one_keys, one.prior)) / one.prior)
    return log[:, 1] - log[:, 0]
