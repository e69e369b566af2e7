"""An append-only cache of the teacher's replies, one JSON line each.

The key of a reply is the question, so a run that was killed and resumed finds the replies that it already has and asks
only for the others. Each line is one write to the operating system, made before the reply is used: killing the process
at any instant loses no reply. A power cut loses at most the last few seconds of them, which are then asked for again
(they reach the disk at `close`, or when the system writes them back).
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tinystory.run.errors import UserError


def cache_key(model: str, messages: Sequence[Mapping[str, str]], fence: str, sampling: Mapping[str, object]) -> str:
    """The key of one question: model, prompt and sampling parameters (the seed says which attempt it is).

    The fence, which differs from story to story, is left out: the same story sent twice is one question. It is replaced
    by a character that `clean` removes from every prompt, so two different prompts never get the same key.
    """
    return question_key(messages, fence) + _digest([model, sorted(sampling.items())])[:8]


def question_key(messages: Sequence[Mapping[str, str]], fence: str) -> str:
    """The first part of `cache_key`: what was asked, whoever the teacher is."""
    return _digest([[message["role"], message["content"].replace(fence, "\0")] for message in messages])[:24]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def records(path: Path) -> Iterator[tuple[dict, int]]:
    """Each line and its size in bytes, without an incomplete last line. Raises UserError as Cache does."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            match record:
                case {"key": str(), "reply": str()}:
                    yield record, len(line)
                case _:
                    raise UserError(
                        f"{path} line {number} is not a kept reply of the teacher: repair it or move the file away"
                    )


class Kept(NamedTuple):
    reply: str
    expected: dict[str, float] | None = None  # expected scores, if the teacher is asked for log-probabilities


class Cache:
    """Replies by `cache_key`, in memory and in the file `path`, which is created with the first reply.

    An incomplete last line was being written when the process died, and is dropped. Any other line that is not a kept
    reply raises UserError: the file is damaged or is not a cache.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._replies: dict[str, Kept] = {}
        self._earlier: set[str] = set()  # keys of the replies that an earlier process kept
        self.tokens = (
            0,
            0,
        )  # (prompt, completion) tokens that earlier processes paid for, as far as the server counted
        self._file: io.FileIO | None = None
        if self.path.exists():
            self._open()

    def _open(self) -> io.FileIO:
        """Open the file for appending, and load what it holds."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise UserError(f"the teacher's replies cannot be kept in {self.path}: {error.strerror}") from None
        try:
            self._size = self._load()  # bytes
            file.truncate(self._size)
        except BaseException:
            file.close()
            raise
        return file

    def _load(self) -> int:
        """Load the file's complete lines; returns their size in bytes."""
        whole = 0
        for record, size in records(self.path):
            self._replies[record["key"]] = Kept(record["reply"], record.get("expected"))  # the last: see `put`
            self._earlier.add(record["key"])
            match record:
                case {"tokens": [int(asked), int(said)]}:
                    self.tokens = (self.tokens[0] + asked, self.tokens[1] + said)
            whole += size
        return whole

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str, earlier: bool = True) -> Kept | None:
        """The reply to a question; None if there is none, or only one of an earlier process and not `earlier`."""
        return None if key in self._earlier and not earlier else self._replies.get(key)

    def items(self) -> Iterator[tuple[str, Kept]]:
        """Keys and replies, the oldest key first."""
        return iter(self._replies.items())

    def put(self, key: str, kept: Kept, *, again: bool = False, **about: object) -> Kept:
        """Keep a reply, with other facts `about` it, and return the one that is kept for `key`.

        The first reply to a question is kept: if the same question was sent twice at once, both senders get the first
        reply, now and after a resume. again: the question was asked again because the reply of an earlier process is of
        no use; that one stays in the file, but this one counts.
        """
        file = self._file or self._open()
        if key not in self._replies or (again and key in self._earlier):
            self._earlier.discard(key)
            told = {"expected": kept.expected} if kept.expected is not None else {}
            line = (json.dumps({"key": key, "reply": kept.reply, **told, **about}) + "\n").encode()
            try:
                written = file.write(line)
            except OSError as error:
                raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
            if written != len(line):
                file.truncate(self._size)
                raise UserError(f"{self.path} cannot be written: the disk is full")
            self._size += written
            self._replies[key] = kept
        return self._replies[key]

    def close(self) -> None:
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
