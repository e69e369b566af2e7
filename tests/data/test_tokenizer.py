import json

import pytest
import tokenizers
from conftest import AWKWARD
from hypothesis import given
from hypothesis import strategies as st

from tinystory.data.builtin import grammar
from tinystory.data.tokenizer import MAX_TOKEN_BYTES, SPECIALS, Tokenizer
from tinystory.run.errors import UserError

EXOTIC = [
    "Ça va déjà? ça va déjà!",
    "猫が 猫が 好きです",
    "🐈‍⬛🐈‍⬛ 👨‍👩‍👧",
    "a\u00a0b\u3000d",
    "1½ ٣٤ 12345",
]

# Any Unicode text, with much that is difficult for a split or a byte-level BPE.
RUN = st.integers(1, 200).map(lambda n: " " * n)
TEXT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(AWKWARD), RUN), max_size=12).map(
    "".join
)

BYTES = len(SPECIALS) + 256  # the smallest vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([*grammar.stories(60_000, 0), *EXOTIC * 3], 1000)


@pytest.fixture(scope="module")
def reference(tokenizer) -> tokenizers.Tokenizer:
    """The `tokenizers` library with the file that we save, set to treat special tokens in a
    document as text."""
    reference = tokenizers.Tokenizer.from_str(tokenizer.json)
    reference.encode_special_tokens = True
    return reference


@given(text=TEXT)
def test_same_ids_as_tokenizers_and_back_to_the_same_text(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text).ids
    assert all(id >= len(SPECIALS) for id in ids)
    assert tokenizer.decode(ids) == text


def test_every_unicode_character_splits_alike_in_both_libraries(tokenizer, reference):
    # planes 4 to 13 and 15 on are empty
    codes = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000)]
    texts = [
        "".join(f"a{chr(c)} {chr(c)}1" for c in codes[at : at + 256])
        for at in range(0, len(codes), 256)
    ]
    encoded = zip(
        texts, map(tokenizer.encode, texts), reference.encode_batch_fast(texts), strict=True
    )
    for text, ours, theirs in encoded:
        assert ours == theirs.ids
        assert tokenizer.decode(ours) == text


@given(
    documents=st.lists(st.text("aab' é", min_size=1, max_size=200), min_size=1, max_size=5),
    text=st.text("aab' é"),
)
def test_same_ids_whatever_the_merges(documents, text):
    ours = Tokenizer.train(documents, 400)
    theirs = tokenizers.Tokenizer.from_str(ours.json)
    for sample in (text, *documents):
        assert ours.encode(sample) == theirs.encode(sample).ids


def test_a_story_in_the_corpus_language_takes_few_tokens(tokenizer):
    story = next(grammar.stories(1, 7))
    assert len(tokenizer.encode(story)) < len(story.encode()) / 2.5


def test_specials_are_distinct_and_first(tokenizer):
    assert tokenizer.specials == {name: id for id, name in enumerate(SPECIALS)}
    assert [tokenizer.bos, tokenizer.pad, tokenizer.eos] == [0, 1, 2]
    assert [
        tokenizers.Tokenizer.from_str(tokenizer.json).token_to_id(name) for name in SPECIALS
    ] == [0, 1, 2, 3, 4]


def test_decode_drops_specials_and_marks_broken_characters(tokenizer):
    cat = [tokenizer.token_bytes.index(bytes([b])) for b in "猫".encode()]
    assert tokenizer.decode([tokenizer.bos, *cat, tokenizer.eos, tokenizer.pad]) == "猫"
    assert tokenizer.decode(cat[:2]) == "\ufffd"


def test_training_is_deterministic_and_streams(tokenizer):
    def stream():
        yield from grammar.stories(60_000, 0)
        yield from EXOTIC * 3

    assert Tokenizer.train(stream(), 1000).json == tokenizer.json


def test_small_corpus_gives_a_smaller_vocabulary():
    assert BYTES < Tokenizer.train(["the cat and the hat"], 5000).vocab_size < 300


def test_bytes_alone_are_a_vocabulary(capsys):
    assert Tokenizer.train(["the cat and the hat"], BYTES).encode("the") == [
        len(SPECIALS) + sorted(map(chr, range(0x21, 0x7F))).index(c) for c in "the"
    ]


def test_no_token_is_longer_than_a_word_count_can_hold(capsys):
    longest = Tokenizer.train(["x" * 4096, "x" * 4096], 300)
    assert 32 < max(longest.token_sizes) <= MAX_TOKEN_BYTES
    text = "x" * 1023
    assert longest.encode(text) == tokenizers.Tokenizer.from_str(longest.json).encode(text).ids


@pytest.mark.parametrize(
    "text", ["x" * 300_000, " " * 300_000, "\n" * 300_000 + "x", "?!" * 150_000]
)
def test_long_runs_neither_overflow_nor_take_for_ever(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_errors_inside_the_stream_come_out_as_they_are():
    def stream():
        yield "the cat"
        raise UserError("line 2 is bad")

    with pytest.raises(UserError, match="line 2 is bad"):
        Tokenizer.train(stream(), 300)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.json == tokenizer.json
    assert loaded.encode("Once upon a time") == tokenizer.encode("Once upon a time")


def _swap_merges(spec):
    spec["model"]["merges"][0], spec["model"]["merges"][-1] = (
        spec["model"]["merges"][-1],
        spec["model"]["merges"][0],
    )


def _leave_a_gap(spec):
    vocab = spec["model"]["vocab"]
    del vocab[next(name for name, id in vocab.items() if id == 500)]


def _write_ids_as_fractions(spec):
    spec["model"]["vocab"] = {name: float(id) for name, id in spec["model"]["vocab"].items()}


def _rename_the_end(spec):
    spec["added_tokens"][2]["content"] = "<end>"
    spec["model"]["vocab"]["<end>"] = spec["model"]["vocab"].pop("</s>")


FOREIGN = {
    "its model": lambda spec: spec["model"].update(type="WordPiece"),
    "plain BPE": lambda spec: spec["model"].update(byte_fallback=True),
    "its split": lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
    "changes the text": lambda spec: spec.update(normalizer={"type": "NFC"}),
    "no end token": _rename_the_end,
    "single characters": lambda spec: spec["added_tokens"].append({"id": 5, "content": "!"}),
    "gaps": _leave_a_gap,
    "not whole numbers": _write_ids_as_fractions,
    "not Unicode text": lambda spec: spec["added_tokens"][0].update(content="\ud800"),
    "follow its merges": _swap_merges,
    "'model'": lambda spec: spec.pop("model"),
}


@pytest.mark.parametrize("complaint", FOREIGN)
def test_a_foreign_tokenizer_is_refused(tokenizer, tmp_path, complaint):
    spec = json.loads(tokenizer.json)
    FOREIGN[complaint](spec)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": 3}']
)
def test_a_broken_file_is_refused(tmp_path, data):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be used as a tokenizer"):
        Tokenizer.load(path)
    with pytest.raises(UserError, match="No such file"):
        Tokenizer.load(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="Is a directory"):
        Tokenizer.load(tmp_path)
