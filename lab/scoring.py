"""Log-probabilities of many texts, batched by length. Logits are computed only where a
log-probability is needed. As in BabyLM's pipeline, no token precedes a text, so the first token is
not scored."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tinystory import ops
from tinystory.data.tokenizer import Tokenizer
from tinystory.student.model import Student

BATCH = 4096  # tokens, including padding


class Part(NamedTuple):
    """A text to score: token ids, and the index (>= 1) of the first scored token."""

    ids: tuple[int, ...]
    first: int


def part(tokenizer: Tokenizer, prefix: str, rest: str) -> Part:
    """A Part that scores `rest` after `prefix`. A token that spans the boundary is scored."""
    ids = tokenizer.encode(prefix + rest)
    ends = np.cumsum(tokenizer.token_sizes[ids])
    first = int(np.searchsorted(ends, len(prefix.encode()), side="right"))
    return Part(tuple(ids), max(first, 1))


@torch.no_grad()
def sum_logprobs(student: Student, groups: Sequence[Sequence[Part]], desc: str) -> list[Tensor]:
    """For each group, (parts,) float64: the sum over i >= first of log p(token i | tokens before
    i), in nats. The common prefix of a group's parts is left out, because it cannot decide between
    them. All parts must fit the student's context."""
    shortened = [after_common_prefix(group) for group in groups]
    distinct = dict.fromkeys(chain.from_iterable(shortened))
    waiting = sorted(distinct, key=lambda part: len(part.ids))
    sums: dict[Part, Tensor] = {}
    total = len(waiting)
    with tqdm(total=total, desc=desc, unit=" texts", leave=False, delay=2, disable=None) as bar:
        while waiting:  # longest first, so that a lack of memory is noticed at once
            longest = max(len(waiting[-1].ids), 1)
            size = max(BATCH // longest, 1)
            batch = waiting[-size:]
            del waiting[-size:]
            sums.update(zip(batch, batch_sums(student, batch), strict=True))
            bar.update(len(batch))
    return [torch.stack([sums[part] for part in group]) for group in shortened]


def batch_sums(student: Student, batch: Sequence[Part]) -> Tensor:
    """`sum_logprobs` of each part: (len(batch),) float64 on the CPU."""
    device = student.wte.weight.device
    rows: list[int] = []
    positions: list[int] = []
    for row, part in enumerate(batch):
        scored = range(part.first, len(part.ids))
        rows.extend([row] * len(scored))
        positions.extend(scored)
    sums = torch.zeros(len(batch), dtype=torch.float64)
    if not rows:
        return sums

    row_ids = [torch.tensor(part.ids, device=device) for part in batch]
    tokens = pad_sequence(row_ids, batch_first=True)  # padding is last: no token attends to it
    row_index = torch.tensor(rows, device=device)
    position = torch.tensor(positions, device=device)
    hidden = student.hidden(tokens)[row_index, position - 1]
    logprob, _ = ops.token_logprob(hidden, student.unembedding, tokens[row_index, position])
    return sums.index_add_(0, torch.tensor(rows), logprob.double().cpu())


def after_common_prefix(group: Sequence[Part]) -> list[Part]:
    """The same parts, without scores for the tokens of the common prefix."""
    if len(group) == 1:
        return list(group)
    common = 0
    for tokens in zip(*(part.ids for part in group), strict=False):
        if len(set(tokens)) > 1:
            break
        common += 1
    return [Part(part.ids, max(part.first, common)) for part in group]
