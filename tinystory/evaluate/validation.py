"""Validation during pretraining (a loss and a story), and bits per byte on any corpus."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tinystory import ops
from tinystory.data.shards import TokenFile, encode
from tinystory.data.tokenizer import Tokenizer
from tinystory.data.windows import pack, pieces, token_positions
from tinystory.run import distributed
from tinystory.run.device import upload
from tinystory.run.records import Record
from tinystory.student.generate import Story, encode_opening, generate
from tinystory.student.model import Student

MAX_TOKENS = 500_000  # maximum number of tokens of a corpus for bits per byte
OPENING = "Once upon a time,"  # opening of the story at each validation
STORY_TOKENS = 80


@torch.no_grad()
def validate(
    student: Student,
    file: TokenFile,
    token_sizes: np.ndarray,
    sequences: int | None,
    batch: int,
    packing: str,
) -> tuple[float, float]:
    """Validation loss in nats per token and in bits per byte. sequences: number of sequences,
    spread evenly over the file and sharded over processes (None: all). token_sizes: (V,) int, bytes
    per token. packing: the option --packing, which says how the file is cut into sequences."""
    device = student.wte.weight.device
    context = student.config.context
    cuts = pieces(file, context, packing)
    packed = pack(cuts, context, np.arange(len(cuts)))
    count = min(sequences or len(packed), len(packed))
    spread = [packed[i * len(packed) // count] for i in range(count)]
    shard = distributed.shard_strided(spread)

    # Sums of nats, tokens and bytes. The host reads them once, at the end, so that a GPU is not
    # synchronised per batch.
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    with student.lowered(ops.matmul_dtype(student.wte.weight)):
        for first in range(0, len(shard), batch):
            rows = [file.tokens[token_positions(cuts[row])] for row in shard[first : first + batch]]
            rows = [torch.from_numpy(row.astype(np.int64)) for row in rows]
            inputs = pad_sequence([row[:-1] for row in rows], batch_first=True)
            targets = torch.cat([row[1:] for row in rows])
            padded_hidden = student.hidden(upload(inputs, device))
            hidden = torch.cat([padded_hidden[i, : len(row) - 1] for i, row in enumerate(rows)])
            logprobs, _ = ops.token_logprob(hidden, student.unembedding, upload(targets, device))
            sums[0] -= logprobs.double().sum()
            sums[1] += len(targets)
            sums[2] += int(token_sizes[targets].sum())
    nats, tokens, size = distributed.all_reduce_sum(sums).tolist()
    return nats / tokens, nats / math.log(2) / size


def story_to_opening(student: Student, tokenizer: Tokenizer, seed: int) -> Story | None:
    """A story by the student that continues OPENING; None if the context has no room for a story.
    Every call with the same seed uses the same random numbers."""
    context = student.config.context
    room = context - len(encode_opening(tokenizer, OPENING))
    if room < 1:
        return None
    most = min(STORY_TOKENS, context // 2, room)
    (story,) = generate(
        student, None, tokenizer, [OPENING], first_index=0, max_new_tokens=most, seed=seed
    )
    return story


def story_record(step: int, story: Story) -> Record:
    """The record of a story without a grade, for evaluations.jsonl."""
    record: Record = dict(step=step, index=0, opening=story.opening, story=story.text)
    record |= dict.fromkeys(("reply", "scores", "score", "reward"))
    return record | dict(words=story.words, ended=story.ended)


def bits_per_byte(
    student: Student, tokenizer: Tokenizer, documents: Iterable[str]
) -> dict[str, float]:
    """{"bits_per_byte", "tokens"}: bits per byte on the documents, joined into one stream with end
    tokens and cut after MAX_TOKENS, and the number of tokens."""
    parts: list[np.ndarray] = []
    size = 0
    for document in documents:
        tokens, _ = encode(tokenizer, [document])
        parts.append(tokens)
        size += len(tokens)
        if size >= MAX_TOKENS:
            break
    stream = np.concatenate(parts)[:MAX_TOKENS]
    file = TokenFile(stream, words=np.empty(0), offsets=np.array([0, len(stream)]))
    _, bits = validate(student, file, tokenizer.token_sizes, None, batch=16, packing="stream")
    return {"bits_per_byte": bits, "tokens": len(file)}
