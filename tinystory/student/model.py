"""The student: GPT-2's layout, any size. Learned positions, pre-norm, biases, tanh GELU, tied embedding.

`Student.trunk` is the one forward pass in Python. Each use of it brings its own attention: `hidden` attends within
whole sequences (training), `prefill` and `step` over a KV cache (decoding), tinystory/evaluate/scoring.py over trees.
None of them computes logits: the tied embedding meets the final hidden state in `ops.token_logprob` or in `logits`.

csrc/cpu/engine.cpp is the same forward pass in C++, for decoding on a CPU. Change one and you must change the other:
the engine refuses parameters or a `Student.layout` that it does not know.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tinystory import ops
from tinystory.ops.engine import Layout


@dataclass(frozen=True)
class StudentConfig:
    n_layer: int
    n_head: int
    n_embd: int
    context: int
    vocab_size: int


def wrong_shape(sizes: Mapping[str, Any]) -> str:
    """What is wrong with the sizes that a file claims for a StudentConfig; "" if nothing is. Files are untrusted, so
    this is asked before anything is allocated."""
    names = [f.name for f in fields(StudentConfig)]
    if sizes.keys() != set(names):
        return f"it must have {', '.join(names)}, and has {', '.join(map(str, sizes))[:200] or 'nothing'}"
    for name in names:
        if type(sizes[name]) is not int or not 0 < sizes[name] < 2**24:
            return f"its {name} is {sizes[name]!r:.80}"
    head = sizes["n_embd"] / sizes["n_head"]
    return "" if head % 16 == 0 and head <= 256 else f"its head size is {head:g}, not a multiple of 16 up to 256"


class KVCache:
    """Keys and values of the tokens read so far.

    prefix (n_layer, P, 2, H, D): the openings', one after the other, each once. spans (B, 2) int64: where in it each
    row's opening begins and ends. own (n_layer, B, capacity, 2, H, D): each row's, for the tokens after the opening.
    lengths (B,) int64: how many positions of `own` each row has filled.
    """

    def __init__(self, config: StudentConfig, spans: Tensor, capacity: int, dtype: torch.dtype, prefix: int = 0):
        """prefix: room for so many tokens of openings, by default for those of `spans`."""
        rows, heads = len(spans), (2, config.n_head, config.n_embd // config.n_head)
        self.spans = spans
        prefix = prefix or int(spans.max())
        self.prefix = torch.zeros(config.n_layer, prefix, *heads, device=spans.device, dtype=dtype)
        self.own = torch.zeros(config.n_layer, rows, capacity, *heads, device=spans.device, dtype=dtype)
        self.lengths = torch.zeros(rows, device=spans.device, dtype=torch.int64)
        self.whole = self.own, self.lengths, self.spans

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these, which move to the front of the same memory. rows: (R,) int64, indices into the
        present rows."""
        n = len(rows)
        self.own[:, :n], self.lengths[:n], self.spans[:n] = self.own[:, rows], self.lengths[rows], self.spans[rows]
        self.own, self.lengths, self.spans = self.own[:, :n], self.lengths[:n], self.spans[:n]

    def restart(self, spans: Tensor) -> None:
        """Forget what was read, and begin with as many rows as spans, (B, 2) int64, in the same memory."""
        own, lengths, kept = self.whole
        self.own, self.lengths, self.spans = own[:, : len(spans)], lengths[: len(spans)], kept[: len(spans)]
        self.spans.copy_(spans)
        self.lengths.zero_()


class Linear(nn.Linear):
    """A linear layer fused with what follows it: tanh GELU, or the addition to the residual stream.

    copies: weight and bias in the type of the matmul, while `Student.lowered` keeps them."""

    def __init__(self, n_in: int, n_out: int, gelu: bool = False):
        super().__init__(n_in, n_out)
        self.gelu = gelu
        self.copies: tuple[Tensor, Tensor] | None = None

    def forward(self, y: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)"""
        return ops.linear(y, self.weight, self.bias, gelu=self.gelu, copies=self.copies)

    def add_to(self, x: Tensor, y: Tensor, norm: nn.LayerNorm, dropout: float, seed: int) -> tuple[Tensor, Tensor]:
        """x + dropout(self(y)): the residual stream x (..., n_out) after the branch that ends with this layer; and
        `norm` of it, for the next branch. On a GPU both are one kernel; on a CPU the sum is part of the matmul."""
        if ops.norm_adds(x, norm.weight):
            branch = self(y)
            dtype = branch.dtype if isinstance(norm, LayerNorm) else x.dtype
            return ops.add_layer_norm(x, branch, norm.weight, norm.bias, dtype=dtype, dropout_p=dropout, seed=seed)
        if dropout:
            x = x + F.dropout(self(y), dropout)
        else:
            x = ops.linear(y, self.weight, self.bias, residual=x, gelu=self.gelu)
        return x, norm(x)


class LayerNorm(nn.LayerNorm):
    """The layer norm before a linear layer, which reads it in the type of its matmul."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias)


class Block(nn.Module):
    """x = x + attn_proj(attend(qkv(ln_1(x)))), then x = x + mlp_proj(gelu(fc(ln_2(x)))). Each `+` is fused with a layer
    beside it, so a layer norm is computed where its input is: a block is given ln_1(x), and returns the next norm."""

    def __init__(self, config: StudentConfig):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1 = LayerNorm(C)
        self.qkv = Linear(C, 3 * C)
        self.attn_proj = Linear(C, C)
        self.ln_2 = LayerNorm(C)
        self.fc = Linear(C, 4 * C, gelu=True)
        self.mlp_proj = Linear(4 * C, C)

    def forward(
        self, x: Tensor, y: Tensor, attend: Callable[[Tensor], Tensor], norm: nn.LayerNorm, dropout: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        """x and y = ln_1(x) -> x after the block and norm(x), all (..., C). attend: packed queries, keys and values
        (..., 3, H, D) -> (..., H, D)."""
        qkv = self.qkv(y).unflatten(-1, (3, self.n_head, -1))
        x, y = self.attn_proj.add_to(x, attend(qkv).flatten(-2), self.ln_2, dropout, 2 * seed)
        x, y = self.mlp_proj.add_to(x, self.fc(y), norm, dropout, 2 * seed + 1)
        return x, y


class Student(nn.Module):
    """init: "gpt2" is GPT-2's, whose standard deviation of 0.02 suits its width of 768. "unit" scales with the
    width and keeps the token's own embedding in the foreground of the residual stream: deviations of 1 for
    embeddings, 0.3 for positions and 1 / sqrt(C) for matrices, a gain of 1 / sqrt(C) in the final norm. Attention
    then starts sharp enough to be trained, so a small student learns to copy a name hundreds of steps sooner
    (docs/results.md)."""

    def __init__(self, config: StudentConfig, init: str = "gpt2"):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.copies: list[Tensor] = []  # of `lowered`
        std = 0.02 if init == "gpt2" else 1 / math.sqrt(config.n_embd)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        # GPT-2: residual projections start smaller, so that depth does not grow the stream.
        for module in self.modules():
            if isinstance(module, Block):
                for proj in (module.attn_proj, module.mlp_proj):
                    nn.init.normal_(proj.weight, std=std / math.sqrt(2 * config.n_layer))
        if init != "gpt2":
            nn.init.normal_(self.wte.weight, std=1.0)
            nn.init.normal_(self.wpe.weight, std=0.3)
            nn.init.constant_(self.ln_f.weight, std)  # so that logits start with deviation 1

    @property
    def layout(self) -> Layout:
        """What the C++ engine must know of this student besides its parameters."""
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        norms = [norm for block in blocks for norm in (block.ln_1, block.ln_2)] + [self.ln_f]
        return Layout(
            n_layer=len(blocks),
            n_head=self.config.n_head,
            norm="pre-layer-norm" if all(isinstance(norm, nn.LayerNorm) for norm in norms) else "other",
            activation="gelu-tanh" if all(block.fc.gelu for block in blocks) else "other",
            positions="learned",
            bias=all(m.bias is not None for m in self.modules() if isinstance(m, nn.Linear | nn.LayerNorm)),
            tied_head=True,
        )

    def trunk(self, x: Tensor, attend: Callable[[int, Tensor], Tensor], dropout: float = 0.0, seed: int = 0) -> Tensor:
        """From embedded tokens (..., C) to final hidden states (..., C).

        attend(i, qkv): the attention of layer i, from packed queries, keys and values (..., 3, H, D) to (..., H, D).
        dropout: applied to the embedding and the residual branches, with torch's generator; on a GPU that of the
        branches comes from `seed`.
        """
        x = F.dropout(x, dropout)
        blocks = [module for module in self.blocks if isinstance(module, Block)]
        norms = [*(block.ln_1 for block in blocks), self.ln_f]
        y = norms[0](x)
        for i, block in enumerate(blocks):
            x, y = block(x, y, partial(attend, i), norms[i + 1], dropout, seed * len(blocks) + i)
        return y

    def hidden(self, tokens: Tensor, dropout: float = 0.0, seed: int = 0) -> Tensor:
        """Final hidden states (B, T, C) of whole sequences: tokens (B, T) int64, T <= context.

        dropout: applied to the embedding, the attention weights and the residual branches. The mask of the attention
        weights comes from `seed`, the others as in `trunk`.
        """

        def attend(i: int, qkv: Tensor) -> Tensor:
            return ops.causal_attention(qkv, dropout, seed * len(self.blocks) + i)

        return self.trunk(self.wte(tokens) + self.wpe.weight[: tokens.shape[1]], attend, dropout, seed)

    @contextlib.contextmanager
    def lowered(self, dtype: torch.dtype) -> Iterator[None]:
        """While this is entered no parameter may change, and on a GPU the linear layers read copies of their weights in
        dtype, autocast's, which are made here: one kernel, where autocast casts each weight in every forward pass. The
        copies stay where they are from one time to the next."""
        if not ops.on_gpu(self.wte.weight) or dtype == self.wte.weight.dtype:
            yield
            return
        layers = [module for module in self.modules() if isinstance(module, Linear)]
        parameters = [p.detach() for layer in layers for p in (layer.weight, layer.bias)]
        if not self.copies or self.copies[0].dtype != dtype or self.copies[0].device != parameters[0].device:
            self.copies = [torch.empty_like(p, dtype=dtype) for p in parameters]
        torch._foreach_copy_(self.copies, parameters)
        try:
            for layer, weight, bias in zip(layers, self.copies[::2], self.copies[1::2], strict=True):
                layer.copies = weight, bias
            yield
        finally:
            for layer in layers:
                layer.copies = None

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V)."""
        return self.logits(self.hidden(tokens))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)"""
        return F.linear(hidden, self.wte.weight)

    @torch.no_grad()
    def prefill(self, openings: list[Tensor], cache: KVCache) -> Tensor:
        """Read each opening, (P_i,) int64, once. Returns the hidden state after each, (len(openings), C)."""
        tokens = pad_sequence(openings, batch_first=True)
        lengths = torch.tensor([len(opening) for opening in openings], device=tokens.device)
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        read = sum(map(len, openings))

        def attend(i: int, qkv: Tensor) -> Tensor:
            cache.prefix[i, :read] = qkv[:, :, 1:][real]
            return ops.causal_attention(qkv)

        x = self.trunk(self.wte(tokens) + self.wpe.weight[: tokens.shape[1]], attend)
        return x[torch.arange(len(openings), device=x.device), lengths - 1]

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read one more token per row, tokens (B,) int64. Returns the hidden state after it, (B, C)."""

        def attend(i: int, qkv: Tensor) -> Tensor:
            return ops.decode_attention(qkv, cache.prefix[i], cache.spans, cache.own[i], cache.lengths)

        x = self.trunk(self.wte(tokens) + self.wpe(cache.spans[:, 1] - cache.spans[:, 0] + cache.lengths), attend)
        cache.lengths += 1
        return x


class ValueHead(nn.Module):
    """One value per position from the final hidden state. It starts at zero: the first advantages are the rewards."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.linear = nn.Linear(n_embd, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (...) float32"""
        with torch.autocast(hidden.device.type, enabled=False):  # one column: rounding it would save nothing
            return self.linear(hidden.float()).squeeze(-1)
