"""Tables, stories and colours for the terminal, wrapped to its width."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence

from tinystory.run.text import printable

WIDEST = 100  # maximum columns of prose, and columns without a terminal
COLOURS = {"opening": "36", "better": "32", "worse": "31"}  # cyan, green, red


def width() -> int:
    """Number of columns for prose and tables: the terminal's, at most WIDEST; without a terminal,
    WIDEST."""
    return min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)


def colour(text: str, name: str) -> str:
    """`text` in one of COLOURS, if stdout is a terminal and NO_COLOR (https://no-color.org) is
    unset or empty; else `text`."""
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return f"\033[{COLOURS[name]}m{text}\033[0m"


def wrapped(text: str) -> str:
    """`text` with its lines wrapped to the width."""
    lines = []
    for line in text.split("\n"):
        fits = visible(line) <= width()
        lines.append(line if fits else textwrap.fill(line, width()))
    return "\n".join(lines)


def story_text(opening: str, story: str) -> str:
    """An opening and its story as printable, wrapped text, with the opening in colour."""
    opening = printable(opening)
    text = wrapped(printable(f"{opening} {story}"))
    # Wrapping changes only white space.
    characters = len("".join(opening.split()))
    beginning = re.match(rf"(\s*\S){{{characters}}}", text)
    assert beginning is not None, "the text begins with its opening"
    end = beginning.end()
    return colour(text[:end], "opening") + text[end:]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, with columns as wide as their longest cells. Columns that exceed the
    terminal's width follow below, with the first column repeated."""
    columns: list[list[str]] = []
    for cells in zip(*rows, strict=True):
        longest = max(map(visible, cells))
        columns.append([cell + " " * (longest - visible(cell)) for cell in cells])
    names, *others = columns
    lines: list[str] = []
    block = names
    for column in others:
        wider = beside(block, column)
        if visible(wider[0]) > width() and block is not names:
            lines += [*block, ""]
            wider = beside(names, column)
        block = wider
    return [line.rstrip() for line in lines + block]


def beside(left: Sequence[str], right: Sequence[str]) -> list[str]:
    return [f"{start}  {end}" for start, end in zip(left, right, strict=True)]


def visible(text: str) -> int:
    """The number of visible characters of a text, without the codes of `colour`."""
    return len(re.sub(r"\033\[\d+m", "", text))
