"""`generate`: the student continues many openings, sampled token by token with a KV cache.

On a CPU the C++ engine runs the token steps, where it can; otherwise `TokenStep` does, on a GPU as a CUDA graph. A draw
depends on (seed, story index, position) and the logits alone, so a story does not depend on the rest of its batch.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinystory import ops
from tinystory.data.tokenizer import Tokenizer
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
    temperature 0 is greedy decoding. The matmuls and the KV cache have autocast's type. Raises UserError when an
    opening and its story do not fit the context.
    """
    if temperature == 0:
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
    *, max_new_tokens: int, eos: int, first_row: int, **draws: Any,
) -> Iterator[Step]:  # fmt: skip
    """The same steps on any device, by PyTorch and our kernels; on CUDA as captured graphs."""
    count = len(which)
    step = TokenStep(student, value_head, prompts, which, dtype, max_new_tokens, first_row, draws)
    outputs = tuple(column[:count] for column in step.outputs)
    rows = torch.arange(count, device="cpu")  # the batch, as rows of the outputs
    alive = torch.ones(count, dtype=torch.bool, device="cpu")  # which of them have not ended
    for t in range(max_new_tokens):
        if t:
            step.advance()
        drawn = step.drawn.cpu()  # the only wait for the device in a step
        ops.require_drawn(drawn[alive], rows[alive] + first_row)
        ended = alive & ((drawn == eos) | (t + 1 == max_new_tokens))
        yield outputs, rows[ended].tolist()
        if not ended.any():
            continue
        alive &= ~ended
        if not alive.any():
            return
        if worth_compacting(int(alive.sum()), len(alive), step.on_graph):
            step.keep(alive.nonzero()[:, 0])
            rows, alive = rows[alive], alive[alive]
        else:
            step.ignore(ended)


def worth_compacting(alive: int, rows: int, on_graph: bool) -> bool:
    """Whether to take the rows that have ended out of a batch of `rows`.

    Without a graph always: compacting costs one copy. A graph must be captured again, which takes milliseconds. So
    there it waits until half of the rows have ended, which makes at most log2(rows) captures, and it never compacts a
    batch of 64 rows or fewer: a step reads the weights once for all rows, so it takes about as long as for one row.
    """
    return rows > 64 and 2 * alive <= rows if on_graph else alive < rows


class TokenStep:
    """A token step of a batch of R rows: read each row's last token, draw the next, write it to the outputs.

    All state that changes from step to step is in tensors that stay at the same address, and nothing waits for the
    device. So on CUDA the step is captured as a graph; a replay costs the host one launch instead of one per kernel.

    drawn (R,) int64: the last token of each row; the first is drawn by the constructor. at (R,) int64: each row's index
    in the outputs. cache: its lengths are also the step that each row is at. outputs: tokens int64 and logprobs,
    values, entropies float32, (count + 1, max_new_tokens). Rows that have ended stay in the batch until `keep` and
    write to the last row of the outputs, which is never read.
    """

    def __init__(
        self, student: Student, value_head: ValueHead | None, prompts: list[Tensor], which: Tensor, dtype: torch.dtype,
        max_new_tokens: int, first_row: int, draws: dict,
    ):  # fmt: skip
        device, count = which.device, len(which)
        self.student, self.value_head, self.first_row, self.draws = student, value_head, first_row, draws
        self.unembedding = student.wte.weight.detach().to(dtype)  # tokens are looked up in the embedding as it is
        ends = torch.tensor([len(prompt) for prompt in prompts], device=device).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        self.cache = KVCache(student.config, torch.stack([starts, ends], 1)[which], max_new_tokens, dtype)
        self.at = torch.arange(count, device=device)
        self.drawn = torch.zeros_like(self.at)
        self.outputs = tuple(
            torch.zeros(count + 1, max_new_tokens, dtype=kind, device=device)
            for kind in (torch.int64, torch.float32, torch.float32, torch.float32)
        )
        self.on_graph = device.type == "cuda" and bool(ops.load())  # the reference in plain PyTorch waits
        self.graphs: list[torch.cuda.CUDAGraph] = []  # the last one is in use; the earlier ones share its memory pool
        self.steps = 0  # taken by the batch at its present size
        self.draw(self.student.prefill(prompts, self.cache)[which])

    def draw(self, hidden: Tensor) -> None:
        """Draw from the final hidden states (R, C)."""
        step = self.cache.lengths
        logits = F.linear(hidden, self.unembedding)
        drawn, logprobs, entropies = ops.sample(logits, rows=self.at + self.first_row, step=step, **self.draws)
        values = self.value_head(hidden) if self.value_head is not None else torch.zeros_like(logprobs)
        for column, new in zip(self.outputs, (drawn, logprobs, values, entropies), strict=True):
            column[self.at, step] = new
        self.drawn.copy_(drawn)

    def run(self) -> None:
        """Read the last tokens and draw the next."""
        # A negative token could not be drawn. In a row that is alive that has raised an error by now.
        self.draw(self.student.step(self.drawn.clamp_min(0), self.cache))

    def advance(self) -> None:
        """Run one step: on CUDA the first at each batch size eagerly, the others as a graph."""
        if not self.on_graph:
            self.run()
        elif self.steps == 0:
            self.warm_up()
        else:
            if self.steps == 1:
                self.capture()
            self.graphs[-1].replay()
        self.steps += 1

    def warm_up(self) -> None:
        """Run the step on the stream of the capture, so that all set-up that a capture forbids is done before: cuBLAS's
        and that of kernels that are loaded at their first use."""
        here, aside = torch.cuda.current_stream(self.at.device), capture_stream(self.at.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self.run()
        here.wait_stream(aside)

    def capture(self) -> None:
        """Record the step without running it. Other threads may use the device meanwhile."""
        graph, pool = torch.cuda.CUDAGraph(), self.graphs[-1].pool() if self.graphs else None
        stream = capture_stream(self.at.device)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.run()
        self.graphs.append(graph)

    def ignore(self, ended: Tensor) -> None:
        """Write nothing more of these rows to the outputs. ended: (R,) bool, on the CPU."""
        self.at.masked_fill_(ended.to(self.at.device), len(self.outputs[0]) - 1)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these from the batch. rows: (n,) int64, on the CPU, indices into the present rows."""
        rows = rows.to(self.at.device)
        self.cache.keep(rows)
        self.at, self.drawn = self.at[rows], self.drawn[rows]
        self.steps = 0


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


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
