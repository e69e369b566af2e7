"""The corpus `dull`: deliberately monotonous filler text, which opens as the stories do and then
tells no story.

Most text that a child hears, or that a BabyLM reads, is not a story: talk and errands, lists,
repetitions, picture books. The templates in dull.txt generate five styles ("tellers"): a routine, a
list of objects, two characters who talk about nothing, a repeated sentence, and a picture described
to a child, in the child-directed speech that CHILDES records. All dull text is grammatical, uses
the names, settings and food of the stories, and is more predictable than a story. So for a student
of both corpora (`--corpus builtin dull`), the dull continuation of an opening is the likelier one,
and only a teacher's score shows that stories are better."""

import random
import re
from collections import Counter
from collections.abc import Iterator

from tinystory.data.builtin import grammar

TOLD = 0.85  # probability of each sentence; the first and the last sentence always occur
STORY = "story"  # the style of texts without the sentences of dull.txt


class _Teller:
    """A style of dull text. Source: the name of the style, one "name = values" per additional fact,
    then a sentence per line."""

    def __init__(self, source: str):
        self.kind, *lines = source.strip().split("\n")
        self.facts = {}
        self.sentences = []
        for line in lines:
            if " = " in line:
                name, values = line.split(" = ", maxsplit=1)
                self.facts[name] = [cell for (cell,) in grammar.table(values)]
            else:
                self.sentences.append(grammar.parse(line))
        self.pattern = re.compile("|".join(map(self._pattern, self.sentences)))

    def tell(self, rng: random.Random, facts: dict[str, str]) -> str:
        """The continuation of an opening with these facts."""
        telling = grammar.Telling(rng, 0.0)
        telling.facts.update(facts)
        for name, values in self.facts.items():
            telling.facts[name] = telling.expand(telling.pick(values))
        sentences = []
        for i, sentence in enumerate(self.sentences):
            is_end = i in (0, len(self.sentences) - 1)
            if is_end or rng.random() < TOLD:
                sentences.append(sentence)
        text = " ".join(map(telling.expand, sentences))
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


_TELLERS = [_Teller(source) for source in grammar.source("dull").split("\n== ")[1:]]
KINDS = (STORY, *(teller.kind for teller in _TELLERS))


def documents(words: int, seed: int) -> Iterator[str]:
    """Dull documents with at least `words` whitespace-separated words in all. The same seed gives
    the same bytes."""
    rng = random.Random(f"dull {seed}")
    while words > 0:
        story, facts = grammar.tell(rng)
        teller = _TELLERS[int(rng.random() * len(_TELLERS))]
        opening = grammar.opening(story, facts)
        if opening.count('"') % 2 == 0:  # nobody is still speaking
            document = f"{opening} {teller.tell(rng, facts)}"
            words -= len(document.split())
            yield document


def kind_of(story: str) -> str:
    """The style, one of KINDS, of a continuation of an opening. A dull style must match more of the
    sentences than the number of sentences that match no style; otherwise the text is a STORY."""
    kinds = Counter(map(_kind_of_sentence, grammar.sentences(story)))
    return max(KINDS, key=kinds.__getitem__)


def _kind_of_sentence(sentence: str) -> str:
    for teller in _TELLERS:
        if teller.pattern.fullmatch(sentence):
            return teller.kind
    return STORY
