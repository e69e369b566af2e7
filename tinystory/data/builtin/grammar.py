"""The built-in corpus: a story grammar in the style of TinyStories (Eldan and Li, arXiv 2305.07759).

A plot is a chain of cause and effect in several paragraphs. A story first draws its facts (characters, places, things),
then expands each paragraph, choosing among alternative wordings, so that facts, names and pronouns agree throughout.
The plots stand in the text files beside this one. The markup of plots and phrases:

    [a|b]                    one of the options, drawn uniformly
    <a>                      an optional detail: likely in a long story, rare in a short one
    {h}                      a fact of this story (here the hero's name) or a phrase from RULES; {H} is capitalised
    x & y = 1 & 2 / 3 & 4    facts x and y, drawn together as one row per story; later facts may use earlier ones

The hero is {h}, a {kind} with pronouns {he} {him} {his} {himself}, body parts {hand} {hands}, who lives {lived}. The
friend is {f}, introduced as {f.full} or {f.a}; {mom} is a parent or grandparent; {g} ({g.a}, {g.hm}) is a helper who
gives advice. Hero and friend never share a pronoun, so each "he" or "she" is unambiguous.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

from tinystory.data.builtin import vocabulary

T = TypeVar("T")
_Part: TypeAlias = "str | _Slot | _Choice | _Detail"

_PRONOUNS = ({"he": "she", "him": "her", "his": "her", "himself": "herself"},
             {"he": "he", "him": "him", "his": "his", "himself": "himself"})  # fmt: skip
_WITH_CHILDREN = ("child", "robot", "snowman", "toy", "ghost", "puppy")  # classes of heroes whose friend is a child
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


class _Slot:
    """{fact} or {phrase}; a capital first letter capitalises the text."""

    def __init__(self, key: str):
        self.key, self.capital = key[0].lower() + key[1:], key[0].isupper()

    def write(self, tell: _Telling, out: list[str]) -> None:
        value = tell.facts.get(self.key)
        if value is None:
            value = tell.expand(_RULES[self.key])
        out.append(value[0].upper() + value[1:] if self.capital else value)


class _Choice:
    """[a|b|c]: one of the options."""

    def __init__(self, options: list[list[_Part]]):
        self.options = options

    def write(self, tell: _Telling, out: list[str]) -> None:
        tell.write(self.options[int(tell.random() * len(self.options))], out)


class _Detail:
    """<a>: an optional detail."""

    def __init__(self, parts: list[_Part]):
        self.parts = parts

    def write(self, tell: _Telling, out: list[str]) -> None:
        if tell.random() < tell.detail:
            tell.write(self.parts, out)


class _Telling:
    """The state of one story: facts, random numbers, probability of details. It uses only random.random(), the one
    method whose sequence Python guarantees across versions."""

    def __init__(self, rng: random.Random, detail: float):
        self.random, self.detail = rng.random, detail
        self.facts: dict[str, str] = {}

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def write(self, parts: list[_Part], out: list[str]) -> None:
        for part in parts:
            if isinstance(part, str):
                out.append(part)
            else:
                part.write(self, out)

    def expand(self, parts: list[_Part]) -> str:
        out: list[str] = []
        self.write(parts, out)
        return "".join(out)


def _parse(text: str) -> list[_Part]:
    """Markup as a list of parts. Raises ValueError for unbalanced brackets."""
    tokens = re.findall(r"[\[\]|<>]|\{[^{}]*\}|[^\[\]|<>{}]+", re.sub(r"\s*\n\s*", " ", text.strip()))

    def sequence(position: int, stops: str) -> tuple[list[_Part], int]:
        parts: list[_Part] = []
        while position < len(tokens) and tokens[position] not in stops:
            token = tokens[position]
            position += 1
            if token == "[":
                options = []
                while True:
                    option, position = sequence(position, "|]")
                    options.append(option)
                    position += 1
                    if tokens[position - 1] == "]":
                        break
                parts.append(_Choice(options))
            elif token == "<":
                detail, position = sequence(position, ">")
                position += 1
                parts.append(_Detail(detail))
            elif token[0] == "{":
                parts.append(_Slot(token[1:-1]))
            elif token in "]|>":
                raise ValueError(f"stray {token} after {tokens[max(0, position - 4) : position]}")
            else:
                parts.append(token)
        if stops and position == len(tokens):
            raise ValueError(f"no {stops[-1]} in {text[:60]!r}")
        return parts, position

    return sequence(0, "")[0]


def _rows(text: str) -> list[list[list[_Part]]]:
    """A table of parsed cells: "a & b / c & d" -> [[a, b], [c, d]]."""
    return [[_parse(cell) for cell in row.split(" & ")] for row in re.split(r" /\s", re.sub(r"\s+", " ", text.strip()))]


class _Plot:
    """Source: "name: classes of heroes", then one "names = rows" per group of facts, a blank line, then paragraphs."""

    def __init__(self, source: str):
        head, *paragraphs = re.split(r"\n\s*\n", source.strip())
        title, *facts = re.split(r"\n(?=\S)", head)
        name, heroes = title.split(": ")
        self.name: str = name
        self.heroes = heroes.split()
        pairs = (re.split(r" =\s+", fact, maxsplit=1) for fact in facts)
        self.facts = [(names.split(" & "), _rows(rows)) for names, rows in pairs]
        self.paragraphs = [_parse(paragraph) for paragraph in paragraphs]

    def tell(self, rng: random.Random) -> tuple[str, dict[str, str]]:
        """One story and its facts."""
        length = rng.random()  # cubed below, so that most stories are short
        tell = _Telling(rng, 0.8 * length * length * length)
        _cast(tell, self.heroes)
        for names, rows in self.facts:
            for name, cell in zip(names, tell.pick(rows), strict=True):
                tell.facts[name] = tell.expand(cell)
        paragraphs = [tell.expand(paragraph).strip() for paragraph in self.paragraphs]
        text = "\n".join(filter(None, paragraphs))
        return ARTICLE.sub(r"\1n ", re.sub("  +", " ", text)), tell.facts


def _cast(tell: _Telling, classes: list[str]) -> None:
    """Draw the hero, friend, parent and helper, and add them to the facts of the story."""
    facts, role = tell.facts, tell.pick(classes)
    she = int(tell.random() * 2)
    row = tell.pick(_HEROES[role])
    kind, home, lived, hand, food = (tell.expand(cell) for cell in row)
    facts.update(_PRONOUNS[1 - she], kind=kind.split("~")[she - 1], home=home, lived=lived, hand=hand, hands=hand + "s")
    facts.update(food=food, h=tell.pick(_NAMES[role if role == "child" else "wild"][she]))

    facts["h.a"] = f"a {tell.expand(_RULES['little'])} {facts['kind']} named {facts['h']}"
    facts["h.full"] = facts["h"] if role == "child" else f"{facts['h']} the {facts['kind']}"

    friend = "child" if role in _WITH_CHILDREN else tell.pick(("paw", "paw", "bird"))
    other = tell.pick([r for r in _HEROES[friend] if r is not row or friend == "child"])
    f_kind = tell.expand(other[0]).split("~")[-she]
    f = tell.pick([name for name in _NAMES["child" if friend == "child" else "wild"][1 - she] if name != facts["h"]])
    facts.update({"f." + key: word for key, word in _PRONOUNS[she].items()})
    facts.update({"f": f, "f.kind": f_kind, "f.the": f"the {f_kind}", "f.a": f"a {f_kind} named {f}"})
    f_hand = tell.expand(other[3])
    facts.update({"f.full": f if friend == "child" else f"{f} the {f_kind}", "f.hand": f_hand, "f.hands": f_hand + "s"})

    world = "child" if role == "child" else "wild"
    facts["mom"] = tell.expand(tell.pick(_PARENTS[world])[0])
    for key, cell in zip(("g", "g.a", "g.hm"), tell.pick(_HELPERS[world]), strict=True):
        facts[key] = tell.expand(cell)


_RULES = {name: _parse(text) for name, text in vocabulary.RULES.items()}
_HEROES = {role: _rows(rows) for role, rows in vocabulary.HEROES.items()}
_HELPERS = {world: _rows(rows) for world, rows in vocabulary.HELPERS.items()}
_PARENTS = {world: _rows(rows) for world, rows in vocabulary.PARENTS.items()}
_CHILDREN = [vocabulary.BOYS.split(), vocabulary.GIRLS.split()]  # by she = 0, 1
_NAMES = {"child": _CHILDREN, "wild": [names + 2 * vocabulary.CREATURES.split() for names in _CHILDREN]}
_TEXTS = [Path(__file__).with_name(f"{name}.txt").read_text("utf-8") for name in "home town woods magic small".split()]
PLOTS = [_Plot(source) for text in _TEXTS for source in text.split("\n== ")[1:]]


def stories(words: int, seed: int) -> Iterator[str]:
    """Distinct stories, until they have at least `words` whitespace-separated words. Same seed, same bytes."""
    rng = random.Random(seed)
    seen: set[bytes] = set()
    while words > 0:
        story, _ = PLOTS[int(rng.random() * len(PLOTS))].tell(rng)
        digest = hashlib.blake2b(story.encode(), digest_size=8).digest()  # a collision merely skips a story
        if digest in seen:
            continue
        seen.add(digest)
        words -= len(story.split())
        yield story
