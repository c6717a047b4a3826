"""One process of a training that `trl-diffusion` starts on several: `rank.py METHOD OPTIONS`."""

import ctypes
import importlib
import os
import signal
import sys


LAUNCHER = "TRL_DIFFUSION_LAUNCHER"
"""Environment variable with the process id of the `trl-diffusion` that started this process."""

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def end_with_parent(parent: int | None = None) -> None:
    """
    Has Linux kill this process when the one that started it ends, even by SIGKILL; other systems have no such thing.

    Args:
        parent (`int`, *optional*): Process id of the one that started this process, which may have ended already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    # First of all: importing the rest takes seconds.
    end_with_parent(int(os.environ[LAUNCHER]))
    # The launcher says what happened; a rank that waits for the others could not raise KeyboardInterrupt.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The folder of this file, whose modules have names such as `evaluate`.
    del sys.path[0]
    importlib.import_module(f"trl_diffusion.cli.{sys.argv[1]}").main()


if __name__ == "__main__":
    main()
