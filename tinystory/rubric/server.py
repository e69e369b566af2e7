"""The built-in teacher: the rubric behind OpenAI's HTTP interface, on this machine only.

It stands in for an LLM and says so in /v1/models. It gets the same prompt as an LLM, measures the story in it and
replies "2 1 3". A prompt that does not ask for these three criteria gets a reply in words, without numbers.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tinystory.rubric.rubric import Rubric
from tinystory.teacher.prompt import CRITERIA, read_back
from tinystory.teacher.server import application, listening

MODEL = "tinystory-rubric"
DESCRIPTION = "A rubric measured on the text: a stand-in for an LLM, so that a run needs none. It only grades stories."
REFUSAL = (
    "I am a rubric that stands in for a language model. I can only grade a story for "
    f"{', '.join(CRITERIA)}, asked for in tinystory's own words; I find no such question here, so I give no grades."
)


@asynccontextmanager
async def serve(rubric: Rubric, port: int = 0) -> AsyncIterator[str]:
    """Serve on 127.0.0.1 for as long as the block runs, and yield the base URL. port: 0 takes a free one.

    Raises UserError if the port is not free.
    """

    async def reply(messages: list[dict]) -> str:
        question = read_back(messages)
        if question is None or ", ".join(CRITERIA) not in messages[0]["content"]:  # it asks for other criteria
            return REFUSAL
        scores = rubric.score(*question)
        return " ".join(str(scores[name]) for name in CRITERIA)

    async with listening(application(MODEL, DESCRIPTION, reply), port) as url:
        yield f"{url}/v1"
