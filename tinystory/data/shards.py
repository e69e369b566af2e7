"""A corpus as memory-mapped tokens with exact word counts, built once and kept in the cache.

A folder of shards holds meta.json, tokenizer.json and, for train and val each, three raw little-endian arrays:

    NAME.tokens   uint16 (uint32 if the vocabulary is over 65 536)  every document's tokens, then `</s>`
    NAME.words    uint8   one a token: how many words begin in it
    NAME.offsets  int64   documents + 1 bounds: document i is tokens[offsets[i]:offsets[i + 1]], its `</s>` included
"""

import hashlib
import json
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tinystory.data.corpus import Corpus
from tinystory.data.tokenizer import Tokenizer
from tinystory.errors import UserError
from tinystory.paths import cache_dir

FORMAT = 1  # to be raised whenever this file, corpus.py or tokenizer.py would make other tokens of the same text
BATCH = 1 << 19  # characters encoded by one thread at a time
MAX_THREADS = 16  # more would wait for the one that reads, and each holds some 20 MB

# str.split() parts words at exactly the characters for which str.isspace() is true.
IS_SPACE = np.zeros(sys.maxunicode + 1, dtype=bool)
IS_SPACE[[c for c in range(sys.maxunicode + 1) if chr(c).isspace()]] = True


@dataclass(frozen=True)
class TokenFile:
    """One split: `tokens` (n,) uint16 or uint32, `words` (n,) uint8, `offsets` (documents + 1,) int64.

    `len()` is the number of tokens; `word_count` the sum of `words`; `byte_count` the documents' UTF-8 bytes, `</s>`
    not counted: what bits per byte divides by.
    """

    tokens: np.ndarray
    words: np.ndarray
    offsets: np.ndarray
    word_count: int
    byte_count: int

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Dataset:
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
    cache: str | os.PathLike | None = None,
    tokenizer: Tokenizer | None = None,
) -> Dataset:
    """Tokens of a corpus: opened if `cache` (default: cache_dir()/shards) has them, else built there.

    Which documents are for validation depends on `seed` and a document's number alone, about `val_fraction` of them
    and at least one, never the first; a corpus of a single document is cut in two, its end being for validation. With
    `val_fraction` 0 there are none. A tokenizer of up to `vocab_size` tokens is trained on the rest, unless one is
    given (then `vocab_size` says nothing).

    The folder is built under another name and renamed when whole: a kill leaves nothing half-written in its place, and
    of two processes that build it at once the later one takes what the earlier one made.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"a validation fraction of {val_fraction} makes no sense: it is at least 0 and below 1")
    root = Path(cache) if cache is not None else cache_dir() / "shards"
    key = [FORMAT, corpus.fingerprint(), tokenizer.fingerprint() if tokenizer else vocab_size, val_fraction, seed]
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
            if path.exists():  # another process was faster by a hair, and what it made is the same
                return _open(path)
            raise UserError(f"cannot write tokens under {root}: {error.strerror}; set TINYSTORY_CACHE to another folder"
                            ) from None
    return _open(path)


def _build(
    folder: Path, corpus: Corpus, vocab_size: int, val_fraction: float, seed: int, tokenizer: Tokenizer | None
) -> None:
    """Write a folder of shards. Reads the corpus twice: to learn its tokens and its size, then to encode it."""
    count, characters, smallest = 0, 0, 1.0

    def training_documents() -> Iterator[str]:
        nonlocal count, characters, smallest
        for index, document in enumerate(_documents(corpus, val_fraction)):
            share = _share(seed, index)
            count, characters, smallest = count + 1, characters + len(document), min(smallest, share)
            if share > val_fraction:
                yield document

    reading = tqdm(training_documents(), desc="reading", unit=" documents", disable=None)
    if tokenizer is None:
        tokenizer = Tokenizer.train(reading, vocab_size)
    else:
        deque(reading, maxlen=0)
    threshold = max(val_fraction, smallest) if val_fraction else 0.0  # the smallest share: one at least for validation
    tokenizer.save(folder / "tokenizer.json")

    writers = [_Writer(folder, name, tokenizer) for name in ("train", "val")]
    documents = _documents(corpus, val_fraction)
    batches = _batches((_share(seed, index) <= threshold, document) for index, document in enumerate(documents))
    threads = min(os.cpu_count() or 1, MAX_THREADS)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=characters, desc="encoding", unit=" characters", unit_scale=True, disable=None) as progress,
    ):
        for is_val, batch, encoded in _ahead(pool, partial(encode, tokenizer), batches, 2 * threads):
            writers[is_val].append(*encoded)
            progress.update(sum(map(len, batch)))
    meta = {
        "format": FORMAT, "corpus": corpus.names, "fingerprint": corpus.fingerprint(), "documents": count,
        "val_fraction": val_fraction, "seed": seed, "train": writers[0].close(), "val": writers[1].close(),
    }
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _share(seed: int, index: int) -> float:
    """Where a document stands between 0 and 1, drawn from (seed, index); the first is at 2: never for validation."""
    if index == 0:
        return 2.0
    return int.from_bytes(hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest(), "little") / 2**64


def _documents(corpus: Corpus, val_fraction: float) -> Iterator[str]:
    """The corpus's documents; a single one is cut in two at the white space before its last `val_fraction`."""
    stream = corpus.documents()
    first, second = next(stream), next(stream, None)
    if second is None and val_fraction:
        end = int(len(first) * (1 - val_fraction))
        cut = max(first.rfind(" ", 0, end), first.rfind("\n", 0, end))
        if cut < 0:
            raise UserError("the corpus is a single document, too short to set a part aside for validation: "
                            "give more text")
        first, second = first[:cut].strip(), first[cut:].strip()
    yield first
    if second is not None:
        yield second
    yield from stream


def _batches(documents: Iterable[tuple[bool, str]]) -> Iterator[tuple[bool, list[str]]]:
    """Documents of one split at a time, in order within it, about BATCH characters together."""
    batches, sizes = ([], []), [0, 0]
    for is_val, document in documents:
        batches[is_val].append(document)
        sizes[is_val] += len(document)
        if sizes[is_val] >= BATCH:
            yield is_val, batches[is_val].copy()
            batches[is_val].clear()
            sizes[is_val] = 0
    yield from ((is_val, batch) for is_val, batch in zip((False, True), batches, strict=True) if batch)


def _ahead(pool: ThreadPoolExecutor, function, batches: Iterable[tuple[bool, list[str]]], ahead: int):
    """(is_val, batch, function(batch)) in order, with never more than `ahead` batches under way."""
    waiting = deque()
    for is_val, batch in batches:
        waiting.append((is_val, batch, pool.submit(function, batch)))
        if len(waiting) >= ahead:
            is_val, batch, future = waiting.popleft()
            yield is_val, batch, future.result()
    for is_val, batch, future in waiting:
        yield is_val, batch, future.result()


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Tokens of the documents, `</s>` after each, and the words that begin in each token.

    Returns tokens (n,) uint32, words (n,) uint8, lengths (documents,) int64 in tokens, and the documents' UTF-8 bytes.
    A word is what str.split() gives; it begins in the token that holds the first byte of its first character. So the
    words of a document's tokens sum to len(document.split()).
    """
    eos = np.array([tokenizer.eos], dtype=np.uint32)
    arrays = [tokenizer.encode_array(document) for document in documents]
    lengths = np.array([len(array) + 1 for array in arrays], dtype=np.int64)
    tokens = np.concatenate([part for array in arrays for part in (array, eos)])

    text = "\n".join([*documents, ""])  # one white-space byte after each document, where its </s> stands
    if text.isascii():
        space = IS_SPACE[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]
        width = None
    else:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        space = IS_SPACE[codes]
        width = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    begins = ~space
    begins[1:] &= space[:-1]
    first = np.flatnonzero(begins)  # where each word begins: in characters, which for ASCII are bytes
    if width is not None:
        first = (np.cumsum(width) - width)[first]

    sizes = tokenizer.token_sizes.copy()
    sizes[tokenizer.eos] = 1
    ends = np.cumsum(sizes[tokens])  # where each token ends, in bytes
    words = np.diff(np.searchsorted(first, ends), prepend=0).astype(np.uint8)
    return tokens, words, lengths, int(ends[-1]) - len(documents)


class _Writer:
    """Appends encoded batches to the three files of a split."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer):
        self.dtype = _token_dtype(tokenizer)
        self.files = [open(folder / f"{name}.{part}", "wb") for part in ("tokens", "words", "offsets")]  # noqa: SIM115
        self.files[2].write(np.zeros(1, dtype="<i8").tobytes())
        self.documents = self.tokens = self.words = self.bytes = 0

    def append(self, tokens: np.ndarray, words: np.ndarray, lengths: np.ndarray, byte_count: int) -> None:
        for file, array in zip(
            self.files,
            (tokens.astype(self.dtype), words, (self.tokens + np.cumsum(lengths)).astype("<i8")),
            strict=True,
        ):
            file.write(array.data)
        self.documents += len(lengths)
        self.tokens += len(tokens)
        self.words += int(words.sum())
        self.bytes += byte_count

    def close(self) -> dict[str, int]:
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return {"documents": self.documents, "tokens": self.tokens, "words": self.words, "bytes": self.bytes}


def _token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _open(path: Path) -> Dataset:
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        splits = []
        for name in ("train", "val"):
            counts = meta[name]
            shapes = {
                "tokens": (_token_dtype(tokenizer), counts["tokens"]),
                "words": (np.uint8, counts["tokens"]),
                "offsets": (np.dtype("<i8"), counts["documents"] + 1),
            }
            arrays = {part: _map(path / f"{name}.{part}", *shape) for part, shape in shapes.items()}
            splits.append(TokenFile(**arrays, word_count=counts["words"], byte_count=counts["bytes"]))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the tokens in {path} are damaged ({error}): delete that folder and run again") from None
    return Dataset(tokenizer, *splits, path)


def _map(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    """A whole file as a read-only array; ValueError if its size is not what it should be."""
    if path.stat().st_size != length * np.dtype(dtype).itemsize:
        raise ValueError(f"{path.name} has the wrong size")
    return np.memmap(path, dtype=dtype, mode="r", shape=length) if length else np.empty(0, dtype)
