"""Log-probabilities of many texts, batched by length; logits are computed only where a
log-probability is needed. As in BabyLM's pipeline, no token precedes a text, so its first token is
context only."""

from collections.abc import Sequence
from itertools import chain, takewhile
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tinystory import ops
from tinystory.config import InteractConfig
from tinystory.data.tokenizer import Tokenizer
from tinystory.student.generate import generate
from tinystory.student.model import Student

BATCH = 4096  # tokens, including padding
# the student's own stories get about this mean and deviation from a teacher
MEAN, SPREAD = 0.5, 0.2
STORIES = 64  # the student's own stories that set the scale

# token ids, and the index (>= 1) of the first whose log-probability counts
Part = tuple[tuple[int, ...], int]


def part(tokenizer: Tokenizer, prefix: str, rest: str) -> Part:
    """`rest`, to be scored after `prefix`. A token that spans their boundary counts."""
    tokens = tokenizer.encode(prefix + rest)
    ends = np.cumsum(tokenizer.token_sizes[tokens])
    first = int(np.searchsorted(ends, len(prefix.encode()), side="right"))
    return tuple(tokens), max(first, 1)


@torch.no_grad()
def sum_logprobs(student: Student, groups: Sequence[Sequence[Part]], desc: str) -> list[Tensor]:
    """Per group (parts,) float64: the sum over i >= first of log p(token i | tokens before i), in
    nats. The common prefix of a group's parts, which cannot decide between them, is left out. Parts
    must fit the student's context."""
    device = student.wte.weight.device
    parts = [_after_common_prefix(group) for group in groups]
    # each distinct one once
    rows = sorted(dict.fromkeys(chain.from_iterable(parts)), key=lambda row: len(row[0]))
    sums: dict[Part, Tensor] = {}
    with tqdm(total=len(rows), desc=desc, unit=" texts", leave=False, delay=2, disable=None) as bar:
        while rows:  # the longest first, so that a lack of memory shows at once
            begin = max(len(rows) - max(BATCH // max(len(rows[-1][0]), 1), 1), 0)
            batch, rows = rows[begin:], rows[:begin]
            tokens = pad_sequence(
                [torch.tensor(ids, device=device) for ids, _ in batch], batch_first=True
            )
            totals = torch.zeros(len(batch), dtype=torch.float64)
            targets = [
                (i, at) for i, (ids, first) in enumerate(batch) for at in range(first, len(ids))
            ]
            if targets:
                row, at = torch.tensor(targets, device=device).T
                hidden = student.hidden(tokens)[row, at - 1]  # padding comes last: no token sees it
                logprob, _ = ops.token_logprob(hidden, student.wte.weight, tokens[row, at])
                totals.index_put_((row.cpu(),), logprob.double().cpu(), accumulate=True)
            sums |= zip(batch, totals, strict=True)
            bar.update(len(batch))
    return [torch.stack([sums[row] for row in group]) for group in parts]


def _after_common_prefix(group: Sequence[Part]) -> list[Part]:
    columns = zip(*(ids for ids, _ in group), strict=False) if len(group) > 1 else ()
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return [(ids, max(first, common)) for ids, first in group]


class Likelihood:
    """The control `--reward likelihood`: a linear function of the mean log-probability of a story's
    tokens under the frozen student, clipped to 0..1. If the likelier story is the better one, it
    teaches as much as a teacher."""

    def __init__(
        self,
        student: Student,
        tokenizer: Tokenizer,
        openings: Sequence[str],
        config: InteractConfig,
    ):
        self.student, self.tokenizer = student, tokenizer
        prompts = [openings[i % len(openings)] for i in range(STORIES)]
        sampling: dict[str, Any] = {
            name: getattr(config, name) for name in ("seed", "max_new_tokens", "temperature")
        }
        with torch.no_grad():
            stories = generate(student, None, tokenizer, prompts, first_index=0, **sampling)
        own = [
            x
            for x in self._mean_logprobs(prompts, [story.text for story in stories])
            if x is not None
        ]
        self.mean, self.spread = fmean(own), max(pstdev(own), 1e-6)

    def __call__(self, openings: Sequence[str], stories: Sequence[str]) -> list[float | None]:
        """Per story a score, 0..1; None for an empty one."""
        return [
            None if x is None else min(max(MEAN + SPREAD * (x - self.mean) / self.spread, 0.0), 1.0)
            for x in self._mean_logprobs(openings, stories)
        ]

    def _mean_logprobs(self, openings: Sequence[str], stories: Sequence[str]) -> list[float | None]:
        parts = [
            part(self.tokenizer, opening, f" {story}")
            for opening, story in zip(openings, stories, strict=True)
        ]
        sums = sum_logprobs(self.student, [[ids] for ids in parts], "likelihood")
        counts = [
            len(ids) - first if story else 0
            for (ids, first), story in zip(parts, stories, strict=True)
        ]
        return [float(total) / n if n else None for total, n in zip(sums, counts, strict=True)]
