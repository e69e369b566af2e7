"""Every reply that was paid for, kept: one JSON line each, only ever appended.

A reply is found again by what was asked, so a run that was killed and resumed gets the replies that it already had
and asks only for the rest. Each line is handed to the operating system as one write before the reply is used: killing
the process at any instant loses none, and a power cut at most the last few seconds of them (they reach the disk at
`close`, or when the system writes them back), which are then asked again.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tinystory.errors import UserError


def cache_key(model: str, messages: Sequence[Mapping[str, str]], fence: str, sampling: Mapping[str, object]) -> str:
    """The name of one question: model, prompt and sampling parameters (the seed says which attempt it is).

    The fence, which differs from story to story, is left out: the same story asked twice is one question. It is
    replaced by a character that `clean` lets into no prompt, so that two prompts cannot become one.
    """
    return question_key(messages, fence) + _digest([model, sorted(sampling.items())])[:8]


def question_key(messages: Sequence[Mapping[str, str]], fence: str) -> str:
    """The first part of `cache_key`, which says what was asked, and not of whom."""
    return _digest([[message["role"], message["content"].replace(fence, "\0")] for message in messages])[:24]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def records(path: Path) -> Iterator[tuple[dict, int]]:
    """Each kept line, with its number of bytes; a last one without its end is left out. UserError as for Cache."""
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
    expected: dict[str, float] | None = None  # scores, where they were made of the reply's log-probabilities


class Cache:
    """Replies by `cache_key`, in memory and in the file `path`, which is made for the first one.

    A last line without its end was being written when the process died, and is dropped. Any other line that is not
    ours raises UserError: the file is something else, or damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._replies: dict[str, Kept] = {}
        self.tokens = (0, 0)  # of the prompts and replies that an earlier process paid for, where the server counted
        self._file = None
        if self.path.exists():
            self._open()

    def _open(self) -> None:
        """Open for appending, after what is there."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open as long as the cache is
        except OSError as error:
            raise UserError(f"the teacher's replies cannot be kept in {self.path}: {error.strerror}") from None
        try:
            self._size = self._load()  # bytes
            self._file.truncate(self._size)
        except BaseException:
            self._file.close()
            raise

    def _load(self) -> int:
        """Read the lines there are; the number of bytes of the whole ones."""
        whole = 0
        for record, size in records(self.path):
            self._replies.setdefault(record["key"], Kept(record["reply"], record.get("expected")))
            match record:
                case {"tokens": [int(asked), int(said)]}:
                    self.tokens = (self.tokens[0] + asked, self.tokens[1] + said)
            whole += size
        return whole

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Kept | None:
        return self._replies.get(key)

    def put(self, key: str, kept: Kept, **about: object) -> Kept:
        """Keep a reply, with whatever else is worth knowing `about` it; the one that now stands for `key`.

        The first reply to a question stands: where the same question was asked twice at once, both askers get it,
        now and after a resume.
        """
        if self._file is None:
            self._open()
        if key not in self._replies:
            told = {"expected": kept.expected} if kept.expected is not None else {}
            line = (json.dumps({"key": key, "reply": kept.reply, **told, **about}) + "\n").encode()
            try:
                written = self._file.write(line)
            except OSError as error:
                raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
            if written != len(line):
                self._file.truncate(self._size)
                raise UserError(f"{self.path} cannot be written: the disk is full")
            self._size += written
            self._replies[key] = kept
        return self._replies[key]

    def close(self) -> None:
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
