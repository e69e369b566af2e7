"""Finds out a server's capabilities and the form of requests by experiment, because a server may
accept an option and ignore it."""

import asyncio
import contextlib
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from tqdm import tqdm

from tinystory.run.errors import UserError
from tinystory.run.records import Fields, parse_object
from tinystory.teacher.api import BUSY, NO_SYSTEM, Failure, Reply, are_counts, in_time
from tinystory.teacher.cache import Cache
from tinystory.teacher.endpoint import HUMAN, Endpoint, Options, Probe
from tinystory.teacher.grade import LONGEST_REPLY
from tinystory.teacher.pool import ServerPool
from tinystory.teacher.prompt import fence

HUMAN_S = 20.0  # seconds per grade by a human, assumed in forecasts
SHOWN_MODELS = 40  # of a server's list, in a message
LOADING_PAUSE_S = 2.0  # seconds between two questions whether a server has loaded its model
FIRST_STORY = "Once upon a time,", "a cat sat down by the fire and slept."  # opening and story
# Two stories of the usual length, which are graded at once to measure the time per answer.
TIMED_STORIES = (
    (
        "Once upon a time, a hen found a key.",
        "She asked the duck whose key it was, but the duck only shook his head. She asked the cow, and the cow did "
        "not know. In the evening she tried the key in every door of the farm. It opened none of them. At last the "
        "smallest chick saw a box under the straw. The key fitted. There was nothing in it but a note: "
        '"Whoever finds this may sleep by the stove." And so they did, all winter.',
    ),
    (
        "One morning the river was gone.",
        "Ben stood on the bank with his little boat under his arm and looked at the mud. A frog sat there and looked "
        "at it too. They walked up the valley together until they came to a wall of sticks. Behind it a beaver was "
        'asleep. "We would like our river back," said Ben. The beaver yawned, pulled out one stick, and the water '
        "ran down to the village again. The frog swam home beside the boat.",
    ),
)
# A request that has nothing to do with scores. The reply has scores only if the server obeys a
# constraint to scores.
OFF_TOPIC = [
    {
        "role": "user",
        "content": "Name three animals that live in a forest. Write their names and no number.",
    }
]
# Pattern of names of models that cannot chat.
NO_CHAT = re.compile(r"embed|rerank|moderation|whisper|\btts\b|dall-e|minilm|\bbge-", re.IGNORECASE)
# Fields that make a model reason less, tried in this order: arguments of the chat template (vLLM,
# SGLang, llama.cpp; Qwen's template has the first name, DeepSeek's and Kimi's the second); efforts
# (OpenAI, Ollama, and later versions of the three servers); a field of DeepSeek's, Kimi's and GLM's
# own APIs. gpt-oss and Gemini have no effort "none"; GPT-5 has nothing below "minimal".
QUIETER: tuple[dict[str, Any], ...] = (
    {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}},
    {"reasoning_effort": "none"},
    {"thinking": {"type": "disabled"}},
    {"reasoning_effort": "minimal"},
    {"reasoning_effort": "low"},
)
# Token limit for a model that begins with white space, where a reply is read by its first token.
SPACED_TOKENS = 4
THINKING_TOKENS = 4096  # token limit of a reply if no entry of QUIETER works
OTHER_FIELD = (  # of a teacher; a judge has no such option
    "; if the server has another field for it, give that field, for example --teacher-extra "
    '\'{"reasoning_effort": "none"}\''
)
REFUSABLE = ("seed", "temperature")
# Field of a cached probe -> the values that a server can have caused.
POSSIBLE: dict[str, Sequence[object]] = {
    "token_cap": ("max_tokens", "max_completion_tokens"),
    "least_tokens": range(THINKING_TOKENS + 1),
    "refused": ([], ["seed"], ["temperature"], ["seed", "temperature"]),
    "quiet": ({}, *QUIETER),
    "top_logprobs": range(100),
    "held_to": ("grammar", "json", "nothing"),
}
LONGEST_S = 1e6  # upper bound on the duration of an answer in seconds
PROBE_FIELDS: Fields = {
    name: (type(value),) for name, value in asdict(Probe(url="", model="")).items()
}
PROBE_FIELDS |= {"tokens": (list, type(None)), "seconds": (int, float)}
LEAST = re.compile(
    r"(?:>=|at least|minimum (?:value )?(?:of|is)|greater than or equal to)\D{0,12}([0-9]{1,3})\b"
)
MOST_LISTED = re.compile(
    r"logprobs.*?(?:<=?|at most|less than or equal to|max(?:imum)?\b|between 0 and|up to|\[0,)\D{0,12}([0-9]{1,2})\b"
)
# Pattern in a server's error message -> function that returns the fields of the form to change.
REMEDIES: tuple[tuple[re.Pattern, Callable[[Probe, re.Match], dict[str, Any]]], ...] = (
    (
        re.compile("max_completion_tokens"),
        lambda form, words: {"token_cap": "max_completion_tokens"},
    ),
    (
        re.compile(rf"\b({'|'.join(REFUSABLE)})\b"),
        lambda form, words: {"refused": sorted({*form.refused, words[1]})},
    ),
    (MOST_LISTED, lambda form, words: {"top_logprobs": min(int(words[1]), form.top_logprobs)}),
    (re.compile("logprobs"), lambda form, words: {"top_logprobs": 0}),
    (LEAST, lambda form, words: {"least_tokens": int(words[1])}),
    (NO_SYSTEM, lambda form, words: {"system": False}),
)


def load_probe(text: str, url: str) -> Probe | None:
    """The probe of the server at `url`, parsed from JSON. None for any other text, such as the
    probe of another version. None also for a probe with values that no server can have caused,
    because fields of the probe become part of all requests."""
    try:
        record = parse_object(text, PROBE_FIELDS)
    except ValueError:
        return None
    has_fields = record["url"] == url and record.keys() == PROBE_FIELDS.keys()
    has_names = record["model"].isprintable() and record["served"].isprintable()
    has_counts = record["tokens"] is None or are_counts(record["tokens"], 2)
    has_measures = has_counts and 0 < record["seconds"] < LONGEST_S
    is_possible = all(record[name] in values for name, values in POSSIBLE.items())
    return Probe(**record) if has_fields and has_names and has_measures and is_possible else None


def remedy(form: Probe, failure: Failure) -> Probe:
    """`form` with the change that the server's error message demands. Raises `failure` if it
    demands none."""
    if failure.status in (400, 403, 422, 500):
        for pattern, change in REMEDIES:
            for match in pattern.finditer(failure.message):
                changed = replace(form, **change(form, match))
                if changed != form:
                    return changed
    raise failure


class Prober:
    """Probes one server. All methods raise Failure if the server gives no usable answer."""

    def __init__(self, endpoint: Endpoint, cache: Cache):
        self.endpoint = endpoint  # its probe changes with each experiment
        self.cache = cache
        self.protocol = endpoint.options.protocol
        self.model_flag = f"--{endpoint.options.role}-model"
        self.messages = self._messages(*FIRST_STORY)
        self._pool = ServerPool([endpoint])

    def _messages(self, opening: str, story: str) -> list[dict]:
        """The messages of the first request about a story."""
        mark = fence(self.endpoint.options.seed, -1, f"{opening}\n{story}")
        return next(iter(self.protocol.messages(opening, story, mark).values()))

    async def examine(self) -> Failure | None:
        """None after the endpoint's probe was set; else the failure of a server that cannot be reached
        or refuses every request. If the server cannot be reached, a cached probe is used if its
        model is the one that the user named. Raises UserError for any other failure."""
        endpoint = self.endpoint
        url = endpoint.probe.url
        model = endpoint.probe.model
        key = probe_key(url, endpoint.options)
        cached = self.cache.get(key)
        probe = load_probe(cached.text, url) if cached else None
        endpoint.client.load()
        try:
            model = await self._choose_model()
            any_model = endpoint.options.any_model
            if probe is None or probe.model != model or not probe.scored or any_model:
                probe = await self._probe(model)
                self.cache.forget(key)
                self.cache.put(key, Reply(json.dumps(asdict(probe))), endpoint.ledger.charged)
        except Failure as failure:
            is_refused = failure.fatal and failure.status is not None
            if not failure.unreachable and not is_refused:
                raise UserError(f"{endpoint} {failure}") from None
            if probe is None or is_refused:
                return failure
            if probe.model not in (model, HUMAN):
                # The name of the model is not taken from the file, because it would be sent to the
                # server when the server can be reached again.
                message = (
                    f"{failure} (the cached replies are by {probe.model}: to use them, give "
                    f"{self.model_flag} {probe.model})"
                )
                return Failure(message, unreachable=True)
            self._warn(f"{failure}; cached replies are used until a new one is needed")
        endpoint.probe = probe
        endpoint.taught_by = probe.taught_by
        return None

    def _warn(self, note: str) -> None:
        """Print a warning about the server."""
        tqdm.write(f"warning: {self.endpoint} {note}")

    async def _choose_model(self) -> str:
        """The name of the model: the one that the user named, else the first chat model that the
        server lists."""
        client = self.endpoint.client
        named = self.endpoint.probe.model
        try:
            models = await self._list_models()
        except Failure as failure:
            if failure.status is None:
                raise
            if not named:
                message = f"{failure} (if the server does not list models, name one with {self.model_flag})"
                raise Failure(message, status=failure.status, fatal=failure.fatal) from None
            self._warn(f"{failure}; {named} is used although the server gave no list of models")
            return named
        if named and named not in models:
            listed = client.one_line(", ".join(models[:SHOWN_MODELS])) or "none"
            self._warn(f"does not list {named}, which is used anyway; listed models: {listed}")
        if not named and not models:
            raise Failure(f"lists no model: load one, or name one with {self.model_flag}")
        chat_models = [name for name in models if not NO_CHAT.search(name)]
        return named or client.one_line((chat_models or models)[0])

    async def _list_models(self) -> list[str]:
        """The names of the server's models. A server that is loading its model is asked again,
        until --teacher-timeout ends."""
        endpoint = self.endpoint
        now = asyncio.get_running_loop().time
        began = now()
        while True:
            try:
                return await in_time(endpoint.client.models(), endpoint.timeout_s)
            except Failure as failure:
                is_loading = failure.status in BUSY
                if not is_loading or now() - began > endpoint.deadline_s:
                    raise
            await asyncio.sleep(LOADING_PAUSE_S)

    @property
    def form(self) -> Probe:
        return self.endpoint.probe

    def _change_form(self, **fields: Any) -> None:
        self.endpoint.probe = replace(self.form, **fields)

    async def _probe(self, model: str) -> Probe:
        self._change_form(model=model, top_logprobs=self.protocol.top_logprobs)
        reply = await self._accepted_reply()
        if reply.thought and not self.protocol.reads(reply):
            reply = await self._reply_without_thoughts()
        if self.protocol.top_logprobs and not has_logprobs(reply):
            reply = await self._reply_by_other_means()
        if not self.endpoint.by_logprobs:
            reply = await self._constrained_reply(reply)
        scored = self.protocol.reads(reply)
        if not scored:
            self._warn(f"gave no score for the first story: {model} replied {reply.text[:80]!r}")
        elif not self.endpoint.by_logprobs and not self.protocol.is_bare(reply):
            self._warn(
                f"has a model, {model}, that replies {reply.text[:40]!r}, and nothing constrains its replies: the "
                "first word counts"
            )
        self._change_form(
            tokens=reply.tokens,
            served=reply.model,
            reply=reply.text[:LONGEST_REPLY],
            scored=scored,
        )
        return replace(self.form, seconds=await self._seconds_per_answer())

    async def _ask(self, messages: list[dict], count: int = 1) -> Reply:
        """The first of `count` replies. Sets whether one request can have several replies. Only a
        request that is refused as one too many is repeated, because any other failure may be the
        server's answer to the form of the request."""

        async def request(endpoint: Endpoint) -> AsyncIterator[list[Reply]]:
            try:
                yield await endpoint.chat(messages, endpoint.options.seed, count)
            except Failure as failure:
                failure.again = failure.status in BUSY
                raise

        replies = await self._pool.ask(request)
        if count > 1:
            self._change_form(choices=len(replies) == count)
        return replies[0]

    async def _try(self, messages: list[dict], count: int = 1) -> Reply | None:
        """As `_ask`; None after a failure that concerns only this request."""
        try:
            return await self._ask(messages, count)
        except Failure as failure:
            if failure.fatal:
                raise
            return None

    async def _accepted_reply(self) -> Reply:
        """The reply to the first story, after changing the form until the server accepts the
        request."""

        async def request(endpoint: Endpoint) -> AsyncIterator[Reply]:
            yield (await endpoint.chat(self.messages, endpoint.options.seed))[0]

        while True:
            try:
                return await self._pool.ask(request)
            except Failure as failure:
                self.endpoint.probe = remedy(self.form, failure)

    async def _reply_without_thoughts(self) -> Reply:
        """The reply of a model that seems to reason: with a few tokens more, because a model that
        begins with white space looks the same; with the first entry of QUIETER that stops the
        reasoning; or with a token limit of THINKING_TOKENS. Raises Failure if all fail."""
        # a parameter that was refused may be accepted without reasoning
        form = replace(self.form, refused=[], top_logprobs=self.protocol.top_logprobs)
        changes: list[dict[str, Any]] = [{"quiet": quiet} for quiet in QUIETER]
        if self.endpoint.by_logprobs:
            changes.insert(0, {"least_tokens": SPACED_TOKENS})
        changes.append({"least_tokens": THINKING_TOKENS, "top_logprobs": 0})
        for change in changes:
            self.endpoint.probe = replace(form, **change)
            try:
                reply = await self._accepted_reply()
            except Failure as failure:
                if failure.fatal:
                    raise
                continue
            if not reply.thought or self.protocol.reads(reply):
                break
            form = replace(form, quiet=self.form.quiet)
        else:
            raise Failure(
                f"has a model, {self.form.model}, that reasons before it answers and gives no scores within "
                f"{THINKING_TOKENS} tokens: choose a model that does not reason, or switch reasoning off on the "
                "server"
            )
        if self.form.least_tokens == THINKING_TOKENS:
            cost = f"; the first reply cost {reply.tokens[1]}" if reply.tokens else ""
            is_judge = self.endpoint.options.role == "judge"
            self._warn(
                f"has a model, {self.form.model}, whose reasoning cannot be switched off by {len(QUIETER)} known "
                f"fields: a reply may cost up to {THINKING_TOKENS} tokens{cost}{'' if is_judge else OTHER_FIELD}"
            )
        return reply

    async def _reply_by_other_means(self) -> Reply:
        """A reply if a chat completion has no log-probabilities: by /v1/responses, which may have
        them (LM Studio), else one of several draws, in one request if the server can."""
        if self.form.least_tokens < THINKING_TOKENS:
            self._change_form(responses=True, top_logprobs=self.protocol.top_logprobs)
            with contextlib.suppress(Failure):
                reply = await self._ask(self.messages)
                if has_logprobs(reply):
                    return reply
        self._change_form(responses=False, top_logprobs=0)
        draws = self.protocol.draws
        self._warn(
            f"gives no log-probabilities of {self.form.model}: each question is asked {draws} times, and the "
            "fraction of yes is the answer"
        )
        return await self._try(self.messages, draws) or await self._ask(self.messages)

    async def _constrained_reply(self, reply: Reply) -> Reply:
        """The reply to the first story with the first constraint that the server obeys, if any,
        unless `reply` has scores without it."""
        kinds = ["grammar"] if self.protocol.is_bare(reply) else ["grammar", "json"]
        for kind in kinds:
            self._change_form(held_to=kind)
            held = await self._try(OFF_TOPIC)
            if held is not None and self.protocol.is_bare(held):
                count = self.protocol.draws if self.form.choices else 1
                is_read = self.protocol.reads(reply)
                return reply if is_read else await self._ask(self.messages, count)
        self._change_form(held_to="nothing")
        return reply

    async def _seconds_per_answer(self) -> float:
        """Seconds per answer while TIMED_STORIES are graded at once."""
        if self.form.model == HUMAN:  # whose time is expensive
            return HUMAN_S
        stories = TIMED_STORIES[: self.endpoint.most]
        now = asyncio.get_running_loop().time
        start = now()
        await asyncio.gather(*(self._try(self._messages(*story)) for story in stories))
        return (now() - start) / len(stories)


def probe_key(url: str, options: Options) -> str:
    """Key in the cache of a server's probe with these options."""
    extra = json.dumps(options.extra, sort_keys=True)
    text = f"{url} {options.max_tokens} {options.temperature} {options.protocol} {extra}"
    return f"probe {hashlib.sha256(text.encode()).hexdigest()[:24]}"


def has_logprobs(reply: Reply) -> bool:
    """Whether the server listed more tokens than the one that was drawn."""
    return len(reply.logprobs or ()) > 1
