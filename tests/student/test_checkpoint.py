"""A checkpoint is whole or absent, comes back as it went, and a wrong one is told in a sentence."""

import json
import shutil

import pytest
import torch
from conftest import tiny_stories

from tinystory.errors import UserError
from tinystory.student import checkpoint


def save(folder, student, tokenizer, step=3, state=None):
    return checkpoint.save(
        folder, student, tokenizer, facts={"words": 7}, state=state or {"x": torch.arange(3.0)}, counters={"step": step}
    )


def test_comes_back_as_it_went(tmp_path, student, tokenizer):
    folder = save(tmp_path / "chck_1M", student, tokenizer)
    loaded, loaded_tokenizer, facts = checkpoint.load(folder)
    state, counters = checkpoint.load_trainer(folder)
    assert loaded.config == student.config and facts == {"words": 7} and counters == {"step": 3}
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), student.state_dict().values(), strict=True)
    )
    assert torch.equal(state["x"], torch.arange(3.0))
    text = "Tom had a kite, naïve 🙂"
    assert loaded_tokenizer.encode(text) == tokenizer.encode(text)


def test_a_kill_while_saving_leaves_the_earlier_one(tmp_path, student, tokenizer, monkeypatch):
    save(tmp_path / "checkpoints" / "step_0000001", student, tokenizer, step=1)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "checkpoints" / "step_0000002", student, tokenizer, step=2)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path).name == "step_0000001"
    save(tmp_path / "checkpoints" / "step_0000002", student, tokenizer, step=2)
    assert checkpoint.newest(tmp_path).name == "step_0000002"
    checkpoint.load(checkpoint.newest(tmp_path))


def test_superseded_ones_go_and_milestones_stay(tmp_path, student, tokenizer):
    for name, step in (("chck_1M", 5), ("step_0000005", 5), ("step_0000009", 9)):
        last = save(tmp_path / "checkpoints" / name, student, tokenizer, step=step)
    checkpoint.drop_older(last)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["chck_1M", "step_0000009"]


def test_optimizer_round_trip(student):
    def one(seed):
        torch.manual_seed(seed)
        for p in student.parameters():
            p.grad = torch.randn_like(p)

    names = [name for name, _ in student.named_parameters()]
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    one(0)
    optimizer.step()
    state = {k: v.clone() for k, v in checkpoint.pack_optimizer(optimizer, names).items()}
    before = {k: v.clone() for k, v in student.state_dict().items()}
    one(1)
    optimizer.step()
    after = {k: v.clone() for k, v in student.state_dict().items()}
    student.load_state_dict(before)
    fresh = torch.optim.Adam(student.parameters(), lr=1e-3)
    checkpoint.unpack_optimizer(fresh, names, state)
    one(1)
    fresh.step()
    assert all(torch.equal(after[k], v) for k, v in student.state_dict().items())


def test_best_is_replaced_shown_and_never_resumed_from(tmp_path, student, tokenizer):
    def corner(folder):
        return checkpoint.load(folder)[0].wte.weight[0, 0].item()

    for step, name in enumerate(("start", "step_0000001", "best")):
        with torch.no_grad():
            student.wte.weight[0, 0] = step
        how = dict(facts={}, state={}, counters={"step": step})
        checkpoint.save(tmp_path / "checkpoints" / name, student, tokenizer, **how)
    assert checkpoint.find(tmp_path).name == "best" and checkpoint.newest(tmp_path).name == "step_0000001"
    with torch.no_grad():
        student.wte.weight[0, 0] = 9
    assert corner(checkpoint.save(checkpoint.find(tmp_path), student, tokenizer, **how)) == 2
    assert corner(checkpoint.save(checkpoint.find(tmp_path), student, tokenizer, **how, replace=True)) == 9
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"start", "step_0000001", "best"}
    assert checkpoint.find(tmp_path / "checkpoints" / "start").name == "start"


@pytest.mark.parametrize(
    "harm", ["no model.json", "bad json", "extra key", "cut weights", "other shape", "no tokenizer"]
)
def test_a_wrong_checkpoint_is_told_in_a_sentence(tmp_path, student, tokenizer, harm):
    folder = save(tmp_path / "c", student, tokenizer)
    model = folder / "model.json"
    if harm == "no model.json":
        model.unlink()
    elif harm == "bad json":
        model.write_text("{")
    elif harm == "extra key":
        model.write_text(json.dumps(json.loads(model.read_text()) | {"n_heads": 2}))
    elif harm == "cut weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif harm == "other shape":
        model.write_text(model.read_text().replace('"n_layer": 2', '"n_layer": 3'))
    elif harm == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError) as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("size", [300, 320])
def test_another_vocabulary_is_refused(tmp_path, student, tokenizer, size):
    """Also one of the same size: its stories would be gibberish, and nothing else would tell."""
    other = type(tokenizer).train(["a different text, " * 50, *tiny_stories(50)[::2]], size)
    folder = save(tmp_path / "c", student, tokenizer)
    other.save(folder / "tokenizer.json")
    with pytest.raises(UserError, match="another vocabulary"):
        checkpoint.load(folder)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, student, tokenizer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path / "checkpoints" / "c", student, tokenizer)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    shutil.rmtree(tmp_path / "checkpoints")
