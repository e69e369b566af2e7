"""Runs the built-in teacher in a server process on 127.0.0.1, as long as a run lasts."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

from tinystory.run.errors import UserError
from tinystory.run.paths import ROOT

SCRIPT = ROOT / "scripts" / "serve_teacher.py"
if not SCRIPT.exists():  # an installed wheel, not a clone
    SCRIPT = ROOT / "tinystory_scripts" / "serve_teacher.py"
READY = "listening on "


@contextlib.contextmanager
def builtin_teacher(corpus: Sequence[str]) -> Iterator[str]:
    """Yields the URL of a rubric fitted to `corpus`. The server process ends with the block, or
    with this process."""
    names = [f"./{name}" if name.startswith("-") else name for name in corpus]  # not an option
    command = [sys.executable, str(SCRIPT), "--port", "0", "--die-with-parent", "--corpus", *names]
    environment = dict(os.environ)
    environment.pop("OPENAI_API_KEY", None)
    # In a separate session, so that Ctrl-C reaches only the trainer, which still needs scores to
    # end the step.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline().strip()
            if not line.startswith(READY):
                code = process.wait(10)
                raise UserError(
                    f"the built-in teacher did not start (exit code {code}): see the server's message above"
                )
            yield line.removeprefix(READY)
        finally:
            process.kill()
