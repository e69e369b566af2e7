"""What a server can do and how it wants to be asked, found out by experiment: a server that accepts an option may still
ignore it."""

import dataclasses
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinystory.teacher.api import NO_SYSTEM, Failure, Reply
from tinystory.teacher.grade import LONGEST_REPLY, expected_scores, parse_scores
from tinystory.teacher.prompt import TOP

# Asked for animals or a sentence, a model answers with scores only if the server constrains it to them.
OFF_TOPIC = [{"role": "user", "content": "Name three animals that live in a forest. Write their names and no number."}]
ANYTHING = [{"role": "user", "content": "Write one short sentence about any animal that you like."}]
NO_CHAT = re.compile(r"embed|rerank|moderation|whisper|\btts\b|dall-e|minilm|\bbge-", re.IGNORECASE)  # names of models
JSON_TOKENS = 12  # per criterion: a key, a colon, a digit, a comma and some whitespace
LOGPROBS = {"logprobs": True, "top_logprobs": 10}  # servers allow up to 20, but the answer must fit LONGEST_ANSWER
# How a model is told to reason less, one after the other: in the chat template (vLLM, SGLang, llama.cpp), by the effort
# (Ollama and later versions of the others; gpt-oss and Gemini know no "none", GPT-5 no less than "minimal").
QUIETER: tuple[dict[str, Any], ...] = (
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"reasoning_effort": "none"},
    {"reasoning_effort": "minimal"},
    {"reasoning_effort": "low"},
)
THINKING_TOKENS = 4096  # cap of a reply by a model that reasons whatever it is told


@dataclass(frozen=True, kw_only=True)
class Form:
    """The form of a request."""

    token_cap: str = "max_tokens"  # the server's name for the longest reply: max_tokens or max_completion_tokens
    least_tokens: int = 0  # the smallest value of it that is sent
    refused: tuple[str, ...] = ()  # parameters that the server refuses, which are not sent
    quiet: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields that make the model reason less
    system: bool = True  # False: the rubric opens the user's message, for models without a system message

    def request(self, messages: list[dict], max_tokens: int, **fields: Any) -> dict[str, Any]:
        """The arguments of a chat completion. max_tokens: of the reply that is wanted."""
        asked = {name: value for name, value in fields.items() if name not in self.refused}
        if self.quiet:
            asked["extra_body"] = {**asked.get("extra_body", {}), **self.quiet}
        if not self.system and len(messages) > 1:
            messages = [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]
        return {"messages": messages, **asked, self.token_cap: max(max_tokens, self.least_tokens)}


def _without(name: str) -> Callable[[Form, re.Match], Form]:
    return lambda form, _: replace(form, refused=tuple(sorted({*form.refused, name})))


# What a refusal says, and the form of request that mends it.
MENDS: tuple[tuple[re.Pattern, Callable[[Form, re.Match], Form]], ...] = (
    (re.compile("max_completion_tokens"), lambda form, _: replace(form, token_cap="max_completion_tokens")),
    (re.compile(r"\btemperature\b"), _without("temperature")),
    (re.compile(r"\bseed\b"), _without("seed")),
    (
        re.compile(r"(?:>=|at least|minimum (?:value )?(?:of|is)|greater than or equal to)\D{0,12}([0-9]{1,3})\b"),
        lambda form, found: replace(form, least_tokens=int(found[1])),
    ),
    (NO_SYSTEM, lambda form, _: replace(form, system=False)),
)


def mended(form: Form, failure: Failure) -> Form:
    """The first form that `failure` asks for and that differs from `form`. Raises `failure` if there is none."""
    if failure.status in (400, 422, 500):
        for pattern, change in MENDS:
            found = pattern.search(str(failure))
            if found and (changed := change(form, found)) != form:
                return changed
    raise failure


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
    seed: bool  # whether the same seed gave the same sentence
    logprobs: bool  # whether log-probabilities came
    tokens: tuple[int, int] | None  # (prompt, completion) of the probe's story; None if the server does not count
    seconds: float  # of the fastest answer: the first may have waited until the model was loaded
    notes: tuple[str, ...]  # what the user should know

    def __str__(self) -> str:
        found = [
            "scored a story" if self.scored else f"gave no scores but {self.reply[:60]!r}",
            self.token_cap + f" at least {self.least_tokens}" * bool(self.least_tokens),
            "obeys no structure" if self.structure == "nothing" else f"obeys {self.structure}",
            "seed repeats" if self.seed else "seed does not repeat",
            "logprobs" if self.logprobs else "no logprobs",
            *(f"no {name}" for name in self.refused),
            *["no system message"] * (not self.system),
            *["thinks"] * self.thinks,
            *[f"told not to think by {json.dumps(self.quiet)}"] * bool(self.quiet),
            f"{self.seconds:.2f} s",
        ]
        return f"{self.model} at {self.url}: {', '.join(found)}"

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def load(cls, text: str) -> "Probe | None":
        """The inverse of `dump`; None for any other text, such as one from another version of this program."""
        try:
            found = json.loads(text)
            for name in ("refused", "notes"):
                found[name] = tuple(found[name])
            found["tokens"] = found["tokens"] and tuple(found["tokens"])
            return cls(**found)
        except (ValueError, TypeError, KeyError):
            return None


async def find_out(
    ask: Callable[..., Awaitable[Reply]],
    patiently: Callable[..., Awaitable[Reply]],
    messages: list[dict],
    *,
    url: str,
    model: str,
    names: Sequence[str],
    max_tokens: int,
    logprobs: bool,
    notes: Sequence[str],
    **sampling: Any,
) -> Probe:
    """The probe of a server, by about eight requests of the form `ask(form, messages, max_tokens=..., ...)`;
    `patiently` is `ask` with retries. messages: a story to grade for `names`; notes: what is known already.

    Raises Failure if the server gives no usable answer, or not what `logprobs` needs.
    """
    seconds: list[float] = []
    form = Form()

    async def timed(how: Callable[..., Awaitable[Reply]], form: Form, *question: Any, **fields: Any) -> Reply:
        began = time.monotonic()
        reply = await how(form, *question, **fields)
        seconds.append(time.monotonic() - began)
        return reply

    async def asked(question: list[dict], **fields: Any) -> Reply:
        return await timed(ask, form, question, **fields)

    first: Reply | None = None
    while first is None:
        try:
            first = await timed(patiently, form, messages, max_tokens=max_tokens, **sampling)
        except Failure as failure:
            form = mended(form, failure)
    thinks, scored = thought(first), parse_scores(first.text, names) is not None
    notes = [*notes]
    if thinks and not scored:
        told = form.quiet
        for quiet in (*QUIETER, None):  # None: as much as it will, told what it accepts
            form = replace(form, quiet=told if quiet is None else quiet)
            if quiet is None:
                form = replace(form, least_tokens=THINKING_TOKENS)
            try:
                first = await asked(messages, max_tokens=max_tokens, **sampling)
            except Failure as failure:
                if failure.fatal or failure.unreachable:
                    raise
                continue
            scored = parse_scores(first.text, names) is not None
            if scored or not thought(first):
                break
            told = quiet if quiet is not None else told
        else:
            raise Failure(
                f"has a model, {model}, that thinks before it answers, and {THINKING_TOKENS} tokens hold no scores: "
                "choose a model that does not, or switch its thinking off on the server"
            )
        if form.least_tokens == THINKING_TOKENS:
            used = f"; it used {first.tokens[1]} for the first story" if first.tokens else ""
            notes.append(f"{model} cannot be told not to think: a reply may cost up to {THINKING_TOKENS} tokens{used}")
    structure = await find_structure(asked, names, max_tokens)
    held_to = "nothing" if structure == "json" and scored else structure
    if held_to != "nothing" and not scored:
        first = await asked(messages, max_tokens=max(max_tokens, json_tokens(names)), **options(held_to, names))
        scored = parse_scores(first.text, names) is not None
    if logprobs:
        weighed = {**sampling, **options(held_to, names), **LOGPROBS}
        if not await allows_expected_scores(lambda: asked(messages, max_tokens=max_tokens, **weighed), names):
            raise Failure(
                f"has a model, {model}, that gives no log-probabilities of the single digits of its scores: leave "
                "--teacher-logprobs out, or ask a server that does"
            )
    repeats, weighs = await find_seed_and_logprobs(asked)
    if not scored:
        notes.append(f"{model} was shown a story and gave no scores but {first.text[:80]!r}")
    return Probe(
        **{field.name: getattr(form, field.name) for field in dataclasses.fields(Form)},
        url=url, model=model, reply=first.text[:LONGEST_REPLY], scored=scored, thinks=thinks, structure=structure,
        held_to=held_to, seed=repeats, logprobs=weighs, tokens=first.tokens, seconds=min(seconds), notes=tuple(notes),
    )  # fmt: skip


def options(structure: str, names: Sequence[str]) -> dict:
    """The fields of a request that constrain a reply to scores for `names`."""
    match structure:
        case "numbers":  # vLLM obeys the first field, llama.cpp's server the second; each ignores the other
            grade = f"[0-{TOP}]"
            grammar = "root ::= " + ' " " '.join([grade] * len(names))
            return {"extra_body": {"structured_outputs": {"regex": " ".join([grade] * len(names))}, "grammar": grammar}}
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


def thought(reply: Reply) -> bool:
    """Whether the model reasoned before it replied, visibly or not."""
    return reply.thoughts > 0 or "<think>" in reply.text[:20] or (not reply.text.strip() and reply.finish == "length")


async def find_structure(ask: Callable[..., Awaitable[Reply]], names: Sequence[str], max_tokens: int) -> str:
    """The first structure that the server obeys, "nothing" if it obeys none: at most two requests."""
    for structure, most in (("numbers", max_tokens), ("json", json_tokens(names))):
        try:
            reply = await ask(OFF_TOPIC, max_tokens=most, **options(structure, names))
        except Failure as failure:
            if failure.fatal or failure.unreachable:
                raise
            continue
        if parse_scores(reply.text, names) is not None:
            return structure
    return "nothing"


async def find_seed_and_logprobs(ask: Callable[..., Awaitable[Reply]]) -> tuple[bool, bool]:
    """Whether a seed reproduces a sentence drawn at temperature 1, and whether log-probabilities come: at most three
    requests."""
    same = dict(max_tokens=16, temperature=1.0, seed=7)
    try:
        try:
            first = await ask(ANYTHING, **LOGPROBS, **same)
        except Failure as failure:
            if failure.status != 400:
                raise
            first = await ask(ANYTHING, **same)
        second = await ask(ANYTHING, **same)
    except Failure as failure:
        if failure.fatal or failure.unreachable:
            raise
        return False, False
    return bool(first.text.strip()) and first.text == second.text, bool(first.logprobs)


async def allows_expected_scores(ask: Callable[[], Awaitable[Reply]], names: Sequence[str]) -> bool:
    """Whether a reply that holds scores comes with what expected scores need; True if it holds none."""
    try:
        reply = await ask()
    except Failure as failure:
        if failure.fatal or failure.unreachable or failure.again:
            raise
        return False  # the server refuses log-probabilities
    return parse_scores(reply.text, names) is None or expected_scores(reply.text, names, reply.logprobs) is not None


def json_tokens(names: Sequence[str]) -> int:
    return JSON_TOKENS * len(names) + 8
