"""What happens when `tinystory` is imported: settings of OpenMP's threads; and for this project's
commands, faster imports, a quiet end by Ctrl-C, and a sentence if a package is missing.

Other programs that import `tinystory` keep their collector and their handler of Ctrl-C."""

import gc
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

# packages without which no command runs
NEEDED = "torch numpy tokenizers tiktoken safetensors openai httpx2 aiohttp filelock tqdm".split()


def end_by(signum: int, frame: FrameType | None = None) -> None:
    """End the process by a signal, so that a shell's loop, `&&` and make end too. Handles Ctrl-C
    while a command still imports its modules, which takes seconds: an exception could be swallowed
    in an import, or end in a traceback."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def set_up() -> None:
    # Read by GNU OpenMP when torch is imported, so this comes first. By default its threads spin
    # for milliseconds while they wait for one another: beside other programs they keep the core
    # from the thread that they wait for.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if not is_command():
        return
    # `run.errors.command` restores both
    gc.disable()  # imports take half as long without it, and they leave hardly any garbage
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_by)
    _require_packages()


def is_command() -> bool:
    """Whether the running program is one of this project's."""
    program = Path(getattr(sys.modules["__main__"], "__file__", None) or os.devnull).resolve()
    root = Path(__file__).resolve().parents[2]
    if program.parent == root:
        return program.name in ("train_pretrain.py", "train_interact.py")
    in_clone = program.parent in (root / "scripts", root / "lab")
    return in_clone or program.name.startswith("tinystory-")  # or an installed entry point


def _require_packages() -> None:
    """Ends the process with exit code 2 if a package is missing, as in a Python outside .venv."""
    missing = [name for name in NEEDED if not find_spec(name)]
    if missing:
        print(
            f"error: {sys.executable} has no package {missing[0]}: run `make demo` or `pip install .`, "
            "and activate that environment (. .venv/bin/activate)",
            file=sys.stderr,
        )
        sys.exit(2)
