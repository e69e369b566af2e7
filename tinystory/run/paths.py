"""The cache folder, for compiled kernels and tokenized corpora; the names of commands."""

import os
import re
import shlex
from pathlib import Path

from tinystory.run.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # a clone, or the site-packages of a wheel


def cache_dir() -> Path:
    """TINYSTORY_CACHE, else XDG_CACHE_HOME/tinystory, else ~/.cache/tinystory. Raises UserError if there is no home."""
    if folder := os.environ.get("TINYSTORY_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinystory"
    except RuntimeError:
        raise UserError("there is no home folder to cache in: set HOME, or TINYSTORY_CACHE to a folder") from None


def usage(text: str | None, *arguments: object) -> str:
    """`text` as the user can type its commands: where there is no clone, `python train_interact.py` becomes
    `tinystory-interact` and `python scripts/sample.py` `tinystory-sample`, the entry points of pyproject.toml.
    arguments: appended, quoted for the shell."""
    text = " ".join([text or "", *(shlex.quote(str(argument)) for argument in arguments)])
    if (ROOT / "pyproject.toml").is_file():
        return text
    return re.sub(r"python (?:scripts/|train_)(\w+)\.py", lambda m: f"tinystory-{m[1]}".replace("_", "-"), text)
