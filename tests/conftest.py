"""Shared fixtures and helpers: a student small enough to train within a test, its corpus, and short
retry pauses."""

import contextlib
import hashlib
import json
import os
import re
import signal
import uuid
from pathlib import Path

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

import train_pretrain
from tinystory.data.builtin import grammar
from tinystory.data.corpus import BUILTIN, open_corpus
from tinystory.data.tokenizer import Tokenizer
from tinystory.ops import backend
from tinystory.rubric.rubric import Rubric
from tinystory.student import checkpoint
from tinystory.student.model import Student, StudentConfig
from tinystory.teacher import pool

os.environ.setdefault("TINYSTORY_KERNELS", "ours")  # on a Mac too
# A shell's background job ignores Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# TINYSTORY_FUZZ=50 pytest -m hypothesis: fifty times as many examples. No deadline, since a slow
# machine is no failure.
examples = 100 * int(os.environ.get("TINYSTORY_FUZZ", "1"))
hypothesis.settings.register_profile(
    "patient",
    deadline=None,
    max_examples=examples,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("patient")

LIMIT_S = 600  # seconds that only a hang takes, however busy the machine is


def pytest_addoption(parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a test that is skipped fails")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.skipped and item.config.getoption("--no-skips"):
        report.outcome = "failed"
    return report


NAMES = ("Tom", "Mia", "Ben", "Lily", "Max", "Ana", "Sam", "Eva")
THINGS = ("ball", "kite", "boat", "drum", "hat", "cake", "shell", "lamp")
PLACES = ("park", "wood", "house", "garden", "shop", "barn")


# Text that is difficult for a tokenizer.
AWKWARD = (
    "<s> <pad> </s> <unk> <mask> <|endoftext|> \n \r\n \t \x00 \x1c \x85 \u00a0 \u200b \u2028 \u3000 "
    "\ufeff \ufffd \U0010ffff 's 'LL e\u0301 🐈‍⬛ 猫 १"
).split(" ")
AWKWARD += [" ", "  ", " 12"]


@contextlib.contextmanager
def using(kernels: str):
    """Use another back-end inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_current", kernels)
        yield


@pytest.fixture
def empty_stories_too(monkeypatch):
    """Ask a callable about empty stories too, so that the calls do not depend on whether a student
    of a few steps writes any."""
    monkeypatch.setattr("tinystory.teacher.grade.is_blank", lambda story: False)


def on_gpu() -> bool:
    """Whether tensors are created on a GPU by default, as when tests/ops/test_gpu.py runs the tests
    of other files."""
    return torch.empty(0).is_cuda


def assert_no_worse(ours, theirs, exact, note, scale=None) -> tuple[float, float]:
    """The root mean square error of `ours` is at most twice that of `theirs`, PyTorch's result in
    the same dtype, or at most one rounding error of the result. scale: the tensor with the rounding
    errors that count, if not the result: a sum that cancels is exact only up to the rounding errors
    of the terms. Returns the maximum errors of both, in rounding errors of the largest entry. In
    float64, where PyTorch's result is the exact one, the bound is 256 of them."""
    eps = torch.finfo(ours.dtype).eps
    scale = (exact if scale is None else scale).double()
    error, own = ours.double() - exact, theirs.double() - exact
    rounding = eps * float(scale.abs().max())
    largest = float(error.abs().max()) / rounding, float(own.abs().max()) / rounding
    if ours.dtype == torch.float64:
        assert largest[0] < 256, f"{note}: {largest[0]:.0f} roundings"
        return 0.0, 0.0
    error, own, scale = (float(x.square().mean().sqrt()) for x in (error, own, scale))
    assert error <= max(2 * own, eps * scale), f"{note}: {error:.2e} against PyTorch's {own:.2e}"
    return largest


def assert_largest_no_worse(errors: dict[str, list[tuple[float, float]]]) -> None:
    """Over all shapes, the maximum error is at most twice PyTorch's. (For one small result it
    depends on chance.)"""
    for name, pairs in errors.items():
        ours, theirs = (max(column) for column in zip(*pairs, strict=True))
        assert ours <= max(2 * theirs, 1), (
            f"{name}: {ours:.2f} roundings against PyTorch's {theirs:.2f}"
        )


def tiny_stories(count: int) -> list[str]:
    stories = []
    for i in range(count):
        name, thing, place = NAMES[i % 8], THINGS[i // 8 % 8], PLACES[i // 64 % 6]
        stories.append(
            f"Once upon a time, {name} had a {thing}. {name} took the {thing} to the {place}. "
            f'"Where is my {thing}?" said {name}. It was in the {place} number {i}. {name} was happy.'
        )
    return stories


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test's random numbers do not depend on those that ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_replies(monkeypatch, tmp_path_factory) -> None:
    """The doctor finds no replies of other tests, and none of the user's."""
    path = tmp_path_factory.getbasetemp() / f"{uuid.uuid4()}.jsonl"
    monkeypatch.setattr("scripts.doctor.kept_replies", lambda config: path)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(tiny_stories(200), 320)


@pytest.fixture(scope="session")
def builtin_documents() -> dict[str, list[str]]:
    """The documents of each built-in corpus, by name."""
    return {name: list(open_corpus([name]).documents()) for name in BUILTIN}


@pytest.fixture(scope="session")
def rubric() -> Rubric:
    """The built-in teacher's rubric, fitted to a part of the built-in stories."""
    return Rubric(grammar.stories(250_000, seed=0))


@pytest.fixture
def short_pauses(monkeypatch):
    """Shorten the pauses between retries, and ignore the user's API key."""
    monkeypatch.setattr(pool, "PAUSE_S", 0.01)
    monkeypatch.setattr(pool, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def student(tokenizer) -> Student:
    torch.manual_seed(0)
    student = Student(
        StudentConfig(
            n_layer=2, n_head=2, n_embd=64, context=64, vocab_size=tokenizer.vocab_size, tied=False
        )
    )
    for p in student.parameters():  # far enough from zero that every path contributes
        torch.nn.init.normal_(p, std=0.2) if p.dim() >= 2 else torch.nn.init.normal_(
            p, mean=float(p[0] == 1), std=0.1
        )
    return student


ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--n-layer 2 --n-head 2 --n-embd 64 --context 64 --vocab-size 320 --batch-size 4 --eval-every 5"
)
SMALL = [*SMALL.split(), "--device", "cpu"]
SHORT = (
    "--stories-per-step 6 --max-new-tokens 16 --steps 4 --save-every 2 --device cpu --opening Once"
)
SHORT += " --eval-every 2 --eval-stories 4 --no-calibrate"
SHORT = SHORT.split(" ")


def cli(template: str, *values) -> list[str]:
    """The words of a command. Each `{}` is replaced by a value, which stays one word: a path may hold
    spaces."""
    rest = iter(values)
    words = [re.sub("{}", lambda _: str(next(rest)), word) for word in template.split()]
    assert next(rest, None) is None, "more values than places"
    return words


def fails(main, argv, capsys) -> str:
    """Run a command that must fail with exit code 2 and one error line on stderr; returns the
    line."""
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([10**400, 2**63, 1e300, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def send_hub_file(handler, body: bytes, commit: str, status: int = 200, error: str = "") -> None:
    """The Hub's answer to a request for a file, or the Hub's refusal."""
    handler.send_response(status)
    if error:
        handler.send_header("X-Error-Code", error)
    handler.send_header("X-Repo-Commit", commit)
    handler.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


def damage(path: Path, data) -> None:
    """Cut the file, flip a bit or insert bytes; or, in JSON and JSON Lines, remove a key or give a
    key any value. data: hypothesis's draws, which decide what is done and where."""
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(len(content), 400) - 1))
    how = data.draw(st.sampled_from(["cut", "flip", "insert", "value", "key"]))
    if how == "cut":
        content = content[:at]
    elif how == "flip":
        content = (
            content[:at]
            + bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))])
            + content[at + 1 :]
        )
    elif how == "insert" or path.suffix not in (".json", ".jsonl"):
        content = content[:at] + data.draw(st.binary(max_size=20)) + content[at:]
    else:
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        number = data.draw(st.integers(0, len(lines) - 1))
        record = inside = json.loads(lines[number])
        key = data.draw(st.sampled_from(sorted(inside)))
        while isinstance(inside[key], dict) and inside[key] and data.draw(st.booleans()):
            inside = inside[key]
            key = data.draw(st.sampled_from(sorted(inside)))
        inside.pop(key) if how == "key" else inside.update({key: data.draw(JUNK)})
        lines[number] = json.dumps(record).encode()
        content = b"\n".join([*lines, b""])
    path.write_bytes(content)


def story_record(step: int, index: int = 0, **other) -> dict:
    """A line of stories.jsonl, evaluations.jsonl or, with `when`, samples.jsonl."""
    record = dict(
        step=step,
        index=index,
        opening="Once",
        story="Tim said “no”.\nHe ran.",
        reply="1 1 1",
        scores=None,
        score=None,
    )
    if other.get("scores"):
        record["score"] = sum(other["scores"].values()) / 3 / len(other["scores"])
    return record | dict(reward=0.5, words=5, ended="eos") | other


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(run: Path) -> list[dict]:
    return read_lines(run / "metrics.jsonl")


def save_eager(run: Path, folder: Path) -> None:
    """The newest student of a run, changed so that the student ends stories soon."""
    student, tokenizer, _ = checkpoint.load(checkpoint.newest(run))
    with torch.no_grad():
        end = student.unembedding[tokenizer.eos]
        student.ln_f.bias += 3 * end / end.norm() ** 2
    checkpoint.save(folder, student, tokenizer, history={}, state={}, counters={"step": 0})


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(run)
    return load_file(newest / "model.safetensors") | load_file(newest / "trainer.safetensors")


def assert_same_bits(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a corpus, a pretrained student, callables for --reward, and a cache for the
    shards."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "corpus.txt").write_text("\n<|endoftext|>\n".join(tiny_stories(150)))
    (folder / "reward.py").write_text(
        "def score(opening, stories):\n    return [min(1.0, len(set(s.split())) / 12) for s in stories]\n"
        "def silent(opening, stories):\n    return [None for s in stories]\n"
        "def some(opening, stories):\n    return [None if i == 1 else 0.5 for i, s in enumerate(stories)]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinystory.data.shards.cache_dir", lambda: folder / "cache")
        train_pretrain.main(
            cli("--corpus {} --words 2500 --out {}", folder / "corpus.txt", folder / "p") + SMALL
        )
    return folder
