"""How the command line answers an input that cannot be used: one line on stderr, exit code 2."""

import argparse
import difflib
import logging
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..redaction import redact_logs, redacted


DEBUG = "TRL_DIFFUSION_DEBUG"
"""Environment variable that `--debug` sets, so that the processes of a launched training see it too."""

# What the library raises about its input. Anything else is a bug, whose traceback is wanted.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, yaml.YAMLError)

# What transformers and diffusers raise where a tracker's package, or a GPU for 4 bits, is missing.
_LACKING = re.compile(r"requires \S+ to be installed|No GPU found")


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """
    Turns an error about the input into one line on stderr and exit code 2; an interrupt ends with exit code 130.

    With `--debug`, or the environment variable `TRL_DIFFUSION_DEBUG=1`, the traceback is printed too. Tokens and
    passwords are printed neither here nor in the traceback of an error that is not about the input.

    Args:
        prog (`str`): The command as the user typed it, e.g. `"trl-diffusion kto"`.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except USER_ERRORS as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            raise SystemExit(141) from None  # as after SIGPIPE: `| head` has read enough
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            print(redacted(traceback.format_exc()), file=sys.stderr)
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)  # which a tracker may watch
    except Exception as error:
        if isinstance(error, RuntimeError) and _LACKING.search(str(error)):
            print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
            sys.exit(2)
        trace = traceback.format_exc()
        if (clean := redacted(trace)) == trace:
            raise
        # Not left to `sys.excepthook`: that of wandb prints, and records, the error as it is.
        print(clean, file=sys.stderr)
        sys.exit(1)


def _stdout_is_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:  # Python flushes once more at its end, which must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def one_line(error: BaseException) -> str:
    """The message of an error in one line, without tokens and passwords."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        # str(error) begins with "[Errno 2]".
        text = f"{error.strerror}: {os.fsdecode(error.filename)!r}; check the path"
    else:
        text = _from_the_hub(error) or str(error) or type(error).__name__
    return redacted(" ".join(text.split()))


# Errors of huggingface_hub, most special first, and what can be done.
_HUB_ERRORS = {
    "OfflineModeIsEnabled": "`HF_HUB_OFFLINE` is set, so that only what is in the cache is found; unset it",
    "GatedRepoError": "access to it has to be requested on its page, and `hf auth login` to be run",
    "RepositoryNotFoundError": "there is no such repository, or it is private; `hf auth login` gives access",
    "RevisionNotFoundError": "the repository has no such revision",
    "RemoteEntryNotFoundError": "the repository does not hold the expected file",
    "EntryNotFoundError": "the Hub cannot be reached, and it is not in the cache",
    "HfHubHTTPError": "the Hub answers with an error",
}


def _from_the_hub(error: BaseException) -> str | None:
    """One sentence for an error whose cause is huggingface_hub's; diffusers and transformers write several."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    kinds = [kind.__name__ for link in chain for kind in type(link).__mro__ if kind.__module__.startswith("hugg")]
    reason = next((reason for kind, reason in _HUB_ERRORS.items() if kind in kinds), None)
    if reason is None or not isinstance(error, OSError):
        return None
    texts = " ".join(str(link) for link in reversed(chain))  # the Hub's own error is the last one
    if "/api/repos/create" in texts:
        return f"The repository to push to cannot be created on the Hub: {reason}"
    name = re.search(r"//[^/\s]+/(?:api/)?(?:(?:models|datasets)/)?([\w.-]*\w(?:/[\w.-]*\w)?)", texts)
    name = re.search(r"Cannot load model (\S+):", texts) or name
    found = "such model" if name is None else repr(name[1])
    return f"Found no {found} on this machine or on the Hub: {reason}, or check the name (a Hub id or a folder)"


_NOISE = re.compile(
    r"Couldn't connect to the Hub|thrown while requesting|Retrying in|Failed to read schema|requires torchvision"
)


def quiet_libraries() -> None:
    """Leaves to an error's one line what libraries log before it; secrets in their logs are redacted."""
    for handler in redact_logs():
        if os.environ.get(DEBUG, "0") in ("", "0"):
            handler.addFilter(_is_news)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hides what libraries say about each other while they are imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if os.environ.get(DEBUG, "0") in ("", "0"):
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _is_news(record: logging.LogRecord) -> bool:
    return not _NOISE.search(record.getMessage())


def suggestion(word: str, known: Iterable[str]) -> str:
    """
    The end of a sentence about an unknown word: `"; did you mean '--learning_rate'?"`, or nothing.

    Args:
        word (`str`): What was found.
        known (iterable of `str`): What is there.
    """
    known = list(known)
    near = [name for name in known if len(word) > 1 and name.startswith(word)] or difflib.get_close_matches(
        word, known
    )
    return f"; did you mean {near[0]!r}?" if near else ""


class OneLineMixin:
    """A parser whose errors are a `ValueError` in one sentence, which suggests near names; for [`one_line_errors`]."""

    prog: str
    strict = True
    """Whether an unknown option is refused; it may be another program's."""
    _option_string_actions: dict[str, argparse.Action]
    _subparsers: Any

    def parse_known_args(self, args=None, namespace=None):
        # Before argparse: it would ask for the required option that is spelled wrongly.
        if self._subparsers is None and self.strict:
            check_options(sys.argv[1:] if args is None else args, self._option_string_actions, self.prog)
        return super().parse_known_args(args, namespace)  # type: ignore[misc]

    def error(self, message: str) -> NoReturn:
        message = message[0].upper() + message[1:]
        chosen = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        near = suggestion(chosen[1], re.findall(r"[^\s',]+", chosen[2])) if chosen else ""
        raise ValueError(f"{message}{near or f'; see `{self.prog} --help`'}")


class Parser(OneLineMixin, argparse.ArgumentParser):
    """`argparse.ArgumentParser` with errors in one line."""


def check_options(words: Iterable[str], known: Iterable[str], prog: str) -> None:
    """
    Refuses an option that is not there, with the nearest name.

    Args:
        words (iterable of `str`): A command line.
        known (iterable of `str`): The options that are there, of which argparse also takes a beginning.
        prog (`str`): Name of the command.

    Raises:
        `ValueError`: for the first one.
    """
    known = list(known)
    for word in words:
        name = word.split("=", 1)[0]
        if name == "--":
            return
        # A value with a space may begin with dashes.
        if name.startswith("--") and " " not in name and not any(option.startswith(name) for option in known):
            near = suggestion(name, [option for option in known if option.startswith("--")])
            raise ValueError(f"Found no option {name!r}{near or f'; see `{prog} --help`'}")


def positive_int(text: str) -> int:
    """An option's type: a whole number of at least 1."""
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def non_negative_int(text: str) -> int:
    """An option's type: a whole number of at least 0."""
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def seed_number(text: str) -> int:
    """An option's type: a seed."""
    return _number(text, int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")


def positive_float(text: str) -> float:
    """An option's type: a finite number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a finite number above 0")


def non_negative_float(text: str) -> float:
    """An option's type: a finite number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a finite number of at least 0")


def _number(text: str, kind: type, fits: Callable[..., bool], expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"found {text}, expected {expected}")
    return value


def check_data_file(file: str) -> None:
    """Refuses a file that is not there; a pattern or an address is left to `load_dataset`."""
    if "://" not in file and "*" not in file and not Path(file).is_file():
        raise ValueError(f"Found no file {file!r}, expected one that is there")


def check_output_file(file: Path) -> None:
    """Refuses a file that cannot be written: a folder, or one in no folder."""
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"Found {str(file)!r}, expected a file in a folder that is there")


def check_output_dir(folder: Path) -> None:
    """Refuses an output folder that is a file, or lies in one."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"Found the file {str(there)!r} in the way of `--output_dir {folder}`, expected a folder")
