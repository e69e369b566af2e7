"""A second judge scores evaluations and changes nothing else."""

import pytest
from conftest import SHORT, assert_same_bits, metrics, read_lines
from fault_server import FaultServer, error, graded

import train_interact as interact
from tinystory.evaluate.open_grader import open_judge
from tinystory.report.before_after import summary
from tinystory.run.errors import UserError
from tinystory.run.records import EVALUATIONS, STORIES
from tinystory.student import checkpoint


def run(place, out, *more: str):
    init = ["--init", str(checkpoint.newest(place / "p"))]
    reward = ["--reward", f"{place / 'reward.py'}:score"]
    interact.main([*init, *reward, *SHORT, "--steps", "2", "--out", str(out), *more])
    return out


@pytest.fixture(scope="module")
def judged(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    (folder / "judge.py").write_text(
        "def score(opening, stories):\n    return [1 / (2 + len(s)) for s in stories]\n"
    )
    return run(place, folder / "judged", "--judge", str(folder / "judge.py"))


def test_its_scores_stand_beside_the_reward(judged):
    records = read_lines(judged / EVALUATIONS)
    for record in records:
        expected = 1 / (2 + len(record["story"])) if record["story"].strip() else 0
        assert record["judge"] == pytest.approx(expected, rel=1e-6)
    last = metrics(judged)[-1]
    latest = [record["judge"] for record in records if record["step"] == last["step"]]
    assert last["held_out_judge"] == pytest.approx(sum(latest) / len(latest), rel=1e-6)
    assert "judge" not in read_lines(judged / STORIES)[0]
    assert "second judge" in (judged / "report.html").read_text()
    assert "second judge" in summary(judged)


def test_nothing_is_learned_from_it(judged, place, tmp_path):
    alone = run(place, tmp_path / "alone")
    assert_same_bits(judged, alone)
    assert "held_out_judge" not in metrics(alone)[-1]
    assert "second judge" not in (alone / "report.html").read_text()


def test_it_can_be_a_language_model_that_is_asked_in_its_own_way(place, tmp_path):
    with FaultServer(other=lambda body: "yes" if body.get("seed", 0) % 2 else "no") as server:
        out = run(place, tmp_path / "i", "--judge", server.url, "--judge-prompt", "event")
        assert all(record["judge"] is not None for record in read_lines(out / EVALUATIONS))
        assert any("unexpected happen" in body["messages"][-1]["content"] for body in server.others)
        assert (out / "judge_replies.jsonl").exists() and not (out / "replies.jsonl").exists()


def test_a_judges_errors_name_the_option_judge(tmp_path):
    (tmp_path / "fails.py").write_text("def score(o, stories):\n    return [1 / 0]\n")
    for judge, words in (
        ("none.py", "--judge none.py: there is no Python file 'none.py'; write --judge as"),
        ("rubrik", "--judge rubrik: there is no Python file 'rubrik'; write --judge as"),
        (f"{tmp_path}/fails.py", f"--judge {tmp_path}/fails.py: .*ZeroDivisionError"),
    ):
        with (
            pytest.raises(UserError, match=words),
            open_judge(interact.InteractConfig(judge=judge), corpus=[]) as grader,
        ):
            graded(grader, "Once", ["a cat ran."])


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    "options, words",
    [
        ({"judge": "http://127.0.0.1:9"}, "the judge at http://127.0.0.1:9/v1 cannot be reached"),
        ({"judge": "http://127.0.0.1:9?x=1"}, "the judge's URL must look like"),
        ({"judge_prompt": "none.json"}, "--judge-prompt none.json is neither one of"),
        (
            {"judge_prompt": "event", "preset": "babylm-2026-strict"},
            "--judge-prompt event asks yes-or-no",
        ),
        ({"models": ()}, "the judge at .* or name one with --judge-model"),
        ({"script": lambda story, n: error(404, "no")}, "the judge at .* --judge-model"),
    ],
)
def test_errors_of_a_judge_at_a_url_name_its_own_options(options, words):
    models = options.pop("models", ("m",))
    script = options.pop("script", lambda story, n: "2 1 3")
    with (
        FaultServer(script, models=models) as server,
        pytest.raises(UserError, match=words) as caught,
        open_judge(interact.InteractConfig(**{"judge": server.url} | options), corpus=[]) as judge,
    ):
        graded(judge, "Once", ["a cat ran."])
    assert "teacher" not in str(caught.value)


def test_a_judges_url_may_be_in_capitals(short_pauses):
    with (
        FaultServer() as server,
        open_judge(
            interact.InteractConfig(judge=server.url.replace("http", "HTTP")), corpus=[]
        ) as grader,
    ):
        assert graded(grader, "Once", ["a cat ran."])[0].score is not None


def test_a_judge_that_is_not_there_is_one_sentence_before_anything_is_spent(
    place, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        run(place, tmp_path / "i", "--judge", str(tmp_path / "none.py"))
    assert "none.py" in capsys.readouterr().err and not (tmp_path / "i" / STORIES).exists()
