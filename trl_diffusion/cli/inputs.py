"""What the commands read: option files, models and data sets, checked before anything large is loaded."""

import json
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pyarrow
import yaml
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from safetensors import SafetensorError, safe_open
from trl import TrlParser

from ..hub import base_model_of
from ..redaction import redacted
from .errors import OneLineMixin, suggestion


class ConfigParser(OneLineMixin, TrlParser):
    """
    `trl.TrlParser` with errors in one line, and a check of what `--config file.yaml` holds.

    Args:
        dataclass_types: The dataclasses of the options.
        strict (`bool`, *optional*, defaults to `True`): Whether unknown options are refused.
    """

    def __init__(self, dataclass_types=None, strict: bool = True, **kwargs):
        super().__init__(dataclass_types, **kwargs)
        self.strict = strict

    def parse_args_and_config(self, args=None, **kwargs):
        args = sys.argv[1:] if args is None else args
        words = [part for word in args for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        if "--config" in words:
            read_config(words[words.index("--config") + 1 :])
        return super().parse_args_and_config(words, **kwargs)

    def set_defaults_with_config(self, **kwargs):
        redacted(kwargs)  # remembers the secrets
        actions = {action.dest: action for action in self._actions}
        for name, value in kwargs.items():
            if name not in actions:
                if self.strict:
                    near = suggestion(name, actions) or f"; see `{self.prog} --help`"
                    raise ValueError(f"Found the unknown option {name!r} in the configuration file{near}")
                continue
            action = actions[name]
            if action.choices and value is not None and value not in action.choices:
                choices = list(action.choices)
                raise ValueError(
                    f"Found `{name}: {value}` in the configuration file, expected one of {choices}"
                    f"{suggestion(str(value), map(str, choices))}"
                )
            wrong = dict if isinstance(value, dict) else list if isinstance(value, list) and not action.nargs else None
            if action.type in (int, float) and (wrong or isinstance(value, bool)):
                raise ValueError(
                    f"Found `{name}: {value}` in the configuration file, expected a number; correct that line"
                )
        return super().set_defaults_with_config(**kwargs)


def read_config(words: list[str]) -> dict[str, Any]:
    """
    The options in a YAML file.

    Args:
        words (`list[str]`): What follows `--config`, the file first.

    Raises:
        `ValueError`: if it is no file, or does not hold a mapping.
    """
    if not words or words[0].startswith("--"):
        raise ValueError("Found `--config` without a value, expected a YAML file: `--config recipe.yaml`")
    file = Path(words[0])
    if not file.is_file():
        raise ValueError(f"Found no file {str(file)!r}, expected a YAML file of options for `--config`")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(
            f"Found {str(file)!r}, which is no text in UTF-8; expected a YAML file for `--config`"
        ) from None
    except yaml.YAMLError as error:
        # Without the line itself, which may hold a token.
        line = getattr(error, "problem_mark", None)
        where = "" if line is None else f" in line {line.line + 1}"
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ValueError(f"Found no valid YAML in {str(file)!r}{where}: {problem}; correct it") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"Found {found} in {str(file)!r}, expected options, one `name: value` per line")
    return content


def read_lines(file: Path) -> list[str]:
    """
    The lines of a text file that are not empty, as prompts.

    Raises:
        `ValueError`: if it is no text file, or an empty one.
    """
    if not file.is_file():
        raise ValueError(f"Found no file {str(file)!r}, expected a text file with one prompt per line")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Found {str(file)!r}, which is no text in UTF-8 (byte {error.start}); expected one prompt per line"
        ) from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"Found no prompt in {str(file)!r}: expected one per line")
    return prompts


def looks_like_a_path(name: str) -> bool:
    """Whether a name cannot be a Hub id."""
    return name.startswith((".", "/", "~", os.sep)) or name.count("/") > 1 or "\\" in name or not name.strip()


def check_model(name: str, option: str = "--model_name_or_path", base_model: str | None = None) -> None:
    """
    Refuses a local model that cannot be loaded, by its small files; a Hub id is left to the Hub.

    Args:
        name (`str`): A Hub id, a folder, or a file that `trl-diffusion export` wrote.
        option (`str`, *optional*): The option that it is from.
        base_model (`str`, *optional*): The base of an adapter. Defaults to what the adapter's configuration names.

    Raises:
        `ValueError`: if there is no such folder, or it holds neither a pipeline nor an adapter.
    """
    folder = Path(name)
    if folder.is_file():
        if folder.suffix != ".safetensors":
            raise ValueError(
                f"Found the file {name!r} for `{option}`, expected a folder, a Hub id, or a .safetensors file that "
                "`trl-diffusion export` wrote"
            )
        try:
            safe_open(name, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"Found {name!r}, which is no whole .safetensors file ({error}); expected one") from None
        return
    if not folder.is_dir():
        if looks_like_a_path(name):
            raise ValueError(f"Found no folder {name!r} for `{option}`, expected a pipeline's folder or a Hub id")
        return
    if (folder / "adapter_config.json").is_file():
        _read_json(folder / "adapter_config.json", "peft_type")
        check_model(base_model_of(name, base_model), "--base_model")
        return
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"The folder {name!r} is no diffusers pipeline: found no model_index.json in it, expected the output "
            f"folder of a training or of `pipeline.save_pretrained` for `{option}`"
        )
    index = _read_json(folder / "model_index.json", "_class_name")
    if not hasattr(diffusers, index["_class_name"]):
        raise ValueError(
            f"Found the pipeline class {index['_class_name']!r} in {name!r}, which diffusers {diffusers.__version__} "
            "does not have; expected one of its pipelines, which a newer version may have"
        )
    for part, classes in index.items():
        if isinstance(classes, list) and classes[0] is not None and not (folder / part).is_dir():
            raise ValueError(f"Found no folder {part!r} in the pipeline {name!r}, expected it by its model_index.json")


def _read_json(file: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"Found no valid JSON in {str(file)!r}; expected the file that was saved with it") from None
    if not isinstance(content, dict) or not isinstance(content.get(key), str):
        raise ValueError(f"Found no {key!r} in {str(file)!r}; expected the file that was saved with the model")
    return content


def load_data(name: str, config: str | None = None, split: str | None = None, streaming: bool = False) -> Any:
    """
    `datasets.load_dataset`, whose errors say what was expected.

    Args:
        name (`str`): Hub id or local folder.
        config (`str`, *optional*): Its configuration.
        split (`str`, *optional*): The split to read. Defaults to all.
        streaming (`bool`, *optional*, defaults to `False`): Whether to stream it.

    Raises:
        `ValueError`: if there is no such data set, configuration or split, or a file of it is broken.
    """
    if not os.path.exists(name) and looks_like_a_path(name):
        raise ValueError(f"Found no folder {name!r} for `--dataset_name`, expected one with a data set, or a Hub id")
    with reading(repr(name)):
        return _load_data(name, config, split, streaming)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Names the data whose files turn out to be broken."""
    try:
        yield
    except (DatasetsError, pyarrow.ArrowException, tarfile.TarError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(
            f"The data in {what} cannot be read ({error.__cause__ or error}); expected whole files of the right format"
        ) from None


def _load_data(name: str, config: str | None, split: str | None, streaming: bool) -> Any:
    try:
        return load_dataset(name, config, split=split, streaming=streaming)
    except ValueError as error:
        if not str(error).startswith(("Bad split", "Unknown split")):
            raise
        raise ValueError(f"The data set {name!r} has no split {split!r} ({error}); choose one of these") from None
    except ConnectionError as error:
        raise ValueError(
            f"Found no data set {name!r} on this machine, and the Hub cannot be reached ({error}); check the name or "
            "the network"
        ) from None
    except FileNotFoundError as error:
        raise ValueError(
            f"Found no data set in {name!r} ({error}); expected a Hub id, or a folder with parquet, csv, json or "
            "image files"
        ) from None


__all__ = ["ConfigParser", "check_model", "load_data", "looks_like_a_path", "read_config", "read_lines", "reading"]
