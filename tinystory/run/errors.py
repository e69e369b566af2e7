"""The error for everything that the user can fix. Commands print it as one sentence and exit with code 2."""

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tinystory.run.text import printable

P = ParamSpec("P")
T = TypeVar("T")


class UserError(Exception):
    """A problem that the user can fix; the message is one clear sentence that says what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))  # it may quote a server, a file or the user's code


class PeerLost(UserError):
    """Another process of a torchrun run has ended; any that is left says so."""


class Interrupted(Exception):
    """The user asked the run to end; what is finished is to be saved."""


def command(main: Callable[P, T]) -> Callable[P, T]:
    """Decorates a command's main(): a UserError becomes one line on stderr and exit code 2, without a traceback."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by tinystory/__init__.py during the imports
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return main(*args, **kwargs)
        except UserError as error:
            # Under torchrun, one process is enough.
            if os.environ.get("RANK", "0") == "0" or isinstance(error, PeerLost):
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return run
