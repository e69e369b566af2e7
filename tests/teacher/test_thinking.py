"""Models that reason before they reply."""

import json

import pytest
from aiohttp import web
from fault_server import FaultServer, Picky, error, graded, scored

from tinystory.config import InteractConfig
from tinystory.evaluate.open_grader import open_grader
from tinystory.teacher.client import Teacher
from tinystory.teacher.probe import THINKING_TOKENS

pytestmark = pytest.mark.usefixtures("short_pauses")


def thinking(asked, finish="length"):
    cap = asked.get("max_completion_tokens") or asked["max_tokens"]
    usage = {"prompt_tokens": 400, "completion_tokens": cap}
    return web.json_response(
        {"choices": [{"message": {"content": ""}, "finish_reason": finish}], "usage": usage}
    )


def refuses(name, value):
    return error(
        400,
        f"Unsupported value: '{name}' does not support '{value}' with this model.",
        code="unsupported_value",
    )


def only_effort(*known, quiet_from):
    """A server that refuses template arguments and unknown efforts, with a model that answers at
    once with one of those efforts."""

    def refuse(asked):
        if "chat_template_kwargs" in asked:
            return error(400, "Unrecognized request argument supplied: chat_template_kwargs")
        effort = asked.get("reasoning_effort", "medium")
        if effort not in (*known, "medium"):
            return refuses("reasoning_effort", effort)
        return None if effort == quiet_from else thinking(asked)

    return refuse


LADDER = {
    # name: (what the server refuses or thinks about, the fields that are kept)
    "vLLM, SGLang and llama.cpp obey the template": (
        lambda asked: None if "chat_template_kwargs" in asked else thinking(asked),
        {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}},
    ),
    "Ollama ignores the template's arguments": (
        lambda asked: None if asked.get("reasoning_effort") == "none" else thinking(asked),
        {"reasoning_effort": "none"},
    ),
    "GPT-5 knows minimal, not none": (
        only_effort("minimal", "low", "high", quiet_from="minimal"),
        {"reasoning_effort": "minimal"},
    ),
    "gpt-oss knows neither": (
        only_effort("low", "high", quiet_from="low"),
        {"reasoning_effort": "low"},
    ),
}


@pytest.mark.parametrize("name", LADDER)
def test_a_model_that_thinks_is_told_less_and_less_until_it_answers(name, tmp_path):
    refuse, kept = LADDER[name]
    with Picky(refuse) as server:
        for _ in range(2):
            with Teacher([server.url], cache=tmp_path / "replies.jsonl") as teacher:
                probe = teacher.probes[0]
                assert probe.scored
                assert probe.quiet == kept
                assert not probe.least_tokens
                assert json.dumps(kept) in str(probe)
        assert len(server.all) <= 1 + 4 + 4  # each rung once, and the outcome is kept
        with Teacher([server.url], cache=tmp_path / "replies.jsonl") as teacher:
            assert scored(teacher)
        assert kept.items() <= server.all[-1].items() and server.all[-1]["max_tokens"] == 16
        assert (
            not ({"chat_template_kwargs", "reasoning_effort"} - kept.keys()) & server.all[-1].keys()
        )


@pytest.mark.parametrize("silent", [True, False])
def test_a_model_that_always_thinks_gets_more_tokens_and_the_user_hears_the_cost(silent, capsys):
    """Gemini 3 sends an empty reply that was cut; OpenAI answers 400 when the thoughts alone fill
    the cap."""
    full = "Could not finish the message because max_tokens or model output limit was reached. Please try again."

    def refuse(asked):
        if asked.get("reasoning_effort") in ("none", "minimal"):
            return refuses("reasoning_effort", asked["reasoning_effort"])
        if asked["max_tokens"] < 500:
            return thinking(asked) if silent else error(400, full, type="invalid_request_error")
        usage = {"prompt_tokens": 400, "completion_tokens": 321}
        message = {"content": "2 1 3", "reasoning_content": "Hm. 3 3 3"}
        return web.json_response(
            {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
        )

    with Picky(refuse) as server:
        config = InteractConfig(
            teacher_url=[server.url], teacher_max_tokens=6, price_out=10.0, price_in=1.0
        )
        with open_grader(config) as grader:
            assert graded(grader, "Once", ["A dog ran."])[0].reply_words == 3
            assert grader.most_words == 3 * 6  # reasoning is not read by the student
            assert "321 reply tokens" in grader.forecast(1, "Once")
        output = capsys.readouterr().out
    assert f"may cost up to {THINKING_TOKENS} tokens; the first reply cost 321" in output
    assert "cannot be switched off" in output
    assert server.all[-1]["max_tokens"] == THINKING_TOKENS
    assert server.all[-1]["reasoning_effort"] == "low"


def test_thoughts_that_a_server_leaves_in_the_text_are_no_part_of_the_reply():
    thoughtful = lambda story, n: "<think>\nReadable: 3 3 3\n</think>\n\n2 1 3"  # noqa: E731
    with FaultServer(thoughtful) as server, Teacher([server.url]) as teacher:
        assert scored(teacher)
    with (
        FaultServer(lambda story, n: "2 1 3 <think>or 3 3 3</think>") as server,
        Teacher([server.url]) as teacher,
    ):
        assert graded(teacher, "Once", ["A dog ran."])[0].scores is None
