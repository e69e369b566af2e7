"""Coreference: the probabilities of a name that the story has introduced, and of the right one of
he and she."""

import re
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinystory.data.builtin import vocabulary
from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.stories import mean_of
from tinystory.student.model import Student

NAMES = tuple(sorted(set(f"{vocabulary.GIRLS} {vocabulary.BOYS} {vocabulary.CREATURES}".split())))
NAME = re.compile(rf"\b({'|'.join(NAMES)})\b")
BATCH = 16


@torch.no_grad()
def coreference(
    student: Student, tokenizer: Tokenizer, stories: Iterable[str]
) -> dict[str, float | int | None]:
    """Mean probability of the right candidate, and the numbers of places, `names` and `pronouns`.
    None without a place.

    repeated_name is the probability of a repeated name among all NAMES (chance is 1 / 52).
    introduced_name is, at the same places, the total probability of all names introduced so far,
    since two of them would often do. he_or_she is the probability of the right one of the two
    (chance is 1 / 2). A name counts if it is one token, including its space. Stories are truncated
    to the context."""
    device, context = student.wte.weight.device, student.config.context
    name_ids = {name: ids[0] for name in NAMES if len(ids := tokenizer.encode(f" {name}")) == 1}
    names = torch.tensor(sorted(name_ids.values()), device=device)
    column = {int(id): i for i, id in enumerate(names)}
    opposite = {
        a[0]: b[0]
        for he, she in ((" he", " she"), (" He", " She"), ("He", "She"))
        if len(a := tokenizer.encode(he)) == len(b := tokenizer.encode(she)) == 1
    }
    opposite |= {she: he for he, she in opposite.items()}
    repeated, introduced, pronouns = [], [], []
    rows = sorted(
        (_repeated_names(tokenizer, story, context, name_ids) for story in stories),
        key=lambda r: len(r[0]),
    )
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        tokens = pad_sequence(
            [torch.tensor(ids, device=device) for ids, _ in batch], batch_first=True
        )
        for hidden, (ids, places) in zip(student.hidden(tokens[:, :-1]), batch, strict=True):
            if places:
                probs = _probabilities(student, hidden[[at - 1 for at, _ in places]], names)
                for row, (at, known) in zip(probs, places, strict=True):
                    repeated.append(float(row[column[ids[at]]]))
                    introduced.append(float(row[[column[id] for id in known]].sum()))
            for i in range(1, len(ids)):
                if ids[i] in opposite:
                    pair = torch.tensor([ids[i], opposite[ids[i]]], device=device)
                    pronouns.append(float(_probabilities(student, hidden[i - 1], pair)[0]))
    return {
        "repeated_name": mean_of(repeated),
        "introduced_name": mean_of(introduced),
        "names": len(repeated),
        "he_or_she": mean_of(pronouns),
        "pronouns": len(pronouns),
    }


def _probabilities(student: Student, hidden: Tensor, ids: Tensor) -> Tensor:
    """(..., len(ids)): the softmax over these tokens alone, after hidden states (..., C)."""
    return (hidden.float() @ student.wte.weight[ids].float().T).softmax(-1)


def _repeated_names(
    tokenizer: Tokenizer, story: str, context: int, name_ids: dict[str, int]
) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """The story's tokens; each repeated name's position, with the ids of all names introduced
    before it."""
    ids = tokenizer.encode(story)[: context + 1]
    ends = np.cumsum(tokenizer.token_sizes[ids]).tolist()
    name_at = {len(story[: match.end()].encode()): match[1] for match in NAME.finditer(story)}
    introduced: dict[str, None] = {}
    places = []
    for at, end in enumerate(ends):
        if (name := name_at.get(end)) is None:
            continue
        if name in introduced and name_ids.get(name) == ids[at]:
            places.append((at, [name_ids[other] for other in introduced if other in name_ids]))
        introduced[name] = None
    return ids, places
