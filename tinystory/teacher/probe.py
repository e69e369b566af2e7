"""Finds out a server's capabilities and the form of requests by experiment, because a server may
accept an option and ignore it."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from tqdm import tqdm

from tinystory.run.errors import UserError
from tinystory.run.records import Fields, parse_object
from tinystory.teacher.api import BUSY, NO_SYSTEM, Failure, Reply, in_time, is_count_pair
from tinystory.teacher.cache import Cache, CachedReply
from tinystory.teacher.endpoint import Endpoint, Probe
from tinystory.teacher.grade import LONGEST_REPLY
from tinystory.teacher.pool import ServerPool
from tinystory.teacher.prompt import fence

HUMAN = "human"  # name of the model if a human grades (scripts/teach.py)
HUMAN_S = 20.0  # seconds per grade by a human, assumed in forecasts
SHOWN_MODELS = 40  # of a server's list, in a message
LOADING_PAUSE_S = 2.0  # seconds between two questions whether a server has loaded its model
PATIENCE_S = 3 * 86_400.0  # time limit in seconds for a human's grade
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
THINKING_TOKENS = 4096  # token limit of a reply if no entry of QUIETER works
REFUSABLE = ("temperature", "seed")
MOST_LOGPROBS = 20  # maximum of `Protocol.top_logprobs`
FEWER_LOGPROBS = 10  # for mlx_lm.server, which closes the connection above 11
# Token limit for a model that begins with white space, where a reply is read by its first token.
SPACED_TOKENS = 4
# Field of a probe -> test of the value, in addition to the type.
PROBE_VALUES: dict[str, Callable[[Any], object]] = {
    "model": str.isprintable,
    "served": str.isprintable,
    "token_cap": ("max_tokens", "max_completion_tokens").__contains__,
    "least_tokens": range(THINKING_TOKENS + 1).__contains__,
    "refused": lambda names: all(name in REFUSABLE for name in names),
    "quiet": ({}, *QUIETER).__contains__,
    "top_logprobs": range(MOST_LOGPROBS + 1).__contains__,
    "held_to": ("grammar", "json", "nothing").__contains__,
    "tokens": lambda counts: counts is None or is_count_pair(counts),
    "seconds": lambda seconds: 0 < seconds < LONGEST_S,
    "notes": lambda notes: all(isinstance(note, str) and note.isprintable() for note in notes),
}
PROBE_FIELDS: Fields = {
    name: (type(value),) for name, value in asdict(Probe(url="", model="")).items()
}
PROBE_FIELDS |= {"tokens": (list, type(None)), "seconds": (int, float)}
LONGEST_S = 1e6  # upper bound on the duration of an answer in seconds
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
    is_possible = all(fits(record[name]) for name, fits in PROBE_VALUES.items())
    if record["url"] != url or record.keys() != PROBE_FIELDS.keys() or not is_possible:
        return None
    return Probe(**record)


def remedy(form: Probe, failure: Failure) -> Probe:
    """`form` with the change that the server's error message demands. If the connection was lost:
    with fewer log-probabilities, then none. Raises `failure` if neither changes the form."""
    if failure.lost and form.top_logprobs:
        few = FEWER_LOGPROBS if form.top_logprobs > FEWER_LOGPROBS else 0
        return replace(form, top_logprobs=few)
    if failure.status in (400, 403, 422, 500):
        for pattern, change in REMEDIES:
            for match in pattern.finditer(failure.message):
                changed = replace(form, **change(form, match))
                if changed != form:
                    return changed
    raise failure


class Prober:
    """Probes one server. All methods raise Failure if the server gives no usable answer."""

    def __init__(self, server: Endpoint, cache: Cache):
        self.server = server
        self.cache = cache
        # a copy of the endpoint; its probe changes with each experiment
        self.endpoint = replace(server)
        self.options = server.options
        self.protocol = server.options.protocol
        self.model_flag = f"--{self.options.role}-model"
        self.messages = self._messages(*FIRST_STORY)
        self.notes: list[str] = []
        self.seconds: list[float] = []

    def _messages(self, opening: str, story: str) -> list[dict]:
        """The messages of the first request about a story."""
        mark = fence(self.options.seed, -1, f"{opening}\n{story}")
        return next(iter(self.protocol.messages(opening, story, mark).values()))

    async def examine(self) -> Failure | None:
        """None after the server's model and probe were set; else the failure to reach the server.
        If the server cannot be reached, a cached probe is used if its model is the one that the
        user named. Raises UserError for any other failure."""
        server = self.server
        server.client.load()
        cached = self.cache.get(server.probe_key)
        probe = load_probe(cached.text, server.url) if cached else None
        try:
            server.model = await self.choose_model()
            # A cached probe without scores is repeated, unless other cached replies have scores.
            if probe and (self.options.any_model or probe.model != server.model):
                probe = None
            if not probe or not self._has_scores(probe):
                probe = await self.probe()
                reply = CachedReply(json.dumps(asdict(probe)))
                charged = server.ledger.charged
                self.cache.put(server.probe_key, reply, again=True, charged=charged)
        except Failure as failure:
            if not failure.unreachable:
                reasons = [f"{server} {failure}", *self.notes]
                raise UserError("; ".join(reasons)) from None
            if probe is None:
                return failure
            if probe.model not in (server.model, HUMAN):
                # The name of the model is not taken from the file, because it would be sent to the
                # server when the server can be reached again.
                message = (
                    f"{failure} (the cached replies are by {probe.model}: to use them, give "
                    f"{self.model_flag} {probe.model})"
                )
                return Failure(message, unreachable=True)
            server.model = probe.model
            tqdm.write(
                f"warning: {server} {failure}; cached replies are used until a new one is needed"
            )
        server.probe = probe
        if server.model == HUMAN:  # a human may take a break
            self.options.deadline_s = PATIENCE_S
        return None

    async def choose_model(self) -> str:
        """The name of the model: the one that the user named, else the first chat model that the
        server lists."""
        endpoint = self.endpoint
        try:
            models = await self._list_models()
        except Failure as failure:
            if failure.status is None:
                raise
            if endpoint.model is None:
                message = f"{failure} (if the server does not list models, name one with {self.model_flag})"
                raise Failure(message, status=failure.status) from None
            self.notes.append(
                f"{endpoint.url} {failure}; {endpoint.model} is used although the server gave no list of models"
            )
            return endpoint.model
        if endpoint.model is None:
            if not models:
                raise Failure(f"lists no model: load one, or name one with {self.model_flag}")
            chat_models = [name for name in models if not NO_CHAT.search(name)]
            endpoint.model = endpoint.client.one_line((chat_models or models)[0])
        elif endpoint.model not in models:
            listed = endpoint.client.one_line(", ".join(models[:SHOWN_MODELS])) or "none"
            self.notes.append(
                f"{endpoint.url} does not list {endpoint.model}, which is used anyway; listed models: {listed}"
            )
        return endpoint.model

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
        assert self.endpoint.probe is not None
        return self.endpoint.probe

    def change_form(self, **fields: Any) -> None:
        self.endpoint.probe = replace(self.form, **fields)

    async def probe(self) -> Probe:
        model = str(self.endpoint.model)
        self.endpoint.probe = Probe(
            url=self.endpoint.url, model=model, top_logprobs=self.protocol.top_logprobs
        )
        reply = await self._accepted_reply()
        if reply.thought and self.endpoint.by_logprobs:
            reply = await self._spaced_reply(reply)
        thinks = reply.thought
        if thinks and not self._scored(reply):
            reply = await self._reply_without_thoughts()
        if self.protocol.top_logprobs and not self._has_logprobs(reply):
            reply = await self._reply_by_other_means()
        if not self.endpoint.by_logprobs:
            await self._find_structure(json_too=not self.protocol.is_bare(CachedReply.of(reply)))
            if self.form.held_to != "nothing" and not self._scored(reply):
                reply = await self._ask(self.messages)
        self.change_form(tokens=reply.tokens, served=reply.model)
        seconds = await self._seconds_per_answer()
        scored = self._scored(reply)
        if not scored:
            self.notes.append(
                f"{model} gave no score for the first story; it replied {reply.text[:80]!r}"
            )
        elif not self.endpoint.by_logprobs and not self.protocol.is_bare(CachedReply.of(reply)):
            self.notes.append(
                f"{model} replies {reply.text[:40]!r}, and nothing constrains its replies: the first word counts"
            )
        return replace(
            self.form,
            reply=reply.text[:LONGEST_REPLY],
            scored=scored,
            thinks=thinks,
            seconds=seconds,
            notes=self.notes,
        )

    async def _ask(self, messages: list[dict], count: int = 1) -> Reply:
        """The first of `count` replies. Sets whether one request can have several replies."""
        now = asyncio.get_running_loop().time
        start = now()
        replies = await self.endpoint.chat(messages, self.options.seed, count)
        self.seconds.append(now() - start)
        if count > 1:
            self.change_form(choices=len(replies) == count)
        return replies[0]

    async def _try(self, messages: list[dict]) -> Reply | None:
        """The reply to these messages; None after a failure that concerns only this request."""
        try:
            return await self._ask(messages)
        except Failure as failure:
            if failure.fatal or failure.unreachable:
                raise
            return None

    def _scored(self, reply: Reply) -> bool:
        return self.protocol.reads(CachedReply.of(reply), self.endpoint.by_logprobs)

    def _has_scores(self, probe: Probe) -> bool:
        """Whether a cached reply, to the probe or to another request, can be read."""
        replies = [reply for _, reply in self.cache.items()]
        by_logprobs = bool(probe.top_logprobs)
        return probe.scored or any(self.protocol.reads(reply, by_logprobs) for reply in replies)

    def _has_logprobs(self, reply: Reply) -> bool:
        return self.endpoint.by_logprobs and len(reply.alternatives) > 1

    async def _accepted_reply(self) -> Reply:
        """The reply to the first story, after changing the form until the server accepts the
        request."""
        pool = ServerPool([self.endpoint])

        async def request(_: Endpoint) -> AsyncIterator[Reply]:
            try:
                yield await self._ask(self.messages)
            except Failure as failure:
                if failure.lost and self.form.top_logprobs:  # see `remedy`
                    failure.again = False
                raise

        while True:
            try:
                return await pool.ask(request)
            except Failure as failure:
                self.endpoint.probe = remedy(self.form, failure)

    async def _spaced_reply(self, reply: Reply) -> Reply:
        """A longer reply if the model begins with white space, else `reply`: a model that reasons
        looks the same if the reply has one token."""
        least_tokens = self.form.least_tokens
        self.change_form(least_tokens=max(least_tokens, SPACED_TOKENS))
        longer = await self._try(self.messages)
        if longer is not None and not longer.thought:
            return longer
        self.change_form(least_tokens=least_tokens)
        return reply

    async def _seconds_per_answer(self) -> float:
        """Seconds per answer while TIMED_STORIES are graded at once. If the server refuses one of
        them, and for a human, whose time is expensive: seconds of the slowest answer so far."""
        slowest = max(self.seconds)
        stories = TIMED_STORIES[: self.endpoint.most]
        if self.form.model == HUMAN:
            return slowest
        now = asyncio.get_running_loop().time
        start = now()
        replies = await asyncio.gather(*(self._try(self._messages(*story)) for story in stories))
        return slowest if None in replies else (now() - start) / len(stories)

    async def _reply_without_thoughts(self) -> Reply:
        """The reply of a model that reasons: with the first entry of QUIETER that stops the
        reasoning, else with a token limit of THINKING_TOKENS. Raises Failure if both fail."""
        accepted: Mapping[str, Any] = {}
        for quiet in QUIETER:
            # a parameter that was refused may be accepted without reasoning
            top_logprobs = self.protocol.top_logprobs
            self.change_form(quiet=quiet, refused=[], top_logprobs=top_logprobs)
            try:
                reply = await self._accepted_reply()
            except Failure as failure:
                if failure.fatal or failure.unreachable:
                    raise
                continue
            if self._scored(reply) or not reply.thought:
                return reply
            accepted = quiet
        self.change_form(quiet=accepted, least_tokens=THINKING_TOKENS, top_logprobs=0)
        reply = await self._accepted_reply()
        model = self.endpoint.model
        if reply.thought and not self._scored(reply):
            raise Failure(
                f"has a model, {model}, that reasons before it answers and gives no scores within {THINKING_TOKENS} "
                "tokens: choose a model that does not reason, or switch reasoning off on the server"
            )
        note = (
            f"reasoning of {model} cannot be switched off by {len(QUIETER)} known fields: a reply may cost up to "
            f"{THINKING_TOKENS} tokens"
        )
        if reply.tokens:
            note += f"; the first reply cost {reply.tokens[1]}"
        if self.options.role == "teacher":  # a judge has no such option
            note += (
                "; if the server has another field for it, give that field, for example --teacher-extra "
                '\'{"reasoning_effort": "none"}\''
            )
        self.notes.append(note)
        return reply

    async def _reply_by_other_means(self) -> Reply:
        """A reply if a chat completion has no log-probabilities: by /v1/responses, which may have
        them (LM Studio), else one of several draws, in one request if the server can."""
        can_be_quiet = self.form.least_tokens < THINKING_TOKENS
        if can_be_quiet:
            self.change_form(responses=True, top_logprobs=self.protocol.top_logprobs)
            with contextlib.suppress(Failure):
                reply = await self._ask(self.messages)
                if self._has_logprobs(reply):
                    return reply
        self.change_form(responses=False, top_logprobs=0)
        draws = self.protocol.draws
        self.notes.append(
            f"{self.endpoint.url} gives no log-probabilities of {self.endpoint.model}: each question is asked "
            f"{draws} times, and the fraction of yes is the answer"
        )
        with contextlib.suppress(Failure):
            return await self._ask(self.messages, draws)
        return await self._ask(self.messages)

    async def _find_structure(self, json_too: bool) -> None:
        """Set `held_to` to the first constraint that the server obeys, if any."""
        for structure in ["grammar", "json"] if json_too else ["grammar"]:
            self.change_form(held_to=structure)
            reply = await self._try(OFF_TOPIC)
            if reply is not None and self.protocol.is_bare(CachedReply.of(reply)):
                return
        self.change_form(held_to="nothing")
