"""Every option of both train commands: the dataclasses define the command line and the record in
config.json. Flags override the preset, which overrides the defaults: `python train_pretrain.py
--preset paper --n-layer 6`.

base, pretraining, interaction: the options and their checks. presets: named sets of values, and the
defaults of learners and teachers. command_line: the options of a command line. record: those of a
run's config.json. control: those of a run's control."""

from tinystory.config.base import RunConfig
from tinystory.config.interaction import InteractConfig
from tinystory.config.pretraining import PretrainConfig

__all__ = ["InteractConfig", "PretrainConfig", "RunConfig"]
