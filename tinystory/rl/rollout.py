"""The student writes: many stories from one opening, sampled token by token with a KV cache.

A draw depends on (seed, story index, position) and the logits alone, so a story does not depend on what it is batched
with. Finished stories leave the batch, and each is handed to `on_story` the moment it ends.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinystory import ops
from tinystory.data.tokenizer import Tokenizer
from tinystory.errors import UserError
from tinystory.ops.decoder import Decoder
from tinystory.rl.ppo import Batch
from tinystory.student.model import KVCache, Student, ValueHead


@dataclass
class Story:
    """What the student wrote after the opening. tokens (n,) int64 with the end token if it drew one; logprobs, values
    and entropies (n,) float32, of the distribution that each token was drawn from; ended: "eos" or "length"."""

    index: int
    text: str
    tokens: Tensor
    logprobs: Tensor
    values: Tensor
    entropies: Tensor
    ended: str

    @property
    def words(self) -> int:
        return len(self.text.split())


@torch.no_grad()
def rollout(
    student: Student,
    value_head: ValueHead | None,
    tokenizer: Tokenizer,
    opening: str,
    *,
    count: int,
    first_index: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    on_story: Callable[[Story], None] | None = None,
) -> list[Story]:
    """`count` stories with indices first_index, first_index + 1, ... in that order. Greedy at temperature 0.

    Raises UserError when opening and story do not fit the context.
    """
    if temperature == 0:
        temperature, top_k = 1.0, 1
    device = student.wte.weight.device
    prompt = encode_opening(tokenizer, opening)
    require_room(student, prompt, max_new_tokens)
    lower = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if lower else student.wte.weight.dtype
    token_steps = compiled_steps if Decoder.runs(device, dtype) else plain_steps
    steps = token_steps(
        student, value_head, torch.tensor(prompt, device=device), dtype,
        count=count, max_new_tokens=max_new_tokens, eos=tokenizer.eos,
        seed=seed, first_row=first_index, temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip
    stories: list[Story | None] = [None] * count
    for t, (outputs, ended) in enumerate(steps):
        written = [column[ended, : t + 1].cpu() for column in outputs] if ended else [[]] * 4
        for row, tokens, logprobs, values, entropies in zip(ended, *written, strict=True):
            text = tokenizer.decode(tokens.tolist()).strip()
            how = "eos" if tokens[-1] == tokenizer.eos else "length"
            stories[row] = Story(first_index + row, text, tokens, logprobs, values, entropies, how)
            if on_story:
                on_story(stories[row])
    return stories


# Of one token step: tokens int64 and logprobs, values, entropies float32, all (count, max_new_tokens) and filled up to
# this step; and the rows that end with it.
Step = tuple[tuple[Tensor, Tensor, Tensor, Tensor], list[int]]


def compiled_steps(
    student: Student, value_head: ValueHead | None, prompt: Tensor, dtype: torch.dtype, **how
) -> Iterator[Step]:
    """Token steps until every story has ended, by the compiled engine."""
    head = [] if value_head is None else value_head.parameters()
    decoder = Decoder([*student.parameters(), *head], student.config.n_head, dtype)
    outputs = decoder.start(prompt, **how)
    left = how["count"]
    while left:
        ended = decoder.step()
        left -= len(ended)
        yield outputs, ended


def plain_steps(
    student: Student, value_head: ValueHead | None, prompt: Tensor, dtype: torch.dtype,
    *, count: int, max_new_tokens: int, eos: int, first_row: int, **draws,
) -> Iterator[Step]:  # fmt: skip
    """The same on any device, operation by operation."""
    device = prompt.device
    cache = KVCache(student.config, count, len(prompt), max_new_tokens, device, dtype)
    hidden = student.prefill(prompt, cache)
    tokens = torch.zeros(count, max_new_tokens, dtype=torch.int64, device=device)
    columns = tuple(torch.zeros(count, max_new_tokens, device=device) for _ in range(3))
    alive = torch.arange(count, device="cpu")  # the batch's rows, as positions in the step
    at = alive.to(device)
    for t in range(max_new_tokens):
        drawn, logprobs, entropy = ops.sample(student.logits(hidden), rows=at + first_row, step=t, **draws)
        tokens[at, t] = drawn
        values = value_head(hidden) if value_head is not None else torch.zeros_like(logprobs)
        for column, new in zip(columns, (logprobs, values, entropy), strict=True):
            column[at, t] = new
        read = drawn.cpu()  # the one wait for the device in a step
        ops.require_drawn(read, alive + first_row)
        ended = (read == eos) | (t + 1 == max_new_tokens)
        yield (tokens, *columns), alive[ended].tolist()
        if ended.all():
            break
        if ended.any():
            alive, kept = alive[~ended], (~ended).nonzero()[:, 0].to(device)
            cache.keep(kept)
            at, drawn = at[kept], drawn[kept]
        hidden = student.step(drawn, cache)


def require_room(student: Student, prompt: list[int], max_new_tokens: int) -> None:
    """Raises UserError when opening and story do not fit the context."""
    room = student.config.context - len(prompt)
    if max_new_tokens > room:
        raise UserError(
            f"the opening ({len(prompt)} tokens) and the story (--max-new-tokens {max_new_tokens}) do not fit the "
            f"student's context of {student.config.context}: lower --max-new-tokens to {max(room, 0)}, or shorten it"
        )


def encode_opening(tokenizer: Tokenizer, opening: str) -> list[int]:
    """The opening as the student has seen beginnings in its corpus: after the end of the story before."""
    return [tokenizer.eos, *tokenizer.encode(opening)]


def distinct_ngrams(texts: list[str], n: int = 4) -> float | None:
    """Different word n-grams of all texts together over all their n-grams (Li et al. 2016, arXiv 1510.03055): towards 0
    when the texts are one and the same. None where there are no n-grams."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def collate(stories: list[Story], tokenizer: Tokenizer, opening: str, device: torch.device) -> Batch:
    """Stories -> right-padded tensors for PPO."""

    def pad(rows: list[Tensor], value: float) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value).to(device)

    return Batch(
        prompt=torch.tensor(encode_opening(tokenizer, opening), device=device),
        tokens=pad([s.tokens for s in stories], tokenizer.pad),
        mask=pad([torch.ones(len(s.tokens), dtype=torch.bool) for s in stories], False),
        logprobs=pad([s.logprobs for s in stories], 0.0),
        values=pad([s.values for s in stories], 0.0),
    )
