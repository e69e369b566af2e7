"""The token step of `StudentDecoder`, by PyTorch and our kernels. On CUDA it is captured as graphs,
which are reused for a whole run."""

import contextlib
import functools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tinystory import ops
from tinystory.run.device import Download, upload
from tinystory.student.model import KVCache, Student, ValueHead


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. eos: the end token. temperature, top_k, top_p: see `ops.sample`."""

    max_new_tokens: int
    eos: int
    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


# the last rollout's TokenStep of each student, kept on a GPU
TOKEN_STEPS: WeakKeyDictionary[Student, "TokenStep"] = WeakKeyDictionary()


def token_step(
    student: Student, head: ValueHead | None, count: int, prompt_tokens: int, sampling: Sampling
) -> "TokenStep":
    """A TokenStep with room for `count` stories and `prompt_tokens` prompt tokens. On a GPU, the
    last rollout's TokenStep is reused if it fits, with its KV cache and captured graphs. Otherwise
    the TokenStep is new, and has room for the last rollout too."""
    step = TOKEN_STEPS.pop(student, None)
    if step is None or not step.fits(head, count, prompt_tokens, sampling):
        if step:
            count = max(count, step.rows)
            prompt_tokens = max(prompt_tokens, step.prompt_tokens)
        del step  # first, for its memory
        step = TokenStep(student, head, count, prompt_tokens, sampling)
    if step.on_graph:
        TOKEN_STEPS[student] = step
    return step


class TokenStep:
    """One decoding step of R rows: read each row's last token, draw the next token, and write it to
        the outputs.

    On CUDA the step is captured as a graph, once for each R. A replay is one launch instead of one
    launch per kernel. So no part of a step may wait for the device, and all tensors of a step keep
    their addresses for a whole run: the parameters, the cache, the outputs, and the state (3,
    rows). A batch uses the first R columns of the state.

    outputs (4, rows, max_new_tokens) float32: tokens (exact in float32; negative if the draw
    failed, see `ops.sample`), logprobs, values, entropies. A row that has ended goes on to write
    behind its story, which nobody reads."""

    def __init__(
        self,
        student: Student,
        head: ValueHead | None,
        rows: int,
        prompt_tokens: int,
        sampling: Sampling,
    ):
        """rows: maximum number of stories. prompt_tokens: maximum number of tokens of all prompts
        together."""
        weight = student.unembedding
        device = weight.device
        # the reference kernels wait for the device, which a capture must not do
        self.on_graph = device.type == "cuda" and bool(ops.load())
        if self.on_graph:
            prompt_tokens = round_up(prompt_tokens, 1024)  # so that the next prompts fit too
        self.rows = rows
        self.prompt_tokens = prompt_tokens
        self.student = cast(Student, weakref.proxy(student))  # the key of this entry in TOKEN_STEPS
        self.head = head
        self.sampling = sampling
        self.dtype = ops.matmul_dtype(weight)

        # A padded copy, only for logits: cuBLAS is slow if rows of logits are not whole cache
        # lines.
        V, C = weight.shape
        if self.on_graph:
            V = round_up(V, 64)
        self.unembedding = torch.zeros(V, C, dtype=self.dtype, device=device)
        spans = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self.cache = KVCache(
            student.config, spans, sampling.max_new_tokens, self.dtype, prompt_tokens
        )
        self.state = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.batch_size = rows
        self.outputs = torch.zeros(4, rows, sampling.max_new_tokens, device=device)
        self.no_values = torch.zeros(rows, device=device)  # without a value head
        # warmed_up: numbers of rows with which the step has run once. graphs: the captured graph
        # for each number of rows. All graphs share the memory pool of the first.
        self.warmed_up: set[int] = set()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.addresses = self.parameter_addresses()

    @property
    def output_rows(self) -> Tensor:
        """(R,) int64, a view of the state: the row of `outputs` to which each row writes."""
        return self.state[0, : self.batch_size]

    @property
    def row_ids(self) -> Tensor:
        """(R,) int64, a view of the state: the row ids, which determine the random numbers."""
        return self.state[1, : self.batch_size]

    @property
    def drawn(self) -> Tensor:
        """(R,) int64, a view of the state: the last token of each row."""
        return self.state[2, : self.batch_size]

    def parameter_addresses(self) -> list[int]:
        tensors = [*self.student.parameters(), *self.student.copies]
        if self.head is not None:
            tensors += self.head.parameters()
        return [tensor.data_ptr() for tensor in tensors]

    def fits(
        self, head: ValueHead | None, count: int, prompt_tokens: int, sampling: Sampling
    ) -> bool:
        """Whether this step can serve a rollout: it has room for `count` stories and
        `prompt_tokens`, and has the same value head, sampling settings and dtype."""
        has_room = count <= self.rows and prompt_tokens <= self.prompt_tokens
        is_same_draw = head is self.head and sampling == self.sampling
        is_same_dtype = self.dtype == ops.matmul_dtype(self.student.wte.weight)
        # A captured graph reads the parameters at their old addresses.
        parameters_stay = self.addresses == self.parameter_addresses()
        return has_room and is_same_draw and is_same_dtype and parameters_stay

    def start(self, prompts: Sequence[Tensor], prompt_of: Sequence[int], offset: int) -> None:
        """Begin a story for each entry of prompt_of, an index into prompts, and draw the first
        token of each story."""
        device = self.state.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device="cpu")
        ends = lengths.cumsum(0)
        spans = torch.stack([ends - lengths, ends], dim=1)  # each prompt's, in the cache's prefix
        prompt_index = torch.tensor(prompt_of, device="cpu")
        self.cache.restart(upload(spans[prompt_index], device))
        self.batch_size = len(prompt_of)
        stories = torch.arange(self.batch_size, device=device)
        self.output_rows.copy_(stories)
        self.row_ids.copy_(stories + offset)
        weight = self.student.unembedding.detach()
        self.unembedding[: len(weight)] = weight
        hidden = self.student.prefill(prompts, self.cache)
        self.draw(hidden.index_select(0, upload(prompt_index, device)))

    def draw(self, hidden: Tensor) -> None:
        """Draw each row's next token from its final hidden state, (R, C)."""
        steps = self.cache.lengths  # (R,): the cache holds all tokens drawn before
        logits = ops.wide_matmul(hidden.to(self.dtype), self.unembedding)
        if logits.shape[1] > self.student.config.vocab_size:
            logits[:, self.student.config.vocab_size :] = -math.inf
        tokens, logprobs, entropies = ops.sample(
            logits,
            seed=self.sampling.seed,
            rows=self.row_ids,
            step=steps,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
        )
        values = self.head(hidden) if self.head else self.no_values[: self.batch_size]
        columns = torch.stack([tokens.float(), logprobs, values, entropies])
        self.outputs[:, self.output_rows, steps] = columns
        # A negative token marks a failed draw. If the row is still alive, the host raises an error
        # when it reads the token.
        torch.clamp_min(tokens, 0, out=self.drawn)

    def run(self) -> None:
        """Draw a token for each row, without a graph."""
        hidden = self.student.step(self.drawn, self.cache)
        self.draw(hidden)

    def advance(self) -> None:
        """Draw a token for each row. On CUDA this replays a graph, except the first time with this
        number of rows."""
        if not self.on_graph:
            self.run()
            return
        if self.batch_size not in self.warmed_up:
            self.warm_up()
            self.warmed_up.add(self.batch_size)
            return
        if self.batch_size not in self.graphs:
            self.graphs[self.batch_size] = self.capture()
        self.graphs[self.batch_size].replay()

    def warm_up(self) -> None:
        """Run the step once on the capture's stream, because cuBLAS cannot be set up and kernels
        cannot be loaded during a capture."""
        device = self.state.device
        main = torch.cuda.current_stream(device)
        side = capture_stream(device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            self.run()
        main.wait_stream(side)

    def capture(self) -> torch.cuda.CUDAGraph:
        """A graph of the step, which is recorded without running it. Other threads may use the
        device during the capture. (torch.cuda.graph would wait for the device and empty the
        allocator's cache.)"""
        graph = torch.cuda.CUDAGraph()
        pools = [other.pool() for other in self.graphs.values()]
        with torch.cuda.stream(capture_stream(self.state.device)):
            graph.capture_begin(pool=pools[0] if pools else None, capture_error_mode="thread_local")
            try:
                self.run()
            except BaseException:
                # the capture is invalid, and its own error would hide this one
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph

    def keep(self, rows: Tensor) -> None:
        """Drop all rows except `rows`, (n,) int64 on the CPU, indices into the present rows."""
        rows = upload(rows, self.state.device)
        self.cache.keep(rows)
        self.state[:, : len(rows)] = self.state[:, rows]
        self.batch_size = len(rows)

    def read(self, count: int, begin: int, end: int) -> Download:
        """A copy of the outputs of the first `count` stories in the steps from `begin` to `end`,
        (4, count, end - begin), when the launched steps have run."""
        return Download(self.outputs[:, :count, begin:end].contiguous())


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for captures. There is only one, because cuBLAS keeps a workspace for every stream
    that it has seen."""
    return torch.cuda.Stream(device)
