"""Dull text is grammatical, uses the plots' names, and is recognised by its sentences."""

import random
import re
from types import SimpleNamespace

import pytest

from tinystory.data.builtin import dull, grammar
from tinystory.data.corpus import BUILTIN
from tinystory.evaluate.story_records import learned_dull_text, story_means, story_records
from tinystory.teacher.grade import Grade


@pytest.fixture(scope="module")
def documents():
    return list(dull.documents(100_000, seed=7))


def test_a_seed_and_a_number_of_words_give_the_same_documents(documents):
    assert (
        documents == list(dull.documents(100_000, seed=7)) != list(dull.documents(100_000, seed=8))
    )
    assert (
        sum(len(text.split()) for text in documents)
        >= 100_000
        > sum(len(text.split()) for text in documents[:-1])
    )


@pytest.mark.parametrize("kind", dull.STYLES[1:])
def test_a_style_is_known_by_its_sentences(kind, documents):
    style = next(style for style in dull._DULL_STYLES if style.name == kind)
    rng = random.Random(0)
    assert all(
        dull.style_of(style.continuation(rng, grammar.generate(rng)[1])) == kind for _ in range(100)
    )
    assert 0.15 < sum(dull.style_of(text) == kind for text in documents) / len(documents) < 0.25


def test_no_story_is_taken_for_a_dull_one():
    stories = list(grammar.stories(200_000, seed=3))
    assert {dull.style_of(story) for story in stories} == {dull.STORY}
    sentences = [sentence for story in stories for sentence in grammar.segments(story)]
    assert sum(dull.style_of(sentence) != dull.STORY for sentence in sentences) < 0.005 * len(
        sentences
    )


def test_a_story_is_dull_only_if_most_of_it_is():
    own = ["Then the wolf came.", "Everybody ran.", "Nobody saw the moon fall."]
    dull_ones = ["Mia looked around.", "There was a big tree.", "There was a bird in the tree."]
    assert dull.style_of(" ".join([*own, *dull_ones])) == dull.style_of("") == dull.STORY
    assert dull.style_of(" ".join([*own[:2], *dull_ones])) == "list"


def test_dull_documents_are_written_as_the_stories_are(documents):
    names = re.compile(
        r"\b("
        + "|".join({*grammar.vocabulary.GIRLS.split(), *grammar.vocabulary.BOYS.split()})
        + r")\b"
    )
    assert sum(bool(names.search(text)) for text in documents) > 0.4 * len(documents)
    for text in documents:
        assert re.fullmatch(r'["A-Z].*[.!?]"?', text) and not re.search(
            r"[][{}<>|=]|  |\b[Aa] [aeiou]", text
        ), text
        assert text.count('"') % 2 == 0, text


def test_dull_tellers_open_five_in_eight_documents(builtin_documents):
    stories, others = (len(builtin_documents[name]) for name in ("builtin", "dull"))
    assert others / (stories + others) == pytest.approx(5 / 8, abs=0.01)
    assert builtin_documents["dull"][0] == next(dull.documents(BUILTIN["dull"][1], 0))


def test_a_run_records_who_tells_its_stories(documents):
    texts = [next(grammar.stories(1, seed=1)), *documents[:3]]
    stories = [
        SimpleNamespace(index=0, opening="", text=text, words=9, ended="eos") for text in texts
    ]
    grades = [Grade(None, 0.5)] * 4
    assert not learned_dull_text({"corpus": ["builtin"]}) and learned_dull_text(
        {"corpus": ["dull"]}
    )
    records = story_records(1, stories, grades, [0.5] * 4, [1.0] * 4, {"corpus": ["dull"]})
    expected = [dull.STORY, *map(dull.style_of, documents[:3])]
    assert [record["style"] for record in records] == expected
    means = story_means(records)
    assert means["style_story"] == 0.25
    assert sum(means[f"style_{kind}"] for kind in dull.STYLES) == 1
    unmixed = story_records(1, stories, grades, [0.5] * 4, [1.0] * 4, {})
    assert not any("style" in key for key in [*unmixed[0], *story_means(unmixed)])
