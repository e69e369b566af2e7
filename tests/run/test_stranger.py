"""A run folder as somebody else might send it: what acts on it asks first, and what it holds is
data to the end."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SHORT, fails, metrics, read_lines
from fault_server import FaultServer
from safetensors.torch import load_file, save_file

import train_interact as interact
import train_pretrain as pretrain
from lab import judge
from scripts import export_hf, sample, watch
from tinystory.run import trust
from tinystory.run.errors import UserError
from tinystory.run.folder import read_config, write_config
from tinystory.run.log import RunLog
from tinystory.run.records import write_manifest
from tinystory.student import checkpoint
from tinystory.teacher.cache import Cache, CachedReply
from tinystory.teacher.client import Teacher

GRADED = [*SHORT, "--stories-per-step", "12", "--grades", "8", "--diversity", "0"]


@pytest.fixture(scope="module")
def own(place, tmp_path_factory):
    """A run of this user's."""
    folder = tmp_path_factory.mktemp("own") / "run"
    init = ["--init", str(checkpoint.newest(place / "p"))]
    interact.main([*init, *GRADED, "--reward", "random", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def others(own, tmp_path_factory):
    """The same run, made by somebody else: the mark is by another secret."""
    folder = shutil.copytree(own, tmp_path_factory.mktemp("others") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("their_config")))
        write_config(folder, read_config(folder))
    return folder


def change_config(folder, **options):
    path = folder / "config.json"
    record = json.loads(path.read_text())
    record["options"] |= options
    path.write_text(json.dumps(record))


def resume(folder, *more):
    return ["--resume", "--steps", "5", "--out", str(folder), *more]


# ---- acting on a folder --------------------------------------------------------------------------


def test_the_users_own_run_is_resumed_without_a_question(own, tmp_path):
    folder = shutil.copytree(own, tmp_path / "moved")
    for steps in (5, 6):  # each resume writes config.json anew
        interact.main(["--resume", "--steps", str(steps), "--out", str(folder)])
        assert len(metrics(folder)) == steps and trust.is_own(read_config(folder))


def test_anothers_run_is_resumed_after_one_trust(others, tmp_path, capsys):
    folder = shutil.copytree(others, tmp_path / "run")
    before = (folder / "config.json").read_bytes()
    line = fails(interact.main, resume(folder), capsys)
    assert "does not carry your mark" in line and "add --trust, once" in line
    assert (folder / "config.json").read_bytes() == before and not (folder / ".lock").exists()
    interact.main(resume(folder, "--trust"))
    interact.main(["--resume", "--steps", "6", "--out", str(folder)])
    assert len(metrics(folder)) == 6


def test_anothers_pretraining_is_resumed_after_one_trust(place, tmp_path, capsys):
    folder = shutil.copytree(place / "p", tmp_path / "p")
    change_config(folder, trust=True)  # a record trusts nobody, itself included
    line = fails(pretrain.main, ["--resume", "--out", str(folder)], capsys)
    assert f"it would read {place / 'corpus.txt'}; if you trust it" in line
    pretrain.main(["--resume", "--trust", "--out", str(folder)])
    pretrain.main(["--resume", "--out", str(folder)])


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["options"].update(steps=9),
        lambda record: record.update(device="another"),
        lambda record: record.update(more=1),
        lambda record: record.pop("mark"),
        lambda record: record.update(mark=None),
        lambda record: record.update(mark="\ud800"),
        lambda record: record.update(mark="0" * 64),
    ],
)
def test_a_changed_record_loses_its_mark(own, change):
    record = read_config(own)
    assert trust.is_own(record)
    change(record)
    assert not trust.is_own(record)


@pytest.mark.parametrize("private", ["openings", "teacher_prompt"])
def test_a_file_that_a_strangers_run_names_is_not_read_and_the_sentence_names_it(
    others, tmp_path, capsys, monkeypatch, private
):
    """Nor is anything sent, although there is no key to lose."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    folder = shutil.copytree(others, tmp_path / "run")
    key = tmp_path / "id_ed25519.txt"
    key.write_text("a private line\nanother\n")
    with FaultServer() as server:
        options = {"reward": "", "teacher_url": [server.url], private: str(key)}
        change_config(folder, teacher_extra='{"a": 1}', teacher_max_tokens=77, **options)
        line = fails(interact.main, resume(folder), capsys)
        assert f"send stories to {server.url} with the fields '{{" in line and str(key) in line
        assert "for replies of up to 77 tokens" in line and "--trust" in line
        assert not server.requests + server.others


def test_the_opening_of_a_strangers_run_goes_nowhere(others, tmp_path, capsys, monkeypatch):
    """The lines of a private file, to a stranger's server."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    folder = shutil.copytree(others, tmp_path / "run")
    (tmp_path / "id_ed25519").write_text("a private line\n")
    with FaultServer() as server:
        urls = [server.url]
        change_config(folder, reward="", teacher_url=urls, openings=str(tmp_path / "id_ed25519"))
        fails(interact.main, resume(folder), capsys)
        assert not server.seen


def test_headers_of_the_environment_are_not_sent_to_a_strangers_server(
    others, tmp_path, capsys, monkeypatch
):
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Gateway-Key: hidden-value")
    monkeypatch.setenv("OPENAI_ORG_ID", "hidden-org")
    folder = shutil.copytree(others, tmp_path / "run")
    with FaultServer() as server:
        change_config(folder, reward="", teacher_url=[server.url])
        line = fails(interact.main, resume(folder), capsys)
        assert "with your OPENAI_CUSTOM_HEADERS, OPENAI_ORG_ID for" in line and "hidden" not in line
        assert not server.seen


def test_a_strangers_folder_can_be_looked_at(others, tmp_path):
    folder = shutil.copytree(others, tmp_path / "run")
    before = (folder / "config.json").read_bytes()
    watch.main([str(folder)])
    sample.main([str(folder), "--opening", "Once", "--device", "cpu"])
    export_hf.main([str(folder), str(tmp_path / "exported")])
    assert (folder / "config.json").read_bytes() == before


def test_a_checkpoint_whose_corpus_was_changed_leads_to_no_file(own, place, tmp_path, capsys):
    """A run's own config.json with somebody else's checkpoint beside it."""
    folder = shutil.copytree(own, tmp_path / "run")
    (tmp_path / "private.txt").write_text("a private line\n")
    start = folder / "checkpoints" / "start"
    name_corpus(start, tmp_path / "private.txt")
    line = fails(interact.main, resume(folder), capsys)
    assert f"{start / 'model.json'} says" in line and "private.txt" in line
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "Reader", lambda *_: None)
        assert "private.txt" in fails(judge.main, [str(folder)], capsys)


def test_a_strangers_checkpoint_leads_a_new_run_to_no_file(place, tmp_path, capsys):
    folder = shutil.copytree(checkpoint.newest(place / "p"), tmp_path / "a" / "b" / "theirs")
    (tmp_path / "private.txt").write_text("a private line\n")
    name_corpus(folder, tmp_path / "private.txt")
    new = ["--init", str(folder), *SHORT, "--reward", "random", "--out", str(tmp_path / "run")]
    assert "private.txt, which would be read" in fails(interact.main, new, capsys)
    interact.main([*new, "--trust"])


def name_corpus(folder, path):
    record = json.loads((folder / "model.json").read_text())
    record["history"]["corpus"] = [str(path)]
    (folder / "model.json").write_text(json.dumps(record))
    seal(folder)


def seal(folder):
    (folder / "manifest.json").unlink()
    write_manifest(folder)


# ---- the secret ----------------------------------------------------------------------------------


def test_the_secret_is_the_users_alone_and_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    program = "from tinystory.run.trust import marked; print(marked({'a': 1})['mark'])"
    command = [sys.executable, "-c", program]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    marks = {process.communicate()[0].strip() for process in processes}
    assert marks == {trust.marked({"a": 1})["mark"]}
    (secret,) = (tmp_path / "tinystory").iterdir()
    assert secret.name == "secret" and secret.stat().st_mode & 0o777 == 0o600
    assert len(secret.read_bytes()) == 32 and secret.read_bytes().hex() not in marks


@pytest.mark.parametrize("harm", ["no folder", "damaged"])
def test_without_a_secret_a_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys, harm):
    """As in a container whose home cannot be written to."""
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    if harm == "no folder":
        home.write_text("")
    else:
        (home / "tinystory").mkdir(parents=True)
        (home / "tinystory" / "secret").write_text("short")
    with RunLog(tmp_path / "run", resume_step=None) as log:
        log.config({"seed": 1, "device": "cpu"})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: this run's folder does not get your mark (")
    assert "--trust" in line and str(home) in line
    record = read_config(tmp_path / "run")
    assert "mark" not in record and not trust.is_own(record)


def test_without_a_home_there_is_no_mark(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr("pathlib.Path.home", nowhere)
    assert trust.marked({"a": 1}) == {"a": 1} and not trust.is_own({"a": 1, "mark": "0" * 64})


# ---- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["replies.jsonl", "judge_replies.jsonl", "comparison_replies.jsonl"]
)
def test_replies_are_not_written_through_a_link(tmp_path, name):
    private = tmp_path / "private"
    private.write_text("a line without an end")
    (tmp_path / name).symlink_to(private)
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        Cache(tmp_path / name).put("question", CachedReply("1 1 1"))
    assert private.read_text() == "a line without an end"


def test_a_link_among_a_runs_records_is_a_sentence(place, tmp_path, capsys):
    init = ["--init", str(checkpoint.newest(place / "p")), *SHORT]
    with FaultServer() as server:
        interact.main([*init, "--teacher-url", server.url, "--out", str(tmp_path / "run")])
        private = tmp_path / "private"
        private.write_text("a line without an end")
        (tmp_path / "run" / "replies.jsonl").unlink()
        (tmp_path / "run" / "replies.jsonl").symlink_to(private)
        line = fails(interact.main, resume(tmp_path / "run"), capsys)
        assert "replies.jsonl is a symbolic link" in line
    assert private.read_text() == "a line without an end"


@pytest.mark.parametrize(
    "forged",
    [
        {"quiet": {"n": 128}},
        {"quiet": {"extra_headers": {"X-Forged": "1"}}},
        {"token_cap": "n"},
        {"refused": ["messages"]},
        {"least_tokens": 1_000_000},
        {"held_to": "n"},
        {"tokens": [-1, 3]},
        {"seconds": 0},
        {"notes": ["\x1b[2J"]},
        {"url": "http://elsewhere"},
        {"more": 1},
    ],
)
@pytest.mark.usefixtures("short_pauses")
def test_a_forged_probe_is_not_taken(tmp_path, forged):
    path = tmp_path / "replies.jsonl"
    with FaultServer() as server:
        with Teacher(server.url, cache=path) as teacher:
            honest = teacher.probes()[0]
        (line,) = read_lines(path)
        line["reply"] = json.dumps(json.loads(line["reply"]) | forged)
        path.write_text(json.dumps(line) + "\n")
        with Teacher(server.url, cache=path) as teacher:
            probe = teacher.probes()[0]
            assert teacher.grade("Once", ["A dog ran."])[0].scores
        assert len(server.requests) == 3  # the probe was repeated
        for name in ("quiet", "token_cap", "refused", "least_tokens", "held_to", "url"):
            assert getattr(probe, name) == getattr(honest, name)
        assert all("n" not in body and "messages" in body for body in server.requests)


@pytest.mark.parametrize(
    "tokens", [[-1e9, -1e9], [-1, 5], [1, 10**9], [1.5, 2], [True, 1], [1], [], "12", 3, {"a": 1}]
)
def test_counts_of_tokens_that_no_server_gives_are_refused(tmp_path, tokens):
    path = tmp_path / "replies.jsonl"
    lines = [{"key": "a", "reply": "1 1 1"}, {"key": "b", "reply": "1 1 1", "tokens": tokens}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"line 2 of .*replies\.jsonl does not belong there .*tok"):
        Cache(path)


def test_an_error_that_was_not_written_here_is_refused(tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text(json.dumps({"key": "a", "reply": "1 1 1", "error": 3}) + "\n")
    with pytest.raises(UserError, match="line 1 of "):
        Cache(path)


# ---- checkpoints ---------------------------------------------------------------------------------


def broken(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[0] = value
    return tensor


FEATURES, SCORES = "score_model.features", "score_model.scores"
MOMENT, SQUARE, STEP = "exp_avg.wte.weight", "exp_avg_sq.wte.weight", "step.wte.weight"


@pytest.mark.parametrize(
    "name, change",
    [
        (FEATURES, lambda x: x[:, :-1].contiguous()),
        (FEATURES, lambda x: x[0].clone()),
        (FEATURES, lambda x: x[:-1].contiguous()),
        (FEATURES, lambda x: x.double()),
        (FEATURES, lambda x: x.long()),
        (FEATURES, lambda x: broken(x, float("nan"))),
        (FEATURES, None),
        (SCORES, lambda x: x.float()),
        (SCORES, lambda x: x[:, None].clone()),
        (SCORES, lambda x: x.sum()),
        (SCORES, lambda x: broken(x, float("inf"))),
        (SCORES, lambda x: broken(x, 7.0)),
        (SCORES, None),
        (MOMENT, lambda x: broken(x, float("nan"))),
        (MOMENT, lambda x: broken(x, 1e30)),
        (MOMENT, lambda x: x.half()),
        (MOMENT, lambda x: x.to(torch.float8_e4m3fn)),
        (SQUARE, lambda x: broken(x, -1.0)),
        (STEP, lambda x: x - 9),
        (STEP, None),
        ("critic.gram", lambda x: broken(x, float("nan"))),
        ("critic.gram", lambda x: x[:-1].contiguous()),
        ("critic.moment", None),
    ],
)
def test_a_trainers_state_that_was_not_saved_here_is_a_sentence(
    own, tmp_path, capsys, name, change
):
    folder = shutil.copytree(own, tmp_path / "run")
    newest = checkpoint.newest(folder)
    path = newest / "trainer.safetensors"
    state = load_file(path)
    assert name in state
    tensor = state.pop(name)
    if change is not None:
        state[name] = change(tensor)
    save_file(state, path)
    seal(newest)
    if name == STEP and change is None:  # as before the first step
        interact.main(resume(folder))
    else:
        assert str(path) in fails(interact.main, resume(folder), capsys)


def change_counter(folder, name, value):
    newest = checkpoint.newest(folder)
    path = newest / "trainer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    seal(newest)
    return path


@pytest.mark.parametrize(
    "name, value",
    [
        ("kl_coef", 1e308),
        ("kl_coef", -1.0),
        ("kl_coef", True),
        ("written", 1e30),
        ("written", 10**30),
        ("written", -1),
        ("step", 10**30),
        ("words_in", -1),
        ("words_out", 2**63),
        ("best_step", -1),
        ("best_step", 0.5),
    ],
)
def test_counters_out_of_range_are_a_sentence(own, tmp_path, capsys, name, value):
    folder = shutil.copytree(own, tmp_path / "run")
    path = change_counter(folder, name, value)
    assert str(path) in fails(interact.main, resume(folder), capsys)


@pytest.mark.parametrize(
    "name", ["step", "written", "words_in", "words_out", "best_step", "kl_coef"]
)
def test_the_largest_counters_are_no_traceback(own, tmp_path, name):
    folder = shutil.copytree(own, tmp_path / "run")
    change_counter(folder, name, 1e9 if name == "kl_coef" else 2**53 - 1)
    end_well(interact.main, resume(folder))


@pytest.mark.parametrize("name", ["step", "words", "tokens"])
def test_the_largest_counters_of_pretraining_are_no_traceback(place, tmp_path, name):
    folder = shutil.copytree(place / "p", tmp_path / "run")
    change_counter(folder, name, 2**53 - 1)
    end_well(pretrain.main, ["--resume", "--words", "2700", "--out", str(folder)])


def end_well(main, argv):
    """A run that ends, or a sentence."""
    try:
        main(argv)
    except SystemExit as exit:
        assert exit.code == 2
