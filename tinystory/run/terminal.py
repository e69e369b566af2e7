"""The width of the terminal, and colours where they help."""

import os
import re
import shutil
import sys
import textwrap

from tinystory.run.text import printable

WIDEST = 100  # columns of prose, and of lines that no terminal shows
COLOURS = {"opening": "36", "better": "32", "worse": "31"}  # cyan, green, red


def width() -> int:
    """Columns for prose and tables: the terminal's, at most WIDEST; WIDEST without a terminal."""
    return min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)


def colour(text: str, name: str) -> str:
    """`text` in one of COLOURS, if stdout is a terminal and NO_COLOR (https://no-color.org) is
    unset or empty; else `text`."""
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return f"\033[{COLOURS[name]}m{text}\033[0m"


def story_text(opening: str, story: str) -> str:
    """An opening and its story as printable text, wrapped to the width; the opening has its
    colour. Paragraphs stay apart."""
    opening = printable(opening)
    paragraphs = printable(f"{opening} {story}").split("\n")
    text = "\n".join(textwrap.fill(paragraph, width()) for paragraph in paragraphs)
    # Wrapping moves white space alone.
    characters = len("".join(opening.split()))
    beginning = re.match(rf"(\s*\S){{{characters}}}", text)
    assert beginning is not None, "the text begins with its opening"
    end = beginning.end()
    return colour(text[:end], "opening") + text[end:]
