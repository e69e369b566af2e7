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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
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
) -> Dataset:
    """The tokenized corpus, from cache_dir()/shards or built there. About `val_fraction` of the
    documents are held out for validation: at least one, never the first, chosen by `seed` and index
    alone. The tokenizer, of up to `vocab_size` tokens, is trained on the training split. Several
    processes may build at once. Raises UserError for a damaged or unwritable cache, and for a
    single document."""
    root = cache_dir() / "shards"
    key = [FORMAT, corpus.fingerprint(), vocab_size, val_fraction, seed]
    path = root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    if not path.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f"{path.name}.building-", dir=root) as building:
                whole = Path(building) / "whole"
                whole.mkdir()
                _build(whole, corpus, vocab_size, val_fraction, seed)
                if not path.exists():
                    os.rename(whole, path)
        except OSError as error:
            if not path.exists():  # else another process finished first, with the same content
                raise UserError(
                    f"cannot write tokens under {root}: {error.strerror}; set TINYSTORY_CACHE to another folder"
                ) from None
    return _open(path)


def _build(folder: Path, corpus: Corpus, vocab_size: int, val_fraction: float, seed: int) -> None:
    """Write a folder of shards in two passes over the corpus: train the tokenizer and measure, then
    encode."""
    count = 0
    characters = 0
    smallest = 1.0  # draw

    def training_documents() -> Iterator[str]:
        nonlocal count, characters, smallest
        for document in corpus.documents():
            draw = _uniform(seed, count)
            count += 1
            characters += len(document)
            smallest = min(smallest, draw)
            if draw > val_fraction:
                yield document

    reading = tqdm(training_documents(), desc="reading", unit=" documents", disable=None)
    tokenizer = Tokenizer.train(reading, vocab_size)
    if count < 2:
        raise UserError(
            "the corpus is a single document, where one is needed to train on and one for validation: separate its "
            f"stories by blank lines or {MARKER}"
        )
    threshold = max(val_fraction, smallest)  # at least the smallest draw: one document
    tokenizer.save(folder / "tokenizer.json")

    writers = {name: _Writer(folder, name, tokenizer) for name in SPLITS}
    batches = _batches(corpus, seed, threshold)
    threads = min(os.cpu_count() or 1, MAX_THREADS)
    progress = tqdm(
        total=characters, desc="encoding", unit=" characters", unit_scale=True, disable=None
    )
    with ThreadPoolExecutor(threads) as pool, progress:
        while group := list(islice(batches, 2 * threads)):
            documents = [batch.documents for batch in group]
            encoded = pool.map(functools.partial(encode, tokenizer), documents)
            for batch, columns in zip(group, encoded, strict=True):
                writers[batch.split].append(*columns)
                progress.update(batch.characters)
    write_manifest(folder)


def _uniform(seed: int, index: int) -> float:
    """A draw from [0, 1), a function of (seed, index); 2 for the first document, which is never
    held out."""
    if index == 0:
        return 2.0
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


@dataclass
class _Batch:
    """Documents of one split, in its order."""

    split: str
    documents: list[str] = field(default_factory=list)
    characters: int = 0


def _batches(corpus: Corpus, seed: int, threshold: float) -> Iterator[_Batch]:
    """Batches of about BATCH characters. Documents with draws up to the threshold are `val`."""
    batches = {name: _Batch(name) for name in SPLITS}
    for index, document in enumerate(corpus.documents()):
        name = "val" if _uniform(seed, index) <= threshold else "train"
        batch = batches[name]
        batch.documents.append(document)
        batch.characters += len(document)
        if batch.characters >= BATCH:
            yield batch
            batches[name] = _Batch(name)
    for batch in batches.values():
        if batch.documents:
            yield batch


def encode(
    tokenizer: Tokenizer, documents: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode documents, each followed by `</s>`. Returns tokens (n,) uint32; words (n,) uint8, the
    number of str.split() words whose first byte is in each token; and lengths (documents,) int64,
    in tokens."""
    eos = np.array([tokenizer.eos], dtype=np.uint32)
    arrays = [tokenizer.encode_array(document) for document in documents]
    lengths = np.array([len(array) + 1 for array in arrays], dtype=np.int64)
    parts = []
    for array in arrays:
        parts += [array, eos]
    tokens = np.concatenate(parts)

    # one white-space byte after each document stands for its </s>
    text = "\n".join(documents) + "\n"
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    space = IS_SPACE[codes]
    begins = ~space  # whether a word begins with this character
    begins[1:] &= space[:-1]
    width = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    first_bytes = np.cumsum(width) - width  # of the characters
    word_bytes = first_bytes[begins]  # the first byte of each word

    sizes = tokenizer.token_sizes.copy()
    sizes[tokenizer.eos] = 1
    ends = np.cumsum(sizes[tokens])  # end of each token, in bytes
    words = np.diff(np.searchsorted(word_bytes, ends), prepend=0).astype(np.uint8)
    return tokens, words, lengths


class _Writer:
    """Appends encoded documents to the files of one split."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer):
        self.paths = [folder / f"{name}.{part}" for part in PARTS]
        self.dtypes = _dtypes(tokenizer)
        self.written = 0  # tokens
        nothing = np.empty(0)
        self._write(nothing, nothing, np.zeros(1))

    def append(self, tokens: np.ndarray, words: np.ndarray, lengths: np.ndarray) -> None:
        self._write(tokens, words, self.written + np.cumsum(lengths))
        self.written += len(tokens)

    def _write(self, *arrays: np.ndarray) -> None:
        for path, dtype, array in zip(self.paths, self.dtypes, arrays, strict=True):
            with open(path, "ab") as file:
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
    train = _open_split(path, "train", tokenizer)
    val = _open_split(path, "val", tokenizer)
    return Dataset(tokenizer, train, val, path)


def _open_split(path: Path, name: str, tokenizer: Tokenizer) -> TokenFile:
    arrays: list[np.ndarray] = []
    for part, dtype in zip(PARTS, _dtypes(tokenizer), strict=True):
        file = path / f"{name}.{part}"
        if file.stat().st_size:
            arrays.append(np.memmap(file, dtype=dtype, mode="r"))
        else:  # cannot be mapped
            arrays.append(np.empty(0, dtype))
    return TokenFile(*arrays)
