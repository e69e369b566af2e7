"""scripts/agreement.py: judges of every kind, what is kept beside a run, and the page."""

import json

import pytest
from conftest import fails
from fault_server import FaultServer

from scripts import agreement
from tinystory.report.judges import read_opinions
from tinystory.report.run import write_report
from tinystory.run.folder import OPINIONS, SAMPLES, RunLog
from tinystory.teacher.prompt import CRITERIA

EVIL = "<script>alert(1)</script>"
STORIES = [f"a cat sat {'here ' * i}and {EVIL} ran." for i in range(12)]


def record(i, story, **more):
    scores = dict(zip(CRITERIA, (i % 4, i % 3, 2), strict=True))
    rest = {"reply": None, "reward": 0.5, "words": 5, "ended": "eos"}
    return {"step": 1, "index": i, "opening": "Once", "story": story, "scores": scores} | rest | more


@pytest.fixture
def run(tmp_path):
    """A finished run of a teacher, with a calibration."""
    folder = tmp_path / "run"
    with RunLog(folder, resume_step=None) as log:
        calibration = {"verdict": f"counts {EVIL} words"}
        log.config({"teacher": {"model": "llama"}, "calibration": calibration, "device": "cpu"})
        log.metrics(step=1, reward_mean=0.5, score_mean=3.0, **{f"{name}_mean": 1.0 for name in CRITERIA})
        log.stories([record(i, story) for i, story in enumerate(STORIES)])
    sides = [record(i // 2, story, when=("before", "after")[i % 2]) for i, story in enumerate(STORIES)]
    (folder / SAMPLES).write_text("".join(json.dumps(each) + "\n" for each in sides))
    return folder


def test_an_endpoint_is_asked_about_a_runs_stories_and_its_report_shows_it(run, capsys, short_pauses):
    with FaultServer(lambda story, n: f"{len(story) % 4} 1 2", models=("gpt",)) as server:
        agreement.main([str(run), server.url])
        asked = len(server.requests)
        agreement.main([str(run), server.url])  # what was asked once is kept
        assert len(server.requests) == asked == 1 + len(STORIES)
    said = capsys.readouterr().out
    assert "llama and gpt, 12 stories" in said and "readability" in said and "correlation of length and sum" in said
    (judge,) = read_opinions(run).values()
    assert judge.name == "gpt" and len(judge.ratings) == 12
    page = (run / "report.html").read_text()
    assert "Other judges" in page and "gpt" in page and EVIL not in page
    assert "Scored by llama. It counts &lt;script&gt;" in page
    found = json.loads((run / "agreement.json").read_text())
    assert found[0]["criteria"]["creativity"]["kappa"] is None and found[0]["stories"] == 12


def test_a_run_without_a_second_judge_says_who_scored_and_no_more(run):
    page = write_report(run).read_text()
    assert "Scored by llama" in page and "Other judges" not in page and not (run / OPINIONS).exists()


def test_people_who_graded_the_same_stories_are_compared(tmp_path, capsys):
    grades = tmp_path / "grades.jsonl"
    lines = [record(i, story, by=by) for i, story in enumerate(STORIES) for by in ("ada", "ben", EVIL)[: 2 + i % 2]]
    lines.append(record(0, "skipped", by="ada", scores=None))
    grades.write_text("".join(json.dumps(each) + "\n" for each in lines))
    agreement.main([str(grades), "--out", str(tmp_path / "new" / "found.json")])
    said = capsys.readouterr().out
    assert "ada and ben, 12 stories" in said and f"ada and {EVIL}, 6 stories" in said and f"ben and {EVIL}" in said
    assert "1.00 [1.00, 1.00]" in said and len(json.loads((tmp_path / "new" / "found.json").read_text())) == 3


def test_the_builtin_teacher_and_a_callable_are_judges_too(run, capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def score(opening, stories):\n    return [len(s) / 200 for s in stories]\n")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join("A cat sat on a mat. It ran to the house and was happy. " * 3 for _ in range(300)))
    agreement.main([str(run), "rubric", f"{tmp_path}/mine.py:score", "--stories", "8", "--corpus", str(corpus)])
    said = capsys.readouterr().out
    assert "llama and rubric, 8 stories" in said and "mine.py:score" in said
    assert "mine.py:score" in (run / "report.html").read_text()


def test_what_is_no_judge_is_one_sentence(run, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(record(0, "another story")) + "\n")
    empty = tmp_path / "metrics.jsonl"
    empty.write_text('{"step": 1}\n')
    for argv, words in (
        (["nowhere", "rubric"], "no such run or file"),
        ([str(run)], "needs two judges"),
        ([str(run), str(other)], "no story in common"),
        ([str(run), str(empty)], "no opening, story and scores"),
        ([str(run), "nobody.py:score"], "nobody.py"),
    ):
        assert words in fails(agreement.main, argv, capsys)
