"""What a server can do, found out by asking it: accepting an option is not obeying it."""

import dataclasses
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tinystory.teacher.api import Failure, Reply
from tinystory.teacher.score import TOP, expected_scores, parse_scores

# Asked for three words or a sentence, no model answers with grades unless something holds it to them.
OFF_TOPIC = [{"role": "user", "content": "Name three animals that live in a forest. Write their names and no number."}]
ANYTHING = [{"role": "user", "content": "Write one short sentence about any animal that you like."}]
JSON_TOKENS = 12  # for each criterion: a key, a colon, a digit, a comma and some white space
# How servers are told not to think: vLLM, SGLang and llama.cpp by the chat template, Ollama by the effort.
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "none"}
LOGPROBS = {"logprobs": True, "top_logprobs": 10}  # servers give up to 20, but a reply is no longer than LONGEST_ANSWER


@dataclass(frozen=True)
class Probe:
    """One model of one server."""

    url: str
    model: str
    reply: str  # to a first story
    scored: bool  # whether that held scores
    token_cap: str  # the name that it has for the longest reply: max_tokens or max_completion_tokens
    refused: tuple[str, ...]  # of temperature, seed: what it answers with an error and so is not sent
    thinks: bool  # whether hidden reasoning came before the reply
    quiet: bool  # whether it has to be told not to think, and obeys
    structure: str  # what it can be held to: "numbers", "json" or "nothing"
    held_to: str  # what it is held to: JSON, of more words, only if it gives no plain numbers by itself
    seed: bool  # whether the same seed brought the same sentence
    logprobs: bool  # whether log-probabilities came
    tokens: tuple[int, int] | None  # (prompt, completion) of the first story; None where it does not count
    seconds: float  # of the fastest answer: the first may have had to wait until the model was loaded

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
        """What `dump` wrote; None for anything else, such as what another version of this program wrote."""
        try:
            found = json.loads(text)
            found["refused"] = tuple(found["refused"])
            found["tokens"] = found["tokens"] and tuple(found["tokens"])
            return cls(**found)
        except (ValueError, TypeError, KeyError):
            return None


def options(structure: str, names: Sequence[str]) -> dict:
    """The fields of a request that hold a reply to grades for `names`."""
    match structure:
        case "numbers":  # vLLM reads the first and ignores the second; llama.cpp's server the other way round
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


def think(reply: Reply) -> bool:
    """Whether the model reasoned before it replied, seen or unseen."""
    return reply.thoughts > 0 or "<think>" in reply.text[:20] or (not reply.text.strip() and reply.finish == "length")


async def find_structure(ask: Callable[..., Awaitable[Reply]], names: Sequence[str], max_tokens: int) -> str:
    """The first structure that the server obeys, "nothing" where it obeys none: at most two requests."""
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
    """Whether a seed repeats a sentence drawn at temperature 1, and whether log-probabilities come: at most three
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


async def weighs(ask: Callable[[], Awaitable[Reply]], names: Sequence[str]) -> bool:
    """Whether expected scores can be made of a reply, if it holds scores at all."""
    try:
        reply = await ask()
    except Failure as failure:
        if failure.fatal or failure.unreachable or failure.again:
            raise
        return False  # refused by name
    return parse_scores(reply.text, names) is None or expected_scores(reply.text, names, reply.logprobs) is not None


def json_tokens(names: Sequence[str]) -> int:
    return JSON_TOKENS * len(names) + 8
