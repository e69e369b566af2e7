"""Surface features of a text: tokens, sentences, quotations, slips."""

import re
from typing import NamedTuple

TOKEN = re.compile(r"[^\W\d_]+(?:['-](?!s\b)[^\W\d_]+)*|'s\b|\d+|\.\.\.|[.!?]+|[^\w\s]|_")
OPEN, CLOSE = "\u201c", "\u201d"  # quotation marks, as tokens
_OPENING = re.compile(r'(?<![^\s(\[-])"(?=\S)')
# Typographic quotation marks, apostrophes, dashes and dots.
_PLAIN = str.maketrans("\u201e\u00ab\u00bb\u2018\u2019\u2013\u2014", f"{OPEN}{OPEN}{CLOSE}''--") | {
    0x2026: "..."
}
LONGEST_SENTENCE = 30  # words; a longer one is a run-on sentence

# Words that a child's story may say twice: "very very big", "knock knock".
MAY_DOUBLE = frozenset(
    "very so really ha no yes had that bye knock tick hop la quack woof meow beep long".split()
)
DISAGREEMENTS = frozenset(
    [f"{subject} {verb}" for subject in ("he", "she", "it") for verb in ("are", "am")]
    + [f"{subject} {verb}" for subject in ("they", "we") for verb in ("is", "was", "has", "am")]
    + [f"i {verb}" for verb in ("is", "are", "has")]
)


def tokenize(text: str) -> list[str]:
    """Words ('s apart), numbers, end marks and single other characters. Typographic marks become
    plain, but quotation marks that open (after a space, before none) stay distinct from those that
    close."""
    return TOKEN.findall(_OPENING.sub(OPEN, text.translate(_PLAIN)).replace('"', CLOSE))


class Sentences(NamedTuple):
    bounds: list[tuple[int, int]]  # first token and one past the last
    # for each token: within quotation marks (the opening mark counts, the closing one does not)
    quoted: list[bool]
    unpaired: int  # quotation marks that close nothing, open within a quotation, or stay open


def split_sentences(tokens: list[str]) -> Sentences:
    """A sentence ends at . ! ? and includes a closing quotation mark after it, but goes on before
    "asked the fish"."""
    bounds, quoted, inside, start, unpaired = [], [], False, 0, 0
    for at, token in enumerate(tokens):
        if token in (OPEN, CLOSE):
            unpaired += inside == (token == OPEN)
            inside = token == OPEN
        quoted.append(inside)
        closes = token == CLOSE and at > start and tokens[at - 1][0] in ".!?"
        if not closes and (token[0] not in ".!?" or tokens[at + 1 : at + 2] == [CLOSE]):
            continue
        goes_on = (
            (closes or token == "...") and at + 1 < len(tokens) and tokens[at + 1][0].islower()
        )
        if not goes_on:
            bounds.append((start, at + 1))
            start = at + 1
    unpaired += inside and start == len(tokens)
    if start < len(tokens):
        bounds.append((start, len(tokens)))
    return Sentences(bounds, quoted, unpaired)


def well_formed_words(
    tokens: list[str], sentences: Sentences, verb: list[bool], continues: bool
) -> int:
    """Words in sentences with a capital, an end mark, a verb and 3 to LONGEST_SENTENCE words, or in
    short quotations ("Oh, no!"). The last sentence may be cut short. continues: the first one
    continues the opening."""
    count = 0
    for first, end in sentences.bounds:
        words = [at for at in range(first, end) if tokens[at][0].isalpha()]
        if not words or len(words) > LONGEST_SENTENCE:
            continue
        capital = tokens[words[0]][0].isupper() or (first == 0 and continues)
        ended = tokens[end - 1][0] in f".!?{CLOSE}"
        cut = end == len(tokens) and not ended
        spoken = sentences.quoted[words[0]] and len(words) <= 5
        if capital and (cut or (ended and (spoken or (len(words) >= 3 and any(verb[first:end]))))):
            count += len(words)
    return count


def count_slips(tokens: list[str], sentences: Sentences, may_be_capital: list[bool]) -> float:
    """Count a/an, "they was", doubled words, odd capitals, stray punctuation, unclosed
    quotations."""
    count = 2.0 * sentences.unpaired
    last, last_is_word = "", False
    for at, token in enumerate(tokens):
        word, is_word = token.lower(), token[0].isalpha()
        if is_word:
            doubled = last == word and word not in MAY_DOUBLE
            vowel = word[0] in "aeio" and not word.startswith(("one", "once", "eu"))
            article = (last == "a" and vowel) or (last == "an" and word[0] not in "aeiouh")
            if doubled or article or token == "i" or f"{last} {word}" in DISAGREEMENTS:
                count += 1
            if last_is_word and token[0].isupper() and not may_be_capital[at] and word != "i":
                count += 0.5
        elif last == OPEN or (
            at and not last_is_word and last != CLOSE and word not in (OPEN, CLOSE)
        ):
            count += 1  # two punctuation marks in a row
        last, last_is_word = word, is_word
    return count
