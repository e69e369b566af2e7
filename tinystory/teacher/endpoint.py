"""One model on one server: its capabilities, the form of its requests, and the request itself."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinystory.run.errors import UserError
from tinystory.teacher.api import ChatClient, Failure, Reply
from tinystory.teacher.cache import cache_key
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.prompt import DEFAULT, TOP, Template

TEMPLATE_TOKENS = 256  # upper bound on what a chat template adds to two messages
JSON_TOKENS = 12  # per criterion: a key, a colon, a digit, a comma and some whitespace
BUSY_COSTS = 0.5  # slots lost per refused request
# of an answer, yes or no: at 1 the log-probabilities before and after the temperature are the same,
# and the share of yes among several answers is its probability
ANSWER_TEMPERATURE = 1.0
DRAWS = 8  # answers to a question where the server gives no log-probabilities
PROBE = "probe "  # prefix of a probe's key in the cache
URL = re.compile(r"(?P<server>https?://[^\s/?#@]+)(?P<path>(/[^\s?#]*)?)", re.IGNORECASE)


@dataclass(kw_only=True)
class Options:
    """Options of requests, the same for every server."""

    template: Template = DEFAULT
    temperature: float = 0.2
    seed: int = 0
    max_tokens: int = 16  # token limit of a reply in plain numbers; JSON gets more
    # fields merged into every request, overriding ours
    extra: dict[str, Any] = field(default_factory=dict)
    deadline_s: float = 300.0  # time limit of a reply, from its first request
    attempts: int = 3  # replies to a story; a request takes at most deadline_s / attempts

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
    # parameters that the server refuses; they are left out
    refused: list[str] = field(default_factory=list)
    quiet: Mapping[str, Any] = field(default_factory=dict)  # fields that make the model reason less
    # False: the rubric opens the user's message, for models without a system message
    system: bool = True
    # log-probabilities of the likeliest tokens that are asked for with an answer; 0: the server
    # gives none, or the replies are grades
    top_logprobs: int = 0
    reply: str = ""  # the reply to the probe's story
    scored: bool = False  # whether that reply held scores, or an answer
    thinks: bool = False  # whether the model reasons before it replies, unless told not to
    # the constraint on a reply: "numbers"; "json", which is longer, only if replies hold no scores
    # without it; or "nothing"
    held_to: str = "nothing"
    # (prompt, completion) of the probe's story; None if the server counts none
    tokens: Sequence[int] | None = None
    seconds: float = 0.0  # of the fastest answer: the first may include loading the model
    notes: list[str] = field(default_factory=list)  # warnings for the user

    def __str__(self) -> str:
        reply = "scored a story" if self.scored else f"gave no score but {self.reply[:60]!r}"
        least = f" at least {self.least_tokens}" if self.least_tokens else ""
        findings = [reply, self.token_cap + least]
        if not self.top_logprobs:  # else its answers need no constraint
            findings.append(f"obeys {self.held_to}")
        findings += [f"no {name}" for name in self.refused]
        if not self.system:
            findings.append("no system message")
        if self.thinks:
            findings.append("thinks")
        if self.top_logprobs:
            findings.append(f"gives the log-probabilities of {self.top_logprobs} tokens")
        if self.quiet:
            findings.append(f"told not to think by {json.dumps(self.quiet)}")
        findings.append(f"{self.seconds:.2f} s")
        return f"{self.model} at {self.url}: {', '.join(findings)}"


@dataclass(eq=False, repr=False)
class Endpoint:
    """One model on the server at `url`, which `base_url` normalised. Its requests in flight are
    limited: half a slot less for each request refused as busy, one more per full round of answers.
    A round with a refused fraction s scales the limit by 1 - s/2, as in DCTCP (RFC 8257)."""

    url: str
    model: str | None  # None until the server has listed its models
    client: ChatClient
    most: int  # requests in flight
    ledger: Ledger
    options: Options
    probe: Probe | None = None  # None until the server has been probed
    is_open: bool = True  # whether it is asked at all
    taken: int = 0  # requests in flight
    failures: int = 0  # transient failures since its last answer

    def __post_init__(self) -> None:
        self.limit = float(self.most)
        # key in the cache of the probe of this server with these options
        options = self.options
        text = (
            f"{self.url} {options.max_tokens} {options.temperature} "
            f"{options.template}{options.extra_json}"
        )
        self.probe_key = PROBE + hashlib.sha256(text.encode()).hexdigest()[:24]

    def answered(self) -> None:
        self.limit = min(self.limit + 1 / self.limit, self.most)
        self.failures = 0

    def failed(self, failure: Failure) -> None:
        self.ledger.total["failures"] += 1
        if failure.busy:
            self.limit = max(self.limit - BUSY_COSTS, 1.0)
        elif failure.again:
            self.failures += 1

    @property
    def draws(self) -> int:
        """Equal requests, but for the seed, about each story and question."""
        assert self.probe is not None
        if self.options.template.asks_yes_or_no and not self.probe.top_logprobs:
            return DRAWS
        return 1

    @property
    def attempts(self) -> int:
        """How often a request is sent until its reply can be read."""
        assert self.probe is not None
        return 1 if self.probe.top_logprobs else self.options.attempts

    @property
    def max_tokens(self) -> int:
        """Token limit of a reply with scores, or with an answer."""
        if self.probe is not None and self.probe.top_logprobs:
            return 1
        if self.probe is None or self.probe.held_to != "json":
            return self.options.max_tokens
        return max(self.options.max_tokens, JSON_TOKENS * len(self.options.template.names) + 8)

    def sampling(self, seed: int) -> dict[str, Any]:
        """Fields of a request that determine the reply."""
        temperature = self.options.temperature
        if self.options.template.asks_yes_or_no:
            temperature = ANSWER_TEMPERATURE
        return {
            "temperature": temperature,
            "seed": seed % 2**31,  # servers take 32 bits
            "max_tokens": self.max_tokens,
        }

    def reply_key(self, messages: list[dict], fence: str, seed: int) -> str:
        """Key in the cache of the reply to these messages."""
        assert self.model is not None and self.probe is not None
        determined_by = self.sampling(seed) | {"held_to": self.probe.held_to}
        if self.probe.top_logprobs:
            determined_by["top_logprobs"] = self.probe.top_logprobs
            del determined_by["seed"]  # probabilities do not depend on what is drawn
        if self.options.extra:
            determined_by["extra"] = self.options.extra_json
        return cache_key(self.model, messages, fence, determined_by)

    async def chat(self, messages: list[dict], seed: int) -> Reply:
        """Ask for scores, or for an answer, in the form that the probe says."""
        form = self.probe
        assert form is not None
        fields = self.sampling(seed)
        cap = max(fields.pop("max_tokens"), form.least_tokens)
        fields |= constraint(form.held_to, self.options.template.names)
        fields |= form.quiet
        if form.top_logprobs:
            fields |= {"logprobs": True, "top_logprobs": form.top_logprobs}
        fields |= {"model": self.model, "messages": messages, form.token_cap: cap}
        texts = [message["content"] for message in messages]
        if not form.system and messages[0]["role"] == "system":
            first = {"role": "user", "content": "\n\n".join(texts[:2])}
            fields["messages"] = [first, *messages[2:]]
        for name in form.refused:
            fields.pop(name, None)
        fields |= self.options.extra
        with self.ledger.request(self.most_prompt_tokens(texts), cap) as charge:
            reply = await self.client.chat(fields)
            if reply.tokens:
                charge["tokens_in"], charge["tokens_out"] = reply.tokens
        return reply

    def most_prompt_tokens(self, texts: Sequence[str]) -> int:
        """Upper bound on a prompt's tokens: a token is at least one byte, and the chat template
        adds a few. Where the server counted the tokens of the probe's prompt, which begins with the
        same rubric, only the user's message is estimated."""
        if self.probe is None or not self.probe.tokens or len(texts) != 2:
            return len("".join(texts).encode()) + TEMPLATE_TOKENS
        return self.probe.tokens[0] + len(texts[-1].encode())


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
    parts = URL.fullmatch(url.strip())
    if parts is None or not url.isprintable():
        raise UserError(
            "the teacher's URL must look like http://127.0.0.1:8000/v1 or https://host/v1; its key is OPENAI_API_KEY"
        )
    return parts["server"] + (parts["path"].rstrip("/") or "/v1")
