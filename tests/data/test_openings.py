"""Openings: the same for a seed and an index; every opening is used before one is used again; a
tenth is held out."""

import json
import os
import random

import pytest

from tinystory.data.builtin import grammar
from tinystory.data.openings import (
    BUILTIN,
    BUILTIN_HELD_OUT,
    LONGEST,
    Openings,
    builtin_openings,
    load_openings,
)
from tinystory.run import files
from tinystory.run.errors import UserError
from tinystory.teacher.named_protocols import load_protocol

TEXTS = [f"There was a fox number {i}." for i in range(40)]


def test_an_opening_depends_on_the_seed_and_the_index_alone():
    openings = Openings(TEXTS, seed=3)
    asked = list(range(100))
    random.Random(0).shuffle(asked)
    assert {i: openings[i] for i in asked} == {i: Openings(TEXTS, seed=3)[i] for i in range(100)}
    assert [openings[i] for i in range(36)] != [Openings(TEXTS, seed=4)[i] for i in range(36)]


def test_each_is_used_once_before_one_is_used_again():
    openings = Openings(TEXTS, seed=0)
    rounds = [[openings[i] for i in range(start, start + 36)] for start in (0, 36, 72)]
    assert all(sorted(each) == sorted(openings.train) for each in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_a_tenth_is_held_out_and_never_trained_on():
    openings = Openings(TEXTS, seed=0)
    assert len(openings.held_out) == 4 and not set(openings.held_out) & set(openings.train)
    assert not set(openings.held_out) & {openings[i] for i in range(500)}


def test_twice_as_many_openings_take_twice_as_many_comparisons():
    """Not four times as many, with which a file of 200 000 would take minutes."""

    class Text(str):
        comparisons = 0

        def __eq__(self, other):
            Text.comparisons += 1
            return super().__eq__(other)

        __hash__ = str.__hash__

    counts = []
    for count in (1000, 2000):
        Text.comparisons = 0
        openings = Openings([Text(f"Opening {i}.") for i in range(count)], seed=0)
        assert len(openings.train) + len(openings.held_out) == count
        counts.append(Text.comparisons)
    assert counts[1] <= 2 * counts[0] + 10 and counts[1] <= 3 * 2000


@pytest.mark.parametrize("count", [*range(2, 10)])
def test_of_a_few_openings_one_is_held_out(count):
    openings = Openings(TEXTS[:count], seed=0)
    assert openings.held_out == [TEXTS[count - 1]] and openings.train == TEXTS[: count - 1]


def test_groups_share_an_opening():
    openings = Openings(TEXTS, seed=0, per_opening=4)
    told = [openings[i] for i in range(40)]
    assert all(len(set(told[i : i + 4])) == 1 for i in range(0, 40, 4)) and len(set(told)) == 10


@pytest.mark.parametrize("per_opening", [1, 3, 8])
def test_the_words_of_each_opening_are_counted_once(per_opening):
    openings = Openings(TEXTS, seed=0, per_opening=per_opening)
    counted = [openings.new_words(first, 7) for first in range(0, 700, 7)]
    assert sum(counted) == sum(len(text.split()) for text in openings.train)
    used = {openings[i] for i in range(70)}
    assert sum(counted[:10]) == sum(len(text.split()) for text in used)


def test_one_opening_is_trained_on_and_evaluated():
    one = Openings(["Once"], seed=0)
    assert one.train == one.held_out == ["Once"] and one[0] == one[123456] == "Once"


def test_builtin_openings_name_their_hero_and_are_no_story_of_the_corpus():
    openings = builtin_openings()
    assert len(set(openings)) == BUILTIN + BUILTIN_HELD_OUT == len(openings)
    assert all(4 < len(text.split()) <= LONGEST and text[-1] in '.!?"' for text in openings)
    names = set(
        " ".join(
            [grammar.vocabulary.GIRLS, grammar.vocabulary.BOYS, grammar.vocabulary.CREATURES]
        ).split()
    )
    assert all(names & {word.strip('.,!?"') for word in text.split()} for text in openings)


def test_of_the_builtin_openings_two_hundred_are_held_out():
    openings = Openings(load_openings("builtin"), seed=0)
    assert (
        (len(openings.train), len(openings.held_out)) == (BUILTIN, BUILTIN_HELD_OUT) == (180, 200)
    )
    assert not set(openings.held_out) & set(openings.train)


def test_a_file_has_one_per_line(tmp_path):
    (tmp_path / "a.txt").write_text("One day, a fox\n\n  Far away,  \nOne day, a fox\n")
    assert load_openings(str(tmp_path / "a.txt")) == ["One day, a fox", "Far away,"]


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    """As Windows' Notepad writes it."""
    (tmp_path / "o.txt").write_text("Once\nTom had\n", encoding="utf-8-sig")
    assert load_openings(str(tmp_path / "o.txt")) == ["Once", "Tom had"]
    prompt = json.dumps({"user": "Grade {story}"})
    (tmp_path / "p.json").write_text(prompt, encoding="utf-8-sig")
    (tmp_path / "plain.json").write_text(prompt)
    assert load_protocol(tmp_path / "p.json") == load_protocol(tmp_path / "plain.json")


def test_what_is_no_file_is_the_opening_itself():
    for text in ("Once", "Once upon a time, in a faraway land,", "He/she said:", "word " * 2000):
        assert load_openings(text) == [text]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, "cannot be read"),
        ("no", None, "cannot be read"),
        ("empty.txt", b"\n \n", "holds no opening"),
        ("bytes.txt", b"\xff\xfe", "cannot be read"),
        ("wide.txt", "Once".encode("utf-16-le"), "NUL characters"),
        ("long.txt", b"Once " * 300, "over 0 MB"),
    ],
)
def test_what_is_no_list_of_openings_is_said(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(files, "LONGEST", 1000 if name == "long.txt" else files.LONGEST)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_openings(str(tmp_path / name))


@pytest.mark.parametrize("load", [load_openings, load_protocol])
def test_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path, load):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match=f"{path} cannot be read: it is not a regular file"):
            load(str(path))
