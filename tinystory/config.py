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
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from tinystory.data import corpus, openings
from tinystory.run.credentials import redacted, secret_in
from tinystory.run.errors import UserError
from tinystory.run.folder import newest_first, require_config
from tinystory.run.options import (
    ScriptParser,
    add_options,
    flag_of,
    option,
    require_valid,
)
from tinystory.run.records import CONFIG
from tinystory.run.text import printable

OUT_HELP = "folder of the run; without --out, NAME-2, NAME-3, ... if it is taken"
SAVE_HELP = "steps between the checkpoints that --resume starts from"
# The options that --help lists; --help-all lists the others too.
FIRST = set(
    "preset init out resume seed device corpus words n_layer n_head n_embd context vocab_size "
    "batch_size learning_rate optimizer eval_every teacher_url teacher_model teacher_concurrency reward "
    "openings steps stories_per_step "
    "max_new_tokens budget_words diversity epochs learner kl_coef".split()
)
# Options that a resumed run keeps. Some act only at the start of a run. On the others rest the
# tokenizer, the held-out texts, the order of the corpus and the evaluations so far.
KEPT_ON_RESUME = (
    *("preset", "init", "seed"),
    *("n_layer", "n_head", "n_embd", "context", "vocab_size", "weights_init"),
    *("val_fraction", "packing", "batch_size", "optimizer"),
    *("openings", "temperature", "kl_coef"),
)
SEEDS = "[0, 4294967295]"
FEWEST_GRADES = 8  # minimum of --grades
LEAST_TEMPERATURE = 0.01
# TRL's names that mean another option here, or could mean two.
OTHER_NAMES = {
    "lr": "--learning-rate",
    "batch-size": "--stories-per-step (stories that are written in a step, TRL's batch_size) or "
    "--minibatch-size (stories per gradient step)",
}
# the keys of the table in tinystory/rl/learners.py, which imports this file
LEARNER_NAMES = ("ridge", "gae", "rloo", "grpo", "dr_grpo", "dpo", "sft-best")
# the named ways to ask a teacher: tinystory/teacher/prompt.py, TEMPLATES
PROMPTS = ("grades", "sense", "thread", "event", "examples")
REWARDS = ("random", "constant", "likelihood")  # of --reward, beside functions in files
# A run's folder may be somebody else's: no text from it is opened, executed or sent to. So an
# option without choices takes from config.json only what its entry here admits. Whatever names a
# file, a URL, a function or a model is given on the command line, again for a resume.
RECORDED: dict[str, Callable[[str], object]] = {
    "device": re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?").fullmatch,
    "corpus": corpus.NAMES.__contains__,
    "reward": REWARDS.__contains__,
    "openings": lambda text: not openings.names_file(text),
    "teacher_prompt": PROMPTS.__contains__,
    "judge": ("rubric",).__contains__,
    "judge_prompt": PROMPTS.__contains__,
}

# TinyStories within an hour on two CPU cores: docs/english.md. The unlikely tokens of so small a
# student are noise, so a temperature is chosen.
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
# Source of `paper`: arXiv 2509.15714 and its public code; where they set nothing, the defaults of
# their libraries (gradient clipping in pretraining: transformers' Trainer; float32 in the
# interaction: TRL). Where a default is the paper's figure it is not repeated.
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


@dataclass
class RunConfig:
    """What both commands take."""

    names_out = False  # whether --out was given; no run's record may set it

    preset: str = option("demo", "named set of options", tuple(PRESETS), group="run")
    out: str = option("runs/pretrain", OUT_HELP)
    resume: bool = option(
        False,
        "continue the run in --out (without it, the newest that was begun without it) from its "
        "newest checkpoint, with its recorded options",
    )
    seed: int = option(0, "seed of all random numbers", SEEDS)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = option(
        "auto",
        "precision of the matmuls; weights and optimiser states are float32",
        ("auto", "float32", "bfloat16"),
    )
    save_every: int = option(200, SAVE_HELP, "[1, 1e9]")


@dataclass
class PretrainConfig(RunConfig):
    """Pretrain a student on a corpus."""

    n_layer: int = option(3, "transformer blocks", "[1, 1000]", group="model")
    n_head: int = option(0, "attention heads; 0: heads of size 64", "[0, 1000]")
    n_embd: int = option(192, "width of the residual stream", "[16, 100000]")
    context: int = option(256, "context length, in tokens", "[2, 1e6]")
    vocab_size: int = option(
        2048, "vocabulary size, trained on the corpus; five tokens are special", "[261, 1e6]"
    )
    weights_init: str = option(
        "unit", "scale of the initial weights: by width, or as GPT-2's", ("unit", "gpt2")
    )
    dropout: float = option(0.0, "dropout rate of embeddings, attention and residuals", "[0, 1)")

    corpus: list[str] = option(
        ["builtin", "dull"],
        "builtin, dull, tinystories, tinystories-valid, babylm-10m, babylm-100m, or .txt "
        "and .jsonl files, gzipped or not",
        group="data",
    )
    words: int = option(1_100_000, "total words to train on, counting repeats", "[1, 1e15]")
    val_fraction: float = option(
        0.05, "fraction of the documents held out for validation", "(0, 1)"
    )
    packing: str = option(
        "whole", "whole documents per sequence where they fit, or one stream", ("whole", "stream")
    )

    batch_size: int = option(4, "sequences per step", "[1, 1e9]", group="optimiser")
    micro_batch_size: int = option(
        16, "sequences per forward pass; gradients accumulate over a step", "[1, 1e9]"
    )
    optimizer: str = option(
        "muon", "Muon for the blocks' matrices, or AdamW for all weights", ("muon", "adamw")
    )
    muon_learning_rate: float = option(0.02, "peak learning rate of Muon", "(0, 100]")
    learning_rate: float = option(
        0.0, "peak learning rate of AdamW; 0: 0.024 beside Muon, 0.0024 alone", "[0, 100]"
    )
    warmup: float = option(
        0.1, "fraction of the words over which the learning rate rises linearly", "[0, 1)"
    )
    beta2: float = option(0.99, "beta2 of AdamW", "[0, 1)")
    weight_decay: float = option(0.0, "AdamW weight decay, on matrices only", "[0, 100]")
    grad_clip: float = option(1.0, "maximum gradient norm; 0 means no clipping", "[0, 1e9]")

    eval_every: int = option(200, "steps between validations", "[1, 1e9]", group="evaluation")
    eval_sequences: int = option(
        32, "sequences per validation, evenly spread; the last one uses all", "[1, 1e9]"
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
    init: str = option("", "checkpoint, or hub:NAME@REVISION (default: of the newest pretraining)")
    steps: int = option(4, "maximum number of PPO steps", "[1, 1e9]")
    save_every: int = option(1, SAVE_HELP, "[1, 1e9]")
    stop_on_collapse: bool = option(
        False, "end the run, with everything saved, when the stories collapse"
    )

    teacher_url: list[str] = option(
        [],
        "OpenAI-compatible endpoints, such as http://127.0.0.1:11434/v1 (default: built in)",
        group="teacher",
    )
    teacher_model: list[str] = option(
        [], "model name, or one per --teacher-url (default: the server's first one)"
    )
    corpus: list[str] = option(
        [],
        "corpora or files that the built-in teacher is fitted to, and from which a --teacher-url is "
        "shown known texts (default: the student's corpus, unless it was a file)",
    )
    teacher_concurrency: int = option(
        16, "maximum number of requests in flight per server", "[1, 10000]"
    )
    teacher_temperature: float = option(0.2, "sampling temperature of the teacher", "[0, 2]")
    teacher_extra: str = option(
        "", "JSON object whose fields are merged into each request, such as a service_tier"
    )
    teacher_max_tokens: int = option(
        16, "maximum tokens of a reply; three numbers need 6", "[1, 100000]"
    )
    teacher_timeout: float = option(
        300.0, "time limit in seconds per reply, or per call of --reward", "(0, 86400]"
    )
    teacher_prompt: str = option(
        "",
        "how the teacher is asked: grades (default); sense, thread, event or examples, which are "
        "questions of yes or no; or a JSON file with other criteria or questions (docs/teachers.md). "
        "scripts/doctor.py --calibrate measures which way judges best",
    )
    price_in: float = option(0.0, "price per million prompt tokens, in any currency", "[0, 1e9]")
    price_out: float = option(0.0, "price per million reply tokens", "[0, 1e9]")
    budget_cost: float = option(
        0.0, "maximum cost of the teacher at these prices; 0 means no limit", "[0, 1e12]"
    )
    reward: str = option(
        "",
        "FILE.py[:FUNCTION], a teacher: score(opening, stories) -> [0..1 or None]; or a control: "
        "random, constant, likelihood (of the starting checkpoint)",
    )
    calibrate: bool = option(
        True, "before the run, measure whether --teacher-url scores stories above shuffled words"
    )
    require_judgement: float = option(
        0.0, "minimum P(story scores above shuffled words); chance is 0.5", "[0, 1)"
    )
    max_unscored: float = option(
        0.1, "maximum fraction of a step's graded stories without a score", "[0, 1)"
    )
    grades: int = option(
        0,
        "stories of the whole run that the teacher grades, those that tell a model most about the "
        "others, whose scores it predicts; 0: all",
        "[0, 1e9]",
    )

    openings: str = option(
        "builtin",
        "builtin, a file of one opening per line, or the text of one",
        group="story",
        flags=("--opening",),
    )
    stories_per_opening: int = option(1, "stories that share an opening within a step", "[1, 1e9]")
    stories_per_step: int = option(384, "stories per step", "[1, 1e6]")
    max_new_tokens: int = option(200, "maximum tokens of a story", "[1, 1e6]")
    temperature: float = option(
        0.85,
        "temperature at which the student begins; 0: the one of a few whose stories have the best "
        "mean reward",
        "[0, 100]",
    )
    budget_words: int = option(
        1_000_000, "budget of words taken in: each opening once, and all replies", "[1, 1e15]"
    )
    budget_words_out: int = option(
        100_000_000, "budget of words written by the student", "[1, 1e15]"
    )
    length_weight: float = option(
        0.4, "weight of the length term relative to the teacher's score", "[0, 100]"
    )
    length_words: int = option(90, "words at which the length term reaches its maximum", "[1, 1e9]")
    diversity: float = option(
        0.5, "fraction of the score multiplied by the difference from other stories", "[0, 1]"
    )
    unfinished: float = option(
        0.5, "fraction of the reward that an unfinished story keeps", "[0, 1]"
    )

    learning_rate: float = option(
        1.2e-3, "initial learning rate of Adam", "(0, 100]", group="optimiser"
    )
    lr_decay: bool = option(
        True, "linear decay of the learning rates to 0 over all updates of --steps"
    )
    sharpness_rate: float = option(
        0.03, "initial learning rate of a global logit scale; 0 disables it", "[0, 10]"
    )
    minibatch_size: int = option(96, "stories per gradient step; 0 means all", "[0, 1e9]")
    micro_batch_size: int = option(
        32, "stories per forward pass; gradients accumulate over a minibatch", "[1, 1e9]"
    )
    grad_clip: float = option(0.0, "maximum gradient norm; 0 means no clipping", "[0, 1e9]")

    epochs: int = option(1, "PPO passes over a step's stories", "[1, 1000]", group="PPO")
    learner: str = option(
        "ridge",
        "PPO with values by ridge regression or a head (gae); rloo, grpo, dr_grpo; dpo on the best "
        "and the worst story to an opening (at --learning-rate 4e-4 --kl-coef 0.1); or "
        "cross-entropy on a step's best quarter (sft-best)",
        LEARNER_NAMES,
    )
    gamma: float = option(1.0, "discount factor", "[0, 1]")
    lam: float = option(
        0.95, "GAE lambda; 1 suits --learner gae, and steps of only a few stories", "[0, 1]"
    )
    clip_ratio: float = option(0.2, "clipping range of the policy ratio", "(0, 10]")
    value_coef: float = option(0.1, "weight of the value loss, for --learner gae", "(0, 1000]")
    kl_in: str = option("reward", "place of the KL penalty (in the loss: k3)", ("reward", "loss"))
    length_normalised: bool = option(
        False, "--learner dpo: a story's mean log-ratio per token in place of the sum"
    )
    kl_coef: float = option(
        0.01,
        "initial coefficient of the KL penalty against the starting checkpoint; DPO's beta",
        "[0, 1000]",
    )
    kl_target: float = option(6.0, "target KL per story, in nats (adaptive controller)", "(0, 1e6]")
    kl_horizon: float = option(
        2_000.0, "horizon of the adaptive controller, in stories", "(0, 1e12]"
    )
    eval_every: int = option(
        1, "steps between evaluations; 0: at start and end only", "[0, 1e9]", group="evaluation"
    )
    eval_stories: int = option(
        40,
        "stories per evaluation; `best`: the latest within a standard error of the highest",
        "[1, 1e6]",
    )
    eval_graded: bool = option(
        True, "have the teacher grade evaluations; without their grades, `best` is the last student"
    )
    judge: str = option(
        "",
        "URL, FILE.py[:FUNCTION] or `rubric`, the built-in teacher: a second judge that scores the "
        "stories of each evaluation. Its scores are reported, and never reach the reward",
    )
    judge_model: str = option("", "model name of a --judge URL (default: the server's first one)")
    judge_prompt: str = option("", "how a --judge URL is asked, as --teacher-prompt")


def parse(
    config_class: type[RunConfig], presets: dict[str, dict[str, Any]], argv: list[str] | None = None
) -> Any:
    """Parse a command line into a `config_class`, whose `preset` is the preset's name. With
    --resume, options not given come from the run's config.json. Raises UserError for an unknown
    option or a value out of range."""
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
    if typed.get("resume"):  # a run continues with its own options, overridden by flags
        if not names_out:
            runs = newest_first(Path(config_class.out))
            typed["out"] = str(runs[0]) if runs else config_class.out
        # --init is needed only before the first checkpoint
        config = recorded_config(config_class, Path(typed["out"]), typed, unused=["init"])
    else:
        preset = presets.get(typed.get("preset", "demo"), {})
        config = config_class(**preset | typed)
        check(config)
    config.names_out = names_out
    return config


def recorded_config(
    config_class: type[RunConfig], run: Path, typed: dict[str, Any], unused: Container[str] = ()
) -> Any:
    """The config in a run's config.json, overridden by `typed`, options from the command line.
    Raises UserError if another command or version began it, for another value of an option in
    KEPT_ON_RESUME, for what `check` refuses, and for an option that only the command line may give,
    unless the caller leaves it `unused`."""
    recorded = require_config(run)["options"]
    path = run / CONFIG
    options: dict[str, Any] = {}
    again: list[str] = []
    for f in dataclasses.fields(config_class):
        if f.name not in recorded:
            raise UserError(
                f"{path} has no {f.name}: the run was begun by another command or another "
                "version; go on with that one, or start a new run in another --out"
            )
        if _may_be_recorded(f, recorded[f.name]):
            options[f.name] = recorded[f.name]
        elif f.name not in (*typed, "out") and f.name not in unused:
            again += _arguments(f, recorded[f.name])
    if "tried_temperatures" in recorded and typed.get("temperature") == 0:
        typed = typed | {"temperature": recorded["temperature"]}  # the one that was chosen
    config = config_class(**options | typed | {"out": str(run)})
    for f in dataclasses.fields(config_class):
        is_kept = f.name in KEPT_ON_RESUME and f.name in typed
        if is_kept and getattr(config, f.name) != recorded[f.name]:
            raise UserError(
                f"{flag_of(f)} {typed[f.name]} does not go with --resume: {run} was begun with "
                f"{recorded[f.name]!r:.200}; leave it out, or start a new run in another --out"
            )
    if again:
        raise UserError(
            f"{path} was begun with {_shown(again)}: it may be somebody else's, so no file, "
            "address or model that it names is used; give them again on the command line"
        )
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{path}: {error}; correct it there, or by a flag") from None
    return config


def given_again(config: RunConfig) -> list[str]:
    """The arguments that --resume needs again, since no record may give them."""
    arguments: list[str] = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name not in ("out", "init") and not _may_be_recorded(f, value):
            arguments += _arguments(f, value)
    return arguments


def _may_be_recorded(f: dataclasses.Field, value: Any) -> bool:
    """Whether an option may take this value from a run's config.json. A number or a choice may, and
    a value of a wrong type: `check` refuses what is none."""
    if isinstance(f.default, int | float) or isinstance(f.metadata["allowed"], tuple):
        return True
    texts = value if isinstance(value, list) else [value]
    admits = RECORDED.get(f.name, lambda text: False)
    return all(not isinstance(text, str) or text == "" or admits(text) for text in texts)


def _arguments(f: dataclasses.Field, value: Any) -> list[str]:
    """The words that give an option this value on a command line."""
    words = list(map(str, value)) if isinstance(value, list) else [str(value)]
    if words[0].startswith("-"):
        words[0] = f"{flag_of(f)}={words[0]}"
        return words
    return [flag_of(f), *words]


def _shown(arguments: Sequence[str]) -> str:
    """Arguments from a record, to be read: on one line, without control characters and keys."""
    words = (" ".join(printable(argument[:200]).split()) for argument in arguments)
    return redacted(shlex.join(words))


def typed_config(options: argparse.Namespace, names: Sequence[str]) -> InteractConfig:
    """The options of an interaction that a script takes by these names, with the defaults where
    they were left out. Raises UserError for what `check` refuses."""
    typed = {name: value for name, value in vars(options).items() if name in names}
    config = InteractConfig(**typed)
    check(config)
    return config


def changed_options(config: InteractConfig) -> dict[str, str]:
    """Flags, by option name, of the options whose value is neither the default nor the preset's."""
    defaults = vars(InteractConfig())
    preset = INTERACT_PRESETS[config.preset]
    flags = {}
    for f in dataclasses.fields(InteractConfig):
        usual = (defaults[f.name], preset.get(f.name))
        if getattr(config, f.name) not in usual:
            flags[f.name] = flag_of(f)
    return flags


# ---- checks --------------------------------------------------------------------------------------


def check(config: RunConfig) -> None:
    """Raises UserError unless each option is in its range and all go together."""
    types = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        require_valid(f, types[f.name], value)
        variable = secret_in(json.dumps(value))
        if variable:
            raise UserError(
                f"{flag_of(f)} holds the value of {variable}, and config.json would record it: "
                "leave it out"
            )
    if isinstance(config, PretrainConfig):
        _check_head_size(config)
    if isinstance(config, InteractConfig):
        _check_interaction(config)


def _check_head_size(config: PretrainConfig) -> None:
    size, rest = divmod(config.n_embd, config.n_head)
    if rest or size % 16 or size > 256:
        raise UserError(
            f"--n-embd {config.n_embd} must be a multiple of --n-head {config.n_head} times 16, "
            "and at most 256 times it: the size of a head is a multiple of 16 up to 256"
        )


def _check_interaction(config: InteractConfig) -> None:
    if 0 < config.temperature < LEAST_TEMPERATURE:
        raise UserError(f"--temperature must be 0 or at least {LEAST_TEMPERATURE}")
    if config.temperature == 0 and config.reward == "likelihood":
        raise UserError("--reward likelihood depends on --temperature: give one above 0")
    if config.budget_cost and not config.price_in + config.price_out:
        raise UserError(
            "--budget-cost needs the prices: give --price-in and --price-out, per million tokens"
        )
    if config.judge in REWARDS:
        raise UserError(
            f"--judge {config.judge} cannot judge: give a URL, FILE.py[:FUNCTION] or rubric"
        )
    if config.corpus and config.reward and config.judge != "rubric":
        raise UserError(
            "--corpus is for the built-in teacher or a --teacher-url, and --reward takes their place: "
            "leave it out"
        )
    if config.teacher_prompt and not config.teacher_url and not config.reward:
        raise UserError(
            "--teacher-prompt is for an LLM, and the built-in teacher has criteria of its own: give "
            "a --teacher-url, or leave it out"
        )
    if config.reward:
        for name, flag in changed_options(config).items():
            is_for_teacher = name.startswith(("teacher_", "price_", "budget_cost"))
            if is_for_teacher and name != "teacher_timeout":
                raise UserError(
                    f"{flag} is for a teacher, and --reward takes its place: leave one of them out"
                )
    if config.kl_horizon <= config.stories_per_step / 5:
        raise UserError(
            f"--kl-horizon {config.kl_horizon:g} must be above a fifth of --stories-per-step "
            f"{config.stories_per_step}, or one step could make the KL coefficient negative"
        )
    if not config.grades:
        return
    most = config.stories_per_step * config.steps // 2
    if not FEWEST_GRADES <= config.grades <= most or config.stories_per_step <= FEWEST_GRADES:
        raise UserError(
            f"--grades must be at least {FEWEST_GRADES}, at most half of the stories of all steps, "
            f"and --stories-per-step above {FEWEST_GRADES}; leave it out to have all graded"
        )
