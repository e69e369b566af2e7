"""Every option of both train commands, defined once: dataclass = command line, preset = data, config.json = record.

`python train_pretrain.py --preset paper --n-layer 6` means: the defaults, then the preset, then flags; the last wins.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from tinystory.errors import UserError
from tinystory.runlog import read_config


def option(default: Any, help: str) -> Any:
    """A dataclass field that is also a flag: `n_layer` is `--n-layer`. help: shown by --help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class PretrainConfig:
    """Pretrain a student on a corpus."""

    preset: str = field(init=False, default="demo")  # not an option of its own: `parse` sets it

    corpus: list[str] = option(
        ["primer", "builtin"], "primer, builtin, tinystories, babylm-10m, babylm-100m, or .txt/.jsonl files (.gz too)"
    )
    out: str = option("runs/pretrain", "folder of the run")
    words: int = option(3_000_000, "total words to train on, counting repeats")
    seed: int = option(0, "seed of initialisation, data order and dropout")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
    dtype: str = option("auto", "auto, float32 or bfloat16 (matmuls only; weights and optimiser stay float32)")
    resume: bool = option(False, "continue from the newest checkpoint in --out")

    n_layer: int = option(4, "transformer blocks")
    n_head: int = option(4, "attention heads")
    n_embd: int = option(128, "width of the residual stream")
    context: int = option(256, "context length, in tokens")
    vocab_size: int = option(2048, "size of the vocabulary, trained on the corpus; five tokens are special")
    weights_init: str = option("unit", "initial weights: unit (scaled with the width) or gpt2")
    dropout: float = option(0.0, "dropout rate of embeddings, attention and residuals")

    batch_size: int = option(8, "sequences per step")
    micro_batch_size: int = option(16, "sequences per forward pass; gradients are accumulated over a step")
    optimizer: str = option("muon", "muon (for the blocks' matrices, AdamW for the rest) or adamw")
    muon_learning_rate: float = option(0.02, "peak learning rate of Muon")
    learning_rate: float = option(2e-3, "peak learning rate of AdamW")
    final_learning_rate: float = option(0.0, "learning rate at the last word")
    warmup: float = option(0.2, "fraction of the words over which the learning rate rises linearly")
    beta1: float = option(0.9, "AdamW beta1")
    beta2: float = option(0.99, "AdamW beta2")
    eps: float = option(1e-8, "AdamW epsilon")
    weight_decay: float = option(0.0, "AdamW weight decay, on matrices only")
    grad_clip: float = option(1.0, "maximum gradient norm; 0 means no clipping")

    val_fraction: float = option(0.05, "fraction of the documents held out for validation")
    eval_every: int = option(100, "steps between validations")
    eval_sequences: int = option(64, "sequences per validation, evenly spread; the last one uses all")
    save_every: int = option(200, "steps between checkpoints for --resume; word milestones are saved as well")


@dataclass
class InteractConfig:
    """Train a student by interaction: it writes stories, a teacher scores them, PPO learns from the scores."""

    preset: str = field(init=False, default="demo")  # not an option of its own: `parse` sets it

    init: str = option(
        "", "starting checkpoint, or a folder that transformers wrote (default: newest under runs/pretrain)"
    )
    out: str = option("runs/interact", "folder of the run")
    seed: int = option(0, "seed of the stories, the minibatch order and the teacher's sampling")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
    dtype: str = option("auto", "auto, float32 or bfloat16 (matmuls only; weights and optimiser stay float32)")
    resume: bool = option(False, "continue from the newest checkpoint in --out")

    teacher_url: str = option(
        "", "any OpenAI-compatible endpoint, e.g. http://127.0.0.1:11434/v1 (default: the built-in teacher)"
    )
    teacher_model: str = option("", "model name (default: the first that the server lists)")
    teacher_concurrency: int = option(16, "maximum number of requests in flight")
    teacher_temperature: float = option(0.2, "sampling temperature of the teacher")
    teacher_max_tokens: int = option(16, "maximum tokens of a reply; three numbers need 6")
    teacher_timeout: float = option(300.0, "seconds that grading one story may take, retries included")
    teacher_prompt: str = option("", "JSON file with other criteria, levels and weights (see docs/teachers.md)")
    teacher_logprobs: bool = option(
        False, "use expected scores under the teacher's token probabilities, not the sampled digits"
    )
    price_in: float = option(0.0, "price per million prompt tokens, in any currency")
    price_out: float = option(0.0, "price per million reply tokens")
    budget_cost: float = option(0.0, "maximum cost of the teacher at these prices; 0 means no limit")
    replay: str = option("", "folder of a run whose teacher's replies are replayed, without a server")
    teacher_corpus: list[str] = option([], "corpus of the built-in teacher (default: the student's own)")
    reward: str = option("", "FILE.py:FUNCTION in place of a teacher: f(opening, stories) -> [0..1 or None]; or random")
    calibrate: bool = option(True, "before the run, see whether --teacher-url tells stories from shuffled words")
    require_judgement: float = option(
        0.0, "least probability with which the teacher must put a story above shuffled words; 0.5 is chance"
    )
    max_unscored: float = option(0.1, "maximum fraction of a step's stories without a score")

    openings: str = option("builtin", "what stories begin with: builtin, or a file with one opening per line")
    opening: str = option("", "one opening for every story, in place of --openings")
    stories_per_opening: int = option(1, "stories that share an opening within a step")
    steps: int = option(16, "maximum number of PPO steps")
    stories_per_step: int = option(256, "stories per step")
    max_new_tokens: int = option(200, "maximum tokens of a story")
    temperature: float = option(0.7, "sampling temperature of the student")
    budget_words: int = option(1_000_000, "word budget, in: each opening once and every word of every reply")
    budget_words_out: int = option(100_000_000, "word budget, out: every word that the student writes")
    length_weight: float = option(0.4, "weight of the length term relative to the teacher's score")
    length_words: int = option(90, "words at which the length term reaches its maximum")
    diversity: float = option(0.5, "part of the score, 0..1, that is multiplied by the story's difference from others")
    unfinished: float = option(0.5, "part of its reward, 0..1, that a story keeps which does not end")
    look_every: int = option(4, "steps between looks at held-out openings; 0: only at the start and the end")
    look_stories: int = option(40, "stories per look; the student that earns most in one is kept as `best`")
    stop_on_collapse: bool = option(False, "end the run, with everything saved, when the stories collapse")

    learning_rate: float = option(6e-5, "initial learning rate of Adam")
    lr_decay: bool = option(True, "let the rate fall linearly to 0 at --steps")
    sharpness_rate: float = option(
        0.06, "initial learning rate of the scale of all logits, which is learned apart; 0: not"
    )
    adam_eps: float = option(1e-8, "Adam epsilon")
    epochs: int = option(1, "PPO passes over a step's stories")
    minibatch_size: int = option(0, "stories per gradient step; 0 means all")
    micro_batch_size: int = option(32, "stories per forward pass; gradients are accumulated over a minibatch")
    advantage: str = option("rloo", "gae (with the value head) or rloo (the reward minus the mean of the others')")
    gamma: float = option(1.0, "discount factor")
    lam: float = option(1.0, "GAE lambda")
    clip_ratio: float = option(0.2, "clipping range of the policy ratio")
    clip_value: float = option(0.2, "clipping range of the value")
    value_coef: float = option(0.0, "weight of the value loss, for --advantage gae")
    max_ratio: float = option(10.0, "mean policy ratio above which a minibatch is skipped, and counted")
    grad_clip: float = option(0.0, "maximum gradient norm; 0 means no clipping")
    kl_coef: float = option(0.01, "initial coefficient of the KL penalty against the starting checkpoint")
    kl_target: float = option(6.0, "target KL per story, in nats (adaptive controller)")
    kl_horizon: float = option(2_000.0, "horizon of the adaptive controller, in stories")

    save_every: int = option(20, "steps between checkpoints for --resume; word milestones are saved as well")


# Source of `paper`: arXiv 2509.15714 and its public code; where they set nothing, the defaults of their libraries
# (gradient clipping in pretraining: transformers' Trainer; float32 in the interaction: TRL).
_PAPER_PRETRAIN = dict(
    n_layer=12, n_head=12, n_embd=768, context=512, vocab_size=16_000, weights_init="gpt2", optimizer="adamw",
    dropout=0.1, corpus=["babylm-100m"], words=990_000_000, val_fraction=0.1, batch_size=256, micro_batch_size=32,
    learning_rate=5e-4, final_learning_rate=0.0, warmup=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0,
    grad_clip=1.0, eval_every=250, save_every=250,
)  # fmt: skip
PAPER_OPENING = "Let me tell you a long, magical tale. Once upon a time, in a faraway land,"
_PAPER_INTERACT = dict(
    dtype="float32", opening=PAPER_OPENING, teacher_temperature=0.2, teacher_max_tokens=6, steps=920,
    stories_per_step=360, stories_per_opening=1, max_new_tokens=90, temperature=1.0, budget_words=1_000_000,
    budget_words_out=100_000_000, length_weight=0.4, length_words=90, diversity=0.0, unfinished=1.0, look_every=0,
    learning_rate=1e-6, lr_decay=False, sharpness_rate=0.0, advantage="gae", adam_eps=1e-8, epochs=4,
    minibatch_size=0, gamma=1.0, lam=0.95, clip_ratio=0.2, clip_value=0.2, value_coef=0.1, max_ratio=10.0,
    grad_clip=0.0, kl_coef=0.2, kl_target=6.0, kl_horizon=10_000.0,
)  # fmt: skip
PRETRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "paper": _PAPER_PRETRAIN,
    # The limit is ten epochs (see babylm.py); training on 95 % of the corpus, not the paper's 90 %, stays within it.
    "babylm-2025": dict(_PAPER_PRETRAIN, words=900_000_000, val_fraction=0.05),
}
INTERACT_PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "paper": _PAPER_INTERACT,
    "babylm-2025": _PAPER_INTERACT,
}


def parse(config_class: type, presets: dict[str, dict[str, Any]], argv: list[str] | None = None) -> Any:
    """Parse a command line into a `config_class`, whose attribute `preset` is the preset's name. Raises UserError for
    an option out of range; with --resume, options that are not given come from the run's config.json."""
    parser = argparse.ArgumentParser(description=config_class.__doc__, allow_abbrev=False)
    parser.add_argument("--preset", choices=presets, help="named set of the options below (default: demo)")
    types = get_type_hints(config_class)
    options = [f for f in dataclasses.fields(config_class) if f.init]  # all but `preset`
    for f in options:
        kind = types[f.name]
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        flag = "--" + f.name.replace("_", "-")
        # SUPPRESS keeps flags that were not given out of the namespace, so a preset overrides defaults but not flags.
        how: dict[str, Any] = dict(default=argparse.SUPPRESS, help=f"{f.metadata['help']} (default: {default!r})")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **how)
        elif get_origin(kind) is list:
            parser.add_argument(flag, nargs="+", type=get_args(kind)[0], metavar="NAME", **how)
        else:
            readers: dict[type, Callable[[str], Any]] = {int: _whole, float: float}
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            parser.add_argument(flag, type=readers.get(kind, kind), metavar=metavar, **how)
    typed = vars(parser.parse_args(argv))
    preset = typed.pop("preset")
    config = config_class(**{**presets[preset or "demo"], **typed})
    if config.resume:  # a run continues with its own options, overridden by flags
        recorded = read_config(Path(config.out)).get("options", {})
        preset = preset or recorded.get("preset")
        known = {f.name: recorded[f.name] for f in options if f.name in recorded}
        config = config_class(**{**presets[preset or "demo"], **known, **typed})
    config.preset = preset or "demo"
    _check(config)
    return config


def as_dict(config: Any) -> dict[str, Any]:
    """All options as run, the preset's name first, for config.json."""
    return dataclasses.asdict(config)


def _whole(text: str) -> int:
    """An integer written as 1000000, 1_000_000, 1e6 or 1M."""
    scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    number = float(text[:-1] if scale > 1 else text)
    if not (number * scale).is_integer():
        raise ValueError(text)
    return int(number * scale)


_whole.__name__ = "whole number"  # argparse names the type in its error message

_POSITIVE = (
    "words", "n_layer", "n_head", "n_embd", "context", "vocab_size", "batch_size", "micro_batch_size", "eval_every",
    "eval_sequences", "save_every", "steps", "stories_per_step", "max_new_tokens", "epochs", "budget_words",
    "budget_words_out", "length_words", "teacher_concurrency", "teacher_timeout", "temperature", "learning_rate",
    "kl_target", "kl_horizon", "stories_per_opening", "look_stories", "muon_learning_rate",
)  # fmt: skip


def _check(config: Any) -> None:
    for name in _POSITIVE:
        if hasattr(config, name) and not getattr(config, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be greater than 0, not {getattr(config, name)}")
    for name in ("price_in", "price_out", "budget_cost"):
        if hasattr(config, name) and not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(config, name)}")
    if getattr(config, "teacher_logprobs", False) and config.preset != "demo":
        raise UserError(
            f"--teacher-logprobs does not go with --preset {config.preset}: there the teacher's probabilities must not "
            "reach the student"
        )
    if getattr(config, "budget_cost", 0) and not config.price_in + config.price_out:
        raise UserError("--budget-cost needs the prices: give --price-in and --price-out, per million tokens")
    for name in ("dropout", "val_fraction", "warmup", "max_unscored", "require_judgement"):
        if hasattr(config, name) and not 0 <= getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 0 and below 1, not {getattr(config, name)}")
    for name in ("diversity", "unfinished"):
        if hasattr(config, name) and not 0 <= getattr(config, name) <= 1:
            raise UserError(f"--{name} must be from 0 to 1, not {getattr(config, name)}")
    if getattr(config, "look_every", 0) < 0:
        raise UserError(f"--look-every must be at least 0, not {config.look_every}")
    if getattr(config, "advantage", "gae") not in ("gae", "rloo"):
        raise UserError(f"--advantage must be gae or rloo, not {config.advantage!r}")
    if hasattr(config, "n_head") and config.n_embd % config.n_head:
        raise UserError(f"--n-embd {config.n_embd} must be a multiple of --n-head {config.n_head}")
    if getattr(config, "weights_init", "unit") not in ("unit", "gpt2"):
        raise UserError(f"--weights-init must be unit or gpt2, not {config.weights_init!r}")
    if getattr(config, "optimizer", "muon") not in ("muon", "adamw"):
        raise UserError(f"--optimizer must be muon or adamw, not {config.optimizer!r}")
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype must be auto, float32 or bfloat16, not {config.dtype!r}")
