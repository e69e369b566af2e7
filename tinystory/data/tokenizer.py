"""Byte-level BPE: trained by `tokenizers`, saved as its tokenizer.json, run by `tiktoken`.

The two give the same ids. `tokenizers` merges only the pairs it learned, in order; `tiktoken` joins any two
neighbours whose union has the lowest rank. For ranks that come out of BPE training these are one and the same: a span
of bytes is merged alike wherever it stands, so a token can only ever be reached by the one merge that made it.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tinystory.errors import UserError

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0..4
END_NAMES = ("</s>", "<|endoftext|>")  # ours; GPT-2's
MIN_VOCAB = len(SPECIALS) + 256
MAX_TOKEN_BYTES = 128  # so that the words beginning in one token always fit in a byte (see shards.py)

# GPT-2's split (Radford et al. 2019), in the form that tiktoken publishes for its encoding "gpt2": possessive, so that
# it never backtracks. `tokenizers` has the same split built into pre_tokenizers.ByteLevel.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest moves to U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(moved)}


BYTE_OF_CHAR = _byte_of_char()


class Tokenizer:
    """Any Unicode text to ids and back. Text like "</s>" in a document is ordinary bytes, never the special token.

    `vocab_size` counts the specials, of which `bos`, `pad` and `eos` have a use; where a vocabulary that others made
    has no `<s>` or `<pad>` of its own, its end token is that too. `token_bytes[i]` is what id i stands for (empty for
    the specials), `token_sizes` (vocab_size,) int64 its length.
    """

    def __init__(self, json_text: str):
        """From the text of a tokenizer.json of byte-level BPE with GPT-2's split, as `train` makes it. ValueError,
        KeyError or TypeError for any other."""
        self.json = json_text
        self.token_bytes, specials = _token_bytes(json.loads(json_text))
        self.specials = specials
        self.eos = next((specials[name] for name in END_NAMES if name in specials), None)
        if self.eos is None:
            raise ValueError(f"it has no end token {' or '.join(END_NAMES)}")
        self.bos, self.pad = specials.get("<s>", self.eos), specials.get("<pad>", self.eos)
        self.token_sizes = np.array([len(token) for token in self.token_bytes])
        self.vocab_size = len(self.token_bytes)
        ranks = {token: id for id, token in enumerate(self.token_bytes) if token}
        self._bpe = tiktoken.Encoding("tinystory", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn up to `vocab_size` tokens from a stream; memory grows with the distinct words, not with the text.

        A corpus with too few repeated pairs gives fewer tokens, and one line on stderr says so.
        """
        if vocab_size < MIN_VOCAB:
            raise UserError(f"a vocabulary of {vocab_size} is too small: {len(SPECIALS)} special tokens and 256 bytes "
                            f"need at least {MIN_VOCAB}")
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIALS),
            initial_alphabet=sorted(BYTE_OF_CHAR),
            max_token_length=MAX_TOKEN_BYTES,
            show_progress=False,
        )
        bpe.train_from_iterator(documents, trainer)
        tokenizer = cls(bpe.to_str())
        if tokenizer.vocab_size < vocab_size:
            print(f"tokenizer: the corpus is too small for {vocab_size} tokens, it gave {tokenizer.vocab_size}",
                  file=sys.stderr)
        return tokenizer

    def save(self, path: str | os.PathLike) -> None:
        """Write tokenizer.json, whole or not at all."""
        path = Path(path)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with open(part, "w", encoding="utf-8") as file:
            file.write(self.json)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a tokenizer.json that `save` wrote; UserError for a missing, broken or foreign one."""
        try:
            return cls(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is not a tokenizer.json that can be used here ({error}): give one that "
                            "train_pretrain.py or prepare_data.py wrote, or GPT-2's or one made like it") from None

    def fingerprint(self) -> str:
        """Hex digest of the vocabulary and how it is applied."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._bpe.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as a uint32 array, with no Python int in between. Releases the GIL."""
        return self._bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        """The text; specials vanish, and bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return b"".join(self.token_bytes[id] for id in ids).decode("utf-8", errors="replace")


def _token_bytes(spec: dict) -> tuple[list[bytes], dict[str, int]]:
    """What each id stands for and the ids of the specials, read from a parsed tokenizer.json; ValueError says what it
    is in it that `Tokenizer` cannot do."""
    model, split = spec["model"], spec["pre_tokenizer"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback") or model.get("ignore_merges"):
        raise ValueError("its model is not plain BPE")
    if split["type"] != "ByteLevel" or split["add_prefix_space"] or not split.get("use_regex", True):
        raise ValueError("its split is not GPT-2's")
    if spec.get("normalizer"):
        raise ValueError("it changes the text before it splits it")
    specials = {token["content"]: token["id"] for token in spec["added_tokens"]}
    vocab = model["vocab"] | specials
    names = sorted(vocab, key=vocab.get)
    if [vocab[name] for name in names] != list(range(len(names))):
        raise ValueError("its ids have gaps")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    ordinary = [name for name in names if name not in specials]
    if {name for name in ordinary if len(name) == 1} != BYTE_OF_CHAR.keys():
        raise ValueError("its single characters are not the 256 bytes")
    if [name for name in ordinary if len(name) > 1] != ["".join(pair) for pair in merges]:
        raise ValueError("its ids do not follow its merges")
    table = [b"" if name in specials else bytes(BYTE_OF_CHAR[char] for char in name) for name in names]
    if max(map(len, table)) > MAX_TOKEN_BYTES:
        raise ValueError(f"a token is longer than {MAX_TOKEN_BYTES} bytes")
    return table, specials
