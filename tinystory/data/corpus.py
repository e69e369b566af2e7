"""Corpora as streams of documents: built-in stories, corpora on the Hugging Face Hub, and local
files. A stream holds at most a few megabytes of text in memory."""

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
from tinystory.run.files import file_hash

# Generator and number of words; by these, three in eight openings are told to an end, the others by
# a dull teller.
BUILTIN = {
    "builtin": (grammar.stories, 1_000_000),
    "primer": (primer.tales, 400_000),
    "dull": (dull.documents, 1_150_000),
}
NO_STORIES = ("primer", "dull")  # corpora unfit to measure stories by
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
LICENCES = {
    name: f"see https://huggingface.co/datasets/{repository}"
    for name, (repository, _) in HUB.items()
}
LICENCES |= dict.fromkeys(BUILTIN, "MIT, as tinystory") | {"tinystories": "CDLA-Sharing-1.0"}

MARKER = "<|endoftext|>"
BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
CHUNK = 1 << 20  # characters read at a time
# characters; longer documents are split at a line end, so that none has to fit in memory
MAX_DOCUMENT = 1 << 18
MAX_RUN = 1 << 9  # characters; longer runs of letters, other signs or white space are split
# a run; every piece of the tokenizer's split lies within one
UNBROKEN = re.compile(r"\w*|\s*|[^\w\s]*")
MAX_RECORD = 1 << 26  # characters per line of .jsonl


# (file or, for generated text, its identity; function that opens a stream of its documents).
Part: TypeAlias = tuple[str | Path, Callable[[], Iterator[str]]]


@dataclass(eq=False)
class Corpus:
    """Documents in a fixed order. Built by `open_corpus`."""

    parts: Sequence[Part]
    kind: str = "passage"

    def documents(self) -> Iterator[str]:
        """A new stream of non-empty, stripped documents of at most MAX_DOCUMENT characters. Reading
        raises UserError if a file is malformed or holds no text."""
        return itertools.chain.from_iterable(read() for _, read in self.parts)

    def mixed(self) -> Iterator[str]:
        """The same documents interleaved: the next one comes from the file with the fewest words so
        far, so that every prefix of the stream holds text of every file."""
        heap = [(0, i, read()) for i, (_, read) in enumerate(self.parts)]
        while heap:
            words, i, documents = heapq.heappop(heap)
            if (document := next(documents, None)) is not None:
                heapq.heappush(heap, (words + len(document.split()), i, documents))
                yield document

    def fingerprint(self) -> str:
        """Hex digest of each file's content and format, or of the grammar's source. Takes a second
        for 400 MB."""
        parts = [(_kind(x), file_hash(x)) if isinstance(x, Path) else x for x, _ in self.parts]
        key = [MAX_DOCUMENT, *parts, *[self.kind] * (self.kind != "passage")]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def open_corpus(names: Sequence[str], kind: str = "passage") -> Corpus:
    """The concatenation of the named corpora and files. Raises UserError for anything that cannot
    be opened.

    A name is one of NAMES (those on the Hub are downloaded here) or the path of a .txt or .jsonl
    file, perhaps gzipped (.gz). In a .txt file, documents are separated by `<|endoftext|>`, else by
    blank lines, else it is one document; with `kind` "row", lines are documents, as in the dataset
    of the paper's authors. In .jsonl, each line is an object with a document as "text" or "story".
    """
    parts: list[Part] = []
    for name in names:
        if name in BUILTIN:
            generate, words = BUILTIN[name]
            files = sorted(
                file
                for file in Path(grammar.__file__).parent.iterdir()
                if file.suffix in (".py", ".txt")
            )
            source = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
            parts.append(
                (
                    f"{name} {words} {BUILTIN_SEED} {source}",
                    functools.partial(generate, words, BUILTIN_SEED),
                )
            )
        elif name in HUB:
            parts.extend(_file(path, kind) for path in hub.download(*HUB[name]))
        else:
            parts.append(_file(Path(name), kind))
    return Corpus(parts, kind)


def _file(path: Path, kind: str) -> Part:
    """The path, and a function that opens its stream of documents. Raises UserError if it cannot be
    a corpus."""
    if not path.is_file() or _kind(path) not in (".txt", ".jsonl"):
        problem = "neither .txt nor .jsonl (or .gz of either)" if path.is_file() else "no file"
        raise UserError(
            f"the corpus {path} is {problem}: give another file, or one of {', '.join(NAMES)}"
        )
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
            message = (
                f"{path} is not UTF-8 (it holds a byte {byte}): convert it, for instance with iconv"
            )
            raise UserError(message) from None
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise UserError(
                f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from None

    return path, read


def _kind(path: Path) -> str:
    """The suffix before .gz: ".txt" or ".jsonl" for a corpus."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open_text(path: Path) -> TextIO:
    """A UTF-8 file, gunzipped if its name ends in .gz, without BOM, with universal newlines."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    return cast(TextIO, opener(path, "rt", encoding="utf-8-sig"))


def _text(path: Path) -> Iterator[str]:
    with _open_text(path) as file:
        while text := file.read(CHUNK):
            if "\0" in text:
                raise ValueError(
                    "it holds NUL characters: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"
                )
            yield text


def _passages(path: Path) -> Iterator[str]:
    """Documents of a plain-text file, long ones in pieces."""
    separator, rest = _separator(path), ""
    for text in _text(path):
        *documents, rest = separator.split(rest + text)
        yield from documents
        while len(rest) > MAX_DOCUMENT:
            piece, rest = _cut(rest)
            yield piece
    yield rest


def _rows(path: Path) -> Iterator[str]:
    for passage in _passages(path):
        yield from passage.split("\n")


def _separator(path: Path) -> re.Pattern[str]:
    tail = ""
    for text in _text(path):
        if MARKER in tail + text:
            return re.compile(re.escape(MARKER))
        tail = (tail + text)[-len(MARKER) :]
    return BLANK_LINES


def _records(path: Path) -> Iterator[str]:
    # readline ends lines at \n only: in JSON, U+2028 and its like are text
    with _open_text(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_RECORD + 1), ""), 1):
            if len(line) > MAX_RECORD:
                size = f"over {MAX_RECORD >> 20} million characters"
                raise ValueError(
                    f"it has a line of {size}, where .jsonl holds one JSON object per line"
                )
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                document = record["text"] if "text" in record else record["story"]
                document.encode()  # JSON can hold lone surrogates, which are not valid Unicode
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                message = f'its line {number} is not a JSON object with a string of Unicode text as "text" or "story"'
                raise ValueError(message) from None
            yield document


def _bounded(document: str) -> Iterator[str]:
    """Non-empty pieces of the document, stripped, of at most MAX_DOCUMENT characters and without
    endless words."""
    while len(document) > MAX_DOCUMENT:
        piece, document = _cut(document)
        yield from _broken(piece)
    yield from _broken(document)


def _broken(text: str) -> Iterator[str]:
    """`text`, stripped and cut so that runs stay below 2 * MAX_RUN characters: the time to train
    BPE grows with the square of the longest word, and an endless line of one letter is one word."""
    ends = [
        end
        for end in range(MAX_RUN, len(text), MAX_RUN)
        if UNBROKEN.fullmatch(text, end - MAX_RUN, end)
    ]
    pieces = (text[start:end].strip() for start, end in itertools.pairwise([0, *ends, len(text)]))
    yield from filter(None, pieces)


def _cut(text: str) -> tuple[str, str]:
    """Split after at most MAX_DOCUMENT characters: at the last line end, else at the last space,
    else exactly there."""
    ends = (text.rfind(character, 1, MAX_DOCUMENT) + 1 for character in "\n ")
    at = next(filter(None, ends), MAX_DOCUMENT)
    return text[:at], text[at:]
