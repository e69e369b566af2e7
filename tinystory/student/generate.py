"""`generate`: the student continues many prompts, sampled token by token with a KV cache.

On a CPU the C++ engine runs the token steps where it can; otherwise `TokenStep` does, on a GPU as a
CUDA graph. A draw depends on (seed, story index, position) and the logits alone, so a story does
not depend on the rest of its batch."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tinystory import ops
from tinystory.data.tokenizer import Tokenizer
from tinystory.ops import reference
from tinystory.run.device import Download, upload
from tinystory.run.errors import UserError
from tinystory.student.model import KVCache, Student, ValueHead
from tinystory.student.token_step import Sampling, token_step

# Decoding batch size on a CPU: ROWS per thread if the weights are at most CACHE bytes; else
# LARGE_ROWS in all, so that a token step reads the weights once for many stories.
ROWS, LARGE_ROWS, CACHE = 32, 128, 32 << 20

# A decoder's story, on the CPU: tokens (n,) int64; logprobs, values, entropies (n,) float32.
Columns = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class Story:
    """A continuation of an opening, on the CPU.

    prompt_ids (P,) int64: an end token, as before every document of the corpus, and the opening.
    tokens (n,) int64: with the end token, if one was drawn. logprobs, entropies (n,) float32: nats,
    under softmax(logits / temperature) before top-k and top-p. values (n,) float32: the value
    head's; 0 without one. ended: "eos" or "length"."""

    index: int
    opening: str
    text: str
    prompt_ids: Tensor
    tokens: Tensor
    logprobs: Tensor
    values: Tensor
    entropies: Tensor
    ended: str

    @property
    def words(self) -> int:
        return len(self.text.split())

    @property
    def likelihood(self) -> tuple[bool, float]:
        """A sort key: whether the story has an end, then its mean log-probability."""
        return self.ended == "eos", float(self.logprobs.mean())


@torch.no_grad()
def generate(
    student: Student,
    value_head: ValueHead | None,
    tokenizer: Tokenizer,
    openings: Sequence[str],
    *,
    first_index: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    dropout: float = 0.0,
    on_story: Callable[[Story], None] | None = None,
) -> list[Story]:
    """One story per opening, in order, with the indices first_index, first_index + 1, ...

    The stories to an opening that are decoded together share one pass over it. `on_story` gets each
    story as soon as it ends; without it, a terminal shows a progress bar. A temperature below 1e-6
    is greedy decoding. dropout: see `DropoutDecoder`. Matmuls and the KV cache have autocast's
    dtype. Raises UserError if a story may not fit the context."""
    if temperature < 1e-6:
        temperature, top_k = 1.0, 1
    sampling = Sampling(max_new_tokens, tokenizer.eos, seed, temperature, top_k, top_p, dropout)
    device, dtype = student.wte.weight.device, ops.matmul_dtype(student.wte.weight)
    prompts = {
        text: torch.tensor(encode_opening(tokenizer, text), device="cpu")
        for text in dict.fromkeys(openings)
    }
    require_room(student, max(map(len, prompts.values())), max_new_tokens)
    size = rows_at_once(
        len(openings), sum(p.numel() for p in student.parameters()) * dtype.itemsize, device
    )
    decoder: Decoder = StudentDecoder(student, value_head, sampling)
    if dropout:
        decoder = DropoutDecoder(student, sampling)
    elif engine_runs(device, dtype):  # it begins a new story when one ends
        decoder, size = EngineDecoder(student, value_head, sampling, size), len(openings)
    stories: dict[int, Story] = {}
    silent = True if on_story else None  # None: silent without a terminal
    bar = tqdm(
        total=len(openings), desc="stories", unit="story", leave=False, delay=2, disable=silent
    )
    with student.lowered(dtype), bar:
        for first in range(0, len(openings), size):
            texts = openings[first : first + size]
            place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
            decoder.start(
                [prompts[text] for text in place],
                [place[text] for text in texts],
                first_index + first,
            )
            while len(stories) < first + len(texts):
                for row, columns in decoder.step():
                    tokens, opening, index = (
                        columns[0].tolist(),
                        texts[row],
                        first_index + first + row,
                    )
                    text, ended = (
                        tokenizer.decode(tokens).strip(),
                        "eos" if tokens[-1] == tokenizer.eos else "length",
                    )
                    story = stories[first + row] = Story(
                        index, opening, text, prompts[opening], *columns, ended
                    )
                    if on_story:
                        on_story(story)
                    bar.update()
    return [stories[row] for row in range(len(openings))]


def rows_at_once(count: int, weights: int, device: torch.device) -> int:
    """Decoding batch size: on a CPU, few enough that weights (in bytes) and KV cache stay in the
    caches."""
    rows = ROWS * torch.get_num_threads() if weights <= CACHE else LARGE_ROWS
    return count if device.type == "cuda" else min(count, rows)


class Decoder(Protocol):
    """Decodes one batch of stories at a time, under no_grad and in autocast's dtype. The parameters
    must not change from `start` until the last story has ended."""

    def start(self, prompts: Sequence[Tensor], prompt_of: Sequence[int], offset: int) -> None:
        """Begin a batch: story i continues prompts[prompt_of[i]], (P,) int64 on the CPU, with row
        id offset + i."""

    def step(self) -> list[tuple[int, Columns]]:
        """Decode a token of each story. Returns pairs (i, columns) for the stories that end."""


def engine_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the C++ engine runs on this machine, for this device and matmul dtype."""
    if (
        device.type != "cpu"
        or dtype not in (torch.float32, torch.bfloat16)
        or not (module := ops.load())
    ):
        return False
    return dtype == torch.float32 or module.engine_has_bf16()


def columns_of(outputs: Iterable[Tensor], row: int, length: int) -> Columns:
    """Copies, not views, because pickle would write the whole tensor of a view."""
    tokens, logprobs, values, entropies = (column[row, :length].clone() for column in outputs)
    return tokens.long(), logprobs, values, entropies


class EngineDecoder:
    """The C++ engine (csrc/cpu/engine.cpp), with float32 sums, norms, softmax and logits. It
    decodes at most `size` stories at a time; neither this nor the number of threads changes a bit
    of a story."""

    def __init__(self, student: Student, head: ValueHead | None, sampling: Sampling, size: int):
        heads = [] if head is None else head.named_parameters(prefix="value_head")
        parameters = {name: p.detach() for name, p in (*student.named_parameters(), *heads)}
        config, module = student.config, ops.load()
        assert module is not None, "engine_runs says whether there is an engine"
        dtype = ops.matmul_dtype(student.wte.weight)
        self.engine = module.Engine(parameters, config.n_layer, config.n_head, dtype, CACHE)
        self.sampling, self.size = sampling, size

    def start(self, prompts: Sequence[Tensor], prompt_of: Sequence[int], offset: int) -> None:
        s, rows = self.sampling, torch.tensor(prompt_of, device="cpu")
        sizes = s.max_new_tokens, s.eos, s.seed, offset, self.size
        self.outputs = self.engine.start(
            list(prompts), rows, *sizes, s.temperature, s.top_k, s.top_p
        )

    def step(self) -> list[tuple[int, Columns]]:
        return [(row, columns_of(self.outputs, row, length)) for row, length in self.engine.step()]


class StudentDecoder:
    """PyTorch and our kernels on any device, inside `Student.lowered`; on CUDA as captured graphs,
    of which the host launches STEPS_AHEAD before it reads the tokens of one."""

    def __init__(self, student: Student, head: ValueHead | None, sampling: Sampling):
        self.student, self.head, self.sampling = student, head, sampling

    def start(self, prompts: Sequence[Tensor], prompt_of: Sequence[int], offset: int) -> None:
        count = len(prompt_of)
        self.token_step = token_step(
            self.student, self.head, count, sum(map(len, prompts)), self.sampling
        )
        self.token_step.start(prompts, prompt_of, offset)
        self.offset, self.t = offset, 0
        self.batch = torch.arange(count, device="cpu")  # the story in each row of the batch
        self.alive = torch.ones(count, dtype=torch.bool, device="cpu")
        self.launched = deque([(self.batch, Download(self.token_step.drawn))])

    def step(self) -> list[tuple[int, Columns]]:
        last, on_graph = self.sampling.max_new_tokens - 1, self.token_step.on_graph
        while len(self.launched) <= min(STEPS_AHEAD if on_graph else 0, last - self.t):
            self.token_step.advance()
            self.launched.append((self.batch, Download(self.token_step.drawn)))
        stories, download = self.launched.popleft()
        tokens, alive = download.wait(), self.alive[stories]
        ops.require_drawn(tokens[alive], stories[alive] + self.offset)
        ended = stories[alive & ((tokens == self.sampling.eos) | (self.t == last))]
        self.alive[ended], self.t = False, self.t + 1
        outputs = [*self.token_step.read(ended, self.t)] if len(ended) else []
        remain = int(self.alive.sum())
        if remain and (size := next_batch_size(remain, len(self.batch), on_graph)) < len(
            self.batch
        ):
            # Rows that have ended fill the batch up to its size.
            rows = (
                (~self.alive[self.batch]).to(torch.uint8).argsort(stable=True)[:size].sort().values
            )
            self.token_step.keep(rows)
            self.batch = self.batch[rows]
        return [(row, columns_of(outputs, i, self.t)) for i, row in enumerate(ended.tolist())]


class DropoutDecoder:
    """Plain PyTorch with dropout, for --rollout-dropout. Masks differ per story and token, and
    depend on the batch. There is no top-k or top-p, and the values are 0."""

    def __init__(self, student: Student, sampling: Sampling):
        self.student, self.sampling = student, sampling

    def start(self, prompts: Sequence[Tensor], prompt_of: Sequence[int], offset: int) -> None:
        s, device = self.sampling, self.student.wte.weight.device
        self.bits = random.Random(f"{s.seed} {offset}")
        torch.manual_seed(self.bits.getrandbits(48))
        openings = [prompts[i] for i in prompt_of]
        tokens = upload(pad_sequence(openings, batch_first=True), device)
        self.lengths = upload(torch.tensor([*map(len, openings)], device="cpu"), device)
        count, T = tokens.shape
        spans, dtype = self.lengths.new_zeros(count, 2), ops.matmul_dtype(self.student.wte.weight)
        self.cache = KVCache(self.student.config, spans, T + s.max_new_tokens, dtype)
        self.outputs = torch.zeros(4, count, s.max_new_tokens, device=device)
        self.alive = torch.ones(count, dtype=torch.bool, device="cpu")
        self.rows, self.offset, self.t = torch.arange(count, device=device), offset, 0
        self.hidden = self.read(tokens, self.student.wpe.weight[:T])[self.rows, self.lengths - 1]

    def read(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The final hidden states of the stories' first tokens, (B, T), or of the next token of
        each, (B,)."""
        p, seed = self.sampling.dropout, self.bits.getrandbits(40)

        def attend(i: int, qkv: Tensor) -> Tensor:
            if qkv.dim() == 4:
                return reference.decode_attention(
                    qkv, self.cache.prefix[i], self.cache.spans, self.cache.own[i], self.lengths, p
                )
            self.cache.own[i, :, : qkv.shape[1]] = qkv[:, :, 1:]
            return ops.causal_attention(qkv, p, seed + i)

        return self.student.trunk(self.student.wte(tokens) + positions, attend, p, seed)

    def step(self) -> list[tuple[int, Columns]]:
        s, t = self.sampling, self.t
        if t:
            drawn = self.outputs[0, :, t - 1].long()
            self.hidden = self.read(drawn, self.student.wpe(self.lengths))
            self.lengths += 1
        logits = self.student.logits(self.hidden)
        drawn, logprobs, entropies = ops.sample(
            logits, seed=s.seed, rows=self.rows + self.offset, step=t, temperature=s.temperature
        )
        self.outputs[:, :, t] = torch.stack(
            [drawn.float(), logprobs, torch.zeros_like(logprobs), entropies]
        )
        ended = self.alive & ((drawn == s.eos).cpu() | (t + 1 == s.max_new_tokens))
        self.alive, self.t = self.alive & ~ended, t + 1
        outputs = [*self.outputs.cpu()] if ended.any() else []
        return [(row, columns_of(outputs, row, t + 1)) for row in ended.nonzero()[:, 0].tolist()]


STEPS_AHEAD = 4  # a launched step takes a GPU longer than the host takes to read one


def next_batch_size(alive: int, rows: int, on_graph: bool) -> int:
    """Batch size for the next step, when `alive` of the rows are still generating.

    Without a graph it is `alive`: compacting costs one copy. Capturing a graph for a new size takes
    milliseconds, so there the batch is halved when half of its rows have ended, down to 64, which
    take about as long as one, because a step reads the weights once for all rows."""
    if not on_graph:
        return alive
    while rows > 64 and alive <= (rows + 1) // 2:
        rows = (rows + 1) // 2
    return rows


def require_room(student: Student, opening_tokens: int, max_new_tokens: int) -> None:
    """Raises UserError if opening and story exceed the context."""
    if max_new_tokens > (room := student.config.context - opening_tokens):
        advice = f"lower --max-new-tokens to {room}, or " * (room > 0) + "shorten the opening"
        raise UserError(
            f"the opening ({opening_tokens} tokens) and the story (--max-new-tokens {max_new_tokens}) do not fit the "
            f"student's context of {student.config.context}: {advice}"
        )


def encode_opening(tokenizer: Tokenizer, opening: str) -> list[int]:
    """The tokens of a prompt: an end token, as before every document of the corpus, and the
    opening."""
    return [tokenizer.eos, *tokenizer.encode(opening)]
