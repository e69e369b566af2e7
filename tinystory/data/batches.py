"""Batches of rows of similar length."""

from collections.abc import Iterator

from numpy import ndarray


def by_length(lengths: ndarray, size: int) -> Iterator[ndarray]:
    """Indices in groups of at most `size` of similar length, so that little padding is computed."""
    order = lengths.argsort(kind="stable")
    for first in range(0, len(order), size):
        yield order[first : first + size]
