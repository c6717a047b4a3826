"""Tokens and passwords: kept out of records, messages and command lines."""

import json
import logging
import os
import re
import sys
from typing import Any


MARK = "<redacted>"
HIDDEN = "TRL_DIFFUSION_HIDDEN_OPTIONS"
"""Environment variable that takes options with a secret to the processes of a launched training."""

# Words of a key that holds a secret, and last words that say that it is only about one.
_SECRET_WORDS = {
    *("token", "secret", "secrets", "password", "passwd", "pwd", "passphrase", "auth", "authorization", "credential"),
    *("credentials", "header", "headers", "cookie", "cookies", "apikey", "sas"),
}
_HARMLESS_ENDS = {"id", "ids", "type", "size", "length", "name", "path", "file", "dir", "sock", "method"}
_PLACEHOLDER = re.compile(r"<\w+>")  # what transformers writes for its own tokens
_SHORTEST = 6
_IN_TEXT = [
    (re.compile(r"(?<=://)[^/\s:@'\"]+:[^/\s@'\"]+(?=@)"), MARK),
    (re.compile(r"(?<=://)[^/\s:@'\"]+(?=@)"), MARK),
    (
        re.compile(r"([?&][\w.-]*(?:token|signature|sig|secret|password|key|credential)[\w.-]*=)[^&\s'\"]+", re.I),
        rf"\1{MARK}",
    ),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{6,}"), rf"\1 {MARK}"),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), MARK),
]

_known: set[str] = set()


def is_secret(key: Any) -> bool:
    """Whether the value of a key, an option or an environment variable is a secret, by its name."""
    if not isinstance(key, str):
        return False
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
    if not words or words[-1] in _HARMLESS_ENDS:
        return False
    return bool(_SECRET_WORDS & set(words)) or words[-1] in ("key", "tokens") or words[-2:] == ["storage", "options"]


def redacted(value: Any) -> Any:
    """
    A copy without tokens and passwords.

    Secrets are what a key names so (`token`, `headers`, `api_key` ...; in JSON too), user and password in a URL, and
    Hub tokens. Each one that was found, and what the environment and the Hub's token file hold, is redacted from then
    on in any text.

    Args:
        value: Text, or dictionaries and lists with text in them; anything else is returned as it is.
    """
    if isinstance(value, dict):
        return {key: _remembered(part) if is_secret(key) else redacted(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        parts = [redacted(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if not isinstance(value, str):
        return value
    if value.lstrip()[:1] in ("{", "["):
        try:
            content = json.loads(value)
        except ValueError:
            pass
        else:
            return value if (clean := redacted(content)) == content else json.dumps(clean)
    for pattern, replacement in _IN_TEXT:
        value = pattern.sub(replacement, value)
    for secret in sorted(_known | _of_the_machine(), key=len, reverse=True):
        value = value.replace(secret, MARK)
    return value


def _remembered(secret: Any) -> Any:
    """The mark in place of a secret, whose text is redacted from now on."""
    if isinstance(secret, dict):
        return {key: _remembered(part) for key, part in secret.items()}
    if isinstance(secret, list | tuple | set):
        return [_remembered(part) for part in secret]
    if secret is None or isinstance(secret, bool) or secret == "" or _PLACEHOLDER.fullmatch(str(secret)):
        return secret
    text = str(secret)
    _known.update(part for part in {text, text.split()[-1]} if len(part) >= _SHORTEST)  # also without "Bearer"
    return MARK


def _of_the_machine() -> set[str]:
    from huggingface_hub import get_token  # an error of the command line should not have to import it earlier

    values = {value for name, value in os.environ.items() if is_secret(name) and "PWD" not in name} | {
        get_token() or ""
    }
    return {value for value in values if len(value) >= _SHORTEST and not _PLACEHOLDER.fullmatch(value)}


def redact_logs() -> list[logging.Handler]:
    """Redacts what the Hugging Face libraries log from now on, and returns their handlers."""
    libraries = ("accelerate", "datasets", "diffusers", "huggingface_hub", "peft", "transformers")
    handlers = [handler for name in libraries for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(_redact_record)  # a second time it is not added
    return handlers


def _redact_record(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if (clean := redacted(text)) != text:
        record.msg, record.args = clean, None
    return True


def hide(words: list[str]) -> list[str]:
    """
    A command line without the options that hold a secret, which [`reveal`] finds in a process that is started.

    Args:
        words (`list[str]`): The command line of the process to be started.
    """
    kept: list[str] = []
    hidden: list[str] = []
    for option in _options(words):
        (kept if _clean(option) == option else hidden).extend(option)
    if hidden:
        os.environ[HIDDEN] = json.dumps(hidden)
    return kept


def reveal() -> list[str]:
    """The options that [`hide`] took away in the process that started this one; they are here once."""
    return json.loads(os.environ.pop(HIDDEN, "[]"))


def redact_argv() -> None:
    """Takes the secrets out of `sys.argv`, which trackers record."""
    sys.argv[1:] = [word for option in _options(sys.argv[1:]) for word in _clean(option)]


def _options(words: list[str]) -> list[list[str]]:
    """The words of each option together, those before the first one too."""
    options: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not options:
            options.append([])
        options[-1].append(word)
    return options


def _clean(option: list[str]) -> list[str]:
    if not option[0].startswith("--"):
        return redacted(option)
    name, equals, value = option[0].partition("=")
    values = redacted({name: [value, *option[1:]]})[name]
    return [f"{name}={values[0]}" if equals else name, *values[1:]]


__all__ = ["hide", "is_secret", "redact_argv", "redact_logs", "redacted", "reveal"]
