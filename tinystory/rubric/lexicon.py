"""Word statistics of a corpus: known words, names, nouns, verbs, pronouns, and the positions in a
story at which words occur. There is no parser: word classes come from counts over a million words,
and are used only in sums over a story."""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
from numpy import ndarray

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
NEAR = 20  # tokens between a noun or name and a pronoun that may refer to it


class Lexicon:
    """Vocabulary and word classes of tokenized documents. Ids 0 and 1 are UNKNOWN and BOUNDARY.
    `ids` (T,) is the text; `spelling_ids` (T,) is the text as indices into `spellings`; all other
    arrays have one row per id."""

    def __init__(self, documents: Iterable[list[str]]):
        vocabulary: defaultdict[str, int] = defaultdict()
        vocabulary.default_factory = vocabulary.__len__
        stream = array("l", [vocabulary["<s>"]])
        for document in documents:
            stream.extend(map(vocabulary.__getitem__, document))
            stream.append(0)
        self.spelling_ids = np.array(stream)
        self.spellings = list(vocabulary)

        total: Counter[str] = Counter()
        counts = np.bincount(self.spelling_ids).tolist()
        for spelling, count in zip(self.spellings[1:], counts[1:], strict=True):
            total[_folded(spelling)] += count
        # words seen once in a large corpus are often typos
        least = 2 if len(stream) > 200_000 else 1
        self.words = ["<unknown>", "<boundary>"]
        self.words += [word for word, count in total.most_common() if count >= least]
        self.index = {word: id for id, word in enumerate(self.words)}
        id_of_spelling = self.look_up(self.spellings)
        id_of_spelling[0] = BOUNDARY
        self.ids = id_of_spelling[self.spelling_ids]

        is_capital = np.array([spelling[:1].isupper() for spelling in self.spellings])
        self._learn_classes(is_capital[self.spelling_ids])
        self._learn_patterns()
        self._learn_pronouns()
        self._learn_positions()
        self._learn_introductions()

    def __len__(self) -> int:
        return len(self.words)

    def look_up(self, tokens: list[str]) -> ndarray:
        """(T,) token ids."""
        ids = [self.index.get(_folded(token), UNKNOWN) for token in tokens]
        return np.array(ids, dtype=np.int64)

    def members(self, words: Iterable[str]) -> ndarray:
        """(V,) bool, True for the ids of `words`."""
        flags = np.zeros(len(self), bool)
        flags[[self.index[word] for word in words if word in self.index]] = True
        return flags

    def _learn_classes(self, capital: ndarray) -> None:
        """Learn names, nouns, verbs and other classes by counting. capital: (T,) bool, whether the
        token is spelled with a capital."""
        ids = self.ids
        size = len(self)
        total = np.maximum(np.bincount(ids, minlength=size), 1)
        self.frequency = total / total.sum()
        is_word = np.array([word[:1].isalpha() for word in self.words])
        function = self.members(FUNCTION)
        self.content = is_word & ~function
        before = np.roll(ids, 1)
        after = np.roll(ids, -1)

        def fraction(where: ndarray) -> ndarray:
            """(V,) fraction of each word's tokens at which `where` is True."""
            return np.bincount(ids[where], minlength=size) / total

        # A name has a capital within sentences.
        inside = is_word[before] | (before == self.index.get(",", BOUNDARY))
        count_inside = np.maximum(np.bincount(ids[inside], minlength=size), 1)
        capitals = np.bincount(ids[inside & capital], minlength=size) / count_inside
        self.may_be_capital = capitals > 0.15  # "Mom" as well as "her mom"
        first_person = self.members(word for word in self.words if word.split("'")[0] == "i")
        self.name = (capitals > 0.7) & is_word & (total > 2) & ~first_person

        # A verb follows he, she, they.
        after_subject = fraction(self.members(SUBJECTS)[before])
        verb = (after_subject > 0.08) & self.content & ~self.name & (total > 2)
        self.verb = verb | self.members(VERBS)

        # A noun follows a determiner and is not followed by another noun.
        determiner = self.members(ARTICLES) | self.members(POSSESSIVES)
        determined = determiner[before]
        ends_phrase = (function | self.verb | ~is_word)[after]
        after_determiner = fraction(determined)
        last_of_phrase = fraction(determined & ends_phrase)
        noun = (after_determiner > 0.1) & (last_of_phrase > 0.6 * after_determiner)
        self.noun = noun & self.content & ~self.name
        self.entity = self.noun | self.name

    def _learn_patterns(self) -> None:
        """Set pattern: (V,) id of each word in sentence patterns. Function words and punctuation
        stay themselves, all names have the same id, and other words have an id by class and ending
        ("-ing" of a verb)."""
        word_class = np.select([self.name, self.noun, self.verb], [0, 1, 2], 3)
        endings = np.array([_ending(word) for word in self.words])
        endings[self.name] = 0
        inflected = len(self) + word_class * (len(ENDINGS) + 1) + endings
        patterns = np.where(self.content, inflected, np.arange(len(self)))
        # UNKNOWN and BOUNDARY stay 0 and 1
        _, self.pattern = np.unique(patterns, return_inverse=True)

    def _learn_pronouns(self) -> None:
        """Set pronoun: (V,) 0..3 for he, she, it, they, else -1. Set pronoun_given: (V, 4) p(next
        pronoun | noun or name)."""
        ids = self.ids
        size = len(self)
        self.pronoun = np.full(size, -1)
        for forms in PRONOUNS:
            for which, word in enumerate(forms):
                self.pronoun[self.members([word])] = which
        pronouns = np.flatnonzero(self.pronoun[ids] >= 0)
        entities = np.flatnonzero(self.entity[ids])
        pronouns_and_end = np.append(pronouns, len(ids) + NEAR)
        following = pronouns_and_end[np.searchsorted(pronouns, entities)]
        near = following - entities < NEAR
        entity = ids[entities[near]]
        pronoun = self.pronoun[ids[following[near]]]
        counts = np.bincount(entity * 4 + pronoun, minlength=4 * size).reshape(size, 4)
        prior = counts.sum(0) / max(counts.sum(), 1)
        self.pronoun_given = (counts + 4 * prior) / (counts.sum(1, keepdims=True) + 4)

    def _learn_positions(self) -> None:
        """Learn the mean position in a story of each word pair, shrunk towards the middle for rare
        pairs."""
        starts = np.flatnonzero(self.ids == BOUNDARY)
        lengths = np.diff(starts, append=len(self.ids))
        position = np.arange(len(self.ids)) - np.repeat(starts, lengths)
        relative = position / np.repeat(lengths, lengths)
        pairs = hashes(self.ids, 2)
        keys, pair, count = np.unique(pairs, return_inverse=True, return_counts=True)
        mean = np.bincount(pair, weights=relative[:-1] - 0.5) / (count + 20)
        self._place_keys = keys[count > 4]
        self._place = mean[count > 4]

    def _learn_introductions(self) -> None:
        """Set introduction: (V, 2, 5), log p(kind of introduction | word, known or new)."""
        ids = self.ids
        size = len(self)
        self._kind = np.zeros(size, np.int64)
        for kind, words in enumerate(INTRODUCTIONS, start=1):
            self._kind[self.members(words)] = kind
        self._adjective = self.content & ~self.name & ~self.verb
        story = np.cumsum(ids == BOUNDARY)
        new = first_occurrences(story * size + ids).astype(int)
        shape = (size, 2, len(INTRODUCTIONS) + 1)
        cells = np.ravel_multi_index((ids, new, self.introductions(ids)), shape)
        counts = np.bincount(cells, minlength=np.prod(shape)).reshape(shape)
        noun_counts = counts[self.noun].sum(0) + 1
        name_counts = counts[self.name].sum(0) + 1
        noun_prior = noun_counts / noun_counts.sum(-1, keepdims=True)
        name_prior = name_counts / name_counts.sum(-1, keepdims=True)
        prior = np.where(self.name[:, None, None], name_prior, noun_prior)
        self.introduction = np.log((counts + 8 * prior) / (counts.sum(-1, keepdims=True) + 8))

    def position(self, ids: ndarray) -> ndarray:
        """(T - 1,): mean position in a story of each pair of tokens in ids (T,), from -0.5
        (beginning) to 0.5 (end)."""
        return lookup(self._place_keys, self._place, hashes(ids, 2))

    def introductions(self, ids: ndarray) -> ndarray:
        """(T,): the kind of word that introduces each token of ids (T,), looking back over at most
        two adjectives."""
        kind = np.zeros(len(ids), np.int64)
        only_adjectives = np.ones(len(ids), bool)  # between a token and the word `back` before it
        for back in (1, 2, 3):
            before = ids[:-back]
            searching = only_adjectives[back:] & (kind[back:] == 0)
            kind[back:] = np.where(searching, self._kind[before], kind[back:])
            only_adjectives[back:] &= self._adjective[before]
        return kind


def _folded(spelling: str) -> str:
    """The spelling in lower case. Repeated end marks become the first mark: "?!" is "?"."""
    if spelling[0] in ".!?" and spelling != "...":
        return spelling[0]
    return spelling.lower()


def _ending(word: str) -> int:
    """1 to 4 for the first of ENDINGS that the word has; 0 for none."""
    for number, ending in enumerate(ENDINGS, start=1):
        if word.endswith(ending):
            return number
    return 0
