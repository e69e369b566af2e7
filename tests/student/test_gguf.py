"""GGUF files, read back by the format's own package and, where it is installed, run by
llama.cpp."""

import jinja2
import pytest
import torch
from conftest import AWKWARD, fails

from scripts import export_hf
from tinystory.student import checkpoint
from tinystory.student.generate import encode_opening, generate
from tinystory.student.gguf import NAMES
from tinystory.student.model import Student, StudentConfig

OPENING = "Once upon a time, Tom"


@pytest.fixture(scope="module")
def student(tokenizer) -> Student:
    torch.manual_seed(0)
    return Student(
        StudentConfig(
            n_layer=2, n_head=2, n_embd=64, context=128, vocab_size=tokenizer.vocab_size, tied=False
        ),
        "unit",
    )


@pytest.fixture(scope="module")
def file(student, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    checkpoint.save(
        folder / "checkpoints" / "best",
        student,
        tokenizer,
        history={},
        state={},
        counters={"step": 1},
    )
    export_hf.main([str(folder), "--gguf", str(folder / "new" / "tale.gguf")])
    assert [path.name for path in (folder / "new").iterdir()] == ["tale.gguf"]
    return folder / "new" / "tale.gguf"


def test_the_formats_own_reader_finds_every_weight_and_the_tokenizer(file, student, tokenizer):
    from gguf import MODEL_ARCH, MODEL_TENSORS, TENSOR_NAMES, GGUFReader

    reader = GGUFReader(file)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    expected = student.state_dict()
    assert len(tensors) == len(expected)
    for ours, weight in expected.items():
        assert torch.equal(
            tensors[".".join(NAMES.get(part, part) for part in ours.split("."))], weight.cpu()
        )
    names = {TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[MODEL_ARCH.GPT2]}
    assert {name.format(bid=i) for name in names for i in range(2)} == {
        name.rpartition(".")[0] for name in tensors
    }

    fields = {name: field.contents() for name, field in reader.fields.items()}
    sizes = [
        fields[f"gpt2.{name}"] for name in ("block_count", "attention.head_count", "context_length")
    ]
    assert sizes == [2, 2, 128] and fields["general.name"] == "tale"
    sampling = {"temp": 1.0, "top_p": 1.0, "min_p": 0.0, "penalty_repeat": 1.0, "top_k": 0}
    for name, value in sampling.items():
        assert fields[f"general.sampling.{name}"] == value, name
    template = jinja2.Template(fields["tokenizer.chat_template"])
    messages = [{"role": "user", "content": OPENING}]
    assert template.render(messages=messages, add_generation_prompt=True) == OPENING
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    # control tokens
    assert [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3] == AWKWARD[:5]
    assert tokens[tokenizer.encode(" Tom")[0]].startswith("Ġ")
    assert (
        fields["tokenizer.ggml.bos_token_id"] == encode_opening(tokenizer, "")[0] == tokenizer.eos
    )
    assert fields["tokenizer.ggml.add_bos_token"] is True


def test_llama_cpp_tells_the_same_story(file, student, tokenizer):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install 'tinystory[teacher-local]'")
    # float16 by default
    cache = dict(type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
    llama = llama_cpp.Llama(
        str(file), n_ctx=128, n_threads=1, logits_all=True, verbose=False, **cache
    )
    for text in [*AWKWARD, "".join(AWKWARD), "Ça va déjà? 猫が 🐈‍⬛ ٣٤"]:
        if text and "\0" not in text:  # which ends a string of C
            assert llama.tokenize(text.encode(), add_bos=True, special=False) == encode_opening(
                tokenizer, text
            )
    (story,) = generate(
        student, None, tokenizer, [OPENING], first_index=0, max_new_tokens=60, temperature=0, seed=0
    )
    tokens = [*encode_opening(tokenizer, OPENING), *story.tokens.tolist()]
    llama.eval(tokens)
    theirs = torch.from_numpy(llama.scores[: len(tokens)].copy())
    torch.testing.assert_close(
        theirs, student(torch.tensor([tokens]))[0].detach(), atol=1e-2, rtol=0
    )
    answer = llama.create_completion(OPENING, max_tokens=60, temperature=0)["choices"][0]["text"]
    assert len(story.tokens) == 60
    assert answer.replace("\ufffd", "") == story.text.replace("\ufffd", "")


def test_without_a_place_to_write_it_is_one_sentence(tmp_path, student, tokenizer, capsys):
    checkpoint.save(
        tmp_path / "best", student, tokenizer, history={}, state={}, counters={"step": 1}
    )
    assert "nothing to write" in fails(export_hf.main, [str(tmp_path / "best")], capsys)
