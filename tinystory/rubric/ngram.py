"""An interpolated n-gram model in sorted numpy arrays. Fitting a million words takes seconds, and a
lookup microseconds."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

UNKNOWN = 0  # token id of every word that is not in the vocabulary
BOUNDARY = 1  # token id that separates documents
ORDER = 5
DISCOUNT = 0.75
ODD = 0.1  # an n-gram is odd below this ratio of observed to expected count (see NgramModel.read)


def rolling_hashes(ids: ndarray, longest: int) -> Iterator[ndarray]:
    """For n = 1 to `longest`: (T - n + 1,) uint64 hashes of the n-grams in ids (T,), in the order
    of their first tokens."""
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    hashed = mixed
    yield hashed
    for i in range(1, longest):
        hashed = hashed[:-1] * np.uint64(0x9E3779B97F4A7C15) + mixed[i:]
        yield hashed


def hashes(ids: ndarray, n: int) -> ndarray:
    """(T - n + 1,) uint64 hashes of the n-grams in ids (T,), in the order of their first tokens."""
    *_, hashed = rolling_hashes(ids, n)
    return hashed


def find(table: ndarray, keys: ndarray) -> tuple[ndarray, ndarray]:
    """The index of each key in the sorted table, and whether it is present."""
    index = np.zeros(len(keys), np.int64)
    if not len(table):
        return index, np.zeros(len(keys), bool)
    order = np.argsort(keys)  # sorted keys: each search starts where the last search ended
    index[order] = np.minimum(np.searchsorted(table, keys[order]), len(table) - 1)
    return index, table[index] == keys


def lookup(table: ndarray, values: ndarray, keys: ndarray) -> ndarray:
    """float64: the row of `values` for each key in the sorted table; zeros for absent keys."""
    index, present = find(table, keys)
    out = np.zeros((len(keys), *values.shape[1:]))
    out[present] = values[index[present]]
    return out


def first_occurrences(keys: ndarray) -> ndarray:
    """(n,) bool: True at the first occurrence of each key."""
    _, first_indices = np.unique(keys, return_index=True)
    first = np.zeros(len(keys), bool)
    first[first_indices] = True
    return first


def covered(starts: ndarray, n: int, length: int) -> ndarray:
    """(length,) bool: True for the tokens of n-grams that begin where `starts` is True."""
    out = np.zeros(length, bool)
    for offset in range(n):
        out[offset : offset + len(starts)] |= starts
    return out


class NgramModel:
    """N-gram model, each order interpolated with the next shorter one by absolute discounting (Ney,
    Essen and Kneser 1994): p_n(w | h) = max(c(hw) - D, 0) / c(h) + D * types(h) / c(h) * p_{n-1}(w
    | h')."""

    def __init__(self, ids: ndarray, vocabulary: int):
        """ids: (T,) integers below `vocabulary`, documents separated by BOUNDARY."""
        counts = np.bincount(ids, minlength=vocabulary) + 0.5
        self._unigram = (counts / counts.sum()).astype(np.float32)
        self._length = len(ids)
        self._orders: list[_Order] = []
        shorter = ids
        for hashed in rolling_hashes(ids, ORDER):
            keys, first, count = _unique(hashed)
            if not self._orders:
                probability = self._unigram[ids[first]]
            else:
                lower = self._orders[-1]
                context, _ = find(lower.keys, shorter[first])  # the n-gram without the last token
                suffix, _ = find(lower.keys, shorter[first + 1])  # without the first token
                total = np.bincount(context, weights=count, minlength=len(lower.keys))
                types = np.bincount(context, minlength=len(lower.keys))
                seen = total > 0
                lower.left_over[seen] = DISCOUNT * types[seen] / total[seen]
                probability = (count - DISCOUNT) / total[context]
                probability += lower.left_over[context] * lower.probability[suffix]
            count = count.astype(np.float32)
            order = _Order(keys, count, probability.astype(np.float32), np.ones_like(count))
            self._orders.append(order)
            shorter = hashed

    def read(self, ids: ndarray) -> tuple[ndarray, ndarray]:
        """(ORDER, T) natural-log probabilities, where row n is given n tokens before, and (T,)
        bool, True where an odd n-gram ends. ids (T,): a document from its beginning. An n-gram of 2
        to 4 tokens is odd if it is rare in the corpus although its two overlapping parts are
        common: observed + 0.5 < ODD * (expected + 0.5)."""
        padded = np.concatenate([np.full(ORDER - 1, BOUNDARY), ids])
        counts = [np.full(len(padded) + 1, self._length)]  # of the n-grams in `padded`, from n = 0
        rows = []
        backed_off = self._unigram[padded]
        hashes_by_order = rolling_hashes(padded, ORDER)
        for n, (order, hashed) in enumerate(zip(self._orders, hashes_by_order, strict=True), 1):
            index, present = find(order.keys, hashed)
            counts.append(np.where(present, order.count[index], 0.0))
            probability = np.where(present, order.probability[index], backed_off)
            rows.append(probability[ORDER - n :])
            left_over = np.where(present, order.left_over[index], 1.0)
            backed_off = left_over[:-1] * probability[1:]

        odd = np.zeros(len(ids), bool)
        for n in range(2, ORDER):
            part = counts[n - 1]
            shared = counts[n - 2][1:-1]  # counts of the overlap of the n-gram's two parts
            expected = part[:-1] * part[1:] / np.maximum(shared, 1)
            is_odd = counts[n] + 0.5 < ODD * (expected + 0.5)
            odd |= is_odd[ORDER - n :]
        return np.log(np.stack(rows)), odd


@dataclass
class _Order:
    """N-grams of one length, sorted by hash. left_over: probability mass of the unseen next tokens
    of a context."""

    keys: ndarray
    count: ndarray
    probability: ndarray
    left_over: ndarray


def _unique(hashed: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Unique values, an index of each, and counts: np.unique, but several times faster, because any
    index of a value may be returned."""
    order = np.argsort(hashed)
    ranked = hashed[order]
    is_new = np.concatenate([[True], ranked[1:] != ranked[:-1]])
    starts = np.flatnonzero(is_new)
    return ranked[starts], order[starts], np.diff(starts, append=len(ranked))


class Phrases:
    """N-grams of a corpus that count as copied. n is the smallest length at which held-out stories
    share few n-grams with the corpus."""

    def __init__(self, ids: ndarray, examples: list[ndarray]):
        for n in (8, 12, 16, 24):
            self._n = n
            self._keys = np.sort(hashes(ids, n))
            if np.mean([self.copied(example) for example in examples]) < 0.3:
                break

    def copied(self, ids: ndarray) -> float:
        """Fraction of the tokens that are in n-grams of the corpus."""
        _, present = find(self._keys, hashes(ids, self._n))
        return float(covered(present, self._n, len(ids)).mean())


def sample(ids: ndarray) -> list[ndarray]:
    """A hundred texts of about a hundred ids, sampled from an unsmoothed trigram model of `ids`:
    each token is drawn from the tokens that follow the same two tokens. 0 separates documents."""
    hashed = hashes(ids[:-1], 2)
    order = np.argsort(hashed, kind="stable")
    ranked = hashed[order]
    starts = np.flatnonzero(ids[:-3] == 0)
    if not len(starts):
        return []
    rng = np.random.default_rng(0)
    texts = []
    for start in rng.choice(starts, 100):
        text = list(ids[start : start + 3])
        while len(text) < 103:
            key = hashes(np.array(text[-2:]), 2)[0]
            low = np.searchsorted(ranked, key, "left")
            high = np.searchsorted(ranked, key, "right")
            if low == high:
                break
            token = int(ids[order[rng.integers(low, high)] + 2])
            if token == 0:
                break
            text.append(token)
        texts.append(np.array(text[1:]))
    return texts
