"""A --teacher-url without further options, for a student of the demo's corpora: a question, few
answers, a second judge, and a result at the end."""

import pytest
from conftest import cli, metrics

import train_interact as interact
from tests.train.test_scale import Answers
from tinystory.config import InteractConfig
from tinystory.config.command_line import parse
from tinystory.config.presets import TEACHER_DEFAULTS
from tinystory.rl.start import teacher_defaults
from tinystory.run.folder import read_config
from tinystory.student import checkpoint

pytestmark = pytest.mark.usefixtures("short_pauses")
URL = "http://127.0.0.1:9/v1"


@pytest.fixture(scope="module")
def students(place, tmp_path_factory):
    """Function from the names of corpora to a student that is said to have learned them."""
    student, tokenizer, _ = checkpoint.load(checkpoint.newest(place / "p"))

    def save(*corpus: str) -> str:
        folder = tmp_path_factory.mktemp("students") / "student"
        history = {"corpus": list(corpus)}
        checkpoint.save(folder, student, tokenizer, history=history, state={}, counters={"step": 0})
        return str(folder)

    return save


def test_the_defaults_for_a_teachers_url_depend_on_the_student_and_yield_to_what_is_typed(students):
    def options(init: str, *more: str) -> InteractConfig:
        argv = ["--init", init, "--teacher-url", URL, *more]
        return parse(InteractConfig, argv, teacher_defaults)

    def values(config: InteractConfig) -> dict:
        return {name: getattr(config, name) for name in TEACHER_DEFAULTS}

    demo = students("builtin", "dull")
    usual = values(InteractConfig())
    assert values(options(demo)) == TEACHER_DEFAULTS
    assert options(demo).defaults == (
        "--steps 8 --teacher-prompt event --grades 64 --no-eval-graded --judge rubric"
    )
    typed = options(demo, "--steps", "12", "--judge", "")
    assert values(typed) == TEACHER_DEFAULTS | {"steps": 12, "judge": ""}
    assert "--steps" not in typed.defaults
    assert values(options(demo, "--teacher-prompt", "grades")) == usual | {
        "teacher_prompt": "grades"
    }
    assert values(options(students("builtin"))) == usual
    assert values(options(students("tinystories"))) == usual
    assert values(parse(InteractConfig, [], teacher_defaults)) == usual


def test_a_bare_url_ends_with_a_result(students, place, tmp_path, capsys):
    out = tmp_path / "run"
    with Answers() as server:
        argv = cli("--init {} --teacher-url {}", students("builtin", "dull"), server.url)
        argv += cli("--judge {}:score --out {}", place / "reward.py", out)
        argv += "--steps 3 --stories-per-step 64 --max-new-tokens 16 --opening Once".split()
        interact.main([*argv, "--eval-stories", "4", "--device", "cpu"])
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "defaults for these options: --teacher-prompt event --grades 64 --no-eval-graded" in printed
    )
    assert "The mean score by the second judge" in printed
    assert 'first was asked "Does something unexpected happen in this story' in printed
    assert "The calibration found that it scores a story above" in printed
    assert "rule-based" not in printed
    assert "Mean score by the second judge, 0 to 1" in (out / "report.html").read_text()
    assert read_config(out)["options"]["grades"] == 64
    assert len(metrics(out)) == 3 and metrics(out)[0]["held_out_judge"] is not None
