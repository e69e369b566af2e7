"""Folders of transformers' GPT-2, both ways. Where transformers is not installed, an independent
reading of the same files stands in for it; where it is (4.51.3 is what BabyLM's pipeline pins), it
reads them itself."""

import copy
import http.server
import json
import os
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import AWKWARD, ROOT, send_hub_file, tiny_stories
from safetensors.torch import load_file, save_file

import train_interact
from scripts import export_hf
from tinystory.data.tokenizer import BYTE_OF_CHAR, Tokenizer
from tinystory.run.errors import UserError
from tinystory.student import checkpoint, hf
from tinystory.student.model import Student, StudentConfig

TEXTS = [
    *tiny_stories(3),
    *AWKWARD,
    "".join(AWKWARD),
    "<s>a</s>b<pad>",
    "Ça va déjà? 猫が 🐈‍⬛ ٣٤",
    "",
]


def gpt2_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """GPT-2 as Radford et al. describe it, from transformers' files: (T,) int64 -> (T, V)."""
    w, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    w = {name.removeprefix("transformer."): tensor for name, tensor in w.items()}
    T, C, H = len(tokens), config["n_embd"], config["n_head"]

    def norm(x, name):
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"])

    def conv(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for layer in range(config["n_layer"]):
        at = f"h.{layer}"
        q, k, v = (
            part.view(T, H, -1).transpose(0, 1)
            for part in conv(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn").split(C, -1)
        )
        weights = (q @ k.transpose(1, 2) / (C // H) ** 0.5).masked_fill(
            torch.ones(T, T).triu(1).bool(), -torch.inf
        )
        x = x + conv((weights.softmax(-1) @ v).transpose(0, 1).reshape(T, C), f"{at}.attn.c_proj")
        x = x + conv(
            F.gelu(conv(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc"), approximate="tanh"),
            f"{at}.mlp.c_proj",
        )
    return (
        norm(x, "ln_f") @ w["wte.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T
    )


@pytest.fixture
def exported(tmp_path, student, tokenizer) -> Path:
    hf.write(tmp_path / "exported", student, tokenizer)
    return tmp_path / "exported"


def test_it_samples_by_itself_as_the_student_learned_to(exported, student, tokenizer):
    """transformers' own defaults are the likeliest token, or the fifty likeliest, and 20 of them."""
    config = json.loads((exported / "generation_config.json").read_text())
    assert config["do_sample"] is True and config["temperature"] == 1.0
    assert (config["top_k"], config["top_p"]) == (0, 1.0)
    assert config["eos_token_id"] == tokenizer.eos
    assert config["max_length"] == student.config.context


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_written_weights_give_the_same_logits(exported, student):
    tokens = torch.randint(
        student.config.vocab_size, (40,), generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(
        gpt2_logits(exported, tokens), student(tokens[None])[0], atol=1e-4, rtol=0
    )


def test_transformers_reads_it_with_no_code_of_ours(exported, student, tokenizer):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    tokens = torch.randint(
        student.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, student(tokens), atol=1e-4, rtol=0)
        body = transformers.AutoModel.from_pretrained(exported).eval()
        torch.testing.assert_close(
            body(tokens).last_hidden_state, student.hidden(tokens), atol=1e-4, rtol=0
        )
    for auto in (transformers.AutoTokenizer, transformers.AutoProcessor):
        theirs = auto.from_pretrained(exported)
        assert theirs.is_fast
        assert [theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id] == [0, 1, 2]
        whole = theirs(TEXTS[0], return_tensors="pt")
        # everything that the tokenizer returns goes into the model, as in BabyLM's reading task
        with torch.no_grad():
            torch.testing.assert_close(
                model(**whole).logits, student(whole["input_ids"]), atol=1e-4, rtol=0
            )
        for text in TEXTS:
            assert theirs(text)["input_ids"] == tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text)) == text
    model.save_pretrained(exported.parent / "saved")
    theirs.save_pretrained(exported.parent / "saved")
    again, vocabulary = hf.read(exported.parent / "saved")
    assert torch.equal(again.wte.weight, student.wte.weight)
    assert vocabulary.encode("a kite") == tokenizer.encode("a kite")


def test_the_tokenizer_gives_no_token_types(exported):
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    # others would change GPT-2's logits
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]


def test_there_and_back(exported, student, tokenizer):
    assert checkpoint.find(exported) == exported
    back, vocabulary, history = checkpoint.load(exported)
    assert back.config == student.config and history == {}
    assert all(
        torch.equal(a, b) for a, b in zip(back.parameters(), student.parameters(), strict=True)
    )
    assert all(p.requires_grad for p in back.parameters())
    assert vocabulary.json == tokenizer.json
    with pytest.raises(FileExistsError):
        hf.write(exported, student, tokenizer)


# ---- what others saved ---------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A folder like OpenAI's `gpt2` on the Hub: no prefix, causal masks among the tensors, the end
    token last."""
    folder = tmp_path / "gpt2"
    chars = list(BYTE_OF_CHAR)
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n")]
    names = [*chars, *map("".join, merges), "<|endoftext|>"]
    torch.manual_seed(1)
    student = Student(
        StudentConfig(n_layer=2, n_head=2, n_embd=32, context=48, vocab_size=len(names))
    )
    ours = Tokenizer.train(tiny_stories(20), len(names))  # only so that there is something to write
    hf.write(folder, student, ours)
    weights = {
        name.removeprefix("transformer."): t.half()
        for name, t in load_file(folder / "model.safetensors").items()
    }
    weights |= {f"h.{i}.attn.bias": torch.ones(48, 48).tril()[None, None] for i in range(2)}
    save_file(
        weights | {"lm_head.weight": weights["wte.weight"].clone()}, folder / "model.safetensors"
    )
    end = len(names) - 1
    config = json.loads((folder / "config.json").read_text()) | {
        "bos_token_id": end,
        "eos_token_id": end,
        "n_inner": None,
    }
    del config["pad_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    special = {"id": end, "content": names[-1], "special": True}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = json.loads(ours.json) | {"added_tokens": [special]}
    spec["model"] |= {"vocab": {name: id for id, name in enumerate(names)}, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture
def theirs(tmp_path, student, tokenizer) -> Path:
    """A folder like those of the paper's authors: saved by TRL, so with a value head, and with a
    tokenizer that has no <mask> and pads with the end token (as in a folder that we made with their
    libraries)."""
    folder = tmp_path / "theirs"
    hf.write(folder, student, tokenizer)
    head = {
        "v_head.summary.weight": torch.ones(1, student.config.n_embd),
        "v_head.summary.bias": torch.zeros(1),
    }
    save_file(load_file(folder / "model.safetensors") | head, folder / "model.safetensors")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [token | {"normalized": True} for token in spec["added_tokens"][:4]]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    edit(
        folder / "config.json",
        architectures=["GPT2LMHeadModel"],
        n_ctx=64,
        use_cache=True,
        attn_pdrop=0.1,
    )
    edit(folder / "special_tokens_map.json", pad_token="</s>")
    return folder


def test_the_authors_students_are_read_without_their_value_head(theirs, student, tokenizer):
    back, vocabulary, _ = checkpoint.load(theirs)
    assert all(
        torch.equal(a, b) for a, b in zip(back.parameters(), student.parameters(), strict=True)
    )
    assert vocabulary.specials == tokenizer.specials and len(vocabulary.specials) == 5
    assert all(vocabulary.encode(text) == tokenizer.encode(text) for text in TEXTS)


class Branches(http.server.BaseHTTPRequestHandler):
    """A mock Hub with one model, which has one branch."""

    folder: Path

    def do_GET(self):
        file = self.path.removeprefix("/us/blm/resolve/chck_20M/")
        known = ("config.json", "model.safetensors", "tokenizer.json")
        body = (self.folder / file).read_bytes() if file in known else b""
        missing = "EntryNotFound" if "chck_20M" in self.path else "RevisionNotFound"
        send_hub_file(self, body, "1" * 40, 200 if body else 404, "" if body else missing)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def test_a_student_on_the_hub_is_read_at_its_branch(theirs, tmp_path):
    pytest.importorskip("huggingface_hub")
    Branches.folder = theirs
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Branches)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
        import sys
        from pathlib import Path
        from tinystory.run.errors import UserError
        from tinystory.student import checkpoint
        for name in sys.argv[1:]:
            try:
                folder = checkpoint.find(Path(name))
                print(folder.name, checkpoint.load(folder)[0].config.n_embd)
            except UserError as error:
                print(error)
    """
    names = ["hub:us/blm@chck_20M", "hub:us/blm@chck_30M", "hub:a/b/c"]
    home = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
    }
    environment = (
        os.environ | home | {"NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    argv = [sys.executable, "-c", textwrap.dedent(code), *names]
    lines = subprocess.run(
        argv, env=environment, capture_output=True, text=True
    ).stdout.splitlines()
    assert lines[0] == "1" * 40 + " 64"
    assert "us/blm " in lines[1] and "Revision Not Found" in lines[1] and "/chck_30M/" in lines[1]
    assert lines[2].startswith("cannot download a/b/c ")
    server.shutdown()
    server.server_close()


def edit_tokenizer(folder: Path, *, end: str = "<|endoftext|>", **vocab) -> int:
    """Rename the end token and add to the vocabulary. Returns the vocabulary's size."""
    spec = json.loads((folder / "tokenizer.json").read_text().replace("<|endoftext|>", end))
    spec["model"]["vocab"] |= vocab
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return len(spec["model"]["vocab"])


def test_a_model_as_gpt2_is_saved(foreign, tmp_path):
    student, tokenizer, _ = checkpoint.load(foreign)
    assert student.wte.weight.dtype == torch.float32
    assert tokenizer.eos == tokenizer.pad == tokenizer.bos == student.config.vocab_size - 1
    expected = [257, 258]
    assert tokenizer.encode("the the<|endoftext|>")[:2] == expected
    assert tokenizer.eos not in tokenizer.encode("<|endoftext|>")
    tokens = torch.arange(40)
    half = {name: t.float() for name, t in load_file(foreign / "model.safetensors").items()}
    save_file(half, foreign / "model.safetensors")
    torch.testing.assert_close(
        gpt2_logits(foreign, tokens), student(tokens[None])[0], atol=1e-4, rtol=0
    )
    hf.write(tmp_path / "back", student, tokenizer)
    assert (
        json.loads((tmp_path / "back" / "special_tokens_map.json").read_text())["pad_token"]
        == "<|endoftext|>"
    )
    assert hf.read(tmp_path / "back")[1].json == tokenizer.json


def test_rows_beyond_the_vocabulary_are_tokens_without_text(foreign):
    size = edit_tokenizer(foreign)
    weights = load_file(foreign / "model.safetensors")
    wte = torch.cat([weights["wte.weight"], torch.zeros(3, 32).half()])
    save_file(
        weights | {"wte.weight": wte, "lm_head.weight": wte.clone()}, foreign / "model.safetensors"
    )
    edit(foreign / "config.json", vocab_size=len(wte))
    student, tokenizer = hf.read(foreign)
    assert tokenizer.vocab_size == student.config.vocab_size == size + 3
    assert tokenizer.decode([size, size + 2]) == ""


def _no_safetensors(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def config(**changes):
    return lambda folder: edit(folder / "config.json", **changes)


REFUSED = {
    "is a pickle": _no_safetensors,
    "model.safetensors cannot be used here: Error": _cut,
    "model_type is 'llama'": config(model_type="llama"),
    "activation_function is 'relu', not 'gelu_new'": config(activation_function="relu"),
    "n_layer is 1000000000": config(n_layer=10**9),
    "h.2.* is missing": config(n_layer=3),
    "n_embd is '32'": config(n_embd="32"),
    "head size is 8": config(n_head=4),
    r"wpe.weight is \(48, 32\)": config(n_positions=49),
    "n_inner is 100": config(n_inner=100),
    "its tie_word_embeddings is 'no'": config(tie_word_embeddings="no"),
    "scale_attn_by_inverse_layer_idx is True": config(scale_attn_by_inverse_layer_idx=True),
    "end token is 260 and that of config.json is 5": config(eos_token_id=5),
    "has no end token </s>": lambda folder: edit_tokenizer(folder, end="<|im_end|>"),
    "has no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "cannot be read: it is nested too deep": lambda folder: (folder / "tokenizer.json").write_text(
        "[" * 100_000
    ),
    "has 262 tokens and the model 261": lambda folder: edit_tokenizer(folder, extra=261),
    "cannot be used here": lambda folder: edit_tokenizer(folder, the=[]),
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_what_is_refused(foreign, complaint):
    REFUSED[complaint](foreign)
    with pytest.raises(UserError, match=complaint):
        checkpoint.load(foreign)


def test_an_output_head_of_its_own_is_read(foreign):
    weights = load_file(foreign / "model.safetensors")
    head = torch.randn_like(weights["wte.weight"])
    save_file(weights | {"lm_head.weight": head}, foreign / "model.safetensors")
    assert torch.equal(hf.read(foreign)[0].unembedding, weights["wte.weight"].float())
    edit(foreign / "config.json", tie_word_embeddings=False)
    assert torch.equal(hf.read(foreign)[0].unembedding, head.float())


def test_a_claim_of_more_layers_than_memory_holds_is_refused_before_anything_is_allocated(foreign):
    edit(foreign / "config.json", n_layer=100_000)
    tracemalloc.start()
    with pytest.raises(UserError, match="too few tensors for 100000 layers"):
        checkpoint.load(foreign)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20  # the file of the sizes may take 64 MB


def test_interaction_starts_from_it(foreign, tmp_path):
    (tmp_path / "words.py").write_text(
        "def score(opening, stories):\n    return [0.5] * len(stories)\n"
    )
    out = tmp_path / "run"
    options = dict(
        init=foreign, out=out, reward=f"{tmp_path / 'words.py'}:score", steps=1, stories_per_step=4
    )
    options |= dict(max_new_tokens=8, openings="the", device="cpu")
    train_interact.main(
        [word for name, v in options.items() for word in (f"--{name.replace('_', '-')}", str(v))]
    )
    student, tokenizer, history = checkpoint.load(checkpoint.newest(out))
    assert tokenizer.eos == student.config.vocab_size - 1 and history["interaction_words_out"] > 0


def test_a_step_that_no_run_can_go_on_from_is_refused(student):
    sound = {"exp_avg.wte.weight": torch.zeros(3), "critic.gram": torch.full((2,), 1e30)}
    hf.require_finite(7, student, sound, "lower --x")
    hf.require_finite(7, student, {}, "lower --x")
    for number in (torch.nan, torch.inf, 1e5):
        spoiled = copy.deepcopy(student)
        with torch.no_grad():
            spoiled.blocks[0].fc.weight[0, 0] = number
        with pytest.raises(UserError, match=r"step 7 .* not saved: lower --x; --resume"):
            hf.require_finite(7, spoiled, sound, "lower --x")
    for number in (torch.nan, -torch.inf):
        with pytest.raises(UserError, match="was not saved"):
            hf.require_finite(7, student, sound | {"critic.moment": torch.tensor(number)}, "")


def test_a_step_after_which_the_student_computes_nothing_is_refused(student, monkeypatch):
    """Finite weights can be so large that no kernel can read with them."""
    monkeypatch.setattr(Student, "trunk", lambda self, x, *_: x * torch.nan)
    with pytest.raises(UserError, match="was not saved"):
        hf.require_finite(7, student, {}, "")


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, student, tokenizer) -> Path:
    (tmp_path / "run").mkdir()
    for step, name in enumerate(("chck_2M", "chck_10M", "step_0000003")):
        with torch.no_grad():
            student.wte.weight[0, 0] = step
        checkpoint.save(
            tmp_path / "run" / "checkpoints" / name,
            student,
            tokenizer,
            history={},
            state={},
            counters={"step": step},
        )
    return tmp_path / "run"


def corner(folder: Path) -> float:
    return float(load_file(folder / "model.safetensors")["transformer.wte.weight"][0, 0])


def test_a_run_is_exported_at_its_newest_checkpoint_and_a_milestone_at_its_own(run, tmp_path):
    export_hf.main([str(run), str(tmp_path / "newest")])
    export_hf.main([str(run / "checkpoints" / "chck_10M"), str(tmp_path / "milestone")])
    assert (corner(tmp_path / "newest"), corner(tmp_path / "milestone")) == (2, 1)


def test_an_export_killed_half_way_is_repeated_by_the_same_command(run, tmp_path):
    argv = [str(run), str(tmp_path / "out")]
    program = f"""
import os
from scripts import export_hf
export_hf.atomic_write = lambda *_: os._exit(9)
export_hf.main({argv!r})
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 9
    assert not (tmp_path / "out").exists()
    export_hf.main(argv)
    assert corner(tmp_path / "out") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_what_the_command_says_of_a_wrong_call(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        export_hf.main([str(tmp_path / "nothing"), str(tmp_path / "x")])
    assert "neither a checkpoint nor a run" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
