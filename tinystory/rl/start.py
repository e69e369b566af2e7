"""Start of an interaction: the student, the frozen reference, the openings, and the numbers of
words at which checkpoints are kept."""

import contextlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from tinystory.config import InteractConfig, PretrainConfig
from tinystory.config.presets import PRETRAIN_PRESETS, TEACHER_DEFAULTS
from tinystory.data import babylm
from tinystory.data.corpus import BUILTIN
from tinystory.data.openings import Openings, load_openings
from tinystory.data.tokenizer import Tokenizer
from tinystory.ops.compute import Compute
from tinystory.rl.learners import LEARNERS
from tinystory.rl.policy import Policy, RunState, SharpAdam
from tinystory.run import distributed
from tinystory.run.errors import UserError
from tinystory.run.folder import newest_first, read_config
from tinystory.run.paths import hint
from tinystory.run.records import Record
from tinystory.student import checkpoint
from tinystory.student.generate import encode_opening, require_room
from tinystory.student.model import Student

PRETRAIN_RUNS = (Path("runs/pretrain"), Path("runs/demo/pretrain"))
# Words in during interaction at which a checkpoint is kept, by name.
INTERACTION_CHECKPOINTS = {f"chck_{n}00K": n * 100_000 for n in range(1, 10)}
INTERACTION_CHECKPOINTS["chck_1M"] = 1_000_000


def starting_checkpoint(config: InteractConfig) -> Path:
    """The checkpoint that --init names; by default the checkpoint of the newest run in
    PRETRAIN_RUNS and in their numbered successors (runs/pretrain-2). With --control, the first
    checkpoint of the run. Raises UserError if there is none, or if --resume must start from the
    first checkpoint again and --init is missing."""
    if config.control:
        return checkpoint.find(Path(config.control[0]) / "checkpoints" / "start")
    if config.init:
        return checkpoint.find(Path(config.init))
    if config.resume:
        began = read_config(Path(config.out))["options"]["init"]
        raise UserError(
            f"cannot resume {config.out}: the folder has no checkpoint; the run started from "
            f"{began!r:.200}: give this checkpoint again as --init"
        )
    for run in newest_first(*PRETRAIN_RUNS):
        if checkpoint.newest(run):
            return checkpoint.find(run)
    first = hint("train_pretrain.py")
    raise UserError(
        f"no checkpoint under {PRETRAIN_RUNS[0]}: run {first} first, or give --init CHECKPOINT"
    )


def teacher_defaults(config: InteractConfig) -> dict[str, Any]:
    """TEACHER_DEFAULTS, if the options name a --teacher-url and no --teacher-prompt, and the student
    has learned the demo's corpora; else {}."""
    if not config.teacher_url or config.teacher_prompt or config.preset != "demo":
        return {}
    history = checkpoint.read_history(starting_checkpoint(config))
    return TEACHER_DEFAULTS if set(history.get("corpus", [])) == set(BUILTIN) else {}


def starting_point(config: InteractConfig) -> tuple[Path, Path | None]:
    """The checkpoint from which the run started, and the checkpoint from which it is resumed. The
    latter is None for a new run, and for a run that was stopped before the first checkpoint."""
    folder = Path(config.out)
    newest = None
    if config.resume:
        newest = distributed.rank0_value(lambda: checkpoint.newest_whole(folder))
    if newest:
        return folder / "checkpoints" / "start", newest
    return starting_checkpoint(config), None


def starting_temperature(config: InteractConfig, newest: Path | None) -> float:
    """The temperature at which the run starts; 0: it is chosen by a trial. A run that was stopped
    after its trial and before the first checkpoint repeats the trial, whose words only a checkpoint
    holds. newest: see `starting_point`."""
    if config.resume and not newest:
        recorded = read_config(Path(config.out))["options"]
        if "tried_temperatures" in recorded:
            return 0.0
    return config.temperature


def load_students(
    config: InteractConfig, compute: Compute, start: Path, newest: Path | None = None
) -> tuple[Student, Policy, RunState]:
    """The frozen reference for the KL penalty, the policy, and the state of the run. In a new run,
    reference and policy have the same weights. start, newest: see `starting_point`."""
    reference, _, _ = checkpoint.load(start, compute.device)
    reference.requires_grad_(False)
    policy = new_policy(config, *checkpoint.load(start, compute.device), compute)
    if newest:
        state = policy.restore(newest)
    else:
        state = RunState(config.kl_coef)
        if config.temperature:
            begin_at(config.temperature, reference, policy)
        print_rest_of_pretraining(start, policy.history)
        print_other_preset(config, policy.history)
    distributed.broadcast_from_rank0([*policy.student.parameters(), *policy.critic.parameters()])
    return reference, policy, state


def new_policy(
    config: InteractConfig,
    student: Student,
    tokenizer: Tokenizer,
    history: dict[str, Any],
    compute: Compute,
) -> Policy:
    """A policy with this student, a new critic and a new optimizer. history: the student's training
    history, for model.json."""
    learner = LEARNERS[config.learner]
    critic = learner.critic(student.config.n_embd) if learner.critic else nn.Module()
    critic = critic.to(compute.device)
    config = config.replaced(learning_rate=learning_rate_for(config, student.config.n_embd))
    return Policy(
        student=student,
        learner=learner,
        critic=critic,
        optimizer=SharpAdam(student, critic, config),
        config=config,
        autocast=compute.autocast,
        tokenizer=tokenizer,
        history=history,
    )


def learning_rate_for(config: InteractConfig, width: int) -> float:
    """The learning rate for a student of this width. A rate that the user or a run's record gave is
    returned as it is. A preset's or a learner's rate holds for the width of the preset's student,
    and falls in proportion for a wider one: a step of Adam changes each weight by the learning
    rate, so the change of a logit grows with the width (Yang et al. 2022, arXiv 2203.03466)."""
    preset_width = PRETRAIN_PRESETS[config.preset].get("n_embd", PretrainConfig.n_embd)
    if width <= preset_width or "learning_rate" in config.given:
        return config.learning_rate
    rate = config.learning_rate * preset_width / width
    print(
        f"learning rate {rate:.2g}: the usual {config.learning_rate:.2g} is for a width of "
        f"{preset_width}, and this student has {width} (--learning-rate overrides this)"
    )
    return rate


def begin_at(temperature: float, reference: Student, policy: Policy) -> None:
    """Fold a temperature into reference and policy. From then on, both sample at temperature 1."""
    reference.divide_logits(temperature)
    policy.student.divide_logits(temperature)


def recorded_options(
    config: InteractConfig, compute: Compute, policy: Policy, start: Path, newest: Path | None
) -> dict[str, Any]:
    """Options for config.json: those of the command line, the device, and facts about the student,
    which the report shows in the title. start, newest: see `starting_point`."""
    options = asdict(config) | compute.recorded
    options["init"] = config.init or str(start)
    if newest:
        del options["init"]  # config.json already has the option
    options["student"] = {
        "corpus": policy.history.get("corpus"),
        "words": policy.history.get("words"),
        "parameters": sum(parameter.numel() for parameter in policy.student.parameters()),
    }
    return options


def print_rest_of_pretraining(start: Path, history: dict[str, Any]) -> None:
    """Print a note if `start` is the newest checkpoint of a pretraining run that was stopped before
    the last word."""
    folder = Path(os.path.abspath(start))
    run = folder.parent.parent
    if checkpoint.newest(run) != folder:
        return
    record: Record = {}
    with contextlib.suppress(UserError):  # the checkpoint is enough for an interaction
        record = read_config(run)
    planned = record.get("options", {}).get("words")
    words = history.get("words")
    if type(planned) is not int or words is None or not 0 <= words < planned:
        return
    go_on = hint("train_pretrain.py", "--out", os.path.relpath(run), "--resume")
    percent = int(100 * words / planned)
    print(
        f"this student has read {percent} % of the words of its pretraining; to continue the "
        f"pretraining: {go_on}"
    )


def print_other_preset(config: InteractConfig, history: dict[str, Any]) -> None:
    """Print a note if the student was pretrained with another preset than this run's."""
    preset = history.get("preset", config.preset)
    if preset != config.preset:
        print(
            f"this student was pretrained with --preset {preset}, and the learning rates of --preset "
            f"{config.preset} may be too high or too low for it: give --preset {preset} here too"
        )


def open_openings(config: InteractConfig, policy: Policy) -> Openings:
    """The openings of a run. Raises UserError if an opening and a story of --max-new-tokens do not
    fit into the student's context."""
    openings = Openings(load_openings(config.openings), config.seed, config.stories_per_opening)
    if openings.train == openings.held_out:
        print(
            "there is only one opening, so no opening is held out: evaluations use the opening that "
            "is also used for training"
        )
    longest = 0
    for opening in openings.train + openings.held_out:
        longest = max(longest, len(encode_opening(policy.tokenizer, opening)))
    require_room(policy.student, longest, config.max_new_tokens)
    return openings


def words_of_milestones(config: InteractConfig, history: dict[str, Any]) -> dict[str, int]:
    """Numbers of words in at which checkpoints are kept, by name. Raises UserError if the rules of
    BabyLM forbid the run."""
    if config.preset not in babylm.TRACKS:
        return INTERACTION_CHECKPOINTS
    babylm.check_interaction(config.preset, history, config.budget_words)
    return babylm.milestones_beyond(history)
