"""Where documents come from: the built-in stories, corpora on the Hugging Face Hub, files of one's own.

Everything streams: nothing here holds more than a few megabytes of text, whatever the size of the file.
"""

import codecs
import gzip
import hashlib
import heapq
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tinystory.data.builtin import grammar
from tinystory.errors import UserError

BUILTIN_WORDS = 1_000_000
BUILTIN_SEED = 0

# What is on the Hub: a dataset's repository and the files that make the corpus, in order.
# TinyStories: Eldan & Li 2023, arXiv 2305.07759; the file its models were trained on.
# BabyLM: the organisers' text for the strict-small and strict tracks, as they publish it since 2026.
_BABYLM = tuple(f"{part}.train.txt" for part in
                ("bnc_spoken", "childes", "gutenberg", "open_subtitles", "simple_wiki", "switchboard"))
HUB = {
    "tinystories": ("roneneldan/TinyStories", ("TinyStories-train.txt",)),
    "babylm-10m": ("BabyLM-community/BabyLM-2026-Strict-Small", _BABYLM),
    "babylm-100m": ("BabyLM-community/BabyLM-2026-Strict", _BABYLM),
}
NAMES = ("builtin", *HUB)

MARKER = "<|endoftext|>"
BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
CHUNK = 1 << 20  # bytes read at a time
MAX_DOCUMENT = 1 << 18  # characters; a longer document is cut at the end of a line, so that it never has to be held
MAX_RECORD = 1 << 26  # characters in a line of .jsonl


class Corpus:
    """Documents in a fixed order. Make one with `open_corpus`."""

    def __init__(self, names: Sequence[str], parts: Sequence[tuple[str, Callable[[], Iterator[str]]]]):
        self.names = tuple(names)
        self._parts = parts  # (what it is, exactly; how to read it)

    def documents(self) -> Iterator[str]:
        """A fresh stream of non-empty documents, stripped of outer white space, each at most MAX_DOCUMENT characters.

        Raises UserError where a file turns out to be broken or to hold no text.
        """
        return itertools.chain.from_iterable(read() for _, read in self._parts)

    def mixed(self) -> Iterator[str]:
        """The same documents, the next one always from the part that has given the fewest words: for readers who stop
        early and shall know all parts."""
        heap = [(0, index, read()) for index, (_, read) in enumerate(self._parts)]
        while heap:
            words, index, documents = heap[0]
            document = next(documents, None)
            if document is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (words + len(document.split()), index, documents))
                yield document

    def fingerprint(self) -> str:
        """Hex digest that changes whenever the documents could: a file's path, size or time, the grammar's source."""
        identity = [MAX_DOCUMENT, *(what for what, _ in self._parts)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def open_corpus(names: Sequence[str]) -> Corpus:
    """The corpora and files named, one after the other.

    A name is one of NAMES or a path to .txt or .jsonl, either with .gz after it. In a .txt, `<|endoftext|>` separates
    the documents; without any, blank lines do; without those, the file is one document. In a .jsonl each line is an
    object whose "text" or "story" is a document. Raises UserError for anything that cannot be opened; what is on the
    Hub is downloaded here.
    """
    parts = []
    for name in names:
        if name == "builtin":
            parts.append((f"builtin {BUILTIN_WORDS} {BUILTIN_SEED} {_grammar_source()}",
                          lambda: grammar.stories(BUILTIN_WORDS, BUILTIN_SEED)))
        elif name in HUB:
            parts.extend(_file(path) for path in _download(*HUB[name]))
        else:
            parts.append(_file(Path(name)))
    if not parts:
        raise UserError(f"no corpus was named: give a file, or one of {', '.join(NAMES)}")
    return Corpus(names, parts)


def _grammar_source() -> str:
    """Hex digest of the code and phrases that the built-in stories come from."""
    files = sorted(Path(grammar.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _file(path: Path) -> tuple[str, Callable[[], Iterator[str]]]:
    kind = (path.with_suffix("") if _gzipped(path) else path).suffix.lower()
    try:
        status = path.stat()
    except OSError:
        raise UserError(f"there is no corpus and no file called {str(path)!r}: "
                        f"the corpora are {', '.join(NAMES)}") from None
    if not path.is_file():
        raise UserError(f"{path} is not a file: name the files in it one by one")
    if kind not in (".txt", ".jsonl"):
        raise UserError(f"{path} is neither .txt nor .jsonl (either may have .gz after it): rename or convert it")
    if status.st_size == 0:
        raise UserError(f"{path} is empty: choose another corpus")
    what = f"{kind} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    split = _records if kind == ".jsonl" else _passages

    def read() -> Iterator[str]:
        found = False
        for document in split(path):
            for piece in _bounded(document):
                found = True
                yield piece
        if not found:
            raise UserError(f"{path} holds no documents: there is only white space in it")

    return what, read


def _gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _text(path: Path) -> Iterator[str]:
    """A UTF-8 file in chunks, gunzipped if its name ends in .gz, with its BOM dropped and every line end as \\n."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    done, lines, first = 0, 1, True  # bytes decoded so far, the line they end in, nothing yielded yet
    try:
        with (gzip.open if _gzipped(path) else open)(path, "rb") as file:
            while True:
                data = file.read(CHUNK)
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:  # its object: a character begun in the last chunk, then this chunk
                    at = done - (len(error.object) - len(data)) + error.start
                    line = lines + error.object.count(b"\n", 0, error.start)
                    raise UserError(f"{path} is not UTF-8: byte {at} (counted from 0), in line {line}, is "
                                    f"0x{error.object[error.start]:02x}; convert it, for instance with iconv") from None
                if text:
                    yield text.removeprefix("\ufeff") if first else text
                    first = False
                if not data:
                    return
                done += len(data)
                lines += data.count(b"\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}): fetch or compress it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _passages(path: Path) -> Iterator[str]:
    """The documents of a plain text, in pieces of any length."""
    separator = _separator(path)
    rest = ""
    for text in _text(path):
        *whole, rest = separator.split(rest + text)
        yield from whole
        while len(rest) > MAX_DOCUMENT:
            piece, rest = _cut(rest)
            yield piece
    yield rest


def _separator(path: Path) -> re.Pattern:
    """What stands between documents: the marker if it occurs anywhere, else blank lines."""
    tail = ""
    for text in _text(path):
        if MARKER in tail + text:
            return re.compile(re.escape(MARKER))
        tail = (tail + text)[-len(MARKER):]
    return BLANK_LINES


def _records(path: Path) -> Iterator[str]:
    """The documents of JSON Lines."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            document = record["text"] if "text" in record else record["story"]
            document.encode()  # a lone surrogate, which JSON can spell, is no Unicode text
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number} of {path} is not a JSON object with Unicode text: {error}") from None
        except (KeyError, TypeError, AttributeError):
            raise UserError(f'line {number} of {path} is not a JSON object with a string called "text" or "story"'
                            ) from None
        yield document


def _lines(path: Path) -> Iterator[str]:
    """Lines that end in \\n alone: inside JSON, U+2028 and its like are text."""
    rest = ""
    for number, text in enumerate(_text(path), 1):
        *whole, rest = (rest + text).split("\n")
        yield from whole
        if len(rest) > MAX_RECORD:
            raise UserError(f"{path} has a line of over {MAX_RECORD >> 20} million characters in its first "
                            f"{number} MB: .jsonl holds one JSON object a line")
    yield rest


def _bounded(document: str) -> Iterator[str]:
    """The document, stripped, in pieces of at most MAX_DOCUMENT characters; nothing if it is blank."""
    while len(document) > MAX_DOCUMENT:
        piece, document = _cut(document)
        if piece := piece.strip():
            yield piece
    if document := document.strip():
        yield document


def _cut(text: str) -> tuple[str, str]:
    """Split after MAX_DOCUMENT characters or a little before: behind a line, else a word, if there is one to end."""
    at = text.rfind("\n", 1, MAX_DOCUMENT)
    if at < 0:
        at = text.rfind(" ", 1, MAX_DOCUMENT)
    at = MAX_DOCUMENT if at < 0 else at + 1
    return text[:at], text[at:]


def _download(repository: str, files: Sequence[str]) -> list[Path]:
    """Files of a dataset on the Hub, from huggingface_hub's own cache where they are there already.

    Where that cache lies, which server is asked and whether one is asked at all is the library's affair: HF_HOME,
    HF_HUB_CACHE, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(f"{repository} is on the Hugging Face Hub: pip install huggingface_hub first") from None
    paths = []
    for file in files:
        try:
            paths.append(Path(huggingface_hub.hf_hub_download(repository, file, repo_type="dataset")))
        except errors.LocalEntryNotFoundError:
            raise UserError(f"cannot reach the Hugging Face Hub and {repository}/{file} is not in its cache: "
                            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE") from None
        except errors.GatedRepoError:
            raise UserError(f"{repository} is gated: accept its terms on the Hugging Face Hub, then hf auth login"
                            ) from None
        except (errors.RepositoryNotFoundError, errors.EntryNotFoundError):
            raise UserError(f"the server has no {repository}/{file}: check HF_ENDPOINT") from None
        except (errors.HTTPError, OSError) as error:  # HTTPError: of the HTTP library that this one stands on
            status = getattr(getattr(error, "response", None), "status_code", None)
            why = f"the server answered {status}" if status else (getattr(error, "strerror", "") or "it broke off")
            raise UserError(f"cannot download {repository}/{file}: {why}; check the network and HF_ENDPOINT, then run "
                            "this again") from None
    return paths
