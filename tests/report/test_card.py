"""The model card says what the student's history says, and nothing in it can add to its Markdown."""

import pytest

from scripts import export_hf
from tinystory.data.corpus import HUB
from tinystory.student import checkpoint


def card(source, folder) -> tuple[dict, str]:
    """Metadata and text of the card that the command writes for a checkpoint or a run."""
    yaml = pytest.importorskip("yaml", reason="pip install huggingface_hub")
    export_hf.main([str(source), str(folder)])
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


# Each call gives more than the one before, by more than the length term can take away: the last
# student is the best one, whatever the students write.


def save(folder, student, tokenizer, **history):
    return checkpoint.save(
        folder, student, tokenizer, history=history, state={}, counters={"step": 1}
    )


def test_a_card_says_what_the_student_learned_from(student, tokenizer, tmp_path, monkeypatch):
    counts = {"interaction_words_in": 2345, "interaction_words_out": 1234}
    name = "a`\u2028\n\n# <b>b<\\b>"
    path = save(tmp_path / "c", student, tokenizer, words=400, corpus=[f"/me/{name}"], **counts)
    metadata, text = card(path, tmp_path / "tale")
    assert metadata["tags"] == ["tinystory"]
    assert "400 words of `a # bb\\b`, counting repeats" in text and "/me/" not in text
    assert "It wrote 1,234 words of stories" in text and "took in 2,345 words" in text
    # If the corpus is a user's file, the user states the licence.
    assert not metadata.keys() & {"license", "language"} and ": files of the user" in text
    monkeypatch.setattr("tinystory.student.hf.is_folder", lambda path: True)
    text = card(tmp_path / "tale", tmp_path / "again")[1]
    assert "of `not recorded`" in text and "Not recorded." in text and "It wrote" not in text


@pytest.mark.parametrize(
    "corpora, licence",
    [(["builtin", "dull"], "mit"), (["tinystories"], None), (["babylm-10m", "own.txt"], None)],
)
def test_metadata_names_what_is_known_of_the_corpus(corpora, licence, student, tokenizer, tmp_path):
    path = save(tmp_path / "c", student, tokenizer, words=2_800_000, corpus=corpora)
    metadata, text = card(path, tmp_path / "tale")
    assert metadata.get("license") == licence
    assert ("language" in metadata) == ("own.txt" not in corpora)
    assert metadata.get("datasets", []) == [HUB[name][0] for name in corpora if name in HUB]
    assert "2.8M words" in text and all(f"- `{name}`: " in text for name in corpora)


def test_the_cards_code_tells_a_story(student, tokenizer, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    path = save(tmp_path / "c", student, tokenizer)
    text = card(path, tmp_path / "tale")[1]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert "Once upon a time," in capsys.readouterr().out
