"""What is printed fits the terminal."""

import pytest

from tinystory.run import terminal

OPENING = "Once upon a time, a well-known fox"
STORY = "ran home.\n\nThe end of a story that takes more than a line of a narrow terminal."


@pytest.fixture
def narrow(monkeypatch):
    """A terminal of 30 columns."""
    monkeypatch.setenv("COLUMNS", "30")


def test_prose_takes_the_terminals_width_and_at_most_a_hundred_columns(monkeypatch):
    for columns, expected in (("30", 30), ("80", 80), ("250", 100)):
        monkeypatch.setenv("COLUMNS", columns)
        assert terminal.width() == expected


def test_a_story_is_wrapped_to_the_terminal_and_its_opening_is_in_brackets(narrow):
    text = terminal.story_text(OPENING, STORY)
    opening, story = text.removeprefix("[").split("]")
    for shown, given in ((opening, OPENING), (story, STORY)):  # lines break at hyphens too
        assert "".join(shown.split()) == "".join(given.split())
    assert max(map(len, text.split("\n"))) <= 30 and "\n\n" in story


def test_a_strangers_escape_sequences_do_not_reach_the_terminal(narrow):
    assert "\033" not in terminal.story_text("Once\033[2J upon", "a\033]0;title\a time")


def test_a_table_puts_columns_that_do_not_fit_below_after_its_first_column(narrow):
    rows = [
        ["64 stories", "reward", "score", "clusters"],
        ["before", "0.5", "4.5", "30"],
        ["after", "0.6", "5.4", "40"],
    ]
    assert terminal.aligned(rows) == [
        "64 stories  reward  score",
        "before      0.5     4.5",
        "after       0.6     5.4",
        "",
        "64 stories  clusters",
        "before      30",
        "after       40",
    ]


def test_a_wide_terminal_shows_a_table_as_it_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    expected = ["      a name  b", "kind  1       2"]
    assert terminal.aligned([["", "a name", "b"], ["kind", "1", "2"]]) == expected
