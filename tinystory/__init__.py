"""tinystory: a small language model learns to tell stories by interacting with a teacher."""

import gc
import os
import signal
import sys
from pathlib import Path
from types import FrameType

# Read by GNU OpenMP when torch is imported, so this package comes first. By default its threads
# spin for milliseconds while they wait for one another: beside other programs they keep the core
# from the thread that they wait for.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def end_by(signum: int, frame: FrameType | None = None) -> None:
    """End the process by a signal, so that a shell's loop, `&&` and make end too. Handles Ctrl-C
    while a command still imports its modules, which takes seconds: an exception could be swallowed
    in an import, or end in a traceback."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def is_command() -> bool:
    """Whether the running program is one of this project's."""
    program = Path(getattr(sys.modules["__main__"], "__file__", None) or os.devnull).resolve()
    root = Path(__file__).resolve().parents[1]
    if program.parent == root:
        return program.name in ("train_pretrain.py", "train_interact.py")
    in_clone = program.parent in (root / "scripts", root / "lab")
    return in_clone or program.name.startswith("tinystory-")  # or an installed entry point


# Other programs that import this package keep their collector and their handler of Ctrl-C.
# `run.errors.command` restores both.
if is_command():
    gc.disable()  # imports take half as long without it, and they leave hardly any garbage
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_by)

__version__ = "0.1.0"
