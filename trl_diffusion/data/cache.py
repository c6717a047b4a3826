"""What is computed once for a data set and kept on disk."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher, generate_random_fingerprint
from filelock import FileLock

from .paths import image_files


logger = logging.getLogger(__name__)

MANIFEST = "complete.json"
"""The file of a cache entry that names its other files and their sizes; written last."""


def data_fingerprint(dataset: Dataset) -> str:
    """
    Changes with the rows of a data set, and with size or time of the image files that its rows name.

    The `datasets` library's own fingerprint knows the names of such files only. It is used where there are none.
    """
    files = image_files(dataset)
    if not files:
        return dataset._fingerprint
    digest = xxhash.xxh3_128(dataset._fingerprint.encode())
    for file in files:
        try:
            stat = os.stat(file.split("::")[-1])  # of "zip://a.png::images.zip" the archive
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:  # a URL, or no such file, which its reader names
            state = "?"
        digest.update(f"{file}\0{state}\0".encode())
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """
    A name for the result of a computation on `parts`, the same in every process.

    A `Dataset` among them counts by its [`data_fingerprint`]. What cannot be hashed (a function around a compiled
    model, say) gets a random name, so that it is computed every time.
    """
    parts = tuple(data_fingerprint(part) if isinstance(part, Dataset) else part for part in parts)
    try:
        return Hasher.hash(list(parts))
    except Exception:  # dill raises whatever the object's own pickling raises
        return generate_random_fingerprint()


def folder_state(path: str) -> list[tuple[str, int, int]]:
    """What changes when a file in a folder changes: names, sizes and times."""
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    return [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def cache_root() -> Path:
    """Where computed data is kept: beside what the `datasets` library keeps (`HF_DATASETS_CACHE`)."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "trl_diffusion"


def _file_sizes(folder: Path) -> dict[str, int]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _is_complete(folder: Path) -> bool:
    """Whether an entry of the cache has all the files that were written, each as long as it was."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in expected.items())
    except (OSError, ValueError, AttributeError, TypeError):  # missing, cut off, or not what was written
        return False


def built_once(name: str, build: Callable[[Path], None]) -> Path:
    """
    A folder of the cache, which all ranks fill together on first use.

    It appears under its name when it is complete: a run that is killed meanwhile leaves nothing that a later one would
    take for it, and what it leaves is cleared away by the next one that builds the same. An entry that lost a file
    later, or part of one, is built again. Runs that want the same at the same time wait for one another. All nodes
    must share the folder.

    Args:
        name (`str`): See [`fingerprint`]. Rank 0's counts.
        build (`Callable`): Writes this rank's files into the folder that it is given.
    """
    state, root = PartialState(), cache_root()
    (name,) = broadcast_object_list([name])
    folder, staging, locks = root / name, root / f"_incomplete-{name}", root / "_locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / name)
    if state.is_main_process:
        lock.acquire()
    try:
        # Rank 0 decides for all, so that no rank waits for one that has found another run's result.
        (done,) = broadcast_object_list([_is_complete(folder)])
        if not done:
            if state.is_main_process:
                if folder.exists():
                    logger.warning(f"The cache entry {folder} is incomplete: it is removed and computed again.")
                    shutil.rmtree(folder)
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
            state.wait_for_everyone()
            try:
                build(staging)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            state.wait_for_everyone()
            if state.is_main_process:
                (staging / MANIFEST).write_text(json.dumps(_file_sizes(staging)) + "\n")
                os.replace(staging, folder)
            state.wait_for_everyone()
    finally:
        lock.release()
    return folder


def own_share(count: int) -> range:
    """This rank's rows of so many; the shares follow one another in the order of the ranks."""
    state = PartialState()
    start, stop = (count * (state.process_index + i) // state.num_processes for i in (0, 1))
    return range(start, stop)


def part_file(folder: Path, stem: str) -> str:
    """The file of this rank in a folder of the cache, see [`read_parts`]."""
    return str(folder / f"{stem}-{PartialState().process_index:05d}.arrow")


def write_part(columns: dict[str, np.ndarray | pa.Array], folder: Path, stem: str) -> None:
    """Writes this rank's rows, whose memory they fill; none if there are none."""
    table = Dataset.from_dict(columns).data.table
    if len(table):
        with pa.OSFile(part_file(folder, stem), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


def read_parts(folder: Path, stem: str) -> Dataset:
    """The rows that all ranks wrote under one stem, memory-mapped."""
    return concatenate_datasets([Dataset.from_file(str(part)) for part in sorted(folder.glob(f"{stem}-*.arrow"))])


def computed_columns(
    dataset: Dataset,
    compute: Callable[[dict[str, list]], dict[str, Any]],
    name: str,
    batch_size: int,
    description: str,
) -> Dataset:
    """
    The columns that `compute` makes of a data set, see [`built_once`].

    Args:
        dataset (`Dataset`): The rows; every rank holds the same.
        compute (`Callable`): From a batch of rows to new columns, as `Dataset.map` takes it.
        name (`str`): See [`fingerprint`].
        batch_size (`int`): Rows per call.
        description (`str`): Title of the progress bar.

    Returns:
        `Dataset`: the new columns alone, in the order of the rows.
    """

    def build(folder: Path) -> None:
        share = own_share(len(dataset))
        if len(share):
            dataset.select(share).map(
                compute,
                batched=True,
                batch_size=batch_size,
                remove_columns=dataset.column_names,
                cache_file_name=part_file(folder, "part"),
                new_fingerprint=name,
                desc=description,
            )

    return read_parts(built_once(name, build), "part")
