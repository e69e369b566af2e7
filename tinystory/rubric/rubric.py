"""The rubric of the built-in teacher, which takes the place of an LLM: three criteria, measured on
the text without a neural network. `measure` combines parts from 0 to 1 into each criterion. The
score is three times the criterion, rounded.

    readability
        known       fraction of tokens in the corpus's vocabulary
        formed      fraction of words in sentences with a capital, an end mark, a verb and at most
        30 words
        clean       few slips: a/an, "they was", doubled words, odd capitals, stray or unclosed
        quotation marks
        fluent      probability of each sentence under a 5-gram model of the corpus
        grammatical probability of each sentence's pattern: function words themselves, and only the
        class and ending of all other words
        smooth      few n-grams of 2 to 4 common words that hardly ever occur together in the corpus
        reach       how much likelier words are given the four words before them than given two
    coherence
        focus       fraction of mentions of a thing or character with more than one mention
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

Most scales are learned, so fit the rubric to the student's corpus. Each scale is set so that most
held-out stories of the corpus reach 1. Corrupted texts set the 0 of each scale:

    fluent, grammatical, smooth   the held-out stories with shuffled words
    reach and coherence           samples of a trigram model or, if lower, shuffled sentences
    names                         random names
    agreement                     half of he and she exchanged
    association                   joined halves of two stories

A story without names gets 0.5 for names, and a story without he and she 0.5 for agreement. Words in
phrases that occurred earlier in the story or the opening are not fresh, so padding, echoes and
loops do not raise the score."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy import ndarray

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
    END_MARKS,
    Sentences,
    count_slips,
    ends_sentence,
    find_sentences,
    tokenize,
    well_formed_words,
)
from tinystory.run.errors import UserError
from tinystory.teacher.prompt import CRITERIA

MAX_CORPUS_TOKENS = 1_700_000  # about 1.5 M words and their punctuation
MIN_CORPUS_TOKENS = 200
MAX_PASSAGE = 600  # tokens; a longer document counts as several stories
MAX_STORY = 1000  # tokens of a story that are measured; the student writes about a hundred
EXCERPT = 90  # tokens of each story that sets the scales: about as many as the student writes
HELD_OUT = 200  # number of stories held out to set the scales, one in sixteen
PARTS = 4  # steps of fitting, for a progress bar

TROUBLE = frozenset(
    (
        "but sad scared afraid lost angry cry cried crying broke broken fell hurt stuck worried problem couldn't can't "
        "didn't no not never nobody nothing wrong dark danger bad mad upset alone sick trouble cold hungry tired storm "
        "mean lonely missing difficult hard help careful sorry"
    ).split()
)
# Ids above the ids of words, for classes that count as one word when phrases are compared.
NAMED, THING, ACT, OTHER = range(1 << 30, (1 << 30) + 4)
# Weights of the parts of coherence that measure the thread of a story.
THREAD = {
    "focus": 0.15,
    "introduced": 0.1,
    "referred": 0.1,
    "order": 0.2,
    "joined": 0.1,
    "shape": 0.15,
    "association": 0.2,
}


def ramp(x: float | ndarray, zero: float, one: float) -> float:
    """0 up to `zero`, 1 from `one` on, and linear between them; `zero` may be the greater one. For
    an array: the mean."""
    fraction = (x - zero) / (one - zero)
    return float(np.clip(fraction, 0.0, 1.0).mean())


@dataclass(frozen=True)
class TokenizedStory:
    """A story of T tokens with its opening, and values on which several parts are measured.

    opening, tokens: tokens of the opening and of the story. ids (T,): ids of the story; all_ids:
    ids of opening and story. words: number of words in the story. spans: first token and one past
    the last token of each sentence with a word. logprob (ORDER, T): nats, one row per length of
    n-gram. is_word, odd, repeated: (T,) bool; odd is True at the end of an odd n-gram, and repeated
    in a phrase that occurred before."""

    opening: list[str]
    tokens: list[str]
    ids: ndarray
    all_ids: ndarray
    is_word: ndarray
    words: int
    sentences: Sentences
    spans: list[tuple[int, int]]
    logprob: ndarray
    odd: ndarray
    repeated: ndarray


class Rubric:
    """Scores stories by statistics of a corpus. Deterministic: equal texts get equal scores."""

    def __init__(self, documents: Iterable[str], done: Callable[[], object] = lambda: None):
        """Fit the rubric to about 1.5 M words of the documents. done: called after each of the
        PARTS of fitting. Raises UserError if there are too few words."""
        stories, examples = _stories_and_examples(documents)
        done()
        lexicon = Lexicon(stories)
        self.lexicon = lexicon
        done()
        excerpts = [lexicon.look_up(tokens) for tokens in examples]
        with ThreadPoolExecutor() as pool:  # numpy sorts without Python's lock
            model = pool.submit(NgramModel, lexicon.ids, len(lexicon))
            patterns = pool.submit(NgramModel, lexicon.pattern[lexicon.ids], len(lexicon))
            phrases = pool.submit(Phrases, lexicon.ids, excerpts)
            association = pool.submit(WordAssociation, lexicon)
            self.characters = Characters(lexicon)
            self.model = model.result()
            self.patterns = patterns.result()
            self.phrases = phrases.result()
            self.association = association.result()
        done()
        self._frame = np.arange(len(lexicon))
        self._skeleton = self._frame.copy()
        self._skeleton[lexicon.content] = OTHER
        self._skeleton[lexicon.content & lexicon.verb] = ACT
        self._skeleton[lexicon.noun] = THING
        for classes in (self._frame, self._skeleton):
            classes[lexicon.name | (lexicon.pronoun >= 0)] = NAMED
        # For each part: the measured values that become 0 and 1.
        self._scale: dict[str, tuple[float, float]] = {
            "known": (0.75, 0.97),
            "formed": (0.2, 0.95),
            "clean": (0.92, 0.995),
            "unlooped": (0.5, 0.9),
        }
        self._set_scales(examples, excerpts)
        done()

    def score(self, opening: str, story: str) -> dict[str, int]:
        """The integer score, 0..3, of each criterion."""
        measured = self.measure(opening, story)
        return {name: int(3 * measured[name] + 0.5) for name in CRITERIA}

    def measure(self, opening: str, story: str) -> dict[str, float]:
        """Parts and criteria from 0 to 1, by name, `total` (the sum of the criteria) and `fresh`
        (the number of fresh words). All are 0 for less than a sentence: no end mark, or fewer than
        three words."""
        raw = self._raw_parts(tokenize(opening)[-MAX_STORY:], tokenize(story)[:MAX_STORY])
        if raw is None:
            return dict.fromkeys((*CRITERIA, "total"), 0.0)
        part: dict[str, float] = {}
        for name, (zero, one) in self._scale.items():
            value = raw[name]
            part[name] = 0.5 if value is None else ramp(value, zero, one)
        for name in ("shape", "rhythm", "fresh"):
            part[name] = float(raw[name])
        readability = _readability(part)
        coherence = _coherence(part, readability)
        creativity = _creativity(part, readability, coherence)
        criteria = {"readability": readability, "coherence": coherence, "creativity": creativity}
        return part | criteria | {"total": sum(criteria.values())}

    def _set_scales(self, examples: list[list[str]], excerpts: list[ndarray]) -> None:
        """Set the scale of each part: the values that become 0 and 1. examples, excerpts: the
        held-out stories, as tokens and as ids, which set 1. Corrupted copies of these stories and
        n-gram samples set 0."""
        rng = np.random.default_rng(0)
        real = self._parts_of(examples)
        shuffled = self._parts_of([_shuffled(text, rng) for text in examples])
        reordered = self._parts_of([_with_shuffled_sentences(text, rng) for text in examples])
        spellings = self.lexicon.spellings
        samples = sample(self.lexicon.spelling_ids)
        sampled = self._parts_of([[spellings[id] for id in ids] for ids in samples])

        # In nats per token. Against a repetitive corpus, -2.5 and -2 are enough for a score of 1.
        for name, enough in (("fluent", -2.5), ("grammatical", -2.0)):
            one = min(_percentile(real, name, 25), enough)
            zero = min(_percentile(shuffled, name, 50), one - 2)
            self._scale[name] = (zero, one)
        self._scale["smooth"] = (min(_percentile(shuffled, "smooth", 50), 0.9), 0.99)

        half_as_varied = _percentile(real, "varied", 50) / 2
        self._scale["varied"] = (half_as_varied - 0.01, _percentile(real, "varied", 35))
        typical_rarity = _percentile(real, "rare", 50)
        self._scale["rare"] = (typical_rarity - 1.5, _percentile(real, "rare", 40))
        self._scale["uncopied"] = (0.0, max(0.1, _percentile(real, "uncopied", 25)))

        for name in ("reach", "focus"):
            self._set_scale(name, real, _percentile(sampled, name, 50), 0.1)
        for name in ("introduced", "referred", "order", "joined"):
            of_samples = _percentile(sampled, name, 50)
            of_reordered = _percentile(reordered, name, 50)
            self._set_scale(name, real, min(of_samples, of_reordered), 0.1)

        renamed = [self.characters.renamed(ids, rng) for ids in excerpts]
        flipped = [self.characters.flipped(ids, rng) for ids in excerpts]
        joined = _with_halves_of_others(excerpts)
        real = [self._coreference(ids) for ids in excerpts]
        for name, corrupted, least in (
            ("names", renamed, 0.5),
            ("agreement", flipped, 0.2),
            ("association", joined, 0.02),
        ):
            corrupted_parts = [self._coreference(ids) for ids in corrupted]
            self._set_scale(name, real, _percentile(corrupted_parts, name, 50), least)

    def _set_scale(self, name: str, real: list[dict], zero: float, least: float) -> None:
        """Set the scale of a part so that most held-out stories reach 1. least: minimum length of
        the scale."""
        one = _percentile(real, name, 40)
        self._scale[name] = (min(zero, one - least), one)

    def _parts_of(self, texts: list[list[str]]) -> list[dict]:
        """Unscaled parts of each text that has at least one sentence."""
        parts = [self._raw_parts([], text) for text in texts]
        return [raw for raw in parts if raw is not None]

    def _raw_parts(self, opening: list[str], story: list[str]) -> dict | None:
        """Unscaled parts of a story; None for less than a sentence. opening, story: tokens."""
        is_word = np.array([token[0].isalpha() for token in story], bool)
        words = int(is_word.sum())
        if words < 3 or not any(token[0] in END_MARKS for token in story):
            return None
        start = len(opening)
        ids = self.lexicon.look_up(opening + story)
        sentences = find_sentences(story)
        spans = [(first, end) for first, end in sentences.bounds if is_word[first:end].any()]
        logprob, odd = self.model.read(ids)
        repeated = _repeated(self._frame[ids], 4) | _repeated(self._skeleton[ids], 7)
        text = TokenizedStory(
            opening=opening,
            tokens=story,
            ids=ids[start:],
            all_ids=ids,
            is_word=is_word,
            words=words,
            sentences=sentences,
            spans=spans,
            logprob=logprob[:, start:],
            odd=odd[start:],
            repeated=repeated[start:],
        )
        parts = self._readability_parts(text)
        parts |= self._coherence_parts(text)
        parts |= self._creativity_parts(text)
        parts["fresh"] = int((is_word & ~text.repeated).sum())
        return parts

    def _readability_parts(self, text: TokenizedStory) -> dict[str, Any]:
        """The unscaled parts of readability."""
        lexicon = self.lexicon
        start = len(text.opening)
        continues = start > 0 and not ends_sentence(text.opening[-1])
        verb = lexicon.verb[text.ids].tolist()
        formed = well_formed_words(text.tokens, text.sentences, verb, continues)
        may_be_capital = lexicon.may_be_capital[text.ids].tolist()
        slips = count_slips(text.tokens, text.sentences, may_be_capital)

        logprob = text.logprob[-1]
        pattern_logprob, odd_pattern = self.patterns.read(lexicon.pattern[text.all_ids])
        odd = text.odd.mean() + odd_pattern[start:].mean()
        return {
            "known": np.mean(text.ids != UNKNOWN),
            "formed": formed / text.words,
            "clean": 1 - slips / text.words,
            "fluent": _by_sentence(logprob, text.sentences.bounds),
            "grammatical": _by_sentence(pattern_logprob[-1, start:], text.sentences.bounds),
            "smooth": 1 - odd / 2,
            "reach": (logprob - text.logprob[2]).mean(),
        }

    def _coherence_parts(self, text: TokenizedStory) -> dict[str, Any]:
        """The unscaled parts of coherence."""
        start = len(text.opening)
        focus, introduced = self._entities(text.all_ids, start)
        pair_positions = self.lexicon.position(text.ids)
        positions = [float(pair_positions[first : end - 1].sum()) for first, end in text.spans]
        trouble = any(token.lower() in TROUBLE for token in text.tokens)
        ended = ends_sentence(text.tokens[-1]) and not text.sentences.unpaired
        ending = ended and positions[-1] > 0
        return self._coreference(text.all_ids, start) | {
            "focus": focus,
            "introduced": introduced,
            "referred": self._referred(text.all_ids, start),
            "order": _order(positions),
            "joined": _joined(text.logprob, text.spans),
            "shape": 0.4 * trouble + 0.3 * ended + 0.3 * ending,
            "unlooped": 1 - text.repeated.mean(),
        }

    def _creativity_parts(self, text: TokenizedStory) -> dict[str, Any]:
        """The unscaled parts of creativity."""
        different = len(np.unique(text.ids[text.is_word]))
        content = np.unique(text.ids[self.lexicon.content[text.ids]])
        rare = 0.0
        if len(content):
            rare = -np.log(self.lexicon.frequency[content]).mean()
        return {
            "varied": different / text.words**0.7,
            "rare": rare,
            "rhythm": _rhythm(text.tokens, text.spans, text.words),
            "uncopied": 1 - self.phrases.copied(text.ids),
        }

    def _coreference(self, ids: ndarray, start: int = 0) -> dict[str, float | None]:
        """Unscaled parts of coherence about coreference. ids: (T,) ids of opening and story; the
        story begins at `start`."""
        return {
            "names": self.characters.introduction(ids, start),
            "agreement": self.characters.agreement(ids, start),
            "association": self.association.mean(ids[start:]),
        }

    def _entities(self, ids: ndarray, start: int) -> tuple[float, float]:
        """Two parts: focus, the fraction of the story's mentions of an entity that is mentioned
        more than once, and introduced, the mean nats per mention by which the introduction fits the
        entity's status, known or new."""
        lexicon = self.lexicon
        at = np.flatnonzero(lexicon.entity[ids])
        mentions = np.bincount(ids[at])
        at = at[at >= start]
        if not len(at):
            return 0.0, -1.0
        focus = np.mean(mentions[ids[at]] > 1)
        logprob = lexicon.introduction[ids[at], :, lexicon.introductions(ids)[at]]
        for_new = logprob[:, 1] - logprob[:, 0]
        evidence = np.where(first_occurrences(ids)[at], for_new, -for_new)
        return float(focus), float(np.clip(evidence, -3, 3).mean())

    def _referred(self, ids: ndarray, start: int) -> float:
        """Mean probability of he, she, it and they from `start` on, each given the best of the last
        five entities; 0 without such pronouns."""
        lexicon = self.lexicon
        recent: list[int] = []
        best: list[float] = []
        relevant = lexicon.entity[ids] | (lexicon.pronoun[ids] >= 0)
        for at in np.flatnonzero(relevant).tolist():
            id = int(ids[at])
            which = lexicon.pronoun[id]
            if which < 0:
                if id in recent:
                    recent.remove(id)
                recent = [*recent, id][-5:]
            elif at >= start:
                fits = [lexicon.pronoun_given[entity, which] for entity in recent]
                best.append(max(fits, default=0.0))
        return float(np.mean(best)) if best else 0.0


def _floored(x: float, floor: float) -> float:
    """x from 0..1 mapped linearly to `floor`..1, so that an improvement raises the total of even
    the worst text."""
    return floor + (1 - floor) * x


def _readability(part: dict[str, float]) -> float:
    likely = part["fluent"] * part["grammatical"] * part["smooth"]
    natural = (likely * _floored(part["reach"], 0.1)) ** 0.25
    correct = part["known"] * _floored(part["formed"], 0.02) * _floored(part["clean"], 0.02)
    return correct * _floored(natural, 0.02) * ramp(part["fresh"], 1, 25)


def _coherence(part: dict[str, float], readability: float) -> float:
    thread = 0.0
    for name, weight in THREAD.items():
        thread += weight * part[name]
    coreference = 0.2 + 0.5 * part["names"] + 0.3 * part["agreement"]
    readable = ramp(readability, 0, 0.4)
    return thread * coreference * part["unlooped"] * readable * ramp(part["fresh"], 5, 40)


def _creativity(part: dict[str, float], readability: float, coherence: float) -> float:
    rare = 0.4 * part["rare"] * _floored(part["association"], 0.2)
    novel = 0.4 * part["varied"] + rare + 0.2 * part["rhythm"]
    own = novel * (1 + 2 * part["uncopied"]) / 3
    sense = ramp(readability, 0.1, 0.7) * _floored(ramp(coherence, 0, 0.6), 0.2)
    return own * part["unlooped"] * sense * ramp(part["fresh"], 5, 45)


def _percentile(group: list[dict], name: str, percent: float) -> float:
    """The percentile of a raw part over a group of texts; 0 if no text has the part."""
    values = [np.atleast_1d(raw[name]) for raw in group if raw[name] is not None]
    return float(np.percentile(np.concatenate(values or [np.zeros(1)]), percent))


def _stories_and_examples(documents: Iterable[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Tokenized stories for counting, and excerpts of held-out stories, which set the scales."""
    stories: list[list[str]] = []
    held_out: list[list[str]] = []
    count = 0
    passages = chain.from_iterable(_passages(tokenize(text), MAX_PASSAGE) for text in documents)
    for index, passage in enumerate(passages):
        if index % 16 == 15 and len(held_out) < HELD_OUT:
            held_out.append(passage)
            continue
        stories.append(passage)
        count += len(passage)
        if count >= MAX_CORPUS_TOKENS:
            break
    if count < MIN_CORPUS_TOKENS:
        raise UserError(
            f"the corpus has only {count} words and punctuation marks, and the built-in teacher needs at least "
            f"{MIN_CORPUS_TOKENS}: give a larger --corpus"
        )
    examples = held_out or stories[:HELD_OUT]
    return stories, [next(_passages(example, EXCERPT)) for example in examples]


def _passages(tokens: list[str], longest: int) -> Iterator[list[str]]:
    """Passages of whole sentences with at most `longest` tokens each, unless a single sentence is
    longer."""
    start = 0
    if len(tokens) > longest:
        for first, end in find_sentences(tokens).bounds:
            if end - start > longest and first > start:
                yield tokens[start:first]
                start = first
    if tokens:
        yield tokens[start:]


def _shuffled(pieces: list, rng: np.random.Generator) -> list:
    return [pieces[at] for at in rng.permutation(len(pieces))]


def _with_shuffled_sentences(text: list[str], rng: np.random.Generator) -> list[str]:
    sentences = [text[first:end] for first, end in find_sentences(text).bounds]
    return list(chain.from_iterable(_shuffled(sentences, rng)))


def _with_halves_of_others(texts: list[ndarray]) -> list[ndarray]:
    """The first half of each text, followed by the second half of the next one."""
    joined = []
    for ids, other in zip(texts, texts[1:] + texts[:1], strict=True):
        first_half = ids[: len(ids) // 2]
        second_half = other[len(other) // 2 :]
        joined.append(np.append(first_half, second_half))
    return joined


def _repeated(ids: ndarray, n: int) -> ndarray:
    """(T,) bool: True for the tokens of n-grams that occurred before."""
    return covered(~first_occurrences(hashes(ids, n)), n, len(ids))


def _by_sentence(logprob: ndarray, bounds: list[tuple[int, int]]) -> ndarray:
    """For each token, the mean of its sentence, so that one easy sentence does not compensate for
    another."""
    starts, ends = np.array(bounds).T
    lengths = ends - starts
    means = np.add.reduceat(logprob, starts) / lengths
    return np.repeat(means, lengths)


def _order(positions: list[float]) -> float:
    """From -1 to 1: how well the order of the sentences matches the order in which their words
    usually come in a story."""
    differences = np.subtract.outer(positions, positions)[np.tril_indices(len(positions), -1)]
    total = float(np.abs(differences).sum())
    if total == 0:
        return 0.0
    return float(differences.sum()) / total * min(1.0, (len(positions) - 1) / 4)


def _joined(logprob: ndarray, spans: list[tuple[int, int]]) -> float:
    """Nats per word by which sentence beginnings are likelier given the previous sentence than
    given only its end mark."""
    # row n: log-probability given 4 tokens, minus given n tokens (n - 1 words and an end mark)
    gain = logprob[-1] - logprob[: ORDER - 1]
    gains: list[float] = []
    for first, end in spans[1:]:
        gains.extend(gain[1:, first:end].diagonal())
    return float(np.mean(gains)) if gains else -1.0


def _rhythm(tokens: list[str], spans: list[tuple[int, int]], words: int) -> float:
    """From 0 to 1, higher if sentences are not all tiny and, if there are several, do not all begin
    alike."""
    rhythm = ramp(words / len(spans), 3, 6)
    if len(spans) <= 3:
        return rhythm
    openers: Counter[str] = Counter()
    for first, end in spans:
        opener = next(token for token in tokens[first:end] if token[0].isalpha())
        openers[opener.lower()] += 1
    return rhythm * ramp(max(openers.values()) / len(spans), 0.95, 0.65)
