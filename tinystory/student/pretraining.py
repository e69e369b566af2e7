"""What a checkpoint of a pretraining holds besides the student: its optimizer, and what was read."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from tinystory.data.tokenizer import Tokenizer
from tinystory.run.errors import UserError
from tinystory.student import checkpoint, hf
from tinystory.student.model import Student

# What to do when an update makes weights that are not finite.
TOO_LARGE = "lower --learning-rate or --muon-learning-rate, or give --grad-clip 1"


# With four passes over a corpus, the loss is nearly that of as much new text (Muennighoff et al. 2023,
# arXiv 2305.16264). BabyLM allows ten.
GOOD_PASSES = 4
MOST_PASSES = 10


@dataclass
class PretrainState:
    """words, tokens: trained on, counting repeats."""

    corpus: str  # fingerprint
    step: int = 0
    words: int = 0
    tokens: int = 0


def too_many_passes(words: int, corpus_words: int) -> str:
    """A warning if --words is more than MOST_PASSES times the words of the corpus; else ""."""
    if words <= MOST_PASSES * corpus_words:
        return ""
    return (
        f"warning: {words:,} words are {words / corpus_words:.0f} passes over a corpus of "
        f"{corpus_words:,}, so the student will overfit: give --words {GOOD_PASSES * corpus_words} "
        f"({GOOD_PASSES} passes), or a larger corpus"
    )


def save(
    folder: Path,
    student: Student,
    tokenizer: Tokenizer,
    optimizer: Optimizer,
    state: PretrainState,
    history: dict[str, Any],
) -> None:
    """Write a checkpoint, and drop older ones. history: of the corpus, for model.json. Raises
    UserError for weights that are not finite."""
    tensors = checkpoint.pack_optimizer(optimizer)
    hf.require_finite(state.step, student, tensors, TOO_LARGE)
    history = {"words": state.words, "tokens": state.tokens} | history
    counters = asdict(state)
    checkpoint.save(folder, student, tokenizer, history=history, state=tensors, counters=counters)
    checkpoint.drop_older(folder)


def restore(
    folder: Path, student: Student, tokenizer: Tokenizer, optimizer: Optimizer, corpus: str
) -> PretrainState:
    """Load a checkpoint into student and optimizer, and return its state. Raises UserError if it is
    that of another corpus (a fingerprint) or tokenizer."""
    tensors, state = checkpoint.load_trainer(folder, PretrainState)
    if state.corpus != corpus:  # before the weights: its vocabulary may have another size
        raise UserError(
            f"the corpus changed since {folder} was saved; start a new run with another --out"
        )
    if Tokenizer.load(folder / "tokenizer.json").json != tokenizer.json:
        raise UserError(
            f"the tokenizer of {folder} is not the one that the corpus gives now: its config.json "
            "was edited, or another version of tokenizers trained it; undo that, or start a new run "
            "with another --out"
        )
    checkpoint.restore(student, folder)
    with checkpoint.restoring(folder):
        checkpoint.unpack_optimizer(optimizer, tensors)
    return state
