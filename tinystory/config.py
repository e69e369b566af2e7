"""Every option of both train commands: the dataclasses define the command line and the record in
config.json.

Flags override the preset, which overrides the defaults: `python train_pretrain.py --preset paper
--n-layer 6`."""

import argparse
import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from tinystory.data import corpus, openings
from tinystory.run.credentials import redacted, secret_in
from tinystory.run.errors import UserError
from tinystory.run.folder import CONTROL_RUNS, newest_first, require_config
from tinystory.run.options import (
    ScriptParser,
    add_options,
    did_you_mean,
    flag_of,
    option,
    require_valid,
)
from tinystory.run.records import CONFIG, SAMPLES
from tinystory.run.text import printable

OUT_HELP = "folder of the run; if this folder is taken and --out is not given: NAME-2, NAME-3, ..."
SAVE_HELP = "steps between two checkpoints for --resume"
# The options that --help lists; --help-all lists the others too.
FIRST = set(
    "preset init out resume seed device corpus words n_layer n_head n_embd context vocab_size "
    "batch_size learning_rate optimizer eval_every teacher_url teacher_model teacher_concurrency reward "
    "openings steps stories_per_step control "
    "max_new_tokens budget_words diversity learner kl_coef "
    "teacher_prompt grades eval_graded temperature stories_per_opening judge".split()
)
# Options that a resumed run keeps. Some act only at the start of a run. The others determine the
# tokenizer, the held-out documents, the order of the corpus and the earlier evaluations.
KEPT_ON_RESUME = (
    *("preset", "init", "seed"),
    *("n_layer", "n_head", "n_embd", "context", "vocab_size", "weights_init"),
    *("val_fraction", "packing", "batch_size", "optimizer"),
    *("openings", "temperature", "kl_coef"),
)
SEEDS = "[0, 4294967295]"
MOST_WORDS = 10**15  # of a budget
FEWEST_GRADES = 8  # minimum of --grades
LEAST_TEMPERATURE = 0.01
# Flags of both commands, by names that nanoGPT and TRL have for them.
OTHER_NAMES = {
    "lr": ["--learning-rate"],
    "batch-size": [
        "--stories-per-step (stories sampled in a step, TRL's batch_size)",
        "--minibatch-size (stories per gradient step)",
    ],
    "block-size": ["--context"],
    "max-iters": ["--words", "--steps"],
    "warmup-iters": ["--warmup"],
    "eval-interval": ["--eval-every"],
    "eval-iters": ["--eval-sequences", "--eval-stories"],
    "gradient-accumulation-steps": ["--micro-batch-size"],
    "dataset": ["--corpus"],
    "out-dir": ["--out"],
    "init-from": ["--init", "--resume"],
}
# The learners of the table in tinystory/rl/learners.py, which imports this file, with the option
# values that each brings, as measured on the demo (lab/results.md).
LEARNER_DEFAULTS: dict[str, dict[str, Any]] = {
    "ridge": {},
    "gae": {},
    "rloo": dict(stories_per_opening=8),
    "grpo": dict(stories_per_opening=8),
    "dr_grpo": dict(stories_per_opening=8),
    "dpo": dict(stories_per_opening=2, learning_rate=4e-4, kl_coef=0.1),
    "sft-best": dict(epochs=4),
}
# the named ways to ask a teacher: PROTOCOLS in tinystory/teacher/named_protocols.py
PROMPTS = ("event", "examples", "sense", "thread", "grades")
# options for a teacher at --teacher-url
FOR_ENDPOINTS = (
    "teacher_model teacher_temperature teacher_max_tokens teacher_extra teacher_prompt price_in "
    "price_out budget_cost"
).split()
REWARDS = ("random", "constant", "likelihood")  # controls of --reward; else a function in a file
CONTROLS = ("shuffled", "constant", "likelihood")  # controls of a finished run, --control RUN NAME
# Options of the teacher, which a control does not need, and all that --control may set. Other options
# have the run's values.
OF_TEACHER = (
    *("teacher_url", "teacher_model", "any_model", "teacher_concurrency", "teacher_per_minute"),
    *("teacher_temperature", "teacher_extra", "teacher_max_tokens", "teacher_timeout"),
    "teacher_prompt",
    "teacher_per_minute",
    *("price_in", "price_out", "budget_cost", "reward", "calibrate", "require_judgement"),
)
OF_CONTROL = (
    *("control", "out", "resume", "init", "device", "openings", "corpus", "save_every"),
    *("judge", "judge_model", "judge_prompt", "eval_every", "eval_stories"),
    *OF_TEACHER,
)
# A run's folder may come from somebody else, so no command opens, executes or sends requests to
# anything that the folder names. An option without choices takes a value from config.json only if
# its entry here admits the value. Files, URLs, functions and models must be given on the command
# line, and given again for a resume.
RECORDED: dict[str, Callable[[str], object]] = {
    "device": re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?").fullmatch,
    "corpus": corpus.NAMES.__contains__,
    "reward": REWARDS.__contains__,
    "openings": lambda text: not openings.names_file(text),
    "teacher_prompt": PROMPTS.__contains__,
    "judge": ("rubric",).__contains__,
    "judge_prompt": PROMPTS.__contains__,
}

# TinyStories on two CPU cores: 16 minutes on a Zen 4, 86 on a Zen 3 (docs/english.md). The unlikely
# tokens of so small a student are noise, so a temperature is chosen first.
_ENGLISH_PRETRAIN = dict(
    n_layer=4,
    n_embd=256,
    vocab_size=4096,
    corpus=["tinystories-valid"],
    words=6_000_000,
    batch_size=16,
)
_ENGLISH_INTERACT = dict(
    temperature=0.0, stories_per_step=768, learning_rate=4e-4, sharpness_rate=0.02
)
# Source of `paper`: arXiv 2509.15714 and its public code. If these set no value, the defaults of
# the libraries apply (gradient clipping in pretraining: transformers' Trainer; float32 in
# interaction: TRL). Values that are equal to our defaults are not repeated.
_PAPER_PRETRAIN = dict(
    n_layer=12,
    n_head=12,
    n_embd=768,
    context=512,
    vocab_size=16_000,
    weights_init="gpt2",
    optimizer="adamw",
    packing="stream",
    dropout=0.1,
    corpus=["babylm-100m"],
    words=990_000_000,
    val_fraction=0.1,
    batch_size=256,
    micro_batch_size=32,
    learning_rate=5e-4,
    warmup=0.01,
    beta2=0.999,
    eval_every=250,
    eval_sequences=64,
    save_every=250,
)
PAPER_OPENING = "Let me tell you a long, magical tale. Once upon a time, in a faraway land,"
_PAPER_INTERACT = dict(
    dtype="float32",
    openings=PAPER_OPENING,
    teacher_max_tokens=6,
    steps=920,
    stories_per_step=360,
    max_new_tokens=90,
    temperature=1.0,
    diversity=0.0,
    unfinished=1.0,
    eval_every=0,
    save_every=20,
    learning_rate=1e-6,
    lr_decay=False,
    sharpness_rate=0.0,
    learner="gae",
    epochs=4,
    minibatch_size=0,
    kl_coef=0.2,
    kl_horizon=10_000.0,
)
# At most ten epochs (see babylm.py) of a part of the corpus, which leaves room for the teacher's
# words.
_STRICT_PRETRAIN = dict(_PAPER_PRETRAIN, words=900_000_000, val_fraction=0.05)
_STRICT_SMALL_PRETRAIN = dict(
    _PAPER_PRETRAIN, corpus=["babylm-10m"], words=85_000_000, val_fraction=0.12, batch_size=64
)
# Options of a pretraining, and of the interaction after it.
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "demo": ({}, {}),
    "english": (_ENGLISH_PRETRAIN, _ENGLISH_INTERACT),
    "paper": (_PAPER_PRETRAIN, _PAPER_INTERACT),
    "babylm-2026-strict": (_STRICT_PRETRAIN, _PAPER_INTERACT),
    "babylm-2026-strict-small": (_STRICT_SMALL_PRETRAIN, _PAPER_INTERACT),
}
PRETRAIN_PRESETS = {name: options for name, (options, _) in PRESETS.items()}
INTERACT_PRESETS = {name: options for name, (_, options) in PRESETS.items()}
# Options that a --teacher-url without --teacher-prompt brings, if the student has learned the
# demo's corpora: what made a language model of 1.5 B parameters teach (docs/teachers.md).
MODEL_TEACHER: dict[str, Any] = dict(
    teacher_prompt="event", grades=64, steps=8, judge="rubric", eval_graded=False
)


@dataclass
class RunConfig:
    """Options of both commands."""

    # Three facts about the command line, which a run's record must not set: whether --out was given,
    # the flags that other options brought, and whether micro_batch_size is neither given nor recorded.
    names_out = False
    brought = ""
    sizes_micro_batch = False

    preset: str = option("demo", "named set of option values", tuple(PRESETS), group="run")
    out: str = option("runs/pretrain", OUT_HELP)
    resume: bool = option(
        False,
        "continue a run from its newest checkpoint with its recorded options: the run in --out, or "
        "without --out the newest run that was started without --out",
    )
    seed: int = option(0, "seed of all random numbers", SEEDS)
    device: str = option("auto", "device: auto, cpu, cuda or cuda:N")
    dtype: str = option(
        "auto",
        "precision of the matmuls; weights and optimiser states are float32; tf32 needs a GPU",
        ("auto", "float32", "tf32", "bfloat16"),
    )
    save_every: int = option(200, SAVE_HELP, "[1, 1e9]")


@dataclass
class PretrainConfig(RunConfig):
    """Pretrain a student on a corpus."""

    n_layer: int = option(3, "number of transformer blocks", "[1, 1000]", group="model")
    n_head: int = option(0, "number of attention heads; 0: --n-embd / 64", "[0, 1000]")
    n_embd: int = option(192, "width of the residual stream", "[16, 100000]")
    context: int = option(256, "context length, in tokens", "[2, 1e6]")
    vocab_size: int = option(
        2048, "vocabulary size of the tokenizer, five special tokens included", "[261, 1e6]"
    )
    weights_init: str = option(
        "unit", "scale of the initial weights: by the width (unit), or GPT-2's", ("unit", "gpt2")
    )
    dropout: float = option(0.0, "dropout rate of embeddings, attention and residuals", "[0, 1)")

    corpus: list[str] = option(
        ["builtin", "dull"],
        "corpora to train on: builtin, dull, tinystories, tinystories-valid, babylm-10m, "
        "babylm-100m, or .txt and .jsonl files, gzipped or not",
        group="data",
    )
    words: int = option(1_100_000, "total words to train on, counting repeats", "[1, 1e15]")
    val_fraction: float = option(
        0.05, "fraction of the documents held out for validation", "(0, 1)"
    )
    packing: str = option(
        "whole",
        "packing of documents into sequences: whole documents if they fit, or one stream",
        ("whole", "stream"),
    )

    batch_size: int = option(4, "sequences per step", "[1, 1e9]", group="optimiser")
    micro_batch_size: int = option(
        16, "sequences per forward pass; gradients are accumulated over a step", "[1, 1e9]"
    )
    optimizer: str = option(
        "muon",
        "optimizer: Muon for the blocks' matrices and AdamW for the rest, or AdamW for all",
        ("muon", "adamw"),
    )
    muon_learning_rate: float = option(0.02, "peak learning rate of Muon", "(0, 100]")
    learning_rate: float = option(
        0.0, "peak learning rate of AdamW; 0: 0.024 with Muon, 0.0024 without", "[0, 100]"
    )
    warmup: float = option(
        0.1, "fraction of the words over which the learning rate rises linearly", "[0, 1)"
    )
    beta2: float = option(0.99, "beta2 of AdamW", "[0, 1)")
    weight_decay: float = option(0.0, "weight decay of AdamW, on matrices only", "[0, 100]")
    grad_clip: float = option(1.0, "maximum gradient norm; 0: no clipping", "[0, 1e9]")

    eval_every: int = option(200, "steps between validations", "[1, 1e9]", group="evaluation")
    eval_sequences: int = option(
        32,
        "sequences per validation, evenly spread; the last validation uses all sequences",
        "[1, 1e9]",
    )

    def __post_init__(self) -> None:
        if self.n_head == 0 and isinstance(self.n_embd, int):  # `check` refuses another type
            self.n_head = max(1, self.n_embd // 64)
        if self.learning_rate == 0:
            self.learning_rate = 0.024 if self.optimizer == "muon" else 0.0024


@dataclass
class InteractConfig(RunConfig):
    """Train a student by interaction: it writes stories, a teacher scores them, PPO learns from the
    scores."""

    out: str = option("runs/interact", OUT_HELP)
    init: str = option(
        "",
        "checkpoint to start from, or hub:NAME@REVISION (default: that of the newest pretraining "
        "run)",
    )
    steps: int = option(4, "maximum number of PPO steps", "[1, 1e9]")
    save_every: int = option(1, SAVE_HELP, "[1, 1e9]")
    control: list[str] = option(
        [],
        "finished run to repeat as its own control, without its teacher: each story gets the score "
        "that another story of the same step had (shuffled, the default). A second word chooses "
        "another control: constant, the step's mean score; or likelihood (docs/evaluation.md)",
    )
    stop_on_collapse: bool = option(
        False,
        "whether to save and end the run when the stories collapse or the KL runs away",
    )

    teacher_url: list[str] = option(
        [],
        "URLs of OpenAI-compatible servers with the same model, such as http://127.0.0.1:11434/v1 "
        "(default: the built-in teacher)",
        group="teacher",
    )
    teacher_model: list[str] = option(
        [],
        "model name of the teacher, or one name per --teacher-url (default: the server's first model)",
    )
    any_model: bool = option(
        False,
        "whether replies may come from another model than at the beginning of the run, although "
        "its scores may not be comparable",
    )
    corpus: list[str] = option(
        [],
        "corpora or files to which the built-in teacher is fitted, and from which --teacher-url's "
        "calibration texts are taken (default: the student's corpus, unless that was a file)",
    )
    teacher_concurrency: int = option(
        16, "maximum number of requests in flight per server", "[1, 10000]"
    )
    teacher_per_minute: int = option(
        0,
        "maximum number of requests per minute to each server (default: as many as it allows)",
        "[0, 1000000]",
    )
    teacher_temperature: float = option(0.2, "sampling temperature of the teacher", "[0, 2]")
    teacher_extra: str = option(
        "", "JSON object with fields to add to each request, such as service_tier"
    )
    teacher_max_tokens: int = option(
        16, "maximum tokens of a teacher's reply; three numbers need 6", "[1, 100000]"
    )
    teacher_timeout: float = option(
        300.0,
        "time limit in seconds for a teacher's reply, or for a call of --reward",
        "(0, 86400]",
    )
    teacher_prompt: str = option(
        "",
        "way of asking the teacher: event, examples, sense or thread, which are yes-or-no questions; "
        "grades; or a JSON file with other criteria or questions (docs/teachers.md). Default: "
        "grades; for a student of the demo's corpora "
        f"{MODEL_TEACHER['teacher_prompt']}, with further options that the run prints. "
        "scripts/doctor.py measures which way judges best",
    )
    price_in: float = option(0.0, "price of a million prompt tokens, in any currency", "[0, 1e9]")
    price_out: float = option(
        0.0, "price of a million reply tokens, in the same currency", "[0, 1e9]"
    )
    budget_cost: float = option(
        0.0, "maximum cost of the teacher, at --price-in and --price-out; 0: no limit", "[0, 1e12]"
    )
    reward: str = option(
        "",
        "function that replaces the teacher, FILE.py[:FUNCTION]: score(opening, stories) returns a "
        "number from 0 to 1 or None per story; or a control: random, constant, or likelihood (the "
        "story's log-likelihood under the starting checkpoint)",
    )
    calibrate: bool = option(
        True,
        "whether to measure before the run how well --teacher-url distinguishes real stories from "
        "bad texts",
    )
    require_judgement: float = option(
        0.0,
        "minimum AUC of the teacher's calibration, for the kind of bad text that it recognises "
        "best; 0.5 is chance",
        "[0, 1)",
    )
    max_unscored: float = option(
        0.1,
        "maximum fraction of a step's graded stories without a score; above it the run ends",
        "[0, 1)",
    )
    grades: int = option(
        0,
        "total grades to request in the run; a regression model selects the most informative "
        "stories and predicts the other scores; 0: grade every story",
        "[0, 1e9]",
    )

    openings: str = option(
        "builtin",
        "openings (prompts): builtin, a file with one opening per line, or the text of an opening",
        group="story",
        flags=("--opening",),
    )
    stories_per_opening: int = option(1, "number of stories per opening within a step", "[1, 1e9]")
    stories_per_step: int = option(
        384, "number of stories that the student writes per step", "[1, 1e6]"
    )
    max_new_tokens: int = option(200, "maximum tokens of a story", "[1, 1e6]")
    temperature: float = option(
        0.85,
        "temperature folded into the starting student; 0: try 1, 0.8, 0.65, 0.5 and 0.4, and use "
        "the temperature with the highest mean reward",
        "[0, 100]",
    )
    budget_words: int = option(
        1_000_000,
        "maximum words that the student takes in: each opening once, and all replies",
        "[1, 1e15]",
    )
    budget_words_out: int = option(
        100_000_000, "maximum words that the student writes", "[1, 1e15]"
    )
    length_weight: float = option(
        0.4, "weight of the reward's length term, relative to the teacher's score", "[0, 100]"
    )
    length_words: int = option(
        90, "number of words at which the length term reaches its maximum", "[1, 1e9]"
    )
    diversity: float = option(
        0.5, "weight of the diversity factor in the score; 0: none, 1: full", "[0, 1]"
    )
    unfinished: float = option(
        0.5, "fraction of the reward that a story without an end token keeps", "[0, 1]"
    )

    learning_rate: float = option(
        1.2e-3, "initial learning rate of Adam", "(0, 100]", group="optimiser"
    )
    lr_decay: bool = option(
        True, "linear decay of the learning rates to 0, over all updates of the run"
    )
    sharpness_rate: float = option(
        0.03,
        "initial learning rate of the scale of all logits; 0: no separate learning rate",
        "[0, 10]",
    )
    minibatch_size: int = option(
        96, "stories per gradient step; 0: all stories of the step", "[0, 1e9]"
    )
    micro_batch_size: int = option(
        32,
        "stories per forward pass; gradients are accumulated over a minibatch (default on a GPU "
        "with 16 GB: up to 128)",
        "[1, 1e9]",
    )
    grad_clip: float = option(0.0, "maximum gradient norm; 0: no clipping", "[0, 1e9]")

    epochs: int = option(1, "number of passes over a step's stories", "[1, 1000]", group="PPO")
    learner: str = option(
        "ridge",
        "learning algorithm: PPO with values by ridge regression (ridge) or by a value head (gae); "
        "rloo, grpo and dr_grpo (with --stories-per-opening 8); dpo, on the best and the worst story "
        "for an opening (with --stories-per-opening 2 --learning-rate 4e-4 --kl-coef 0.1); or "
        "sft-best, cross-entropy on the best quarter of a step's stories, in four passes. The values in "
        "parentheses are the learner's defaults",
        tuple(LEARNER_DEFAULTS),
    )
    gamma: float = option(1.0, "discount factor", "[0, 1]")
    lam: float = option(
        0.95,
        "lambda of GAE; 1 is better with --learner gae, and with few stories per step",
        "[0, 1]",
    )
    clip_ratio: float = option(0.2, "clipping range of the policy ratio", "(0, 10]")
    value_coef: float = option(0.1, "weight of the value loss, for --learner gae", "(0, 1000]")
    kl_in: str = option(
        "reward", "place of the KL penalty; in the loss, the estimator is k3", ("reward", "loss")
    )
    kl_coef: float = option(
        0.01,
        "initial coefficient of the KL penalty against the starting checkpoint; beta of --learner dpo",
        "[0, 1000]",
    )
    kl_target: float = option(
        6.0,
        "target KL per story, in nats, of the adaptive controller, which changes the coefficient by at "
        "most 20 % in --kl-horizon stories",
        "(0, 1e6]",
    )
    kl_horizon: float = option(
        2_000.0, "horizon of the adaptive KL controller, in stories", "(0, 1e12]"
    )
    eval_every: int = option(
        1,
        "steps between evaluations; 0: only at the start and the end",
        "[0, 1e9]",
        group="evaluation",
    )
    eval_stories: int = option(
        40,
        "stories per evaluation",
        "[1, 1e6]",
    )
    eval_graded: bool = option(
        True, "whether the teacher grades evaluations; if not, `best` is the last student"
    )
    judge: str = option(
        "",
        "second judge that scores the stories of each evaluation: a URL, FILE.py[:FUNCTION] or "
        "rubric (the built-in teacher). These scores are reported and never part of the reward",
    )
    judge_model: str = option("", "model name of a --judge URL (default: the server's first model)")
    judge_prompt: str = option(
        "", "way of asking a --judge URL; the values are those of --teacher-prompt"
    )


def parse(
    config_class: type[RunConfig],
    presets: dict[str, dict[str, Any]],
    argv: list[str] | None = None,
    brings: Callable[[Any], dict[str, Any]] = lambda config: {},
) -> Any:
    """The options of a command line, as a `config_class`. With --resume, options that are not given
    come from the run's config.json. brings: returns the options that the given ones bring, unless
    the user or the preset gives them. Raises UserError for an unknown option or a value out of
    range."""
    words = sys.argv[1:] if argv is None else argv
    shown: set[str] | None = FIRST
    if "--help-all" in words:
        words = ["--help"]
        shown = None
    parser = ScriptParser(
        usage="%(prog)s [options]", description=config_class.__doc__, allow_abbrev=False
    )
    parser.other_names = OTHER_NAMES
    parser.add_argument("--help-all", action="store_true", help="show every option, and exit")
    add_options(parser, config_class, shown=shown)
    typed = vars(parser.parse_args(words))

    del typed["help_all"]
    names_out = "out" in typed
    config: RunConfig
    if "control" in typed:
        return control_config(typed)
    if typed.get("resume"):  # a run continues with its own options, overridden by flags
        if not names_out:
            runs = newest_first(Path(config_class.out))
            typed["out"] = str(runs[0]) if runs else config_class.out
        # --init is needed only before the first checkpoint
        config = recorded_config(config_class, Path(typed["out"]), typed, unused=["init"])
    else:
        given = presets.get(typed.get("preset", "demo"), {}) | typed
        config = config_class(**given)
        check(config)
        usual = LEARNER_DEFAULTS.get(given.get("learner", ""), {}) | brings(config)
        brought = {name: value for name, value in usual.items() if name not in given}
        config = config_class(**brought | given)
        check(config)
        config.brought = " ".join(arguments(config_class, brought))
        config.sizes_micro_batch = "micro_batch_size" not in given
    config.names_out = names_out
    return config


def recorded_config(
    config_class: type[RunConfig],
    run: Path,
    typed: dict[str, Any],
    unused: Container[str] = (),
    kept: Container[str] = KEPT_ON_RESUME,
) -> Any:
    """The options in a run's config.json, overridden by `typed`, options from the command line.
    Raises UserError if another command or version began the run, if an option in `kept` is given
    another value, if `check` refuses a value, and if an option is missing that only the command
    line may give. unused: options that the caller does not use, which may be missing."""
    recorded = require_config(run)["options"]
    path = run / CONFIG
    options: dict[str, Any] = {}
    again: list[str] = []
    for f in dataclasses.fields(config_class):
        if f.name not in recorded:
            raise UserError(
                f"{path} has no {f.name}: the run was begun by another command or another "
                "version; continue with that one, or start a new run in another --out"
            )
        if _may_be_recorded(f, recorded[f.name]):
            options[f.name] = recorded[f.name]
        elif f.name not in (*typed, "out") and f.name not in unused:
            again += _arguments(f, recorded[f.name])
    options.pop("any_model", None)  # each resume must insist on it
    if "tried_temperatures" in recorded and typed.get("temperature") == 0:
        typed = typed | {"temperature": recorded["temperature"]}  # the chosen temperature
    config = config_class(**options | {"resume": False} | typed | {"out": str(run)})
    for f in dataclasses.fields(config_class):
        is_kept = f.name in kept and f.name in typed
        if is_kept and getattr(config, f.name) != recorded[f.name]:
            raise UserError(
                f"{flag_of(f)} {typed[f.name]} does not go with --resume: {run} was begun with "
                f"{recorded[f.name]!r:.200}; leave it out, or start a new run in another --out"
            )
    if again:
        raise UserError(
            f"{path} records {_shown(again)}: the folder may be somebody else's, so no file, URL or "
            "model that it names is used; give these options again on the command line"
        )
    try:
        check(config)
    except UserError as error:
        raise UserError(
            f"{path}: {error}; correct the value in that file, or give the flag"
        ) from None
    return config


def control_config(typed: dict[str, Any]) -> "InteractConfig":
    """The options of a control: those of the run that --control names, without its teacher, who is
    not needed for training. Held-out stories are graded by the run's own teacher if that is free
    (the built-in rubric, or a name in REWARDS) or given on the command line; otherwise by the
    rubric, as the second judge. Raises UserError for a run that is not finished or is a control
    itself, and for an option that a control cannot have."""
    run, name = _run_and_control(typed["control"])
    folder = run / CONTROL_RUNS / name
    if not (run / SAMPLES).exists():  # the last file that an interaction writes
        raise UserError(
            f"--control {run}: the folder holds no finished interaction: give the folder of a run of "
            "train_interact.py; finish a stopped run with --resume first"
        )
    recorded = require_config(run)["options"]
    if recorded.get("control"):
        raise UserError(f"--control {run}: this run is a control: give the run that it repeats")
    fields = {f.name: f for f in dataclasses.fields(InteractConfig)}
    for option_name, value in typed.items():
        if option_name not in OF_CONTROL and value != recorded.get(option_name):
            raise UserError(
                f"{flag_of(fields[option_name])} does not go with --control: only the scores of the control "
                f"differ from those of {run}; leave it out"
            )
    typed = typed | {"control": [str(run), name]}
    if typed.get("resume"):
        begun = newest_first(folder)
        if "out" in typed:
            folder = Path(typed["out"])
        elif begun:
            folder = begun[0]
        if folder.parent != run / CONTROL_RUNS:
            raise UserError(f"--out {folder} is no control of {run}: leave --out out")
        resumed: InteractConfig = recorded_config(InteractConfig, folder, typed, unused=["init"])
        resumed.names_out = True
        return resumed
    if "out" in typed:
        raise UserError(
            f"--out does not go with --control: a control is in {folder}: leave --out out"
        )

    # The run's temperature is folded into its first checkpoint. The control ends after as many steps
    # as the run, whatever it writes.
    changes: dict[str, Any] = {"temperature": 1.0, "budget_words_out": MOST_WORDS}
    changes |= {"eval_graded": True, "calibrate": False, "require_judgement": 0.0}
    teachers = ("teacher_url", "reward")
    is_free = all(_may_be_recorded(fields[each], recorded.get(each)) for each in teachers)
    if not is_free and not typed.keys() & set(teachers):
        changes = {each: getattr(InteractConfig(), each) for each in OF_TEACHER} | changes
        changes |= {"eval_graded": False, "judge": "rubric"}
    if "judge" not in typed:  # a record may give no judge but the rubric
        changes |= {"judge_model": "", "judge_prompt": ""}
    unused = ("init", "judge", "judge_model", "judge_prompt")
    config: InteractConfig = recorded_config(
        InteractConfig, run, changes | typed, unused=unused, kept=()
    )
    config.out = str(folder)
    config.names_out = name != "shuffled"  # the other controls would only repeat themselves
    return config


def _run_and_control(words: list[str]) -> tuple[Path, str]:
    """The run and the name in CONTROLS that --control gives."""
    run, *names = words
    name = names[0] if names else CONTROLS[0]
    if len(names) > 1 or name not in CONTROLS:
        raise UserError(
            f"--control {shlex.join(words)[:200]}: give a run and at most one of "
            f"{', '.join(CONTROLS)}{did_you_mean(name, CONTROLS)}"
        )
    return Path(run), name


def given_again(config: RunConfig) -> list[str]:
    """The arguments that must be given again with --resume, because no record may give them."""
    arguments: list[str] = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name not in ("out", "init") and not _may_be_recorded(f, value):
            arguments += _arguments(f, value)
    return arguments


def _may_be_recorded(f: dataclasses.Field, value: Any) -> bool:
    """Whether an option may take this value from a run's config.json. Numbers and choices may be
    taken, and values of a wrong type too, because `check` refuses them."""
    if isinstance(f.default, int | float) or isinstance(f.metadata["allowed"], tuple):
        return True
    texts = value if isinstance(value, list) else [value]
    admits = RECORDED.get(f.name, lambda text: False)
    return all(not isinstance(text, str) or text == "" or admits(text) for text in texts)


def arguments(config_class: type[RunConfig], options: Mapping[str, Any]) -> list[str]:
    """The command-line arguments that give the options these values."""
    words: list[str] = []
    for f in dataclasses.fields(config_class):
        if f.name in options:
            words += _arguments(f, options[f.name])
    return words


def _arguments(f: dataclasses.Field, value: Any) -> list[str]:
    """The command-line arguments that give an option this value."""
    if isinstance(value, bool):
        return [flag_of(f) if value else flag_of(f).replace("--", "--no-")]
    words = list(map(str, value)) if isinstance(value, list) else [str(value)]
    if words[0].startswith("-"):
        words[0] = f"{flag_of(f)}={words[0]}"
        return words
    return [flag_of(f), *words]


def _shown(arguments: Sequence[str]) -> str:
    """Arguments from a record as text for the user: on one line, without control characters and
    keys."""
    words = (" ".join(printable(argument[:200]).split()) for argument in arguments)
    return redacted(shlex.join(words))


def typed_config(options: argparse.Namespace, names: Sequence[str]) -> InteractConfig:
    """The options of an interaction from a script's command line. names: the options that the
    script has; all others have their defaults. Raises UserError for a value that `check`
    refuses."""
    typed = {name: value for name, value in vars(options).items() if name in names}
    config = InteractConfig(**typed)
    check(config)
    return config


def changed_options(config: RunConfig) -> dict[str, str]:
    """Flags, by option name, of the options with a value that is neither the default nor the
    preset's."""
    defaults = vars(type(config)())
    presets = PRETRAIN_PRESETS if isinstance(config, PretrainConfig) else INTERACT_PRESETS
    preset = presets[config.preset]
    flags = {}
    for f in dataclasses.fields(config):
        usual = (defaults[f.name], preset.get(f.name))
        if getattr(config, f.name) not in usual:
            flags[f.name] = flag_of(f)
    return flags


def is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


# ---- checks --------------------------------------------------------------------------------------


def check(config: RunConfig) -> None:
    """Raises UserError unless each option is in its range and all options are compatible."""
    types = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        require_valid(f, types[f.name], value)
        variable = secret_in(json.dumps(value))
        if variable:
            raise UserError(
                f"{flag_of(f)} holds the value of {variable}, which config.json would record: "
                "leave the key out of the option"
            )
    if isinstance(config, PretrainConfig):
        _check_head_size(config)
    if isinstance(config, InteractConfig):
        _check_interaction(config)
    without_effect = _without_effect(config)
    for name, flag in changed_options(config).items():
        if name in without_effect:
            raise UserError(f"{flag} has no effect {without_effect[name]}, or leave {flag} out")


def _without_effect(config: RunConfig) -> dict[str, str]:
    """The options that have no effect beside the values of other options: why, and what to do."""
    if isinstance(config, PretrainConfig):
        if config.optimizer == "muon":
            return {}
        return {"muon_learning_rate": "with --optimizer adamw: give --optimizer muon"}

    assert isinstance(config, InteractConfig)
    idle = {}
    no_teacher = ""
    if config.reward:
        no_teacher = "with --reward, which replaces the teacher: leave --reward out"
        idle["teacher_concurrency"] = idle["teacher_url"] = no_teacher
    elif not config.teacher_url:
        no_teacher = "on the built-in teacher: give a --teacher-url"
    if no_teacher:
        idle |= dict.fromkeys(FOR_ENDPOINTS, no_teacher)
    if not is_url(config.judge):
        idle["judge_model"] = idle["judge_prompt"] = "without a URL: give --judge URL"
    if not config.calibrate:
        idle["require_judgement"] = "with --no-calibrate: leave --no-calibrate out"
    if not config.kl_coef:
        no_penalty = "with --kl-coef 0, because the controller multiplies it: give a --kl-coef"
        idle["kl_target"] = idle["kl_horizon"] = no_penalty
    return idle


def _check_head_size(config: PretrainConfig) -> None:
    size, rest = divmod(config.n_embd, config.n_head)
    if rest or size % 16 or size > 256:
        raise UserError(
            f"--n-embd {config.n_embd} / --n-head {config.n_head} is the head size, which must be a "
            "multiple of 16, at most 256: change one of the two"
        )


def _check_interaction(config: InteractConfig) -> None:
    if 0 < config.temperature < LEAST_TEMPERATURE:
        raise UserError(
            f"--temperature must be 0 or at least {LEAST_TEMPERATURE}, not {config.temperature:g}"
        )
    if config.temperature == 0 and config.reward == "likelihood":
        raise UserError(
            "--temperature 0 tries several temperatures, and --reward likelihood depends on the "
            "temperature: give a --temperature above 0"
        )
    if config.budget_cost and not config.price_in + config.price_out:
        raise UserError(
            "--budget-cost needs prices: give --price-in and --price-out, per million tokens"
        )
    if config.judge in REWARDS:
        raise UserError(
            f"--judge {config.judge} cannot judge: give a URL, FILE.py[:FUNCTION] or rubric"
        )
    if config.corpus and config.reward and config.judge != "rubric":
        raise UserError(
            "--corpus is for the built-in teacher or --teacher-url, and --reward replaces the teacher: "
            "leave --corpus out"
        )
    if config.kl_horizon <= config.stories_per_step / 5:
        raise UserError(
            f"--kl-horizon {config.kl_horizon:g} must be above a fifth of --stories-per-step "
            f"{config.stories_per_step}: otherwise one step could make the KL coefficient negative"
        )
    if not config.grades:
        return
    most = config.stories_per_step * config.steps // 2
    if not FEWEST_GRADES <= config.grades <= most or config.stories_per_step <= FEWEST_GRADES:
        raise UserError(
            f"--grades {config.grades} must be from {FEWEST_GRADES} to {most}, half of the stories of all "
            f"steps, and --stories-per-step above {FEWEST_GRADES}: --grades 0 grades all stories"
        )
