"""Removes invisible characters from foreign text (by students, servers, files)."""

import re
import unicodedata

# Characters that a model sees and a human does not: Unicode's Default_Ignorable_Code_Point beyond
# the categories in `_visible`, variation selectors (which can encode hidden text), fillers and the
# blank Braille cell.
_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)


def printable(text: str) -> str:
    """`text` without control characters (including escape sequences), invisible characters and
    characters that cannot be encoded. Newlines stay; other white space that is a control character
    becomes a space, so words stay separate. Idempotent."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return _IGNORABLE.sub("", "".join(map(_visible, text)))


def is_blank(text: str) -> bool:
    """Whether `text` has no visible characters."""
    return not printable(text).strip()


def _visible(char: str) -> str:
    if char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return char
    return " " if char.isspace() else ""
