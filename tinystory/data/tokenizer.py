"""Byte-level BPE, trained by `tokenizers`, saved in that library's tokenizer.json, and applied by
`tiktoken`.

Both libraries give the same ids. `tokenizers` applies the learned merges in order, and `tiktoken`
merges the neighbours with the lowest rank of their union. For ranks from BPE training the two
agree, because bytes merge in the same way everywhere, so a token can only come from one merge."""

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tinystory.run.errors import UserError

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0..4
END_NAMES = ("</s>", "<|endoftext|>")  # ours; GPT-2's
# a limit, so that the number of words that begin in a token fits in a byte (shards.py)
MAX_TOKEN_BYTES = 128

# GPT-2's split (Radford et al. 2019), in the form that tiktoken publishes for its encoding "gpt2":
# possessive, so that it never backtracks. `tokenizers` has the same split built into
# pre_tokenizers.ByteLevel.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


# GPT-2's printable characters for bytes: printable Latin-1 is itself, the other bytes map to U+0100
# and up.
PRINTABLE = list(chain(range(0x21, 0x7F), range(0xA1, 0xAD), range(0xAE, 0x100)))
OTHER = sorted(set(range(256)) - set(PRINTABLE))
BYTE_OF_CHAR = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF_CHAR |= {chr(256 + i): byte for i, byte in enumerate(OTHER)}


class Tokenizer:
    """Encodes any Unicode text and decodes ids. Text like "</s>" in a document is encoded as
    ordinary bytes. `vocab_size` includes special tokens. `bos` and `pad` are `eos` if a foreign
    vocabulary has no such tokens. token_bytes[i]: bytes of id i, empty for special tokens.
    token_sizes: (vocab_size,) int64, number of bytes of each id."""

    def __init__(self, json_text: str):
        """json_text: a tokenizer.json of byte-level BPE with GPT-2's split. Raises ValueError,
        KeyError or TypeError for any other text."""
        self.json = json_text
        self.token_bytes, self.specials = _token_bytes(json.loads(json_text))
        end_names = [name for name in END_NAMES if name in self.specials]
        if not end_names:
            raise ValueError(f"it has no end token {' or '.join(END_NAMES)}")
        self.eos = self.specials[end_names[0]]
        self.bos = self.specials.get("<s>", self.eos)
        self.pad = self.specials.get("<pad>", self.eos)
        self.token_sizes = np.array([len(token) for token in self.token_bytes])
        self.vocab_size = len(self.token_bytes)
        ranks = {token: id for id, token in enumerate(self.token_bytes) if token}
        self._bpe = tiktoken.Encoding(
            "tinystory", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A tokenizer of up to `vocab_size` tokens, trained on a stream. Memory grows only with the
        number of distinct words. A corpus with too few repeated pairs yields fewer tokens."""
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            max_token_length=MAX_TOKEN_BYTES,
            show_progress=False,
            special_tokens=list(SPECIALS),
            initial_alphabet=sorted(BYTE_OF_CHAR),
        )
        bpe.train_from_iterator(documents, trainer)
        return cls(bpe.to_str())

    def save(self, path: Path) -> None:
        path.write_text(self.json, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """The tokenizer in a tokenizer.json. Raises UserError if the file is missing, malformed or
        of another kind."""
        try:
            return cls(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path} cannot be used as a tokenizer ({error}): give a tokenizer.json written by "
                "train_pretrain.py, GPT-2's, or another of byte-level BPE with GPT-2's split"
            ) from None

    def encode(self, text: str) -> list[int]:
        return self._bpe.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Special tokens are dropped. Bytes that are not UTF-8 (part of a
        character) become U+FFFD."""
        return b"".join(self.token_bytes[id] for id in ids).decode("utf-8", errors="replace")


def _token_bytes(spec: dict[str, Any]) -> tuple[list[bytes], dict[str, int]]:
    """Bytes of each id, and ids of the special tokens. Raises ValueError with the first unsupported
    setting."""
    model = spec["model"]
    split = spec["pre_tokenizer"]
    changes = model.get("dropout") or model.get("byte_fallback") or model.get("ignore_merges")
    if model["type"] != "BPE" or changes:
        raise ValueError("its model is not plain BPE")
    by_regex = split["type"] == "ByteLevel" and split.get("use_regex", True)
    if not by_regex or split["add_prefix_space"]:
        raise ValueError("its split is not GPT-2's")
    if spec.get("normalizer"):
        raise ValueError("it changes the text before it splits it")
    specials = {token["content"]: token["id"] for token in spec["added_tokens"]}
    vocab = model["vocab"] | specials
    if any(type(id) is not int for id in vocab.values()):
        raise ValueError("its ids are not whole numbers")
    if any(name != name.encode(errors="replace").decode() for name in specials):
        raise ValueError("a special token is not Unicode text")
    names = sorted(vocab, key=vocab.__getitem__)
    if sorted(vocab.values()) != list(range(len(names))):
        raise ValueError("its ids have gaps")

    ordinary = [name for name in names if name not in specials]
    if {name for name in ordinary if len(name) == 1} != BYTE_OF_CHAR.keys():
        raise ValueError("its single characters are not the 256 bytes")
    merges = ["".join(pair).replace(" ", "") for pair in model["merges"]]  # "a b" or ["a", "b"]
    if merges != [name for name in ordinary if len(name) > 1]:
        raise ValueError("its ids do not follow its merges")

    bytes_of = {name: bytes(BYTE_OF_CHAR[char] for char in name) for name in ordinary}
    token_bytes = [bytes_of.get(name, b"") for name in names]
    if max(map(len, token_bytes)) > MAX_TOKEN_BYTES:
        raise ValueError(f"a token is longer than {MAX_TOKEN_BYTES} bytes")
    return token_bytes, specials
