"""What is in a preference data set, before anything is trained on it; and how it is written to disk.

Both go through a data set once, a few rows at a time; what they remember of a row is some dozen bytes.
"""

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image
from datasets.table import embed_table_storage
from datasets.utils.file_utils import xopen
from PIL import Image as PILImage
from tqdm.auto import tqdm

from ..files import written_whole
from .buckets import Size, nearest_bucket
from .formats import AnyDataset, _check_features, advice_for, check_row, declare_columns, present_columns
from .images import check_mode, convert_to_rgb, upright_size


PROBLEMS = {
    "empty_prompt": "rows without a prompt",
    "broken_image": "rows with an image that cannot be read",
    "identical_pair": "pairs of two identical images",
    "contradiction": "rows that others contradict: the same prompt and images, judged the other way",
    "duplicate_row": "rows that repeat an earlier one",
}

LAYOUTS = {
    "paired": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "image", "label"),
    "supervised": ("prompt", "image"),
}


@dataclass(frozen=True)
class DataReport:
    """
    What [`inspect_dataset`] found.

    Attributes:
        layout (`str`): `"paired"`, `"unpaired"` or `"supervised"`.
        rows (`int`): Number of rows.
        liked (`int` or `None`): Rows whose label is True, of unpaired data.
        prompts (`int`): Number of different prompts.
        images (`int`): Number of images.
        different_images (`int`): Number of different images: files that differ in a byte.
        sizes (`Counter`): How many images have a size `(width, height)`, EXIF orientation applied.
        transparent (`int` or `None`): Images with transparent pixels; None where they were not decoded.
        animated (`int`): Files with several frames, of which training reads the first.
        problems (`dict[str, np.ndarray]`): For each of [`PROBLEMS`], a bool array of shape `(rows,)`.
        first_rows (`list[dict[str, str]]`): The first rows in words.
    """

    layout: str
    rows: int
    liked: int | None
    prompts: int
    images: int
    different_images: int
    sizes: Counter
    transparent: int | None
    animated: int
    problems: dict[str, np.ndarray]
    first_rows: list[dict[str, str]]

    def keep(self, drop: Iterable[str]) -> np.ndarray:
        """
        Which rows are left when those with the problems `drop` go: bool, of shape `(rows,)`.

        `dataset.select(np.flatnonzero(report.keep(["broken_image"])))` takes them out of a map-style data set.
        """
        kept = np.ones(self.rows, bool)
        for name in drop:
            kept &= ~self.problems[name]
        return kept

    def cropped(self, buckets: list[Size], share: float = 0.1) -> int:
        """
        How many images lose more than `share` of their area when they are cropped for training.

        Args:
            buckets (`list[tuple[int, int]]`): The training sizes, height and width; each image goes to the nearest.
            share (`float`, *optional*, defaults to `0.1`): The smallest loss that counts.
        """
        counts, sizes, targets = self._with_targets(buckets)
        shape = sizes[:, 0] / sizes[:, 1] / (targets[:, 0] / targets[:, 1])
        return int(counts[1 - np.minimum(shape, 1 / shape) > share].sum())

    def upscaled(self, buckets: list[Size]) -> int:
        """How many images are enlarged for training, because a side is smaller than that of their bucket."""
        counts, sizes, targets = self._with_targets(buckets)
        return int(counts[(sizes < targets).any(axis=1)].sum())

    def _with_targets(self, buckets: list[Size]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How often each size occurs, its height and width, and those of its bucket."""
        sizes = np.array(list(self.sizes), np.float64).reshape(-1, 2)[:, ::-1]
        return np.array(list(self.sizes.values()), int), sizes, np.array(buckets)[nearest_bucket(sizes, buckets)]


def _layout_of(dataset: AnyDataset) -> str:
    names = set(dataset.column_names or ())
    for layout, columns in LAYOUTS.items():
        if names.issuperset(columns):
            return layout
    raise ValueError(
        f"Found the columns {sorted(names)}, expected {' or '.join(', '.join(c) for c in LAYOUTS.values())}; "
        f"{advice_for(names, 'name the layout of the data, or rename its columns')}."
    )


def _arrow_batches(dataset: AnyDataset, columns: list[str], size: int) -> Iterator[pa.Table]:
    """The rows as tables, images as they are stored."""
    dataset = dataset.select_columns(columns)
    for name in columns:
        if isinstance(dataset.features[name], Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset.with_format("arrow").iter(batch_size=size)


def _with_progress(tables: Iterable[pa.Table], title: str, rows: int | None) -> Iterator[pa.Table]:
    with tqdm(desc=title, total=rows, unit=" rows") as bar:
        for table in tables:
            yield table
            bar.update(table.num_rows)


def _hash(*parts: bytes) -> int:
    # 64 bits: among two million images two different ones are taken for equal with a probability of 1e-7.
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


class _Look(NamedTuple):
    """What was seen of an image; `size` is None where it cannot be read."""

    hash: int
    size: tuple[int, int] | None
    words: str
    transparent: bool = False
    animated: bool = False


def _look_at(image: dict[str, Any] | None, decode: bool) -> _Look:
    content = b""
    try:
        if image is None:
            raise ValueError("None")
        content = image["bytes"]
        if content is None:
            with xopen(image["path"], "rb") as file:
                content = file.read()
        with PILImage.open(BytesIO(content)) as opened:
            size, transparent = upright_size(opened), False
            words = f"{size[0]} x {size[1]} {opened.format}"
            if decode:
                transparent = convert_to_rgb(opened)[1]
            else:
                check_mode(opened)
            # Only the classes of formats with frames know the attribute. The second image of an MPO is no frame, but a
            # camera's preview.
            animated = getattr(opened, "is_animated", False) and opened.format != "MPO"
            return _Look(_hash(content), size, words, transparent, animated)
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        name = str((image or {}).get("path"))
        return _Look(_hash(content or name.encode()), None, f"broken ({error})")


def inspect_dataset(dataset: AnyDataset, *, decode: bool = True, first_rows: int = 3) -> DataReport:
    """
    Goes through preference data once and counts what is in them.

    Streams and map-style data sets of any size are read in bounded memory.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Paired, unpaired or supervised data.
        decode (`bool`, *optional*, defaults to `True`):
            Whether to decode every image. Without, only its header is read: much faster, but a file that is cut off
            counts as good.
        first_rows (`int`, *optional*, defaults to `3`):
            How many rows to describe.

    Returns:
        [`DataReport`]

    Raises:
        `ValueError`: if the data set is empty or has none of the layouts, a column is of another type, or a label is
            None.
    """
    dataset = declare_columns(dataset)
    layout = _layout_of(dataset)
    columns = LAYOUTS[layout]
    image_columns = [name for name in columns if name in ("image", "chosen", "rejected")]
    _check_features(dataset.features, list(columns), f"{layout} data set")
    keys, prompts, images = array("Q"), array("Q"), array("Q")
    directions, empty, broken, identical = bytearray(), bytearray(), bytearray(), bytearray()
    sizes: Counter = Counter()
    transparent = animated = 0
    described: list[dict[str, str]] = []
    rows = len(dataset) if isinstance(dataset, Dataset) else None
    for table in _with_progress(_arrow_batches(dataset, list(columns), size=100), "Inspecting", rows):
        for row in table.to_pylist():
            if layout == "unpaired":
                check_row(row, ["label"], len(keys))
            prompt = _hash((row["prompt"] or "").encode())
            looks = [_look_at(row[name], decode) for name in image_columns]
            hashes = [look.hash for look in looks]
            sizes.update(look.size for look in looks if look.size is not None)
            transparent += sum(look.transparent for look in looks)
            animated += sum(look.animated for look in looks)
            prompts.append(prompt)
            images.extend(hashes)
            # What a judgement is about, and which of two ways it went.
            keys.append(_hash(*(value.to_bytes(8, "little") for value in (prompt, *sorted(hashes)))))
            directions.append(row["label"] if layout == "unpaired" else hashes == sorted(hashes))
            empty.append(not (row["prompt"] or "").strip())
            broken.append(any(look.size is None for look in looks))
            identical.append(layout == "paired" and len(set(hashes)) == 1)
            if len(described) < first_rows:
                words = {name: look.words for name, look in zip(image_columns, looks, strict=True)}
                label = {"label": "liked" if row["label"] else "disliked"} if layout == "unpaired" else {}
                described.append({"prompt": row["prompt"] or "", **words, **label})

    if not keys:
        raise ValueError("The data set is empty: expected at least one row.")
    direction = np.frombuffer(directions, bool)
    _, group = np.unique(np.frombuffer(keys, np.uint64), return_inverse=True)
    ways = np.zeros((len(keys), 2), bool)
    ways[group, direction.astype(int)] = True
    _, first = np.unique(2 * group + direction, return_index=True)
    repeated = np.ones(len(keys), bool)
    repeated[first] = False
    problems: dict[str, np.ndarray] = {
        "empty_prompt": np.frombuffer(empty, bool),
        "broken_image": np.frombuffer(broken, bool),
        "identical_pair": np.frombuffer(identical, bool),
        "contradiction": np.asarray(ways[group].all(axis=1)),
        "duplicate_row": repeated,
    }
    return DataReport(
        layout=layout,
        rows=len(keys),
        liked=int(direction.sum()) if layout == "unpaired" else None,
        prompts=len(np.unique(np.frombuffer(prompts, np.uint64))),
        images=len(images),
        different_images=len(np.unique(np.frombuffer(images, np.uint64))),
        sizes=sizes,
        transparent=transparent if decode else None,
        animated=animated,
        problems=problems,
        first_rows=described,
    )


@contextmanager
def _shards(directory: Path, split: str, schema: pa.Schema, max_bytes: int) -> Iterator[Callable[[pa.Table], None]]:
    """Yields a function that appends a table to the split's files, which are named when their number is known."""
    with written_whole(directory) as staging:
        parts: list[Path] = []
        writer: pq.ParquetWriter | None = None
        written = 0
        with ExitStack() as opened:

            def write(table: pa.Table) -> None:
                nonlocal writer, written
                if writer is None or written >= max_bytes:
                    opened.close()
                    parts.append(staging / f"part-{len(parts)}")
                    writer, written = opened.enter_context(pq.ParquetWriter(parts[-1], schema)), 0
                writer.write_table(table)
                written += table.nbytes

            yield write
        if not parts:
            raise ValueError("No row is left to write: expected at least one; see what was dropped, and why.")
        for i, part in enumerate(parts):
            part.rename(staging / f"{split}-{i:05d}-of-{len(parts):05d}.parquet")


def check_split_is_new(directory: Path, split: str) -> None:
    """
    Checks that [`write_parquet`] would not write beside an earlier data set.

    Raises:
        `ValueError`: if the split is there already.
    """
    present = sorted(directory.glob(f"{split}-*.parquet"))
    if present:
        raise ValueError(f"Found {present[0].name} in {directory}: expected no such split; choose another folder.")


def write_parquet(
    dataset: AnyDataset,
    directory: str | os.PathLike,
    *,
    split: str = "train",
    keep: np.ndarray | None = None,
    max_shard_size: int = 500_000_000,
) -> list[Path]:
    """
    Writes preference data as parquet files that `load_dataset(directory)` reads, images included.

    Unlike `IterableDataset.to_parquet`, which collects a stream in memory first, it holds a hundred rows at a time.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Paired, unpaired or supervised data; columns other than theirs and `weight` are left out.
        directory (`str` or `os.PathLike`):
            Where to write; a file under the name of another split may be there.
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split, with which the files' names begin.
        keep (`np.ndarray`, *optional*):
            Which rows to write: bool, of shape `(rows,)`. Defaults to all.
        max_shard_size (`int`, *optional*, defaults to `500_000_000`):
            Bytes after which a new file is begun.

    Returns:
        `list[Path]`: the files, named `train-00000-of-00002.parquet`, or as the split is.

    Raises:
        `ValueError`: if the split is there already, or the data set has none of the layouts.
    """
    directory = Path(directory)
    check_split_is_new(directory, split)
    dataset = declare_columns(dataset)
    columns = present_columns(dataset, LAYOUTS[_layout_of(dataset)])
    features = Features({name: dataset.features[name] for name in columns})
    with _shards(directory, split, features.arrow_schema, max_shard_size) as write:
        start = 0
        total = None if keep is None else len(keep)
        for table in _with_progress(_arrow_batches(dataset, columns, size=100), "Writing", total):
            rows = table.num_rows
            if keep is not None:
                kept = keep[start : start + rows]
                if len(kept) < rows:
                    raise ValueError(
                        f"Found more than {len(keep)} rows, for which `keep` was made: inspect them anew."
                    )
                table = table.filter(pa.array(kept))
            start += rows
            if table.num_rows:
                write(embed_table_storage(table.select(columns).cast(features.arrow_schema)))
        if keep is not None and start != len(keep):
            raise ValueError(f"Found {start} rows, and not {len(keep)}, for which `keep` was made: inspect them anew.")
    return sorted(directory.glob(f"{split}-*.parquet"))
