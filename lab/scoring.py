"""Log-probabilities of many texts, batched by length. Logits are computed only where a
log-probability is needed, and a prefix that texts have in common once. As in BabyLM's pipeline, no
token precedes a text, so the first token is not scored."""

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
from tinystory.rl.batch import spans
from tinystory.rl.packing import hidden_at
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
    waiting = unscored_groups(shortened)
    sums: dict[Part, Tensor] = {}
    total = sum(map(len, waiting))
    with tqdm(total=total, desc=desc, unit=" texts", leave=False, delay=2, disable=None) as bar:
        while waiting:  # longest first, so that a lack of memory is noticed at once
            batch = [waiting.pop()]
            rows = BATCH // longest(batch[0])
            while waiting and sum(map(len, batch)) + len(waiting[-1]) <= rows:
                batch.append(waiting.pop())
            parts = [*chain.from_iterable(batch)]
            sums.update(zip(parts, batch_sums(student, batch), strict=True))
            bar.update(len(parts))
    return [torch.stack([sums[part] for part in group]) for group in shortened]


def unscored_groups(groups: Sequence[Sequence[Part]]) -> list[list[Part]]:
    """The groups, the longest last, in which each part occurs once. The parts of a group stay
    together, so that a batch computes their common prefix once."""
    known: set[Part] = set()
    distinct_groups = []
    for group in groups:
        distinct = [part for part in dict.fromkeys(group) if part not in known]
        known.update(distinct)
        if distinct:
            distinct_groups.append(distinct)
    return sorted(distinct_groups, key=longest)


def longest(group: Sequence[Part]) -> int:
    """The length of the longest part, in tokens; at least 1."""
    return max(1, max(len(part.ids) for part in group))


def batch_sums(student: Student, groups: Sequence[Sequence[Part]]) -> Tensor:
    """`sum_logprobs` of each part of the groups, in order: (parts,) float64 on the CPU."""
    device = student.wte.weight.device
    parts = [*chain.from_iterable(groups)]
    lengths = np.array([len(part.ids) for part in parts])
    firsts = np.minimum([part.first for part in parts], lengths)
    rows = np.repeat(np.arange(len(parts)), lengths - firsts)
    sums = torch.zeros(len(parts), dtype=torch.float64)
    if len(rows) == 0:
        return sums

    row_ids = [torch.tensor(part.ids, device=device) for part in parts]
    tokens = pad_sequence(row_ids, batch_first=True)  # padding is last: no token attends to it
    scored = spans(np.arange(len(parts)) * tokens.shape[1] + firsts, lengths - firsts)
    positions = torch.from_numpy(scored).to(device)
    sizes = [len(group) for group in groups]
    group_of_row = np.repeat(np.arange(len(groups)), sizes)
    prefix_lengths = np.repeat([common_prefix(group) for group in groups], sizes)
    hidden = hidden_at(student, tokens, positions - 1, group_of_row, prefix_lengths, lengths)
    logprob, _ = ops.token_logprob(hidden, student.unembedding, tokens.flatten()[positions])
    return sums.index_add_(0, torch.from_numpy(rows), logprob.double().cpu())


def after_common_prefix(group: Sequence[Part]) -> list[Part]:
    """The same parts, without scores for the tokens of the common prefix."""
    if len(group) == 1:
        return list(group)
    common = common_prefix(group)
    return [Part(part.ids, max(part.first, common)) for part in group]


def common_prefix(group: Sequence[Part]) -> int:
    """The number of tokens that all parts begin with."""
    common = 0
    for tokens in zip(*(part.ids for part in group), strict=False):
        if len(set(tokens)) > 1:
            break
        common += 1
    return common
