"""tinystory: a small language model learns to tell stories by interacting with a teacher.

`tinystory.load("runs/demo/interact")` returns a trained student, which generates stories and scores
them (tinystory/storyteller.py)."""

from tinystory.run import startup as _startup

_startup.set_up()  # before torch is imported

__all__ = ["load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`load`, imported at its first use, because PyTorch takes seconds to import."""
    if name == "load":
        from tinystory.storyteller import load

        return load
    raise AttributeError(f"module 'tinystory' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
