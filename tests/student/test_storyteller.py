"""A student from Python: the docs' lines, and what `import tinystory` brings."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

import tinystory
from scripts import sample
from tinystory import storyteller
from tinystory.run.errors import UserError
from tinystory.student import checkpoint


@pytest.fixture
def demo(place, tmp_path, monkeypatch):
    """A student in runs/demo/interact whose corpus was the built-in one."""
    monkeypatch.chdir(tmp_path)
    student, tokenizer, history = checkpoint.load(checkpoint.newest(place / "p"))
    folder = tmp_path / "runs/demo/interact/checkpoints/best"
    history |= {"corpus": ["builtin", "dull"]}
    counters = {"step": 1}
    folder.parent.mkdir(parents=True)
    checkpoint.save(folder, student, tokenizer, history=history, state={}, counters=counters)
    return folder


def test_the_lines_in_the_docs_generate_and_score_stories(demo, rubric, capsys, monkeypatch):
    corpora = []

    def fitted(documents):
        corpora.append(next(iter(documents)))
        return rubric

    monkeypatch.setattr(storyteller, "Rubric", fitted)
    page = (ROOT / "docs/evaluation.md").read_text()
    lines = re.search(r"^```python\n(import tinystory\n.*?)^```", page, re.M | re.S)[1]
    assert len(lines.splitlines()) <= 8
    names = {}
    exec(lines, names)
    stories = names["stories"]
    openings = ["Once upon a time,", "One day, a small dragon"]
    assert [story.opening for story in stories] == [o for o in openings for _ in range(4)]
    assert len({story.text for story in stories}) > 2
    assert len(corpora) == 1, "fitted once"
    printed = capsys.readouterr().out
    for story in stories:
        total = sum(rubric.score(story.opening, story.text).values())
        assert f"{total} {story.opening} {story.text}\n" in printed


def test_stories_from_python_are_those_of_the_command(demo, capsys):
    (story,) = tinystory.load(str(demo)).generate("Tom had a kite.", max_new_tokens=12, seed=3)
    argv = "--opening --stories 1 --max-new-tokens 12 --seed 3 --out s.jsonl".split()
    argv.insert(1, "Tom had a kite.")
    sample.main([str(demo), *argv])
    assert story.text in (demo.parents[4] / "s.jsonl").read_text().encode().decode("unicode-escape")


def test_a_checkpoint_may_be_named_by_text_and_a_wrong_one_is_a_user_error(demo):
    assert checkpoint.load(str(demo))[2]["corpus"] == ["builtin", "dull"]
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        tinystory.load("runs/nowhere")


def test_importing_the_package_shows_only_load_and_does_not_import_torch():
    program = "import sys, tinystory; print(dir(tinystory), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "['load'] False\n", done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'gc'"):
        tinystory.gc  # noqa: B018


@pytest.mark.parametrize(
    "script", ["train_pretrain.py", "train_interact.py", "scripts/sample.py", "lab/bench.py"]
)
def test_a_python_without_the_packages_is_one_sentence(script):
    """-S: without site-packages, as a Python outside .venv."""
    done = subprocess.run(
        [sys.executable, "-S", ROOT / script, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} has no package ") and "activate" in line
