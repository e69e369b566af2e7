"""The built-in corpus: a story grammar in the manner of TinyStories (Eldan and Li, arXiv 2305.07759).

Each plot is a chain of cause and effect told in beats; a story draws its characters and the facts of its world once,
then tells each beat in one of several ways, so that facts, names and pronouns agree from the first line to the last.
The markup of plots and phrases:

    [a|b]    one of these              {h}     a fact of this story (hero) or a phrase from RULES; {H} begins a sentence
    <a>      a detail a long story     x & y = 1 & 2 / 3 & 4    facts drawn together, once a story; later facts may use
             tells, a short one skips                           earlier ones

The hero is {h}, a {kind} with {he} {him} {his} {himself} {hand} {hands}, living {lived}; the friend is {f}, at first
mention {f.full} or {f.a}; {mom} is a parent or grandparent and {g} ({g.a}, {g.hm}) someone who knows things. Hero and
friend are never both "he" or both "she", so a pronoun has one meaning.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator

from tinystory.data.builtin import home, magic, small, town, vocabulary, woods

_PRONOUNS = ({"he": "she", "him": "her", "his": "her", "himself": "herself"},
             {"he": "he", "him": "him", "his": "his", "himself": "himself"})  # fmt: skip
_WITH_CHILDREN = ("child", "robot", "snowman", "toy", "ghost", "puppy")  # heroes whose friend is a child
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
_WORD = re.compile(r"(?<!')[a-z]+(?:'[a-z]+)*")


class _Slot:
    """{fact} or {phrase}; a capital first letter asks for one."""

    def __init__(self, key: str):
        self.key, self.capital = key[0].lower() + key[1:], key[0].isupper()

    def write(self, tell: _Telling, out: list[str]) -> None:
        value = tell.facts.get(self.key)
        if value is None:
            value = tell.expand(_RULES[self.key])
        out.append(value[0].upper() + value[1:] if self.capital else value)


class _Choice:
    """[a|b|c]"""

    def __init__(self, options: list[list]):
        self.options = options

    def write(self, tell: _Telling, out: list[str]) -> None:
        tell.write(self.options[int(tell.random() * len(self.options))], out)


class _Detail:
    """<a>"""

    def __init__(self, parts: list):
        self.parts = parts

    def write(self, tell: _Telling, out: list[str]) -> None:
        if tell.random() < tell.detail:
            tell.write(self.parts, out)


class _Telling:
    """One story being told: its facts and its dice. Only random.random() is used, whose sequence Python guarantees."""

    def __init__(self, rng: random.Random, detail: float):
        self.random, self.detail, self.facts = rng.random, detail, {}

    def pick(self, options):
        return options[int(self.random() * len(options))]

    def write(self, parts: list, out: list[str]) -> None:
        for part in parts:
            if part.__class__ is str:
                out.append(part)
            else:
                part.write(self, out)

    def expand(self, parts: list) -> str:
        out: list[str] = []
        self.write(parts, out)
        return "".join(out)


def _parse(text: str) -> list:
    """Markup -> parts: str, _Slot, _Choice, _Detail."""
    tokens = re.findall(r"[\[\]|<>]|\{[^{}]*\}|[^\[\]|<>{}]+", re.sub(r"\s*\n\s*", " ", text.strip()))

    def sequence(position: int, stops: str) -> tuple[list, int]:
        parts: list = []
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


def _rows(text: str) -> list[list[list]]:
    """Rows of a table: "a & b / c & d" -> [[a, b], [c, d]], each cell parsed."""
    return [[_parse(cell) for cell in row.split(" & ")] for row in re.split(r" /\s", re.sub(r"\s+", " ", text.strip()))]


class _Plot:
    """== name: classes of hero; then facts, one "names = rows" each; a blank line; then paragraphs."""

    def __init__(self, source: str):
        head, *paragraphs = re.split(r"\n\s*\n", source.strip())
        title, *facts = re.split(r"\n(?=\S)", head)
        self.name, heroes = title.split(": ")
        self.heroes = heroes.split()
        pairs = (re.split(r" =\s+", fact, maxsplit=1) for fact in facts)
        self.facts = [(names.split(" & "), _rows(rows)) for names, rows in pairs]
        self.paragraphs = [_parse(paragraph) for paragraph in paragraphs]

    def tell(self, rng: random.Random) -> tuple[str, dict[str, str]]:
        """One story and its facts."""
        patience = rng.random()  # most stories are told briefly
        tell = _Telling(rng, 0.8 * patience * patience * patience)
        _cast(tell, self.heroes)
        for names, rows in self.facts:
            for name, cell in zip(names, tell.pick(rows), strict=True):
                tell.facts[name] = tell.expand(cell)
        paragraphs = [tell.expand(paragraph).strip() for paragraph in self.paragraphs]
        text = "\n".join(filter(None, paragraphs))
        return _ARTICLE.sub(r"\1n ", re.sub("  +", " ", text)), tell.facts


def _cast(tell: _Telling, classes: list[str]) -> None:
    """Draw hero, friend, parent and helper into the story's facts."""
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
PLOTS = [_Plot(source) for room in (home, town, woods, magic, small)
         for source in room.PLOTS.split("\n== ")[1:]]  # fmt: skip


def _literals(parts) -> Iterator[str]:
    """Every piece of plain text below parts."""
    if isinstance(parts, str):
        yield parts
    elif isinstance(parts, _Choice):
        yield from _literals(parts.options)
    elif isinstance(parts, _Detail):
        yield from _literals(parts.parts)
    elif not isinstance(parts, _Slot):
        for part in parts:
            yield from _literals(part)


def _vocabulary() -> frozenset[str]:
    tables = [_RULES.values(), *_HEROES.values(), *_HELPERS.values(), *_PARENTS.values()]
    tables += [[rows for _, rows in plot.facts] + plot.paragraphs for plot in PLOTS]
    literals = [f"{hand}s" for rows in _HEROES.values() for row in rows for hand in _literals(row[3])]
    names = {name for names in _NAMES["wild"] for name in names}
    literals += [*_literals(tables), *(word for pronouns in _PRONOUNS for word in pronouns.values())]
    literals += [*names, *(f"{name}'s" for name in names)]
    return frozenset(_WORD.findall(" ".join(literals).lower()))


VOCABULARY: frozenset[str] = _vocabulary()


def stories(words: int, seed: int) -> Iterator[str]:
    """Stories, no two alike, until at least `words` whitespace-separated words were told. Same seed, same bytes."""
    rng = random.Random(seed)
    told: set[bytes] = set()
    while words > 0:
        story, _ = PLOTS[int(rng.random() * len(PLOTS))].tell(rng)
        mark = hashlib.blake2b(story.encode(), digest_size=8).digest()  # a wrong match just skips a story
        if mark in told:
            continue
        told.add(mark)
        words -= len(story.split())
        yield story
