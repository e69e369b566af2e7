"""The one error that a user can cause. Commands print it as one sentence and exit with code 2."""

import functools
import os
import sys


class UserError(Exception):
    """Something the user can mend; the message is one clear sentence that says what to do."""


def command(main):
    """Wrap a command's main(): a UserError becomes one line on stderr and exit code 2, never a traceback."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one is enough
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return run
