"""UserError for problems that the user can fix, signals that end a run, and the decorator `command`
of each main().

Commands print an error as one sentence and exit with code 2. If the output is a pipe and its reader
ends (`| head -1`), a training run saves and ends, as it does when its terminal closes. Other
commands run to the end without further output."""

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
from typing import Any, NoReturn, ParamSpec, TypeVar

if sys.platform == "win32":  # no fcntl, no resource, and no compiler that takes our flags
    sys.exit(
        "error: tinystory runs on Linux and macOS; on Windows, install and run it inside WSL (wsl "
        "--install)"
    )

from tinystory.run.startup import end_by, is_command
from tinystory.run.text import printable

P = ParamSpec("P")
T = TypeVar("T")
LONG_WORD = re.compile(r"(\S{200})\S{300,}")  # too long for a path, and shown cut
# Environment variables that torchrun sets.
TORCHRUN = "TORCHELASTIC_RUN_ID RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
# Error messages of Python, PyTorch and the C++ library that mean a lack of memory or threads.
NO_MEMORY = re.compile(
    "allocate memory|out of memory|bad_alloc|map segment|start new thread|Resource temporarily "
    "unavailable",
    re.I,
)
ADVICE = {
    errno.EACCES: "ask the owner for permission, or choose another folder",
    errno.EROFS: "choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or lower --teacher-concurrency",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "free some space or choose another folder",
}


class UserError(Exception):
    """A problem that the user can fix. The message is one sentence: what failed, why, and what to
    do."""

    def __init__(self, message: str):
        # the message may quote a server, a file, the user's code or an endless word of theirs
        super().__init__(printable(LONG_WORD.sub(r"\1...", message)))


class Interrupted(Exception):
    """The user asked the run to end. The caller saves the finished steps."""


def cannot_write(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    advice = ADVICE.get(getattr(error, "errno", None) or errno.ENOSPC, "choose another folder")
    return UserError(f"cannot write {path}: {reason}; {advice}")


def shortage(error: Exception) -> str:
    """A sentence if the error means exhausted memory, threads, files or disk space, too long a
    name, or missing permissions; else ""."""
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
    """stdout or stderr. After the reader of a pipe has ended, further output is dropped."""

    reader_gone = False  # set on the class, for stdout and stderr alike

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), self.fileno())  # so that no later write fails
            # EIO: the terminal was closed, which also sends SIGHUP
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            Output.reader_gone |= error.errno == errno.EPIPE
            return len(data)


class Stop:
    """Request to end a run. `requested` is the number of the signal after a first Ctrl-C, SIGTERM
    or SIGHUP (a closed terminal; ignored under nohup), SIGPIPE after the reader of the output has
    ended, and else 0. The training loop then ends after the current step. A later Ctrl-C or SIGTERM
    ends the process at once."""

    def __init__(self) -> None:
        self.signum = 0

    @property
    def requested(self) -> int:
        return self.signum or Output.reader_gone * signal.SIGPIPE

    def check(self) -> None:
        """Raises Interrupted if an end was requested. For long waits that can be abandoned."""
        if self.requested:
            raise Interrupted

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        def handle(signum: int, frame: FrameType | None) -> None:
            # a closing terminal may send several signals
            if self.signum and signum != signal.SIGHUP:
                raise KeyboardInterrupt(signum)
            self.signum = self.signum or signum

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
    """Replace stdout and stderr by `Output`s. A stream that was closed before the start becomes
    /dev/null: otherwise the next opened file would get the stream's descriptor, and all output
    would go to this file."""
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
            # characters that the encoding cannot represent are escaped
            output = io.TextIOWrapper(
                buffer, stream.encoding, "backslashreplace", line_buffering=by_line
            )
            setattr(sys, name, output)


def end_command(signum: int) -> NoReturn:
    """End a command of this project by a signal; raise SystemExit in another program."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if is_command():
        end_by(signum)
    sys.exit(128 + signum)


def command(main: Callable[P, T]) -> Callable[P, T]:
    """Decorator of main(): an error that the user can fix is printed as one line on stderr, with
    exit code 2. KeyboardInterrupt ends the command by the signal that is its argument (default:
    SIGINT)."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        open_outputs()
        try:
            if signal.getsignal(signal.SIGINT) is end_by:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            if not gc.isenabled():
                gc.freeze()  # imported modules stay until the end
                gc.enable()
            result = main(*args, **kwargs)
            sys.stdout.flush()
        except UserError as error:
            under_torchrun = all(name in os.environ for name in TORCHRUN)
            if not under_torchrun or os.environ["RANK"] == "0":  # only rank 0 prints
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except (MemoryError, OSError, RuntimeError, ImportError) as error:
            sentence = shortage(error)
            if not sentence:
                raise
            print(f"error: {printable(sentence)}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as error:
            end_command(error.args[0] if error.args else signal.SIGINT)
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()  # otherwise the interpreter reports a failed flush at exit
        if Output.reader_gone:
            end_command(signal.SIGPIPE)
        return result

    return run
