"""The built-in teacher in a server process on 127.0.0.1, for as long as a run lasts."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

from tinystory.run.errors import UserError
from tinystory.run.paths import ROOT

FOLDER = next(
    (f for f in ("scripts", "tinystory_scripts") if (ROOT / f / "serve_teacher.py").exists()),
    "scripts",
)
SCRIPT = ROOT / FOLDER / "serve_teacher.py"  # in a clone or an installed wheel
READY = "listening on "


@contextlib.contextmanager
def builtin_teacher(corpus: Sequence[str]) -> Iterator[str]:
    """Yield the URL of a rubric fitted to `corpus`; the process ends with the block, or with
    ours."""
    command = [sys.executable, str(SCRIPT), "--port", "0", "--die-with-parent", "--corpus", *corpus]
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    # A session of its own: Ctrl-C is for the trainer, which still needs its scores to end the step.
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
                    f"the built-in teacher did not start (exit code {code}); its message is above"
                )
            yield line.removeprefix(READY)
        finally:
            process.kill()
