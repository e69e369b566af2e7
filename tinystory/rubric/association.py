"""The company that words keep: which of them are told of in one story ("carrot" with "rabbit", not with "rocket")."""

import numpy as np

from tinystory.rubric.lexicon import Lexicon
from tinystory.rubric.ngram import BOUNDARY

REACH = 200  # tokens; words further apart do not keep company
WINDOW = (
    90  # tokens of a text that are looked at together: the more words, the less each pair has to do with each other
)
LEAST = 4  # different content words that a text must have to be measured


class Company:
    def __init__(self, lexicon: Lexicon):
        ids = lexicon.ids
        usable = lexicon.content & ~lexicon.name & (np.bincount(ids, minlength=len(lexicon)) >= 5)
        self._row = np.where(usable, np.cumsum(usable) - 1, -1)
        self._size = int(usable.sum())
        self._stories = np.zeros(self._size)  # that each word is in
        starts = np.flatnonzero(ids == BOUNDARY)
        pairs, self._count = [], 0
        for first, end in zip(starts + 1, np.append(starts[1:], len(ids)), strict=True):
            for piece in range(first, end, REACH):
                words = self._words(ids[piece : min(piece + REACH, end)])
                self._stories[words] += 1
                self._count += 1
                pairs.append(self._pairs(words))
        self._keys, self._together = np.unique(np.concatenate(pairs), return_counts=True)

    def fit(self, ids: np.ndarray) -> float | None:
        """Mean over all pairs of the text's words of log (1 + stories that hold both) / (1 + as many as chance would
        give): smoothed pointwise mutual information (Church and Hanks 1990). None for fewer than LEAST words."""
        pieces = [self._words(ids[at : at + WINDOW]) for at in range(0, max(len(ids) - WINDOW // 2, 1), WINDOW // 2)]
        keys = np.concatenate(
            [self._pairs(words) for words in pieces if len(words) >= LEAST] or [np.empty(0, np.int64)]
        )
        if not len(keys) or not len(self._keys):
            return None
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        together = np.where(self._keys[place] == keys, self._together[place], 0)
        chance = self._stories[keys // self._size] * self._stories[keys % self._size] / self._count
        return float(np.log((1 + together) / (1 + chance)).mean())

    def _words(self, ids: np.ndarray) -> np.ndarray:
        rows = np.unique(self._row[ids])
        return rows[rows >= 0]

    def _pairs(self, words: np.ndarray) -> np.ndarray:
        first, second = np.triu_indices(len(words), 1)
        return words[first] * self._size + words[second]
