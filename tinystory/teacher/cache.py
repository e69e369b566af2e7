"""Append-only cache of the teacher's replies, one JSON line each, keyed by the question: a resumed
run asks only for missing replies, and a run with a copy of another run's file needs no server. A
reply is written before it is used."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tinystory.run.journal import Journal
from tinystory.run.records import Fields, Record, read_records
from tinystory.teacher.answers import MOST_ODDS, log_odds, parse_answer
from tinystory.teacher.api import Reply, is_count_pair
from tinystory.teacher.parse import parse_scores
from tinystory.teacher.prompt import Template

REPLY: Fields = {  # of each line
    "key": (str,),
    "reply": (str,),
    "error": (str, None),
    "tokens": (list, type(None), None),
    "log_odds": (float, type(None), None),
    "charged": (list, None),  # `Ledger.charged`; older versions recorded none
}


def cache_key(
    model: str, messages: Sequence[Mapping[str, str]], fence: str, sampling: Mapping[str, object]
) -> str:
    """Hash of model, messages and sampling parameters, whose seed differs for each attempt. A
    character that `clean` removes from prompts replaces the fence: the same story sent twice shares
    a key, and different prompts never do."""
    question = [[message["role"], message["content"].replace(fence, "\0")] for message in messages]
    return _digest(question, 24) + _digest([model, sorted(sampling.items())], 8)


def _digest(value: object, digits: int) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:digits]


def check_reply(record: Record) -> None:
    """Raises ValueError for a line whose numbers no server's answer can have."""
    tokens = record.get("tokens")
    if tokens is not None and not is_count_pair(tokens):
        raise ValueError(f"its 'tokens' are {tokens!r:.40}")
    log_odds = record.get("log_odds")
    if log_odds is not None and abs(log_odds) > MOST_ODDS:
        raise ValueError(f"its 'log_odds' are {log_odds!r:.40}")
    charged = record.get("charged", [0, 0, 0])
    if len(charged) != 3 or any(type(n) is not int or not 0 <= n < 1 << 53 for n in charged):
        raise ValueError(f"its 'charged' is {charged!r:.40}")


class CachedReply(NamedTuple):
    text: str
    error: str | None = None  # why the question was given up; a repeated run gives it up too
    log_odds: float | None = None  # of yes, for a question, where the server gives probabilities

    @classmethod
    def of(cls, reply: Reply) -> "CachedReply":
        return cls(reply.text, log_odds=log_odds(reply.alternatives))

    def is_readable(self, template: Template) -> bool:
        """Whether it holds what the template asks for."""
        if template.asks_yes_or_no:
            return self.log_odds is not None or parse_answer(self.text) is not None
        return parse_scores(self.text, template.names) is not None


class Cache:
    """Replies by `cache_key`, in memory and in the file `path` (unless None), which the first reply
    creates."""

    def __init__(self, path: str | os.PathLike | None):
        self._path = Path(path) if path else None
        self._replies: dict[str, CachedReply] = {}
        self._journal: Journal | None = None
        self.charged = (0, 0, 0)  # by earlier processes
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
        """The reply, or None. earlier: whether a reply kept by an earlier process counts."""
        if key in self._earlier and not earlier:
            return None
        return self._replies.get(key)

    def find(self, key: str, story: int, earlier: bool = True) -> CachedReply | None:
        """`get` for story number `story`, for which alone a failure is kept, not for an equal one."""
        return self.get(f"{key} {story}", earlier) or self.get(key, earlier)

    def items(self) -> Iterator[tuple[str, CachedReply]]:
        """(key, reply) pairs, oldest key first."""
        return iter(self._replies.items())

    def put(
        self, key: str, reply: CachedReply, *, again: bool = False, **about: object
    ) -> CachedReply:
        """Keep a reply (`about` goes to the file) and return the one that counts: the key's first,
        so that two senders of a question get the same one, now and after a resume; with `again`,
        this one replaces an earlier process's."""
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
        """`put`, for `find`. An earlier process's failure for this story is replaced."""
        story_key = f"{key} {story}"
        if reply.error is not None or self.get(story_key):
            key = story_key
        return self.put(key, reply, again=again, **about)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
