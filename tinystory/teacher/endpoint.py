"""One model on one server: its capabilities, the form of its requests, and the request itself."""

import hashlib
import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tinystory.run.errors import UserError
from tinystory.teacher.api import ChatClient, Reply, server_url
from tinystory.teacher.cache import cache_key
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.prompt import DEFAULT, TOP, Template, instructions

TEMPLATE_TOKENS = 256  # upper bound on what a chat template adds to two messages
# a word, number or other character, after any space: about a token
PIECE = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")
JSON_TOKENS = 12  # per criterion: a key, a colon, a digit, a comma and some whitespace
BUSY_COSTS = 0.5  # slots lost per refused request
# the timeout is this multiple of the slowest recent answer, and at least SHORTEST_S
SLOWER, SHORTEST_S = 3.0, 10.0
PROBE = "probe "  # prefix of a probe's key in the cache
KNOWN = 32  # answers (and at least one full round) before the timeout is derived from the slowest


@dataclass(kw_only=True, eq=False, repr=False)
class Options:
    """Options of requests, the same for every server."""

    template: Template = DEFAULT
    temperature: float = 0.2
    seed: int = 0
    max_tokens: int = 16  # token limit of a reply in plain numbers; JSON gets more
    # fields merged into every request, overriding ours
    extra: dict[str, Any] = field(default_factory=dict)
    deadline_s: float = 300.0  # time limit of a story, from its first request
    attempts: int = 3  # each request takes at most deadline_s / attempts

    @property
    def timeout_s(self) -> float:
        """Longest time of one request."""
        return self.deadline_s / self.attempts

    @property
    def extra_json(self) -> str:
        return json.dumps(self.extra, sort_keys=True) if self.extra else ""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The capabilities of one model on one server, and the form of its requests."""

    url: str
    model: str
    token_cap: str = "max_tokens"  # name of the token limit: max_tokens or max_completion_tokens
    least_tokens: int = 0  # the smallest limit that is sent
    refused: tuple[str, ...] = ()  # parameters that the server refuses; they are left out
    quiet: Mapping[str, Any] = field(default_factory=dict)  # fields that make the model reason less
    # False: the rubric opens the user's message, for models without a system message
    system: bool = True
    reply: str = ""  # the reply to the probe's story
    scored: bool = False  # whether that reply held scores
    thinks: bool = False  # whether the model reasons before it replies, unless told not to
    # the strictest constraint on a reply that works: "numbers", "json" or "nothing"
    structure: str = "nothing"
    # the one used: "json", which is longer, only if replies hold no scores without it
    held_to: str = "nothing"
    # (prompt, completion) of the probe's story; None if the server counts none
    tokens: tuple[int, int] | None = None
    seconds: float = 0.0  # of the fastest answer: the first may include loading the model
    notes: tuple[str, ...] = ()  # warnings for the user

    def __str__(self) -> str:
        reply = "scored a story" if self.scored else f"gave no scores but {self.reply[:60]!r}"
        least = f" at least {self.least_tokens}" if self.least_tokens else ""
        obeyed = "no structure" if self.structure == "nothing" else self.structure
        findings = [reply, self.token_cap + least, f"obeys {obeyed}"]
        findings += [f"no {name}" for name in self.refused]
        if not self.system:
            findings.append("no system message")
        if self.thinks:
            findings.append("thinks")
        if self.quiet:
            findings.append(f"told not to think by {json.dumps(self.quiet)}")
        findings.append(f"{self.seconds:.2f} s")
        return f"{self.model} at {self.url}: {', '.join(findings)}"


class Slots:
    """Limit on a server's requests in flight, at most `most`: half a slot less for each request
    refused as busy, one more per full round of answers. A round with a refused fraction s scales it
    by 1 - s/2, as in DCTCP (RFC 8257)."""

    def __init__(self, most: int):
        self.most = most
        self.limit = float(most)
        self.taken = 0
        self.open = True  # whether the server is asked at all
        self.shortest = SHORTEST_S
        # durations of the last answers
        self._seconds: deque[float] = deque(maxlen=2 * max(most, KNOWN))

    @property
    def free(self) -> bool:
        return self.open and self.taken < int(self.limit)

    def answered(self, seconds: float) -> None:
        self._seconds.append(seconds)
        self.limit = min(self.limit + 1 / self.limit, self.most)

    def refused(self) -> None:
        self.limit = max(self.limit - BUSY_COSTS, 1.0)

    def timeout(self, longest: float, timeouts: int) -> float:
        """Seconds to wait for an answer: `longest`, or a multiple of the slowest recent answer once
        KNOWN of them have come. Doubled after each of a story's `timeouts`, as in TCP (RFC 6298),
        in case the server has become slow."""
        if len(self._seconds) < max(self.most, KNOWN):
            return longest
        usual = max(SLOWER * max(self._seconds), self.shortest)
        return min(longest, usual * 2**timeouts)


@dataclass(eq=False, repr=False)
class Endpoint:
    """One model on the server at `url`, which `base_url` normalised."""

    url: str
    model: str | None  # None until the server has listed its models
    client: ChatClient
    slots: Slots
    ledger: Ledger
    options: Options
    probe: Probe | None = None  # None until the server has been probed
    failures: int = 0  # transient failures since its last answer
    absences: int = 0  # checks for its return since then

    def max_tokens(self, names: Sequence[str]) -> int:
        """Token limit of a reply with scores for `names`."""
        if self.probe is None or self.probe.held_to != "json":
            return self.options.max_tokens
        return max(self.options.max_tokens, JSON_TOKENS * len(names) + 8)

    def sampling(self, seed: int, names: Sequence[str]) -> dict[str, Any]:
        """Fields of a request that determine the reply."""
        return {
            "temperature": self.options.temperature,
            "seed": seed % 2**31,  # servers take 32 bits
            "max_tokens": self.max_tokens(names),
        }

    def reply_key(self, messages: list[dict], fence: str, seed: int, names: Sequence[str]) -> str:
        """Key in the cache of the reply to these messages."""
        assert self.model is not None and self.probe is not None
        determined_by = self.sampling(seed, names) | {"held_to": self.probe.held_to}
        if self.options.extra:
            determined_by["extra"] = self.options.extra_json
        return cache_key(self.model, messages, fence, determined_by)

    def probe_key(self, model: str | None) -> str:
        """Key in the cache of the probe of `model` with the current options."""
        options = self.options
        text = (
            f"{self.url} {model} {options.max_tokens} {options.temperature} "
            f"{options.template}{options.extra_json}"
        )
        return PROBE + hashlib.sha256(text.encode()).hexdigest()[:24]

    async def chat(self, messages: list[dict], seed: int, names: Sequence[str]) -> Reply:
        """Ask for scores for `names`, in the form that the probe says. If the server needs a higher
        token limit than `max_tokens`, the reply is cut to about as many tokens."""
        form = self.probe
        assert form is not None
        fields = self.sampling(seed, names)
        wanted = fields.pop("max_tokens")
        cap = max(wanted, form.least_tokens)
        fields |= constraint(form.held_to, names)
        fields |= form.quiet
        fields |= {"model": self.model, "messages": messages, form.token_cap: cap}
        texts = [message["content"] for message in messages]
        if not form.system and len(messages) > 1:
            fields["messages"] = [{"role": "user", "content": "\n\n".join(texts)}]
        for name in form.refused:
            fields.pop(name, None)
        fields |= self.options.extra
        headers = fields.pop("extra_headers", None)
        with self.ledger.request(self.most_prompt_tokens(texts), cap) as charge:
            reply = await self.client.chat(headers, fields)
            if reply.tokens:
                charge["tokens_in"], charge["tokens_out"] = reply.tokens
        if cap > wanted:
            pieces = PIECE.findall(reply.text)
            reply = replace(reply, text="".join(pieces[:wanted]))
        return reply

    def most_prompt_tokens(self, texts: Sequence[str]) -> int:
        """Upper bound on a prompt's tokens: a token is at least one byte, and the chat template
        adds a few. Where the server counted the tokens of the probe's prompt, only the part that
        differs from it is estimated."""
        sizes = [len(text.encode()) for text in texts]
        if self.probe is None or not self.probe.tokens or len(sizes) != 2:
            return sum(sizes) + TEMPLATE_TOKENS
        prompt_tokens, _ = self.probe.tokens
        rubric = len(instructions(self.options.template).encode())
        longer = max(sizes[0] - rubric, 0)  # a ranking's instructions are
        return prompt_tokens + longer + sizes[1]


def constraint(structure: str, names: Sequence[str]) -> dict:
    """Fields of a request that constrain the reply to scores for `names`."""
    if structure == "numbers":
        # vLLM obeys the first field and llama.cpp's server the second; each ignores the other
        digits = [f"[0-{TOP}]"] * len(names)
        grammar = "root ::= " + ' " " '.join(digits)
        return {"structured_outputs": {"regex": " ".join(digits)}, "grammar": grammar}
    if structure == "json":
        score = {"type": "integer", "enum": list(range(TOP + 1))}
        schema = {
            "type": "object",
            "properties": dict.fromkeys(names, score),
            "required": list(names),
            "additionalProperties": False,
        }
        form = {"name": "grades", "strict": True, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": form}}
    return {}


def base_url(url: str) -> str:
    """`url` with the path /v1 if it has none. Raises UserError if it cannot be a teacher's."""
    parts = server_url(url.strip(), ("http", "https"))
    if parts is None or parts.userinfo or parts.query or parts.fragment:
        raise UserError(
            "the teacher's URL must look like http://127.0.0.1:8000/v1 or https://host/v1; its key is OPENAI_API_KEY"
        )
    return str(parts.copy_with(path=parts.path.rstrip("/") or "/v1"))
