"""Word statistics of a corpus: known words, names, nouns, verbs, pronouns, and where in a story
words occur. There is no parser: classes come from counts over a million words, and are used only in
sums over a story."""

from array import array
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from tinystory.rubric.ngram import BOUNDARY, UNKNOWN, first_occurrences, hashes, lookup

ARTICLES = ("a", "an", "the")
POSSESSIVES = "my your his her its our their this that these those some another every each".split()
SUBJECTS = "he she they it we i you who".split()
PRONOUNS = ("he she it they".split(), "him her it them".split(), "his her its their".split())
FUNCTION = frozenset(
    (
        "a an the my your his her its our their this that these those some another every each any all both no not "
        "he she they it we i you who him them me us himself herself and or but so because if when while then than as "
        "of to in on at by for from with into onto over under up down out off near about after before around through "
        "until is was are were be been am do did does have had has will would can could should must may might "
        "there here what where why how very too also again just only more most much many"
    ).split()
)
VERBS = "is was are were am be had has have did do does will would can could should must may might said says".split()
ENDINGS = ("ing", "ed", "ly", "s")
# kinds 1 to 4; 0: no such word
INTRODUCTIONS = (("a", "an"), ("the",), POSSESSIVES, ("named", "called"))


class Lexicon:
    """Vocabulary and word classes of tokenized documents. Ids 0 and 1 are UNKNOWN and BOUNDARY.
    `ids` (T,) is the text, `spelling_ids` (T,) the same as indices into `spellings`; all other
    arrays have one row per id."""

    def __init__(self, documents: Iterable[list[str]]):
        vocabulary: defaultdict[str, int] = defaultdict()
        vocabulary.default_factory = vocabulary.__len__
        stream = array("l", [vocabulary["<s>"]])
        for document in documents:
            stream.extend(map(vocabulary.__getitem__, document))
            stream.append(0)
        self.spelling_ids, self.spellings = np.array(stream), list(vocabulary)
        total: defaultdict[str, int] = defaultdict(int)
        for spelling, count in zip(
            self.spellings[1:], np.bincount(self.spelling_ids)[1:].tolist(), strict=True
        ):
            total[_folded(spelling)] += count
        # words seen once in a large corpus are often typos
        least = 2 if len(stream) > 200_000 else 1
        words = sorted(
            (word for word, count in total.items() if count >= least),
            key=total.__getitem__,
            reverse=True,
        )
        self.words = ["<unknown>", "<boundary>", *words]
        self.index = {word: id for id, word in enumerate(self.words)}
        self.ids = np.array([BOUNDARY, *self.look_up(self.spellings[1:])])[self.spelling_ids]
        self._learn_classes(
            np.array([spelling[:1].isupper() for spelling in self.spellings])[self.spelling_ids]
        )
        self._learn_pronouns()
        self._learn_places_and_introductions()

    def __len__(self) -> int:
        return len(self.words)

    def look_up(self, tokens: list[str]) -> np.ndarray:
        """(T,) token ids."""
        return np.array(
            [self.index.get(_folded(token), UNKNOWN) for token in tokens], dtype=np.int64
        )

    def members(self, words: Iterable[str]) -> np.ndarray:
        """(V,) bool, True for the ids of these words."""
        flags = np.zeros(len(self), bool)
        flags[[self.index[word] for word in words if word in self.index]] = True
        return flags

    def _learn_classes(self, capital: np.ndarray) -> None:
        """capital: (T,) bool, whether the token is spelled with a capital."""
        ids, size = self.ids, len(self)
        total = np.maximum(np.bincount(ids, minlength=size), 1)
        self.frequency = total / total.sum()
        letters = np.array([word[:1].isalpha() for word in self.words]) & (
            np.arange(size) > BOUNDARY
        )
        function = self.members(FUNCTION)
        before, after = np.roll(ids, 1), np.roll(ids, -1)

        def fraction(where: np.ndarray) -> np.ndarray:
            return np.bincount(ids[where], minlength=size) / total

        # A name has a capital within sentences; a verb follows he, she, they; a noun follows a
        # determiner and is not followed by another noun.
        inside = letters[before] | (before == self.index.get(",", BOUNDARY))
        middle = np.maximum(np.bincount(ids[inside], minlength=size), 1)
        capitals = np.bincount(ids[inside & capital], minlength=size) / middle
        self.may_be_capital = capitals > 0.15  # "Mom" as well as "her mom"
        self.name = (capitals > 0.7) & letters & (total > 2)
        self.name &= ~self.members(
            word for word in self.words if word == "i" or word.startswith("i'")
        )
        verb = (
            (fraction(self.members(SUBJECTS)[before]) > 0.08) & letters & ~self.name & (total > 2)
        )
        self.verb = (verb & ~function) | self.members(VERBS)
        determined = self.members([*ARTICLES, *POSSESSIVES])[before]
        # ends its noun phrase
        last = fraction(determined & (function | self.verb | ~letters)[after])
        determined = fraction(determined)
        self.noun = (
            (determined > 0.1) & (last > 0.6 * determined) & letters & ~function & ~self.name
        )
        self.entity = self.noun | self.name
        self.content = letters & ~function

        # A word's pattern: itself for function words and punctuation, else its class and ending
        # ("-ing" of a verb).
        endings = np.array(
            [
                next((i for i, e in enumerate(ENDINGS) if word.endswith(e)), -1)
                for word in self.words
            ]
        )
        classes = (
            np.select([self.name, self.noun, self.verb], [0, 1, 2], 3) * (len(ENDINGS) + 1)
            + endings
            + 1
        )
        patterns = np.where(self.content, size + np.where(self.name, 0, classes), np.arange(size))
        # UNKNOWN and BOUNDARY stay 0 and 1
        self.pattern = np.unique(patterns, return_inverse=True)[1]

    def _learn_pronouns(self) -> None:
        """pronoun: (V,) 0..3 for he, she, it, they, else -1. pronoun_given: (V, 4) p(next pronoun |
        noun or name)."""
        ids, size = self.ids, len(self)
        self.pronoun = np.full(size, -1)
        for forms in PRONOUNS:
            for which, word in enumerate(forms):
                self.pronoun[self.members([word])] = which
        pronouns = np.flatnonzero(self.pronoun[ids] >= 0)
        entities = np.flatnonzero(self.entity[ids])
        following = np.append(pronouns, len(ids) + 20)[np.searchsorted(pronouns, entities)]
        close = following - entities < 20
        pairs = ids[entities[close]] * 4 + self.pronoun[ids[following[close]]]
        counts = np.bincount(pairs, minlength=4 * size).reshape(size, 4).astype(float)
        prior = counts.sum(0) / max(counts.sum(), 1)
        self.pronoun_given = (counts + 4 * prior) / (counts.sum(1, keepdims=True) + 4)

    def _learn_places_and_introductions(self) -> None:
        """Mean place of each word pair in a story, shrunk towards the middle if rare. introduction:
        (V, 2, 5), log p(kind of introduction | word, known or new)."""
        ids, size = self.ids, len(self)
        starts = np.flatnonzero(ids == BOUNDARY)
        lengths = np.diff(starts, append=len(ids))
        relative = (np.arange(len(ids)) - np.repeat(starts, lengths)) / np.repeat(lengths, lengths)
        keys, inverse, count = np.unique(hashes(ids, 2), return_inverse=True, return_counts=True)
        place = np.bincount(inverse, weights=relative[:-1] - 0.5) / (count + 20)
        self._place_keys, self._place = keys[count > 4], place[count > 4]

        self._kind = np.zeros(size, np.int64)
        for kind, words in enumerate(INTRODUCTIONS, start=1):
            self._kind[self.members(words)] = kind
        self._adjective = self.content & ~self.name & ~self.verb
        new = first_occurrences(np.repeat(np.arange(len(starts)), lengths) * size + ids)
        shape = (size, 2, len(INTRODUCTIONS) + 1)
        cells = np.ravel_multi_index((ids, new.astype(int), self.introductions(ids)), shape)
        counts = np.bincount(cells, minlength=np.prod(shape)).reshape(shape).astype(float)
        usual = np.stack([counts[self.noun].sum(0), counts[self.name].sum(0)]) + 1
        usual /= usual.sum(-1, keepdims=True)
        prior = np.where(self.name[:, None, None], usual[1], usual[0])
        self.introduction = np.log((counts + 8 * prior) / (counts.sum(-1, keepdims=True) + 8))

    def place(self, ids: np.ndarray) -> np.ndarray:
        """(T,) ids -> (T - 1,) usual place of each pair of tokens in a story, -0.5 (beginning) to
        0.5 (end)."""
        return lookup(self._place_keys, self._place, hashes(ids, 2))

    def introductions(self, ids: np.ndarray) -> np.ndarray:
        """(T,) ids -> (T,) the kind of word that introduces each token, looking back over at most
        two adjectives."""
        kind = np.zeros(len(ids), np.int64)
        adjectives = np.ones(len(ids), bool)  # whether only adjectives stand between the two
        for back in (1, 2, 3):
            before = ids[:-back]
            kind[back:] = np.where(
                adjectives[back:] & (kind[back:] == 0), self._kind[before], kind[back:]
            )
            adjectives[back:] &= self._adjective[before]
        return kind


def _folded(spelling: str) -> str:
    """Lower case; repeated end marks become the first: "?!" is "?"."""
    return spelling[0] if spelling[0] in ".!?" and spelling != "..." else spelling.lower()
