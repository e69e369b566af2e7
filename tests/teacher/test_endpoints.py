"""Servers as they were met in 2026, each by a FaultServer that answers with its statuses and
bodies: the table in docs/teachers.md. A run asks every one of them, or says in one sentence why it
cannot."""

import json

import pytest
from aiohttp import web
from fault_server import FaultServer, assert_one_clean_sentence, completion, error

from tinystory.config import InteractConfig
from tinystory.run.errors import Stop, UserError
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import require_scores
from tinystory.teacher.grader import load_extra, open_grader
from tinystory.teacher.probe import THINKING_TOKENS
from tinystory.teacher.prompt import CRITERIA, instructions

pytestmark = pytest.mark.usefixtures("short_pauses")


class Picky(FaultServer):
    """Answers `refuse(asked)` if that is not None, else like any server."""

    def __init__(self, refuse, **more):
        super().__init__(**more)
        self.refuse, self.all = refuse, []

    async def _chat(self, request):
        asked = await request.json()
        self.all.append(asked)
        refused = self.refuse(asked)
        return await super()._chat(request) if refused is None else refused


def scored(teacher) -> bool:
    (grade,) = teacher.grade("Once", ["A dog ran."])
    return grade.scores == dict(zip(CRITERIA, (2, 1, 3), strict=True))


# The list of models.


@pytest.mark.parametrize(
    "models",
    [
        lambda: web.Response(status=404, text="404 page not found"),
        lambda: error(401, "x-api-key header is required", type="authentication_error"),
        lambda: error(403, "not for you"),
        lambda: web.json_response({"models": ["claude"]}),
        lambda: web.json_response({"data": []}),
    ],
)
def test_a_server_that_does_not_list_its_models_is_tried_with_the_one_that_is_named(models, capsys):
    with FaultServer(models=models) as server:
        config = InteractConfig(teacher_url=[server.url], teacher_model=["claude"])
        with open_grader(config, corpus=None) as grader:
            assert grader.grade("Once", ["A dog ran."])[0].scores
        assert server.requests[-1]["model"] == "claude"
        assert "warning" in capsys.readouterr().out
        with Teacher(server.url) as teacher, pytest.raises(UserError) as caught:
            teacher.probes()[0]
    assert_one_clean_sentence(caught, server.url)
    assert "--teacher-model" in str(caught.value)


@pytest.mark.parametrize(
    "listed, named",
    [
        ("models/gemini-3-flash", "gemini-3-flash"),
        ("llama3.1:latest", "llama3.1"),
        ("a/b", "a/b:nitro"),
    ],
)
def test_a_model_is_asked_for_by_the_name_that_was_given_though_another_is_listed(listed, named):
    with FaultServer(models=[listed]) as server, Teacher(server.url, named) as teacher:
        assert scored(teacher) and server.requests[-1]["model"] == named
        (note,) = teacher.probes()[0].notes
        assert named in note and listed in note


def test_a_model_that_no_server_has_is_one_sentence_with_those_that_are_listed():
    with (
        Picky(
            lambda asked: error(404, "The model `third` does not exist", code="model_not_found")
        ) as server,
        Teacher(server.url, "third") as teacher,
        pytest.raises(UserError) as caught,
    ):
        teacher.probes()[0]
    assert_one_clean_sentence(caught, "does not list third", "first, second")


def test_an_embedding_model_that_is_listed_first_is_not_asked_to_grade():
    listed = ["text-embedding-nomic-embed-text-v1.5", "bge-m3", "whisper-1", "qwen3-8b", "llama3.1"]
    with FaultServer(models=listed) as server, Teacher(server.url) as teacher:
        assert teacher.probes()[0].model == "qwen3-8b"
    with FaultServer(models=listed[:2]) as server, Teacher(server.url) as teacher:
        assert teacher.probes()[0].model == listed[0]  # nothing else is there: let it say why not


# Errors.


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

    with Picky(refuse) as server, Teacher(server.url) as teacher:
        assert teacher.probes()[0].refused == ["seed"] and scored(teacher)
    with (
        Picky(lambda asked: SHAPES[shape](400, "the moon is full")) as server,
        Teacher(server.url) as teacher,
        pytest.raises(UserError) as caught,
    ):
        teacher.probes()[0]
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

    with Picky(refuse) as server, Teacher(server.url) as teacher:
        assert teacher.probes()[0].refused == ["seed"]


def test_an_error_nested_without_end_is_read_to_a_depth():
    body = {"message": "at the top"}
    for _ in range(400):
        body = {"error": [body], "message": "around"}
    refuse = lambda asked: web.json_response(body, status=400)  # noqa: E731
    with (
        Picky(refuse) as server,
        Teacher(server.url) as teacher,
        pytest.raises(UserError) as caught,
    ):
        teacher.probes()[0]
    assert_one_clean_sentence(caught, "around")


def test_one_flagged_story_costs_the_story_not_the_run():
    """OpenRouter answers 403 when its moderation flags an input."""
    flagged = error(
        403, "Your chosen model requires moderation and your input was flagged", code=403
    )
    script = lambda story, n: flagged if "wolf" in story else "2 1 3"  # noqa: E731
    with FaultServer(script) as server, Teacher(server.url) as teacher:
        grades = teacher.grade("Once", [f"Dog {i} ran." for i in range(19)] + ["A wolf ate."])
    assert [grade.score is None for grade in grades] == [False] * 19 + [True]
    assert "your input was flagged" in grades[-1].error and server.seen["A wolf ate."] == 1
    require_scores(grades, 0.1)
    with pytest.raises(UserError, match=r"1 of 20 stories got no score.*input was flagged"):
        require_scores(grades, 0.04)


def test_a_server_that_forbids_everything_is_one_sentence():
    refuse = lambda asked: error(403, "Forbidden")  # noqa: E731
    with (
        Picky(refuse) as server,
        Teacher(server.url) as teacher,
        pytest.raises(UserError) as caught,
    ):
        teacher.probes()[0]
    assert_one_clean_sentence(caught, "HTTP 403", "OPENAI_API_KEY")


def test_529_is_overload_and_gets_fewer_requests():
    def script(story, n):
        return error(529, "Overloaded", type="overloaded_error") if n < 12 else "2 1 3"

    with FaultServer(script) as server, Teacher(server.url, concurrency=4) as teacher:
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
    with server, Teacher(server.url, max_tokens=6) as teacher:
        probe = teacher.probes()[0]
        assert (probe.least_tokens, teacher.longest_reply) == (16, 6) and "at least 16" in str(
            probe
        )
        dog, cat = teacher.grade("Once", list(replies))
    assert (
        dog.scores
        and cat.scores is None
        and cat.reply == replies["A cat ran."]
        and cat.reply_words == 3 * 6
    )
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
            if asked["messages"][0]["role"] == "user" and text.startswith(instructions()):
                self.requests.append(asked)
                return web.Response(text=completion("2 1 3"), content_type="application/json")
            return await super()._chat(request)

    with Merged(refuse) as server, Teacher(server.url) as teacher:
        assert scored(teacher) and not teacher.probes()[0].system
        assert "no system message" in str(teacher.probes()[0])
        (message,) = server.requests[-1]["messages"]
        # refused once, and not retried
        assert "A dog ran." in message["content"] and len(server.all) == 1 + 1


def test_extra_fields_are_merged_into_each_request(tmp_path, monkeypatch):
    headers = []

    class Heard(FaultServer):
        async def _chat(self, request):
            headers.append(request.headers.get("anthropic-version"))
            return await super()._chat(request)

    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "anthropic-version: 1")
    extra = load_extra('{"provider": {"order": ["a"]}, "grammar": "mine"}')
    with Heard() as server:
        for more in (extra, {}):
            with Teacher(server.url, extra=more, cache=tmp_path / "replies.jsonl") as teacher:
                assert scored(teacher)
        with_extra, without = server.requests[1], server.requests[3]
    # and other questions are others
    assert with_extra == {**without, "provider": {"order": ["a"]}, "grammar": "mine"}
    assert set(headers) == {"1"}


SECRETS = (
    "github_pat_ ghp_ gho_ xoxb- xoxp- glpat- hf_ gsk_ AKIA ya29. eyJ npm_ SG. sk_live_".split()
)


@pytest.mark.parametrize(
    "text, words",
    [
        ("service_tier=flex", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ('{"a": NaN}', "must be a JSON object"),
        ('{"max_tokens": 99}', "cannot set max_tokens"),
        ('{"metadata": {"Authorization": "Bearer x"}}', "OPENAI_API_KEY"),
        ('{"metadata": {"X-Api-Password": "x"}}', "must hold no secret"),
        ('{"metadata": {"X-Team": "sk-planted-0123456789"}}', "must hold no secret"),
        ('{"api_key": "x"}', "must hold no secret"),
        ('{"query": {"access_token": "x"}}', "must hold no secret"),
        ('{"extra_query": {"version": "1"}}', "cannot set extra_query"),
        ('{"body": {"a": [{"client_secret": "x"}]}}', "must hold no secret"),
        ('{"metadata": ["a", ["sk-planted-0123456789"]]}', "must hold no secret"),
        ('{"metadata": [{"a": ["Bearer x"]}]}', "must hold no secret"),
        ('{"note": "x sk-planted-0123456789"}', "must hold no secret"),
        ('{"note": "key:hf_0123456789abcdef"}', "must hold no secret"),
        ('{"note": "\\nsk-planted-0123456789"}', "must hold no secret"),
        ('{"note": "my Bearer x"}', "must hold no secret"),
        ('{"sk-planted-0123456789": 1}', "must hold no secret"),
        ('{"a": "sk-planted-0123456789", "a": 1}', "must hold no secret"),
        ('{"\\u0061pi_key": 1}', "must hold no secret"),
        *(
            (json.dumps({"x": f"{prefix}0123456789abcdef"}), "must hold no secret")
            for prefix in SECRETS
        ),
        ('{"extra_headers": {"a": "b"}}', "headers are OPENAI_CUSTOM_HEADERS"),
    ],
)
def test_extra_fields_that_cannot_be_used_are_one_sentence(text, words):
    with pytest.raises(UserError) as caught:
        load_extra(text)
    assert_one_clean_sentence(caught, "--teacher-extra", words)


@pytest.mark.parametrize("value", ["%s", "x %s y", "\\u0070%s"])
def test_the_keys_own_value_is_no_extra_field(value, monkeypatch):
    """However it looks, and however JSON spells it."""
    monkeypatch.setenv("OPENAI_API_KEY", "planted0123")
    spelled = value % ("lanted0123" if value.startswith("\\") else "planted0123")
    for text in (f'{{"note": ["{spelled}"]}}', f'{{"{spelled}": 1}}'):
        with pytest.raises(UserError) as caught:
            load_extra(text)
        assert_one_clean_sentence(caught, "must hold no secret")
        assert "planted0123" not in str(caught.value)


def test_fields_that_only_sound_like_secrets_are_extra_fields():
    text = '{"prompt_cache_key": "a", "stop_token_ids": [1], "max_output_tokens": 9, "metadata": {"author": "me"}, '
    text += '"note": "a basic task-force, risk_free, use_hf_tokenizers, hf-hub"}'
    assert load_extra(text) == json.loads(text)
    opened = open_grader(
        InteractConfig(reward="random", teacher_extra='{"api_key": "x"}'), corpus=None
    )
    # nothing is asked, but it would be recorded
    with pytest.raises(UserError, match="no secret"), opened:
        pass


# Models that think.


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
    """A server that refuses template arguments and unknown efforts; its model answers at once with
    one of those."""

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
        {"chat_template_kwargs": {"enable_thinking": False}},
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
            with Teacher(server.url, cache=tmp_path / "replies.jsonl") as teacher:
                probe = teacher.probes()[0]
                assert (
                    probe.thinks and probe.scored and probe.quiet == kept and not probe.least_tokens
                )
                assert json.dumps(kept) in str(probe)
        assert len(server.all) <= 1 + 4 + 4  # each rung once, and the outcome is kept
        with Teacher(server.url, cache=tmp_path / "replies.jsonl") as teacher:
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
        with open_grader(config, corpus=None) as grader:
            assert grader.grade("Once", ["A dog ran."])[0].reply_words == 3
            assert grader.most_words == 3 * 6  # thoughts are no words that the student reads
            assert "321 reply tokens" in grader.forecast(1, "Once")
        output = capsys.readouterr().out
    assert (
        f"may cost up to {THINKING_TOKENS} tokens; it used 321" in output
        and "cannot be told not to think" in output
    )
    assert (
        server.all[-1]["max_tokens"] == THINKING_TOKENS
        and server.all[-1]["reasoning_effort"] == "low"
    )


def test_thoughts_that_a_server_leaves_in_the_text_are_no_part_of_the_reply():
    thoughtful = lambda story, n: "<think>\nReadable: 3 3 3\n</think>\n\n2 1 3"  # noqa: E731
    with FaultServer(thoughtful) as server, Teacher(server.url) as teacher:
        assert scored(teacher)
    with (
        FaultServer(lambda story, n: "2 1 3 <think>or 3 3 3</think>") as server,
        Teacher(server.url) as teacher,
    ):
        assert teacher.grade("Once", ["A dog ran."])[0].scores is None


# What a resumed run starts from.


def test_replies_and_a_probe_without_scores_are_asked_again_once_the_teacher_is_mended(tmp_path):
    replies = tmp_path / "replies.jsonl"
    mended = False

    def script(story, n):
        return (
            "2 1 3" if mended or story in ("Dog 0 ran.", "Dog 1 ran.") else "What a lovely story!"
        )

    def steps(again):
        config = InteractConfig(teacher_url=[server.url])
        with open_grader(config, corpus=None, replies=replies) as grader:
            for i in range(4):
                grader.send(i, "Once", f"Dog {i} ran.")
            grades = grader.collect(again)
            return grades, grader

    with FaultServer(script) as server:
        server.first = lambda: script("", 0)
        grades, grader = steps(Stop())
        assert [grade.score is None for grade in grades] == [False, False, True, True]
        assert not grader.facts["teacher"]["scored"]
        with pytest.raises(UserError, match="2 of 4 stories got no score"):
            require_scores(grades, 0.1)
        asked = dict(server.good)
        mended = True
        grades, grader = steps(Stop())
        assert all(grade.score is not None for grade in grades)
        assert [server.good[f"Dog {i} ran."] - asked[f"Dog {i} ran."] for i in range(4)] == [
            0,
            0,
            1,
            1,
        ]
        sent = len(server.requests)
        again, _ = steps(Stop())  # the new replies are the ones that count, now and later
        assert [(a.scores, a.reply_words) for a in again] == [
            (g.scores, g.reply_words) for g in grades
        ]
        assert len(server.requests) == sent
    lines = [json.loads(line) for line in replies.read_text().splitlines()]
    # the old ones stay in the record
    assert sum(line["reply"] == "What a lovely story!" for line in lines) == 6


def test_a_probe_without_scores_is_made_again_until_there_are_scores(tmp_path):
    replies = tmp_path / "replies.jsonl"
    first = "Nice!"
    with FaultServer() as server:
        server.script, server.first = (lambda story, n: first), (lambda: first)
        for reply in ("Nice!", "2 1 3", "Oh"):
            first = reply
            with Teacher(server.url, cache=replies) as teacher:
                assert teacher.probes()[0].scored == (reply != "Nice!") or reply == "Oh"
                # that one is kept
                assert teacher.probes()[0].reply == ("2 1 3" if reply == "Oh" else reply)


def test_a_step_that_was_only_killed_is_resumed_from_every_reply(tmp_path):
    """A story without scores among enough that have some stays without: the run had gone on so."""
    script = lambda story, n: "Nice!" if story == "Dog 7 ran." else "2 1 3"  # noqa: E731
    with FaultServer(script) as server:
        for _ in range(2):
            config = InteractConfig(teacher_url=[server.url])
            with open_grader(config, corpus=None, replies=tmp_path / "replies.jsonl") as grader:
                for i in range(20):
                    grader.send(i, "Once", f"Dog {i} ran.")
                grades = grader.collect(Stop())
                assert [i for i, grade in enumerate(grades) if grade.score is None] == [7]
        assert server.good["Dog 7 ran."] == 3


def test_what_the_teacher_said_is_told_once():
    refusal = "I am sorry, but I cannot grade this."
    with FaultServer(lambda story, n: refusal) as server, Teacher(server.url) as teacher:
        grades = teacher.grade("Once", [f"Dog {i} ran." for i in range(5)])
    with pytest.raises(UserError) as caught:
        require_scores(grades, 0.1)
    assert str(caught.value).count(refusal) == 1
