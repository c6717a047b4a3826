"""Prompts from the files in which benchmarks publish them."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet


# Pick-a-Pic calls the prompt `caption`, PartiPrompts `Prompt`, HPSv2 and most others `prompt`.
PROMPT_COLUMNS = ("prompt", "Prompt", "caption")
SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")


def read_prompts(file: str | Path, column: str | None = None) -> list[str]:
    """
    The distinct prompts of a file, in its order.

    Args:
        file (`str` or `Path`):
            By its ending: `.txt`, one prompt per line; `.json`, a list of strings (HPSv2's `anime.json` ...), a list
            of objects (HPSv2's `test.json`), or an object of such lists; `.jsonl`, one object per line; `.csv` and
            `.tsv` with a line of column names (PartiPrompts' `PartiPrompts.tsv`); `.parquet` (Pick-a-Pic's test
            split).
        column (`str`, *optional*):
            Column or key of the prompt. Defaults to the first of `prompt`, `Prompt` and `caption` that there is.

    Returns:
        `list[str]`: at least one, none of them empty.

    Raises:
        `ValueError`: if the ending is unknown, or no prompt is found where it is expected.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"Found no file {str(file)!r}: expected one with prompts.")
    if file.suffix not in SUFFIXES:
        raise ValueError(f"Found the file {file.name!r} with prompts, expected one that ends in one of {SUFFIXES}.")
    try:
        prompts = [prompt.strip() for prompt in _read(file, column)]
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, pyarrow.ArrowException) as error:
        raise ValueError(
            f"The file {str(file)!r} cannot be read as {file.suffix[1:]} ({error}); expected prompts in that format."
        ) from None
    distinct = list(dict.fromkeys(filter(None, prompts)))
    if not distinct:
        raise ValueError(f"Found no prompt in {str(file)!r}, expected at least one.")
    return distinct


def _read(file: Path, column: str | None) -> Iterator[str]:
    if file.suffix == ".parquet":
        names = pyarrow.parquet.read_schema(file).names
        name = _column(names, column, file)
        yield from _strings(pyarrow.parquet.read_table(file, columns=[name])[name].to_pylist(), column, file)
    elif file.suffix in (".csv", ".tsv"):
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
            name = _column(rows.fieldnames or [], column, file)
            yield from _strings((row[name] for row in rows), column, file)
    else:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".txt":
            yield from text.splitlines()
        elif file.suffix == ".jsonl":
            yield from _strings((json.loads(line) for line in text.splitlines() if line.strip()), column, file)
        else:
            content = json.loads(text)
            lists = content.values() if isinstance(content, dict) else [content]
            for part in lists:
                if not isinstance(part, list):
                    raise ValueError(f"Found a {type(part).__name__} in {str(file)!r}, expected lists of prompts.")
                yield from _strings(part, column, file)


def _strings(values: Iterable, column: str | None, file: Path) -> Iterator[str]:
    for value in values:
        prompt = value[_column(list(value), column, file)] if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise ValueError(f"Found {prompt!r} in {str(file)!r}, expected a prompt.")
        yield prompt


def _column(names: Iterable[str], column: str | None, file: Path) -> str:
    names = list(names)
    wanted = PROMPT_COLUMNS if column is None else (column,)
    for name in wanted:
        if name in names:
            return name
    raise ValueError(
        f"Found the columns {names} in {str(file)!r}, expected one of {list(wanted)}: name the right one."
    )
