"""The student: a model of any size in GPT-2's layout, with pre-norm, biases, tanh GELU, and a table
of position embeddings. The positions start as GPT-2's or as sinusoids that do not learn in
pretraining. The output head is tied to the token embedding or separate.

`Student.trunk` is the only forward pass in Python. Each caller supplies the attention: `hidden`
attends within whole sequences (training, evaluation), `prefill` and `step` over a KV cache
(decoding). The output head is applied to the final hidden states in `ops.token_logprob` or in
`logits`.

csrc/cpu/engine.cpp is the same forward pass in C++, for decoding on a CPU: change both together.
The engine takes parameters by name and refuses unknown names."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tinystory import ops
from tinystory.config import PretrainConfig
from tinystory.ops import backend, cuda
from tinystory.run.device import upload
from tinystory.run.errors import UserError

POSITION_STD = 1.5  # standard deviation of the initial sinusoids; token embeddings have 1
# Scales of the initial queries and keys for the channels that they read: attention starts more by
# position than by content.
QK_OF_POSITIONS, QK_OF_OTHERS = 1.4, 0.4


@dataclass(frozen=True)
class StudentConfig:
    """The shape of a student. tied: whether the output head is the token embedding, as in GPT-2."""

    n_layer: int
    n_head: int
    n_embd: int
    context: int
    vocab_size: int
    tied: bool = True


def student_config(config: PretrainConfig, vocab_size: int) -> StudentConfig:
    """The shape of a student to pretrain. The output head is tied if the initial weights are
    GPT-2's."""
    return StudentConfig(
        config.n_layer,
        config.n_head,
        config.n_embd,
        config.context,
        vocab_size,
        tied=config.weights_init == "gpt2",
    )


def wrong_shape(sizes: Mapping[str, Any]) -> str:
    """The reason why sizes from an untrusted file cannot be a StudentConfig; "" if they can."""
    names = [field.name for field in fields(StudentConfig)]
    if sizes.keys() != set(names):
        return f"it must have {', '.join(names)}, and nothing else"
    if type(sizes["tied"]) is not bool:
        return f"its tied is {sizes['tied']!r:.80}"
    names.remove("tied")
    for name in names:
        if type(sizes[name]) is not int or not 0 < sizes[name] < 2**24:
            return f"its {name} is {sizes[name]!r:.80}"
    head = sizes["n_embd"] / sizes["n_head"]
    if head % 16 or head > 256:
        return f"its head size is {head:g}, not a multiple of 16 up to 256"
    return ""


def to_device(student: "Student", device: torch.device | str) -> "Student":
    """The student on the device. Raises UserError if no CUDA kernel has the student's head size."""
    head = student.config.n_embd // student.config.n_head
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and head not in cuda.HEAD_SIZES and backend.current() != "reference":
        raise UserError(
            f"this student's heads have size {head}, and the CUDA kernels support {cuda.HEAD_SIZES}: choose --n-head "
            "so that --n-embd / --n-head is one of these sizes, or use --device cpu"
        )
    return student.to(device)


class KVCache:
    """Keys and values of the tokens read so far.

    prefix (n_layer, P, 2, H, D): keys and values of the prompts, each prompt once. spans (B, 2)
    int64: begin and end of each row's prompt in `prefix`. own (n_layer, B, capacity, 2, H, D): keys
    and values of each row after the prompt. lengths (B,) int64: number of filled positions of each
    row in `own`. positions (B,) int64: position of each row's next token, after prompt and
    `own`."""

    def __init__(
        self,
        config: StudentConfig,
        spans: Tensor,
        capacity: int,
        dtype: torch.dtype,
        prefix: int,
    ):
        """prefix: maximum number of prompt tokens."""
        L = config.n_layer
        B = len(spans)
        H = config.n_head
        D = config.n_embd // H
        self.prefix = torch.zeros(L, prefix, 2, H, D, dtype=dtype, device=spans.device)
        own = torch.zeros(L, B, capacity, 2, H, D, dtype=dtype, device=spans.device)
        counters = torch.zeros(2, B, dtype=torch.int64, device=spans.device)
        self.memory = own, counters, spans
        self.restart(spans)

    def use(self, rows: int) -> None:
        """Use the first `rows` rows of the memory as the batch."""
        own, counters, spans = self.memory
        self.own = own[:, :rows]
        self.counters = counters[:, :rows]  # lengths and positions
        self.lengths, self.positions = self.counters
        self.spans = spans[:rows]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows except `rows`, (R,) int64, which move to the front of the same memory."""
        self.own[:, : len(rows)] = self.own[:, rows]
        self.counters[:, : len(rows)] = self.counters[:, rows]
        self.spans[: len(rows)] = self.spans[rows]
        self.use(len(rows))

    def restart(self, spans: Tensor) -> None:
        """Empty the cache for the B rows of spans, (B, 2) int64, in the same memory."""
        self.use(len(spans))
        self.spans.copy_(spans)
        self.lengths.zero_()
        torch.sub(self.spans[:, 1], self.spans[:, 0], out=self.positions)


class Linear(nn.Linear):
    """A linear layer, followed by tanh GELU if `gelu`. wide: the output is for the residual stream
    and stays float32 if the kernel has float32 accumulators (see `ops.linear`). copies: weight and
    bias in autocast's dtype, inside `Student.lowered`."""

    def __init__(self, n_in: int, n_out: int, gelu: bool = False, wide: bool = False):
        super().__init__(n_in, n_out)
        self.gelu = gelu
        self.wide = wide
        self.copies: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)"""
        if self.copies is not None:
            return ops.lowered_linear(x, self.weight, self.bias, self.copies, self.gelu)
        return ops.linear(x, self.weight, self.bias, gelu=self.gelu, wide=self.wide)


class Block(nn.Module):
    """x = x + attn_proj(attend(qkv(ln_1(x)))), then x = x + mlp_proj(gelu(fc(ln_2(x)))). A sum and
    the layer norm after it are one kernel, so a block begins with the sum that ends the block
    before."""

    def __init__(self, config: StudentConfig):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(C)
        self.qkv = Linear(C, 3 * C)
        self.attn_proj = Linear(C, C, wide=True)
        self.ln_2 = nn.LayerNorm(C)
        self.fc = Linear(C, 4 * C, gelu=True)
        self.mlp_proj = Linear(4 * C, C, wide=True)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        attend: Callable[[Tensor], Tensor],
        dropout: float,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        """(x, branch) after this block, both (..., C): the residual stream, and the output of the
        last sublayer, which the next block adds to x. branch: the branch of the previous block, or
        None. attend: packed q, k, v (..., 3, H, D) -> (..., H, D). seed: the layer's dropout seed,
        for the two branches that this block adds."""
        # Every branch of every layer has a different seed for the dropout mask.
        first_seed = 2 * seed
        second_seed = 2 * seed + 1
        # x += branch; ln_1(x)
        x, y = ops.add_layer_norm(x, branch, self.ln_1.weight, self.ln_1.bias, dropout, first_seed)
        qkv = self.qkv(y).unflatten(-1, (3, self.n_head, -1))
        branch = self.attn_proj(attend(qkv).flatten(-2))
        x, y = ops.add_layer_norm(x, branch, self.ln_2.weight, self.ln_2.bias, dropout, second_seed)
        return x, self.mlp_proj(self.fc(y))


class Student(nn.Module):
    """The model.

    init "gpt2" is GPT-2's initialisation, with a standard deviation of 0.02, which suits a width of
    768. init "unit" is for an untied student and scales with the width: standard deviations of 1
    for embeddings and about 1 / sqrt(C) for matrices, and a gain of 1 / sqrt(C) in the final norm.
    Attention then starts sharp enough to be trained, and a small student learns to copy a name
    hundreds of steps sooner. Positions are sinusoids, from which a head can learn to look a fixed
    number of tokens back. The positions do not learn until the student is loaded again, for
    interaction. See also `separate_channels`."""

    def __init__(self, config: StudentConfig, init: str = "gpt2"):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.copies: list[Tensor] = []  # the memory of `lowered`
        std = 0.02 if init == "gpt2" else 1 / math.sqrt(config.n_embd)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, Linear):
                nn.init.zeros_(module.bias)
        # As in GPT-2, residual projections start smaller, so that depth does not grow the stream.
        for weight in self.weights("proj"):
            nn.init.normal_(weight, std=std / math.sqrt(2 * config.n_layer))
        if init != "gpt2":
            self.separate_channels()
            nn.init.constant_(self.ln_f.weight, std)  # logits start with standard deviation 1

    @torch.no_grad()
    def separate_channels(self) -> None:
        """Initialise positions in the first eighth of the residual stream's channels, token
        embeddings in the second half, and the outputs of the layers in the channels between them.
        At first no part then overlaps another: a student is as good after a fifth fewer words
        (lab/LOG.md)."""
        C = self.config.n_embd
        position_channels = C // 8
        token_channels = C // 2
        layer_channels = C - position_channels - token_channels
        for_positions = slice(0, position_channels)
        for_layers = slice(position_channels, C - token_channels)
        for_tokens = slice(C - token_channels, C)

        positions = self.wpe.weight
        waves = sinusoids(self.config.context, position_channels, POSITION_STD)
        positions.zero_()
        positions[:, for_positions] = waves
        positions.requires_grad_(False)

        for weight in self.weights("qkv"):
            queries_and_keys = weight[: 2 * C]
            queries_and_keys[:, for_positions] *= QK_OF_POSITIONS
            queries_and_keys[:, for_layers] *= QK_OF_OTHERS
            queries_and_keys[:, for_tokens] *= QK_OF_OTHERS

        keeps_norm = math.sqrt(C / layer_channels)
        for weight in self.weights("proj"):
            weight[for_positions] = 0
            weight[for_tokens] = 0
            weight *= keeps_norm

        tokens = self.wte.weight
        nn.init.normal_(tokens)
        # In the embeddings' channels, the output head starts as a copy of the embeddings. So if
        # attention copies an earlier token, that token is predicted.
        self.unembedding.copy_(tokens)
        self.unembedding[:, for_positions] = 0
        tokens[:, for_positions] = 0
        tokens[:, for_layers] = 0

    def weights(self, ending: str) -> list[Tensor]:
        """The weights of all linear layers with names that end in `ending`. "proj" gives the layers
        that write to the residual stream."""
        return [p for name, p in self.named_parameters() if name.endswith(f"{ending}.weight")]

    @property
    def unembedding(self) -> Tensor:
        """The output head's weight, (V, C)."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def trunk(
        self,
        x: Tensor,
        attend: Callable[[int, Tensor], Tensor],
        dropout: float = 0.0,
        seed: int = 0,
    ) -> Tensor:
        """Final hidden states (..., C) of embedded tokens (..., C). attend(i, qkv): layer i's
        attention, see `Block.forward`. dropout: rate; PyTorch's generator draws the masks of the
        embedding and the last branch, and `seed` determines all other masks."""
        x = F.dropout(x, dropout)
        branch: Any = None
        for i, block in enumerate(self.blocks):
            x, branch = block(x, branch, partial(attend, i), dropout, self.layer_seed(seed, i))
        return self.ln_f(x + F.dropout(branch, dropout))

    def layer_seed(self, seed: int, layer: int) -> int:
        """The dropout seed of a layer in a forward pass, different for every layer and pass."""
        return seed * len(self.blocks) + layer

    def embed(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Embeddings (..., C) of tokens (...), the sum of those of token and position. positions:
        (...) int64; None: 0, 1, ... in each row of tokens (B, T)."""
        if positions is None:
            return self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        return self.wte(tokens) + self.wpe(positions)

    def hidden(self, tokens: Tensor, dropout: float = 0.0, seed: int = 0) -> Tensor:
        """Final hidden states (B, T, C) of whole sequences, tokens (B, T) int64 with T <= context.
        dropout: rate, where `trunk` applies it and for the attention weights, where `seed`
        determines the mask."""

        def attend(i: int, qkv: Tensor) -> Tensor:
            return ops.causal_attention(qkv, dropout, self.layer_seed(seed, i))

        return self.trunk(self.embed(tokens), attend, dropout, seed)

    @contextlib.contextmanager
    def lowered(self, dtype: torch.dtype) -> Iterator[None]:
        """Context in which linear layers on a GPU read copies of the weights in autocast's dtype.
        One kernel makes all copies; autocast would cast each weight in every forward pass. No
        parameter may change inside the context. The copies keep their addresses. Without our
        kernels no copies are made."""
        has_kernels = ops.on_gpu(self.wte.weight) and backend.current() != "reference"
        if not has_kernels or dtype == self.wte.weight.dtype:
            yield
            return
        layers = [module for module in self.modules() if isinstance(module, Linear)]
        parameters: list[Tensor] = []
        for layer in layers:
            parameters += [layer.weight.detach(), layer.bias.detach()]
        device = self.wte.weight.device
        if not self.copies or (self.copies[0].dtype, self.copies[0].device) != (dtype, device):
            self.copies = [torch.empty_like(p, dtype=dtype) for p in parameters]
        torch._foreach_copy_(self.copies, parameters)
        try:
            for i, layer in enumerate(layers):
                layer.copies = self.copies[2 * i], self.copies[2 * i + 1]
            yield
        finally:
            for layer in layers:
                layer.copies = None

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V)."""
        return self.logits(self.hidden(tokens))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)"""
        return F.linear(hidden, self.unembedding)

    @torch.no_grad()
    def divide_logits(self, temperature: float) -> None:
        """Make softmax(logits / temperature) the student's distribution, by dividing the weights of
        the final norm."""
        self.ln_f.weight.div_(temperature)
        self.ln_f.bias.div_(temperature)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tensor], cache: KVCache) -> Tensor:
        """Hidden states (len(prompts), C) after the last token of each prompt, (P,) int64 on the
        CPU. The prompts fill the cache's prefix."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device="cpu")
        padded = pad_sequence(list(prompts), batch_first=True)
        is_token = torch.arange(padded.shape[1], device="cpu") < lengths[:, None]
        # Indices of the tokens that are not padding in the flattened table, and of each prompt's
        # last token. With a mask instead of indices, the host would have to wait for the GPU.
        device = self.wte.weight.device
        inside = is_token.flatten().nonzero().squeeze(1)
        last = upload(inside[lengths.cumsum(0) - 1], device)
        inside = upload(inside, device)

        def attend(i: int, qkv: Tensor) -> Tensor:
            keys_and_values = qkv[:, :, 1:].flatten(0, 1)
            cache.prefix[i, : len(inside)] = keys_and_values.index_select(0, inside)
            return ops.causal_attention(qkv)

        hidden = self.trunk(self.embed(upload(padded, device)), attend)
        return hidden.flatten(0, 1).index_select(0, last)

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Hidden states (B, C) after one more token per row, tokens (B,) int64, which are appended
        to the cache."""

        def attend(i: int, qkv: Tensor) -> Tensor:
            return ops.decode_attention(
                qkv, cache.prefix[i], cache.spans, cache.own[i], cache.lengths
            )

        embedded = self.embed(tokens, cache.positions)
        hidden = self.trunk(embedded, attend)
        cache.counters += 1
        return hidden


def sinusoids(length: int, channels: int, std: float) -> Tensor:
    """(length, channels): sines and cosines of each position, with wavelengths from 2 pi to 4 pi *
    length, scaled to the standard deviation `std` (Vaswani et al. 2017, arXiv 1706.03762, section
    3.5)."""
    exponents = torch.arange(0, channels, 2) / channels
    frequencies = (2 * length) ** -exponents
    angles = torch.arange(length)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1)[:, :channels]
    return std * math.sqrt(2) * waves


class ValueHead(nn.Module):
    """Value head: one value per position from the final hidden state. Values start at 0, so the
    first advantages are the rewards."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.linear = nn.Linear(n_embd, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (...) float32"""
        # one column: rounding it would save nothing
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float()).squeeze(-1)
