"""One model on one server: what it can do, the form of its requests, and one request to it."""

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tinystory.run.errors import UserError
from tinystory.teacher.api import ChatClient, Reply, server_url
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.prompt import TOP, Template, instructions

TEMPLATE_TOKENS = 256  # upper bound on what a chat template adds to two messages
PIECE = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")  # a word, a number or another character: about a token
JSON_TOKENS = 12  # per criterion: a key, a colon, a digit, a comma and some whitespace
LOGPROBS = {"logprobs": True, "top_logprobs": 10}  # servers allow up to 20, but the answer must fit LONGEST_ANSWER
BUSY_COSTS = 0.5  # slots per refused request, so a round that is refused altogether halves the limit
SLOWER, SHORTEST_S = 3.0, 10.0  # the timeout is this multiple of the slowest recent answer, and at least SHORTEST_S
KNOWN = 32  # answers (and at least one full round) before the slowest answer is known well enough


@dataclass(frozen=True, kw_only=True)
class Form:
    """The form of a request."""

    token_cap: str = "max_tokens"  # the server's name for the longest reply: max_tokens or max_completion_tokens
    least_tokens: int = 0  # the smallest value of it that is sent
    refused: tuple[str, ...] = ()  # parameters that the server refuses, which are not sent
    quiet: Mapping[str, Any] = field(default_factory=dict)  # fields that make the model reason less
    system: bool = True  # False: the rubric opens the user's message, for models without a system message

    def body(self, messages: list[dict], max_tokens: int, **fields: Any) -> dict[str, Any]:
        """The fields of a chat completion. max_tokens: of the reply that is wanted."""
        kept = {name: value for name, value in fields.items() if name not in self.refused}
        if not self.system and len(messages) > 1:
            messages = [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]
        return {"messages": messages, **kept, **self.quiet, self.token_cap: max(max_tokens, self.least_tokens)}


@dataclass(frozen=True, kw_only=True)
class Probe(Form):
    """The capabilities of one model on one server, and the form in which it is asked."""

    url: str
    model: str
    reply: str  # to the probe's story
    scored: bool  # whether that reply held scores
    thinks: bool  # whether the model reasons before it replies, unless told not to
    structure: str  # the strictest constraint on a reply that works: "numbers", "json" or "nothing"
    held_to: str  # the constraint used: "json", which has more words, only if the model gives no numbers without it
    tokens: tuple[int, int] | None  # (prompt, completion) of the probe's story; None if the server does not count
    seconds: float  # of the fastest answer: the first may have waited until the model was loaded
    notes: tuple[str, ...]  # what the user should know

    def __str__(self) -> str:
        findings = [
            "scored a story" if self.scored else f"gave no scores but {self.reply[:60]!r}",
            self.token_cap + f" at least {self.least_tokens}" * bool(self.least_tokens),
            "obeys no structure" if self.structure == "nothing" else f"obeys {self.structure}",
            *(f"no {name}" for name in self.refused),
            *["no system message"] * (not self.system),
            *["thinks"] * self.thinks,
            *[f"told not to think by {json.dumps(self.quiet)}"] * bool(self.quiet),
            f"{self.seconds:.2f} s",
        ]
        return f"{self.model} at {self.url}: {', '.join(findings)}"

    @classmethod
    def load(cls, text: str) -> "Probe | None":
        """The probe with these fields, in JSON; None for any other text, such as another version's."""
        try:
            fields = json.loads(text)
            for name in ("refused", "notes"):
                fields[name] = tuple(fields[name])
            fields["tokens"] = fields["tokens"] and tuple(fields["tokens"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError):
            return None


class Slots:
    """One server's limit on requests in flight: `most`, half a slot less for each request that it refuses as busy, and
    one slot more for each full round of answers.

    So a round with a refused share s lowers the limit by s/2, as DCTCP (RFC 8257) does for a share of marked packets: a
    server that refuses now and then keeps nearly all its requests, an overloaded one has half of them within a round.
    """

    def __init__(self, most: int):
        self.most, self.limit, self.taken = most, float(most), 0
        self.open = True  # whether the server is asked at all
        self.shortest = SHORTEST_S
        self._seconds: deque[float] = deque(maxlen=2 * max(most, KNOWN))  # durations of the last answers

    @property
    def free(self) -> bool:
        return self.open and self.taken < int(self.limit)

    def answered(self, seconds: float) -> None:
        self._seconds.append(seconds)
        self.limit = min(self.limit + 1 / self.limit, self.most)

    def refused(self) -> None:
        self.limit = max(self.limit - BUSY_COSTS, 1.0)

    def timeout(self, longest: float, timeouts: int) -> float:
        """Seconds to wait for an answer: `longest`, or less once enough answers have come to know the slowest; doubled
        after each of a story's `timeouts`, as TCP does (RFC 6298), in case the server has become slow."""
        if len(self._seconds) < max(self.most, KNOWN):
            return longest
        return min(longest, max(SLOWER * max(self._seconds), self.shortest) * 2**timeouts)


@dataclass(eq=False, repr=False)
class Endpoint:
    """One model on the server at `url`, which `base_url` gave."""

    url: str
    model: str | None  # None until it is known which one the server lists first
    client: ChatClient
    slots: Slots
    ledger: Ledger
    template: Template  # of most questions
    max_reply: int  # tokens of a reply in numbers
    extra: Mapping[str, Any]  # fields that are merged into every request, and win
    probe: Probe | None = None  # None until the server has been probed
    failures: int = 0  # transient ones since its last answer
    absences: int = 0  # times that it was left out since then

    @property
    def max_tokens(self) -> int:
        """Tokens of a reply that is wanted: JSON needs more than numbers."""
        by_json = self.probe is not None and self.probe.held_to == "json"
        return max(self.max_reply, json_tokens(self.template.names)) if by_json else self.max_reply

    @property
    def token_cap(self) -> int:
        """The most tokens that one answer can have."""
        return max(self.max_tokens, self.probe.least_tokens if self.probe else 0)

    def sampling(self, seed: int, temperature: float, names: Sequence[str] = ()) -> dict[str, Any]:
        """names: of the criteria, if not the template's."""
        tokens = max(self.max_tokens, json_tokens(names) if self.max_tokens > self.max_reply else 0)
        return {"temperature": temperature, "max_tokens": tokens, "seed": seed % 2**31}  # servers take 32 bits

    async def chat(self, form: Form, messages: list[dict], *, max_tokens: int, **fields: Any) -> Reply:
        """One chat completion. A reply that had to be allowed more tokens is cut to about `max_tokens`."""
        body = {"model": self.model, **form.body(messages, max_tokens, **fields), **self.extra}
        headers = body.pop("extra_headers", None)
        # An upper bound on the prompt's tokens: a token is at least one byte, and the chat template adds a few. If the
        # server counted the tokens of the probe's story, only the part that differs from it is uncertain.
        sizes = [len(message["content"].encode()) for message in messages]
        counted = self.probe.tokens if self.probe is not None else None
        other_system = max(sizes[0] - len(instructions(self.template).encode()), 0)  # of a ranking
        longest = counted[0] + other_system + sizes[-1] if counted and len(sizes) == 2 else sum(sizes) + TEMPLATE_TOKENS
        cap = body[form.token_cap]
        with self.ledger.request(longest, cap) as charge:
            reply = await self.client.chat(headers, body)
            if reply.tokens:
                charge.update(zip(charge, reply.tokens, strict=True))
        return reply if cap == max_tokens else replace(reply, text="".join(PIECE.findall(reply.text)[:max_tokens]))


def constraint(structure: str, names: Sequence[str]) -> dict:
    """The fields of a request that constrain a reply to scores for `names`."""
    match structure:
        case "numbers":  # vLLM obeys the first field, llama.cpp's server the second; each ignores the other
            digits = [f"[0-{TOP}]"] * len(names)
            grammar = "root ::= " + ' " " '.join(digits)
            return {"structured_outputs": {"regex": " ".join(digits)}, "grammar": grammar}
        case "json":
            schema = {
                "type": "object",
                "properties": {name: {"type": "integer", "enum": list(range(TOP + 1))} for name in names},
                "required": list(names),
                "additionalProperties": False,
            }
            form = {"name": "grades", "strict": True, "schema": schema}
            return {"response_format": {"type": "json_schema", "json_schema": form}}
    return {}


def json_tokens(names: Sequence[str]) -> int:
    """The longest reply, in tokens, that is a JSON object with these keys."""
    return JSON_TOKENS * len(names) + 8


def base_url(url: str) -> str:
    """`url`, with the usual path /v1 if it has none."""
    parts = server_url(url.strip(), ("http", "https"))
    if parts is None or parts.userinfo or parts.query or parts.fragment:
        raise UserError(
            "the teacher's URL must look like http://127.0.0.1:8000/v1 or https://host/v1; its key is OPENAI_API_KEY"
        )
    return str(parts.copy_with(path=parts.path.rstrip("/") or "/v1"))
