"""Log-probabilities of many texts: all that the evaluations here need from a student.

Texts that are compared form a tree, with their common prefix once. Trees are batched with others of similar size, and
logits are computed only where a log-probability is needed. No token precedes a text, as in BabyLM's pipeline: its first
token is context only.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tinystory import ops
from tinystory.data.tokenizer import Tokenizer
from tinystory.student.model import Student

BATCH = 4096  # tokens, including padding

Part = tuple[tuple[int, ...], int]  # token ids, and the index (>= 1) of the first whose log-probability counts


def part(tokenizer: Tokenizer, prefix: str, rest: str) -> Part:
    """`rest` after `prefix`. A token that spans the end of one and the beginning of the other counts."""
    tokens = tokenizer.encode(prefix + rest)
    ends = np.cumsum(tokenizer.token_sizes[tokens])
    first = int(np.searchsorted(ends, len(prefix.encode()), side="right"))
    return tuple(tokens), max(first, 1)


@torch.no_grad()
def sum_logprobs(student: Student, groups: Sequence[Sequence[Part]], desc: str) -> list[Tensor]:
    """Per group a tensor (parts,) float64: the sum over i >= first of log p(token i | tokens before i), in nats.

    The common prefix of a group's parts is computed once and not summed, since it cannot decide between them. No part
    may be longer than the student's context."""
    device = student.wte.weight.device
    trees = [_tree(group) for group in groups]
    order = sorted(range(len(trees)), key=lambda i: len(trees[i].tokens))
    sums: list[Tensor] = [torch.empty(0)] * len(groups)
    with tqdm(total=len(groups), desc=desc, unit=" items", leave=False, delay=2, disable=None) as bar:
        while order:  # the longest first, so that a lack of memory shows at once
            width = len(trees[order[-1]].tokens)
            begin = max(len(order) - max(BATCH // max(width, 1), 1), 0)
            rows, order = order[begin:], order[:begin]
            batch = [trees[row] for row in rows]
            tokens, positions, branch = (
                pad_sequence([torch.tensor(values, dtype=torch.int64, device=device) for values in column], True)
                for column in zip(*((tree.tokens, tree.positions, tree.branch) for tree in batch), strict=True)
            )
            totals = torch.zeros(len(batch), 1 + max(len(groups[row]) for row in rows), dtype=torch.float64)
            targets = [(row, before, at) for row, tree in enumerate(batch) for before, at in tree.scored]
            if targets:
                row, before, at = torch.tensor(targets, device=device).T
                hidden = _hidden(student, tokens, positions, branch)[row, before]
                logprob, _ = ops.token_logprob(hidden, student.wte.weight, tokens[row, at])
                totals.index_put_((row.cpu(), branch[row, at].cpu()), logprob.double().cpu(), accumulate=True)
            for row, total in zip(rows, totals, strict=True):
                sums[row] = total[1 : 1 + len(groups[row])]
            bar.update(len(rows))
    return sums


class _Tree(NamedTuple):
    """A group as one row: the common prefix of its parts (branch 0), then the rest of each (branches 1, 2, ...).

    scored: for each token that counts, the index of the token before it and its own."""

    tokens: list[int]
    positions: list[int]
    branch: list[int]
    scored: list[tuple[int, int]]


def _tree(group: Sequence[Part]) -> _Tree:
    texts = [ids for ids, _ in group]
    columns = zip(*texts, strict=False) if len(group) > 1 else ()
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    tree = _Tree([*texts[0][:common]], [*range(common)], [0] * common, [])
    for branch, (ids, first) in enumerate(group, 1):
        shift = len(tree.tokens) - common
        tree.tokens.extend(ids[common:])
        tree.positions.extend(range(common, len(ids)))
        tree.branch.extend([branch] * (len(ids) - common))
        tree.scored.extend(
            (shift + i - 1 if i > common else i - 1, shift + i) for i in range(max(first, common), len(ids))
        )
    return tree


def _hidden(student: Student, tokens: Tensor, positions: Tensor, branch: Tensor) -> Tensor:
    """Final hidden states (B, T, C) where a token sees the earlier tokens of its own branch and of branch 0.
    tokens, positions, branch: (B, T) int64. The padding comes last, so that no token sees it."""
    T = tokens.shape[1]
    earlier = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
    mask = earlier & ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None]))

    def attend(_: int, qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2)

    return student.trunk(student.wte(tokens) + student.wpe(positions), attend)
