"""Options of train_pretrain.py."""

from dataclasses import dataclass

from tinystory.config.base import RunConfig
from tinystory.config.presets import PRETRAIN_PRESETS
from tinystory.run.errors import UserError
from tinystory.run.options import option


@dataclass
class PretrainConfig(RunConfig):
    """Pretrain a student on a corpus."""

    presets = PRETRAIN_PRESETS

    n_layer: int = option(3, "number of transformer blocks", "[1, 1000]", group="model")
    n_head: int = option(0, "number of attention heads; 0: --n-embd / 64", "[0, 1000]")
    n_embd: int = option(192, "width of the residual stream", "[16, 100000]")
    context: int = option(256, "context length, in tokens", "[2, 1e6]")
    vocab_size: int = option(
        2048, "vocabulary size of the tokenizer, five special tokens included", "[261, 1e6]"
    )
    weights_init: str = option(
        "unit", "scale of the initial weights: by the width (unit), or GPT-2's", ("unit", "gpt2")
    )
    dropout: float = option(0.0, "dropout rate of embeddings, attention and residuals", "[0, 1)")

    corpus: list[str] = option(
        ["builtin", "dull"],
        "corpora to train on: builtin, dull, tinystories, tinystories-valid, babylm-10m, "
        "babylm-100m, or .txt and .jsonl files, gzipped or not",
        group="data",
    )
    words: int = option(1_100_000, "total words to train on, counting repeats", "[1, 1e15]")
    val_fraction: float = option(
        0.05, "fraction of the documents held out for validation", "(0, 1)"
    )
    packing: str = option(
        "whole",
        "packing of documents into sequences: whole documents if they fit, or one stream",
        ("whole", "stream"),
    )

    batch_size: int = option(4, "sequences per step", "[1, 1e9]", group="optimiser")
    micro_batch_size: int = option(
        16, "sequences per forward pass; gradients are accumulated over a step", "[1, 1e9]"
    )
    optimizer: str = option(
        "muon",
        "optimizer: Muon for the blocks' matrices and AdamW for the rest, or AdamW for all",
        ("muon", "adamw"),
    )
    muon_learning_rate: float = option(0.02, "peak learning rate of Muon", "(0, 100]")
    learning_rate: float = option(
        0.0, "peak learning rate of AdamW; 0: 0.024 with Muon, 0.0024 without", "[0, 100]"
    )
    warmup: float = option(
        0.1, "fraction of the words over which the learning rate rises linearly", "[0, 1)"
    )
    beta2: float = option(0.99, "beta2 of AdamW", "[0, 1)")
    weight_decay: float = option(0.0, "weight decay of AdamW, on matrices only", "[0, 100]")
    grad_clip: float = option(1.0, "maximum gradient norm; 0: no clipping", "[0, 1e9]")

    eval_every: int = option(200, "steps between validations", "[1, 1e9]", group="evaluation")
    eval_sequences: int = option(
        32,
        "sequences per validation, evenly spread; the last validation uses all sequences",
        "[1, 1e9]",
    )

    def __post_init__(self) -> None:
        if self.n_head == 0 and isinstance(self.n_embd, int):  # `check` refuses another type
            self.n_head = max(1, self.n_embd // 64)
        if self.learning_rate == 0:
            self.learning_rate = 0.024 if self.optimizer == "muon" else 0.0024

    def check_together(self) -> None:
        size, rest = divmod(self.n_embd, self.n_head)
        if rest or size % 16 or size > 256:
            raise UserError(
                f"--n-embd {self.n_embd} / --n-head {self.n_head} is the head size, which must be a "
                "multiple of 16, at most 256: change one of the two"
            )

    def without_effect(self) -> dict[str, str]:
        if self.optimizer == "muon":
            return {}
        return {"muon_learning_rate": "with --optimizer adamw: give --optimizer muon"}
