"""Which files of this machine a data set may name: those of its own folder, and what was downloaded with it."""

import functools
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image
from huggingface_hub.constants import HF_HUB_CACHE

from .formats import AnyDataset, declare_columns


# Rows in memory at a time: images of a megabyte each make 200 MB of a batch of pairs.
BATCH_SIZE = 100


@functools.cache
def _real_path(folder: str) -> str:
    return os.path.realpath(folder)


def _real_folder(folder: str | os.PathLike) -> str:
    """Asked for each file and the same for all of them, as long as the process stays in its working directory."""
    return _real_path(os.path.abspath(folder))


# Read through the Hub's interface, with the user's token, and never from this machine.
_HUB = ("hf://", "https://huggingface.co/")


def _paths_without_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The paths of images as they are stored; None where there are bytes."""
    return pc.if_else(pc.is_null(pc.struct_field(column, "bytes")), pc.struct_field(column, "path"), None)


def image_files(dataset: Dataset) -> list[str]:
    """The files, each once, that the images of a data set are read from, where it does not hold their bytes."""
    found: set[str] = set()
    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            paths = _paths_without_bytes(dataset.data.column(name))
            if dataset._indices is not None:
                # Of the paths alone: the rows would take the bytes of other images along.
                paths = paths.take(dataset._indices.column(0))
            found.update(paths.unique().drop_null().to_pylist())
    return sorted(found)


def check_inside(file: str, folder: str | os.PathLike | None, where: str) -> None:
    """
    Checks that a file that data name lies in a folder, symlinks resolved, or was downloaded by the `datasets` library.

    Args:
        file (`str`): Path or URL, as the `datasets` library reads it.
        folder (`str` or `os.PathLike`, *optional*): The folder of the data, if they have one.
        where (`str`): What names the file, to begin the error message with.

    Raises:
        `ValueError`: if it does not.
    """
    source = file.split("::")[-1]  # of "zip://a.png::images.zip" the archive
    folders = [datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE, *([] if folder is None else [folder])]
    if source.startswith(_HUB):
        return
    if "://" not in source:
        path = Path(os.path.realpath(source))
        if any(path.is_relative_to(_real_folder(inside)) for inside in folders):
            return
    expected = "the bytes of the image" if folder is None else f"a file inside the folder {str(folder)!r}"
    raise ValueError(
        f"{where} names the file {file!r}, expected {expected}: if you trust the data, pass `allow_outside=True` (on "
        "the command line `--allow_outside`)."
    )


def stored_image(value: Any, folder: str | os.PathLike | None, allow_outside: bool, where: str) -> Any:
    """
    An image as the `datasets` library stores it, from that, from the bytes of a file, or from a path.

    Raises:
        `ValueError`: if it is a file outside of `folder`, see [`check_inside`], unless `allow_outside` is set.
    """
    if isinstance(value, bytes | str):
        value = {"bytes" if isinstance(value, bytes) else "path": value}
    if not isinstance(value, dict):
        return value
    content, path = value.get("bytes"), value.get("path")
    if content is None and path is not None and not allow_outside:
        check_inside(path, folder, where)
    # Beside bytes no path is kept: the `datasets` library may read a file of that name instead of them.
    return {"bytes": content, "path": path if content is None else None}


def inside_only(dataset: AnyDataset, folder: str | os.PathLike | None, allow_outside: bool = False) -> AnyDataset:
    """
    Refuses images that are read from files outside of a folder: those of a map-style data set at once, those of a
    stream when their row is read.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The data.
        folder (`str` or `os.PathLike`, *optional*): See [`check_inside`].
        allow_outside (`bool`, *optional*, defaults to `False`): Whether to allow all files.

    Returns:
        The same data.
    """
    if allow_outside:
        return dataset
    if isinstance(dataset, Dataset):
        for file in image_files(dataset):
            check_inside(file, folder, "The data set")
        return dataset
    dataset = declare_columns(dataset)
    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    for name in images:
        dataset = dataset.cast_column(name, Image(decode=False))

    def check(table: pa.Table, rows: list[int]) -> pa.Table:
        for name in images:
            paths = _paths_without_bytes(table[name])
            for place in np.flatnonzero(paths.is_valid()):
                check_inside(paths[int(place)].as_py(), folder, f"Row {rows[place]} of the data set")
            # As in `stored_image`: no path beside bytes.
            stored = pc.make_struct(pc.struct_field(table[name], "bytes"), paths, field_names=["bytes", "path"])
            table = table.set_column(table.column_names.index(name), name, stored)
        return table

    # As tables: rows as dictionaries take three times as long.
    tables = dataset.with_format("arrow").map(check, with_indices=True, batched=True, batch_size=BATCH_SIZE)
    return tables.with_format(None).cast(features)


def folder_of(dataset_name: str) -> str | None:
    """The folder of a data set that `load_dataset` finds on this machine; None for one on the Hub."""
    return dataset_name if os.path.isdir(dataset_name) else None
