"""An append-only cache of the teacher's replies, one JSON line each.

The key of a reply is the question, so a run that was killed and resumed asks only for the replies that it does not have
yet, and a run that finds all of them, in a copy of another run's file, needs no server. A reply is written before it is
used: killing the process at any instant loses none.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tinystory.run.folder import Fields, read_records
from tinystory.run.journal import Journal

REPLY: Fields = {"key": (str,), "reply": (str,)}  # that each line has at least


def cache_key(model: str, messages: Sequence[Mapping[str, str]], fence: str, sampling: Mapping[str, object]) -> str:
    """The key of one question: model, prompt and sampling parameters (the seed says which attempt it is).

    The fence, which differs from story to story, is left out: the same story sent twice is one question. It is replaced
    by a character that `clean` removes from every prompt, so two different prompts never get the same key."""
    question = [[message["role"], message["content"].replace(fence, "\0")] for message in messages]
    asked = [question, [model, sorted(sampling.items())]]
    whole, short = (hashlib.sha256(json.dumps(value).encode()).hexdigest() for value in asked)
    return whole[:24] + short[:8]


class CachedReply(NamedTuple):
    text: str
    expected: dict[str, float] | None = None  # expected scores, if the teacher is asked for log-probabilities
    error: str | None = None  # why the question was given up, if it was: a repeated run gives it up too


class Cache:
    """Replies by `cache_key`, in memory and, unless it is None, in the file `path`, which the first reply creates."""

    def __init__(self, path: str | os.PathLike | None):
        self._path = path and Path(path)
        self._replies: dict[str, CachedReply] = {}
        self.tokens = (0, 0)  # (prompt, completion) that earlier processes paid for, as far as the server counted
        self._journal: Journal | None = None
        for record in read_records(self._path, REPLY) if self._path else ():
            reply = CachedReply(record["reply"], record.get("expected"), record.get("error"))
            self._replies[record["key"]] = reply  # the last: see `put`
            match record:
                case {"tokens": [int(prompt), int(completion)]}:
                    self.tokens = (self.tokens[0] + prompt, self.tokens[1] + completion)
        self._earlier = {*self._replies}  # keys of the replies that an earlier process kept

    def get(self, key: str, earlier: bool = True) -> CachedReply | None:
        """The reply to a question; None if there is none, or only one of an earlier process and not `earlier`."""
        return None if key in self._earlier and not earlier else self._replies.get(key)

    def items(self) -> Iterator[tuple[str, CachedReply]]:
        """Keys and replies, the oldest key first."""
        return iter(self._replies.items())

    def put(self, key: str, reply: CachedReply, *, again: bool = False, **about: object) -> CachedReply:
        """The reply that is kept for `key`, in the file with what else is known `about` it: the first one, so that two
        senders of one question get the same reply, now and after a resume. again: the question was asked again because
        the reply of an earlier process is of no use; that one stays in the file, but this one counts."""
        if key in self._replies and not (again and key in self._earlier):
            return self._replies[key]
        optional = {name: value for name in ("expected", "error") if (value := getattr(reply, name)) is not None}
        if self._path:
            self._journal = self._journal or Journal(self._path)
            self._journal.append({"key": key, "reply": reply.text, **optional, **about})
        self._earlier.discard(key)
        self._replies[key] = reply
        return reply

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
