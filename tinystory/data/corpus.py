"""Corpora as streams of documents: built-in stories, corpora on the Hugging Face Hub, and local
files. A stream holds at most a few megabytes of text in memory."""

import functools
import gzip
import hashlib
import heapq
import json
import re
import shlex
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO, cast

from tinystory.data.builtin import dull, grammar
from tinystory.run import hub
from tinystory.run.errors import UserError
from tinystory.run.files import file_hash
from tinystory.run.options import did_you_mean

# Generator and number of words. With these numbers, three in eight openings continue as a story,
# and the others as dull text (filler).
BUILTIN = {
    "builtin": (grammar.stories, 1_000_000),
    "dull": (dull.documents, 1_150_000),
}
NO_STORIES = ("dull",)  # corpora without stories, to which no teacher is fitted
BUILTIN_SEED = 0
# increase this whenever a change of builtin/*.py changes a generated text
BUILTIN_VERSION = 1

# Corpora on the Hub: the dataset's repository and the files in it, in order. TinyStories: Eldan &
# Li 2023, arXiv 2305.07759; the training file, and the much smaller validation file. BabyLM: the
# organisers' text for the strict-small and strict tracks, as published since 2026.
_BABYLM = tuple(
    f"{part}.train.txt"
    for part in "bnc_spoken childes gutenberg open_subtitles simple_wiki switchboard".split()
)
HUB = {
    "tinystories": ("roneneldan/TinyStories", ("TinyStories-train.txt",)),
    "tinystories-valid": ("roneneldan/TinyStories", ("TinyStories-valid.txt",)),
    "babylm-10m": ("BabyLM-community/BabyLM-2026-Strict-Small", _BABYLM),
    "babylm-100m": ("BabyLM-community/BabyLM-2026-Strict", _BABYLM),
}
NAMES = (*BUILTIN, *HUB)
LICENCES = dict.fromkeys(BUILTIN, "MIT, as tinystory")
LICENCES |= {name: f"see https://huggingface.co/datasets/{HUB[name][0]}" for name in HUB}

MARKER = "<|endoftext|>"
BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
CHUNK = 1 << 20  # characters read at a time
# characters; longer documents are split at a line end, so that no document has to fit in memory
MAX_DOCUMENT = 1 << 18
MAX_RUN = 1 << 9  # characters; longer runs of letters, other signs or white space are split
# a run; every piece of the tokenizer's split lies within a single run
UNBROKEN = re.compile(r"\w*|\s*|[^\w\s]*")
MAX_RECORD = 1 << 26  # characters per line of .jsonl


class Part(NamedTuple):
    """One corpus or file. identity: the file, or the parameters that determine a generated text.
    documents: function that opens a stream of documents. pauses: whether pretraining leaves this
    part out for a while (windows.PAUSE)."""

    identity: str | Path
    documents: Callable[[], Iterator[str]]
    pauses: bool = False


@dataclass(eq=False)
class Corpus:
    """Documents in a fixed order. Built by `open_corpus`."""

    parts: Sequence[Part]

    def documents(self) -> Iterator[str]:
        """A new stream of non-empty, stripped documents of at most MAX_DOCUMENT characters. Reading
        raises UserError if a file is malformed or holds no text."""
        for part in self.parts:
            yield from part.documents()

    def mixed(self) -> Iterator[str]:
        """The same documents, interleaved: the next document is from the part with the fewest words
        so far, so every prefix of the stream holds text of every part."""
        streams = [part.documents() for part in self.parts]
        heap = [(0, i) for i in range(len(streams))]  # words so far, index of the part
        while heap:
            words, i = heapq.heappop(heap)
            document = next(streams[i], None)
            if document is not None:
                heapq.heappush(heap, (words + len(document.split()), i))
                yield document

    def fingerprint(self) -> str:
        """Hex digest of each file's content and format, or of the parameters that determine a
        generated text. Takes a second for 400 MB."""
        key: list[object] = [MAX_DOCUMENT]
        for part in self.parts:
            if isinstance(part.identity, Path):
                key.append((_kind(part.identity), file_hash(part.identity)))
            else:
                key.append(part.identity)
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def open_corpus(names: Sequence[str]) -> Corpus:
    """The concatenation of the named corpora and files, with the parts that pause at the end.
    Raises UserError for anything that cannot be opened.

    A name is one of NAMES (corpora on the Hub are downloaded here) or the path of a .txt or .jsonl
    file, gzipped (.gz) or not. In a .txt file, documents are separated by `<|endoftext|>`, or else
    by blank lines; a file without either is one document. In a .jsonl file, each line is an object
    with a document as "text"."""
    parts: list[Part] = []
    for name in names:
        if name in BUILTIN:
            parts.append(_generated(name))
        elif name in HUB:
            parts.extend(_file(path) for path in hub.download(*HUB[name]))
        else:
            parts.append(_file(Path(name)))
    return Corpus(sorted(parts, key=lambda part: part.pauses))


def recorded_corpus(names: Sequence[str] | None, folder: Path) -> Sequence[str]:
    """`names`, the corpus that the checkpoint in `folder` records. Raises UserError if no corpus is
    recorded, or a file: the checkpoint may be somebody else's, so only the user may name files."""
    if not names:
        raise UserError(
            f"{folder} does not record the corpus of the student: give --corpus NAME|FILE"
        )
    for name in names:
        if name not in NAMES:
            raise UserError(
                f"{folder} records {shlex.quote(name[:200])} as the student's corpus: the folder may be "
                "somebody else's, so no file that it names is read; give --corpus NAME|FILE"
            )
    return names


def story_corpora(corpus: Sequence[str]) -> list[str]:
    """The corpora among `corpus` that contain stories, to which the rubric is fitted; all if none
    does."""
    return [name for name in corpus if name not in NO_STORIES] or list(corpus)


def _generated(name: str) -> Part:
    generate, words = BUILTIN[name]
    plots = hashlib.sha256()
    for file in sorted(Path(grammar.__file__).parent.glob("*.txt")):
        plots.update(file.read_bytes())
    identity = f"{name} {words} {BUILTIN_SEED} {BUILTIN_VERSION} {plots.hexdigest()}"

    @functools.cache
    def texts() -> list[str]:  # some 7 MB, read twice by whoever tokenizes them
        return list(generate(words, BUILTIN_SEED))

    return Part(identity, lambda: iter(texts()), pauses=name in NO_STORIES)


def _file(path: Path) -> Part:
    """The corpus in a file. Raises UserError if the file cannot be a corpus."""
    problem = ""
    if not path.exists():
        problem = f"there is no file {path}, and no corpus of this name"
    elif not path.is_file() or _kind(path) not in (".txt", ".jsonl"):
        problem = f"the corpus {path} is not a .txt or .jsonl file (or .gz of either)"
    if problem:
        raise UserError(
            f"{problem}{did_you_mean(str(path), NAMES)}: give another file, or one of {', '.join(NAMES)}"
        )
    split = _records if _kind(path) == ".jsonl" else _passages

    def documents() -> Iterator[str]:
        empty = True
        try:
            for document in split(path):
                for piece in _bounded(document):
                    text = piece.strip()
                    if text:
                        empty = False
                        yield text
            if empty:
                raise ValueError("it holds no documents")
        except UnicodeDecodeError as error:
            byte = f"0x{error.object[error.start]:02x}"
            raise UserError(
                f"{path} is not UTF-8 (it holds a byte {byte}): convert it, for instance with iconv"
            ) from None
        except (OSError, EOFError, zlib.error, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be read: {reason}") from None

    return Part(path, documents)


def _kind(path: Path) -> str:
    """The suffix of a file's name, without .gz: ".txt" or ".jsonl" for a corpus."""
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
    separator = _separator(path)
    rest = ""
    for text in _text(path):
        *documents, rest = separator.split(rest + text)
        yield from documents
        *pieces, rest = _cut(rest)
        yield from pieces
    yield rest


def _separator(path: Path) -> re.Pattern[str]:
    tail = ""
    for text in _text(path):
        text = tail + text
        if MARKER in text:
            return re.compile(re.escape(MARKER))
        tail = text[-len(MARKER) :]
    return BLANK_LINES


def _records(path: Path) -> Iterator[str]:
    number = 0
    with _open_text(path) as file:
        # readline ends lines at \n only: in JSON, U+2028 and its like are text
        while line := file.readline(MAX_RECORD):
            number += 1
            if not line.strip():
                continue
            try:
                document = json.loads(line)["text"]
                document.encode()  # JSON can hold lone surrogates, which are not valid Unicode
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f'its line {number} is not a JSON object with a string of Unicode text as "text"'
                ) from None
            yield document


def _bounded(document: str) -> Iterator[str]:
    """Pieces of at most MAX_DOCUMENT characters, with runs below 2 * MAX_RUN characters. Without
    this limit an endless line of one letter would be one word, and the time to train BPE grows with
    the square of the longest word."""
    for piece in _cut(document):
        start = 0
        for end in range(MAX_RUN, len(piece), MAX_RUN):
            if UNBROKEN.fullmatch(piece, end - MAX_RUN, end):
                yield piece[start:end]
                start = end
        yield piece[start:]


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most MAX_DOCUMENT characters. Each ends at the last line end within that length,
    or else at the last space, or else at exactly that length."""
    while len(text) > MAX_DOCUMENT:
        at = text.rfind("\n", 1, MAX_DOCUMENT) + 1
        if not at:
            at = text.rfind(" ", 1, MAX_DOCUMENT) + 1
        if not at:
            at = MAX_DOCUMENT
        yield text[:at]
        text = text[at:]
    yield text
