"""tinystory: a small language model learns to tell stories by interacting with a teacher."""

import sys

if sys.platform == "win32":  # no fcntl, no resource, and no compiler that takes our flags
    sys.exit("error: tinystory runs on Linux and macOS; on Windows, install and run it inside WSL (wsl --install)")

__version__ = "0.1.0"
