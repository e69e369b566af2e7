"""The built-in teacher's rubric: readability, coherence and creativity measured on the text, with no neural net.

It is a stand-in for a language model that judges, so that everything runs where there is none. Each criterion is made
of parts between 0 and 1, and its score is three times the criterion, rounded to a whole number:

    readability = known * formed * clean * the geometric mean of fluent, grammatical, smooth and 0.1 + 0.9 reach,
                  for 25 fresh words or more
        known       share of tokens in the corpus's word list
        formed      share of words in sentences with a capital, an end, a verb and no more than 30 words
        clean       few slips: a/an, "they was", doubled words, odd capitals, stray or unclosed quotation marks
        fluent      how probable each sentence is under a 5-gram model of the corpus
        grammatical the same, of its pattern: function words, and for all others only their class and ending
        smooth      few words that jar: that never follow the one, two or three before them, though all are common
        reach       whether words fit the four before them better than the two before them foretell
    coherence = (0.25 focus + 0.15 introduced + 0.15 referred + 0.2 order + 0.15 joined + 0.1 shape) * unlooped,
                as far as readable, for 40 fresh words or more
        focus       share of mentions that are of a thing or person mentioned more than once
        introduced  "a dog", "named Tim" for the new and "the dog", "Tim" for the known
        referred    he, she, it, they fit one of the last five things named
        order       sentences stand in the order in which their words usually come in a story
        joined      sentences begin as they would after the end of the one before
        shape       a trouble, an end, and an end that sounds like one
        unlooped    few phrases that came before (names and pronouns count as the same word, so do sentence patterns)
    creativity = (0.4 varied + 0.4 rare + 0.2 rhythm) * (1 + 2 uncopied) / 3 * unlooped,
                 as far as readable and coherent, for 45 fresh words or more
        varied      different words, corrected for length
        rare        content words that are not the commonest ones
        rhythm      sentences are not all tiny and do not all begin alike
        uncopied    share of the story outside long phrases of the corpus

What a part should reach is learned: 1 is what most unseen stories of the corpus have, 0 what the same words have in
random order (fluent, grammatical, smooth), or the same sentences, or a writer who knows only which word follows which
two (whichever is less: reach and the thread). So the teacher should know the corpus that the student reads. A word is
fresh where it is not in a phrase that came before, in the story or in its opening: padding, echo and loops earn
nothing. No end mark or fewer than three words is less than a sentence: 0 0 0.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from tinystory.errors import UserError
from tinystory.rubric.lexicon import Lexicon
from tinystory.rubric.ngram import ORDER, UNKNOWN, NgramModel, Phrases, babble, hashes
from tinystory.rubric.surface import CLOSE, formed, sentences, slips, tokens, words_of
from tinystory.teacher.prompt import CRITERIA

MOST_TOKENS = 1_700_000  # of the corpus are read: about 1.5 M words and their stops
LEAST_TOKENS = 200
PASSAGE = 600  # tokens; a longer document is read as several stories
LONGEST = 1000  # tokens of a story are looked at; the writer has room for about a hundred
EXCERPT = 90  # tokens of a story that the rubric is set by: what the writer has room for
HELD_OUT = 200  # stories kept apart to set it by, one in sixteen

TROUBLE = frozenset(
    words_of(
        "but sad scared afraid lost angry cry cried crying broke broken fell hurt stuck worried problem couldn't can't "
        "didn't no not never nobody nothing wrong dark danger bad mad upset alone sick trouble cold hungry tired storm "
        "mean lonely missing difficult hard help careful sorry"
    )
)
# Ids beyond any word's, for what counts as the same word when phrases are compared.
NAMED, THING, ACT, OTHER = range(1 << 30, (1 << 30) + 4)


def ramp(x, zero: float, one: float):
    """0 up to `zero`, 1 from `one` on, linear between; `zero` may be the larger of the two."""
    return np.clip((x - zero) / (one - zero), 0.0, 1.0)


class Rubric:
    """Measures stories against one corpus. Deterministic: the same text always gets the same scores."""

    def __init__(self, lexicon: Lexicon, model: NgramModel, patterns: NgramModel, phrases: Phrases):
        self.lexicon, self.model, self.patterns, self.phrases = lexicon, model, patterns, phrases
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

    @classmethod
    def from_corpus(cls, documents: Iterable[str]) -> "Rubric":
        """Read the first 1.5 M words of the documents, keep some stories apart and set the scales by them.

        Raises UserError where they are too few to measure anything by.
        """
        kept, held_out, count = [], [], 0
        passages = (passage for document in documents for passage in _passages(tokens(document), PASSAGE))
        for index, passage in enumerate(passages):
            if index % 16 == 15 and len(held_out) < HELD_OUT:
                held_out.append(passage)
            else:
                kept.append(passage)
                count += len(passage)
            if count >= MOST_TOKENS:
                break
        if count < LEAST_TOKENS:
            raise UserError(f"the corpus has only {count} words and stops: give the teacher more stories to measure by")
        lexicon = Lexicon(kept)
        examples = [next(_passages(passage, EXCERPT)) for passage in held_out or kept[:HELD_OUT]]
        model = NgramModel(lexicon.ids, len(lexicon))
        patterns = NgramModel(lexicon.pattern[lexicon.ids], len(lexicon))
        rubric = cls(lexicon, model, patterns, _phrases(lexicon, examples))
        rubric._set_scales(examples)
        return rubric

    def score(self, opening: str, story: str) -> dict[str, int]:
        """The whole numbers 0..3 for the three criteria."""
        measured = self.measure(opening, story)
        return {name: int(3 * measured[name] + 0.5) for name in CRITERIA}

    def measure(self, opening: str, story: str) -> dict[str, float]:
        """The parts and the three criteria, each in 0..1, the sum of the criteria as `total`, and the count `fresh`."""
        seen = self._see(tokens(opening)[-LONGEST:], tokens(story)[:LONGEST])
        if seen is None:
            return dict.fromkeys((*CRITERIA, "total"), 0.0)
        part = {name: float(ramp(seen[name], *scale).mean()) for name, scale in self._scale.items()}
        part |= {name: float(seen[name]) for name in ("shape", "rhythm", "fresh")}
        fresh = part["fresh"]
        # A small floor, so that even in the worst of texts a repair is seen in the total.
        natural = (part["fluent"] * part["grammatical"] * part["smooth"] * (0.1 + 0.9 * part["reach"])) ** 0.25
        correct = part["known"] * (0.02 + 0.98 * part["formed"]) * (0.02 + 0.98 * part["clean"])
        readability = correct * (0.02 + 0.98 * natural) * ramp(fresh, 1, 25)
        thread = (
            0.25 * part["focus"]
            + 0.15 * part["introduced"]
            + 0.15 * part["referred"]
            + 0.2 * part["order"]
            + 0.15 * part["joined"]
            + 0.1 * part["shape"]
        )
        coherence = thread * part["unlooped"] * ramp(readability, 0, 0.4) * ramp(fresh, 5, 40)
        own = 0.4 * part["varied"] + 0.4 * part["rare"] + 0.2 * part["rhythm"]
        sense = ramp(readability, 0.1, 0.7) * (0.2 + 0.8 * ramp(coherence, 0, 0.6))
        creativity = own * (1 + 2 * part["uncopied"]) / 3 * part["unlooped"] * sense * ramp(fresh, 5, 45)
        criteria = dict(zip(CRITERIA, map(float, (readability, coherence, creativity)), strict=True))
        return part | criteria | {"total": sum(criteria.values())}

    def _set_scales(self, examples: list[list[str]]) -> None:
        """`examples`: unseen stories, as tokens. What they have becomes 1; their ruins, and a babbler's, become 0."""
        lexicon, rng = self.lexicon, np.random.default_rng(0)

        def seen(texts: Iterable[list[str]]) -> list[dict]:
            return [measured for text in texts if (measured := self._see([], text)) is not None]

        good = seen(examples)
        mixed = seen(_shuffled([[token] for token in text], rng) for text in examples)
        reordered = seen(_shuffled([text[a:b] for a, b in sentences(text).bounds], rng) for text in examples)
        weak = seen([lexicon.spellings[id] for id in text] for text in babble(lexicon.spelled, 0, 100, 100))

        def value(group: list[dict], name: str, percent: float) -> float:
            values = [np.atleast_1d(measured[name]) for measured in group] or [np.zeros(1)]
            return float(np.percentile(np.concatenate(values), percent))

        # In nats a token. A corpus that repeats itself is no harder to meet: -2.5 and -2 are enough.
        for name, enough in (("fluent", -2.5), ("grammatical", -2.0)):
            one = min(value(good, name, 25), enough)
            self._scale[name] = (min(value(mixed, name, 50), one - 2), one)
        self._scale |= {
            "smooth": (min(value(mixed, "smooth", 50), 0.9), 0.99),
            "varied": (value(good, "varied", 50) / 2 - 0.01, value(good, "varied", 35)),
            "rare": (value(good, "rare", 50) - 1.5, value(good, "rare", 40)),
            "uncopied": (0.0, max(0.1, value(good, "uncopied", 25))),
        }
        for name in ("reach", "focus", "introduced", "referred", "order", "joined"):
            one = value(good, name, 40)
            zero = value(weak, name, 50)
            if name in ("introduced", "referred", "order", "joined"):
                zero = min(zero, value(reordered, name, 50))
            self._scale[name] = (min(zero, one - 0.1), one)

    def _see(self, before: list[str], after: list[str]) -> dict | None:
        """What the parts are made of, unscaled; None for less than a sentence."""
        words = np.array([token[0].isalpha() for token in after], bool)
        count = int(words.sum())
        if count < 3 or not any(token[0] in ".!?" for token in after):
            return None
        lexicon, start = self.lexicon, len(before)
        ids = lexicon.look_up(before + after)
        story = ids[start:]
        found = sentences(after)
        spans = [(first, end) for first, end in found.bounds if words[first:end].any()]
        lower = [token.lower() for token in after]
        again = _again(self._frame[ids], 4)[start:] | _again(self._skeleton[ids], 7)[start:]
        logprob, jars = (seen[..., start:] for seen in self.model.read(ids))
        pattern, odd = (seen[..., start:] for seen in self.patterns.read(lexicon.pattern[ids]))
        continues = bool(before) and before[-1][0] not in f".!?{CLOSE}"
        content = np.unique(story[lexicon.content[story]])
        openers = [next(word for word in lower[first:end] if word[0].isalpha()) for first, end in spans]
        commonest = max(map(openers.count, openers)) / len(openers)
        ended = after[-1][0] in f".!?{CLOSE}" and not found.unpaired
        pairs = lexicon.place(story)
        place = [float(pairs[first : end - 1].sum()) for first, end in spans]
        return {
            "known": np.mean(story != UNKNOWN),
            "formed": formed(after, found, lexicon.verb[story].tolist(), continues) / count,
            "clean": 1 - slips(after, found, lexicon.may_be_capital[story].tolist()) / count,
            "fluent": _by_sentence(logprob[-1], found.bounds),
            "grammatical": _by_sentence(pattern[-1], found.bounds),
            "smooth": 1 - (jars.mean() + odd.mean()) / 2,
            "reach": (logprob[-1] - logprob[2]).mean(),
            **self._things(ids, start),
            "referred": self._referred(ids, start),
            "order": _order(place),
            "joined": _joined(logprob, spans),
            "shape": 0.4 * any(word in TROUBLE for word in lower) + 0.3 * ended + 0.3 * (ended and place[-1] > 0),
            "unlooped": 1 - again.mean(),
            "fresh": int((words & ~again).sum()),
            "varied": len(np.unique(story[words])) / count**0.7,
            "rare": -np.log(lexicon.frequency[content]).mean() if len(content) else 0.0,
            "rhythm": ramp(count / len(spans), 3, 6) * (ramp(commonest, 0.95, 0.65) if len(spans) > 3 else 1.0),
            "uncopied": 1 - self.phrases.copied(story),
        }

    def _things(self, ids: np.ndarray, start: int) -> dict[str, float]:
        """Whether the story keeps to its things and people, and brings them in as one does."""
        lexicon = self.lexicon
        at = start + np.flatnonzero(lexicon.entity[ids[start:]])
        if not len(at):
            return {"focus": 0.0, "introduced": -1.0}
        mentions = np.bincount(ids[lexicon.entity[ids]])
        new = np.zeros(len(ids), np.int64)
        new[np.unique(ids, return_index=True)[1]] = 1
        logprob = lexicon.brought_in[ids[at], :, lexicon.contexts(ids)[at]]  # (things, known or new)
        row, status = np.arange(len(at)), new[at]
        evidence = np.clip(logprob[row, status] - logprob[row, 1 - status], -3, 3)
        return {"focus": np.mean(mentions[ids[at]] > 1), "introduced": evidence.mean()}

    def _referred(self, ids: np.ndarray, start: int) -> float:
        """How well each he, she, it, they fits one of the last five things named: the mean of the best fits."""
        lexicon = self.lexicon
        recent, fits = [], []
        for at in np.flatnonzero(lexicon.entity[ids] | (lexicon.pronoun[ids] >= 0)).tolist():
            id = int(ids[at])
            which = lexicon.pronoun[id]
            if which < 0:
                if id in recent:
                    recent.remove(id)
                recent.append(id)
                del recent[:-5]
            elif at >= start:
                fits.append(max((lexicon.referred[thing, which] for thing in recent), default=0.0))
        return float(np.mean(fits)) if fits else 0.0


def _passages(spelled: list[str], longest: int) -> Iterator[list[str]]:
    """The tokens in pieces of whole sentences, each at most `longest` long unless a single sentence is longer."""
    if len(spelled) <= longest:
        if spelled:
            yield spelled
        return
    start = end = 0
    for first, last in sentences(spelled).bounds:
        if last - start > longest and first > start:
            yield spelled[start:first]
            start = first
        end = last
    yield spelled[start:end]


def _shuffled(pieces: list[list[str]], rng: np.random.Generator) -> list[str]:
    return [token for at in rng.permutation(len(pieces)) for token in pieces[at]]


def _phrases(lexicon: Lexicon, examples: list[list[str]]) -> Phrases:
    """Of phrases of 8, 12, ... tokens the shortest that unseen stories share little with the corpus: a corpus that
    repeats itself needs longer ones before a repetition is a copy."""
    for n in (8, 12, 16, 24):
        phrases = Phrases(lexicon.ids, n)
        if np.mean([phrases.copied(lexicon.look_up(spelled)) for spelled in examples]) < 0.3:
            break
    return phrases


def _again(ids: np.ndarray, n: int) -> np.ndarray:
    """(T,) bool: the tokens of every n-gram that has occurred before."""
    if len(ids) < n:
        return np.zeros(len(ids), bool)
    keys = hashes(ids, n)
    repeated = np.ones(len(keys), bool)
    repeated[np.unique(keys, return_index=True)[1]] = False
    return np.convolve(repeated, np.ones(n, int)) > 0


def _by_sentence(logprob: np.ndarray, bounds: list[tuple[int, int]]) -> np.ndarray:
    """For each token the mean of its sentence: one sentence that is too easy does not make up for another."""
    starts, ends = np.array(bounds).T
    return np.repeat(np.add.reduceat(logprob, starts) / (ends - starts), ends - starts)


def _order(place: list[float]) -> float:
    """-1..1: whether the sentences stand in the order in which their words usually come in a story."""
    later = np.subtract.outer(place, place)[np.tril_indices(len(place), -1)]
    apart = np.abs(later).sum()
    return float(later.sum() / apart) * min(1.0, (len(place) - 1) / 4) if apart > 0 else 0.0


def _joined(logprob: np.ndarray, spans: list[tuple[int, int]]) -> float:
    """Nats a word by which the beginnings of sentences are likelier after the sentence before than after any stop."""
    gain = logprob[-1] - logprob  # row n: given four tokens against given n; n - 1 in a sentence and the stop before it
    gains = [gain[at + 1, first + at] for first, end in spans[1:] for at in range(min(ORDER - 2, end - first))]
    return float(np.mean(gains)) if gains else -1.0
