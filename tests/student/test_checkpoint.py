"""A checkpoint is whole or absent and loads as it was saved, and a wrong one is an error of one
sentence."""

import contextlib
import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from conftest import damage, tiny_stories
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tinystory.data.tokenizer import Tokenizer
from tinystory.run.errors import UserError
from tinystory.run.records import write_manifest
from tinystory.student import checkpoint, hf
from tinystory.student.model import Student, StudentConfig
from train_pretrain import PretrainState


def save(folder, student, tokenizer, step=3, state=None):
    state = state or {"x": torch.arange(3.0)}
    return checkpoint.save(
        folder, student, tokenizer, history={"words": 7}, state=state, counters={"step": step}
    )


def seal(folder):
    """Make the manifest agree with the files, as whoever changes a checkpoint on purpose would."""
    (folder / "manifest.json").unlink()
    write_manifest(folder)


def test_comes_back_as_it_went(tmp_path, student, tokenizer):
    folder = save(tmp_path / "chck_1M", student, tokenizer)
    loaded, loaded_tokenizer, history = checkpoint.load(folder)
    state, counters = load_file(folder / "trainer.safetensors"), checkpoint.read_counters(folder)
    assert loaded.config == student.config and history == {"words": 7} and counters == {"step": 3}
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), student.state_dict().values(), strict=True)
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


@pytest.mark.parametrize(
    "name, key, value",
    [
        *(("model", "history", value) for value in ([1], None, {"words": "x"}, {"corpus": [1]})),
        *(("trainer", "words", "9"), ("trainer", "more", 1)),
    ],
)
def test_a_crafted_checkpoint_is_a_sentence(whole, tmp_path, name, key, value):
    """A checkpoint with a manifest that matches the files."""
    folder = shutil.copytree(whole / "checkpoints" / "a", tmp_path / "a")
    record = json.loads((folder / f"{name}.json").read_text()) | {key: value}
    (folder / f"{name}.json").write_text(json.dumps(record))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(
        UserError, match=f"{name}.json (has an impossible history|was not saved by this command)"
    ):
        checkpoint.load(folder)
        checkpoint.load_trainer(folder, PretrainState)


def test_weights_may_be_read_by_whom_other_files_may(tmp_path, student, tokenizer):
    folder = save(tmp_path / "step_0000001", student, tokenizer)
    hf.write(tmp_path / "exported", student, tokenizer)
    for path in (*folder.iterdir(), *(tmp_path / "exported").iterdir()):
        assert path.stat().st_mode == (folder / "model.json").stat().st_mode, path


def test_superseded_ones_go_and_milestones_stay(tmp_path, student, tokenizer):
    for name, step in (
        ("chck_1M", 5),
        ("step_0000005", 5),
        ("step_0000007", 7),
        ("step_0000009", 9),
    ):
        last = save(tmp_path / "checkpoints" / name, student, tokenizer, step=step)
    # half-removed, and half-written, by a killed process
    (tmp_path / "checkpoints" / ".step_0000003").mkdir()
    (tmp_path / "checkpoints" / ".step_0000011.partial").mkdir()
    (tmp_path / "checkpoints" / ".DS_Store").touch()  # of a file manager
    others = [".chck_mine", ".nfs001", "step_0000001_backup", "step_old"]  # the user's
    for name in others:
        (tmp_path / "checkpoints" / name).mkdir()
    checkpoint.drop_older(last)
    # the last two: one of them may be damaged later
    names = ["chck_1M", "step_0000007", "step_0000009"]
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {".DS_Store", *others, *names}


def test_a_users_copy_of_a_checkpoint_is_one_of_the_runs(tmp_path, student, tokenizer):
    folder = save(tmp_path / "checkpoints" / "step_0000001", student, tokenizer, step=1)
    copy = shutil.copytree(folder, folder.with_name("step_0000001_backup"))
    for step in (2, 3, 4):
        last = save(tmp_path / "checkpoints" / f"step_000000{step}", student, tokenizer, step=step)
        checkpoint.drop_older(last)
    assert (1, copy) in checkpoint.checkpoints(tmp_path) and not folder.exists()


def test_the_optimizers_state_of_another_student_is_a_sentence(student):
    names = [name for name, _ in student.named_parameters()]
    state = {
        f"{key}.{name}": torch.zeros(3)
        for name in names
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    with (
        pytest.raises(UserError, match=r"x/trainer\.safetensors does not fit this run"),
        checkpoint.restoring(Path("x")),
    ):
        checkpoint.unpack_optimizer(torch.optim.Adam(student.named_parameters()), state)


def test_best_is_replaced_shown_and_never_resumed_from(tmp_path, student, tokenizer):
    def corner(folder):
        return checkpoint.load(folder)[0].wte.weight[0, 0].item()

    for step, name in enumerate(("start", "step_0000001", "best")):
        with torch.no_grad():
            student.wte.weight[0, 0] = step
        state = dict(history={}, state={}, counters={"step": step})
        checkpoint.save(tmp_path / "checkpoints" / name, student, tokenizer, **state)
    assert checkpoint.find(tmp_path).name == "best"
    assert checkpoint.newest(tmp_path).name == "step_0000001"
    with torch.no_grad():
        student.wte.weight[0, 0] = 9
    assert corner(checkpoint.save(checkpoint.find(tmp_path), student, tokenizer, **state)) == 2
    assert (
        corner(
            checkpoint.save(checkpoint.find(tmp_path), student, tokenizer, **state, replace=True)
        )
        == 9
    )
    expected = {"start", "step_0000001", "best"}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == expected
    assert checkpoint.find(tmp_path / "checkpoints" / "start").name == "start"


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, student, tokenizer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path / "checkpoints" / "c", student, tokenizer)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    shutil.rmtree(tmp_path / "checkpoints")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [*checkpoint.FILES, "manifest.json"])
def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_taken(
    tmp_path, student, tokenizer, name, capsys
):
    save(tmp_path / "checkpoints" / "step_0000003", student, tokenizer, step=3)
    folder = save(tmp_path / "checkpoints" / "step_0000007", student, tokenizer, step=7)
    assert checkpoint.newest_whole(tmp_path) == folder
    for harm in (lambda path: flip(path, path.stat().st_size // 2), Path.unlink):
        harm(folder / name)
        assert checkpoint.newest_whole(tmp_path).name == "step_0000003"
        err = capsys.readouterr().err
        assert str(folder) in err and name in err and err.count("\n") == 1
        if name not in ("trainer.json", "manifest.json"):  # found before anything is read from them
            with pytest.raises(UserError, match=re.escape(str(folder)) + ".*" + name):
                checkpoint.load(folder)
    # the resumed run comes by
    again = save(tmp_path / "checkpoints" / "step_0000007", student, tokenizer, step=7)
    assert checkpoint.newest_whole(tmp_path) == again
    for checkpoint_folder in (again, tmp_path / "checkpoints" / "step_0000003"):
        flip(checkpoint_folder / name, 0)
    with pytest.raises(UserError, match="every checkpoint"):
        checkpoint.newest_whole(tmp_path)


@pytest.mark.parametrize(
    "claim",
    [
        dict(n_head=0),
        dict(n_head=-2),
        dict(n_layer=10**9),
        dict(n_layer=3),
        dict(n_embd=10**7, n_head=10**6),
        dict(n_head=3),
        dict(n_embd=2.0),
        dict(context=None),
        dict(vocab_size=2**60),
        dict(n_layer=True),
        dict(extra=1),
        dict(n_head=4),
    ],
)
def test_what_a_hostile_model_json_claims_is_refused_before_it_is_allocated(
    tmp_path, student, tokenizer, claim
):
    folder = save(tmp_path / "c", student, tokenizer)
    record = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(record | claim))
    seal(folder)
    if claim == dict(n_head=4):  # heads of 16 instead of 32: nothing in the weights says otherwise
        assert checkpoint.load(folder)[0].config.n_head == 4
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"model\.(json|safetensors)"):
        checkpoint.load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_weights_with_which_nothing_can_be_computed_are_refused(
    tmp_path, student, tokenizer, value
):
    with torch.no_grad():
        student.blocks[1].fc.weight[3, 5] = value
    hf.write(tmp_path / "foreign", student, tokenizer)
    ours = save(tmp_path / "c", student, tokenizer)
    for folder, name in (
        (ours, r"blocks\.1\.fc\.weight"),
        (tmp_path / "foreign", r"transformer\.h\.1\.mlp\.c_fc\.weight"),
    ):
        with pytest.raises(
            UserError, match=f"{folder}/.*NaN, infinite or absurdly large weights, in {name}"
        ):
            checkpoint.load(folder)
    with pytest.raises(UserError, match="NaN, infinite or absurdly large weights"):
        checkpoint.restore(student, ours)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint with the optimiser's state of the student in it."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(tiny_stories(200), 320)
    student = Student(
        StudentConfig(n_layer=1, n_head=1, n_embd=16, context=8, vocab_size=tokenizer.vocab_size)
    )
    counters = dict(step=3, words=9, tokens=9, corpus="0123")
    history = dict(words=9, corpus=["a.txt"], corpus_words=9)
    run = tmp_path_factory.mktemp("run")
    state = {
        f"{key}.{name}": p.detach().clone()
        for name, p in student.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
    }
    state |= {f"step.{name}": torch.tensor(3.0) for name, _ in student.named_parameters()}
    checkpoint.save(
        run / "checkpoints" / "a",
        student,
        tokenizer,
        history=history,
        state=state,
        counters=counters,
    )
    return run


@given(data=st.data())
def test_no_harm_to_a_checkpoint_is_a_traceback(whole, tmp_path_factory, data):
    """Bytes cut, flipped and replaced, values of other types, keys that are missing; also if the
    manifest was changed to match."""
    run = tmp_path_factory.mktemp("harmed")
    shutil.copytree(whole, run, dirs_exist_ok=True)
    folder = run / "checkpoints" / "a"
    damage(folder / data.draw(st.sampled_from([*checkpoint.FILES, "manifest.json"])), data)
    if data.draw(st.booleans()):
        (folder / "manifest.json").unlink()
        write_manifest(folder)
    student = Student(StudentConfig(n_layer=1, n_head=1, n_embd=16, context=8, vocab_size=320))
    optimizer = torch.optim.Adam(student.named_parameters())
    checkpoint.newest(run)
    with contextlib.suppress(UserError):
        folder = checkpoint.newest_whole(run)
        checkpoint.load(checkpoint.find(run))
        checkpoint.restore(student, folder)
        state, _ = checkpoint.load_trainer(folder, PretrainState)
        with checkpoint.restoring(folder):
            checkpoint.unpack_optimizer(optimizer, state)
        checkpoint.load_trainer(folder, PretrainState)
