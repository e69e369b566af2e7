"""A tokenized corpus with exact word counts: memory-mapped arrays, built once. A folder holds
tokenizer.json, manifest.json (hashes of the other files, checked at each opening) and three
little-endian arrays for train and for val:

    NAME.tokens   uint16 (uint32 if the vocabulary is over 65 536)  the tokens of every document,
    each ending in `</s>` NAME.words    uint8   per token, the number of words that begin in it
    NAME.offsets  int64   (documents + 1,): document i is tokens[offsets[i]:offsets[i + 1]], its
    `</s>` included
"""

import functools
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tinystory.data.corpus import MARKER, Corpus
from tinystory.data.tokenizer import Tokenizer
from tinystory.run.errors import UserError
from tinystory.run.paths import cache_dir
from tinystory.run.records import require_whole, write_manifest

# increase it whenever a change here, in corpus.py or in tokenizer.py changes the tokens of a text
FORMAT = 3
PARTS = ("tokens", "words", "offsets")
SPLITS = ("train", "val")
FILES = ("tokenizer.json", *(f"{name}.{part}" for name in SPLITS for part in PARTS))
BATCH = 1 << 19  # characters that one thread encodes at a time
MAX_THREADS = 16  # more would wait for the reading thread, and each needs about 20 MB

# str.split() splits at exactly the characters for which str.isspace() is true.
IS_SPACE = np.zeros(sys.maxunicode + 1, dtype=bool)
IS_SPACE[[c for c in range(sys.maxunicode + 1) if chr(c).isspace()]] = True


@dataclass(frozen=True)
class TokenFile:
    """One split. tokens: (n,) uint16 or uint32; words: (n,) uint8; offsets: (documents + 1,) int64.
    len() is n."""

    tokens: np.ndarray
    words: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def word_count(self) -> int:
        return int(self.words.sum(dtype=np.int64))


@dataclass(frozen=True)
class Dataset:
    """Both splits of a tokenized corpus. path: its folder."""

    tokenizer: Tokenizer
    train: TokenFile
    val: TokenFile
    path: Path


def prepare(
    corpus: Corpus,
    *,
    vocab_size: int,
    val_fraction: float = 0.05,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Dataset:
    """The tokenized corpus, from cache_dir()/shards or built there. About `val_fraction` of the
    documents are held out for validation: at least one unless it is 0, never the first, chosen by
    `seed` and index alone. Without a `tokenizer`, one of up to `vocab_size` tokens is trained on
    the training split. Several processes may build at once. Raises UserError for a damaged or
    unwritable cache, and for a single document."""
    root = cache_dir() / "shards"
    key = [
        FORMAT,
        corpus.fingerprint(),
        tokenizer.fingerprint() if tokenizer else vocab_size,
        val_fraction,
        seed,
    ]
    path = root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    if not path.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f"{path.name}.building-", dir=root) as building:
                whole = Path(building) / "whole"
                whole.mkdir()
                _build(whole, corpus, vocab_size, val_fraction, seed, tokenizer)
                if not path.exists():
                    os.rename(whole, path)
        except OSError as error:
            if not path.exists():  # else another process finished first, with the same content
                message = f"cannot write tokens under {root}: {error.strerror}; set TINYSTORY_CACHE to another folder"
                raise UserError(message) from None
    return _open(path)


def _build(
    folder: Path,
    corpus: Corpus,
    vocab_size: int,
    val_fraction: float,
    seed: int,
    tokenizer: Tokenizer | None,
) -> None:
    """Write a folder of shards in two passes over the corpus: train the tokenizer and measure, then
    encode."""
    count, characters, smallest = 0, 0, 1.0

    def training_documents() -> Iterator[str]:
        nonlocal count, characters, smallest
        for index, document in enumerate(corpus.documents()):
            draw = _uniform(seed, index)
            count, characters, smallest = count + 1, characters + len(document), min(smallest, draw)
            if draw > val_fraction:
                yield document

    reading = tqdm(training_documents(), desc="reading", unit=" documents", disable=None)
    if tokenizer is None:
        tokenizer = Tokenizer.train(reading, vocab_size)
    else:
        deque(reading, maxlen=0)
    if val_fraction and count < 2:
        raise UserError(
            "the corpus is a single document, where one is needed to train on and one for validation: separate its "
            f"stories by blank lines or {MARKER}"
        )
    # at least the smallest draw: one document
    threshold = max(val_fraction, smallest) if val_fraction else 0.0
    tokenizer.save(folder / "tokenizer.json")

    for name in SPLITS:
        _append(folder, name, tokenizer, np.empty(0), np.empty(0), np.zeros(1))
    written = [0, 0]  # tokens per split
    documents = enumerate(corpus.documents())
    batches = _batches(
        (_uniform(seed, index) <= threshold, document) for index, document in documents
    )
    threads = min(os.cpu_count() or 1, MAX_THREADS)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(
            total=characters, desc="encoding", unit=" characters", unit_scale=True, disable=None
        ) as progress,
    ):
        while some := list(islice(batches, 2 * threads)):
            encoded = pool.map(encode, repeat(tokenizer), [batch for _, batch in some])
            for (is_val, batch), (tokens, words, lengths) in zip(some, encoded, strict=True):
                _append(
                    folder,
                    SPLITS[is_val],
                    tokenizer,
                    tokens,
                    words,
                    written[is_val] + np.cumsum(lengths),
                )
                written[is_val] += len(tokens)
                progress.update(sum(map(len, batch)))
    write_manifest(folder)


def _uniform(seed: int, index: int) -> float:
    """A draw from [0, 1), a function of (seed, index); 2 for the first document, which is never
    held out."""
    if index == 0:
        return 2.0
    return (
        int.from_bytes(
            hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest(), "little"
        )
        / 2**64
    )


def _batches(documents: Iterable[tuple[bool, str]]) -> Iterator[tuple[bool, list[str]]]:
    """Batches of about BATCH characters, each from one split, in its order."""
    batches, sizes = {False: list[str](), True: list[str]()}, Counter[bool]()
    for is_val, document in documents:
        batches[is_val].append(document)
        sizes[is_val] += len(document)
        if sizes[is_val] >= BATCH:
            yield is_val, batches[is_val]
            batches[is_val], sizes[is_val] = [], 0
    yield from ((is_val, batch) for is_val, batch in batches.items() if batch)


def encode(
    tokenizer: Tokenizer, documents: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode documents, each followed by `</s>`. Returns tokens (n,) uint32; words (n,) uint8, the
    number of str.split() words whose first byte is in each token; and lengths (documents,) int64,
    in tokens."""
    eos = np.array([tokenizer.eos], dtype=np.uint32)
    arrays = [tokenizer.encode_array(document) for document in documents]
    lengths = np.array([len(array) + 1 for array in arrays], dtype=np.int64)
    tokens = np.concatenate([part for array in arrays for part in (array, eos)])

    # one white-space byte after each document stands for its </s>
    text = "\n".join([*documents, ""])
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    space = IS_SPACE[codes]
    begins = ~space  # whether a word begins with this character
    begins[1:] &= space[:-1]
    width = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    first = (np.cumsum(width) - width)[begins]  # the first byte of each word

    sizes = tokenizer.token_sizes.copy()
    sizes[tokenizer.eos] = 1
    ends = np.cumsum(sizes[tokens])  # end of each token, in bytes
    words = np.diff(np.searchsorted(first, ends), prepend=0).astype(np.uint8)
    return tokens, words, lengths


def _append(folder: Path, name: str, tokenizer: Tokenizer, *arrays: np.ndarray) -> None:
    for part, dtype, array in zip(PARTS, _dtypes(tokenizer), arrays, strict=True):
        with open(folder / f"{name}.{part}", "ab") as file:
            file.write(array.astype(dtype).data)


def _dtypes(tokenizer: Tokenizer) -> tuple[str, str, str]:  # dtypes in the order of PARTS
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4", "u1", "<i8"


def _open(path: Path) -> Dataset:
    """Open a folder of shards. Raises UserError if a file is damaged."""
    try:
        require_whole(path, FILES)
    except UserError as error:
        raise UserError(f"{error}; delete {path} and run this again") from None
    tokenizer = Tokenizer.load(path / "tokenizer.json")

    def split(name: str) -> TokenFile:
        arrays = []
        for part, dtype in zip(PARTS, _dtypes(tokenizer), strict=True):
            file = path / f"{name}.{part}"  # an empty file cannot be mapped
            arrays.append(
                np.memmap(file, dtype=dtype, mode="r")
                if file.stat().st_size
                else np.empty(0, dtype)
            )
        return TokenFile(*arrays)

    return Dataset(tokenizer, split("train"), split("val"), path)
