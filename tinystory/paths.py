"""The cache folder, which keeps compiled kernels and tokenized corpora between runs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """TINYSTORY_CACHE, else XDG_CACHE_HOME/tinystory, else ~/.cache/tinystory."""
    own = os.environ.get("TINYSTORY_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinystory"
