"""The token step of `StudentDecoder`: PyTorch and our kernels, on CUDA captured as graphs that
serve a whole run."""

import contextlib
import functools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tinystory import ops
from tinystory.run.device import Download, upload
from tinystory.student.model import KVCache, Student, ValueHead


@dataclass(frozen=True)
class Sampling:
    """eos is the end token; temperature, top_k and top_p are `ops.sample`'s; dropout is
    `DropoutDecoder`'s."""

    max_new_tokens: int
    eos: int
    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    dropout: float = 0.0


# kept between rollouts on a GPU
TOKEN_STEPS: WeakKeyDictionary[Student, "TokenStep"] = WeakKeyDictionary()


def token_step(
    student: Student, head: ValueHead | None, count: int, prompt_tokens: int, sampling: Sampling
) -> "TokenStep":
    """A TokenStep with room for `count` stories and `prompt_tokens` tokens of prompts: on a GPU the
    last rollout's, with its KV cache and captured graphs, if it fits; otherwise a new one, with
    room for the last rollout too."""
    step = TOKEN_STEPS.pop(student, None)
    if step is None or not step.fits(head, count, prompt_tokens, sampling):
        if step and step.same(head, sampling):
            count, prompt_tokens = max(count, step.rows), max(prompt_tokens, step.prefix)
        del step  # first, for its memory
        step = TokenStep(student, head, count, prompt_tokens, sampling)
    if step.on_graph:
        TOKEN_STEPS[student] = step
    return step


class TokenStep:
    """One decoding step of R rows: read each row's last token, draw the next, write it to the
    outputs.

    The state keeps its addresses for a whole run and nothing waits for the device, so that on CUDA
    the step is captured as a graph, once for each R: a replay is one launch instead of one per
    kernel.

    drawn (R,) int64: the last token of each row; `start` draws the first. at (R,) int64: its row of
    the outputs. ids (R,) int64: row ids for the draws. cache.lengths: also each row's step. outputs
    (4, rows + 1, max_new_tokens) float32: tokens, exact in float32, logprobs, values, entropies.
    Ended rows write to the extra last row."""

    def __init__(
        self,
        student: Student,
        head: ValueHead | None,
        rows: int,
        prompt_tokens: int,
        sampling: Sampling,
    ):
        """rows, prompt_tokens: the maximum number of stories, and of tokens of all prompts."""
        device, dtype = student.wte.weight.device, ops.matmul_dtype(student.wte.weight)
        # the reference waits for the device
        self.on_graph = device.type == "cuda" and bool(ops.load())
        self.rows, self.prefix = (
            rows,
            -(-prompt_tokens // 1024) * 1024 if self.on_graph else prompt_tokens,
        )
        self.student = cast(Student, weakref.proxy(student))  # whose entry in TOKEN_STEPS this is
        self.head, self.dtype, self.sampling = head, dtype, sampling
        # A padded copy, for logits alone: rows of logits that are not whole cache lines slow cuBLAS
        # down.
        V, C = student.wte.weight.shape
        self.unembedding = torch.zeros(
            V + (-V % 64 if self.on_graph else 0), C, dtype=dtype, device=device
        )
        spans = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self.cache = KVCache(student.config, spans, sampling.max_new_tokens, dtype, self.prefix)
        self.state = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.at, self.ids, self.drawn = self.state
        self.outputs = torch.zeros(4, rows + 1, sampling.max_new_tokens, device=device)
        # Per number of rows: None once the step has run, then its graph. All share the memory pool
        # of the first.
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self.addresses = self.parameter_addresses()

    def parameter_addresses(self) -> list[int]:
        heads = [] if self.head is None else self.head.parameters()
        return [p.data_ptr() for p in (*self.student.parameters(), *self.student.copies, *heads)]

    def same(self, head: ValueHead | None, sampling: Sampling) -> bool:
        """Whether the graphs compute this, in autocast's dtype, for any number of rows."""
        same = (
            head is self.head
            and sampling == self.sampling
            and self.addresses == self.parameter_addresses()
        )
        return same and self.dtype == ops.matmul_dtype(self.student.wte.weight)

    def fits(
        self, head: ValueHead | None, count: int, prompt_tokens: int, sampling: Sampling
    ) -> bool:
        return count <= self.rows and prompt_tokens <= self.prefix and self.same(head, sampling)

    def start(self, prompts: Sequence[Tensor], prompt_of: Sequence[int], offset: int) -> None:
        """Begin a story for each entry of prompt_of, an index into prompts, and draw its first
        token."""
        ends = [*accumulate(map(len, prompts), initial=0)]
        table = torch.tensor([[ends[i], ends[i + 1], i] for i in prompt_of], device="cpu")
        table = upload(table, self.state.device)
        self.cache.restart(table[:, :2])
        self.at, self.ids, self.drawn = self.state[:, : len(prompt_of)]
        torch.arange(len(prompt_of), out=self.at, device=self.at.device)
        torch.add(self.at, offset, out=self.ids)
        self.unembedding[: len(self.student.wte.weight)] = self.student.wte.weight.detach()
        self.draw(self.student.prefill(prompts, self.cache).index_select(0, table[:, 2]))

    def draw(self, hidden: Tensor) -> None:
        """Draw each row's next token from its final hidden state, (R, C)."""
        step, s = self.cache.lengths, self.sampling
        logits = ops.wide_matmul(hidden.to(self.dtype), self.unembedding)
        logits[:, len(self.student.wte.weight) :] = -math.inf
        drawn, logprobs, entropies = ops.sample(
            logits,
            seed=s.seed,
            rows=self.ids,
            step=step,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
        )
        values = torch.zeros_like(logprobs) if self.head is None else self.head(hidden)
        self.outputs[:, self.at, step] = torch.stack([drawn.float(), logprobs, values, entropies])
        self.drawn.copy_(drawn)
        self.at.masked_fill_(drawn == s.eos, self.rows)

    def run(self) -> None:
        # A negative token marks a failed draw. In a row that is alive it raises an error when the
        # host reads it.
        self.draw(self.student.step(self.drawn.clamp_min(0), self.cache))

    def advance(self) -> None:
        """Run one step: on CUDA eagerly the first time with this number of rows, then as a
        graph."""
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
        """Run the step on the capture's stream first: a capture forbids cuBLAS's set-up and the
        loading of kernels."""
        device = self.at.device
        main, side = torch.cuda.current_stream(device), side_stream(device, "capture")
        side.wait_stream(main)
        with torch.cuda.stream(side):
            self.run()
        main.wait_stream(side)

    def capture(self) -> torch.cuda.CUDAGraph:
        """Record the step without running it. Other threads may use the device meanwhile. Unlike
        this, torch.cuda.graph waits for the device and empties the allocator's cache."""
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
        """Drop all rows but these, (n,) int64 on the CPU, indices into the present rows."""
        rows = upload(rows, self.at.device)
        self.cache.keep(rows)
        self.state[:, : len(rows)] = self.state[:, rows]
        self.at, self.ids, self.drawn = self.state[:, : len(rows)]

    def read(self, rows: Tensor, length: int) -> Tensor:
        """(4, n, length) float32 on the CPU: the first `length` entries of rows, (n,) int64 on the
        CPU, that no later step writes. Does not wait for steps that are launched."""
        device = self.outputs.device
        with (
            torch.cuda.stream(side_stream(device, "reading"))
            if self.outputs.is_cuda
            else contextlib.nullcontext()
        ):
            return Download(
                self.outputs[:, :, :length].index_select(1, upload(rows, device))
            ).wait()


@functools.cache
def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """One stream per purpose, "capture" or "reading": cuBLAS keeps a workspace for every stream
    that it has seen."""
    return torch.cuda.Stream(device)
