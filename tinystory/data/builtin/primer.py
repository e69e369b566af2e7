"""The primer: very plain tales of two or three characters and their things, which teach a small
student coreference.

Repeated names, and the pronouns that refer to them, are a fortieth of a story's tokens: too few for
a student of a million parameters, among everything else that there is to learn. Here they are
nearly all that there is to learn, as in first readers for children. Mixed with stories (`--corpus
primer builtin`), the coreference learned here transfers.
"""

import random
from collections.abc import Iterator

from tinystory.data.builtin import grammar, vocabulary

CREATURES = vocabulary.CREATURES.split()
KINDS = "fox rabbit bear mouse squirrel hedgehog otter mole raccoon kitten puppy duck owl robin sparrow".split()
THINGS = "ball kite boat drum hat cake shell lamp book bell cup box spoon leaf stone egg pie rope jar coat".split()
COLORS = "red blue green yellow white brown little big old new".split()
FOODS = "honey carrots cheese nuts apples berries soup bread pancakes corn".split()
PLACES = (
    "by the pond/under the tree/in the garden/on the hill/by the fire/in the kitchen/near the river/at the gate"
).split("/")

# {a} and {b} are two of the characters; {he}, {him}, {his}, {kind} and {thing} are a's.
INTRODUCTIONS = (
    "{a} was a {kind}. {He} had a {color} {thing}.",
    "There was a {kind} named {a}. {He} had a {color} {thing}.",
    "Here is a {kind}. {His} name is {a}. {He} has a {color} {thing}.",
    "Once there was a {kind} named {a}. {a} had a {color} {thing}, and {he} loved {his} {thing}.",
    "Once upon a time, there was a little {kind} called {a}. {He} liked {food}.",
)
EVENTS = (
    "{a} sat {place}. {He} ate some {food}.",
    '"Where is my {thing}?" said {a}. "Here is your {thing}," said {b}.',
    "Who had the {thing}? {a} had the {thing}.",
    "{a} gave the {thing} to {b}. Then {b} gave it back to {a}.",
    '"I like {food}," said {a}. So {b} gave {him} some {food}.',
    "{b} looked for {a}. {He} was {place}.",
    "Then {a} put {his} {thing} {place}.",
    '"Come and play, {a}," said {b}. And {a} came with {his} {thing}.',
    "{a} was happy, for {he} had {his} {thing}.",
    '{a} and {b} went to play {place}. "Look, {b}!" said {a}.',
    "One day, {a} lost {his} {thing}. {b} helped {him} look. The {thing} was {place}.",
    '"Thank you, {b}," said {a}. {He} gave {b} a hug.',
)


def tales(words: int, seed: int) -> Iterator[str]:
    """Tales of 30 to 170 words, until they have at least `words` whitespace-separated words. Only
    random.random() is used, whose sequence Python guarantees: the same seed gives the same
    bytes."""
    rng = random.Random(seed)
    while words > 0:
        tale = _tale(rng)
        words -= len(tale.split())
        yield tale


def _tale(rng: random.Random) -> str:
    pick = grammar.Telling(rng, 0.0).pick

    def filled(template: str, facts: dict[str, str], **others: str) -> str:
        color = pick(COLORS)
        food = pick(FOODS)
        place = pick(PLACES)
        return template.format(**facts, **others, color=color, food=food, place=place)

    characters: list[dict[str, str]] = []
    used: set[str] = set()
    for _ in range(pick((2, 2, 3))):
        she = pick((False, True))
        child = pick((False, True))
        names = grammar.CHILDREN[she]
        if not child:
            names = names + CREATURES
        facts = dict(grammar.PRONOUNS[she])
        facts["He"] = facts["he"].capitalize()
        facts["His"] = facts["his"].capitalize()
        facts["a"] = pick([name for name in names if name not in used])
        facts["thing"] = pick([thing for thing in THINGS if thing not in used])
        facts["kind"] = "girl" if she else "boy"
        if not child:
            facts["kind"] = pick(KINDS)
        used.update(facts.values())
        characters.append(facts)
    sentences = [filled(pick(INTRODUCTIONS), facts) for facts in characters]
    for _ in range(4 + int(rng.random() * 6)):
        one = pick(characters)
        other = pick([character for character in characters if character is not one])
        sentences.append(filled(pick(EVENTS), one, b=other["a"]))
    return grammar.ARTICLE.sub(r"\1n ", " ".join(sentences))
