"""Reads and writes folders of transformers' GPT-2: config.json, model.safetensors, tokenizer.json.

transformers' Auto classes load the written folders without our code. Folders that are read are
untrusted: only JSON and safetensors are opened, sizes are checked before anything is allocated, and
only GPT-2's exact layout is accepted."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tinystory.data.tokenizer import SPECIALS, Tokenizer
from tinystory.run import hub
from tinystory.run.errors import UserError
from tinystory.run.files import read_text
from tinystory.run.records import read_object
from tinystory.student.model import Student, StudentConfig, wrong_shape

# Parts of our parameters' names -> transformers'.
NAMES = {
    "blocks": "h",
    "qkv": "attn.c_attn",
    "attn_proj": "attn.c_proj",
    "fc": "mlp.c_fc",
    "mlp_proj": "mlp.c_proj",
}
# Options that must have one of these values; the first value is transformers' default.
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh GELU
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
# The files to read, and what to do if one is missing.
FILES = {
    "model.safetensors": "load it with transformers and save it again with "
    "save_pretrained(FOLDER, max_shard_size='100GB'); a .bin file is a pickle, which can run code "
    "when it is loaded, and is not opened",
    "tokenizer.json": "save AutoTokenizer.from_pretrained(FOLDER) into it",
}
# the largest number of float16; below it no forward pass overflows float32
LARGEST_WEIGHT = 65504.0
PROBE = 64  # tokens of the sequence on which `require_finite` runs a student


def is_folder(path: Path) -> bool:
    """Whether a folder is in transformers' format and not one of our checkpoints."""
    config = path / "config.json"
    return (
        config.is_file()
        and not (path / "model.json").exists()
        and "model_type" in read_object(config)
    )


def download(address: str) -> Path:
    """The local folder with the downloaded files of hub:NAME@REVISION on the Hugging Face Hub.
    REVISION is a branch, tag or commit (default: main)."""
    name, _, revision = address.removeprefix("hub:").partition("@")
    files = ("config.json", *FILES)
    paths = hub.download(name, files, repo_type="model", revision=revision or None)
    return paths[0].parent


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file with the default permissions; safetensors' save_file would give the
    file 0600."""
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def require_finite(
    step: int, student: Student, state: Mapping[str, torch.Tensor], advice: str
) -> None:
    """Raises UserError if a step diverged: the weights are so large that `read_student` would
    refuse them, the logits are not finite, or the trainer's state is not finite. So no checkpoint
    holds values from which no run can continue. advice: options to change."""
    largest_weight = torch.nn.utils.get_total_norm(student.parameters(), math.inf)
    largest_state = torch.nn.utils.get_total_norm(state.values(), math.inf)
    length = min(student.config.context, student.config.vocab_size, PROBE)
    with torch.no_grad():
        logits = student(torch.arange(length, device=student.wte.weight.device)[None])
    weights_fit = largest_weight <= LARGEST_WEIGHT  # false for NaN
    if weights_fit and largest_state.isfinite() and logits.isfinite().all():
        return
    raise UserError(
        f"step {step} diverged (NaN, infinite or huge weights) and was not saved: {advice}; "
        "--resume continues from the last checkpoint, with such flags"
    )


def write(folder: Path, student: Student, tokenizer: Tokenizer) -> None:
    """Write a new folder that transformers can load. The folder's generation settings sample
    from the student's whole distribution. Raises OSError if the folder exists or cannot be
    written."""
    names = {id: name for name, id in tokenizer.specials.items()}
    ids = {}
    tokens = {}
    for role in ("bos", "eos", "pad"):
        token_id = getattr(tokenizer, role)
        ids[f"{role}_token_id"] = token_id
        tokens[f"{role}_token"] = names[token_id]
    config = {"architectures": ["GPT2LMHeadModel"]} | asdict(student.config)
    config["n_positions"] = config.pop("context")
    for name, values in FIXED.items():
        config[name] = values[0]
    config["tie_word_embeddings"] = config.pop("tied")
    config["torch_dtype"] = "float32"
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": student.config.context,
        # Without token_type_ids, the default of this class: GPT-2 would add the embedding of token
        # 0 everywhere.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "</s>" in a document is ordinary text
    }
    sampling = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_length": student.config.context,  # transformers' default is 20 tokens
    }
    files = {
        "config.json": config | ids,
        "generation_config.json": sampling | ids,
        "tokenizer_config.json": tokenizer_config | tokens,
        "special_tokens_map.json": tokens,
    }
    weights = {}
    for name, weight in student.state_dict().items():
        if is_transposed(name, weight.shape):
            weight = weight.T
        weights[their_name(name, "transformer.")] = weight.contiguous()
    folder.mkdir(parents=True)
    write_tensors(folder / "model.safetensors", weights)
    tokenizer.save(folder / "tokenizer.json")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def renamed(name: str, names: Mapping[str, str]) -> str:
    """A parameter's name, with the parts in `names` replaced."""
    return ".".join(names.get(part, part) for part in name.split("."))


def their_name(name: str, prefix: str) -> str:
    """transformers' name of one of our parameters. prefix: prepended to all names except the output
    head's."""
    return name if name.startswith("lm_head.") else prefix + renamed(name, NAMES)


def is_transposed(name: str, shape: Sequence[int]) -> bool:
    """Whether transformers stores this parameter transposed: its Conv1D has weights (in, out), our
    Linear (out, in)."""
    return name.startswith("blocks.") and len(shape) == 2


def read(folder: Path) -> tuple[Student, Tokenizer]:
    """Student (float32, on the CPU) and tokenizer of a folder in transformers' format. Raises
    UserError unless the folder has GPT-2's layout, byte-level BPE with GPT-2's split, and weights
    in safetensors."""
    for name, advice in FILES.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: {advice}")
    config = read_object(folder / "config.json")
    shape = _shape(folder, config)
    student = read_student(folder / "model.safetensors", shape)
    return student, _tokenizer(folder, config, shape.vocab_size)


def _shape(folder: Path, config: dict[str, Any]) -> StudentConfig:
    """The student's sizes. Raises UserError if config.json describes anything but GPT-2's
    layout."""
    sizes: dict[str, Any] = {
        "n_layer": config.get("n_layer"),
        "n_head": config.get("n_head"),
        "n_embd": config.get("n_embd"),
        "context": config.get("n_positions"),
        "vocab_size": config.get("vocab_size"),
        "tied": config.get("tie_word_embeddings", True),
    }
    problem = wrong_shape(sizes).replace("its context", "its n_positions")
    problem = problem.replace("its tied", "its tie_word_embeddings")
    n_inner = config.get("n_inner")
    if not problem and n_inner not in (None, 4 * sizes["n_embd"]):
        problem = f"its n_inner is {n_inner!r:.80}, not 4 * n_embd"
    for name, values in FIXED.items():
        value = config.get(name, values[0])
        if value not in values:
            problem = f"its {name} is {value!r:.80}, not {values[0]!r}"
    if problem:
        raise UserError(
            f"{folder}/config.json describes a model that is not supported here: {problem}"
        )
    return StudentConfig(**sizes)


def read_student(path: Path, shape: StudentConfig, *, ours: bool = False) -> Student:
    """A student (float32, on the CPU) from a weights file, ours or transformers' (where the prefix
    `transformer.` is optional). Raises UserError if a tensor is missing, does not have the shape
    that follows from `shape`, or could overflow."""
    state = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            prefix = "transformer." if "transformer.wte.weight" in names else ""
            if shape.n_layer > len(names):  # before so many layers are allocated
                raise ValueError(f"it has too few tensors for {shape.n_layer} layers")
            with torch.device("meta"):
                student = Student(shape)
            for own_name, parameter in student.named_parameters():
                expected = tuple(parameter.shape)
                name = own_name if ours else their_name(own_name, prefix)
                transposed = not ours and is_transposed(own_name, expected)
                if transposed:
                    expected = expected[::-1]
                size = tuple(file.get_slice(name).get_shape()) if name in names else "missing"
                if size != expected:
                    raise ValueError(
                        f"{name} is {size}, and the .json file beside it says {expected}"
                    )
                weight = file.get_tensor(name).float()
                if not weight.abs().max() <= LARGEST_WEIGHT:
                    raise ValueError(f"it holds NaN, infinite or absurdly large weights, in {name}")
                if transposed:
                    weight = weight.T
                state[own_name] = weight.clone(memory_format=torch.contiguous_format)
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be used here: {reason}") from error
    student.load_state_dict(state, assign=True)
    return student.requires_grad_()


def _tokenizer(folder: Path, config: dict[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer in tokenizer.json, with the end token that config.json names."""
    file = folder / "tokenizer.json"
    spec = read_object(file)
    try:
        vocab = spec["model"]["vocab"]
        added = spec["added_tokens"]
        ids = set(vocab.values()) | {token["id"] for token in added}
        if len(ids) > vocab_size:
            raise ValueError(f"it has {len(ids)} tokens and the model {vocab_size}")
        # Add special tokens that GPT2TokenizerFast does not know, and padding tokens for embedding
        # rows beyond the vocabulary.
        known = {token["content"] for token in added}
        unknown = [name for name in SPECIALS if name in vocab and name not in known]
        missing = [_special(vocab[name], name) for name in unknown]
        missing += [_special(id, f"<unused{id}>") for id in range(len(ids), vocab_size)]
        text = read_text(file)  # a tokenizer that we wrote stays as it is
        if missing:
            added += missing
            text = json.dumps(spec, ensure_ascii=False)
        tokenizer = Tokenizer(text)
        end = config.get("eos_token_id")
        if end is not None and tokenizer.eos != end:
            raise ValueError(f"its end token is {tokenizer.eos} and that of config.json is {end!r}")
        return tokenizer
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be used here: {error}") from error


def _special(id: int, content: str) -> dict[str, Any]:
    """A special token in `added_tokens` of a tokenizer.json."""
    settings = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, **settings, "special": True}
