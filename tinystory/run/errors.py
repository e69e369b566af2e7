"""UserError for problems that the user can fix, signals that end a run, and `command`, the
decorator of each main().

Commands print an error as one sentence and exit with code 2. When the reader of their output has
gone (`| head -1`), a training run saves and ends, as when its terminal closes; other commands run
to their end, quietly."""

import contextlib
import errno
import functools
import gc
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TypeVar

if sys.platform == "win32":  # no fcntl, no resource, and no compiler that takes our flags
    sys.exit(
        "error: tinystory runs on Linux and macOS; on Windows, install and run it inside WSL (wsl "
        "--install)"
    )

from tinystory import end_at_once
from tinystory.run.text import printable

P = ParamSpec("P")
T = TypeVar("T")
READER_GONE = 128 + signal.SIGPIPE  # exit code, as a shell gives it
# The environment variables that torchrun sets.
TORCHRUN = "TORCHELASTIC_RUN_ID RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
# Messages of Python, torch and the C++ library.
NO_MEMORY = re.compile(
    "allocate memory|out of memory|bad_alloc|map segment|start new thread|Resource temporarily "
    "unavailable",
    re.I,
)
ADVICE = {
    errno.EACCES: "ask its owner for the right to it, or choose another folder",
    errno.EROFS: "choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or lower --teacher-concurrency",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "free some space or choose another folder",
}


class UserError(Exception):
    """A problem that the user can fix; the message is one clear sentence that says what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))  # it may quote a server, a file or the user's code


class Interrupted(Exception):
    """The user asked the run to end; the finished steps are to be saved."""


def cannot_write(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    advice = ADVICE.get(getattr(error, "errno", None) or errno.ENOSPC, "choose another folder")
    return UserError(f"cannot write {path}: {reason}; {advice}")


def shortage(error: Exception) -> str:
    """A sentence on exhausted memory, threads, files or disk space, too long a name, or missing
    rights; else ""."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, MemoryError) or NO_MEMORY.search(text):
        return (
            f"there is not enough memory, or not enough threads ({text or 'MemoryError'}): close "
            "other programs, raise the limit (ulimit -v, ulimit -u), or choose smaller sizes"
        )
    if isinstance(error, OSError) and error.errno in ADVICE:
        return f"{text}; {ADVICE[error.errno]}"
    return ""


class Output(io.FileIO):
    """stdout or stderr. When its reader has gone, further output is dropped."""

    reader_gone = False  # set on the class, for stdout and stderr alike

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), self.fileno())  # so that no later write fails
            # EIO: the terminal has closed, with a SIGHUP
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            Output.reader_gone |= error.errno == errno.EPIPE
            return len(data)


class Stop:
    """`requested` is true after a first Ctrl-C, SIGTERM or SIGHUP (a closed terminal; nohup ignores
    it), or when the reader of the output has gone; the loop then ends after the step. A later
    Ctrl-C or SIGTERM ends it at once."""

    def __init__(self) -> None:
        self.signalled = False

    @property
    def requested(self) -> bool:
        return self.signalled or Output.reader_gone

    def check(self) -> None:
        """Raises Interrupted if an end was requested; for long waits that can be abandoned."""
        if self.requested:
            raise Interrupted

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        def handle(signum: int, frame: FrameType | None) -> None:
            # a terminal that closes may send several
            if self.signalled and signum != signal.SIGHUP:
                raise KeyboardInterrupt
            self.signalled = True

        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        before = {s: signal.signal(s, handle) for s in signals}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def open_outputs() -> None:
    """Replace stdout and stderr by `Output`s. A stream closed before the start becomes /dev/null:
    otherwise the next opened file would get its descriptor, and its output."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115  (until the process ends)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        is_own = stream is getattr(sys, f"__{name}__")
        if is_own and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            buffer = io.BufferedWriter(Output(stream.fileno(), "wb", closefd=False))
            by_line = stream.line_buffering or stream.write_through
            # characters that the encoding lacks are escaped
            output = io.TextIOWrapper(
                buffer, stream.encoding, "backslashreplace", line_buffering=by_line
            )
            setattr(sys, name, output)


def command(main: Callable[P, T]) -> Callable[P, T]:
    """Decorates main(): an error that the user can fix is printed as one line on stderr, with exit
    code 2."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        open_outputs()
        try:
            if signal.getsignal(signal.SIGINT) is end_at_once:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            if not gc.isenabled():
                gc.freeze()  # what was imported stays
                gc.enable()
            result = main(*args, **kwargs)
            sys.stdout.flush()
        except UserError as error:
            under_torchrun = all(name in os.environ for name in TORCHRUN)
            if not under_torchrun or os.environ["RANK"] == "0":  # which speaks for all
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except (MemoryError, OSError, RuntimeError, ImportError) as error:
            sentence = shortage(error)
            if not sentence:
                raise
            print(f"error: {printable(sentence)}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()  # otherwise the interpreter prints its error at exit
        if Output.reader_gone:
            sys.exit(READER_GONE)
        return result

    return run
