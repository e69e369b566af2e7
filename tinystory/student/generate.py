"""`generate`: the student continues many prompts, sampled token by token with a KV cache.

On a CPU the C++ engine runs the token steps, where it can; otherwise `TokenStep` does, on a GPU as a CUDA graph. A draw
depends on (seed, story index, position) and the logits alone, so a story does not depend on the rest of its batch.
"""

import contextlib
import functools
import math
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinystory import ops
from tinystory.data.tokenizer import Tokenizer
from tinystory.ops import reference
from tinystory.run.device import Download
from tinystory.run.errors import UserError
from tinystory.student.model import KVCache, Student, ValueHead

# Stories decoded at the same time on a CPU: ROWS per thread if the weights are at most CACHE bytes, which stay in its
# caches; else LARGE_ROWS in all, so that a token step reads the weights once for many.
ROWS, LARGE_ROWS, CACHE = 32, 128, 32 << 20


@dataclass
class Story:
    """A continuation of an opening, on the CPU.

    prompt_ids (P,) int64: the opening, after an end token. tokens (n,) int64: with the end token, if the story drew
    one. logprobs, entropies (n,) float32, in nats: of softmax(logits / temperature) at each token, before top-k and
    top-p truncate it. values (n,) float32: the value head's, or 0 without one. ended: "eos" or "length".
    """

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
        """Whether it has an end, and the mean of its log-probabilities: the larger, the more the student means it."""
        return self.ended == "eos", float(self.logprobs.mean())


@dataclass(frozen=True)
class Sampling:
    """eos: the end token. temperature, top_k, top_p: as in `ops.sample`. dropout: as in `dropout_steps`."""

    max_new_tokens: int
    eos: int
    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    dropout: float = 0.0


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
    """A story for each opening, in order, with the indices first_index, first_index + 1, ...

    An opening is read once for all of its stories that are written at the same time. Each story is handed to
    `on_story` as soon as it ends. A temperature below 1e-6 is greedy decoding; dropout: see `dropout_steps`. The
    matmuls and the KV cache have autocast's type. Raises UserError when an opening and its story do not fit the
    context.
    """
    if temperature < 1e-6:
        temperature, top_k = 1.0, 1
    sampling = Sampling(max_new_tokens, tokenizer.eos, seed, temperature, top_k, top_p, dropout)
    device, dtype = student.wte.weight.device, ops.matmul_dtype(student.wte.weight)
    prompt_ids = {text: torch.tensor(encode_opening(tokenizer, text), device="cpu") for text in dict.fromkeys(openings)}
    prompts = {text: ids.to(device) for text, ids in prompt_ids.items()}
    require_room(student, max(map(len, prompts.values())), max_new_tokens)
    token_steps, size = student_steps, rows_at_once(len(openings), weights_size(student), device)
    if dropout:
        token_steps = dropout_steps
    elif engine_runs(device, dtype):  # it begins new stories in place of those that end
        token_steps, size = engine_steps, len(openings)
    stories: dict[int, Story] = {}
    for first in range(0, len(openings), size):
        texts = openings[first : first + size]
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        prompt_of = torch.tensor([distinct[text] for text in texts], device=device)
        offset = first_index + first
        steps = token_steps(student, value_head, [prompts[text] for text in distinct], prompt_of, sampling, offset)
        for outputs, ended in steps:
            for row, (tokens, logprobs, values, entropies) in ended_rows(outputs, ended):
                text = tokenizer.decode(tokens.tolist()).strip()
                reason = "eos" if tokens[-1] == tokenizer.eos else "length"
                opening = texts[row]
                ids = prompt_ids[opening]
                story = Story(offset + row, opening, text, ids, tokens, logprobs, values, entropies, reason)
                stories[first + row] = story
                if on_story:
                    on_story(story)
    return [stories[row] for row in range(len(openings))]


def rows_at_once(count: int, weights: int, device: torch.device) -> int:
    """How many of so many stories are written at the same time: on a CPU few enough for its caches to hold what is read
    for each token. weights: the student's, in bytes."""
    rows = ROWS * torch.get_num_threads() if weights <= CACHE else LARGE_ROWS
    return count if device.type == "cuda" else min(count, rows)


def weights_size(student: Student) -> int:
    """Bytes of the student's weights in autocast's type."""
    return sum(p.numel() for p in student.parameters()) * ops.matmul_dtype(student.wte.weight).itemsize


# The outputs up to this token step, tokens int64 and logprobs, values, entropies float32, all (count, max_new_tokens);
# and, of each story that ends with it, its row there and how many tokens it has.
Step = tuple[tuple[Tensor, ...], list[tuple[int, int]]]
TokenSteps = Callable[[Student, ValueHead | None, list[Tensor], Tensor, Sampling, int], Iterator[Step]]


def ended_rows(outputs: Sequence[Tensor], ended: list[tuple[int, int]]) -> Iterator[tuple[int, list[Tensor]]]:
    """The row of each story that has ended, and its part of the outputs, on the CPU. ended: rows and lengths. Not
    views: pickle writes the whole tensor of a view."""
    if ended:
        rows, lengths = map(list, zip(*ended, strict=True))
        with reading(outputs[0].device):
            columns = [column[rows, : max(lengths)].cpu() for column in outputs]
        for i, (row, length) in enumerate(ended):
            yield row, [column[i, :length].clone() for column in columns]


def engine_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the C++ engine runs on this device with matmuls of this dtype, on this machine."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not (module := ops.load()):
        return False
    return dtype == torch.float32 or module.engine_has_bf16()


def engine_steps(
    student: Student, head: ValueHead | None, prompts: list[Tensor], prompt_of: Tensor, sampling: Sampling, offset: int
) -> Iterator[Step]:
    """Token steps until every story has ended, by the C++ engine (csrc/module.cpp), in autocast's type; sums, norms,
    softmax and logits are float32. No more than `rows_at_once` are written at a time: when some end, the next begin.
    Neither they nor the number of threads change a bit of a story. The parameters must not change meanwhile. prompts:
    the distinct ones, (P_i,) int64. prompt_of: each story's, (count,) int64. Story i draws as row id offset + i."""
    heads = [] if head is None else head.named_parameters(prefix="value_head")
    parameters = {name: p.detach() for name, p in (*student.named_parameters(), *heads)}
    config, s, module = student.config, sampling, ops.load()
    assert module is not None, "engine_runs says whether there is an engine"
    engine = module.Engine(parameters, config.n_layer, config.n_head, ops.matmul_dtype(student.wte.weight), CACHE)
    at_once = rows_at_once(len(prompt_of), weights_size(student), prompt_of.device)
    sizes = s.max_new_tokens, s.eos, s.seed, offset, at_once
    outputs = engine.start(prompts, prompt_of, *sizes, s.temperature, s.top_k, s.top_p)
    alive = len(prompt_of)
    while alive:
        ended = engine.step()
        alive -= len(ended)
        yield outputs, ended


def student_steps(
    student: Student, head: ValueHead | None, prompts: list[Tensor], prompt_of: Tensor, sampling: Sampling, offset: int
) -> Iterator[Step]:
    """The same steps on any device, by PyTorch and our kernels; on CUDA as captured graphs, STEPS_AHEAD of which have
    been launched by the time that the host reads the tokens of one."""
    count, last = len(prompt_of), sampling.max_new_tokens - 1
    with student.lowered(ops.matmul_dtype(student.wte.weight)):
        step = token_step(student, head, count, sum(map(len, prompts)), sampling)
        step.start(prompts, prompt_of, offset)
        outputs = tuple(column[:count] for column in step.outputs)
        batch = torch.arange(count, device="cpu")  # rows of the outputs
        alive = torch.ones(count, dtype=torch.bool, device="cpu")  # of the outputs' rows, those that have not ended
        launched = deque([(batch, Download(step.drawn))])
        ahead, t_launched = STEPS_AHEAD if step.on_graph else 0, 0
        for t in range(last + 1):
            while t_launched < min(t + ahead, last):
                step.advance()
                launched.append((batch, Download(step.drawn)))
                t_launched += 1
            rows, download = launched.popleft()
            tokens, alive_here = download.wait(), alive[rows]
            ops.require_drawn(tokens[alive_here], rows[alive_here] + offset)
            ended = rows[alive_here & ((tokens == sampling.eos) | (t == last))]
            yield outputs, [(row, t + 1) for row in ended.tolist()]
            alive[ended] = False
            if not alive.any():
                return
            size = next_batch_size(int(alive.sum()), len(batch), step.on_graph)
            if size < len(batch):
                # Rows that have ended fill the batch up to its size, the first of them.
                remaining = (~alive[batch]).to(torch.uint8).argsort(stable=True)[:size].sort().values
                step.keep(remaining)
                batch = batch[remaining]


def dropout_steps(
    student: Student, head: ValueHead | None, prompts: list[Tensor], prompt_of: Tensor, sampling: Sampling, offset: int
) -> Iterator[Step]:
    """The same steps with dropout on the embedding, the attention weights and the branches, in plain PyTorch, for
    --rollout-dropout. Each story and token has its own masks, which depend on the batch. Nothing is truncated, and the
    values are 0."""
    s, p, bits = sampling, sampling.dropout, random.Random(f"{sampling.seed} {offset}")
    torch.manual_seed(bits.getrandbits(48))
    openings = [prompts[i] for i in prompt_of.tolist()]
    tokens = pad_sequence(openings, batch_first=True)
    rows, lengths = torch.arange(len(tokens), device=tokens.device), tokens.new_tensor([*map(len, openings)])
    size, T = (len(rows), s.max_new_tokens), tokens.shape[1]
    dtype = ops.matmul_dtype(student.wte.weight)
    cache = KVCache(student.config, tokens.new_zeros(size[0], 2), T + size[1], dtype)
    outputs = (tokens.new_zeros(size), *torch.zeros(3, *size, device=tokens.device))
    alive, seed = torch.ones(len(rows), dtype=torch.bool), bits.getrandbits(40)

    def attend(i: int, qkv: Tensor) -> Tensor:
        if qkv.dim() == 4:  # of one token
            return reference.decode_attention(qkv, cache.prefix[i], cache.spans, cache.own[i], lengths, p)
        cache.own[i, :, :T] = qkv[:, :, 1:]
        return ops.causal_attention(qkv, p, seed + i)

    hidden = student.trunk(student.wte(tokens) + student.wpe.weight[:T], attend, p, seed)[rows, lengths - 1]
    for t in range(s.max_new_tokens):
        drawn, logprobs, entropies = ops.sample(
            student.logits(hidden), seed=s.seed, rows=rows + offset, step=t, temperature=s.temperature
        )
        outputs[0][:, t], outputs[1][:, t], outputs[3][:, t] = drawn, logprobs, entropies
        ended = alive & ((drawn == s.eos).cpu() | (t + 1 == s.max_new_tokens))
        yield outputs, [(row, t + 1) for row in ended.nonzero()[:, 0].tolist()]
        alive &= ~ended
        if not alive.any():
            return
        seed = bits.getrandbits(40)
        hidden = student.trunk(student.wte(drawn) + student.wpe(lengths), attend, p, seed)
        lengths += 1


STEPS_AHEAD = 4  # a launched step takes a GPU longer than the host takes to read one


def next_batch_size(alive: int, rows: int, on_graph: bool) -> int:
    """Batch size for the next step, given how many of the rows are still generating.

    Without a graph that number: compacting costs one copy. A graph must be captured for each size, which takes
    milliseconds. So there the batch is halved when half of its rows have ended: at most log2(rows) graphs serve a whole
    run. A batch of 64 rows or fewer is never compacted: a step reads the weights once for all rows, so it takes about
    as long as for one row.
    """
    if not on_graph:
        return alive
    while rows > 64 and alive <= (rows + 1) // 2:
        rows = (rows + 1) // 2
    return rows


TOKEN_STEPS: WeakKeyDictionary[Student, "TokenStep"] = WeakKeyDictionary()  # on a GPU, between rollouts


def token_step(
    student: Student, head: ValueHead | None, count: int, prompt_tokens: int, sampling: Sampling
) -> "TokenStep":
    """A TokenStep for so many stories and tokens of prompts: on a GPU the last rollout's, with the graphs that it has
    captured, if it fits. Between rollouts it keeps its KV cache."""
    step = TOKEN_STEPS.get(student)
    if step is None or not step.fits(head, count, prompt_tokens, sampling):
        TOKEN_STEPS.pop(student, None)
        del step  # first, for its memory
        step = TokenStep(student, head, count, prompt_tokens, sampling)
        if step.on_graph:
            TOKEN_STEPS[student] = step
    return step


def graphs_run(device: torch.device) -> bool:
    """Whether token steps are captured as graphs: on CUDA, unless the reference runs, which waits for the device."""
    return device.type == "cuda" and bool(ops.load())


class TokenStep:
    """A token step of a batch of R rows: read each row's last token, draw the next, write it to the outputs.

    All state that changes from step to step is in tensors that stay at the same address, for a whole run, and nothing
    waits for the device. So on CUDA the step is captured as a graph, once for each R; a replay costs the host one
    launch instead of one per kernel.

    drawn (R,) int64: the last token of each row; the first is drawn by `start`. at (R,) int64: each row's index in the
    outputs. ids (R,) int64: the row ids of its draws. cache: its lengths are also the step that each row is at.
    outputs: tokens int64 and logprobs, values, entropies float32, (rows + 1, max_new_tokens). Rows that have ended
    write to the last row of the outputs, which is never read.
    """

    def __init__(self, student: Student, head: ValueHead | None, rows: int, prompt_tokens: int, sampling: Sampling):
        """rows: the most stories. prompt_tokens: the most tokens of prompts."""
        device, dtype = student.wte.weight.device, ops.matmul_dtype(student.wte.weight)
        self.on_graph = graphs_run(device)
        self.rows, self.prefix = rows, -(-prompt_tokens // 1024) * 1024 if self.on_graph else prompt_tokens
        self.student = cast(Student, weakref.proxy(student))  # whose entry in TOKEN_STEPS this is
        self.head, self.dtype, self.sampling = head, dtype, sampling
        # Tokens are looked up in the embedding as it is. Rows of logits that are no whole cache lines slow cuBLAS down.
        (V, C), padding = student.wte.weight.shape, -student.wte.weight.shape[0] % 64 if self.on_graph else 0
        self.unembedding = torch.zeros(V + padding, C, dtype=dtype, device=device)
        self.padding_bias = torch.zeros(V + padding, dtype=dtype, device=device) if padding else None
        if self.padding_bias is not None:
            self.padding_bias[V:] = -math.inf
        spans = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self.cache = KVCache(student.config, spans, sampling.max_new_tokens, dtype, self.prefix)
        self.state = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.at, self.ids, self.drawn = self.state
        self.outputs = tuple(
            torch.zeros(rows + 1, sampling.max_new_tokens, dtype=output_dtype, device=device)
            for output_dtype in (torch.int64, torch.float32, torch.float32, torch.float32)
        )
        # Per number of rows: None once the step has run, then its graph. All share the memory pool of the first.
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self.addresses = self.parameter_addresses()

    def parameter_addresses(self) -> list[int]:
        """The addresses of the parameters that a graph reads."""
        heads = [] if self.head is None else self.head.parameters()
        return [p.data_ptr() for p in (*self.student.parameters(), *self.student.copies, *heads)]

    def fits(self, head: ValueHead | None, count: int, prompt_tokens: int, sampling: Sampling) -> bool:
        """Whether this can be started again for that, in autocast's type."""
        room = count <= self.rows and prompt_tokens <= self.prefix
        same = head is self.head and sampling == self.sampling and self.addresses == self.parameter_addresses()
        return room and same and self.dtype == ops.matmul_dtype(self.student.wte.weight)

    def start(self, prompts: list[Tensor], prompt_of: Tensor, offset: int) -> None:
        """Begin a story for each entry of prompt_of, (count,) int64, and draw its first token."""
        ends = torch.tensor([len(prompt) for prompt in prompts], device=prompt_of.device).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        self.cache.restart(torch.stack([starts, ends], 1)[prompt_of])
        self.at, self.ids, self.drawn = self.state[:, : len(prompt_of)]
        torch.arange(len(prompt_of), out=self.at)
        torch.add(self.at, offset, out=self.ids)
        self.unembedding[: len(self.student.wte.weight)] = self.student.wte.weight.detach()
        for column in self.outputs:
            column.zero_()
        self.draw(self.student.prefill(prompts, self.cache)[prompt_of])

    def draw(self, hidden: Tensor) -> None:
        """Draw from the final hidden states (R, C)."""
        step, s = self.cache.lengths, self.sampling
        logits = F.linear(hidden, self.unembedding, self.padding_bias)
        drawn, logprobs, entropies = ops.sample(
            logits, seed=s.seed, rows=self.ids, step=step, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p
        )
        values = torch.zeros_like(logprobs) if self.head is None else self.head(hidden)
        for column, new in zip(self.outputs, (drawn, logprobs, values, entropies), strict=True):
            column[self.at, step] = new
        self.drawn.copy_(drawn)
        self.at.masked_fill_(drawn == s.eos, self.rows)

    def run(self) -> None:
        """Read the last tokens and draw the next."""
        # A negative token could not be drawn. In a row that is alive it raises an error when the host reads it.
        self.draw(self.student.step(self.drawn.clamp_min(0), self.cache))

    def advance(self) -> None:
        """Run one step: on CUDA the first ever with so many rows eagerly, the others as a graph."""
        rows = len(self.at)
        if not self.on_graph:
            self.run()
        elif rows not in self.graphs:
            self.warm_up()
            self.graphs[rows] = None
        else:
            graph = self.graphs[rows] = self.graphs[rows] or self.capture()
            graph.replay()

    def warm_up(self) -> None:
        """Run the step on the stream of the capture, so that all set-up that a capture forbids is done before: cuBLAS's
        and the loading of kernels at their first use."""
        device = self.at.device
        main, side = torch.cuda.current_stream(device), side_stream(device, "capture")
        side.wait_stream(main)
        with torch.cuda.stream(side):
            self.run()
        main.wait_stream(side)

    def capture(self) -> torch.cuda.CUDAGraph:
        """Record the step without running it. Other threads may use the device meanwhile.

        Not by torch.cuda.graph, which waits for the device and empties the allocator's cache each time."""
        graph = torch.cuda.CUDAGraph()
        pools = [other.pool() for other in self.graphs.values() if other]
        with torch.cuda.stream(side_stream(self.at.device, "capture")):
            graph.capture_begin(pool=pools[0] if pools else None, capture_error_mode="thread_local")
            try:
                self.run()
            finally:
                graph.capture_end()
        return graph

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these. rows: (n,) int64, on the CPU, indices into the present rows."""
        rows = rows.to(self.at.device)
        self.cache.keep(rows)
        self.state[:, : len(rows)] = self.state[:, rows]
        self.at, self.ids, self.drawn = self.state[:, : len(rows)]


@functools.cache
def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """One stream per purpose, "capture" or "reading": cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


def reading(device: torch.device) -> contextlib.AbstractContextManager:
    """Context for reading rows that have ended, to which no later step writes: on a GPU a stream of its own, which does
    not wait for the steps that are launched."""
    return torch.cuda.stream(side_stream(device, "reading")) if device.type == "cuda" else contextlib.nullcontext()


def require_room(student: Student, opening_tokens: int, max_new_tokens: int) -> None:
    """Raises UserError when opening and story do not fit the context."""
    room = student.config.context - opening_tokens
    if max_new_tokens > room:
        advice = f"lower --max-new-tokens to {room}, or " * (room > 0) + "shorten the opening"
        raise UserError(
            f"the opening ({opening_tokens} tokens) and the story (--max-new-tokens {max_new_tokens}) do not fit the "
            f"student's context of {student.config.context}: {advice}"
        )


def encode_opening(tokenizer: Tokenizer, opening: str) -> list[int]:
    """The tokens of a prompt: an end token, as before every document of the corpus, and the opening."""
    return [tokenizer.eos, *tokenizer.encode(opening)]
