"""Append-only cache of the teacher's replies, keyed by the request. The file has one JSON line per
reply. A resumed run sends requests only for missing replies. A run with a copy of another run's
file needs no server. A reply is written to the file before it is used."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tinystory.run.journal import Journal
from tinystory.run.records import Fields, Record, read_records
from tinystory.teacher.api import Reply, is_count_pair
from tinystory.teacher.log_odds import MOST_ODDS, log_odds

REPLY: Fields = {  # fields of a line, with their types
    "key": (str,),
    "reply": (str,),
    "error": (str, None),
    "tokens": (list, type(None), None),
    "log_odds": (float, type(None), None),
    "charged": (list, None),  # `Ledger.charged`; missing in files of older versions
}


def cache_key(
    model: str, messages: Sequence[Mapping[str, str]], fence: str, sampling: Mapping[str, object]
) -> str:
    """Key of a request: a hash of model, messages and sampling parameters, which include the seed
    of the attempt. In the hashed messages, a character that `clean` removes from prompts replaces
    the fence. So a story that is sent twice, with two fences, has one key, and different prompts
    never share a key."""
    question = [[message["role"], message["content"].replace(fence, "\0")] for message in messages]
    return _digest(question, 24) + _digest([model, sorted(sampling.items())], 8)


def _digest(value: object, digits: int) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:digits]


def check_reply(record: Record) -> None:
    """Raises ValueError for a line with numbers that cannot come from a server's answer."""
    tokens = record.get("tokens")
    if tokens is not None and not is_count_pair(tokens):
        raise ValueError(f"'tokens' must be two counts, not {tokens!r:.40}")
    log_odds = record.get("log_odds")
    if log_odds is not None and abs(log_odds) > MOST_ODDS:
        raise ValueError(
            f"'log_odds' must be at most {MOST_ODDS:g} in absolute value, not {log_odds!r:.40}"
        )
    charged = record.get("charged", [0, 0, 0])
    if len(charged) != 3 or any(type(n) is not int or not 0 <= n < 1 << 53 for n in charged):
        raise ValueError(f"'charged' must be three counts, not {charged!r:.40}")


class CachedReply(NamedTuple):
    text: str
    # why the request was given up; a run with a copy of the file gives it up too
    error: str | None = None
    # log-odds of yes; None if the reply has no log-probabilities, or is neither yes nor no
    log_odds: float | None = None

    @classmethod
    def of(cls, reply: Reply) -> "CachedReply":
        """The cached form of a server's reply."""
        return cls(reply.text, log_odds=log_odds(reply.alternatives))


class Cache:
    """Replies by `cache_key`, in memory and in the file `path`. The first reply creates the file.
    With None, there is no file."""

    def __init__(self, path: str | os.PathLike | None):
        self._path = Path(path) if path else None
        self._replies: dict[str, CachedReply] = {}
        self._journal: Journal | None = None
        self.charged = (0, 0, 0)  # `Ledger.charged` of earlier processes
        records = read_records(self._path, REPLY, check_reply) if self._path else []
        for record in records:
            reply = CachedReply(record["reply"], record.get("error"), record.get("log_odds"))
            self._replies[record["key"]] = reply  # the last one counts: see `put`
            prompt, completion = record.get("tokens") or (0, 0)
            tokens_in, tokens_out, largest_in = self.charged
            counted = tokens_in + prompt, tokens_out + completion, largest_in
            self.charged = tuple(record.get("charged", counted))
        self._earlier = set(self._replies)  # keys of replies from earlier processes

    def get(self, key: str, earlier: bool = True) -> CachedReply | None:
        """The reply with this key, or None. earlier: whether replies from earlier processes
        count."""
        if key in self._earlier and not earlier:
            return None
        return self._replies.get(key)

    def find(self, key: str, story: int, earlier: bool = True) -> CachedReply | None:
        """The reply to a request about story number `story`, or None. Like `get`, but a failure
        counts only for this story number, not for another story with the same text."""
        return self.get(f"{key} {story}", earlier) or self.get(key, earlier)

    def items(self) -> Iterator[tuple[str, CachedReply]]:
        """All (key, reply) pairs, the oldest key first."""
        return iter(self._replies.items())

    def put(
        self, key: str, reply: CachedReply, *, again: bool = False, **about: object
    ) -> CachedReply:
        """The reply that counts for this key, after storing `reply`. The first reply to a key
        counts, so that two senders of the same request get the same reply, now and after a resume.
        again: `reply` replaces a reply from an earlier process. about: further fields for the
        file."""
        if key in self._replies and not (again and key in self._earlier):
            return self._replies[key]
        if self._path is not None:
            record: Record = {"key": key, "reply": reply.text}
            if reply.error is not None:
                record["error"] = reply.error
            if reply.log_odds is not None:
                record["log_odds"] = reply.log_odds
            self._journal = self._journal or Journal(self._path)
            self._journal.append(record | about)
        self._earlier.discard(key)
        self._replies[key] = reply
        return reply

    def keep(
        self, key: str, story: int, reply: CachedReply, *, again: bool = False, **about: object
    ) -> CachedReply:
        """The reply that counts for a request about story number `story`, after storing `reply`;
        see `put` and `find`. A failure is stored for this story only. A failure from an earlier
        process for this story is replaced."""
        story_key = f"{key} {story}"
        if reply.error is not None or self.get(story_key):
            key = story_key
        return self.put(key, reply, again=again, **about)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
