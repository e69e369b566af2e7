"""Tables and stories for the terminal, wrapped to its width."""

import shutil
import textwrap
from collections.abc import Sequence

from tinystory.run.text import printable

WIDEST = 100  # maximum columns of prose, and columns without a terminal


def width() -> int:
    """Number of columns for prose and tables: the terminal's, at most WIDEST; without a terminal,
    WIDEST."""
    return min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)


def wrapped(text: str) -> str:
    """`text` with its lines wrapped to the width."""
    lines = []
    for line in text.split("\n"):
        fits = len(line) <= width()
        lines.append(line if fits else textwrap.fill(line, width()))
    return "\n".join(lines)


def story_text(opening: str, story: str) -> str:
    """An opening, in brackets, and its story as printable, wrapped text."""
    return wrapped(printable(f"[{opening}] {story}"))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, with columns as wide as their longest cells. Columns that exceed the
    terminal's width follow below, with the first column repeated."""
    columns: list[list[str]] = []
    for cells in zip(*rows, strict=True):
        longest = max(map(len, cells))
        columns.append([cell.ljust(longest) for cell in cells])
    names, *others = columns
    lines: list[str] = []
    block = names
    for column in others:
        wider = beside(block, column)
        if len(wider[0]) > width() and block is not names:
            lines += [*block, ""]
            wider = beside(names, column)
        block = wider
    return [line.rstrip() for line in lines + block]


def beside(left: Sequence[str], right: Sequence[str]) -> list[str]:
    return [f"{start}  {end}" for start, end in zip(left, right, strict=True)]
