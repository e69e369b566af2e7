"""One server that can be asked: its address, its model, the form of its requests, and how many it has in flight."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from tinystory.run.errors import UserError
from tinystory.teacher import probe as probing
from tinystory.teacher.api import Reply, Server
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.probe import Form, Probe
from tinystory.teacher.slots import Slots

TEMPLATE_TOKENS = 256  # upper bound on what a chat template adds to two messages
PIECE = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")  # a word, a number or another character: about a token


class Endpoint:
    """The server at `url`, which `base_url` gave. model: None until it is known which one it lists first. extra: fields
    that are merged into every request, and win. probed: what it can do and how it wants to be asked; None until that is
    known."""

    def __init__(
        self,
        url: str,
        model: str | None,
        key: str | None,
        *,
        timeout_s: float,
        concurrency: int,
        max_tokens: int,
        names: Sequence[str],
        extra: Mapping[str, Any],
        ledger: Ledger,
    ):
        self.url, self.model, self.names = url, model, names
        self.max_reply, self.extra, self.ledger = max_tokens, extra, ledger
        self.server = Server(self.url, key, timeout_s)
        self.slots = Slots(concurrency)
        self.probed: Probe | None = None
        self.failed = 0  # transient failures since its last answer
        self.absences = 0  # times that it was left out since then

    @property
    def max_tokens(self) -> int:
        """Of a reply that is wanted: JSON needs more than numbers."""
        by_json = self.probed is not None and self.probed.held_to == "json"
        return max(self.max_reply, probing.json_tokens(self.names)) if by_json else self.max_reply

    @property
    def token_cap(self) -> int:
        """The most tokens that one answer can have."""
        return max(self.max_tokens, self.probed.least_tokens if self.probed else 0)

    def sampling(self, seed: int, temperature: float) -> dict[str, Any]:
        return {"temperature": temperature, "max_tokens": self.max_tokens, "seed": seed % 2**31}  # servers take 32 bits

    async def chat(self, form: Form, messages: list[dict], *, max_tokens: int, **fields: Any) -> Reply:
        """One chat completion. A reply that had to be allowed more tokens is cut to about `max_tokens`."""
        request = form.request(messages, max_tokens, **fields)
        if self.extra:
            body = {**request.pop("extra_body", {}), **self.extra}
            headers = body.pop("extra_headers", None)
            request |= {"extra_body": body} | ({"extra_headers": headers} if headers else {})
        # An upper bound on the prompt's tokens: a token is at least one byte, and the chat template adds a few. If the
        # server counted the tokens of the probe's story, only the part that differs from it is uncertain.
        sizes = [len(message["content"].encode()) for message in messages]
        counted = self.probed.tokens if self.probed is not None else None
        most = counted[0] + sizes[-1] if counted and len(sizes) == 2 else sum(sizes) + TEMPLATE_TOKENS
        cap = request[form.token_cap]
        while self.ledger.must_wait(most, cap):  # only near the end of a budget
            await asyncio.sleep(0.01)
        with self.ledger.request(most, cap, self.url) as receipt:
            reply = await self.server.chat(model=self.model, **request)
            receipt.tokens = reply.tokens
        return reply if cap == max_tokens else replace(reply, text="".join(PIECE.findall(reply.text)[:max_tokens]))


def base_url(url: str) -> str:
    """`url`, with the usual path /v1 if it has none."""
    try:
        parts = urlsplit(url.strip())
        parts.port  # noqa: B018 - raises ValueError if it is not a number
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError("the teacher's URL must look like http://127.0.0.1:8000/v1 or https://host/v1")
    if parts.username is not None or parts.password is not None:
        raise UserError("the teacher's URL must not hold a name or password: put the key in OPENAI_API_KEY")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
