"""tinystory: a small language model learns to tell stories by interacting with a teacher."""

import signal
import sys
from pathlib import Path

if sys.platform == "win32":  # no fcntl, no resource, and no compiler that takes our flags
    sys.exit("error: tinystory runs on Linux and macOS; on Windows, install and run it inside WSL (wsl --install)")

__version__ = "0.1.0"

# A command imports torch, which takes seconds; Ctrl-C then is no error to trace, so it ends the process at once.
# `errors.command` takes this back. Nothing changes for who imports tinystory from elsewhere.
_main = Path(getattr(sys.modules["__main__"], "__file__", None) or ".").resolve()
_root = Path(__file__).resolve().parents[1]
_ours = _main.name in ("train_pretrain.py", "train_interact.py") or _main.name.startswith("tinystory-")
_ours |= _main.parent in (_root / "scripts", _root / "tinystory_scripts")
if _ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
