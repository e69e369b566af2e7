"""The control `--reward likelihood`: the frozen student's own opinion of a story, with no grade at all.

Where the likelier story is the better one, a student learns as much from this as from a teacher.
"""

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any

import torch

from tinystory.config import InteractConfig
from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.scoring import part, sum_logprobs
from tinystory.student.generate import generate
from tinystory.student.model import Student

MEAN, SPREAD = 0.5, 0.2  # of the scores of the student's own stories: about those of a teacher's
STORIES = 64  # of the student's own, from which the scale is taken


class Likelihood:
    """A linear function of the mean log-probability of a story's tokens, cut off at 0 and 1."""

    def __init__(self, student: Student, tokenizer: Tokenizer, openings: Sequence[str], config: InteractConfig):
        self.student, self.tokenizer = student, tokenizer
        prompts = [openings[i % len(openings)] for i in range(STORIES)]
        sampling: dict[str, Any] = {name: getattr(config, name) for name in ("seed", "max_new_tokens", "temperature")}
        with torch.no_grad():
            stories = generate(student, None, tokenizer, prompts, first_index=0, **sampling)
        own = [x for x in self._mean_logprobs(prompts, [story.text for story in stories]) if x is not None]
        self.mean, self.spread = fmean(own), max(pstdev(own), 1e-6)

    def __call__(self, openings: Sequence[str], stories: Sequence[str]) -> list[float | None]:
        """Per story a score, 0..1; None for an empty one."""
        return [
            None if x is None else min(max(MEAN + SPREAD * (x - self.mean) / self.spread, 0.0), 1.0)
            for x in self._mean_logprobs(openings, stories)
        ]

    def _mean_logprobs(self, openings: Sequence[str], stories: Sequence[str]) -> list[float | None]:
        parts = [part(self.tokenizer, opening, f" {story}") for opening, story in zip(openings, stories, strict=True)]
        sums = sum_logprobs(self.student, [[ids] for ids in parts], "likelihood")
        counts = [len(ids) - first if story else 0 for (ids, first), story in zip(parts, stories, strict=True)]
        return [float(total) / n if n else None for total, n in zip(sums, counts, strict=True)]
