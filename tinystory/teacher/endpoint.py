"""One model on one server: the capabilities of the model, the form of requests, and the request
itself."""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tinystory.run.errors import UserError
from tinystory.teacher.api import BUSY, ChatClient, Failure, Reply, in_time
from tinystory.teacher.grades import Grades
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.protocol import Protocol

ATTEMPTS = 3  # maximum number of replies to a request until a reply is readable
TEMPLATE_TOKENS = 256  # upper bound on the tokens that a chat template adds to two messages
FIRST_SLOTS = 2  # requests in flight until the first answer
BUSY_COSTS = 0.5  # slots lost per refused request
# A request has at least this multiple of the probe's seconds per answer. No request comes near this
# limit, because the number of requests in flight no longer rises once an answer takes a quarter of
# it.
PATIENCE = 16
HUMAN = "human"  # name of the model if a human grades (scripts/teach.py)
HUMAN_PATIENCE_S = 3 * 86_400.0  # time limit in seconds for a human's grade: a human takes breaks
RESPONSES_LOGPROBS = "message.output_text.logprobs"  # what /v1/responses is asked to include
URL = re.compile(r"(?P<server>https?://[^\s/?#@]+)(?P<path>(/[^\s?#]*)?)", re.IGNORECASE)


@dataclass(kw_only=True)
class Options:
    """Options of requests, the same for every server."""

    role: str = "teacher"  # or "judge": what messages call the model, and how its options begin
    protocol: Protocol = field(default_factory=Grades)
    temperature: float = 0.2
    seed: int = 0
    max_tokens: int = 16  # token limit of a reply in plain numbers; a reply in JSON may be longer
    # fields that are merged into every request and override ours
    extra: dict[str, Any] = field(default_factory=dict)
    # time limit of a reply, all retries included; a slow server gets more time, see `Endpoint`
    deadline_s: float = 300.0
    per_minute: int = 0  # maximum number of requests per minute to a server; 0: no limit
    any_model: bool = False  # whether replies may come from another model than the probe's

    def __post_init__(self) -> None:
        if self.protocol.temperature is not None:
            self.temperature = self.protocol.temperature


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Capabilities of one model on one server, and the form of requests that the server accepts."""

    url: str
    model: str
    served: str = ""  # the model's name in replies; "" if the server does not say
    token_cap: str = "max_tokens"  # name of the token limit: max_tokens or max_completion_tokens
    least_tokens: int = 0  # the smallest token limit that is sent
    # parameters that the server refuses; they are left out of requests
    refused: list[str] = field(default_factory=list)
    quiet: Mapping[str, Any] = field(default_factory=dict)  # fields that make the model reason less
    # whether the model accepts a system message; if not, the rubric opens the user's message
    system: bool = True
    # number of likeliest tokens to request with log-probabilities; 0 if the server gives no
    # log-probabilities, or if the replies are grades
    top_logprobs: int = 0
    # whether the log-probabilities come from OpenAI's other API, /v1/responses
    responses: bool = False
    choices: bool = False  # whether one request can have several replies (`n`)
    # The constraint on a reply: "grammar", "json" or "nothing". "json" makes replies longer, and is
    # used only if replies cannot be read without it.
    held_to: str = "nothing"
    reply: str = ""  # the reply to the probe's story
    scored: bool = False  # whether this reply has scores, or an answer
    # numbers of (prompt, completion) tokens for the probe's story; None without a report
    tokens: Sequence[int] | None = None
    # seconds per answer while two different stories are graded at once; 0 during the probe
    seconds: float = 0.0

    @property
    def taught_by(self) -> str:
        """The name of the model that replies."""
        return self.served or self.model

    def __str__(self) -> str:
        reply = "scored a story" if self.scored else f"gave no score but {self.reply[:60]!r}"
        least = f" at least {self.least_tokens}" if self.least_tokens else ""
        findings = [reply, self.token_cap + least]
        findings += [f"no {name}" for name in self.refused]
        if not self.system:
            findings.append("no system message")
        if self.quiet:
            findings.append(f"reasoning reduced by {json.dumps(self.quiet)}")
        if self.top_logprobs:
            place = " in /responses" if self.responses else ""
            findings.append(f"gives the log-probabilities of {self.top_logprobs} tokens{place}")
        else:  # answers with log-probabilities need no constraint
            findings.append(f"reply constraint: {self.held_to}")
        if self.choices:
            findings.append("several replies to one request")
        findings.append(f"{self.seconds:.2f} s per answer")
        return f"{self.model} at {self.url}: {', '.join(findings)}"


@dataclass(eq=False, repr=False)
class Endpoint:
    """One model on one server, with a limit on the requests in flight. The limit begins at two, and
    each answer raises it by one slot (TCP's slow start). Each request that is refused as busy, or
    takes too long, lowers the limit by half a slot; from then on, each full round of answers raises
    it by one slot. So a round with a refused fraction s scales the limit by 1 - s/2, as in DCTCP
    (RFC 8257)."""

    probe: Probe  # at first only with the server's URL, and with the model that the user named
    client: ChatClient
    most: int  # maximum number of requests in flight
    ledger: Ledger
    options: Options
    is_open: bool = True  # whether requests are sent to this server
    taken: int = 0  # number of requests in flight
    failures: int = 0  # number of transient failures since the last answer
    was_busy: bool = False
    taught_by: str = ""  # name of the model that replied last

    def __post_init__(self) -> None:
        self.limit = float(min(FIRST_SLOTS, self.most))

    def __str__(self) -> str:
        return f"the {self.options.role} at {self.probe.url}"

    @property
    def deadline_s(self) -> float:
        """Time limit in seconds of a reply, all retries included."""
        if self.probe.model == HUMAN:
            return HUMAN_PATIENCE_S
        return max(self.options.deadline_s, ATTEMPTS * PATIENCE * self.probe.seconds)

    @property
    def timeout_s(self) -> float:
        """Time limit in seconds of one request. The first request, which may have to wait until the
        server has loaded the model, has all of --teacher-timeout."""
        return self.deadline_s / ATTEMPTS if self.probe.seconds else self.deadline_s

    @property
    def by_logprobs(self) -> bool:
        """Whether log-probabilities are requested. Then a reply is read by them alone."""
        return self.probe.top_logprobs > 0

    @property
    def max_tokens(self) -> int:
        """Token limit of a reply that the protocol reads."""
        if self.by_logprobs:
            return 1
        return self.options.protocol.max_tokens(self.options.max_tokens, self.probe.held_to)

    def answered(self, seconds: float) -> None:
        """Count an answer that took `seconds`: the limit rises if all slots were in use, and if
        answers are quick enough that a few more requests in flight cannot make one too late."""
        self.failures = 0
        if self.taken >= int(self.limit) and seconds < self.timeout_s / 4:
            rise = 1 / self.limit if self.was_busy else 1.0
            self.limit = min(self.limit + rise, self.most)

    def failed(self, failure: Failure) -> None:
        """Count a failure: the limit falls if the server is busy."""
        if failure.busy:
            self.limit = max(self.limit - BUSY_COSTS, 1.0)
            self.was_busy = True
        if failure.again and failure.status not in BUSY:
            self.failures += 1

    async def chat(self, messages: list[dict], seed: int, count: int = 1) -> list[Reply]:
        """The server's replies, one to `count`, to a request for scores, or for an answer, in the
        form of the probe."""
        form = self.probe
        texts = [message["content"] for message in messages]
        if not form.system and messages[0]["role"] == "system":
            messages = [{"role": "user", "content": "\n\n".join(texts[:2])}, *messages[2:]]
        cap = max(self.max_tokens, form.least_tokens)
        fields = {"model": form.model, "temperature": self.options.temperature, **form.quiet}
        if form.held_to != "nothing":
            fields |= self.options.protocol.constraint(form.held_to)
        if form.responses:
            fields |= {"input": messages, "max_output_tokens": cap, "include": [RESPONSES_LOGPROBS]}
        else:
            fields |= {"messages": messages, form.token_cap: cap}
        # Log-probabilities do not depend on what is drawn. Some servers would draw each of several
        # replies with the same seed.
        if self.by_logprobs:
            fields["top_logprobs"] = form.top_logprobs
            if not form.responses:
                fields["logprobs"] = True
        elif count > 1:
            fields["n"] = count
        else:
            fields["seed"] = seed % 2**31  # servers take 32 bits
        for name in form.refused:
            fields.pop(name, None)
        fields |= self.options.extra
        with self.ledger.request(self.most_prompt_tokens(texts), cap * count) as charge:
            await self._wait_turn()
            replies = await in_time(self.client.chat(fields), self.timeout_s)
            if replies[0].tokens:
                charge["tokens_in"], charge["tokens_out"] = replies[0].tokens
        model = replies[0].model
        if form.served and model:
            self.taught_by = model
            if model != form.served and not self.options.any_model:
                raise Failure(
                    f"now replies with the model {model} instead of {form.served}, whose scores cannot be compared: "
                    f"serve {form.served} again, or continue with --resume --any-model",
                    fatal=True,
                )
        return replies

    async def _wait_turn(self) -> None:
        """Wait until the limits per minute, of the server and of the user, allow a request."""
        now = asyncio.get_running_loop().time
        while self.client.next_at > now():
            await asyncio.sleep(self.client.next_at - now())
        if self.options.per_minute:
            self.client.pause(60 / self.options.per_minute)

    def most_prompt_tokens(self, texts: Sequence[str]) -> int:
        """Upper bound on the number of tokens of a prompt. A token is at least one byte, and the
        chat template adds a few tokens. If the server counted the tokens of the probe's prompt,
        which begins with the same rubric, this count replaces the bound for the system message."""
        if not self.probe.tokens or len(texts) != 2:
            return len("".join(texts).encode()) + TEMPLATE_TOKENS
        return self.probe.tokens[0] + len(texts[-1].encode())


def has_host(server: str) -> bool:
    """Whether the beginning of a URL has a host, and no port or a valid one."""
    try:
        parts = urlsplit(server)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def base_url(url: str, role: str = "teacher") -> str:
    """The base URL of an API: `url`, with the path /v1 if it has no path. Raises UserError if `url`
    is not an http or https URL, or has a user name, a query or a fragment."""
    parts = URL.fullmatch(url.strip())
    if parts is None or not url.isprintable() or not has_host(parts["server"]):
        raise UserError(
            f"the {role}'s URL must look like http://127.0.0.1:8000/v1 or https://host/v1, without a key: set the "
            "key in OPENAI_API_KEY"
        )
    return parts["server"] + (parts["path"].rstrip("/") or "/v1")
