"""Coreference accuracy: the probability of a name that the story has introduced, and of the right
pronoun of he and she."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinystory.data.builtin import vocabulary
from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.intervals import mean_of
from tinystory.student.generate import encode_opening
from tinystory.student.model import Student

NAMES = tuple(sorted(set(f"{vocabulary.GIRLS} {vocabulary.BOYS} {vocabulary.CREATURES}".split())))
NAME = re.compile(rf"\b({'|'.join(NAMES)})\b")
BATCH = 16


class RepeatedName(NamedTuple):
    """The position of a repeated name, and the ids of all names introduced before it."""

    position: int
    introduced: list[int]


class EncodedStory(NamedTuple):
    """A story's tokens, and the positions of repeated names."""

    ids: list[int]
    repeated: list[RepeatedName]


@torch.no_grad()
def coreference(
    student: Student, tokenizer: Tokenizer, stories: Iterable[str]
) -> dict[str, float | int | None]:
    """Mean probabilities of the right candidate (None without a position to measure), and the
        numbers of measured positions, `names` and `pronouns`.

    repeated_name: probability of a repeated name among all NAMES (chance is 1 / 52).
    introduced_name: total probability, at the same positions, of all names introduced so far,
    because another of these names would often be correct too. he_or_she: probability of the right
    pronoun of he and she (chance is 1 / 2). A name counts if it is one token, including its space.
    Stories are read after an end token, as in training, and truncated to the context."""
    device = student.wte.weight.device
    name_ids = {}
    for name in NAMES:
        ids = tokenizer.encode(f" {name}")
        if len(ids) == 1:
            name_ids[name] = ids[0]
    names = torch.tensor(sorted(name_ids.values()), device=device)
    column = {int(id): i for i, id in enumerate(names)}
    opposite = opposite_pronouns(tokenizer)
    context = student.config.context
    texts = [repeated_names(tokenizer, story, context, name_ids) for story in stories]
    texts.sort(key=lambda text: len(text.ids))
    repeated: list[float] = []
    introduced: list[float] = []
    pronouns: list[float] = []
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        rows = [torch.tensor(text.ids, device=device) for text in batch]
        tokens = pad_sequence(rows, batch_first=True)
        for hidden, text in zip(student.hidden(tokens[:, :-1]), batch, strict=True):
            for mention in text.repeated:
                probability = softmax_over(student, hidden[mention.position - 1], names)
                right = column[text.ids[mention.position]]
                candidates = [column[id] for id in mention.introduced]
                repeated.append(float(probability[right]))
                introduced.append(float(probability[candidates].sum()))
            for i, id in enumerate(text.ids):
                if i > 0 and id in opposite:
                    pair = torch.tensor([id, opposite[id]], device=device)
                    pronouns.append(float(softmax_over(student, hidden[i - 1], pair)[0]))
    return {
        "repeated_name": mean_of(repeated),
        "introduced_name": mean_of(introduced),
        "names": len(repeated),
        "he_or_she": mean_of(pronouns),
        "pronouns": len(pronouns),
    }


def softmax_over(student: Student, hidden: Tensor, ids: Tensor) -> Tensor:
    """(len(ids),): the probabilities of the tokens `ids` after a hidden state (C,), normalised over
    `ids`."""
    return (hidden.float() @ student.unembedding[ids].float().T).softmax(-1)


def opposite_pronouns(tokenizer: Tokenizer) -> dict[int, int]:
    """The token of she for each token of he, and the reverse."""
    opposite = {}
    for he, she in ((" he", " she"), (" He", " She"), ("He", "She")):
        ids = tokenizer.encode(he) + tokenizer.encode(she)
        if len(ids) == 2:
            opposite[ids[0]] = ids[1]
            opposite[ids[1]] = ids[0]
    return opposite


def repeated_names(
    tokenizer: Tokenizer, story: str, context: int, name_ids: dict[str, int]
) -> EncodedStory:
    ids = encode_opening(tokenizer, story)[: context + 1]
    ends = np.cumsum(tokenizer.token_sizes[ids]).tolist()  # the end token has no bytes
    name_by_end = {}
    for match in NAME.finditer(story):
        end = len(story[: match.end()].encode())
        name_by_end[end] = match[1]
    introduced: list[str] = []
    repeated = []
    for position, end in enumerate(ends):
        name = name_by_end.get(end)
        if name is None:
            continue
        if name not in introduced:
            introduced.append(name)
        elif name_ids.get(name) == ids[position]:
            known = [name_ids[other] for other in introduced if other in name_ids]
            repeated.append(RepeatedName(position, known))
    return EncodedStory(ids, repeated)
