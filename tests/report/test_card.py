"""The model card says what the run's records say, and nothing in them can add to its Markdown."""

import json
import shutil

import pytest
from conftest import SHORT, cli, metrics

import train_interact
from lab import findings
from scripts import export_hf
from tinystory.data.corpus import HUB
from tinystory.report.before_after import read_before_after
from tinystory.run.records import EVALUATIONS, read_records
from tinystory.run.text import printable
from tinystory.student import checkpoint


def card(source, folder) -> tuple[dict, str]:
    """Metadata and text of the card that the command writes for a checkpoint or a run."""
    yaml = pytest.importorskip("yaml", reason="pip install huggingface_hub")
    export_hf.main([str(source), str(folder)])
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


# Each call gives more than the one before, by more than the length term can take away: the last
# student is the best one, whatever the students write.
RISING = """
calls = 0

def score(opening, stories):
    global calls
    calls += 1
    return [min(calls / 5, 1)] * len(stories)
"""


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    out, reward = folder / "i", folder / "reward.py"
    reward.write_text(RISING)
    argv = cli("--init {} --out {} --reward {}:score --steps 2", place / "p", out, reward)
    argv += ["--learning-rate", "0.01", "--diversity", "0", "--unfinished", "1"]
    train_interact.main([*SHORT, *argv])
    return out


def test_an_interactions_card_holds_its_figures(run, tmp_path):
    findings.keep(run, "<b>Judged", ["A `judge` saw *more*."], [["", "sense"], ["af|ter", "-0.9"]])
    config = json.loads((run / "config.json").read_text())
    config["options"] |= {
        "teacher": {"model": "[`x`](http://evil)"},
        "calibration": {"verdict": "tells stories from noise"},
    }
    (run / "config.json").write_text(json.dumps(config))
    newest = checkpoint.newest(run)
    metadata, text = card(newest, tmp_path / "tale")
    last, history = metrics(run)[-1], json.loads((newest / "model.json").read_text())["history"]
    assert f"{history['words']:,} words" in text
    assert f"In 2 steps of PPO the model wrote {last['words_out']}" in text
    assert "`[x](http://evil)` graded" in text and "this grader tells stories from noise" in text
    assert "## bJudged, after step 2\n\nA judge saw more.\n\n" in text
    assert "|  | sense |\n| --- | --- |\n| after | -0.9 |" in text
    evaluation = [record for record in read_records(run / EVALUATIONS) if record["step"] == 2]
    rewards = [sum(r["reward"] for r in evaluation if r["step"] == 2) / 4, last["held_out_reward"]]
    assert rewards[0] == pytest.approx(rewards[1], rel=1e-5)
    assert f"| {rewards[1]:.3g} ± " in text
    rule, pair = read_before_after(run).typical()
    assert rule in text and len(pair) == 2
    for record in pair:
        # Lines are broken at spaces and hyphens, and control characters are not shown.
        story = printable(f"{record['opening']} {record['story']}")
        assert "".join(story.split()) in "".join(text.split())
    # If the corpus is a user's file, the user states the licence.
    assert "license" not in metadata
    assert "language" not in metadata
    assert "- `corpus.txt`: files of the user" in text


@pytest.mark.parametrize(
    "name, shown",
    [
        ("gpt\n\n# Heading\n<script>alert(1)</script>", "gpt # Heading scriptalert(1)/script"),
        ("a`\n\n<b>b</b>`", "a bb/b"),
        ("\u2028x\r\n\t<!-- y", "x !-- y"),
        ("<>\n`", "not recorded"),
    ],
)
def test_a_teachers_name_stays_in_its_code_span(run, tmp_path, name, shown):
    folder = shutil.copytree(run, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["options"]["teacher"] = {"model": name}
    (folder / "config.json").write_text(json.dumps(config))
    text = card(checkpoint.newest(folder), tmp_path / "tale")[1]
    assert f"`{shown}` graded the stories." in text and "<script>" not in text


def test_a_pretrained_students_card_holds_its_own(place, tmp_path, monkeypatch):
    path = checkpoint.newest(place / "p")
    metadata, text = card(path, tmp_path / "tale")
    bits = metrics(place / "p")[-1]["val_bits_per_byte"]
    assert f"have {bits:.3f} bits per byte" in text
    assert "## Interaction" not in text
    assert metadata["tags"] == ["tinystory"]
    monkeypatch.setattr("tinystory.student.hf.is_folder", lambda path: True)
    text = card(tmp_path / "tale", tmp_path / "again")[1]
    assert "of `not recorded`" in text and "Not recorded." in text


@pytest.mark.parametrize(
    "corpora, licence",
    [(["builtin", "dull"], "mit"), (["tinystories"], None), (["babylm-10m", "own.txt"], None)],
)
def test_metadata_names_what_is_known_of_the_corpus(corpora, licence, student, tokenizer, tmp_path):
    history = {"words": 2_800_000, "corpus": corpora}
    path = checkpoint.save(
        tmp_path / "c", student, tokenizer, history=history, state={}, counters={"step": 1}
    )
    metadata, text = card(path, tmp_path / "tale")
    assert metadata.get("license") == licence
    assert ("language" in metadata) == ("own.txt" not in corpora)
    assert metadata.get("datasets", []) == [HUB[name][0] for name in corpora if name in HUB]
    assert "2.8M words" in text and all(f"- `{name}`: " in text for name in corpora)


def test_the_cards_code_tells_a_story(student, tokenizer, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    path = checkpoint.save(
        tmp_path / "c", student, tokenizer, history={}, state={}, counters={"step": 1}
    )
    text = card(path, tmp_path / "tale")[1]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert "Once upon a time," in capsys.readouterr().out
