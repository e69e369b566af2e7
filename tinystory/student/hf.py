"""Reads and writes folders of transformers' GPT-2: config.json, model.safetensors, tokenizer.json.

transformers' Auto classes load what is written here without code of ours. Folders to read are
untrusted: only JSON and safetensors are opened, sizes are checked before anything is allocated, and
only GPT-2's exact layout is accepted."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tinystory.data.tokenizer import END_NAMES, SPECIALS, Tokenizer
from tinystory.run import hub
from tinystory.run.errors import UserError, cannot_write
from tinystory.run.folder import read_object, read_text
from tinystory.student.model import Student, StudentConfig, wrong_shape

# Module names in a block: transformers' -> ours. Its Conv1D stores weights as (in, out), our Linear
# as (out, in).
MODULES = {"ln_1": "ln_1", "attn.c_attn": "qkv", "attn.c_proj": "attn_proj"}
MODULES |= {"ln_2": "ln_2", "mlp.c_fc": "fc", "mlp.c_proj": "mlp_proj"}
# Options that the layout fixes, with the accepted values; the first is transformers' default.
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh GELU
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
# The files to read, and what to do if one is missing.
FILES = {
    "model.safetensors": "load it with transformers and save it again with save_pretrained(FOLDER, "
    "max_shard_size='100GB'); a .bin file is a pickle, which can run code when it is loaded, and is not opened",
    "tokenizer.json": "save AutoTokenizer.from_pretrained(FOLDER) into it",
}
# the largest number of float16; below it no forward pass overflows float32
LARGEST_WEIGHT = 65504.0
PROBE = 64  # tokens of the sequence with which `require_finite` tries a student
FINE_TUNING = 512  # tokens per sequence in BabyLM's fine-tuning


def is_folder(path: Path) -> bool:
    """Whether this is a folder in transformers' format, and not a checkpoint of ours."""
    config = path / "config.json"
    return (
        config.is_file()
        and not (path / "model.json").exists()
        and "model_type" in read_object(config)
    )


def download(address: str) -> Path:
    """The folder of hub:NAME@REVISION (a branch, tag or commit; by default main) on the Hugging
    Face Hub."""
    name, _, revision = address.removeprefix("hub:").partition("@")
    return hub.download(
        name, ("config.json", *FILES), repo_type="model", revision=revision or None
    )[0].parent


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a new file with the default permissions; save_file would give it 0600."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def require_finite(
    step: int, student: Student, state: Mapping[str, torch.Tensor], advice: str
) -> None:
    """Raises UserError if the step made weights that `read_student` would refuse or that give no
    finite logits, or a trainer's state that is not finite, so that no checkpoint holds what no run
    can go on from. advice: which options to change."""
    largest_weight = torch.nn.utils.get_total_norm(student.parameters(), math.inf)
    largest_state = torch.nn.utils.get_total_norm(state.values(), math.inf)
    length = min(student.config.context, student.config.vocab_size, PROBE)
    with torch.no_grad():
        logits = student(torch.arange(length, device=student.wte.weight.device)[None])
    if not (
        largest_weight <= LARGEST_WEIGHT and largest_state.isfinite() and logits.isfinite().all()
    ):
        raise UserError(
            f"step {step} made weights that are not finite, or too large, and is not saved: {advice}; --resume goes on "
            "from the last checkpoint, with such flags"
        )


def write(folder: Path, student: Student, tokenizer: Tokenizer) -> None:
    """Write a new folder that transformers can load. Raises UserError if it exists or cannot be
    written."""
    sizes = asdict(student.config)
    context = sizes.pop("context")
    names = {id: name for name, id in tokenizer.specials.items()}
    roles = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    ids = {f"{role}_token_id": id for role, id in roles.items()}
    tokens = {f"{role}_token": names[id] for role, id in roles.items()}
    config = dict(architectures=["GPT2LMHeadModel"], **sizes, n_positions=context)
    config |= {name: values[0] for name, values in FIXED.items()} | dict(torch_dtype="float32")
    tokenizer_config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=context,
        # Without token_type_ids, the default of this class: GPT-2 would add the embedding of token
        # 0 everywhere.
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # "</s>" in a document is ordinary text
        padding_side="right",
    )
    files = {"config.json": config | ids, "generation_config.json": ids}
    files |= {"tokenizer_config.json": tokenizer_config | tokens, "special_tokens_map.json": tokens}
    ours = student.state_dict()
    weights = {
        f"transformer.{theirs}": (ours[name].T if transposed else ours[name])
        .detach()
        .cpu()
        .contiguous()
        for theirs, name, transposed, _ in layout(student.config)
    }
    try:
        folder.mkdir(parents=True)
        write_tensors(folder / "model.safetensors", weights)
        (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error


def layout(shape: StudentConfig) -> Iterator[tuple[str, str, bool, tuple[int, ...]]]:
    """Each parameter's name in transformers, our name, whether it is transposed, and its shape in
    transformers."""
    C = shape.n_embd
    widths = {"qkv": (C, 3 * C), "attn_proj": (C, C), "fc": (C, 4 * C), "mlp_proj": (4 * C, C)}
    yield "wte.weight", "wte.weight", False, (shape.vocab_size, C)
    yield "wpe.weight", "wpe.weight", False, (shape.context, C)
    for layer in range(shape.n_layer):
        for theirs, ours in MODULES.items():
            size: tuple[int, ...] = widths.get(ours, (C,))
            yield (
                f"h.{layer}.{theirs}.weight",
                f"blocks.{layer}.{ours}.weight",
                ours in widths,
                size,
            )
            yield f"h.{layer}.{theirs}.bias", f"blocks.{layer}.{ours}.bias", False, size[-1:]
    yield "ln_f.weight", "ln_f.weight", False, (C,)
    yield "ln_f.bias", "ln_f.bias", False, (C,)


def read(folder: Path) -> tuple[Student, Tokenizer]:
    """Student (float32, on the CPU) and tokenizer of a folder in transformers' format. Raises
    UserError unless it has GPT-2's layout, byte-level BPE with GPT-2's split, and weights in
    safetensors."""
    for name, advice in FILES.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: {advice}")
    config = read_object(folder / "config.json")
    shape = _shape(folder, config)
    return read_student(folder / "model.safetensors", shape), _tokenizer(
        folder, config, shape.vocab_size
    )


def _shape(folder: Path, config: dict[str, Any]) -> StudentConfig:
    """The student's sizes. Raises UserError if config.json describes anything but GPT-2's
    layout."""
    sizes: dict[str, Any] = {
        name: config.get(name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")
    }
    sizes["context"] = config.get("n_positions")
    problem = wrong_shape(sizes).replace("its context", "its n_positions")
    if wrong := [
        name for name, values in FIXED.items() if config.get(name, values[0]) not in values
    ]:
        problem = f"its {wrong[0]} is {config[wrong[0]]!r:.80}, not {FIXED[wrong[0]][0]!r}"
    elif not problem and config.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        problem = f"its n_inner is {config['n_inner']!r:.80}, not 4 * n_embd"
    if problem:
        raise UserError(
            f"{folder}/config.json describes a model that is not supported here: {problem}"
        )
    return StudentConfig(**sizes)


def read_student(path: Path, shape: StudentConfig, *, ours: bool = False) -> Student:
    """A student (float32, on the CPU) from a weights file, ours or transformers', whose prefix
    `transformer.` is optional. Raises UserError if a tensor is missing, has another shape than
    `shape` says, or could overflow."""
    state = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            prefix = "transformer." if "transformer.wte.weight" in names else ""
            for theirs, own, transposed, expected in layout(shape):
                name = own if ours else prefix + theirs
                if ours and transposed:  # our own files are not transposed
                    transposed, expected = False, expected[::-1]
                size = tuple(file.get_slice(name).get_shape()) if name in names else "missing"
                if size != expected:
                    raise ValueError(
                        f"{name} is {size}, and the .json file beside it says {expected}"
                    )
                tensor = file.get_tensor(name).float()
                if not tensor.abs().max() <= LARGEST_WEIGHT:
                    raise ValueError(f"it holds NaN, infinite or absurdly large weights, in {name}")
                state[own] = (tensor.T if transposed else tensor).clone(
                    memory_format=torch.contiguous_format
                )
            # TRL's, which belongs to the run that trained it
            if any(name.startswith("v_head.") for name in names):
                print(
                    f"{path}: its value head is left out; a run begins with a new one",
                    file=sys.stderr,
                )
            if "lm_head.weight" in names and not file.get_tensor("lm_head.weight").float().equal(
                state["wte.weight"]
            ):
                raise ValueError(
                    "it has a separate output layer (lm_head.weight), and only a tied one is supported"
                )
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} cannot be used here: {' '.join(str(error).split())[:200]}"
        ) from error
    with torch.device("meta"):
        student = Student(shape)
    student.load_state_dict(state, assign=True)
    return student.requires_grad_()


def _tokenizer(folder: Path, config: dict[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer of tokenizer.json, with the end token that config.json names."""
    file = folder / "tokenizer.json"
    spec = read_object(file)
    as_read = json.dumps(spec)
    try:
        if (spec.get("post_processor") or {"type": "ByteLevel"})["type"] != "ByteLevel":
            print(
                f"{folder}: its tokenizer adds special tokens around a text; they are left out here",
                file=sys.stderr,
            )
        vocab, added = spec["model"]["vocab"], spec["added_tokens"]
        ids = set(vocab.values()) | {token["id"] for token in added}
        if len(ids) > vocab_size:
            raise ValueError(f"it has {len(ids)} tokens and the model {vocab_size}")
        # Special tokens that GPT2TokenizerFast was not told of, and embedding rows beyond the
        # vocabulary, as padding.
        known = {token["content"] for token in added}
        specials = {name: vocab[name] for name in SPECIALS if name in vocab and name not in known}
        specials |= {f"<unused{id}>": id for id in range(len(ids), vocab_size)}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added += [
            {"id": id, "content": name, **flags, "special": True} for name, id in specials.items()
        ]
        end = config.get("eos_token_id")
        for token in added:
            if token["id"] == end and token["content"] not in END_NAMES:
                if END_NAMES[0] in vocab:
                    raise ValueError(
                        f"its end token is {token['content']!r}, and {END_NAMES[0]!r} is another"
                    )
                vocab.pop(token["content"], None)
                token["content"], vocab[END_NAMES[0]] = END_NAMES[0], end
        changed = json.dumps(spec) != as_read
        # If unchanged, keep the text as it is, so that a tokenizer that we wrote keeps its
        # fingerprint.
        tokenizer = Tokenizer(json.dumps(spec, ensure_ascii=False) if changed else read_text(file))
        if end is not None and tokenizer.eos != end:
            raise ValueError(f"its end token is {tokenizer.eos} and that of config.json is {end!r}")
        return tokenizer
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be used here: {error}") from error
