"""Surface features of a text: tokens, sentences, quotations, slips."""

import re
from typing import NamedTuple

TOKEN = re.compile(r"[^\W\d_]+(?:['-](?!s\b)[^\W\d_]+)*|'s\b|\d+|\.\.\.|[.!?]+|[^\w\s]|_")
OPEN = "\u201c"  # quotation marks, as tokens
CLOSE = "\u201d"
END_MARKS = ".!?"
_OPENING = re.compile(r'(?<![^\s(\[-])"(?=\S)')
# Typographic quotation marks, apostrophes and dashes.
_PLAIN = str.maketrans("\u201e\u00ab\u00bb\u2018\u2019\u2013\u2014", f"{OPEN}{OPEN}{CLOSE}''--")
LONGEST_SENTENCE = 30  # words; a longer one is a run-on sentence

# Words that a child's story may say twice: "very very big", "knock knock".
MAY_DOUBLE = frozenset(
    "very so really ha no yes had that bye knock tick hop la quack woof meow beep long".split()
)
DISAGREEMENTS = frozenset(
    "he are/he am/she are/she am/it are/it am/they is/they was/they has/they am/"
    "we is/we was/we has/we am/i is/i are/i has".split("/")
)


def tokenize(text: str) -> list[str]:
    """Tokens of a text: words ('s is separate), numbers, end marks and single other characters.
    Typographic marks become plain, but opening quotation marks (after a space and not before one)
    stay distinct from closing ones."""
    plain = text.translate(_PLAIN).replace("\u2026", "...")
    opened = _OPENING.sub(OPEN, plain)
    return TOKEN.findall(opened.replace('"', CLOSE))


class Sentences(NamedTuple):
    bounds: list[tuple[int, int]]  # first token and one past the last token of each sentence
    # for each token: within quotation marks (the opening mark counts, the closing one does not)
    quoted: list[bool]
    unpaired: int  # quotation marks that close nothing, open within a quotation, or stay open


def find_sentences(tokens: list[str]) -> Sentences:
    """The sentences of a text. A sentence ends at . ! ? and includes a closing quotation mark after
    that. It continues before words such as "asked the fish"."""
    bounds: list[tuple[int, int]] = []
    quoted: list[bool] = []
    unpaired = 0
    inside = False  # quotation marks
    start = 0
    for at, token in enumerate(tokens):
        if token == OPEN:
            unpaired += inside
            inside = True
        elif token == CLOSE:
            unpaired += not inside
            inside = False
        quoted.append(inside)

        following = tokens[at + 1] if at + 1 < len(tokens) else ""
        ends_quotation = token == CLOSE and at > start and tokens[at - 1][0] in END_MARKS
        ends_plainly = token[0] in END_MARKS and following != CLOSE
        may_go_on = ends_quotation or token == "..."
        goes_on = may_go_on and following[:1].islower()
        if (ends_quotation or ends_plainly) and not goes_on:
            bounds.append((start, at + 1))
            start = at + 1
    if start < len(tokens):  # the last sentence is cut short, and so may be its quotation
        bounds.append((start, len(tokens)))
    else:
        unpaired += inside
    return Sentences(bounds, quoted, unpaired)


def well_formed_words(
    tokens: list[str], sentences: Sentences, verb: list[bool], continues: bool
) -> int:
    """The number of words in sentences with a capital, an end mark, a verb and 3 to
    LONGEST_SENTENCE words, or in short quotations ("Oh, no!"). The last sentence may be cut short.
    continues: whether the first sentence continues the opening."""
    count = 0
    for first, end in sentences.bounds:
        words = [at for at in range(first, end) if tokens[at][0].isalpha()]
        if not words or len(words) > LONGEST_SENTENCE:
            continue
        capital = tokens[words[0]][0].isupper()
        begun_in_opening = continues and first == 0
        if not (capital or begun_in_opening):
            continue
        ended = ends_sentence(tokens[end - 1])
        cut_short = end == len(tokens) and not ended
        cry = sentences.quoted[words[0]] and len(words) <= 5
        clause = len(words) >= 3 and any(verb[first:end])
        if cut_short or (ended and (cry or clause)):
            count += len(words)
    return count


def ends_sentence(token: str) -> bool:
    """Whether the token is an end mark or a closing quotation mark."""
    return token[0] in END_MARKS or token == CLOSE


def count_slips(tokens: list[str], sentences: Sentences, may_be_capital: list[bool]) -> float:
    """The number of slips: a/an, "they was", doubled words, odd capitals, stray punctuation,
    unclosed quotations."""
    count = 2.0 * sentences.unpaired
    last = ""
    last_is_word = False
    for at, token in enumerate(tokens):
        word = token.lower()
        is_word = token[0].isalpha()
        if is_word:
            doubled = word == last and word not in MAY_DOUBLE
            disagrees = f"{last} {word}" in DISAGREEMENTS
            if doubled or disagrees or token == "i" or _wrong_article(last, word):
                count += 1
            capital = token[0].isupper() and word != "i"
            if capital and last_is_word and not may_be_capital[at]:
                count += 0.5
        elif last == OPEN:
            count += 1
        elif at and not last_is_word and last != CLOSE and token not in (OPEN, CLOSE):
            count += 1  # two punctuation marks in a row
        last = word
        last_is_word = is_word
    return count


def _wrong_article(article: str, word: str) -> bool:
    if article == "a":
        return word[0] in "aeio" and not word.startswith(("one", "once", "eu"))
    return article == "an" and word[0] not in "aeiouh"
