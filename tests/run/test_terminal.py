"""What is printed fits the terminal, and has colours only there."""

import sys

import pytest

from tinystory.run import terminal

OPENING = "Once upon a time, a well-known fox"
STORY = "ran home.\n\nThe end of a story that takes more than a line of a narrow terminal."


@pytest.fixture
def narrow(monkeypatch):
    """A terminal of 30 columns."""
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


def test_prose_takes_the_terminals_width_and_at_most_a_hundred_columns(monkeypatch):
    for columns, expected in (("30", 30), ("80", 80), ("250", 100)):
        monkeypatch.setenv("COLUMNS", columns)
        assert terminal.width() == expected


def test_a_story_is_wrapped_to_the_terminal_and_only_its_opening_is_coloured(narrow):
    text = terminal.story_text(OPENING, STORY)

    cyan, reset = "\033[36m", "\033[0m"
    assert text.startswith(cyan)
    opening, story = text.removeprefix(cyan).split(reset)
    assert opening.split() == OPENING.split()
    assert story.split() == STORY.split()
    assert max(map(len, f"{opening}{story}".split("\n"))) <= 30
    assert "\n\n" in story


def test_colours_need_a_terminal_and_no_NO_COLOR(narrow, monkeypatch):
    assert terminal.colour("better", "better") != "better"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.colour("better", "better") == "better"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert terminal.colour("better", "better") == "better"


def test_a_strangers_escape_sequences_do_not_reach_the_terminal(narrow, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in terminal.story_text("Once\033[2J upon", "a\033]0;title\a time")


def test_an_empty_opening_has_no_colour_of_its_own(narrow, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.story_text("", "A story.").split() == ["A", "story."]


def test_a_table_puts_columns_that_do_not_fit_below_after_its_first_column(narrow):
    rows = [
        ["64 stories", "reward", "score", "clusters"],
        ["before", "0.5", terminal.colour("4.5", "worse"), "30"],
        ["after", "0.6", terminal.colour("5.4", "better"), "40"],
    ]
    assert terminal.aligned(rows) == [
        "64 stories  reward  score",
        "before      0.5     \033[31m4.5\033[0m",
        "after       0.6     \033[32m5.4\033[0m",
        "",
        "64 stories  clusters",
        "before      30",
        "after       40",
    ]


def test_a_wide_terminal_shows_a_table_as_it_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    expected = ["      a name  b", "kind  1       2"]
    assert terminal.aligned([["", "a name", "b"], ["kind", "1", "2"]]) == expected
