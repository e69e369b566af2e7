"""Log-probabilities of many texts, batched by length; logits are computed only where a
log-probability is needed. As in BabyLM's pipeline, no token precedes a text, so its first token is
context only."""

from collections.abc import Sequence
from itertools import chain, takewhile

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tinystory import ops
from tinystory.data.tokenizer import Tokenizer
from tinystory.student.model import Student

BATCH = 4096  # tokens, including padding

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
