"""A run folder as somebody else might send it. No text in the folder is opened, executed or sent
to: files, URLs, functions and models are named on the command line, also for a resume. The folder's
contents are treated as data."""

import contextlib
import dataclasses
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from conftest import SHORT, SMALL, fails, read_lines
from fault_server import FaultServer, graded
from safetensors.torch import load_file, save_file

import train_interact as interact
import train_pretrain as pretrain
from lab import judge
from scripts import export_hf, sample, watch
from tests.train.runs import interrupted_at
from tinystory.config import InteractConfig, PretrainConfig
from tinystory.config.record import given_again
from tinystory.data.corpus import NAMES
from tinystory.data.openings import names_file
from tinystory.run.errors import UserError
from tinystory.run.records import write_manifest
from tinystory.student import checkpoint
from tinystory.teacher.api import Reply
from tinystory.teacher.cache import Cache
from tinystory.teacher.client import Teacher

GRADED = [*SHORT, "--stories-per-step", "12", "--grades", "8", "--diversity", "0"]
NAMED = "STRANGER"  # in every text that a forged folder holds, and nowhere else
# Names of Python's audit events of a text that is opened, executed or sent to.
ACTS = (
    "open os.listdir os.scandir os.remove os.rename os.exec os.posix_spawn os.system "
    "subprocess.Popen compile exec import socket.connect socket.getaddrinfo socket.bind "
    "urllib.Request shutil.copyfile shutil.rmtree"
).split()
acts: list[tuple] = []  # those with NAMED, while `watched`
watching = False


def note(event, arguments):
    if watching and event in ACTS and NAMED in repr(arguments):
        acts.append((event, arguments))


sys.addaudithook(note)  # for good: Python removes none


@contextlib.contextmanager
def untouched():
    """In the block, no text with NAMED is opened, executed or sent to."""
    global watching
    acts.clear()
    watching = True
    try:
        yield
    finally:
        watching = False
    assert not acts


@pytest.fixture(scope="module")
def own(place, tmp_path_factory):
    """A run of this user. Everything except the folder's name could come from a stranger."""
    folder = tmp_path_factory.mktemp("own") / "run"
    init = ["--init", str(checkpoint.newest(place / "p"))]
    interact.main([*init, *GRADED, "--reward", "random", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Texts that a command could act on. The named files exist and are valid."""
    folder = tmp_path_factory.mktemp("private")
    story = f"Once upon a time, {NAMED} ran."
    (folder / f"{NAMED}.txt").write_text("\n\n".join([story] * 40))
    (folder / f"{NAMED}.py").write_text("def score(opening, stories): return [0.5] * len(stories)")
    return [
        f"{folder / NAMED}.txt",
        f"--corpus={folder / NAMED}.txt",
        f"{folder / NAMED}.py",
        f"{folder / NAMED}.py:score",
        f"../{NAMED} of mine",
        f"http://127.0.0.1:9/{NAMED}",
        f"hub:{NAMED}/model@main",
        f'{{"user": "{NAMED}"}}',
        f"cuda:{NAMED}",
    ]


def change_config(folder, **options):
    path = folder / "config.json"
    record = json.loads(path.read_text())
    record["options"] |= options
    path.write_text(json.dumps(record))


def resume(folder, *more):
    return ["--resume", "--steps", "5", "--out", str(folder), *more]


# ---- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [PretrainConfig, InteractConfig])
def test_no_option_takes_from_a_folder_what_could_be_opened_executed_or_sent_to(
    place, own, texts, tmp_path, capsys, config_class
):
    """Every option, with every text. For options that name something, the error asks for the
    flag."""
    main, source = interact.main, own
    if config_class is PretrainConfig:
        main, source = pretrain.main, place / "p"
    folder = shutil.copytree(source, tmp_path / "run")
    if config_class is PretrainConfig:
        change_config(folder, corpus=["builtin"])
    config = (folder / "config.json").read_text()
    kinds = get_type_hints(config_class)
    asked = set()
    for f in dataclasses.fields(config_class):
        if f.name in ("out", "resume", "any_model"):  # from the command line alone
            continue
        is_text = kinds[f.name] in (str, list[str]) and not f.metadata["allowed"]
        for text in texts if is_text else texts[:1]:
            if f.name == "openings" and not names_file(text):  # a text: see below
                continue
            change_config(folder, **{f.name: [text] if kinds[f.name] == list[str] else text})
            argv = ["--resume", "--out", str(folder)]
            if f.name == "init":  # only its text is used: see below
                argv += ["--init", "another"]
            with untouched():
                line = fails(main, argv, capsys)
            flag = f"--{f.name.replace('_', '-')}"
            assert flag in line or f"no {f.name}" in line
            if "again on the command line" in line:
                asked.add(f.name)
                assert shlex.quote(text) in line or f"{flag}={text}" in line
            (folder / "config.json").write_text(config)
    expected = {"device", "corpus"}
    if config_class is InteractConfig:
        expected |= {"reward", "openings", "control"}
        expected |= {"teacher_url", "teacher_model", "teacher_extra", "teacher_prompt"}
        expected |= {"judge", "judge_model", "judge_prompt"}
    assert asked == expected


@pytest.mark.parametrize("opening", [f"Once upon a time, {NAMED} ran", f"{NAMED}"])
def test_the_text_of_an_opening_is_taken_from_a_folder_as_a_text(
    own, tmp_path, monkeypatch, opening
):
    folder = shutil.copytree(own, tmp_path / "run")
    change_config(folder, openings=opening)
    with untouched():
        interact.main(resume(folder))
    assert read_lines(folder / "stories.jsonl")[-1]["opening"] == opening


def test_an_opening_that_is_also_a_files_name_reads_no_file(own, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(own, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    Path(NAMED).write_text("a private line\n")
    change_config(folder, openings=NAMED)
    with untouched():
        line = fails(interact.main, resume(folder), capsys)
    assert f"give ./{NAMED} to read the file" in line


def leaves(value, path=()):
    """The paths of all values inside a JSON value, and of the lists of texts in it."""
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list) and not all(isinstance(item, str) for item in value):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    else:
        yield path


def forged(record, path, text):
    """The record with the text at this path, in a list where a list is."""
    record = json.loads(json.dumps(record))
    inside = record
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = [text] if isinstance(inside[path[-1]], list) else text
    return record


@pytest.mark.parametrize("name", ["model.json", "trainer.json", "tokenizer.json"])
def test_no_field_of_a_checkpoint_is_opened_executed_or_sent_to(
    own, texts, tmp_path, capsys, monkeypatch, name
):
    """To resume a run, and to begin one with the built-in teacher."""
    corpora = []

    @contextlib.contextmanager
    def teacher(corpus):
        corpora.append(corpus)
        raise UserError("no teacher here")
        yield

    monkeypatch.setattr("tinystory.evaluate.open_grader.builtin_teacher", teacher)
    folder = shutil.copytree(own, tmp_path / "run")
    start, newest = folder / "checkpoints" / "start", checkpoint.newest(folder)
    record = json.loads((start / name).read_text())
    if name == "tokenizer.json":
        del record["model"]["vocab"], record["model"]["merges"]  # texts of tokens
    else:
        record.get("history", {}).update(corpus=["builtin", "dull"])
    new = ["--init", str(start), *SHORT, "--out", str(tmp_path / "new")]
    for path in leaves(record):
        for place in (start, newest):
            whole = json.loads((own / place.relative_to(folder) / name).read_text())
            (place / name).write_text(json.dumps(forged(whole, path, texts[0])))
            seal(place)
        with untouched():
            end_well(interact.main, resume(folder))
            capsys.readouterr()
            assert fails(interact.main, new, capsys)
    assert all(set(corpus) <= set(NAMES) for corpus in corpora)


def test_a_checkpoint_names_a_file_to_nobody(own, texts, tmp_path, capsys, monkeypatch):
    """The path of the corpus is shown, and the user gives that path or another to the built-in
    teacher or the judge."""
    monkeypatch.setattr(judge, "Reader", lambda *_: None)
    folder = shutil.copytree(own, tmp_path / "run")
    start = folder / "checkpoints" / "start"
    for text in texts:
        record = json.loads((start / "model.json").read_text())
        record["history"]["corpus"] = [text]
        (start / "model.json").write_text(json.dumps(record))
        seal(start)
        with untouched():
            new = ["--init", str(start), *SHORT, "--out", str(tmp_path / "new")]
            for line in (
                fails(interact.main, new, capsys),
                fails(judge.main, [str(folder)], capsys),
            ):
                assert f"records {shlex.quote(text)} as the student's corpus" in line
                assert "give --corpus" in line


def test_a_strangers_folder_can_be_looked_at(own, texts, tmp_path):
    """With a text in every field of config.json that is no option."""
    folder = shutil.copytree(own, tmp_path / "run")
    record = json.loads((folder / "config.json").read_text())
    own_fields = {f.name for f in dataclasses.fields(InteractConfig)}
    for path in list(leaves(record)):
        is_option = path[0] == "options" and path[1] in own_fields - {"init"}
        if not is_option and path[0] not in ("started", "threads", "resumed"):
            record = forged(record, path, texts[0])
    (folder / "config.json").write_text(json.dumps(record))
    before = (folder / "config.json").read_bytes()
    with untouched():
        watch.main([str(folder)])
        sample.main([str(folder), "--opening", "Once", "--device", "cpu"])
        export_hf.main([str(folder), str(tmp_path / "exported")])
    assert (folder / "config.json").read_bytes() == before
    with untouched():
        interact.main(resume(folder))


def test_the_line_of_a_stopped_run_can_be_pasted(place, own, tmp_path, capsys, monkeypatch):
    """The printed command has every option that no folder may name."""
    (tmp_path / "my openings.txt").write_text("Once\nOnce upon\n")
    begun = {
        pretrain: ["--corpus", str(place / "corpus.txt"), "--words", "2000", *SMALL],
        interact: ["--init", str(place / "p"), *SHORT, "--reward", f"{place / 'reward.py'}:score"],
    }
    begun[interact] += ["--openings", str(tmp_path / "my openings.txt")]
    for module, options in begun.items():
        out = str(tmp_path / module.__name__)
        with interrupted_at(module, step=2):
            module.main([*options, "--out", out])
        (line,) = re.findall("Resume with: (.*)", capsys.readouterr().out)
        assert "Once" not in line
        assert "--resume" in fails(module.main, [*options, "--out", out], capsys)
        assert "again on the command line" in fails(module.main, ["--resume", "--out", out], capsys)
        words = shlex.split(line)
        module.main(words[words.index("--out") :])


def test_what_is_given_again_is_one_argument_each():
    """A file may begin with a dash."""
    config = InteractConfig(reward="-mine.py", teacher_url=["http://a", "http://b"])
    assert given_again(config) == ["--teacher-url", "http://a", "http://b", "--reward=-mine.py"]


def test_a_recorded_value_is_shown_as_text(own, tmp_path, capsys):
    folder = shutil.copytree(own, tmp_path / "run")
    change_config(folder, reward="\x1b[2J\u202e/evil.py\n" + "x" * 10**5)
    line = fails(interact.main, resume(folder), capsys)
    assert line.isprintable() and "--reward '[2J/evil.py xx" in line and len(line) < 1000


def seal(folder):
    (folder / "manifest.json").unlink()
    write_manifest(folder)


# ---- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["replies.jsonl", "judge_replies.jsonl", "comparison_replies.jsonl"]
)
def test_replies_are_not_written_through_a_link(tmp_path, name):
    private = tmp_path / "private"
    private.write_text("a line without an end")
    (tmp_path / name).symlink_to(private)
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        Cache(tmp_path / name).put("question", Reply("1 1 1"), (0, 0, 0))
    assert private.read_text() == "a line without an end"


@pytest.mark.parametrize(
    "forged",
    [
        {"quiet": {"n": 128}},
        {"quiet": {"extra_headers": {"X-Forged": "1"}}},
        {"token_cap": "n"},
        {"refused": ["messages"]},
        {"model": "\x1b[2J"},
        {"url": "http://elsewhere"},
        {"more": 1},
    ],
)
@pytest.mark.usefixtures("short_pauses")
def test_a_forged_probe_is_not_taken(tmp_path, forged):
    path = tmp_path / "replies.jsonl"
    with FaultServer() as server:
        with Teacher([server.url], cache=path) as teacher:
            honest = teacher.probes[0]
        (line,) = read_lines(path)
        line["reply"] = json.dumps(json.loads(line["reply"]) | forged)
        path.write_text(json.dumps(line) + "\n")
        with Teacher([server.url], cache=path) as teacher:
            probe = teacher.probes[0]
            assert graded(teacher, "Once", ["A dog ran."])[0].scores
        assert len(server.requests) == 3  # the probe was repeated
        for name in ("quiet", "token_cap", "refused", "least_tokens", "held_to", "url"):
            assert getattr(probe, name) == getattr(honest, name)
        assert all("n" not in body and "messages" in body for body in server.requests)


REPLY = {"key": "a", "reply": "1 1 1", "logprobs": None, "error": None, "charged": [0, 0, 0]}
COUNTS = [[-1, 5, 5], [1, 1, 10**12], [1.5, 2, 2], [1, 1], "12"]
LOGPROBS = [["yes"], [["yes", 0.5]], [["yes", "x"]], [[1, -1.0]], {}]


@pytest.mark.parametrize(
    "field, value",
    [("error", 3)] + [("charged", it) for it in COUNTS] + [("logprobs", it) for it in LOGPROBS],
)
def test_a_reply_that_no_server_gives_is_refused(tmp_path, field, value):
    path = tmp_path / "replies.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (REPLY, REPLY | {field: value})))
    with pytest.raises(
        UserError, match=rf"line 2 of .*replies\.jsonl is not a record of this file .*{field}"
    ):
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
        (FEATURES, lambda x: x.long()),
        (FEATURES, lambda x: broken(x, float("nan"))),
        (FEATURES, None),
        (SCORES, lambda x: broken(x, 7.0)),
        (MOMENT, lambda x: broken(x, float("nan"))),
        (MOMENT, lambda x: x.to(torch.float8_e4m3fn)),
        (SQUARE, lambda x: broken(x, -1.0)),
        (STEP, lambda x: x - 9),
        (STEP, None),
        ("critic.gram", lambda x: broken(x, float("nan"))),
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
        ("written", 10**30),
        ("words_in", -1),
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
