"""The built-in teacher's rubric, a stand-in for an LLM: three criteria measured on the text without
a neural network. `measure` combines parts in 0..1 into each criterion; the score is three times the
criterion, rounded.

    readability
        known       fraction of tokens in the corpus's vocabulary
        formed      fraction of words in sentences with a capital, an end mark, a verb and at most
        30 words
        clean       few slips: a/an, "they was", doubled words, odd capitals, stray or unclosed
        quotation marks
        fluent      probability of each sentence under a 5-gram model of the corpus
        grammatical the same for its pattern: function words, and only class and ending of all other
        words
        smooth      few n-grams of 2 to 4 common words that hardly ever occur together in the corpus
        reach       how much likelier words are given four words before them than given two
    coherence
        focus       fraction of mentions whose thing or character is mentioned more than once
        introduced  "a dog", "named Tim" at the first mention and "the dog", "Tim" later
        referred    he, she, it, they fit one of the last five things or characters mentioned
        order       sentences are in the order in which their words usually come in a story
        joined      sentences begin as sentences do after the one before
        shape       a problem, an end mark, and a last sentence that sounds like an ending
        association content words that occur in the same stories (association.py)
        names       names are introduced before they are used as known (characters.py)
        agreement   he and she agree with the character they refer to (characters.py)
        unlooped    few repeated phrases (names and pronouns count as one word; sentence patterns
        too)
    creativity
        varied      distinct words, corrected for length
        rare        content words other than the commonest ones
        rhythm      sentences are not all tiny and do not all begin alike
        uncopied    fraction of the story outside long phrases of the corpus

Most scales are learned, so fit the rubric to the student's corpus. Most of its held-out stories
reach 1 in each part. These set 0: their shuffled words for fluent, grammatical and smooth; samples
of a trigram model or, if lower, shuffled sentences for reach and coherence; and for names,
agreement and association, random names, half of he and she exchanged, and joined halves of two
stories. A story without names, or without he and she, gets 0.5 for that part. Words in phrases that
came before, in story or opening, are not fresh: padding, echoes and loops score nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import numpy as np

from tinystory.rubric.association import WordAssociation
from tinystory.rubric.characters import Characters
from tinystory.rubric.lexicon import Lexicon
from tinystory.rubric.ngram import (
    ORDER,
    UNKNOWN,
    NgramModel,
    Phrases,
    covered,
    first_occurrences,
    hashes,
    sample,
)
from tinystory.rubric.surface import (
    CLOSE,
    count_slips,
    split_sentences,
    tokenize,
    well_formed_words,
)
from tinystory.run.errors import UserError
from tinystory.teacher.prompt import CRITERIA

MAX_CORPUS_TOKENS = 1_700_000  # about 1.5 M words and their punctuation
MIN_CORPUS_TOKENS = 200
MAX_PASSAGE = 600  # tokens; a longer document counts as several stories
MAX_STORY = 1000  # tokens of a story that are measured; the student writes about a hundred
EXCERPT = 90  # tokens per story that sets the scales: about as many as the student writes
HELD_OUT = 200  # stories held out to set the scales, one in sixteen
PARTS = 8  # steps of fitting, for a progress bar

TROUBLE = frozenset(
    (
        "but sad scared afraid lost angry cry cried crying broke broken fell hurt stuck worried problem couldn't can't "
        "didn't no not never nobody nothing wrong dark danger bad mad upset alone sick trouble cold hungry tired storm "
        "mean lonely missing difficult hard help careful sorry"
    ).split()
)
Measure: TypeAlias = Callable[[np.ndarray], float | None]
# Ids beyond those of words, for classes that count as one word when phrases are compared.
NAMED, THING, ACT, OTHER = range(1 << 30, (1 << 30) + 4)


def ramp(x: float | np.ndarray, zero: float, one: float) -> float:
    """0 up to `zero`, 1 from `one` on, linear between them; `zero` may be greater. The mean for an
    array."""
    fraction = (x - zero) / (one - zero)
    if isinstance(fraction, np.ndarray):
        return float(np.clip(fraction, 0.0, 1.0).mean())
    return min(max(float(fraction), 0.0), 1.0)


class Rubric:
    """Measures stories against a corpus, deterministically: equal texts get equal scores."""

    def __init__(
        self,
        stories: list[list[str]],
        examples: list[list[str]],
        done: Callable[[], object] = lambda: None,
    ):
        """stories: tokenized stories to count in; examples: held-out ones, which set the scales;
        done: called after each of the PARTS of fitting."""
        done()  # the corpus is read
        self.lexicon = lexicon = Lexicon(stories)
        done()
        excerpts = [lexicon.look_up(tokens) for tokens in examples]
        with ThreadPoolExecutor() as pool:  # numpy sorts without Python's lock
            models = [
                pool.submit(NgramModel, ids, len(lexicon))
                for ids in (lexicon.ids, lexicon.pattern[lexicon.ids])
            ]
            phrases, association = (
                pool.submit(Phrases, lexicon.ids, excerpts),
                pool.submit(WordAssociation, lexicon),
            )
            futures: list[Future] = [*models, phrases, association]
            for future in futures:
                future.add_done_callback(lambda _: done())
            self.characters = Characters(lexicon)
            self.model, self.patterns = (model.result() for model in models)
            self.phrases, self.association = phrases.result(), association.result()
        self._frame = np.arange(len(lexicon))
        self._frame[lexicon.name | (lexicon.pronoun >= 0)] = NAMED
        self._skeleton = self._frame.copy()
        self._skeleton[lexicon.content & ~lexicon.name] = OTHER
        self._skeleton[lexicon.content & lexicon.verb & ~lexicon.name] = ACT
        self._skeleton[lexicon.noun] = THING
        self._scale = {
            "known": (0.75, 0.97),
            "formed": (0.2, 0.95),
            "clean": (0.92, 0.995),
            "unlooped": (0.5, 0.9),
        }
        rng = np.random.default_rng(0)
        self._set_scales(examples, rng)
        done()
        self._set_coreference_scales(excerpts, rng)
        done()

    @classmethod
    def from_corpus(
        cls, documents: Iterable[str], done: Callable[[], object] = lambda: None
    ) -> "Rubric":
        """Fit a rubric to about 1.5 M words of the documents. done: as above. Raises UserError if
        there are too few."""
        stories: list[list[str]] = []
        held_out: list[list[str]] = []
        count = 0
        passages = (
            passage
            for document in documents
            for passage in _passages(tokenize(document), MAX_PASSAGE)
        )
        for index, passage in enumerate(passages):
            if index % 16 == 15 and len(held_out) < HELD_OUT:
                held_out.append(passage)
            else:
                stories.append(passage)
                count += len(passage)
            if count >= MAX_CORPUS_TOKENS:
                break
        if count < MIN_CORPUS_TOKENS:
            raise UserError(
                f"the corpus has only {count} words and stops: give the teacher more stories to measure by"
            )
        return cls(
            stories,
            [next(_passages(passage, EXCERPT)) for passage in held_out or stories[:HELD_OUT]],
            done,
        )

    def score(self, opening: str, story: str) -> dict[str, int]:
        """The integer score, 0..3, of each criterion."""
        measured = self.measure(opening, story)
        return {name: int(3 * measured[name] + 0.5) for name in CRITERIA}

    def measure(self, opening: str, story: str) -> dict[str, float]:
        """Parts and criteria, each 0..1, `total`, the sum of the criteria, and `fresh`, the number
        of fresh words. Zeros for less than a sentence: no end mark, or fewer than three words."""
        raw = self._raw_parts(tokenize(opening)[-MAX_STORY:], tokenize(story)[:MAX_STORY])
        if raw is None:
            return dict.fromkeys((*CRITERIA, "total"), 0.0)
        part = {
            name: 0.5 if raw[name] is None else ramp(raw[name], *scale)
            for name, scale in self._scale.items()
        }
        part |= {name: float(raw[name]) for name in ("shape", "rhythm", "fresh")}
        fresh = part["fresh"]
        # Small floors, so that an improvement raises the total even of the worst text.
        natural = (
            part["fluent"] * part["grammatical"] * part["smooth"] * (0.1 + 0.9 * part["reach"])
        ) ** 0.25
        correct = part["known"] * (0.02 + 0.98 * part["formed"]) * (0.02 + 0.98 * part["clean"])
        readability = correct * (0.02 + 0.98 * natural) * ramp(fresh, 1, 25)
        thread = (
            0.15 * part["focus"]
            + 0.1 * part["introduced"]
            + 0.1 * part["referred"]
            + 0.2 * part["order"]
        )
        thread = thread + 0.1 * part["joined"] + 0.15 * part["shape"] + 0.2 * part["association"]
        coreference = 0.2 + 0.5 * part["names"] + 0.3 * part["agreement"]
        coherence = (
            thread * coreference * part["unlooped"] * ramp(readability, 0, 0.4) * ramp(fresh, 5, 40)
        )
        novel = (
            0.4 * part["varied"]
            + 0.4 * part["rare"] * (0.2 + 0.8 * part["association"])
            + 0.2 * part["rhythm"]
        )
        sense = ramp(readability, 0.1, 0.7) * (0.2 + 0.8 * ramp(coherence, 0, 0.6))
        creativity = (
            novel * (1 + 2 * part["uncopied"]) / 3 * part["unlooped"] * sense * ramp(fresh, 5, 45)
        )
        criteria = dict(
            zip(CRITERIA, map(float, (readability, coherence, creativity)), strict=True)
        )
        return part | criteria | {"total": sum(criteria.values())}

    def _set_scales(self, examples: list[list[str]], rng: np.random.Generator) -> None:
        """Held-out stories set 1; corrupted copies of them and n-gram samples set 0."""
        lexicon = self.lexicon

        def raw_parts(texts: Iterable[list[str]]) -> list[dict]:
            return [raw for text in texts if (raw := self._raw_parts([], text)) is not None]

        real = raw_parts(examples)
        shuffled = raw_parts(_shuffled([[token] for token in text], rng) for text in examples)
        reordered = raw_parts(
            _shuffled([text[a:b] for a, b in split_sentences(text).bounds], rng)
            for text in examples
        )
        sampled = raw_parts(
            [lexicon.spellings[id] for id in ids]
            for ids in sample(lexicon.spelling_ids, 0, 100, 100)
        )

        def percentile(group: list[dict], name: str, percent: float) -> float:
            values = [np.atleast_1d(raw[name]) for raw in group] or [np.zeros(1)]
            return float(np.percentile(np.concatenate(values), percent))

        # In nats per token. Against a repetitive corpus, -2.5 and -2 are enough for a score of 1.
        for name, enough in (("fluent", -2.5), ("grammatical", -2.0)):
            one = min(percentile(real, name, 25), enough)
            self._scale[name] = (min(percentile(shuffled, name, 50), one - 2), one)
        self._scale |= {
            "smooth": (min(percentile(shuffled, "smooth", 50), 0.9), 0.99),
            "varied": (percentile(real, "varied", 50) / 2 - 0.01, percentile(real, "varied", 35)),
            "rare": (percentile(real, "rare", 50) - 1.5, percentile(real, "rare", 40)),
            "uncopied": (0.0, max(0.1, percentile(real, "uncopied", 25))),
        }
        for name in ("reach", "focus", "introduced", "referred", "order", "joined"):
            one = percentile(real, name, 40)
            zero = percentile(sampled, name, 50)
            if name in ("introduced", "referred", "order", "joined"):
                zero = min(zero, percentile(reordered, name, 50))
            self._scale[name] = (min(zero, one - 0.1), one)

    def _set_coreference_scales(self, stories: list[np.ndarray], rng: np.random.Generator) -> None:
        """The same for names, agreement and association. stories: ids of held-out stories."""

        def scale(
            measure: Measure, corrupted: list[np.ndarray], least: float
        ) -> tuple[float, float]:
            real, worse = (
                [value for text in group if (value := measure(text)) is not None] or [0.0]
                for group in (stories, corrupted)
            )
            one = float(np.percentile(real, 40))
            return min(float(np.percentile(worse, 50)), one - least), one

        characters, others = self.characters, [*stories[1:], *stories[:1]]
        halves = [
            np.append(a[: len(a) // 2], b[len(b) // 2 :])
            for a, b in zip(stories, others, strict=True)
        ]
        renamed, flipped = (
            [f(text, rng) for text in stories] for f in (characters.renamed, characters.flipped)
        )
        self._scale |= {
            "names": scale(characters.introduction, renamed, 0.5),
            "agreement": scale(characters.agreement, flipped, 0.2),
            "association": scale(self.association.mean, halves, 0.02),
        }

    def _raw_parts(self, before: list[str], after: list[str]) -> dict | None:
        """Unscaled parts; None for less than a sentence. before, after: tokens of opening and
        story."""
        words = np.array([token[0].isalpha() for token in after], bool)
        count = int(words.sum())
        if count < 3 or not any(token[0] in ".!?" for token in after):
            return None
        lexicon, start = self.lexicon, len(before)
        ids = lexicon.look_up(before + after)
        story = ids[start:]
        sentences = split_sentences(after)
        spans = [(first, end) for first, end in sentences.bounds if words[first:end].any()]
        lower = [token.lower() for token in after]
        repeated = (_repeated(self._frame[ids], 4) | _repeated(self._skeleton[ids], 7))[start:]
        logprob, odd = (values[..., start:] for values in self.model.read(ids))
        pattern_logprob, odd_pattern = (
            values[..., start:] for values in self.patterns.read(lexicon.pattern[ids])
        )
        continues = bool(before) and before[-1][0] not in f".!?{CLOSE}"
        content = np.unique(story[lexicon.content[story]])
        openers = [
            next(word for word in lower[first:end] if word[0].isalpha()) for first, end in spans
        ]
        commonest = max(map(openers.count, openers)) / len(openers)
        ended = after[-1][0] in f".!?{CLOSE}" and not sentences.unpaired
        pair_places = lexicon.place(story)
        places = [float(pair_places[first : end - 1].sum()) for first, end in spans]
        return {
            "known": np.mean(story != UNKNOWN),
            "formed": well_formed_words(after, sentences, lexicon.verb[story].tolist(), continues)
            / count,
            "clean": 1
            - count_slips(after, sentences, lexicon.may_be_capital[story].tolist()) / count,
            "fluent": _by_sentence(logprob[-1], sentences.bounds),
            "grammatical": _by_sentence(pattern_logprob[-1], sentences.bounds),
            "smooth": 1 - (odd.mean() + odd_pattern.mean()) / 2,
            "reach": (logprob[-1] - logprob[2]).mean(),
            **self._entities(ids, start),
            "referred": self._referred(ids, start),
            "names": self.characters.introduction(ids, start),
            "agreement": self.characters.agreement(ids, start),
            "association": self.association.mean(story),
            "order": _order(places),
            "joined": _joined(logprob, spans),
            "shape": 0.4 * any(word in TROUBLE for word in lower)
            + 0.3 * ended
            + 0.3 * (ended and places[-1] > 0),
            "unlooped": 1 - repeated.mean(),
            "fresh": int((words & ~repeated).sum()),
            "varied": len(np.unique(story[words])) / count**0.7,
            "rare": -np.log(lexicon.frequency[content]).mean() if len(content) else 0.0,
            "rhythm": ramp(count / len(spans), 3, 6)
            * (ramp(commonest, 0.95, 0.65) if len(spans) > 3 else 1.0),
            "uncopied": 1 - self.phrases.copied(story),
        }

    def _entities(self, ids: np.ndarray, start: int) -> dict[str, float]:
        lexicon = self.lexicon
        at = start + np.flatnonzero(lexicon.entity[ids[start:]])
        if not len(at):
            return {"focus": 0.0, "introduced": -1.0}
        mentions = np.bincount(ids[lexicon.entity[ids]])
        # (entities, known or new)
        logprob = lexicon.introduction[ids[at], :, lexicon.introductions(ids)[at]]
        row, status = np.arange(len(at)), first_occurrences(ids)[at].astype(int)
        evidence = np.clip(logprob[row, status] - logprob[row, 1 - status], -3, 3)
        return {"focus": np.mean(mentions[ids[at]] > 1), "introduced": evidence.mean()}

    def _referred(self, ids: np.ndarray, start: int) -> float:
        """Mean over he, she, it, they of their best probability after one of the last five
        entities."""
        lexicon = self.lexicon
        recent: list[int] = []
        best: list[float] = []
        for at in np.flatnonzero(lexicon.entity[ids] | (lexicon.pronoun[ids] >= 0)).tolist():
            id = int(ids[at])
            which = lexicon.pronoun[id]
            if which < 0:
                recent = [*(entity for entity in recent if entity != id), id][-5:]
            elif at >= start:
                best.append(
                    max((lexicon.pronoun_given[entity, which] for entity in recent), default=0.0)
                )
        return float(np.mean(best)) if best else 0.0


def _passages(tokens: list[str], longest: int) -> Iterator[list[str]]:
    """Split into passages of whole sentences, of at most `longest` tokens unless a single sentence
    is longer."""
    start = 0
    for first, end in split_sentences(tokens).bounds if len(tokens) > longest else ():
        if end - start > longest and first > start:
            yield tokens[start:first]
            start = first
    if tokens:
        yield tokens[start:]


def _shuffled(pieces: list[list[str]], rng: np.random.Generator) -> list[str]:
    return [token for at in rng.permutation(len(pieces)) for token in pieces[at]]


def _repeated(ids: np.ndarray, n: int) -> np.ndarray:
    """(T,) bool: tokens of n-grams that have occurred before."""
    return covered(~first_occurrences(hashes(ids, n)), n, len(ids))


def _by_sentence(logprob: np.ndarray, bounds: list[tuple[int, int]]) -> np.ndarray:
    """Each token's sentence mean, so that one easy sentence does not compensate for another."""
    starts, ends = np.array(bounds).T
    return np.repeat(np.add.reduceat(logprob, starts) / (ends - starts), ends - starts)


def _order(places: list[float]) -> float:
    """-1..1: whether sentences are in the order in which their words usually come in a story."""
    differences = np.subtract.outer(places, places)[np.tril_indices(len(places), -1)]
    total = float(np.abs(differences).sum())
    return float(differences.sum()) / total * min(1.0, (len(places) - 1) / 4) if total > 0 else 0.0


def _joined(logprob: np.ndarray, spans: list[tuple[int, int]]) -> float:
    """Nats per word by which sentence beginnings are likelier given the sentence before than its
    end mark only."""
    # row n: given 4 tokens minus given n (n - 1 words and an end mark)
    gain = logprob[-1] - logprob
    gains = [
        gain[at + 1, first + at]
        for first, end in spans[1:]
        for at in range(min(ORDER - 2, end - first))
    ]
    return float(np.mean(gains)) if gains else -1.0
