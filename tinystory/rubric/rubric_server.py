"""The rubric as a server with OpenAI's chat completions API. It replies "2 1 3" to our prompt for
its criteria, and without numbers to any other request."""

from contextlib import AbstractAsyncContextManager

from tinystory.rubric.rubric import Rubric
from tinystory.teacher.chat_server import application, listening
from tinystory.teacher.grades import read_back
from tinystory.teacher.prompt import CRITERIA

MODEL = "tinystory-rubric"
DESCRIPTION = (
    "A rule-based scorer of stories that takes the place of an LLM. It only grades stories."
)
REFUSAL = (
    "This server is a rule-based scorer, not a language model. It grades a story only for "
    f"{', '.join(CRITERIA)}, and only by tinystory's own prompt. This request has another form, so there are no grades."
)


def serve(rubric: Rubric, port: int = 0) -> AbstractAsyncContextManager[str]:
    """Yields the URL of the rubric, served during the block; see `listening`."""

    async def reply(messages: list[dict]) -> str:
        question = read_back(messages)
        # the request asks for other criteria
        if question is None or ", ".join(CRITERIA) not in messages[0]["content"]:
            return REFUSAL
        scores = rubric.score(*question)
        return " ".join(str(scores[name]) for name in CRITERIA)

    return listening(application(MODEL, DESCRIPTION, reply), port)
