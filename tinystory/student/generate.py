"""`generate`: the student continues many openings, sampled token by token with a KV cache.

On a CPU the C++ engine runs the token steps, where it can; otherwise `TokenStep` does, on a GPU as a CUDA graph. A draw
depends on (seed, story index, position) and the logits alone, so a story does not depend on the rest of its batch.
"""

import contextlib
import functools
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from tinystory import ops
from tinystory.data.tokenizer import Tokenizer
from tinystory.device import Download
from tinystory.errors import UserError
from tinystory.ops.engine import Engine
from tinystory.student.model import KVCache, Student, ValueHead


@dataclass
class Story:
    """What the student wrote after the opening, on the CPU.

    tokens (n,) int64: with the end token, if the story drew one. logprobs, entropies (n,) float32, in nats: of
    softmax(logits / temperature) at each token, before top-k and top-p truncate it. values (n,) float32: the value
    head's, or 0 without one. ended: "eos" or "length".
    """

    index: int
    opening: str
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
    on_story: Callable[[Story], None] | None = None,
) -> list[Story]:
    """Continue each opening, by stories with indices first_index, first_index + 1, ..., returned in that order.

    An opening that several stories share is read once. Each story is handed to `on_story` as soon as it ends.
    A temperature below 1e-6 is greedy decoding. The matmuls and the KV cache have autocast's type. Raises UserError
    when an opening and its story do not fit the context.
    """
    if temperature < 1e-6:
        temperature, top_k = 1.0, 1
    device = student.wte.weight.device
    count, distinct = len(openings), {text: i for i, text in enumerate(dict.fromkeys(openings))}
    prompts = [encode_opening(tokenizer, text) for text in distinct]
    require_room(student, max(prompts, key=len), max_new_tokens)
    lower = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if lower else student.wte.weight.dtype
    token_steps = engine_steps if Engine.runs(device, dtype) else student_steps
    steps = token_steps(
        student, value_head, [torch.tensor(prompt, device=device) for prompt in prompts],
        torch.tensor([distinct[text] for text in openings], device=device), dtype,
        max_new_tokens=max_new_tokens, eos=tokenizer.eos,
        seed=seed, first_row=first_index, temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip
    stories: dict[int, Story] = {}
    for t, (outputs, ended) in enumerate(steps):
        if not ended:
            continue
        with beside_steps(device):
            written = [column[ended, : t + 1].cpu() for column in outputs]
        for row, tokens, logprobs, values, entropies in zip(ended, *written, strict=True):
            text = tokenizer.decode(tokens.tolist()).strip()
            how = "eos" if tokens[-1] == tokenizer.eos else "length"
            stories[row] = Story(first_index + row, openings[row], text, tokens, logprobs, values, entropies, how)
            if on_story:
                on_story(stories[row])
    return [stories[row] for row in range(count)]


# prompts: the distinct openings, (P_i,) int64; which: (count,) int64, the opening that each story continues.
# One token step: tokens int64 and logprobs, values, entropies float32, all (count, max_new_tokens) and filled up to
# this step; and the rows that end with it.
Step = tuple[tuple[Tensor, ...], list[int]]


def engine_steps(
    student: Student, value_head: ValueHead | None, prompts: list[Tensor], which: Tensor, dtype: torch.dtype, **how: Any
) -> Iterator[Step]:
    """Token steps until every story has ended, by the C++ engine."""
    parameters = dict(student.named_parameters())
    if value_head is not None:
        parameters |= value_head.named_parameters(prefix="value_head")
    engine = Engine(parameters, student.layout, dtype)
    outputs = engine.start(prompts, which, **how)
    left = len(which)
    while left:
        ended = engine.step()
        left -= len(ended)
        yield outputs, ended


def student_steps(
    student: Student, value_head: ValueHead | None, prompts: list[Tensor], which: Tensor, dtype: torch.dtype,
    *, first_row: int, **how: Any,
) -> Iterator[Step]:  # fmt: skip
    """The same steps on any device, by PyTorch and our kernels; on CUDA as captured graphs, some steps of which have
    been launched by the time that the host looks at the tokens of one."""
    count, new, eos = len(which), how["max_new_tokens"], how["eos"]
    with student.lowered(dtype):
        step = token_step(student, value_head, count, sum(map(len, prompts)), dtype, how)
        step.start(prompts, which, first_row)
        outputs = tuple(column[:count] for column in step.outputs)
        rows = torch.arange(count, device="cpu")  # the batch, as rows of the outputs
        alive = torch.ones(count, dtype=torch.bool, device="cpu")  # which rows of the outputs have not ended
        launched = deque([(rows, Download(step.drawn))])
        ahead, t_launched = AHEAD if step.on_graph else 0, 0
        for t in range(new):
            while t_launched < min(t + ahead, new - 1):
                step.advance()
                launched.append((rows, Download(step.drawn)))
                t_launched += 1
            batch, drawn = launched.popleft()
            tokens = drawn.wait()
            written = alive[batch]
            ops.require_drawn(tokens[written], batch[written] + first_row)
            ended = batch[written & ((tokens == eos) | (t + 1 == new))]
            yield outputs, ended.tolist()
            alive[ended] = False
            left = int(alive.sum())
            if not left:
                return
            size = rows_to_keep(left, len(rows), step.on_graph)
            if size < len(rows):
                # The first that have ended fill the batch up to its size.
                kept = (~alive[rows]).to(torch.uint8).argsort(stable=True)[:size].sort().values
                step.keep(kept)
                rows = rows[kept]


AHEAD = 4  # steps: a launched step takes a GPU longer than the host takes to look at one


def rows_to_keep(alive: int, rows: int, on_graph: bool) -> int:
    """How many of a batch of `rows` to go on with, of which `alive` have not ended.

    Without a graph those: compacting costs one copy. A graph must be captured for each size, which takes milliseconds.
    So there it waits until half of the rows have ended, and goes on with half of the rows, whatever has ended: at most
    log2(rows) graphs serve a whole run. It never compacts a batch of 64 rows or fewer: a step reads the weights once
    for all rows, so it takes about as long as for one row.
    """
    if not on_graph:
        return alive
    while rows > 64 and alive <= (rows + 1) // 2:
        rows = (rows + 1) // 2
    return rows


KEPT: WeakKeyDictionary[Student, "TokenStep"] = WeakKeyDictionary()  # of students on a GPU


def token_step(
    student: Student, value_head: ValueHead | None, count: int, prefix: int, dtype: torch.dtype, how: dict[str, Any]
) -> "TokenStep":
    """A TokenStep for so many stories and tokens of openings: on a GPU that of the last time, with the graphs that it
    has captured, if it fits. Between rollouts it keeps its KV cache."""
    step = KEPT.get(student)
    if step is None or not step.serves(value_head, count, prefix, dtype, how):
        KEPT.pop(student, None)
        del step  # first, for its memory
        step = TokenStep(student, value_head, count, prefix, dtype, how)
        if step.on_graph:
            KEPT[student] = step
    return step


def graphs_run(device: torch.device) -> bool:
    """Whether token steps are captured as graphs: on CUDA, unless the reference, which waits, runs in plain PyTorch."""
    return device.type == "cuda" and bool(ops.load())


class TokenStep:
    """A token step of a batch of R rows: read each row's last token, draw the next, write it to the outputs.

    All state that changes from step to step is in tensors that stay at the same address, for a whole run, and nothing
    waits for the device. So on CUDA the step is captured as a graph, once for each R; a replay costs the host one
    launch instead of one per kernel.

    drawn (R,) int64: the last token of each row; the first is drawn by `start`. at (R,) int64: each row's index in the
    outputs. ids (R,) int64: what its draws depend on. cache: its lengths are also the step that each row is at.
    outputs: tokens int64 and logprobs, values, entropies float32, (rows + 1, max_new_tokens). Rows that have ended
    write to the last row of the outputs, which is never read.
    """

    def __init__(
        self, student: Student, value_head: ValueHead | None, rows: int, prefix: int, dtype: torch.dtype,
        how: dict[str, Any],
    ):  # fmt: skip
        """rows: the most stories. prefix: the most tokens of openings. how: max_new_tokens, eos, and how `ops.sample`
        draws."""
        device = student.wte.weight.device
        self.on_graph = graphs_run(device)
        self.rows, self.prefix = rows, -(-prefix // 1024) * 1024 if self.on_graph else prefix
        self.student = cast(Student, weakref.proxy(student))  # which this is kept for
        self.value_head, self.dtype, self.how = value_head, dtype, how
        self.draws = {name: value for name, value in how.items() if name not in ("max_new_tokens", "eos")}
        # Tokens are looked up in the embedding as it is. Rows of logits that are no whole cache lines slow cuBLAS down.
        (V, C), padding = student.wte.weight.shape, -student.wte.weight.shape[0] % 64 if self.on_graph else 0
        self.unembedding = torch.zeros(V + padding, C, dtype=dtype, device=device)
        self.never = torch.zeros(V + padding, dtype=dtype, device=device) if padding else None
        if self.never is not None:
            self.never[V:] = -math.inf
        spans = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self.cache = KVCache(student.config, spans, how["max_new_tokens"], dtype, self.prefix)
        self.state = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.at, self.ids, self.drawn = self.state
        self.outputs = tuple(
            torch.zeros(rows + 1, how["max_new_tokens"], dtype=kind, device=device)
            for kind in (torch.int64, torch.float32, torch.float32, torch.float32)
        )
        # Per number of rows: None once the step has run, then its graph. All share the memory pool of the first.
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self.addresses = self.read_addresses()

    def read_addresses(self) -> list[int]:
        """Where the parameters are that a graph reads."""
        heads = [] if self.value_head is None else self.value_head.parameters()
        return [p.data_ptr() for p in (*self.student.parameters(), *self.student.copies, *heads)]

    def serves(
        self, value_head: ValueHead | None, count: int, prefix: int, dtype: torch.dtype, how: dict[str, Any]
    ) -> bool:
        """Whether this can be started again for that."""
        fits = count <= self.rows and prefix <= self.prefix
        same = value_head is self.value_head and dtype == self.dtype and how == self.how
        return fits and same and self.addresses == self.read_addresses()

    def start(self, prompts: list[Tensor], which: Tensor, first_row: int) -> None:
        """Begin a story for each entry of which, (count,) int64, an index into the prompts; draw its first token."""
        ends = torch.tensor([len(prompt) for prompt in prompts], device=which.device).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        self.cache.restart(torch.stack([starts, ends], 1)[which])
        self.at, self.ids, self.drawn = self.state[:, : len(which)]
        torch.arange(len(which), out=self.at)
        torch.add(self.at, first_row, out=self.ids)
        self.unembedding[: len(self.student.wte.weight)] = self.student.wte.weight.detach()
        for column in self.outputs:
            column.zero_()
        self.draw(self.student.prefill(prompts, self.cache)[which])

    def draw(self, hidden: Tensor) -> None:
        """Draw from the final hidden states (R, C)."""
        step = self.cache.lengths
        logits = F.linear(hidden, self.unembedding, self.never)
        drawn, logprobs, entropies = ops.sample(logits, rows=self.ids, step=step, **self.draws)
        values = self.value_head(hidden) if self.value_head is not None else torch.zeros_like(logprobs)
        for column, new in zip(self.outputs, (drawn, logprobs, values, entropies), strict=True):
            column[self.at, step] = new
        self.drawn.copy_(drawn)
        self.at.masked_fill_(drawn == self.how["eos"], self.rows)

    def run(self) -> None:
        """Read the last tokens and draw the next."""
        # A negative token could not be drawn. In a row that is alive that raises an error when it is looked at.
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
            graph = self.graphs[rows] or self.capture()
            self.graphs[rows] = graph
            graph.replay()

    def warm_up(self) -> None:
        """Run the step on the stream of the capture, so that all set-up that a capture forbids is done before: cuBLAS's
        and that of kernels that are loaded at their first use."""
        here, aside = torch.cuda.current_stream(self.at.device), capture_stream(self.at.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self.run()
        here.wait_stream(aside)

    def capture(self) -> torch.cuda.CUDAGraph:
        """Record the step without running it. Other threads may use the device meanwhile.

        Not by torch.cuda.graph, which waits for the device and empties the allocator's cache each time."""
        graph = torch.cuda.CUDAGraph()
        pools = [other.pool() for other in self.graphs.values() if other]
        with torch.cuda.stream(capture_stream(self.at.device)):
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
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


@functools.cache
def reading_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def beside_steps(device: torch.device) -> contextlib.AbstractContextManager:
    """In here a GPU does not wait for the steps that are launched: for reading rows that have ended, as the host knows,
    so that no later step writes them."""
    return torch.cuda.stream(reading_stream(device)) if device.type == "cuda" else contextlib.nullcontext()


def require_room(student: Student, prompt: list[int], max_new_tokens: int) -> None:
    """Raises UserError when opening and story do not fit the context."""
    room = student.config.context - len(prompt)
    if max_new_tokens > room:
        raise UserError(
            f"the opening ({len(prompt)} tokens) and the story (--max-new-tokens {max_new_tokens}) do not fit the "
            f"student's context of {student.config.context}: lower --max-new-tokens to {max(room, 0)}, or shorten it"
        )


def encode_opening(tokenizer: Tokenizer, opening: str) -> list[int]:
    """The opening as the corpus shows the student a document's beginning: after the end token of the previous one."""
    return [tokenizer.eos, *tokenizer.encode(opening)]
