"""`generate`: stories that the student samples for many prompts, token by token, with a KV cache.

On a CPU the C++ engine runs the token steps if it supports the dtype; otherwise `TokenStep` runs
them, on a GPU as a CUDA graph. A sampled token depends only on (seed, story index, position) and
the logits, so a story does not depend on the other stories of the batch."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from tinystory import ops
from tinystory.data.tokenizer import Tokenizer
from tinystory.run.device import Download
from tinystory.run.errors import UserError
from tinystory.student.model import Student, ValueHead
from tinystory.student.token_step import Sampling, token_step

# Decoding batch size on a CPU: ROWS per thread if the weights have at most CACHE bytes. Otherwise
# LARGE_ROWS in all, so that a token step reads the weights once for many stories.
ROWS = 32
LARGE_ROWS = 128
CACHE = 32 << 20

# Token steps of a GPU that the host reads together, while the next ones run.
READ_TOGETHER = 8


@dataclass
class Story:
    """A continuation of an opening, on the CPU.

    prompt_ids (P,) int64: an end token, as before every document of the corpus, then the opening.
    tokens (n,) int64: the story, with the end token if one was drawn. logprobs, entropies (n,)
    float32: nats, under softmax(logits / temperature) before top-k and top-p. values (n,) float32:
    output of the value head; 0 without a value head. ended: "eos" or "length"."""

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
    """One story per opening, in order, with the indices first_index, first_index + 1, ...

    Stories for the same opening that are decoded together share one pass over the opening.
    `on_story` is called with each story as soon as the story ends; without `on_story`, a terminal
    shows a progress bar. A temperature below 1e-6 means greedy decoding. Matmuls and the KV cache
    have autocast's dtype. Raises UserError if a story may not fit the context."""
    if temperature < 1e-6:
        temperature = 1.0
        top_k = 1
    sampling = Sampling(max_new_tokens, tokenizer.eos, seed, temperature, top_k, top_p)
    prompts = {
        opening: torch.tensor(encode_opening(tokenizer, opening), device="cpu")
        for opening in set(openings)
    }
    require_room(student, max(len(prompt) for prompt in prompts.values()), max_new_tokens)

    device = student.wte.weight.device
    dtype = ops.matmul_dtype(student.wte.weight)
    weights = sum(p.numel() for p in student.parameters()) * dtype.itemsize
    rows = rows_at_once(len(openings), weights, device)
    # A decoder gets one batch of stories at a time; no parameter may change during the batch.
    decoder: EngineDecoder | StudentDecoder
    if engine_runs(device, dtype):
        decoder = EngineDecoder(student, value_head, sampling, rows)
        batch_size = len(openings)  # the engine begins the next story whenever a row is free
    else:
        decoder = StudentDecoder(student, value_head, sampling)
        batch_size = rows

    stories: list[Story] = []
    silent = True if on_story else None  # None: silent without a terminal
    bar = tqdm(
        total=len(openings), desc="stories", unit="story", leave=False, delay=2, disable=silent
    )
    with student.lowered(dtype), bar:
        for begin in range(0, len(openings), batch_size):
            batch = openings[begin : begin + batch_size]
            unique = list(dict.fromkeys(batch))
            prompt_index = {opening: i for i, opening in enumerate(unique)}
            offset = first_index + begin  # index of the batch's first story
            decoder.start(
                [prompts[opening] for opening in unique],
                [prompt_index[opening] for opening in batch],
                offset,
            )
            while len(stories) < begin + len(batch):
                for i, columns in decoder.step():
                    opening = batch[i]
                    story = story_of(tokenizer, offset + i, opening, prompts[opening], columns)
                    stories.append(story)
                    if on_story:
                        on_story(story)
                    bar.update()
    return sorted(stories, key=lambda story: story.index)


def rows_at_once(count: int, weights: int, device: torch.device) -> int:
    """Decoding batch size: on a CPU, few enough that weights (in bytes) and KV cache stay in the
    caches."""
    if device.type == "cuda":
        return count
    rows = ROWS * torch.get_num_threads() if weights <= CACHE else LARGE_ROWS
    return min(count, rows)


def columns_of(outputs: Sequence[Tensor], row: int, length: int) -> list[Tensor]:
    """A story's tokens (n,) int64, and logprobs, values and entropies (n,) float32: the first
    `length` entries of a row of four tensors (rows, max_new_tokens). They are copies, because
    pickle would write the whole tensor of a view."""
    columns = [column[row, :length].clone() for column in outputs]
    columns[0] = columns[0].long()
    return columns


def story_of(
    tokenizer: Tokenizer, index: int, opening: str, prompt_ids: Tensor, columns: Sequence[Tensor]
) -> Story:
    tokens, logprobs, values, entropies = columns
    ids = tokens.tolist()
    text = tokenizer.decode(ids).strip()
    ended = "eos" if ids[-1] == tokenizer.eos else "length"
    return Story(index, opening, text, prompt_ids, tokens, logprobs, values, entropies, ended)


def engine_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the C++ engine runs on this machine, for this device and matmul dtype."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    module = ops.load()
    if module is None:
        return False
    return dtype == torch.float32 or module.engine_has_bf16()


class EngineDecoder:
    """Decoder that uses the C++ engine (csrc/cpu/engine.cpp), with float32 sums, norms, softmax and
    logits. It decodes at most `size` stories at a time. Stories are bit-identical for any `size`
    and any number of threads."""

    def __init__(self, student: Student, head: ValueHead | None, sampling: Sampling, size: int):
        named = dict(student.named_parameters())
        if head is not None:
            named |= head.named_parameters(prefix="value_head")
        parameters = {name: p.detach() for name, p in named.items()}
        module = ops.load()
        assert module is not None, "engine_runs says whether there is an engine"
        config = student.config
        dtype = ops.matmul_dtype(student.wte.weight)
        self.engine = module.Engine(parameters, config.n_layer, config.n_head, dtype, CACHE)
        self.sampling = sampling
        self.size = size

    def start(self, prompts: Sequence[Tensor], prompt_of: Sequence[int], offset: int) -> None:
        """Begin a batch. Story i continues prompts[prompt_of[i]], (P,) int64 on the CPU, with row
        id offset + i."""
        sampling = self.sampling
        self.outputs = self.engine.start(
            list(prompts),
            torch.tensor(prompt_of, device="cpu"),
            sampling.max_new_tokens,
            sampling.eos,
            sampling.seed,
            offset,
            self.size,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
        )

    def step(self) -> list[tuple[int, list[Tensor]]]:
        """Pairs (i, columns) of the stories that end in this step, which decodes one token of each
        story."""
        return [(row, columns_of(self.outputs, row, length)) for row, length in self.engine.step()]


class StudentDecoder:
    """Decoder that uses PyTorch and our kernels on any device, inside `Student.lowered`. On CUDA
    the steps are captured graphs. The host reads READ_TOGETHER steps at once, after it has launched
    as many more, so it waits once for all of them."""

    def __init__(self, student: Student, head: ValueHead | None, sampling: Sampling):
        self.student = student
        self.head = head
        self.sampling = sampling

    def start(self, prompts: Sequence[Tensor], prompt_of: Sequence[int], offset: int) -> None:
        """Begin a batch: see EngineDecoder.start."""
        count = len(prompt_of)
        prompt_tokens = sum(len(prompt) for prompt in prompts)
        self.token_step = token_step(self.student, self.head, count, prompt_tokens, self.sampling)
        self.token_step.start(prompts, prompt_of, offset)
        self.offset = offset
        self.batch = torch.arange(count, device="cpu")  # the story in each row of the batch
        self.alive = torch.ones(count, dtype=torch.bool, device="cpu")
        # what the host has read of each story: see TokenStep.outputs
        self.outputs = torch.zeros(4, count, self.sampling.max_new_tokens, device="cpu")
        self.launched = 0  # number of tokens of each story of which a read is launched
        self.reads: deque[tuple[int, int, Download]] = deque()  # (begin, end, outputs) in order

    def step(self) -> list[tuple[int, list[Tensor]]]:
        """Pairs (i, columns) of the stories that end in the next steps that are read: see
        EngineDecoder.step."""
        ahead = 1 if self.token_step.on_graph else 0
        while len(self.reads) <= ahead and self.launched < self.sampling.max_new_tokens:
            self.launch()
        begin, end, download = self.reads.popleft()
        self.outputs[:, :, begin:end] = download.wait()

        ended: list[tuple[int, int]] = []  # story and length
        for t in range(begin, end):
            stories = self.alive.nonzero().squeeze(1)
            tokens = self.outputs[0, stories, t]
            ops.require_drawn(tokens, stories + self.offset)
            is_last = t == self.sampling.max_new_tokens - 1
            ends = stories[(tokens == self.sampling.eos) | is_last]
            self.alive[ends] = False
            ended += [(story, t + 1) for story in ends.tolist()]
        if ended:
            self.shrink()
        columns = self.outputs.unbind()
        return [(story, columns_of(columns, story, length)) for story, length in ended]

    def launch(self) -> None:
        """Launch the next steps, and the read of their outputs."""
        begin = self.launched
        together = READ_TOGETHER if self.token_step.on_graph else 1
        self.launched = min(begin + together, self.sampling.max_new_tokens)
        for _ in range(max(begin, 1), self.launched):  # `start` has drawn the first token
            self.token_step.advance()
        read = self.token_step.read(len(self.alive), begin, self.launched)
        self.reads.append((begin, self.launched, read))

    def shrink(self) -> None:
        """Drop ended rows if a smaller batch pays. Some ended rows may stay, to fill the batch."""
        remaining = int(self.alive.sum())
        if not remaining:
            return
        size = next_batch_size(remaining, len(self.batch))
        if size < len(self.batch):
            has_ended = (~self.alive[self.batch]).to(torch.uint8)
            rows = has_ended.argsort(stable=True)[:size].sort().values
            self.token_step.keep(rows)
            self.batch = self.batch[rows]


def next_batch_size(alive: int, rows: int) -> int:
    """Batch size for the next step, when `alive` of the rows are still generating.

    Capturing a graph for a new size takes milliseconds, so the batch is only halved, when half of
    the rows have ended. The smallest size is 64: a step reads the weights once for all rows, so 64
    rows take about as long as one row."""
    while rows > 64 and alive <= (rows + 1) // 2:
        rows = (rows + 1) // 2
    return rows


def require_room(student: Student, opening_tokens: int, max_new_tokens: int) -> None:
    """Raises UserError if opening and story exceed the student's context."""
    room = student.config.context - opening_tokens
    if max_new_tokens > room:
        advice = "shorten the opening"
        if room > 0:
            advice = f"lower --max-new-tokens to {room}, or {advice}"
        raise UserError(
            f"the opening ({opening_tokens} tokens) and the story (--max-new-tokens {max_new_tokens}) exceed the "
            f"student's context of {student.config.context} tokens: {advice}"
        )


def encode_opening(tokenizer: Tokenizer, opening: str) -> list[int]:
    """The tokens of a prompt: an end token, as before every document of the corpus, then the
    opening."""
    return [tokenizer.eos, *tokenizer.encode(opening)]
