"""The rubric behind OpenAI's HTTP interface: replies "2 1 3" to our prompt for its criteria, else
without numbers."""

from contextlib import AbstractAsyncContextManager

from tinystory.rubric.rubric import Rubric
from tinystory.teacher.chat_server import application, listening
from tinystory.teacher.prompt import CRITERIA, read_back

MODEL = "tinystory-rubric"
DESCRIPTION = "A rubric measured on the text: a stand-in for an LLM, so that a run needs none. It only grades stories."
REFUSAL = (
    "I am a rubric that stands in for a language model. I can only grade a story for "
    f"{', '.join(CRITERIA)}, asked for in tinystory's own words; I find no such question here, so I give no grades."
)


def serve(rubric: Rubric, port: int = 0) -> AbstractAsyncContextManager[str]:
    """Serve the rubric during the block; see `listening`."""

    async def reply(messages: list[dict]) -> str:
        question = read_back(messages)
        # it asks for other criteria
        if question is None or ", ".join(CRITERIA) not in messages[0]["content"]:
            return REFUSAL
        scores = rubric.score(*question)
        return " ".join(str(scores[name]) for name in CRITERIA)

    return listening(application(MODEL, DESCRIPTION, reply), port)
