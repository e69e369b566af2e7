"""Whether the student knows who is who: how probable are a name that was told and the right one of he and she."""

import re
from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinystory.data.builtin import grammar, vocabulary
from tinystory.data.tokenizer import Tokenizer
from tinystory.student.model import Student

NAMES = tuple(sorted(set(f"{vocabulary.GIRLS} {vocabulary.BOYS} {vocabulary.CREATURES}".split())))
NAME = re.compile(rf"\b({'|'.join(NAMES)})\b")
UNSEEN_SEED = 20_251_125  # of stories that are not in the built-in corpus
BATCH = 16


def unseen_stories(count: int) -> list[str]:
    return list(islice(grammar.stories(10**9, UNSEEN_SEED), count))


@torch.no_grad()
def who_is_who(student: Student, tokenizer: Tokenizer, stories: Iterable[str]) -> dict[str, float | int | None]:
    """told_name: where a story names someone again, the share of the right name in the probability of all NAMES (chance
    is 1 / 52), a mean over the places. told_names: the share of all names told so far, of which often two would do.
    he_she: the share of the right one in the probability of he and she (chance is 1 / 2), a mean over all places where
    one of them stands. Also how many places there are. Each story is read from its beginning, as far as the context
    goes; a name counts where it is one token, with the space before it. None where there is no such place."""
    device, context = student.wte.weight.device, student.config.context
    single = {name: ids[0] for name in NAMES if len(ids := tokenizer.encode(f" {name}")) == 1}
    pairs = {
        a[0]: b[0]
        for he, she in ((" he", " she"), (" He", " She"), ("He", "She"))
        if len(a := tokenizer.encode(he)) == len(b := tokenizer.encode(she)) == 1
    }
    pairs |= {b: a for a, b in pairs.items()}
    names = torch.tensor(sorted(single.values()), device=device)
    column = {int(id): at for at, id in enumerate(names)}
    right, all_told, agree = [], [], []
    rows = sorted((_places(tokenizer, story, context, single) for story in stories), key=lambda row: len(row[0]))
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        tokens = pad_sequence([torch.tensor(ids, device=device) for ids, _ in batch], batch_first=True)
        hidden = student.hidden(tokens[:, :-1])
        for row, (ids, places) in enumerate(batch):
            if names.numel():
                chances = _shares(student, hidden[row], [at - 1 for at, _, _ in places], names)
                right += [float(chances[i, column[id]]) for i, (_, id, _) in enumerate(places)]
                all_told += [
                    float(chances[i, [column[t] for t in told]].sum()) for i, (_, _, told) in enumerate(places)
                ]
            at = [i for i in range(1, len(ids)) if ids[i] in pairs]
            for i in at:
                both = torch.tensor([ids[i], pairs[ids[i]]], device=device)
                agree.append(float(_shares(student, hidden[row], [i - 1], both)[0, 0]))

    def mean(values: list[float]) -> float | None:
        return float(np.mean(values)) if values else None

    return {
        "told_name": mean(right), "told_names": mean(all_told), "names": len(right),
        "he_she": mean(agree), "pronouns": len(agree),
    }  # fmt: skip


def _shares(student: Student, hidden: Tensor, at: list[int], ids: Tensor) -> Tensor:
    """(len(at), len(ids)): the probabilities of these tokens after the positions `at`, made to sum to 1."""
    return (hidden[at].float() @ student.wte.weight[ids].float().T).softmax(-1)


def _places(
    tokenizer: Tokenizer, story: str, context: int, single: dict[str, int]
) -> tuple[list[int], list[tuple[int, int, list[int]]]]:
    """The story's tokens; and the places of names told before: position, id, and the ids of all names told so far."""
    ids = tokenizer.encode(story)[: context + 1]
    ends = np.cumsum(tokenizer.token_sizes[ids]).tolist()
    named = {len(story[: match.end()].encode()): match[1] for match in NAME.finditer(story)}
    told: list[str] = []
    places = []
    for at, (id, end) in enumerate(zip(ids, ends, strict=True)):
        name = named.get(end)
        if name is None:
            continue
        if name in told and single.get(name) == id:
            places.append((at, id, [single[other] for other in told if other in single]))
        if name not in told:
            told.append(name)
    return ids, places
