"""A tokenized corpus with exact word counts, in memory-mapped arrays that are built once. A folder
holds tokenizer.json, manifest.json (hashes of the other files, checked at each opening), middle.txt
(the number of training documents before the corpora that pause) and two little-endian arrays for
each of train and val:

    NAME.tokens   uint16 (uint32 if the vocabulary is over 65 536)   the tokens of all documents;
    `</s>` ends each document and occurs nowhere else
    NAME.words    uint8   per token, the number of words that begin in the token
"""

import functools
import hashlib
import json
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray
from tqdm import tqdm

from tinystory.data.corpus import MARKER, Corpus
from tinystory.data.tokenizer import Tokenizer
from tinystory.run.errors import UserError
from tinystory.run.paths import cache_dir
from tinystory.run.records import require_whole, write_manifest
from tinystory.run.terminal import wrapped

# increase this whenever a change here, in corpus.py or in tokenizer.py changes the tokens of a text
FORMAT = 6
ARRAYS = ("train.tokens", "train.words", "val.tokens", "val.words")
MIDDLE = "middle.txt"
FILES = ("tokenizer.json", MIDDLE, *ARRAYS)

LONG_DOCUMENT = 10  # sequences
BATCH = 1 << 20  # characters that are encoded together
SEPARATOR = "\n"  # put after each document, so that the last word ends
# str.split() splits exactly at the characters for which str.isspace() is true.
IS_SPACE = np.array([chr(code).isspace() for code in range(sys.maxunicode + 1)])


@dataclass(frozen=True)
class TokenFile:
    """One split. tokens: (n,) uint16 or uint32; words: (n,) uint8; offsets: (documents + 1,) int64,
    document i is tokens[offsets[i]:offsets[i + 1]]. len() is n."""

    tokens: ndarray
    words: ndarray
    offsets: ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, documents: int) -> "TokenFile":
        """A view of the first `documents` documents."""
        end = self.offsets[documents]
        return TokenFile(self.tokens[:end], self.words[:end], self.offsets[: documents + 1])

    def document_words(self) -> ndarray:
        """(documents,) int64: the number of words in each document."""
        return np.add.reduceat(self.words, self.offsets[:-1], dtype=np.int64)

    @functools.cached_property
    def word_count(self) -> int:
        return int(self.words.sum(dtype=np.int64))


@dataclass(frozen=True)
class Dataset:
    """Both splits of a tokenized corpus. middle: the training split without the corpora that pause,
    for the middle of pretraining. path: the folder of the arrays."""

    tokenizer: Tokenizer
    train: TokenFile
    middle: TokenFile
    val: TokenFile
    path: Path


def prepare(
    corpus: Corpus,
    *,
    vocab_size: int,
    val_fraction: float = 0.05,
    seed: int = 0,
) -> Dataset:
    """The tokenized corpus, from cache_dir()/shards, where it is built if necessary. About
    `val_fraction` of the documents are held out for validation: at least one, never the first,
    chosen only by `seed` and index. The tokenizer has up to `vocab_size` tokens and is trained on
    the training split. Several processes may build at once. Raises UserError for a damaged or
    unwritable cache, and for a corpus of a single document."""
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
                whole.rename(path)
        except OSError as error:
            if not path.exists():  # else another process finished first, with the same content
                raise UserError(
                    f"cannot write tokens under {root}: {error.strerror}; set TINYSTORY_CACHE to another folder"
                ) from None
    try:
        require_whole(path, FILES)
    except UserError as error:
        raise UserError(f"{error}; delete {path} and run this again") from None
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    train = _open(path, "train", tokenizer)
    middle = train.first(int((path / MIDDLE).read_text()))
    return Dataset(tokenizer, train, middle, _open(path, "val", tokenizer), path)


def print_documents(train: TokenFile, context: int) -> None:
    """How many documents the corpus has and how long they are; and what to do if most of the text is
    in documents so long that the student hardly sees a story end. context: tokens of a sequence."""
    words = train.document_words()
    print(f"corpus: {len(words):,} training documents, median length {np.median(words):,.0f} words")
    tokens = np.diff(train.offsets)
    longest = LONG_DOCUMENT * context
    if tokens[tokens > longest].sum() > len(train) / 2:
        print(
            wrapped(
                f"warning: most of the corpus is in documents of more than {longest:,} tokens, "
                f"{LONG_DOCUMENT} times --context, so the student hardly sees a story end: separate "
                f"the stories of a .txt file by blank lines or {MARKER}, or give a .jsonl file with "
                "one story per line"
            )
        )


def _build(folder: Path, corpus: Corpus, vocab_size: int, val_fraction: float, seed: int) -> None:
    """Write a folder of shards in two passes over the corpus: train the tokenizer, then encode."""
    draws = array("d")  # one draw per document
    not_pausing = 0  # the number of documents before those that pause

    def training_documents() -> Iterator[str]:
        nonlocal not_pausing
        for part in corpus.parts:
            for document in part.documents():
                draws.append(_uniform(seed, len(draws)))
                if draws[-1] > val_fraction:
                    yield document
            if not part.pauses:
                not_pausing = len(draws)

    reading = tqdm(training_documents(), desc="reading", unit=" documents", disable=None)
    tokenizer = Tokenizer.train(reading, vocab_size)
    if len(draws) < 2:
        raise UserError(
            "the corpus has one document, and at least two are needed (training and validation): separate "
            f"stories by blank lines or {MARKER}"
        )
    tokenizer.save(folder / "tokenizer.json")

    threshold = max(val_fraction, min(draws))  # at least one document
    in_train = [draw > threshold for draw in draws]
    (folder / MIDDLE).write_text(f"{sum(in_train[:not_pausing])}\n")
    encoding = tqdm(in_train, desc="encoding", unit=" documents", disable=None)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in ARRAYS}
        for split, documents in _batches(zip(corpus.documents(), encoding, strict=True)):
            tokens, words = encode(tokenizer, documents)
            files[f"{split}.tokens"].write(tokens.astype(_dtype(tokenizer)).data)
            files[f"{split}.words"].write(words.data)
    write_manifest(folder)


def held_out_documents(corpus: Corpus, val_fraction: float, seed: int) -> Iterator[str]:
    """Yields the documents of the validation split of `prepare`; none if only the document with the
    smallest draw was held out."""
    for index, document in enumerate(corpus.documents()):
        if _uniform(seed, index) <= val_fraction:
            yield document


def _uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends only on (seed, index); 2 for the first document, which is
    never held out."""
    if index == 0:
        return 2.0
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _batches(documents: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, list[str]]]:
    """Yields the name of a split and the split's next documents, in order, about BATCH characters
    at a time. documents: pairs of a document and whether it is in the training split."""
    batches: dict[str, list[str]] = {"train": [], "val": []}
    sizes = dict.fromkeys(batches, 0)
    for document, is_in_train in documents:
        split = "train" if is_in_train else "val"
        batches[split].append(document)
        sizes[split] += len(document)
        if sizes[split] >= BATCH:
            yield split, batches[split]
            batches[split], sizes[split] = [], 0
    for split, rest in batches.items():
        if rest:
            yield split, rest


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> tuple[ndarray, ndarray]:
    """tokens (n,) uint32 of all documents, each followed by `</s>`, and words (n,) uint8, the
    number of str.split() words that begin in each token."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document)
        ids.append(tokenizer.eos)
    tokens = np.array(ids, dtype=np.uint32)
    text = "".join(document + SEPARATOR for document in documents)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    in_word = ~IS_SPACE[codes]
    begins = np.diff(in_word, prepend=False) & in_word  # whether a word begins with this character
    sizes = 1 + np.digitize(codes, (0x80, 0x800, 0x10000))  # in UTF-8
    first_bytes = np.cumsum(sizes) - sizes
    token_sizes = tokenizer.token_sizes[tokens]
    token_sizes[tokens == tokenizer.eos] = len(SEPARATOR)
    ends = np.cumsum(token_sizes)  # end of each token, in bytes
    words = np.diff(np.searchsorted(first_bytes[begins], ends), prepend=0)
    return tokens, words.astype(np.uint8)


def _dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def _open(path: Path, split: str, tokenizer: Tokenizer) -> TokenFile:
    tokens = np.memmap(path / f"{split}.tokens", dtype=_dtype(tokenizer), mode="r")
    words = np.memmap(path / f"{split}.words", dtype=np.uint8, mode="r")
    ends = np.flatnonzero(tokens == tokenizer.eos) + 1
    return TokenFile(tokens, words, np.append(0, ends))
