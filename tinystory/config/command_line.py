"""The options of a command line."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tinystory.config.base import RunConfig
from tinystory.config.control import control_config
from tinystory.config.interaction import InteractConfig
from tinystory.config.presets import LEARNER_DEFAULTS
from tinystory.config.record import resumed_config
from tinystory.run.errors import UserError
from tinystory.run.options import ScriptParser, add_options, arguments

# The options that --help lists; --help-all lists the others too.
FIRST = set(
    "preset init out resume seed device corpus words n_layer n_head n_embd context vocab_size "
    "batch_size learning_rate optimizer eval_every teacher_url teacher_model teacher_concurrency reward "
    "openings steps stories_per_step control "
    "max_new_tokens budget_words diversity learner kl_coef "
    "teacher_prompt grades eval_graded temperature stories_per_opening judge".split()
)
# Flags of both commands, by names that nanoGPT and TRL have for them, and by earlier names.
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
    "require-judgement": ["--min-auc"],
    "sharpness-rate": ["--logit-scale-lr"],
}

# Values of options under the names that other trainers give them.
OTHER_VALUES = {("learner", "ppo"): "PPO is --learner gae, or the default, ridge"}


def parse(
    config_class: type[RunConfig],
    argv: Sequence[str] | None = None,
    teacher_defaults: Callable[[Any], dict[str, Any]] = lambda config: {},
) -> Any:
    """The options of a command line, as a `config_class`. With --resume, options that are not given
    come from the run's config.json. teacher_defaults: returns the defaults of the teacher that the
    options name. Raises UserError for an unknown option or a value out of range."""
    words = sys.argv[1:] if argv is None else list(argv)
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
    for (name, value), advice in OTHER_VALUES.items():
        if typed.get(name) == value:
            raise UserError(advice)
    if "control" in typed:
        return control_config(typed)
    if typed.get("resume"):
        return resumed_config(config_class, typed)

    given = {**config_class.presets.get(typed.get("preset", "demo"), {}), **typed}
    config = config_class(**given)
    config.check()
    usual = LEARNER_DEFAULTS.get(given.get("learner", ""), {}) | teacher_defaults(config)
    defaults = {name: value for name, value in usual.items() if name not in given}
    config = config_class(**defaults | given)
    config.check()
    config.given = frozenset(typed)
    config.defaults = " ".join(arguments(config_class, defaults))
    return config


def typed_config(options: argparse.Namespace, names: Sequence[str]) -> InteractConfig:
    """The options of an interaction from a script's command line. names: the options that the
    script has; all others have their defaults. Raises UserError for a value that `check`
    refuses."""
    typed = {name: value for name, value in vars(options).items() if name in names}
    config = InteractConfig(**typed)
    config.check()
    return config
