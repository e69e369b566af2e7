"""The desk for pairs: whichever side a story is on, a choice is about the story; nothing is lost or asked twice."""

import json

import pytest

from tinystory.evaluate.preference import FIRST, SAME, SECOND, pair_of, win_rate
from tinystory.human.desk import Mistake
from tinystory.human.pairs import PairDesk

PAIRS = [pair_of("Once", f"plain {i}", f"fine {i}") for i in range(12)]


def choose(desk, who, word):
    """Choose the story with this word, or neither; returns the side it was on."""
    show = desk.state(who)["item"]
    side = SAME if not word else "left" if word in show["stories"][0] else "right"
    desk.do(who, "choose", {"key": show["key"], "side": side})
    return side


def test_a_choice_is_about_the_story_not_the_side(tmp_path):
    desk = PairDesk(tmp_path / "preferences.jsonl", PAIRS)
    sides = {choose(desk, "ada", "fine") for _ in PAIRS}
    assert sides == {"left", "right"} and {each.better for each in desk.choices("ada")} == {SECOND}
    assert desk.state("ada")["item"] is None and desk.state("ada")["result"]["rate"] == 1
    for _ in PAIRS:
        choose(desk, "ben", "plain")
    assert {each.better for each in desk.choices("ben")} == {FIRST}


def test_a_restart_asks_only_for_what_is_left_and_the_way_back_changes_a_choice(tmp_path):
    desk = PairDesk(tmp_path / "preferences.jsonl", PAIRS)
    for word in ("fine", "plain", ""):
        choose(desk, "ada", word)
    desk.do("ada", "skip", {"key": desk.state("ada")["item"]["key"]})
    desk.close()
    desk = PairDesk(tmp_path / "preferences.jsonl", PAIRS)
    assert desk.state("ada")["left"] == 8 and desk.state("ben")["left"] == 12
    assert win_rate(desk.choices("ada")) | {"ci": None} == {
        "pairs": 3, "first": 1, "second": 1, "same": 1, "rate": 0.5, "ci": None, "inconsistent": 0,
    }  # fmt: skip
    for _ in range(2):
        desk.do("ada", "back", {})
    assert desk.state("ada")["item"]["again"]
    choose(desk, "ada", "fine")  # instead of neither
    assert win_rate(desk.choices("ada"))["second"] == 2
    lines = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    assert [line["choice"] for line in lines] == ["second", "first", "same", None, "second"]


def test_people_see_the_pairs_in_different_orders_and_on_different_sides(tmp_path):
    desk = PairDesk(tmp_path / "preferences.jsonl", PAIRS)
    first = [desk.state(who)["item"]["key"] for who in "abcdefgh"]
    assert len(set(first)) > 1
    assert {desk.swapped(who, PAIRS[0].key) for who in "abcdefgh"} == {True, False}


@pytest.mark.parametrize(
    "asked",
    [
        {"key": "none", "side": "left"},
        {"key": ["x"], "side": "left"},
        {"side": "left"},
        {"key": PAIRS[0].key, "side": "up"},
    ],
)
def test_what_is_no_choice_is_not_kept(tmp_path, asked):
    desk = PairDesk(tmp_path / "preferences.jsonl", PAIRS)
    for action in ("choose", "back", "burn"):
        with pytest.raises(Mistake):
            desk.do("ada", action, asked)
    assert desk.state("ada")["done"] == 0
