"""Servers that refuse a request, in the shapes and statuses that were met in 2026: docs/teachers.md."""

import json

import pytest
from aiohttp import web
from fault_server import (
    FaultServer,
    Picky,
    assert_one_clean_sentence,
    completion,
    error,
    graded,
    scored,
)

from tinystory.run.errors import UserError
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import require_scores
from tinystory.teacher.grades import Grades

pytestmark = pytest.mark.usefixtures("short_pauses")


def gemini(status, message):
    return web.json_response(
        [{"error": {"code": status, "message": message, "status": "INVALID_ARGUMENT"}}],
        status=status,
    )


def openrouter(status, message):
    raw = json.dumps(
        {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            }
        }
    )
    return error(
        status,
        "Provider returned error",
        code=status,
        metadata={"raw": raw, "provider_name": "OpenAI"},
    )


def fastapi(status, message):
    return web.json_response(
        {"detail": [{"type": "extra_forbidden", "loc": ["body"], "msg": message}]}, status=status
    )


SHAPES = {
    "a JSON list": gemini,
    "a provider's own error within metadata": openrouter,
    "FastAPI's detail": fastapi,
    "an error as text": lambda status, message: web.json_response(
        {"error": message}, status=status
    ),
    "vLLM's error without an envelope": lambda status, message: web.json_response(
        {"object": "error", "message": message, "type": "BadRequestError", "code": status},
        status=status,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cause_of_a_refusal_is_read_in_every_shape(shape):
    def refuse(asked):
        return SHAPES[shape](400, "'seed' is not permitted") if "seed" in asked else None

    with Picky(refuse) as server, Teacher([server.url]) as teacher:
        assert teacher.probes[0].refused == ["seed"] and scored(teacher)
    with (
        Picky(lambda asked: SHAPES[shape](400, "the moon is full")) as server,
        pytest.raises(UserError) as caught,
    ):
        Teacher([server.url])
    assert_one_clean_sentence(caught, "the moon is full", "HTTP 400")


def test_a_parameter_that_is_named_only_by_its_place_is_left_out():
    body = {
        "detail": [
            {
                "type": "extra_forbidden",
                "loc": ["body", "seed"],
                "msg": "Extra inputs are not permitted",
            }
        ]
    }

    def refuse(asked):
        return web.json_response({"message": body}, status=422) if "seed" in asked else None

    with Picky(refuse) as server, Teacher([server.url]) as teacher:
        assert teacher.probes[0].refused == ["seed"]


def test_an_error_nested_without_end_is_read_to_a_depth():
    body = {"message": "at the top"}
    for _ in range(400):
        body = {"error": [body], "message": "around"}
    refuse = lambda asked: web.json_response(body, status=400)  # noqa: E731
    with (
        Picky(refuse) as server,
        pytest.raises(UserError) as caught,
    ):
        Teacher([server.url])
    assert_one_clean_sentence(caught, "around")


def test_one_flagged_story_costs_the_story_not_the_run():
    """OpenRouter answers 403 when the moderation flags an input."""
    flagged = error(
        403, "Your chosen model requires moderation and your input was flagged", code=403
    )
    script = lambda story, n: flagged if "wolf" in story else "2 1 3"  # noqa: E731
    with FaultServer(script) as server, Teacher([server.url]) as teacher:
        grades = graded(teacher, "Once", [f"Dog {i} ran." for i in range(19)] + ["A wolf ate."])
    assert [grade.score is None for grade in grades] == [False] * 19 + [True]
    assert "your input was flagged" in grades[-1].error and server.seen["A wolf ate."] == 1
    require_scores(grades, 0.1)
    with pytest.raises(UserError, match=r"1 of 20 stories got no score.*input was flagged"):
        require_scores(grades, 0.04)


def test_a_server_that_forbids_everything_is_one_sentence():
    refuse = lambda asked: error(403, "Forbidden")  # noqa: E731
    with (
        Picky(refuse) as server,
        pytest.raises(UserError) as caught,
    ):
        Teacher([server.url])
    assert_one_clean_sentence(caught, "HTTP 403", "OPENAI_API_KEY")


def test_529_is_overload_and_gets_fewer_requests():
    def script(story, n):
        return error(529, "Overloaded", type="overloaded_error") if n < 12 else "2 1 3"

    with FaultServer(script) as server, Teacher([server.url], concurrency=4) as teacher:
        assert scored(teacher)  # as with 429, it is no reason to give the story up
        assert teacher.endpoints[0].limit <= 2
    assert server.seen["A dog ran."] == 13


# Other forms of a request.


def below_minimum(asked):
    cap = asked["max_tokens"]
    if cap < 16:
        return openrouter(
            400,
            f"Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16, but got {cap} instead.",
        )
    return None


def test_a_server_that_wants_at_least_16_tokens_gets_them():
    replies = {
        "A dog ran.": "2 1 3",
        "A cat ran.": "2 1 3\n\nIt is a fine and simple story about a cat that runs.",
    }
    server = Picky(below_minimum, script=lambda story, n: replies[story])
    with server, Teacher([server.url], max_tokens=6) as teacher:
        probe = teacher.probes[0]
        assert (probe.least_tokens, teacher.longest_reply) == (16, 6)
        assert "at least 16" in str(probe)
        dog, cat = graded(teacher, "Once", list(replies))
    assert dog.scores
    assert cat.scores is None
    assert cat.reply == replies["A cat ran."]
    assert cat.reply_words == 3 * 6
    assert all(asked["max_tokens"] >= 16 for asked in server.requests)


@pytest.mark.parametrize(
    "status, message",
    [
        (400, "System role not supported"),  # Gemma 2 in vLLM
        (400, "Developer instruction is not enabled for models/gemma-3-27b-it"),  # Google
        (
            500,
            "Error: Jinja Exception: Conversation roles must alternate user/assistant/user/assistant/...",
        ),  # llama.cpp
        (500, "Only user, assistant and tool roles are supported, got system."),
    ],
)
def test_a_model_without_a_system_message_gets_the_rubric_first_in_the_users(status, message):
    def refuse(asked):
        return (
            error(status, message, code=status)
            if asked["messages"][0]["role"] == "system"
            else None
        )

    class Merged(Picky):
        async def _chat(self, request):
            asked = await request.json()
            text = asked["messages"][0]["content"]
            if asked["messages"][0]["role"] == "user" and text.startswith(Grades().instructions):
                self.requests.append(asked)
                return web.Response(text=completion("2 1 3"), content_type="application/json")
            return await super()._chat(request)

    with Merged(refuse) as server, Teacher([server.url]) as teacher:
        assert scored(teacher) and not teacher.probes[0].system
        assert "no system message" in str(teacher.probes[0])
        (message,) = server.requests[-1]["messages"]
        # refused once, and not retried
        assert "A dog ran." in message["content"] and len(server.all) == 1 + 1
