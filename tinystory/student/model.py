"""The student: GPT-2's layout, any size. Learned positions, pre-norm, biases, tanh GELU, tied embedding.

Two ways through it: `hidden` reads whole sequences (training), `prefill` and `step` write with a KV cache (decoding).
Neither makes logits: the tied embedding meets the final hidden state in `token_logprob` (training) or in `logits`.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinystory import ops


@dataclass(frozen=True)
class StudentConfig:
    n_layer: int
    n_head: int
    n_embd: int
    context: int
    vocab_size: int


class KVCache:
    """Keys and values of the tokens read so far. prefix: of the opening, which all rows share, (n_layer, P, 2, n_head,
    D); own: of each row's tokens after it, (n_layer, B, capacity, 2, n_head, D); lengths: how many, (B,) int64."""

    def __init__(
        self, config: StudentConfig, rows: int, prefix: int, capacity: int, device: torch.device, dtype: torch.dtype
    ):
        heads = (2, config.n_head, config.n_embd // config.n_head)
        self.prefix = torch.zeros(config.n_layer, prefix, *heads, device=device, dtype=dtype)
        self.own = torch.zeros(config.n_layer, rows, capacity, *heads, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, device=device, dtype=torch.int64)

    def keep(self, rows: Tensor) -> None:
        """Retire every row but these. rows: (R,) int64, indices into the present rows."""
        self.own, self.lengths = self.own[:, rows], self.lengths[rows]


class Block(nn.Module):
    def __init__(self, config: StudentConfig):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(C)
        self.qkv = nn.Linear(C, 3 * C)
        self.attn_proj = nn.Linear(C, C)
        self.ln_2 = nn.LayerNorm(C)
        self.fc = nn.Linear(C, 4 * C)
        self.mlp_proj = nn.Linear(4 * C, C)

    def project_qkv(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3, H, D)"""
        normed = ops.layer_norm(x, self.ln_1.weight, self.ln_1.bias)
        return ops.linear(normed, self.qkv.weight, self.qkv.bias).unflatten(-1, (3, self.n_head, -1))

    def finish(self, x: Tensor, attended: Tensor, dropout: float) -> Tensor:
        """Residual stream x (..., C) and attention's output (..., H, D) -> the block's output (..., C)."""
        x = add(x, self.attn_proj, attended.flatten(-2), dropout)
        normed = ops.layer_norm(x, self.ln_2.weight, self.ln_2.bias)
        inner = ops.linear(normed, self.fc.weight, self.fc.bias, gelu=True)
        return add(x, self.mlp_proj, inner, dropout)


def add(x: Tensor, layer: nn.Linear, branch: Tensor, dropout: float) -> Tensor:
    """x + dropout(layer(branch)): the residual stream's next state."""
    if dropout:
        return x + F.dropout(ops.linear(branch, layer.weight, layer.bias), dropout)
    return ops.linear(branch, layer.weight, layer.bias, residual=x)


class Student(nn.Module):
    def __init__(self, config: StudentConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.apply(self._init)
        for block in self.blocks:  # GPT-2: residual projections start smaller, so that depth does not grow the stream
            for proj in (block.attn_proj, block.mlp_proj):
                nn.init.normal_(proj.weight, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def hidden(self, tokens: Tensor, dropout: float = 0.0, seed: int = 0) -> Tensor:
        """Final hidden states of whole sequences.

        tokens: (B, T) int64, T <= context. dropout: applied to embedding, attention and residual branches; attention's
        mask comes from `seed`, the others from torch's generator. Returns (B, T, C).
        """
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        x = F.dropout(x, dropout)
        for i, block in enumerate(self.blocks):
            attended = ops.causal_attention(block.project_qkv(x), dropout, seed * len(self.blocks) + i)
            x = block.finish(x, attended, dropout)
        return self.ln_f(x)

    def cast(self, dtype: torch.dtype) -> "Student":
        """For decoding, to be called under autocast to dtype if that is used: a student that computes the same, but
        whose linear layers are cast now and not at each use. All that needs no cast is shared with this one."""
        student = copy.deepcopy(self, {id(p): p for p in self.parameters()})
        for layer in student.modules():
            if isinstance(layer, nn.Linear) and not ops.fused("linear", layer.weight, layer.weight):
                layer.weight, layer.bias = (
                    nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in (layer.weight, layer.bias)
                )
        return student

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V)."""
        return self.logits(self.hidden(tokens))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)"""
        return F.linear(hidden, self.wte.weight)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read an opening (P,) int64, once for all rows. Returns the hidden state after it, (B, C)."""
        x = (self.wte(tokens) + self.wpe.weight[: len(tokens)])[None]
        for i, block in enumerate(self.blocks):
            qkv = block.project_qkv(x)
            cache.prefix[i] = qkv[0, :, 1:]
            x = block.finish(x, ops.causal_attention(qkv), 0.0)
        return self.ln_f(x[:, -1]).expand(len(cache.lengths), -1)

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read one more token a row, (B,) int64. Returns the hidden state after it, (B, C)."""
        x = self.wte(tokens) + self.wpe(cache.prefix.shape[1] + cache.lengths)
        for i, block in enumerate(self.blocks):
            qkv = block.project_qkv(x)
            x = block.finish(x, ops.decode_attention(qkv, cache.prefix[i], cache.own[i], cache.lengths), 0.0)
        cache.lengths += 1
        return self.ln_f(x)


class ValueHead(nn.Module):
    """One number a position from the final hidden state; zero at the start, so first advantages are the rewards."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.linear = nn.Linear(n_embd, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (...) float32"""
        with torch.autocast(hidden.device.type, enabled=False):  # one column: rounding it would save nothing
            return self.linear(hidden.float()).squeeze(-1)
