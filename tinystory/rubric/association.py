"""Word association: how often content words occur in the same story ("carrot" with "rabbit", but
not with "rocket")."""

import functools
from itertools import pairwise

import numpy as np
from numpy import ndarray

from tinystory.rubric.lexicon import Lexicon
from tinystory.rubric.ngram import BOUNDARY, lookup

CORPUS_WINDOW = 200  # tokens; words further apart are not counted as a pair
WINDOW = 90  # tokens of a text in which words are paired; pairs in longer windows are less related
FEWEST_WORDS = 4  # minimum number of distinct content words in a measured text

_triu_indices = functools.cache(np.triu_indices)


class WordAssociation:
    """Counts of corpus windows for each pair of content words."""

    def __init__(self, lexicon: Lexicon):
        ids = lexicon.ids
        frequent = np.bincount(ids, minlength=len(lexicon)) >= 5
        counted = lexicon.content & ~lexicon.name & frequent
        self._row = np.where(counted, np.cumsum(counted) - 1, -1)
        self._size = int(counted.sum())
        self._word_counts = np.zeros(self._size)
        self._windows = 0
        pairs = []
        document_bounds = np.append(np.flatnonzero(ids == BOUNDARY), len(ids))
        for boundary, end in pairwise(document_bounds.tolist()):
            for start in range(boundary + 1, end, CORPUS_WINDOW):
                words = self._words(ids[start : min(start + CORPUS_WINDOW, end)])
                self._word_counts[words] += 1
                self._windows += 1
                pairs.append(self._pairs(words))
        self._keys, self._pair_counts = np.unique(np.concatenate(pairs), return_counts=True)

    def mean(self, ids: ndarray) -> float | None:
        """Smoothed pointwise mutual information (Church and Hanks 1990), averaged over pairs of the
        text's words: log (1 + windows with both) / (1 + expected windows with both). None for fewer
        than FEWEST_WORDS words."""
        pairs = []
        step = WINDOW // 2
        for start in range(0, max(len(ids) - step, 1), step):
            words = self._words(ids[start : start + WINDOW])
            if len(words) >= FEWEST_WORDS:
                pairs.append(self._pairs(words))
        if not pairs or not len(self._keys):
            return None
        keys = np.concatenate(pairs)
        observed = lookup(self._keys, self._pair_counts, keys)
        first, second = np.divmod(keys, self._size)
        expected = self._word_counts[first] * self._word_counts[second] / self._windows
        return float(np.log((1 + observed) / (1 + expected)).mean())

    def _words(self, ids: ndarray) -> ndarray:
        rows = np.unique(self._row[ids])
        return rows[rows >= 0]

    def _pairs(self, words: ndarray) -> ndarray:
        first, second = _triu_indices(len(words), 1)
        return words[first] * self._size + words[second]
