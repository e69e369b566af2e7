"""The code of the reward model in docs/teachers.md, with a small classifier of random weights."""

import re

import pytest
import torch
from conftest import ROOT, SHORT, cli, metrics

import train_interact
from scripts import doctor
from tinystory.student import hf
from tinystory.teacher.callable import load_score

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(params=["", CHAT], ids=["pairs", "chat template"])
def spec(request, student, tokenizer, tmp_path, monkeypatch):
    """FILE.py:FUNCTION of the documented code, with a model that reads pairs, or conversations."""
    transformers = pytest.importorskip("transformers")
    hf.write(tmp_path / "student", student, tokenizer)
    vocabulary = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    vocabulary.chat_template = request.param or None
    vocabulary.save_pretrained(tmp_path / "classifier")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_layer=1,
        n_head=2,
        n_embd=32,
        n_positions=128,
        num_labels=1,
    )
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    vocabulary.model_max_length = 128
    vocabulary.save_pretrained(tmp_path / "classifier")
    monkeypatch.setenv("MODEL", str(tmp_path / "classifier"))
    code = re.search(
        r"```python\n(# reward_model.py.*?)```", (ROOT / "docs" / "teachers.md").read_text(), re.S
    )
    (tmp_path / "reward_model.py").write_text(code[1])
    return f"{tmp_path / 'reward_model.py'}:score"


def test_a_sequence_classifier_is_a_teacher_batched_and_on_a_scale_that_does_not_saturate(
    spec, capfd
):
    stories = [
        f"Tom had a {thing}. " * (i % 7 + 1)
        for i, thing in enumerate(["ball", "cat", "hat", "owl"] * 9)
    ]
    openings = ["Once", "One day,"] * 18
    with load_score(spec) as score:
        scores = score(openings, stories)
        # Neither the batch nor the padding changes a score.
        alone = [score([o], [s])[0] for o, s in zip(openings, stories, strict=True)]
    assert len(set(scores)) > 20 and all(0.02 < s < 0.98 for s in scores)
    assert scores == pytest.approx(alone, abs=1e-4)
    out = capfd.readouterr().out
    assert re.match(
        r"reward model: logits -?\d+\.\d\d, std \d+\.\d\d, 0% of the scores saturated\n", out
    )
    assert out.count("reward model") == 1 + len(stories)


def test_it_trains_and_is_calibrated(spec, place, tmp_path, capfd):
    out = tmp_path / "i"
    train_interact.main(
        SHORT + cli("--init {} --out {} --reward {} --steps 1", place / "p", out, spec)
    )
    assert metrics(out)[0]["score_std"] > 0 and capfd.readouterr().out.count("reward model: ") == 3
    doctor.main(["--reward", spec, "--calibrate"])
    assert "verdict    the teacher " in capfd.readouterr().out
