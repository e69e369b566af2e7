"""Validation during pretraining (a loss and a story), and bits per byte on any corpus."""

import math
from collections.abc import Callable, Iterable, Sequence

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

FIT_DOCUMENTS = 64  # documents on which the best temperature is fitted
TEMPERATURES = (0.25, 4.0)  # range of the best temperature
SEARCH_STEPS = 16  # of the search for it, which narrow the range of its logarithm to 0.001
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


@torch.no_grad()
def best_temperature_bits(
    student: Student, tokenizer: Tokenizer, documents: Sequence[str]
) -> tuple[float, list[float]]:
    """The temperature of a student with the fewest bits on the first FIT_DOCUMENTS documents, and
    bits per byte of each document at that temperature. A document that exceeds the context is
    cut."""
    weight = student.unembedding
    hidden, targets, sizes = [], [], []
    for document in documents:
        tokens, _ = encode(tokenizer, [document])
        row = np.concatenate([[tokenizer.eos], tokens]).astype(np.int64)[: student.config.context]
        inputs = upload(torch.from_numpy(row), weight.device)
        hidden.append(student.hidden(inputs[None, :-1])[0])
        targets.append(inputs[1:])
        sizes.append(int(tokenizer.token_sizes[row[1:]].sum()))

    def nats(temperature: float, count: int) -> list[float]:
        scaled = torch.cat(hidden[:count]) / temperature
        logprobs, _ = ops.token_logprob(scaled, weight, torch.cat(targets[:count]))
        parts = logprobs.double().split([len(target) for target in targets[:count]])
        return [-float(part.sum()) for part in parts]

    def fitted_nats(log_temperature: float) -> float:
        return sum(nats(math.exp(log_temperature), FIT_DOCUMENTS))

    low, high = map(math.log, TEMPERATURES)
    temperature = math.exp(golden_section(fitted_nats, low, high))
    values = nats(temperature, len(documents))
    bits = [value / math.log(2) / size for value, size in zip(values, sizes, strict=True)]
    return temperature, bits


def golden_section(function: Callable[[float], float], low: float, high: float) -> float:
    """The place of the minimum, within [low, high], of a function with one minimum."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(SEARCH_STEPS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2
