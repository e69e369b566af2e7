"""The GPT-2 that TRL trains to make the fixtures, and the weights under our names; used only by
make_trl_*fixtures.py."""

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

SHAPE = dict(n_layer=2, n_head=1, n_embd=16, context=16, vocab_size=32)
PAD, EOS = 1, 2
LAYERS = {
    "ln_1": "ln_1",
    "attn.c_attn": "qkv",
    "attn.c_proj": "attn_proj",
    "ln_2": "ln_2",
    "mlp.c_fc": "fc",
    "mlp.c_proj": "mlp_proj",
}


def random_gpt2(**options: Any) -> GPT2LMHeadModel:
    """In float32 and without dropout, far enough from zero that every path contributes."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=SHAPE["vocab_size"],
        n_positions=SHAPE["context"],
        n_embd=SHAPE["n_embd"],
        n_layer=SHAPE["n_layer"],
        n_head=SHAPE["n_head"],
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=EOS,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        **options,
    )
    model = GPT2LMHeadModel(config)
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=float(p[0] == 1), std=0.1)
    return model


def our_weights(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    """Copies with our names and our layout: nn.Linear's, the transpose of GPT-2's Conv1D."""
    gpt2 = {name: p.detach().clone() for name, p in model.transformer.named_parameters()}
    ours = {"wte.weight": gpt2["wte.weight"], "wpe.weight": gpt2["wpe.weight"]}
    for i in range(SHAPE["n_layer"]):
        for theirs, name in LAYERS.items():
            weight = gpt2[f"h.{i}.{theirs}.weight"]
            ours[f"blocks.{i}.{name}.weight"] = (
                weight.T.contiguous() if weight.dim() == 2 else weight
            )
            ours[f"blocks.{i}.{name}.bias"] = gpt2[f"h.{i}.{theirs}.bias"]
    return ours | {f"ln_f.{part}": gpt2[f"ln_f.{part}"] for part in ("weight", "bias")}
