"""How the command line answers an input that cannot be used: one line on stderr, exit code 2."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


DEBUG = "TRL_DIFFUSION_DEBUG"
"""Environment variable that `--debug` sets, so that the processes of a launched training see it too."""

# What the library raises about its input. Anything else is a bug, whose traceback is wanted.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """
    Turns an error about the input into one line on stderr and exit code 2.

    With `--debug`, or the environment variable `TRL_DIFFUSION_DEBUG=1`, the error keeps its traceback.

    Args:
        prog (`str`): The command as the user typed it, e.g. `"trl-diffusion kto"`.
    """
    try:
        yield
    except USER_ERRORS as error:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            raise
        print(f"{prog}: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        raise SystemExit(2) from None
