"""The built-in stories: all different, repeatable, and correct to the comma."""

import collections
import hashlib
import random
import re
import subprocess
import sys

import pytest

from tinystory.data.builtin import grammar
from tinystory.data.builtin.grammar import stories

WORDS = 250_000
GENDERED = {"he", "him", "his", "himself", "she", "her", "hers", "herself"}


@pytest.fixture(scope="module")
def sample():
    return list(stories(WORDS, seed=11))


@pytest.fixture(scope="module")
def many():
    return list(stories(1_000_000, seed=1))


def split(story):
    """The sentences of a text. A quotation mark that closes a sentence belongs to the sentence."""
    return re.split(r'(?<=[.!?]) (?=["A-Z])|(?<=[.!?]") (?=["A-Z])|\n', story)


@pytest.fixture(scope="module")
def sentences(sample):
    return [split(story) for story in sample]


def offenders(pattern, texts):
    """The text around each match of the pattern, for a readable message."""
    matches = (re.search(pattern, text) for text in texts)
    return [m.string[max(0, m.start() - 30) : m.end() + 30] for m in matches if m][:5]


def digest(texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def test_same_seed_same_bytes_in_another_process(sample):
    program = (
        "import hashlib; from tinystory.data.builtin.grammar import stories; "
        f"print(hashlib.sha256(chr(0).join(stories({WORDS}, 11)).encode()).hexdigest())"
    )
    for hash_seed in "0", "7":
        env = {"PYTHONHASHSEED": hash_seed, "PATH": ""}
        run = subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == digest(sample)


def test_another_seed_tells_other_stories(sample):
    assert not set(sample) & set(stories(20_000, seed=12))


def test_no_two_alike(sample):
    assert len(set(sample)) == len(sample)


@pytest.mark.parametrize("words", [0, 1, 1000, 54_321])
def test_stops_as_soon_as_the_words_are_told(words):
    lengths = [len(story.split()) for story in stories(words, seed=5)]
    assert sum(lengths) >= words
    assert sum(lengths[:-1]) < max(words, 1)


def test_streams_and_a_longer_run_begins_with_the_shorter(sample):
    short = list(stories(5_000, seed=11))
    assert short == sample[: len(short)]


def literals(parts):
    """Every piece of literal text in a nested structure of parts."""
    if isinstance(parts, list):  # of parts, of options, a table, a plot's facts
        for part in parts:
            yield from literals(part)
    elif parts[0] == "text":
        yield parts[1]
    elif parts[0] != "fact":
        yield from literals(parts[1])


def vocabulary():
    """Every word that the grammar can write."""
    heroes, wild = (
        grammar._HEROES.values(),
        {name for group in grammar._NAMES["wild"] for name in group},
    )
    tables = [
        *grammar._RULES.values(),
        *heroes,
        *grammar._HELPERS.values(),
        *grammar._PARENTS.values(),
    ]
    tables += [[rows for _, rows in plot.facts] + plot.paragraphs for plot in grammar.PLOTS]
    texts = [f"{hand}s" for rows in heroes for row in rows for hand in literals(row[3])]
    texts += [
        *literals(tables),
        *(word for pronouns in grammar.PRONOUNS for word in pronouns.values()),
    ]
    texts += [*wild, *(f"{name}'s" for name in wild)]
    return set(re.findall(r"(?<!')[a-z]+(?:'[a-z]+)*", " ".join(texts).lower()))


def test_vocabulary_is_closed_small_and_used(many):
    words = vocabulary()
    used = {word for story in many for word in re.findall(r"[a-z]+(?:'[a-z]+)*", story.lower())}
    assert used <= words, sorted(used - words)
    assert 1_300 <= len(words) <= 1_800
    assert len(words - used) < 0.01 * len(words), sorted(words - used)


def test_lengths_are_mixed(sample):
    lengths = sorted(len(story.split()) for story in sample)
    assert lengths[0] >= 50 and lengths[-1] <= 330
    assert 110 <= sum(lengths) / len(lengths) <= 160
    assert lengths[len(lengths) // 20] < 110 and lengths[-len(lengths) // 20] > 200


def test_articles(sample):
    assert not offenders(r"(?i)\ba [aeiou]", sample)
    assert not offenders(r"(?i)\ban (?!hour)[^aeiou]", sample)
    assert not offenders(r"(?i)\b(?:a|an|the) (?:a|an|the|his|her|their|my|your)\b", sample)


def test_no_word_twice(sample):
    assert not offenders(r"(?i)\b(\w+) \1\b", sample)


def test_nothing_left_unfilled_and_nothing_misspaced(sample):
    assert not offenders(r"[^A-Za-z' ,.!?\"\n-]", sample)
    assert not offenders(r"  |^ | $| \n|\n | [,.!?]|[,.!?][,.!?]|,\"?\n|\n\n", sample)


def test_quotes_close_in_their_paragraph(sample):
    paragraphs = [line for story in sample for line in story.split("\n")]
    assert not [p for p in paragraphs if p.count('"') % 2]
    quoted = [part for p in paragraphs for part in p.split('"')[1::2]]
    assert not offenders(r"^\s|\s$|^$|[^,.!?]$", quoted)
    between = [part for p in paragraphs for part in p.split('"')[2:-1:2]]
    assert not offenders(r"^\S|\S$", between)


def test_sentences_begin_with_a_capital_and_end_with_a_stop(sentences):
    every = [s for story in sentences for s in story]
    assert not offenders(r'^(?!"?[A-Z])', every)
    assert not offenders(r'[^.!?"]$|[^.!?]"$', every)
    # After a stop comes a capital, except after a quotation: "Stop!" he cried.
    assert not offenders(r"[.!?] [a-z]", every)
    # A tag after a full stop inside the quotation would be an error: "Stop." he cried.
    assert not offenders(r'\." [a-z]', every)
    # Speech opens with a capital unless it goes on after a tag.
    assert not offenders(r'(?:^|[.!?]"? )"[a-z]', every)


def test_questions_are_asked(sample):
    assert not offenders(r'\?" said|\." asked|!" asked', sample)


def test_every_plot_is_told():
    names = [plot.name for plot in grammar.PLOTS]
    assert len(names) == len(set(names)) >= 25
    rng = random.Random(0)
    for plot in grammar.PLOTS:
        assert len({plot.generate(rng)[0] for _ in range(40)}) == 40, plot.name


def test_one_pronoun_for_hero_and_the_other_for_friend():
    """Templates have pronouns only through slots, except for third persons in the plots that are
    named here."""
    rng = random.Random(1)
    for plot in grammar.PLOTS:
        literal = GENDERED & set(re.findall(r"[a-z]+", " ".join(literals(plot.paragraphs)).lower()))
        for _ in range(60):
            text, facts = plot.generate(rng)
            assert facts["he"] != facts["f.he"]
            words = set(re.findall(r"[a-z]+", text.lower()))
            others = " ".join(
                value for key, value in facts.items() if key.removeprefix("f.") not in GENDERED
            )
            if (
                not literal
                and not GENDERED & set(others.lower().split())
                and facts["f"] not in text
            ):
                other = {facts["f.he"], facts["f.himself"]} | (
                    {"him"} if facts["f.he"] == "he" else set()
                )
                assert not words & other, (plot.name, text)


def test_hero_and_friend_have_two_names():
    rng = random.Random(2)
    for _ in range(2_000):
        _, facts = rng.choice(grammar.PLOTS).generate(rng)
        assert facts["h"] != facts["f"]


def test_openings_vary(sample):
    share = lambda start: sum(bool(re.match(start, s)) for s in sample) / len(sample)  # noqa: E731
    assert 0.2 < sum("Once upon a time" in s for s in sample) / len(sample) < 0.45
    assert share(r"Let me tell you a") > 0.05
    assert (
        share(r"Let me tell you a long, magical tale\. Once upon a time, in a faraway land, ")
        > 0.0005
    )
    assert sum("in a faraway land, " in s for s in sample) / len(sample) > 0.08
    first_words = collections.Counter(" ".join(s.split()[:3]) for s in sample)
    assert len(first_words) > 300


def test_stories_do_not_repeat_each_other(sample, sentences, many):
    words = [re.findall(r"[A-Za-z']+", story) for story in sample]
    grams = collections.Counter(tuple(w[i : i + 4]) for w in words for i in range(len(w) - 3))
    assert len(grams) / grams.total() > 0.2
    # no sentence but a cry like "Splash!" is in more than 2 % of the stories (a plot is in about
    # 1.6 %)
    tellings = collections.Counter(s for story in many for s in set(split(story)))
    commonest = next((n, s) for s, n in tellings.most_common() if len(s.split()) > 3)
    assert commonest[0] < 0.02 * len(many), commonest
    assert len(tellings) > 30_000
    # within a story, no long sentence comes twice unless somebody says it
    for story in sentences:
        plain = [s for s in story if len(s.split()) > 6 and '"' not in s]
        assert len(plain) == len(set(plain)), story


def test_the_brackets_of_the_markup_are_balanced():
    tables = (grammar.vocabulary.HEROES, grammar.vocabulary.HELPERS, grammar.vocabulary.PARENTS)
    for text in [
        *grammar._TEXTS,
        *grammar.vocabulary.RULES.values(),
        *(rows for t in tables for rows in t.values()),
    ]:
        count = 1
        while count:
            text, count = re.subn(r"\[[^][<>]*\]|<[^][|<>]*>", "", text)
        assert not set("[]<>|") & set(text), re.findall(".{,20}[][<>|].{,20}", text)
