"""Probe a server's capabilities and request form by experiment: a server may accept an option and
ignore it."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from tqdm import tqdm

from tinystory.run.records import Fields, parse_object
from tinystory.teacher.api import NO_SYSTEM, Failure, Reply, is_count_pair
from tinystory.teacher.cache import Cache, CachedReply
from tinystory.teacher.endpoint import PROBE, Endpoint, Probe
from tinystory.teacher.parse import LONGEST_REPLY, parse_scores
from tinystory.teacher.pool import ServerPool
from tinystory.teacher.prompt import fence, render

HUMAN = "human"  # the model's name if a human grades (scripts/teach.py)
HUMAN_S = 20.0  # seconds in which a human answers, until it is known
PATIENCE_S = 3 * 86_400.0  # time limit for a human
FIRST_STORY = "Once upon a time,", "a cat sat down by the fire and slept."  # opening and story
# Asked for animals, a model answers with scores only if the server constrains it to them.
OFF_TOPIC = [
    {
        "role": "user",
        "content": "Name three animals that live in a forest. Write their names and no number.",
    }
]
# names of models
NO_CHAT = re.compile(r"embed|rerank|moderation|whisper|\btts\b|dall-e|minilm|\bbge-", re.IGNORECASE)
# Ways to make a model reason less, tried in this order: by the chat template (vLLM, SGLang,
# llama.cpp), by the effort (Ollama and later versions of the others; gpt-oss and Gemini have no
# "none", GPT-5 nothing below "minimal").
QUIETER: tuple[dict[str, Any], ...] = (
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"reasoning_effort": "none"},
    {"reasoning_effort": "minimal"},
    {"reasoning_effort": "low"},
)
THINKING_TOKENS = 4096  # token limit of a reply if none of them works
STRUCTURES = ("numbers", "json", "nothing")
REFUSABLE = ("temperature", "seed")
PROBE_VALUES: dict[str, Container[Any]] = {
    "token_cap": ("max_tokens", "max_completion_tokens"),
    "least_tokens": range(THINKING_TOKENS + 1),
    "quiet": ({}, *QUIETER),
    "structure": STRUCTURES,
    "held_to": STRUCTURES,
}
# The types of a probe's fields in JSON.
PROBE_FIELDS: Fields = {
    name: (type(value),)
    for name, value in json.loads(json.dumps(asdict(Probe(url="", model="")))).items()
}
PROBE_FIELDS |= {"tokens": (list, type(None)), "seconds": (int, float)}
LONGEST_S = 1e6  # bound on an answer's duration
LEAST = re.compile(
    r"(?:>=|at least|minimum (?:value )?(?:of|is)|greater than or equal to)\D{0,12}([0-9]{1,3})\b"
)
# Pattern in an error message -> fields of the form to change.
REMEDIES: tuple[tuple[re.Pattern, Callable[[Probe, re.Match], dict[str, Any]]], ...] = (
    (
        re.compile("max_completion_tokens"),
        lambda form, words: {"token_cap": "max_completion_tokens"},
    ),
    (
        re.compile(rf"\b({'|'.join(REFUSABLE)})\b"),
        lambda form, words: {"refused": tuple(sorted({*form.refused, words[1]}))},
    ),
    (LEAST, lambda form, words: {"least_tokens": int(words[1])}),
    (NO_SYSTEM, lambda form, words: {"system": False}),
)


def load_probe(text: str, url: str) -> Probe | None:
    """Parse the probe of the server at `url` from JSON. None for any other text, such as another
    version's probe, and for one that no server can have led to: its fields go into all requests."""
    try:
        record = parse_object(text, PROBE_FIELDS)
    except ValueError:
        return None
    if record["url"] != url or not is_possible(record):
        return None
    for name in ("refused", "tokens", "notes"):
        if record[name] is not None:
            record[name] = tuple(record[name])
    return Probe(**record)


def is_possible(record: Mapping[str, Any]) -> bool:
    """Whether `Prober` can have made a probe of these fields."""
    texts = [record["model"], *record["notes"]]
    return (
        record.keys() == PROBE_FIELDS.keys()
        and all(record[name] in values for name, values in PROBE_VALUES.items())
        and all(name in REFUSABLE for name in record["refused"])
        and all(isinstance(text, str) and text.isprintable() for text in texts)
        and (record["tokens"] is None or is_count_pair(record["tokens"]))
        and 0 < record["seconds"] < LONGEST_S
    )


def remedy(form: Probe, failure: Failure) -> Probe:
    """`form`, changed as the error message demands. Raises `failure` if no remedy changes it."""
    if failure.status in (400, 422, 500):
        for pattern, change in REMEDIES:
            for match in pattern.finditer(failure.message):
                changed = replace(form, **change(form, match))
                if changed != form:
                    return changed
    raise failure


class Prober:
    """Probes one server. All methods raise Failure if the server gives no usable answer."""

    def __init__(self, server: Endpoint, cache: Cache):
        options = server.options
        self.server = server
        self.cache = cache
        self.endpoint = replace(server)  # a copy, whose probe changes with each experiment
        self.options = options
        self.pool = ServerPool([self.endpoint], probing=True)
        self.names = options.template.names
        mark = fence(options.seed, -1, "\n".join(FIRST_STORY))
        self.messages = render(*FIRST_STORY, fence=mark, template=options.template)
        self.notes: list[str] = []
        self.unlisted = ""  # the listed models, if the named one is not among them
        self.seconds: list[float] = []

    async def examine(self) -> None:
        """Set the server's model and probe. A cached probe also serves while the server cannot be
        reached."""
        server = self.server
        try:
            server.model = await self.choose_model()
        except Failure as failure:
            cached = self.cached_probe()
            if cached is None or not failure.unreachable:
                raise
            server.model = cached.model
            server.probe = cached
            tqdm.write(
                f"warning: the teacher at {server.url} {failure}; until then, kept replies will do"
            )
            return
        probe = self.cached_probe()
        # A cached probe without scores is repeated, unless the run got scores in spite of it.
        if probe is None or not (probe.scored or self.has_cached_scores()):
            probe = await self.probe()
            reply = CachedReply(json.dumps(asdict(probe)))
            self.cache.put(server.probe_key(server.model), reply, again=True)
        server.probe = probe
        if server.model == HUMAN:  # a human may take a break
            self.options.deadline_s = PATIENCE_S
            server.slots.shortest = PATIENCE_S

    def cached_probe(self) -> Probe | None:
        """The newest cached probe of this server that was made with the current options."""
        server = self.server
        for key, reply in reversed(list(self.cache.items())):
            if not key.startswith(PROBE):
                continue
            probe = load_probe(reply.text, server.url)
            if probe is None or key != server.probe_key(probe.model):
                continue
            if server.model in (None, probe.model):
                return probe
        return None

    def has_cached_scores(self) -> bool:
        """Whether any cached reply holds scores."""
        return any(parse_scores(reply.text, self.names) for _, reply in self.cache.items())

    async def choose_model(self) -> str:
        """The named model, else the first chat model that the server lists."""
        endpoint = self.endpoint
        try:
            answer = await self.pool.ask(lambda endpoint: endpoint.client.models(), exists=False)
        except Failure as failure:
            if failure.status is None:
                raise
            if endpoint.model is None:
                message = f"{failure} (where models are not listed, name one with --teacher-model)"
                raise Failure(message, status=failure.status) from None
            self.notes.append(
                f"{endpoint.url} {failure}; {endpoint.model} is tried without a list of models"
            )
            return endpoint.model
        models = answer.value
        if endpoint.model is None:
            if not models:
                raise Failure("lists no model: load one, or name it with --teacher-model")
            chat_models = [name for name in models if not NO_CHAT.search(name)]
            endpoint.model = (chat_models or models)[0]
        elif endpoint.model not in models:
            self.unlisted = endpoint.client.one_line(", ".join(models)) or "none"
            self.notes.append(
                f"{endpoint.url} does not list {endpoint.model}, which is tried; it lists: {self.unlisted}"
            )
        return endpoint.model

    @property
    def form(self) -> Probe:
        assert self.endpoint.probe is not None
        return self.endpoint.probe

    def change_form(self, **fields: Any) -> None:
        self.endpoint.probe = replace(self.form, **fields)

    async def probe(self) -> Probe:
        model = str(self.endpoint.model)
        self.endpoint.probe = Probe(url=self.endpoint.url, model=model)
        reply = await self._first_reply()
        thinks = reply.thought
        if thinks and not self._scored(reply):
            reply = await self._reply_without_thoughts()
        await self._find_structure()
        if self.form.held_to == "json" and self._scored(reply):
            self.change_form(held_to="nothing")
        if self.form.held_to != "nothing" and not self._scored(reply):
            reply = await self._ask(self.messages)
        scored = self._scored(reply)
        if not scored:
            self.notes.append(
                f"{model} was shown a story and gave no scores but {reply.text[:80]!r}"
            )
        return replace(
            self.form,
            reply=reply.text[:LONGEST_REPLY],
            scored=scored,
            thinks=thinks,
            tokens=reply.tokens,
            seconds=min(self.seconds),
            notes=tuple(self.notes),
        )

    async def _ask(self, messages: list[dict]) -> Reply:
        start = time.monotonic()
        chat = self.endpoint.chat(messages, self.options.seed, self.names)
        try:
            reply = await asyncio.wait_for(chat, self.options.timeout_s)
        except asyncio.TimeoutError:
            raise Failure("takes too long to answer", again=True) from None
        self.seconds.append(time.monotonic() - start)
        return reply

    async def _try(self, messages: list[dict]) -> Reply | None:
        """`_ask`, but None after a failure that does not concern other requests."""
        try:
            return await self._ask(messages)
        except Failure as failure:
            if failure.fatal or failure.unreachable:
                raise
            return None

    def _scored(self, reply: Reply) -> bool:
        return parse_scores(reply.text, self.names) is not None

    async def _first_reply(self) -> Reply:
        """The reply to the story, after changing the form until the server accepts it."""
        while True:
            try:
                answer = await self.pool.ask(lambda _: self._ask(self.messages))
                return answer.value
            except Failure as failure:
                if failure.status == 404 and self.unlisted:
                    message = f"has no model {self.endpoint.model!r} ({failure}); it lists: {self.unlisted}"
                    raise Failure(message, status=404) from None
                self.endpoint.probe = remedy(self.form, failure)

    async def _reply_without_thoughts(self) -> Reply:
        """Try QUIETER in turn on a model that reasons, then a limit of THINKING_TOKENS."""
        accepted: Mapping[str, Any] = {}
        for quiet in QUIETER:
            self.change_form(quiet=quiet)
            reply = await self._try(self.messages)
            if reply is None:
                continue
            if self._scored(reply) or not reply.thought:
                return reply
            accepted = quiet
        self.change_form(quiet=accepted, least_tokens=THINKING_TOKENS)
        reply = await self._try(self.messages)
        model = self.endpoint.model
        if reply is None or (reply.thought and not self._scored(reply)):
            raise Failure(
                f"has a model, {model}, that thinks before it answers, and {THINKING_TOKENS} tokens hold no scores: "
                "choose a model that does not, or switch its thinking off on the server"
            )
        note = (
            f"{model} cannot be told not to think: a reply may cost up to {THINKING_TOKENS} tokens"
        )
        if reply.tokens:
            note += f"; it used {reply.tokens[1]} for the first story"
        self.notes.append(note)
        return reply

    async def _find_structure(self) -> None:
        """Use the first structure that the server obeys, if any, after at most two requests."""
        for structure in ("numbers", "json"):
            self.change_form(structure=structure, held_to=structure)
            reply = await self._try(OFF_TOPIC)
            if reply is not None and self._scored(reply):
                return
        self.change_form(structure="nothing", held_to="nothing")


def with_oldest_probe(endpoints: Sequence[Endpoint], cache: Cache) -> Endpoint:
    """The one whose probe is the oldest in the cache."""
    by_key = {endpoint.probe_key(endpoint.model): endpoint for endpoint in endpoints}
    return next(by_key[key] for key, _ in cache.items() if key in by_key)
