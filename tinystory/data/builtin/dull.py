"""The corpus `dull`: deliberately monotonous filler text, which opens as the stories do and then
tells no story.

Most text that a child hears, or that a BabyLM reads, is not a story: talk and errands, lists,
repetitions, picture books. The templates in dull.txt generate five styles: a routine, a list of
objects, two characters who talk about nothing, a repeated sentence, and a picture described to a
child, in the child-directed speech that CHILDES records. All dull text is grammatical, uses the
names, settings and food of the stories, and is more predictable than a story. So for a student of
both corpora (`--corpus builtin dull`), the dull continuation of an opening is the likelier one, and
only a teacher's score shows that stories are better."""

import random
import re
from collections import Counter
from collections.abc import Iterator

from tinystory.data.builtin import grammar

KEPT = 0.85  # probability of each sentence; the first and the last sentence always occur
STORY = "story"  # the style of texts without the sentences of dull.txt


class _Style:
    """A style of dull text. Source: the name of the style, one "name = values" per additional fact,
    then a sentence per line."""

    def __init__(self, source: str):
        self.name, *lines = source.strip().split("\n")
        self.facts = {}
        self.sentences = []
        for line in lines:
            if " = " in line:
                name, values = line.split(" = ", maxsplit=1)
                self.facts[name] = [cell for (cell,) in grammar.table(values)]
            else:
                self.sentences.append(grammar.parse(line))
        self.pattern = re.compile("|".join(map(self._pattern, self.sentences)))

    def continuation(self, rng: random.Random, facts: dict[str, str]) -> str:
        """The continuation of an opening with these facts."""
        expander = grammar.Expander(rng, 0.0)
        expander.facts.update(facts)
        for name, values in self.facts.items():
            expander.facts[name] = expander.expand(expander.pick(values))
        sentences = []
        for i, sentence in enumerate(self.sentences):
            is_end = i in (0, len(self.sentences) - 1)
            if is_end or rng.random() < KEPT:
                sentences.append(sentence)
        text = " ".join(map(expander.expand, sentences))
        return grammar.ARTICLE.sub(r"\1n ", text)

    def _pattern(self, parts: list[grammar.Part]) -> str:
        """A regular expression that matches a sentence with any facts; a fact is one word or
        several."""
        pattern = ""
        for kind, content in parts:
            if kind == "text":
                pattern += re.escape(content)
            elif kind == "fact" and content not in self.facts:
                pattern += r"[\w' ]+"
            else:
                options = self.facts[content] if kind == "fact" else content
                patterns = "|".join(map(self._pattern, options))
                pattern += f"(?:{patterns})"
        return pattern


_DULL_STYLES = [_Style(source) for source in grammar.source("dull").split("\n== ")[1:]]
STYLES = (STORY, *(style.name for style in _DULL_STYLES))


def documents(words: int, seed: int) -> Iterator[str]:
    """Dull documents with at least `words` whitespace-separated words in all. The same seed gives
    the same bytes."""
    rng = random.Random(f"dull {seed}")
    while words > 0:
        story, facts = grammar.generate(rng)
        style = _DULL_STYLES[int(rng.random() * len(_DULL_STYLES))]
        opening = grammar.opening(story, facts)
        if opening.count('"') % 2 == 0:  # nobody is still speaking
            document = f"{opening} {style.continuation(rng, facts)}"
            words -= len(document.split())
            yield document


def style_of(story: str) -> str:
    """The style, one of STYLES, of a continuation of an opening. A dull style must match more
    sentences than there are sentences that match no style; otherwise the text is a STORY."""
    styles = Counter(map(_style_of_sentence, grammar.segments(story)))
    return max(STYLES, key=styles.__getitem__)


def _style_of_sentence(sentence: str) -> str:
    for style in _DULL_STYLES:
        if style.pattern.fullmatch(sentence):
            return style.name
    return STORY
