"""What a server can do, found out by experiment: a server that accepts an option may still ignore it."""

import dataclasses
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tinystory.teacher.api import Failure, Reply
from tinystory.teacher.grade import expected_scores, parse_scores
from tinystory.teacher.prompt import TOP

# Asked for animals or a sentence, a model answers with scores only if the server constrains it to them.
OFF_TOPIC = [{"role": "user", "content": "Name three animals that live in a forest. Write their names and no number."}]
ANYTHING = [{"role": "user", "content": "Write one short sentence about any animal that you like."}]
OPTIONAL = ("temperature", "seed")  # parameters that are left out where the server's error names them
JSON_TOKENS = 12  # per criterion: a key, a colon, a digit, a comma and some whitespace
# How to switch reasoning off: for vLLM, SGLang and llama.cpp in the chat template, for Ollama by the effort.
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "none"}
LOGPROBS = {"logprobs": True, "top_logprobs": 10}  # servers allow up to 20, but the answer must fit LONGEST_ANSWER


@dataclass(frozen=True)
class Probe:
    """The capabilities of one model on one server."""

    url: str
    model: str
    reply: str  # to the probe's story
    scored: bool  # whether that reply held scores
    token_cap: str  # the server's name for the longest reply: max_tokens or max_completion_tokens
    refused: tuple[str, ...]  # the OPTIONAL parameters that it refuses, which are not sent
    thinks: bool  # whether the model reasons before it replies
    quiet: bool  # whether reasoning must be switched off in each request, which works
    structure: str  # the strictest constraint on a reply that works: "numbers", "json" or "nothing"
    held_to: str  # the constraint used: "json", which has more words, only if the model gives no numbers without it
    seed: bool  # whether the same seed gave the same sentence
    logprobs: bool  # whether log-probabilities came
    tokens: tuple[int, int] | None  # (prompt, completion) of the probe's story; None if the server does not count
    seconds: float  # of the fastest answer: the first may have waited until the model was loaded

    def __str__(self) -> str:
        found = [
            "scored a story" if self.scored else f"gave no scores but {self.reply[:60]!r}",
            self.token_cap,
            "obeys no structure" if self.structure == "nothing" else f"obeys {self.structure}",
            "seed repeats" if self.seed else "seed does not repeat",
            "logprobs" if self.logprobs else "no logprobs",
            *(f"no {name}" for name in self.refused),
            *["thinks"] * self.thinks,
            *["told not to think"] * self.quiet,
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
            found["refused"] = tuple(found["refused"])
            found["tokens"] = found["tokens"] and tuple(found["tokens"])
            return cls(**found)
        except (ValueError, TypeError, KeyError):
            return None


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
