import functools
import gzip
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
from conftest import send_hub_file
from hypothesis import given
from hypothesis import strategies as st

from tinystory.data import corpus
from tinystory.data.builtin import grammar
from tinystory.data.corpus import MARKER, MAX_DOCUMENT, open_corpus
from tinystory.run.errors import UserError


def write(path, data):
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def read(*names):
    return list(open_corpus(names).documents())


# What a file holds, and the documents in it.

PLAIN = {
    "marker on its own line": ("One.\nTwo.\n<|endoftext|>\nThree.\n", ["One.\nTwo.", "Three."]),
    "marker inside a line": ("One.<|endoftext|>Two.", ["One.", "Two."]),
    "marker beats blank lines": (
        "One.\n\nstill one\n<|endoftext|>\nTwo.\n\n",
        ["One.\n\nstill one", "Two."],
    ),
    "blank lines": ("One.\nstill one\n\n\n \t\nTwo.\n\n", ["One.\nstill one", "Two."]),
    "no separator": ("One.\nTwo.\nThree.", ["One.\nTwo.\nThree."]),
    "Windows lines and a BOM": (
        "\ufeffOne.\r\nstill one\r\n\r\nTwo.\r\n",
        ["One.\nstill one", "Two."],
    ),
    "old Macintosh lines": ("One.\r\rTwo.", ["One.", "Two."]),
    "empty documents": (f"{MARKER}\n{MARKER}  {MARKER}One.{MARKER}", ["One."]),
    "other white space stays inside": ("a\u2028b\x0cc\u3000d\x85e", ["a\u2028b\x0cc\u3000d\x85e"]),
}


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("case", PLAIN)
def test_plain_text(tmp_path, case, gz):
    text, documents = PLAIN[case]
    assert read(write(tmp_path / f"a.txt{gz}", text)) == documents


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_json_lines(tmp_path, gz):
    lines = [
        '{"text": " One.\\r\\n\\r\\nStill one. "}',
        "",
        '{"text": "Two\u2028two", "id": 3}',
        '{"text": "  "}',
        f'{{"text": "Three {MARKER} three"}}',
    ]
    path = write(tmp_path / f"a.jsonl{gz}", "\ufeff" + "\r\n".join(lines))
    assert read(path) == ["One.\r\n\r\nStill one.", "Two\u2028two", f"Three {MARKER} three"]


@given(
    documents=st.lists(
        st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"),
            min_size=1,
            max_size=30,
        )
        .map(str.strip)
        .filter(lambda text: text and MARKER not in text and not text.startswith("\ufeff")),
        min_size=1,
        max_size=5,
    ),
    separator=st.sampled_from([MARKER, f"\n{MARKER}\n", "\n\n", "\n \n\n"]),
    newline=st.sampled_from(["\n", "\r\n"]),
    bom=st.sampled_from(["", "\ufeff"]),
    chunk=st.integers(1, 40),
)
def test_documents_do_not_depend_on_where_a_chunk_ends(
    tmp_path_factory, documents, separator, newline, bom, chunk
):
    if MARKER not in separator:
        documents = [re.sub(r"\n(\s*\n)+", "\n", text) for text in documents]
    text = bom + separator.join(documents).replace("\n", newline)
    path = write(tmp_path_factory.getbasetemp() / "chunks.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "CHUNK", chunk)
        assert read(path) == documents


def test_several_names_are_read_one_after_the_other(tmp_path):
    one = write(tmp_path / "one.txt", "One.\n\nTwo.")
    two = write(tmp_path / "two.jsonl.gz", '{"text": "Three."}')
    both = open_corpus([one, two])
    assert list(both.documents()) == list(both.documents()) == ["One.", "Two.", "Three."]


def test_builtin_is_the_grammar():
    stories = open_corpus(["builtin"]).documents()
    expected = grammar.stories(corpus.BUILTIN["builtin"][1], corpus.BUILTIN_SEED)
    assert [next(stories) for _ in range(5)] == [next(expected) for _ in range(5)]


GENERATED = {
    "builtin": "bdf19dcce921a955a576cbc095551152689d1ea5fb77a2015309752b42c26771",
    "dull": "09971bfc9f76f6ffafed74fe6c31c3e64af4ed557dcc17f3bdbe9b8f710df6ff",
}


@pytest.mark.parametrize("name", corpus.BUILTIN)
def test_a_built_in_corpus_is_the_text_of_its_version_and_holds_the_words_it_promises(
    name, builtin_documents
):
    """The fingerprint covers the plots and the version, not the code. If you change a text,
    increase BUILTIN_VERSION and update the digest here."""
    digest = hashlib.sha256()
    words = 0
    for document in builtin_documents[name]:
        digest.update(f"{document}\0".encode())
        words += len(document.split())
    assert words >= corpus.BUILTIN[name][1]
    assert (corpus.BUILTIN_VERSION, digest.hexdigest()) == (1, GENERATED[name])


# A long document is cut; nothing is ever held whole.


@pytest.mark.parametrize("glue", ["\n", " "])
def test_a_long_document_is_cut_between_words(tmp_path, glue):
    words = [f"word{i}" for i in range(100_000)]
    pieces = read(write(tmp_path / "a.txt", glue.join(words)))
    assert len(pieces) == 4 and max(map(len, pieces)) <= MAX_DOCUMENT
    assert glue.join(pieces).split(glue) == words


def test_a_long_record_is_cut_too(tmp_path):
    words = ["a"] * MAX_DOCUMENT
    pieces = read(write(tmp_path / "a.jsonl", json.dumps({"text": " ".join(words)})))
    assert len(pieces) == 2 and max(map(len, pieces)) <= MAX_DOCUMENT
    assert " ".join(pieces).split() == words


@pytest.mark.parametrize(
    "unit", ["once upon a time ", "x", f"{'once upon a time ' * 20}\n\n", f"{'x' * 99}{MARKER}"]
)
def test_memory_does_not_grow_with_the_file(tmp_path, unit):
    size = 24_000_000
    path = write(tmp_path / "a.txt", unit * (size // len(unit)))
    tracemalloc.start()
    assert sum(len(document) for document in open_corpus([path]).documents()) > size * 0.8
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 2


# The fingerprint.


def test_fingerprint_changes_with_what_the_documents_depend_on(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write(path, "One.")
    names = [str(path), "builtin"]
    prints = [open_corpus(names).fingerprint(), open_corpus(names[::-1]).fingerprint()]
    os.utime(path, ns=(1, 1))
    assert open_corpus(names).fingerprint() == prints[0]
    write(path, "Two.")  # of the same size
    os.utime(path, ns=(1, 1))
    prints.append(open_corpus(names).fingerprint())
    monkeypatch.setattr(corpus, "BUILTIN_SEED", 1)
    prints.append(open_corpus(names).fingerprint())
    monkeypatch.setattr(corpus, "BUILTIN_VERSION", 0)
    prints.append(open_corpus(names).fingerprint())
    assert len(set(prints)) == len(prints)
    assert all(re.fullmatch("[0-9a-f]{64}", print) for print in prints)


def test_the_builtin_fingerprint_covers_every_file_of_plots_and_no_comment(tmp_path, monkeypatch):
    room = Path(grammar.__file__).parent
    copy = shutil.copytree(room, tmp_path / "builtin")
    before = open_corpus(["builtin"]).fingerprint()
    monkeypatch.setattr(grammar, "__file__", str(copy / "grammar.py"))
    for file in [*copy.glob("*.py"), *copy.glob("*.txt")]:
        content = file.read_bytes()
        file.write_bytes(content + b"#")
        after = open_corpus(["builtin"]).fingerprint()
        assert (after != before) == (file.suffix == ".txt"), file
        file.write_bytes(content)
    assert open_corpus(["builtin"]).fingerprint() == before


# Faults of a file, and the error of each.

WRONG = {
    "a.txt": [
        (b"", "holds no documents"),
        (b" \n\n\t\n", "holds no documents"),
        ((MARKER * 3).encode(), "holds no documents"),
        (b"One.\nTw\xe9o", r"not UTF-8 \(it holds a byte 0xe9\): convert it"),
        (b"\xef\xbb\xbfOne.\nTw\xe9o", "a byte 0xe9"),
        (b"\n" * 1_100_000 + b"\xff", "a byte 0xff"),
        (b"x" * ((1 << 20) - 1) + b"\xe7\x8c", "a byte 0xe7"),  # begun, never ended
        ("One.".encode("utf-16"), "a byte 0xff"),
        ("One.".encode("utf-16-le"), "NUL characters: .*iconv -f UTF-16"),
    ],
    "a.txt.gz": [(gzip.compress(bytes(3 << 20)), "NUL characters")],
    "a.csv": [(b"One.", "is not a .txt or .jsonl file")],
    "a.gz": [(b"One.", "is not a .txt or .jsonl file")],
    "noextension": [(b"One.", "is not a .txt or .jsonl file")],
    "a.jsonl": [
        (b'{"text": "One."}\n{"text": }', "its line 2 is not a JSON object"),
        (b'{"opening": "Once", "story": "a cat ran."}', 'its line 1 is not .* as "text"'),
        (b'{"text": "One."}\n\n["Two."]', "its line 3 is .* with a string"),
        (b'{"title": "One."}', "its line 1 is .* with a string"),
        (b'{"text": 3}', "its line 1 is .* with a string"),
        (b'{"text": null}', "its line 1 is .* with a string"),
        (b"null", "its line 1 is .* with a string"),
        (b'{"text": "\\ud800"}', "its line 1 is .* Unicode text"),
        (b"[" * 200_000, "its line 1 is not a JSON object"),
        (b'{"text": ""}', "holds no documents"),
    ],
}


@pytest.mark.parametrize(
    ("name", "data", "complaint"), [(n, *case) for n, cases in WRONG.items() for case in cases]
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, data, complaint):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=complaint) as caught:
        read(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_broken_gzip(tmp_path):
    whole = gzip.compress(os.urandom(100_000).hex().encode())
    for name, data in {
        "cut": whole[:-5000],
        "flipped": whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:],
        "plain": b"One.",
    }.items():
        path = tmp_path / f"{name}.txt.gz"
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"cannot be read: \w"):
            read(str(path))


def test_a_line_of_json_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_RECORD", 3 << 20)
    path = write(tmp_path / "a.jsonl", b'{"text": "' + b"x" * 8_000_000)
    with pytest.raises(UserError, match="its line 1 is not a JSON object"):
        read(path)


def test_names_that_are_nothing(tmp_path):
    with pytest.raises(
        UserError,
        match=r"there is no file tinystorys, .*name \(did you mean tinystories\?\): give "
        "another file, "
        "or one of builtin, dull, tin",
    ):
        open_corpus(["tinystorys"])
    with pytest.raises(UserError, match=r"is not a \.txt or \.jsonl file"):
        open_corpus([str(tmp_path)])


# The Hugging Face Hub: the real client, in a separate process because the client reads its
# variables at import, and a server that answers like the Hub.

HUB_FILES = {
    f"/datasets/{repository}/resolve/main/{file}": f"One of {repository}.\n{MARKER}\nTwo of {file}.\n".encode()
    for repository, files in corpus.HUB.values()
    for file in files
}
GATED = "/datasets/BabyLM-community/BabyLM-2026-Strict/"


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = HUB_FILES.get(self.path, b"")
        error = "EntryNotFound" if not body else "GatedRepo" if self.path.startswith(GATED) else ""
        status = {"": 200, "EntryNotFound": 404, "GatedRepo": 403}[error]
        send_hub_file(self, b"" if error else body, "0" * 40, status, error)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def from_hub(name, home, endpoint, **variables):
    """The documents of a corpus on the Hub, or the text of a UserError, as a new process sees
    them."""
    code = """
        import json, sys
        from tinystory.data.corpus import open_corpus
        from tinystory.run.errors import UserError
        try:
            print(json.dumps(list(open_corpus(sys.argv[1:]).documents())))
        except UserError as error:
            print(json.dumps(str(error)))
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    paths = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment = {**os.environ, **paths, "NO_PROXY": "127.0.0.1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", code, name], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_hub_corpora_are_downloaded_once_and_then_there_without_a_network(hub, tmp_path):
    pytest.importorskip("huggingface_hub")
    fetch = functools.partial(from_hub, home=tmp_path / "home")
    stories = ["One of roneneldan/TinyStories.", "Two of TinyStories-train.txt."]
    assert fetch("tinystories", endpoint=hub) == stories
    assert fetch("tinystories", endpoint="http://127.0.0.1:9", HF_HUB_OFFLINE="1") == stories
    baby = fetch("babylm-10m", endpoint=hub, HF_HUB_CACHE=str(tmp_path / "elsewhere"))
    parts = "bnc_spoken childes gutenberg open_subtitles simple_wiki switchboard".split()
    assert baby[1::2] == [f"Two of {part}.train.txt." for part in parts]
    assert (tmp_path / "elsewhere").is_dir()


def test_what_is_wrong_with_the_hub_is_said(hub, tmp_path):
    pytest.importorskip("huggingface_hub")
    fetch = functools.partial(from_hub, home=tmp_path)
    begin = "cannot download roneneldan/TinyStories from the Hugging Face Hub ("
    for endpoint, variables in (
        (hub, {"HF_HUB_OFFLINE": "1"}),
        (hub + "/elsewhere", {}),
        ("nonsense", {}),
    ):
        assert fetch("tinystories", endpoint=endpoint, **variables).startswith(begin)
    assert re.search(
        r"BabyLM-2026-Strict .*gated, accept its terms on the Hub",
        fetch("babylm-100m", endpoint=hub),
    )


def test_without_huggingface_hub_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        open_corpus(["tinystories"])


def test_mixed_documents_come_from_all_files_at_the_same_pace(tmp_path):
    (tmp_path / "long.txt").write_text("<|endoftext|>".join(["one two three four five six"] * 5))
    (tmp_path / "short.txt").write_text("<|endoftext|>".join(["seven eight"] * 9))
    corpus = open_corpus([str(tmp_path / "long.txt"), str(tmp_path / "short.txt")])
    mixed = list(corpus.mixed())
    assert mixed[:8] == ["one two three four five six", *["seven eight"] * 3] * 2
    assert sorted(mixed) == sorted(corpus.documents())


@given(
    st.lists(
        st.sampled_from(["a", "Z9_", "\0", "-=", " ", "\n", "猫", "é"]).flatmap(
            lambda unit: st.integers(1, 3 * corpus.MAX_RUN).map(lambda count: unit * count)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_no_run_is_endless_and_no_text_is_lost(runs):
    text = "".join(runs)
    pieces = [piece.strip() for piece in corpus._bounded(text) if piece.strip()]
    assert "".join("".join(pieces).split()) == "".join(text.split())
    longest = re.compile(
        rf"\w{{{2 * corpus.MAX_RUN}}}|\s{{{2 * corpus.MAX_RUN}}}|[^\w\s]{{{2 * corpus.MAX_RUN}}}"
    )
    assert not any(longest.search(piece) for piece in pieces)
    if max(map(len, runs)) < corpus.MAX_RUN and text.strip() and len(set(runs)) == len(runs) == 1:
        assert pieces == [text.strip()]
