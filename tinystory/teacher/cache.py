"""Append-only cache of the teacher's replies, keyed by the request. The file has one JSON line per
reply. A resumed run sends requests only for missing replies. A run with a copy of another run's
file needs no server. A reply is written to the file before it is used."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tinystory.run.journal import Journal
from tinystory.run.records import Fields, Record, read_records
from tinystory.teacher.api import Reply, are_counts, is_logprob

LINE: Fields = {  # fields of a line, with their types
    "key": (str,),
    "reply": (str,),
    "logprobs": (list, type(None)),
    "error": (str, type(None)),
    "charged": (list,),  # `Ledger.charged`
}


def cache_key(
    model: str, messages: Sequence[Mapping[str, str]], fence: str, sampling: Mapping[str, object]
) -> str:
    """Key of a request: a hash of model, messages and sampling parameters, which include the seed
    of the attempt. In the hashed messages, a character that `clean` removes from prompts replaces
    the fence. So a story that is sent twice, with two fences, has one key, and different prompts
    never share a key."""
    question = [[message["role"], message["content"].replace(fence, "\0")] for message in messages]
    text = json.dumps([model, question, sorted(sampling.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def check_line(record: Record) -> None:
    """Raises ValueError for a line with numbers that cannot come from a server's answer."""
    for pair in record["logprobs"] or ():
        match pair:
            case [str(), logprob] if is_logprob(logprob):
                continue
        raise ValueError(f"'logprobs' must be tokens with log-probabilities, not {pair!r:.40}")
    if not are_counts(record["charged"], 3):
        raise ValueError(f"'charged' must be three counts, not {record['charged']!r:.40}")


class Cache:
    """Replies by key, in memory and in the file `path`. The first reply creates the file. With
    None, there is no file."""

    def __init__(self, path: str | os.PathLike | None):
        self._path = Path(path) if path else None
        self._replies: dict[str, Reply] = {}
        self._journal: Journal | None = None
        self.charged = (0, 0, 0)  # `Ledger.charged` of earlier processes
        for line in read_records(self._path, LINE, check_line) if self._path else ():
            # the last line with a key counts: see `forget`
            reply = Reply(line["reply"], line["logprobs"], line["error"])
            self._replies[line["key"]] = reply
            self.charged = tuple(line["charged"])
        self._earlier = set(self._replies)  # keys of replies from earlier processes

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    def forget(self, key: str) -> bool:
        """Whether there is a reply with this key from an earlier process. It is replaced by the
        next one."""
        if key not in self._earlier:
            return False
        self._earlier.remove(key)
        del self._replies[key]
        return True

    def put(self, key: str, reply: Reply, charged: tuple[int, int, int]) -> Reply:
        """The reply that counts for this key, after storing `reply`. The first reply to a key
        counts, so that two senders of the same request get the same reply, now and after a
        resume."""
        if key in self._replies:
            return self._replies[key]
        if self._path is not None:
            self._journal = self._journal or Journal(self._path)
            line = {
                "key": key,
                "reply": reply.text,
                "logprobs": reply.logprobs,
                "error": reply.error,
                "charged": charged,
            }
            self._journal.append(line)
        self._replies[key] = reply
        return reply

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
