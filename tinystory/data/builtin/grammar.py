"""The built-in corpus: a story grammar in the style of TinyStories (Eldan and Li, arXiv
2305.07759).

A plot is a chain of cause and effect in several paragraphs. For each story, facts (characters,
places, things) are drawn first. Then each paragraph is expanded, with a choice among alternative
wordings, so that facts, names and pronouns agree throughout. The plots are in the text files of
this folder. The markup of plots and phrases:

    [a|b]                    one of the options, drawn uniformly
    <a>                      an optional detail: likely in a long story, rare in a short one
    {h}                      a fact of this story (here the hero's name) or a phrase from RULES; {H}
    is capitalised
    x & y = 1 & 2 / 3 & 4    facts x and y, drawn together as one row per story; later facts may use
    earlier ones

The hero is {h}, a {kind} with pronouns {he} {him} {his} {himself}, body parts {hand} {hands}, who
lives {lived}. The friend is {f}, introduced as {f.full} or {f.a}; {mom} is a parent or grandparent;
{g} ({g.a}, {g.hm}) is a helper who gives advice. Hero and friend never share a pronoun, so each
"he" or "she" is unambiguous.
"""

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from tinystory.data.builtin import vocabulary

T = TypeVar("T")
# (kind, content): "text" and the text, "fact" and its name, "choice" and its options, "detail" and
# its parts.
Part: TypeAlias = tuple[str, Any]

PRONOUNS = (  # by she = 0, 1
    {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    {"he": "she", "him": "her", "his": "her", "himself": "herself"},
)
# classes of heroes with a child as the friend
_WITH_CHILDREN = ("child", "robot", "snowman", "toy", "ghost", "puppy")
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
SEGMENT = re.compile(r'\S.*?[.!?]+"?(?=\s|$)')
SHORTEST_OPENING = 12  # words


class Expander:
    """The state of one story: facts, random numbers, probability of details. Only random.random()
    is used, because Python guarantees the sequence of no other method across versions."""

    def __init__(self, rng: random.Random, detail: float):
        self.random = rng.random
        self.detail = detail
        self.facts: dict[str, str] = {}

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def expand(self, parts: list[Part]) -> str:
        """The text of these parts in this story."""
        text = ""
        for kind, content in parts:
            if kind == "text":
                text += content
            elif kind == "choice":
                text += self.expand(self.pick(content))
            elif kind == "fact":
                key = content[0].lower() + content[1:]
                value = self.facts.get(key)
                if value is None:
                    value = self.expand(_RULES[key])
                if content != key:
                    value = value[0].upper() + value[1:]
                text += value
            elif self.random() < self.detail:
                text += self.expand(content)
        return text


def parse(text: str) -> list[Part]:
    """The parts of a text with markup. Brackets must be balanced."""
    one_line = re.sub(r"\s*\n\s*", " ", text.strip())
    tokens = iter(re.findall(r"[\[\]|<>]|\{[^{}]*\}|[^\[\]|<>{}]+", one_line))

    def sequence() -> tuple[list[Part], str]:
        """The parts up to the end of an option or a bracket, and the character that ends them."""
        parts: list[Part] = []
        for token in tokens:
            if token == "[":
                options = []
                end = "|"
                while end == "|":
                    option, end = sequence()
                    options.append(option)
                parts.append(("choice", options))
            elif token == "<":
                parts.append(("detail", sequence()[0]))
            elif token in "|]>":
                return parts, token
            elif token[0] == "{":
                parts.append(("fact", token[1:-1]))
            else:
                parts.append(("text", token))
        return parts, ""

    return sequence()[0]


def table(text: str) -> list[list[list[Part]]]:
    """A table of parsed cells: "a & b / c & d" -> [[a, b], [c, d]]."""
    rows = re.split(r" /\s", re.sub(r"\s+", " ", text.strip()))
    return [list(map(parse, row.split(" & "))) for row in rows]


class _Plot:
    """A plot. Source: "name: classes of heroes", then one "names = rows" per group of facts, a
    blank line, then paragraphs."""

    def __init__(self, source: str):
        head, *paragraphs = re.split(r"\n\s*\n", source.strip())
        title, *facts = re.split(r"\n(?=\S)", head)
        name, heroes = title.split(": ")
        self.name: str = name
        self.heroes = heroes.split()
        self.facts = []
        for fact in facts:
            names, rows = re.split(r" =\s+", fact, maxsplit=1)
            self.facts.append((names.split(" & "), table(rows)))
        self.paragraphs = list(map(parse, paragraphs))

    def generate(self, rng: random.Random) -> tuple[str, dict[str, str]]:
        """A story of this plot, and the facts of the story."""
        length = rng.random()  # cubed below, so that most stories are short
        expander = Expander(rng, 0.8 * length * length * length)
        _cast(expander, self.heroes)
        for names, rows in self.facts:
            for name, cell in zip(names, expander.pick(rows), strict=True):
                expander.facts[name] = expander.expand(cell)
        paragraphs = [expander.expand(paragraph).strip() for paragraph in self.paragraphs]
        text = "\n".join(filter(None, paragraphs))
        single_spaced = re.sub("  +", " ", text)
        return ARTICLE.sub(r"\1n ", single_spaced), expander.facts


def _cast(expander: Expander, classes: list[str]) -> None:
    """Draw the hero, friend, parent and helper, and add them to the facts of the story."""
    facts = expander.facts
    role = expander.pick(classes)
    world = "child" if role == "child" else "wild"
    she = int(expander.random() * 2)
    hero = expander.pick(_HEROES[role])
    kind, home, lived, hand, food = map(expander.expand, hero)
    kind = kind.split("~")[she - 1]
    name = expander.pick(_NAMES[world][she])
    facts.update(PRONOUNS[she], kind=kind, home=home, lived=lived, food=food, h=name)
    facts.update(hand=hand, hands=f"{hand}s")
    facts["h.a"] = f"a {expander.expand(_RULES['little'])} {kind} named {name}"
    facts["h.full"] = name if world == "child" else f"{name} the {kind}"

    world_of_friend = "child"
    friends = _HEROES["child"]
    if role not in _WITH_CHILDREN:
        world_of_friend = "wild"
        friends = [row for row in _HEROES[expander.pick(("paw", "paw", "bird"))] if row is not hero]
    kind_cell, _, _, hand_cell, _ = expander.pick(friends)
    kind = expander.expand(kind_cell).split("~")[-she]
    friend = expander.pick([other for other in _NAMES[world_of_friend][1 - she] if other != name])
    for key, word in PRONOUNS[1 - she].items():
        facts[f"f.{key}"] = word
    facts["f"] = friend
    facts["f.kind"] = kind
    facts["f.a"] = f"a {kind} named {friend}"
    facts["f.full"] = friend if world_of_friend == "child" else f"{friend} the {kind}"
    facts["f.hands"] = f"{expander.expand(hand_cell)}s"

    (parent,) = expander.pick(_PARENTS[world])
    facts["mom"] = expander.expand(parent)
    helper, introduction, interjection = expander.pick(_HELPERS[world])
    facts["g"] = expander.expand(helper)
    facts["g.a"] = expander.expand(introduction)
    facts["g.hm"] = expander.expand(interjection)


_RULES = {name: parse(text) for name, text in vocabulary.RULES.items()}
_HEROES = {role: table(rows) for role, rows in vocabulary.HEROES.items()}
_HELPERS = {world: table(rows) for world, rows in vocabulary.HELPERS.items()}
_PARENTS = {world: table(rows) for world, rows in vocabulary.PARENTS.items()}
CHILDREN = [vocabulary.BOYS.split(), vocabulary.GIRLS.split()]  # by she = 0, 1
_NAMES = {
    "child": CHILDREN,
    "wild": [names + 2 * vocabulary.CREATURES.split() for names in CHILDREN],
}


def source(name: str) -> str:
    """A text file of this folder."""
    return Path(__file__).with_name(f"{name}.txt").read_text("utf-8")


_TEXTS = [source(name) for name in "home town woods magic small".split()]
PLOTS = [_Plot(source) for text in _TEXTS for source in text.split("\n== ")[1:]]


def stories(words: int, seed: int) -> Iterator[str]:
    """Distinct stories with at least `words` whitespace-separated words in all. The same seed gives
    the same bytes."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while words > 0:
        story, _ = generate(rng)
        if story not in seen:
            seen.add(story)
            words -= len(story.split())
            yield story


def generate(rng: random.Random) -> tuple[str, dict[str, str]]:
    """A story of a random plot, and the facts of the story."""
    return PLOTS[int(rng.random() * len(PLOTS))].generate(rng)


def segments(story: str) -> list[str]:
    """The segments of a story, each up to an end mark and a quotation mark after that: '"Look!" said
    Pip.' has two segments."""
    return SEGMENT.findall(story.replace("\n", " "))


def opening(story: str, facts: dict[str, str]) -> str:
    """The first sentences of a story, up to the hero's name and at least SHORTEST_OPENING words:
    who, where, and the problem."""
    text, *rest = segments(story)
    for sentence in rest:
        if len(text.split()) >= SHORTEST_OPENING and facts["h"] in text:
            break
        text += f" {sentence}"
    return text
