"""Another model behind the same URL: its scores are mixed with the first model's only if the user
insists, and config.json lists which model taught after which step."""

import pytest
from aiohttp import web
from conftest import SHORT, cli, fails, metrics
from fault_server import FaultServer

import train_interact as interact
from tinystory.run.folder import read_config
from tinystory.student import checkpoint

pytestmark = pytest.mark.usefixtures("short_pauses")


class Named(FaultServer):
    """Says in each reply which model it is. Becomes `then` after so many stories."""

    def __init__(self, then: str, after: int):
        super().__init__(lambda story, n: self.reply(f"{len(story) % 4} 1 2"))
        self.first = lambda: self.reply("2 1 3")
        self.name, self.then, self.after = "old", then, after

    def reply(self, text):
        if len(self.requests) > self.after:
            self.name = self.then
        return web.json_response({"model": self.name, "choices": [{"message": {"content": text}}]})


def test_a_run_does_not_mix_the_scores_of_two_models_unless_told_to(place, tmp_path, capsys):
    out = tmp_path / "run"
    init = ["--init", str(checkpoint.newest(place / "p"))]
    with Named("new", after=1 + 4 + 6 + 3) as server:
        teacher = cli("--teacher-url {} --out {}", server.url, out)
        line = fails(interact.main, [*init, *teacher, *SHORT], capsys)
        assert "replies with the model new instead of old" in line and "--any-model" in line
        assert len(metrics(out)) == 1
        line = fails(interact.main, [*teacher, "--resume"], capsys)
        assert "model new instead of old" in line

        server.name = server.then = "old"  # it is served again, for three stories
        server.then, server.after = "new", len(server.requests) + 3
        line = fails(interact.main, [*teacher, "--resume"], capsys)
        assert "instead of old" in line
        steps = len(metrics(out))
        interact.main([*teacher, "--resume", "--any-model"])
    assert len(metrics(out)) == 4
    options = read_config(out)["options"]
    assert options["taught_by"] == [
        {"model": "old", "after_step": 0},
        {"model": "new", "after_step": steps},
    ]
    assert "taught by old, then new" in (out / "report.html").read_text()


def test_a_server_that_lists_another_model_does_not_resume_a_run(place, tmp_path, capsys):
    out = tmp_path / "run"
    init = ["--init", str(checkpoint.newest(place / "p"))]
    with FaultServer(lambda story, n: "2 1 3", models=["old"]) as server:
        teacher = cli("--teacher-url {} --out {}", server.url, out)
        interact.main([*init, *teacher, *SHORT, "--steps", "1"])
        server.models = ["new"]
        line = fails(interact.main, [*teacher, "--resume", "--steps", "2"], capsys)
        assert "the teacher of this run was old, and the server now has new" in line
        interact.main([*teacher, "--resume", "--steps", "2", "--any-model"])
    models = read_config(out)["options"]["taught_by"]
    assert [each["model"] for each in models] == ["old", "new"]


def test_a_model_that_changes_within_a_run_is_listed_with_its_step(place, tmp_path):
    """The new model replies from the second of four steps on; the server names it by its file."""
    out = tmp_path / "run"
    init = ["--init", str(checkpoint.newest(place / "p")), "--any-model"]
    with Named("/models/new.gguf", after=1 + 4 + 6 + 3) as server:
        interact.main([*init, *cli("--teacher-url {} --out {}", server.url, out), *SHORT])
    assert read_config(out)["options"]["taught_by"] == [
        {"model": "old", "after_step": 0},
        {"model": "/models/new.gguf", "after_step": 1},
    ]
    assert "taught by old, then new.gguf" in (out / "report.html").read_text()
