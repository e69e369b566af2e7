"""The word ledger: what the student has taken in and written, against the limits, with a hard stop."""

from dataclasses import dataclass


@dataclass
class Budget:
    """Words are whitespace-separated. In: the opening, once, and every word of every reply (arXiv 2509.15714).
    Out: every word that the student wrote."""

    limit_in: int
    limit_out: int
    words_in: int = 0
    words_out: int = 0

    def allows(self, words_in: int, words_out: int) -> bool:
        """True if a step that takes in and writes at most so many words stays within both limits."""
        return self.words_in + words_in <= self.limit_in and self.words_out + words_out <= self.limit_out

    def spend(self, words_in: int, words_out: int) -> None:
        self.words_in += words_in
        self.words_out += words_out
