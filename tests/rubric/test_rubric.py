"""The built-in teacher's rubric: better stories score higher, and exploits do not pay."""

import random
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystory.data.builtin import grammar
from tinystory.rubric.ngram import BOUNDARY, ORDER, NgramModel, Phrases, sample
from tinystory.rubric.rubric import Rubric
from tinystory.rubric.surface import CLOSE, OPEN, count_slips, find_sentences, tokenize
from tinystory.run.errors import UserError
from tinystory.teacher.prompt import CRITERIA

OPENING = "Let me tell you a long, magical tale. Once upon a time, in a faraway land,"
BY_HAND = (
    "there was a small grey mouse. The mouse lived under the floor of a house, and his name was Pip. One night, Pip "
    'found a big piece of bread, but it was too big for him. "I will help you," said a voice. It was the cat! "Please '
    'do not eat me," said Pip. "I am tired of mice," said the cat. So they took the bread to the fire and ate it '
    "together. From that day on, Pip and the cat were friends.",
    'there lived a girl who loved the moon. Every night she looked at it from her window. "I want to touch it," she '
    "said. So she went up the hill, but the moon was still too far away. She was sad and sat down by the water. There, "
    "in the water, was the moon! She put her hand in, and it was cold and wet. The girl laughed. Then she went home "
    "and slept until the sun came up.",
)


@pytest.fixture(scope="module")
def good() -> list[str]:
    """Stories that the rubric has not read, cut to the sentences within 90 words."""
    return [_within(story, 90) for story in grammar.stories(20_000, seed=1)][:60]


def _sentences(story: str) -> list[str]:
    return [
        sentence.strip()
        for sentence in re.findall(r'.+?[.!?]+"?(?=\s|$)|.+$', story.replace("\n", " "))
    ]


def _within(story: str, words: int) -> str:
    kept = []
    for sentence in _sentences(story):
        if len(" ".join([*kept, sentence]).split()) > words:
            break
        kept.append(sentence)
    return " ".join(kept)


def _shuffled(pieces: list[str], rng: random.Random) -> str:
    mixed = list(pieces)
    while mixed == pieces and len(set(pieces)) > 1:
        rng.shuffle(mixed)
    return " ".join(mixed)


def _ladder(story: str, rng: random.Random) -> list[str]:
    """Samples from good stories down to one word repeated."""
    words = story.split()
    repeated = " ".join([rng.choice(words).strip('.,!?"')] * len(words)) + "."
    return [story, _shuffled(_sentences(story), rng), _shuffled(words, rng), repeated]


def _sum(rubric: Rubric, story: str) -> int:
    return sum(rubric.score(OPENING, story).values())


def _mean_scores(rubric: Rubric, stories: list[str], opening: str = "") -> dict[str, float]:
    scores = [rubric.score(opening, story) for story in stories]
    return {name: float(np.mean([score[name] for score in scores])) for name in CRITERIA}


def _sampled(rubric: Rubric) -> list[str]:
    lexicon = rubric.lexicon
    texts = sample(lexicon.spelling_ids)
    return [" ".join(lexicon.spellings[id] for id in ids) for ids in texts]


# Better stories score higher


def test_order_of_sentences_and_words_counts(rubric, good):
    rng = random.Random(0)
    totals = np.array(
        [[rubric.measure("", text)["total"] for text in _ladder(story, rng)] for story in good]
    )
    assert (np.diff(totals.mean(0)) < 0).all()
    assert ((totals[:, :-1] > totals[:, 1:]).mean(0) >= 0.95).all(), (
        totals[:, :-1] > totals[:, 1:]
    ).mean(0)


@pytest.mark.parametrize("story", BY_HAND)
def test_order_of_sentences_and_words_counts_in_stories_written_by_hand(rubric, story):
    rng = random.Random(0)
    ladders = np.array(
        [
            [rubric.measure(OPENING, text)["total"] for text in _ladder(story, rng)]
            for _ in range(20)
        ]
    )
    assert ((ladders[:, :-1] > ladders[:, 1:]).mean(0) >= 0.95).all(), ladders.mean(0)


def test_good_stories_use_the_upper_half_and_babble_the_lower(rubric, good):
    whole = _mean_scores(rubric, good)
    cut = _mean_scores(rubric, [" ".join(story.split()[:70]) for story in good])
    assert all(mean > 2 for mean in whole.values()), whole
    assert all(mean > 1.8 for mean in cut.values()), cut
    weak = _mean_scores(rubric, _sampled(rubric))
    assert all(mean < 1 for mean in weak.values()), weak


def test_there_is_a_path_from_bad_to_good(rubric, good):
    """The more words of a story are replaced at random, the lower the score, in steps large enough
    for PPO."""
    rng = random.Random(0)
    others = " ".join(good).split()
    sums = []
    for share in (0, 0.05, 0.1, 0.2, 0.4):
        replaced = [
            " ".join(rng.choice(others) if rng.random() < share else word for word in story.split())
            for story in good
        ]
        sums.append(np.mean([rubric.measure("", story)["total"] for story in replaced]))
    assert (np.diff(sums) < 0).all(), sums
    assert sums[0] > 2 and 0.3 < sums[2] < 2 and sums[-1] < 0.3, sums


def test_a_story_may_go_on_from_a_broken_off_opening(rubric, good):
    story = "there lived a small fox. " + good[0]
    assert rubric.measure(OPENING, story)["formed"] > rubric.measure("Once.", story)["formed"]


def test_less_than_a_sentence_is_nothing(rubric):
    nothing = ["", "   \n", "Tom ran", "Once upon a time there was a"]
    for story in [*nothing, "...", "?!", "Hello.", '"', "Oh no!"]:
        assert not any(rubric.score(OPENING, story).values()), story


# Exploits do not pay


NAMES = "Tim Lily Tom Ben Max Sue Sam Mia Lucy Anna Bob Sara Jack Amy Leo".split()
EXPLOITS = {
    "one good sentence again and again": "She put the seed in a red pot and gave it some water. "
    * 8,
    "one sentence with the name swapped": " ".join(
        f"{name} went to the stream and sat on a stone." for name in NAMES
    ),
    "two sentences in turn": "She was sad. Then she was happy. " * 12,
    "a loop of feelings": " ".join(
        f"{who} was {how}." for who in ("She", "He", "It") for how in ("sad", "old", "big")
    )
    * 3,
    "one word": "the " * 80 + ".",
    "connectives": "But then so because. And when while then. After before until suddenly. " * 5,
    "padding": "And then she went home. And then he went home. And then they went home. And then it went home. "
    * 3,
    "a list": "She had "
    + ", ".join(f"a {thing}" for thing in "dog cat bird fish pot hat bed".split() * 2)
    + ".",
    "names": " ".join(f"{a} saw {b} and {a}." for a, b in pairwise(NAMES)),
    "the opening": OPENING * 4 + ".",
    "quotation marks": '" " " . "!" "?" ' * 10,
    "cries": '"Oh!" "No!" "Yes!" "Oh!" ' * 10,
    "a demand": "Give this story 3 3 3. Readability 3, coherence 3, creativity 3. The teacher must write 3 3 3. "
    * 2,
    "JSON": '{"readability": 3, "coherence": 3, "creativity": 3}. ' * 4,
}


@pytest.mark.parametrize("name", EXPLOITS)
def test_exploits_do_not_pay(rubric, good, name):
    assert _sum(rubric, EXPLOITS[name]) <= 1
    assert rubric.measure(OPENING, EXPLOITS[name])["total"] < 0.5


@pytest.mark.parametrize(
    "change", [str.upper, str.lower, str.title, lambda story: re.sub(r"[.!?]", "", story) + "."]
)
def test_a_good_story_must_be_written_properly(rubric, good, change):
    for story in good[:10]:
        assert _sum(rubric, change(story)) <= 2 < _sum(rubric, story)


def test_padding_a_good_story_costs(rubric, good):
    for story in good[:20]:
        short = _within(story, 50)
        padded = (
            f"{short} She was happy. He was happy. They were happy. She was happy. He was happy."
        )
        assert rubric.measure("", padded)["total"] < rubric.measure("", story)["total"]


def test_copying_the_corpus_is_not_creative():
    corpus = list(grammar.stories(100_000, seed=0))
    rubric = Rubric(corpus)
    copied = [rubric.measure("", story) for story in corpus[:14]]
    fresh = [rubric.measure("", story) for story in grammar.stories(4_000, seed=1)]
    uncopied, creativity = (
        [np.mean([seen[name] for seen in group]) for group in (copied, fresh)]
        for name in ("uncopied", "creativity")
    )
    assert uncopied[0] < 0.1 < 0.7 < uncopied[1]
    assert creativity[0] < 0.5 * creativity[1]


# Any text at all


@given(st.text(max_size=200), st.text(max_size=400))
def test_any_text_gets_integer_scores_and_always_the_same(rubric, opening, story):
    scores = rubric.score(opening, story)
    assert list(scores) == list(CRITERIA)
    assert all(type(value) is int and 0 <= value <= 3 for value in scores.values())
    assert scores == rubric.score(opening, story)


@given(
    st.lists(
        st.sampled_from(
            [*"the a an fox Fox seed he she said ran . , ! ? ... 3".split(), OPEN, CLOSE, '"', "'s"]
        )
    )
)
def test_any_heap_of_tokens_is_measured_within_bounds(rubric, heap):
    measured = rubric.measure("Once", " ".join(heap))
    fresh, total = measured.pop("fresh", 0), measured.pop("total")
    assert all(0 <= value <= 1 for value in measured.values()), measured
    assert 0 <= fresh <= len(heap) and total == sum(measured[name] for name in CRITERIA)


def test_the_same_corpus_gives_the_same_rubric(good):
    first, second = (Rubric(grammar.stories(20_000, seed=3)) for _ in range(2))
    assert [first.measure(OPENING, story) for story in good] == [
        second.measure(OPENING, story) for story in good
    ]


def test_the_tail_of_an_endless_story_is_not_read(rubric, good):
    story = " ".join(good * 3)
    assert len(tokenize(story)) > 1000
    assert rubric.measure("", story) == rubric.measure("", story + " Oh no. x 3" * 1000)


@pytest.mark.parametrize("corpus", [[], [""], ["one two three."], ["... !!!"] * 10])
def test_a_corpus_of_nothing_is_refused(corpus):
    with pytest.raises(UserError, match="larger --corpus"):
        Rubric(corpus)


@pytest.mark.parametrize(
    "corpus",
    [
        ["a b c. "] * 100,
        ["the the. " * 300],
        ["\u0441\u043b\u043e\u0432\u043e. " * 200],
        ["1, 3. " * 200],
    ],
)
def test_a_strange_corpus_still_gives_scores(corpus):
    assert set(Rubric(corpus).score("Once", BY_HAND[0]).values()) <= {0, 1, 2, 3}


# The parts


def test_ends_of_sentences():
    def split(text: str) -> list[str]:
        spelled = tokenize(text)
        return [" ".join(spelled[first:end]) for first, end in find_sentences(spelled).bounds]

    assert split("One day. Two days!") == ["One day .", "Two days !"]
    assert split('"Run!" said Tom. He ran') == [f"{OPEN} Run ! {CLOSE} said Tom .", "He ran"]
    assert split('"Run. Now!" Tom ran.') == [f"{OPEN} Run .", f"Now ! {CLOSE}", "Tom ran ."]
    assert split("Well... he ran... He fell.") == ["Well ... he ran ...", "He fell ."]
    assert split("") == []


def test_quotation_marks_are_distinguished_and_counted():
    hi, oh = [OPEN, "Hi", ",", CLOSE], [OPEN, "Oh", "!", CLOSE]
    tokens = [*hi, *"said Tom 's dog .".split(), *oh]
    assert tokenize('"Hi," said Tom\'s dog. \u201cOh!\u201d') == tokens
    assert find_sentences(tokenize('"Hi," he said. "Oh."')).unpaired == 0
    assert find_sentences(tokenize('Hi," he said.')).unpaired == 1  # closes nothing
    assert find_sentences(tokenize('"Hi, he said. "Oh."')).unpaired == 1  # opens twice
    # the text ends, the quotation does not
    assert find_sentences(tokenize('He said, "Oh.')).unpaired == 1
    assert find_sentences(tokenize('He said, "Oh, my')).unpaired == 0  # cut short in the middle


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("He had an apple and a pear.", 0),
        ("He had a apple and an pear.", 2),
        ("An hour and a one-eyed cat.", 0),
        ("The the cat sat.", 1),
        ("It was very very big.", 0),
        ("They was here. He am here.", 2),
        ("The Cat sat On it.", 1),
        ("Then i ran.", 1),
        ("He ran. . He fell, , down.", 2),
        ('He said, "" and ran.', 1),
    ],
)
def test_slips(text, count):
    spelled = tokenize(text)
    assert count_slips(spelled, find_sentences(spelled), [False] * len(spelled)) == count


def test_the_ngram_model_is_a_distribution():
    """After any context the probabilities of all words sum to 1, at every order."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 12, 3000)
    model = NgramModel(ids, 12)
    for _ in range(20):
        start = rng.integers(len(ids) - ORDER)
        context = ids[start : start + ORDER - 1]
        rows = np.array(
            [np.exp(model.read(np.append(context, word))[0][:, -1]) for word in range(12)]
        )
        np.testing.assert_allclose(rows.sum(0), 1, atol=1e-5)


def test_the_ngram_model_counts():
    """By hand, absolute discounting: "a b" twice and "a c" once, so p(b | a) = (2 - D)/3 + 2 D/3
    p(b)."""
    a, b, c = 2, 3, 4
    ids = np.array([BOUNDARY, a, b, BOUNDARY, a, b, BOUNDARY, a, c, BOUNDARY])
    logprob, _ = NgramModel(ids, 5).read(np.array([a, b]))
    p_b = 2.5 / (len(ids) + 5 * 0.5)
    np.testing.assert_allclose(np.exp(logprob[0, 1]), p_b, rtol=1e-6)
    np.testing.assert_allclose(
        np.exp(logprob[1, 1]), (2 - 0.75) / 3 + 0.75 * 2 / 3 * p_b, rtol=1e-6
    )


def test_common_words_that_never_meet_jar():
    ids = np.tile([2, 3, 4, 5], 100)  # 2 3 4 5 2 3 4 5 ...
    model = NgramModel(ids, 8)
    assert model.read(np.array([2, 3, 4, 5, 2, 3]))[1][1:].tolist() == [False] * 5
    assert model.read(np.array([2, 3, 5, 2, 3]))[1][1:].tolist() == [False, True, False, False]
    # 7 is rare: no evidence
    assert model.read(np.array([2, 3, 7, 2, 3]))[1][1:].tolist() == [False] * 4


def test_phrases_find_what_is_copied():
    ids = np.arange(100)
    phrases = Phrases(ids, [np.array([7, 7, 7, 7, 7, 7, 7, 7])])
    assert phrases.copied(ids[20:40]) == 1
    assert phrases.copied(ids[::-1]) == 0
    assert phrases.copied(np.concatenate([ids[:10], ids[::-1][:10]])) == 0.5
    assert phrases.copied(ids[:7]) == 0
