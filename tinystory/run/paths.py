"""The cache folder for compiled kernels and tokenized corpora, and commands as the user can type
them."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from tinystory.run.errors import UserError
from tinystory.run.text import printable

ROOT = Path(__file__).resolve().parents[2]  # a clone, or the site-packages of a wheel


def cache_dir() -> Path:
    """The cache folder: TINYSTORY_CACHE, or else XDG_CACHE_HOME/tinystory, or else
    ~/.cache/tinystory. Raises UserError if there is no home folder."""
    if folder := os.environ.get("TINYSTORY_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "tinystory"
    try:
        return Path.home() / ".cache" / "tinystory"
    except RuntimeError:
        raise UserError(
            "there is no home folder to cache in: set HOME, or TINYSTORY_CACHE to a folder"
        ) from None


def usage(text: str | None) -> str:
    """`text` with commands as the user can type them: outside a clone, `python scripts/sample.py`
    becomes `tinystory-sample` and `python train_interact.py` `tinystory-interact`, the entry points
    of pyproject.toml."""
    text = text or ""
    if (ROOT / "pyproject.toml").is_file():
        return text
    return re.sub(
        r"python (?:scripts/|train_)(\w+)\.py",
        lambda match: f"tinystory-{match[1]}".replace("_", "-"),
        text,
    )


def hint(script: str, *arguments: object) -> str:
    """The command that runs a script from the current folder; in a clone, with the current
    interpreter."""
    words = usage(f"python {script}").split()
    if words[0] == "python":
        words = [_interpreter(), _from_here(ROOT / script)]
    words += map(str, arguments)
    return printable(shlex.join(words))


def _interpreter() -> str:
    python = Path(sys.executable)
    on_path = shutil.which(python.name) == sys.executable
    return python.name if on_path else _from_here(python)


def _from_here(path: Path) -> str:
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return str(path)
