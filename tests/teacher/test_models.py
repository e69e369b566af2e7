"""The model for which the client asks a server, by the server's list of models."""

import pytest
from aiohttp import web
from fault_server import FaultServer, Picky, assert_one_clean_sentence, error, graded, scored

from tinystory.config import InteractConfig
from tinystory.evaluate.open_grader import open_grader
from tinystory.run.errors import UserError
from tinystory.teacher import api
from tinystory.teacher.client import Teacher

pytestmark = pytest.mark.usefixtures("short_pauses")


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
        with open_grader(config) as grader:
            assert graded(grader, "Once", ["A dog ran."])[0].scores
        assert server.requests[-1]["model"] == "claude"
        assert "warning" in capsys.readouterr().out
        with pytest.raises(UserError) as caught:
            Teacher([server.url])
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
def test_a_model_is_asked_for_by_the_name_that_was_given_though_another_is_listed(
    listed, named, capsys
):
    with FaultServer(models=[listed]) as server, Teacher([server.url], [named]) as teacher:
        assert scored(teacher) and server.requests[-1]["model"] == named
    note = capsys.readouterr().out
    assert named in note and listed in note


def test_a_model_that_no_server_has_is_one_sentence_beside_those_that_are_listed(capsys):
    with (
        Picky(
            lambda asked: error(404, "The model `third` does not exist", code="model_not_found")
        ) as server,
        pytest.raises(UserError) as caught,
    ):
        Teacher([server.url], ["third"])
    assert_one_clean_sentence(caught, "has no such page or model")
    assert "does not list third" in (said := capsys.readouterr().out) and "first, second" in said


def test_an_embedding_model_that_is_listed_first_is_not_asked_to_grade():
    listed = ["text-embedding-nomic-embed-text-v1.5", "bge-m3", "whisper-1", "qwen3-8b", "llama3.1"]
    with FaultServer(models=listed) as server, Teacher([server.url]) as teacher:
        assert teacher.probes[0].model == "qwen3-8b"
    with FaultServer(models=listed[:2]) as server, Teacher([server.url]) as teacher:
        assert teacher.probes[0].model == listed[0]  # nothing else is there: let it say why not


def test_a_long_list_of_models_is_not_cleaned_name_by_name(monkeypatch, capsys):
    """Cleaning a text reads the environment for secrets: 75 s for 100,000 models."""
    cleaned = []
    redacted = api.redacted
    monkeypatch.setattr(api, "redacted", lambda *texts: cleaned.append(texts) or redacted(*texts))
    models = [f"embed-{i}" for i in range(100_000)]
    with FaultServer(models=[*models, "sk\x1b-ok"]) as server, Teacher([server.url]) as teacher:
        assert teacher.probes[0].model == "sk-ok"
    with FaultServer(models=models) as server, Teacher([server.url], ["other"]):
        note = capsys.readouterr().out
    assert "does not list other" in note and "embed-0, embed-1" in note and len(note) < 600
    assert len(cleaned) < 100
