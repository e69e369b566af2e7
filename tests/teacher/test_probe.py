"""The results of the probe, and how the client uses them."""

import json
import random
from dataclasses import asdict

import pytest
from aiohttp import web
from fault_server import FaultServer, assert_one_clean_sentence, completion, error, graded

from tinystory.run.errors import UserError
from tinystory.teacher.client import Teacher
from tinystory.teacher.grades import read_back
from tinystory.teacher.probe import load_probe
from tinystory.teacher.prompt import CRITERIA

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_the_probe_says_what_it_found():
    with FaultServer() as server, Teacher([server.url.removesuffix("/v1")]) as teacher:
        probe = teacher.probes[0]
        assert probe.url == server.url
        assert probe.model == "first"
        assert probe.token_cap == "max_tokens"
        assert probe.refused == []
        assert probe.reply == "2 1 3"
        assert probe.scored is True
        assert probe.quiet == {}
        assert probe.tokens is None
        assert probe.held_to == "nothing"
        assert load_probe(json.dumps(asdict(probe)), server.url) == probe
        assert load_probe('{"url": ""}', "") is load_probe("no", "") is None
        assert len(server.requests) == len(server.others) == 1
        line = str(probe)
        assert line.isprintable()
        assert f"first at {server.url}: scored a story" in line
        assert "reply constraint: nothing" in line


def test_a_server_is_probed_once_per_run(tmp_path):
    with FaultServer() as server:
        for _ in range(2):
            with Teacher([server.url], cache=tmp_path / "replies.jsonl") as teacher:
                probe = teacher.probes[0]
        assert probe.scored and len(server.requests) == len(server.others) == 1
        with Teacher([server.url], ["second"], cache=tmp_path / "replies.jsonl") as teacher:
            assert teacher.probes[0].model == "second"
        assert len(server.requests) == 2


def numbers_if_held(asked, *fields):
    """The reply of vLLM's or llama.cpp's server: animals, or whatever it is constrained to."""
    return "1 0 2" if set(fields) & asked.keys() else "fox, owl, badger"


@pytest.mark.parametrize("field", ["structured_outputs", "grammar"])
def test_a_server_that_obeys_is_held_to_numbers(field):
    with (
        FaultServer(other=lambda asked: numbers_if_held(asked, field)) as server,
        Teacher([server.url]) as teacher,
    ):
        assert teacher.probes[0].held_to == "grammar"
        assert len(server.others) == 1
        assert graded(teacher, "Once", ["A dog ran."])[0].scores
        assert server.requests[-1]["structured_outputs"] == {"regex": "[0-3] [0-3] [0-3]"}
        assert server.requests[-1]["grammar"] == 'root ::= [0-3] " " [0-3] " " [0-3]'


@pytest.mark.parametrize("at", range(3))
def test_a_request_refused_as_one_too_many_is_no_finding(at):
    class Busy(FaultServer):
        chats = 0

        async def _chat(self, request):
            self.chats += 1
            if self.chats == at + 1:
                return error(429, "slow down")
            return await super()._chat(request)

    other = lambda asked: numbers_if_held(asked, "grammar")  # noqa: E731
    with Busy(other=other) as server, Teacher([server.url]) as teacher:
        assert teacher.probes[0].scored and teacher.probes[0].held_to == "grammar"


@pytest.mark.parametrize("plain", [True, False])
def test_json_is_for_models_that_give_no_plain_numbers(plain):
    scores = json.dumps(dict.fromkeys(CRITERIA, 2))

    class Json(FaultServer):
        async def _chat(self, request):
            asked = await request.json()
            if "response_format" in asked:
                self.requests.append(asked)
                schema = asked["response_format"]["json_schema"]["schema"]
                assert set(schema["properties"]) == set(schema["required"]) == set(CRITERIA)
                return web.Response(text=completion(scores), content_type="application/json")
            if not plain and read_back(asked["messages"]):
                return web.Response(
                    text=completion("Well, I like it!"), content_type="application/json"
                )
            return await super()._chat(request)

    with Json() as server, Teacher([server.url], max_tokens=6) as teacher:
        probe = teacher.probes[0]
        assert probe.scored and probe.held_to == ("nothing" if plain else "json")
        (grade,) = graded(teacher, "Once", ["A dog ran."])
        assert grade.score == pytest.approx(2 / 3)
        assert ("response_format" in server.requests[-1]) != plain
        assert server.requests[-1]["max_tokens"] == teacher.longest_reply == (6 if plain else 44)


def test_an_option_that_is_accepted_and_ignored_is_not_used():
    dice = random.Random(0)
    animals = ["fox", "3 3 3!", "owl", "1, 2 and 3", '{"readability": 3}', "A hare."]
    with (
        FaultServer(other=lambda asked: dice.choice(animals)) as server,
        Teacher([server.url]) as teacher,
    ):
        assert teacher.probes[0].held_to == "nothing"
        graded(teacher, "Once", ["A dog ran."])
        assert not {"response_format", "grammar", "structured_outputs"} & server.requests[-1].keys()


def test_what_a_server_refuses_by_name_is_left_out():
    class Strict(FaultServer):
        async def _chat(self, request):
            for name in ("temperature", "seed", "max_tokens"):
                if name in await request.json():
                    other = " Use 'max_completion_tokens'." if name == "max_tokens" else ""
                    return error(
                        400,
                        f"Unsupported parameter: '{name}'.{other}",
                        code="unsupported_parameter",
                    )
            return await super()._chat(request)

    with Strict() as server, Teacher([server.url]) as teacher:
        probe = teacher.probes[0]
        assert probe.refused == ["seed", "temperature"]
        assert probe.token_cap == "max_completion_tokens"
        assert "no seed" in str(probe) and "no temperature" in str(probe)
        assert graded(teacher, "Once", ["A dog ran."])[0].error is None
        assert not {"seed", "temperature"} & server.requests[-1].keys()


def thought(text, thoughts="Let me see. The story ...", finish="length"):
    message = {"role": "assistant", "content": text, "reasoning_content": thoughts}
    return web.json_response({"choices": [{"message": message, "finish_reason": finish}]})


@pytest.mark.parametrize(
    "answer", [("", None), (None, "Hm, a cat."), ("<think>\nOkay, the user wants", "")]
)
def test_a_model_that_only_thinks_is_refused_with_a_reason(answer):
    class Thinker(FaultServer):
        async def _chat(self, request):
            self.requests.append(await request.json())
            return thought(*answer)

    with Thinker() as server, pytest.raises(UserError) as caught:
        Teacher([server.url])
    assert_one_clean_sentence(caught, server.url, "reasons before it answers", "4096 tokens")
    assert len(server.requests) == 1 + 5 + 1  # as it is, asked five times, and with more tokens


def test_a_model_that_can_be_told_not_to_think_is():
    class Qwen(FaultServer):
        async def _chat(self, request):
            asked = await request.json()
            if asked.get("chat_template_kwargs", {}).get("enable_thinking") is not False:
                return thought(None)
            return await super()._chat(request)

    with Qwen() as server, Teacher([server.url]) as teacher:
        probe = teacher.probes[0]
        assert probe.scored and "reasoning reduced by" in str(probe)
        assert probe.quiet == {
            "chat_template_kwargs": {"enable_thinking": False, "thinking": False}
        }
        assert graded(teacher, "Once", ["A dog ran."])[0].scores == dict(
            zip(CRITERIA, (2, 1, 3), strict=True)
        )
