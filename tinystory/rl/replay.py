"""Replay of the corpus (--replay-weight): next-word prediction on it while the student
interacts."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tinystory.config import InteractConfig
from tinystory.data.corpus import open_corpus
from tinystory.data.shards import prepare
from tinystory.data.tokenizer import Tokenizer
from tinystory.data.windows import Windows
from tinystory.run import distributed
from tinystory.run.errors import UserError

# per update: sequences, (replay_batch, context + 1) int64, and their words
Texts = Sequence[tuple[Tensor, int]]


class CorpusReplay:
    """Batches of the training split of a student's corpus, in an order drawn from the seed: one per
    possible update of a step, so that a resumed run reads the same ones. No batches without
    --replay-weight."""

    def __init__(
        self, config: InteractConfig, history: Mapping[str, Any], tokenizer: Tokenizer, context: int
    ):
        """history: the checkpoint's. Raises UserError if it does not name the corpus, or if the
        corpus is gone."""
        self.updates = 0
        if not config.replay_weight:
            return
        missing = {"corpus", "corpus_seed", "val_fraction"} - history.keys()
        if missing:
            raise UserError(
                f"--replay-weight trains on the student's own corpus, and its checkpoint names no {min(missing)}: "
                "pretrain one with train_pretrain.py of this version, or leave it out"
            )
        distributed.require_one_each("--replay-batch", config.replay_batch)
        corpus = open_corpus(history["corpus"])
        data = distributed.rank0_first(
            lambda: prepare(
                corpus,
                vocab_size=tokenizer.vocab_size,
                val_fraction=history["val_fraction"],
                seed=history["corpus_seed"],
                tokenizer=tokenizer,
            )
        )
        self.windows = Windows(data.train, context, config.replay_batch, config.seed, "whole")
        self.updates = config.updates_per_step

    def batches(self, step: int) -> Texts:
        first = step * self.updates
        return [self.windows.batch(first + i) for i in range(self.updates)]
