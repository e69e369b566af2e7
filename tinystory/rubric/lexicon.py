"""Word statistics of a corpus: known words, names, nouns, verbs, pronouns, and where in a story words occur.

Nothing here is a parser. Each class comes from counts over a million words, and is used only in sums over a story.
"""

from array import array
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from tinystory.rubric.ngram import BOUNDARY, UNKNOWN, find, hashes
from tinystory.rubric.surface import words_of

ARTICLES = ("a", "an", "the")
POSSESSIVES = words_of("my your his her its our their this that these those some another every each")
SUBJECTS = words_of("he she they it we i you who")
PRONOUNS = (words_of("he she it they"), words_of("him her it them"), words_of("his her its their"))
FUNCTION = frozenset(
    words_of(
        "a an the my your his her its our their this that these those some another every each any all both no not "
        "he she they it we i you who him them me us himself herself and or but so because if when while then than as "
        "of to in on at by for from with into onto over under up down out off near about after before around through "
        "until is was are were be been am do did does have had has will would can could should must may might "
        "there here what where why how very too also again just only more most much many"
    )
)
VERBS = words_of("is was are were am be had has have did do does will would can could should must may might said says")
ENDINGS = ("ing", "ed", "ly", "s")
CONTEXTS = 5  # the word that introduces a thing: none, "a", "the", a possessive, "named"


class Lexicon:
    """Word list and word classes of documents, given as tokens. UNKNOWN and BOUNDARY are ids 0 and 1. `ids`, (T,), is
    the text and `spelled`, (T,), the same as indices into `spellings`; all other arrays have one row per id."""

    def __init__(self, documents: Iterable[list[str]]):
        raw: defaultdict[str, int] = defaultdict()
        raw.default_factory = raw.__len__
        spelled = array("l", [raw["<s>"]])
        for document in documents:
            spelled.extend(map(raw.__getitem__, document))
            spelled.append(0)
        self.spelled, self.spellings = np.array(spelled), list(raw)
        spelling_count = np.bincount(self.spelled)
        count: defaultdict[str, int] = defaultdict(int)
        for spelling, seen in zip(self.spellings[1:], spelling_count[1:].tolist(), strict=True):
            count[_folded(spelling)] += seen
        rare = 2 if len(self.spelled) > 200_000 else 1  # a word seen once in a large corpus is as often a slip
        words = sorted((word for word, seen in count.items() if seen >= rare), key=count.__getitem__, reverse=True)
        self.words = ["<unknown>", "<boundary>", *words]
        self.index = {word: id for id, word in enumerate(self.words)}
        folded = [BOUNDARY] + [self.index.get(_folded(spelling), UNKNOWN) for spelling in self.spellings[1:]]
        self.ids = np.array(folded)[self.spelled]
        self._classes(np.array([spelling[:1].isupper() for spelling in self.spellings])[self.spelled])

    def __len__(self) -> int:
        return len(self.words)

    def look_up(self, spelled: list[str]) -> np.ndarray:
        """(T,) token ids."""
        index = self.index
        return np.array([index.get(_folded(token), UNKNOWN) for token in spelled], dtype=np.int64)

    def members(self, words: Iterable[str]) -> np.ndarray:
        """(V,) bool: the ids of these words."""
        flags = np.zeros(len(self), bool)
        flags[[self.index[word] for word in words if word in self.index]] = True
        return flags

    def _classes(self, capital: np.ndarray) -> None:
        ids, size = self.ids, len(self)
        total = np.maximum(np.bincount(ids, minlength=size), 1)
        self.frequency = total / total.sum()
        letters = np.array([word[:1].isalpha() for word in self.words]) & (np.arange(size) > BOUNDARY)
        function = self.members(FUNCTION)
        before, after = np.roll(ids, 1), np.roll(ids, -1)

        def share(where: np.ndarray) -> np.ndarray:
            return np.bincount(ids[where], minlength=size) / total

        # A name has a capital within sentences; a verb follows he, she, they; a noun follows a determiner and is not
        # followed by another noun.
        inside = letters[before] | (before == self.index.get(",", BOUNDARY))
        middle = np.maximum(np.bincount(ids[inside], minlength=size), 1)
        capitals = np.bincount(ids[inside & capital], minlength=size) / middle
        self.may_be_capital = capitals > 0.15  # "Mom" as well as "her mom"
        self.name = (capitals > 0.7) & letters & (total > 2)
        self.name &= ~self.members(word for word in self.words if word == "i" or word.startswith("i'"))
        verb = (share(self.members(SUBJECTS)[before]) > 0.08) & letters & ~self.name & (total > 2)
        self.verb = (verb & ~function) | self.members(VERBS)
        determiner = self.members([*ARTICLES, *POSSESSIVES])
        led = determiner[before]
        closed = led & (function | self.verb | ~letters)[after]
        self.noun = (share(led) > 0.1) & (share(closed) > 0.6 * share(led)) & letters & ~function & ~self.name
        self.entity = self.noun | self.name
        self.content = letters & ~function

        # A word's pattern: itself for function words and punctuation, else its class and ending ("-ing" of a verb).
        endings = np.array([next((i for i, e in enumerate(ENDINGS) if word.endswith(e)), -1) for word in self.words])
        classes = np.select([self.name, self.noun, self.verb], [0, 1, 2], 3) * (len(ENDINGS) + 1) + endings + 1
        patterns = np.where(self.content, size + np.where(self.name, 0, classes), np.arange(size))
        self.pattern = np.unique(patterns, return_inverse=True)[1]  # UNKNOWN and BOUNDARY stay 0 and 1

        # Which of he, she, it, they comes next after a thing: (V, 4), smoothed probabilities.
        self.pronoun = np.full(size, -1)
        for words in PRONOUNS:
            for which, word in enumerate(words):
                if word in self.index:
                    self.pronoun[self.index[word]] = which
        at = np.flatnonzero(self.pronoun[ids] >= 0)
        things = np.flatnonzero(self.entity[ids])
        pronouns = np.searchsorted(at, things)
        things, pronouns = things[pronouns < len(at)], at[pronouns[pronouns < len(at)]]
        close = pronouns - things < 20
        pairs = ids[things[close]] * 4 + self.pronoun[ids[pronouns[close]]]
        self.referred = np.bincount(pairs, minlength=4 * size).reshape(size, 4).astype(float)
        usual = self.referred.sum(0) / max(self.referred.sum(), 1)
        self.referred = (self.referred + 4 * usual) / (self.referred.sum(1, keepdims=True) + 4)

        # Where in a story a pair of words occurs, shrunk towards the middle if it is rare.
        starts = np.flatnonzero(ids == BOUNDARY)
        lengths = np.diff(starts, append=len(ids))
        relative = (np.arange(len(ids)) - np.repeat(starts, lengths)) / np.repeat(lengths, lengths)
        keys, inverse, count = np.unique(hashes(ids, 2), return_inverse=True, return_counts=True)
        place = np.bincount(inverse, weights=relative[:-1] - 0.5) / (count + 20)
        self._place_keys, self._place = keys[count > 4], place[count > 4]

        # How a thing is introduced when it is new and when it is known: log p(context | word, new or known).
        self._kinds = np.zeros(size, np.int64)
        for kind, cues in enumerate((("a", "an"), ("the",), POSSESSIVES, ("named", "called")), start=1):
            self._kinds[self.members(cues)] = kind
        self._passed = self.content & ~self.name & ~self.verb
        kinds = self.contexts(ids)
        story = np.repeat(np.arange(len(starts)), lengths)
        new = np.zeros(len(ids), np.int64)
        new[np.unique(story * size + ids, return_index=True)[1]] = 1
        cells = (ids * 2 + new) * CONTEXTS + kinds
        table = np.bincount(cells, minlength=size * 2 * CONTEXTS).reshape(size, 2, CONTEXTS).astype(float)
        usual = np.stack([table[self.noun].sum(0), table[self.name].sum(0)]) + 1
        usual /= usual.sum(-1, keepdims=True)
        prior = np.where(self.name[:, None, None], usual[1], usual[0])
        table = (table + 8 * prior) / (table.sum(-1, keepdims=True) + 8)
        self.brought_in = np.log(table)

    def place(self, ids: np.ndarray) -> np.ndarray:
        """(T,) ids -> (T - 1,) where in a story each pair of tokens usually occurs: -0.5 its beginning, 0.5 its end."""
        if len(ids) < 2 or not len(self._place_keys):
            return np.zeros(max(0, len(ids) - 1))
        at, there = find(self._place_keys, hashes(ids, 2))
        return np.where(there, self._place[at], 0.0)

    def contexts(self, ids: np.ndarray) -> np.ndarray:
        """(T,) ids -> (T,) the context that introduces each token, looking back over at most two adjectives."""
        kind = np.zeros(len(ids), np.int64)
        open_ = np.ones(len(ids), bool)
        for back in (1, 2, 3):
            if back >= len(ids):
                break
            before = ids[:-back]
            found = self._kinds[before]
            kind[back:] = np.where(open_[back:] & (kind[back:] == 0), found, kind[back:])
            open_[back:] &= self._passed[before]
        return kind


def _folded(spelling: str) -> str:
    """Lower case; several end marks become the first of them: "?!" is "?"."""
    return spelling[0] if spelling[0] in ".!?" and spelling != "..." else spelling.lower()
