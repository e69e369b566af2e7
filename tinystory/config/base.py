"""The options that both commands have, and the checks of all options."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_type_hints

from tinystory.config.presets import PRETRAIN_PRESETS
from tinystory.run.credentials import secret_in
from tinystory.run.errors import UserError
from tinystory.run.options import flag_of, option, require_valid

OUT_HELP = "folder of the run; if this folder is taken and --out is not given: NAME-2, NAME-3, ..."
SAVE_HELP = "steps between two checkpoints for --resume"
Config = TypeVar("Config", bound="RunConfig")
SEEDS = "[0, 4294967295]"


@dataclass
class RunConfig:
    """Options of both commands."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # option values by name of the preset

    # Two facts about the command line, which a run's record must not set: the names of the options
    # that the user or the record of a resumed run gave; and, as arguments, the defaults of the
    # learner and of the teacher that apply.
    given = frozenset[str]()
    defaults = ""

    preset: str = option("demo", "named set of option values", tuple(PRETRAIN_PRESETS), group="run")
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

    def replaced(self: Config, **values: Any) -> Config:
        """A copy with other values, and with the same facts about the command line."""
        copy = dataclasses.replace(self, **values)
        copy.given = self.given
        copy.defaults = self.defaults
        return copy

    def changed_options(self) -> dict[str, str]:
        """Flags, by option name, of the options with a value that is neither the default nor the
        preset's."""
        defaults = vars(type(self)())
        preset = self.presets[self.preset]
        flags = {}
        for f in dataclasses.fields(self):
            usual = (defaults[f.name], preset.get(f.name))
            if getattr(self, f.name) not in usual:
                flags[f.name] = flag_of(f)
        return flags

    def check(self) -> None:
        """Raises UserError unless each option is in its range and all options are compatible."""
        types = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            require_valid(f, types[f.name], value)
            variable = secret_in(json.dumps(value))
            if variable:
                raise UserError(
                    f"{flag_of(f)} holds the value of {variable}, which config.json would record: "
                    "leave the key out of the option"
                )
        self.check_together()
        without_effect = self.without_effect()
        for name, flag in self.changed_options().items():
            if name in without_effect:
                raise UserError(f"{flag} has no effect {without_effect[name]}, or leave {flag} out")

    def check_together(self) -> None:
        """Raises UserError unless the options, each in its range, are compatible."""

    def without_effect(self) -> dict[str, str]:
        """The options that have no effect beside the values of other options: why, and what to do."""
        return {}
