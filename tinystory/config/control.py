"""The options of a control: a finished run, repeated without its teacher."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from tinystory.config.interaction import TEACHER_OPTIONS, InteractConfig
from tinystory.config.record import may_be_recorded, recorded_config
from tinystory.run.errors import UserError
from tinystory.run.folder import CONTROL_RUNS, newest_first, require_config
from tinystory.run.options import did_you_mean, flag_of
from tinystory.run.records import SAMPLES

MOST_WORDS = 10**15  # of a budget
CONTROLS = ("shuffled", "constant", "likelihood")  # the names that --control RUN NAME takes
# All that --control may set. Other options have the run's values.
CONTROL_OPTIONS = (
    *("control", "out", "resume", "init", "device", "openings", "corpus", "save_every"),
    *("judge", "judge_model", "judge_prompt", "eval_every", "eval_stories"),
    *TEACHER_OPTIONS,
)


def control_config(typed: dict[str, Any]) -> InteractConfig:
    """The options of a control: those of the run that --control names, without its teacher, who is
    not needed for training. Held-out stories are graded by the run's own teacher if that is free
    (the built-in rubric, or a name in REWARDS) or given on the command line; otherwise by the
    rubric, as the second judge. Raises UserError for a run that is not finished or is a control
    itself, and for an option that a control cannot have."""
    run, name = run_and_control(typed["control"])
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
    for option, value in typed.items():
        if option not in CONTROL_OPTIONS and value != recorded.get(option):
            raise UserError(
                f"{flag_of(fields[option])} does not go with --control: only the scores of the control "
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
        return resumed
    if "out" in typed:
        raise UserError(
            f"--out does not go with --control: a control is in {folder}: leave --out out"
        )

    # The run's temperature is folded into its first checkpoint. The control ends after as many steps
    # as the run, whatever it writes.
    changes: dict[str, Any] = {"temperature": 1.0, "budget_words_out": MOST_WORDS}
    changes |= {"stop_on_collapse": False, "eval_graded": True, "calibrate": False, "min_auc": 0.0}
    teachers = ("teacher_url", "reward")
    is_free = all(may_be_recorded(fields[each], recorded.get(each)) for each in teachers)
    if not is_free and not typed.keys() & set(teachers):
        changes = {each: getattr(InteractConfig(), each) for each in TEACHER_OPTIONS} | changes
        changes |= {"eval_graded": False, "judge": "rubric"}
    if "judge" not in typed:  # a record may give no judge but the rubric
        changes |= {"judge_model": "", "judge_prompt": ""}
    unused = ("init", "judge", "judge_model", "judge_prompt")
    config: InteractConfig = recorded_config(
        InteractConfig, run, changes | typed, unused=unused, kept=()
    )
    config.out = str(folder)
    # Another control in random order gets a numbered folder; the other kinds would repeat themselves.
    if name == "shuffled":
        config.given -= {"out"}
    return config


def run_and_control(words: list[str]) -> tuple[Path, str]:
    """The run and the name in CONTROLS that --control gives."""
    run, *names = words
    name = names[0] if names else CONTROLS[0]
    if len(names) > 1 or name not in CONTROLS:
        raise UserError(
            f"--control {shlex.join(words)[:200]}: give a run and at most one of "
            f"{', '.join(CONTROLS)}{did_you_mean(name, CONTROLS)}"
        )
    return Path(run), name
