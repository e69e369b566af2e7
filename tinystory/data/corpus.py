"""Corpora as streams of documents: the built-in stories, corpora on the Hugging Face Hub, and local files.

At most a few megabytes of text are in memory, whatever the size of a file.
"""

import functools
import gzip
import hashlib
import heapq
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeAlias, cast

from tinystory.data.builtin import dull, grammar, primer
from tinystory.run import hub
from tinystory.run.errors import UserError
from tinystory.run.folder import file_hash

# Generator, and number of words. The numbers are such that three in eight openings of stories are told to an end, and
# the others by a dull teller.
BUILTIN = {
    "builtin": (grammar.stories, 1_000_000),
    "primer": (primer.tales, 400_000),
    "dull": (dull.documents, 1_150_000),
}
NO_STORIES = ("primer", "dull")  # what no story should be measured by
BUILTIN_SEED = 0

# Corpora on the Hub: the dataset's repository and its files, in order.
# TinyStories: Eldan & Li 2023, arXiv 2305.07759; the file that its models were trained on.
# BabyLM: the organisers' text for the strict-small and strict tracks, as published since 2026.
_PARTS = "bnc_spoken childes gutenberg open_subtitles simple_wiki switchboard"
_BABYLM = tuple(f"{part}.train.txt" for part in _PARTS.split())
HUB = {
    "tinystories": ("roneneldan/TinyStories", ("TinyStories-train.txt",)),
    "babylm-10m": ("BabyLM-community/BabyLM-2026-Strict-Small", _BABYLM),
    "babylm-100m": ("BabyLM-community/BabyLM-2026-Strict", _BABYLM),
}
NAMES = (*BUILTIN, *HUB)
LICENCES = {name: f"see https://huggingface.co/datasets/{repository}" for name, (repository, _) in HUB.items()}
LICENCES |= dict.fromkeys(BUILTIN, "MIT, as tinystory") | {"tinystories": "CDLA-Sharing-1.0"}

MARKER = "<|endoftext|>"
BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
CHUNK = 1 << 20  # characters read at a time
MAX_DOCUMENT = 1 << 18  # characters; longer documents are split at a line end, so that none has to fit in memory
MAX_RUN = 1 << 9  # characters; longer runs of letters, of other signs or of white space are split, not all at once
UNBROKEN = re.compile(r"\w*|\s*|[^\w\s]*")  # every piece of the tokenizer's split lies within such a run
MAX_RECORD = 1 << 26  # characters per line of .jsonl


# A file or an identity, for the fingerprint; and a function that opens its stream of documents.
Part: TypeAlias = tuple[str | Path, Callable[[], Iterator[str]]]


@dataclass(eq=False)
class Corpus:
    """Documents in a fixed order. Built by `open_corpus`."""

    parts: Sequence[Part]
    kind: str = "passage"

    def documents(self) -> Iterator[str]:
        """A new stream of the non-empty documents, stripped, each at most MAX_DOCUMENT characters long.

        Raises UserError while reading if a file is malformed or holds no text.
        """
        return itertools.chain.from_iterable(read() for _, read in self.parts)

    def mixed(self) -> Iterator[str]:
        """The same documents interleaved: the next one comes from the file that has yielded the fewest words so far, so
        that every beginning of the stream holds text of every file."""
        heap = [(0, i, read()) for i, (_, read) in enumerate(self.parts)]
        while heap:
            words, i, documents = heapq.heappop(heap)
            if (document := next(documents, None)) is not None:
                heapq.heappush(heap, (words + len(document.split()), i, documents))
                yield document

    def fingerprint(self) -> str:
        """Hex digest of each file's content and format, or of the grammar's source. It takes a second for 400 MB."""
        parts = [(_kind(x), file_hash(x)) if isinstance(x, Path) else x for x, _ in self.parts]
        key = [MAX_DOCUMENT, *parts, *[self.kind] * (self.kind != "passage")]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def open_corpus(names: Sequence[str], kind: str = "passage") -> Corpus:
    """The concatenation of the named corpora and files.

    A name is one of NAMES or the path of a .txt or .jsonl file, optionally gzipped (.gz). Documents in a .txt file are
    separated by `<|endoftext|>`; if there is none, by blank lines; without those, the file is one document. If `kind`
    is "row", each of its lines is one, as in the dataset that the paper's authors trained on. Each line of a .jsonl
    file is an object whose "text" or "story" is a document. Corpora on the Hub are downloaded here. Raises UserError
    for anything that cannot be opened.
    """
    parts: list[Part] = []
    for name in names:
        if name in BUILTIN:
            generate, words = BUILTIN[name]
            identity = f"{name} {words} {BUILTIN_SEED} {_grammar_source()}"
            parts.append((identity, functools.partial(generate, words, BUILTIN_SEED)))
        elif name in HUB:
            parts.extend(_file(path, kind) for path in hub.download(*HUB[name]))
        else:
            parts.append(_file(Path(name), kind))
    return Corpus(parts, kind)


def _grammar_source() -> str:
    """Hex digest of the code and the phrases behind the built-in stories."""
    files = sorted(file for file in Path(grammar.__file__).parent.iterdir() if file.suffix in (".py", ".txt"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _file(path: Path, kind: str) -> Part:
    """The file, and a function that opens its stream of documents. Raises UserError if the file cannot be a corpus."""
    if not path.is_file() or _kind(path) not in (".txt", ".jsonl"):
        problem = "neither .txt nor .jsonl (or .gz of either)" if path.is_file() else "no file"
        raise UserError(f"the corpus {path} is {problem}: give another file, or one of {', '.join(NAMES)}")
    split = _records if _kind(path) == ".jsonl" else _rows if kind == "row" else _passages

    def read() -> Iterator[str]:
        pieces = itertools.chain.from_iterable(map(_bounded, split(path)))
        try:
            if (first := next(pieces, None)) is None:
                raise ValueError("it holds no documents")
            yield first
            yield from pieces
        except UnicodeDecodeError as error:
            byte = f"0x{error.object[error.start]:02x}"
            raise UserError(
                f"{path} is not UTF-8 (it holds a byte {byte}): convert it, for instance with iconv"
            ) from None
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None

    return path, read


def _kind(path: Path) -> str:
    """The file's suffix before .gz: ".txt" or ".jsonl" if it can be a corpus."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open_text(path: Path) -> TextIO:
    """A UTF-8 file, gunzipped if its name ends in .gz, without the BOM and with \n for every line end."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    return cast(TextIO, opener(path, "rt", encoding="utf-8-sig"))


def _text(path: Path) -> Iterator[str]:
    """Chunks of a file."""
    with _open_text(path) as file:
        while text := file.read(CHUNK):
            if "\0" in text:
                raise ValueError("it holds NUL characters: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
            yield text


def _passages(path: Path) -> Iterator[str]:
    """The documents of a plain-text file, long ones in pieces."""
    separator, rest = _separator(path), ""
    for text in _text(path):
        *documents, rest = separator.split(rest + text)
        yield from documents
        while len(rest) > MAX_DOCUMENT:
            piece, rest = _cut(rest)
            yield piece
    yield rest


def _rows(path: Path) -> Iterator[str]:
    """The lines of a plain-text file."""
    for passage in _passages(path):
        yield from passage.split("\n")


def _separator(path: Path) -> re.Pattern[str]:
    """The separator of the documents: the marker if the file holds one, else blank lines."""
    tail = ""
    for text in _text(path):
        if MARKER in tail + text:
            return re.compile(re.escape(MARKER))
        tail = (tail + text)[-len(MARKER) :]
    return BLANK_LINES


def _records(path: Path) -> Iterator[str]:
    """The documents of a JSON Lines file."""
    with _open_text(path) as file:  # whose lines end in \n only: inside JSON, U+2028 and its like are text
        for number, line in enumerate(iter(lambda: file.readline(MAX_RECORD + 1), ""), 1):
            if len(line) > MAX_RECORD:
                size = f"over {MAX_RECORD >> 20} million characters"
                raise ValueError(f"it has a line of {size}, where .jsonl holds one JSON object per line")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                document = record["text"] if "text" in record else record["story"]
                document.encode()  # JSON can spell lone surrogates, which are not valid Unicode
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                message = f'its line {number} is not a JSON object with a string of Unicode text as "text" or "story"'
                raise ValueError(message) from None
            yield document


def _bounded(document: str) -> Iterator[str]:
    """The stripped document in pieces of at most MAX_DOCUMENT characters, without endless words; none of a blank."""
    while len(document) > MAX_DOCUMENT:
        piece, document = _cut(document)
        yield from _broken(piece)
    yield from _broken(document)


def _broken(text: str) -> Iterator[str]:
    """The text, stripped, with runs of MAX_RUN characters or more cut before 2 * MAX_RUN: the time to train BPE grows
    with the square of the longest word, and an endless line of one letter is one word."""
    ends = [end for end in range(MAX_RUN, len(text), MAX_RUN) if UNBROKEN.fullmatch(text, end - MAX_RUN, end)]
    pieces = (text[start:end].strip() for start, end in itertools.pairwise([0, *ends, len(text)]))
    yield from filter(None, pieces)


def _cut(text: str) -> tuple[str, str]:
    """Split after at most MAX_DOCUMENT characters: at the last line end, else at the last space, else exactly there."""
    ends = (text.rfind(character, 1, MAX_DOCUMENT) + 1 for character in "\n ")
    at = next(filter(None, ends), MAX_DOCUMENT)
    return text[:at], text[at:]
