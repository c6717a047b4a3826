"""Buckets: training images of several sizes, each image in the one whose aspect ratio is nearest to its own."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Image
from datasets.utils.file_utils import xopen
from PIL import Image as PILImage

from .cache import computed_columns, fingerprint
from .images import read_image, upright_size


Size = tuple[int, int]
"""Height and width in pixels."""


def parse_sizes(resolution: Any) -> list[Size]:
    """
    The sizes that `resolution` names.

    Args:
        resolution (`int`, `str` or a `list` of them or of pairs):
            A side of a square, `"HEIGHTxWIDTH"`, a pair `(height, width)` inside a list, or a list of these.

    Raises:
        `ValueError`: if it is none of these, or names a size twice.
    """
    entries = resolution if isinstance(resolution, Sequence) and not isinstance(resolution, str) else [resolution]
    sizes = [size for size in map(_parse_size, entries) if size is not None]
    if not entries or len(sizes) < len(entries):
        raise ValueError(
            f"Found resolution={resolution!r}, expected a side such as 512, 'HEIGHTxWIDTH' such as '832x1216', or a "
            "list of these."
        )
    twice = [size for size in sizes if sizes.count(size) > 1]
    if twice:
        raise ValueError(f"Found the size {show_size(twice[0])} twice in `resolution`: name it once.")
    return sizes


def _parse_size(entry: Any) -> Size | None:
    if isinstance(entry, str):
        match = re.fullmatch(r"(-?\d+)(?:x(-?\d+))?", entry.strip())
        return match and (int(match[1]), int(match[2] or match[1]))
    if isinstance(entry, int) and not isinstance(entry, bool):
        return entry, entry
    if isinstance(entry, list | tuple) and len(entry) == 2 and all(type(side) is int for side in entry):
        return entry[0], entry[1]
    return None


def check_size(size: Size, pipeline_class: str, multiple: int) -> None:
    """
    Checks a size against a pipeline.

    Args:
        size (`tuple[int, int]`): Height and width.
        pipeline_class (`str`): Name of the pipeline's class.
        multiple (`int`): Sides must be multiples of this many pixels.

    Raises:
        `ValueError`: if they are not.
    """
    if min(size) > 0 and not any(side % multiple for side in size):
        return
    below = [max(multiple, side // multiple * multiple) for side in size]
    above = [
        side if side > 0 and side % multiple == 0 else low + multiple for side, low in zip(size, below, strict=True)
    ]
    raise ValueError(
        f"Found resolution={show_size(size)}, expected a multiple of {multiple} for a {pipeline_class}: use "
        f"{show_size((below[0], below[1]))} or {show_size((above[0], above[1]))}."
    )


def show_size(size: Size) -> str:
    """`"512"` or `"832x1216"`: height before width."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _header_size(image: Mapping[str, Any]) -> Size:
    """Height and width as they are when the orientation is applied; nothing is decoded."""
    with (
        io.BytesIO(image["bytes"]) if image["bytes"] is not None else xopen(image["path"], "rb") as file,
        PILImage.open(file) as opened,
    ):
        return upright_size(opened)[::-1]


def image_sizes(dataset: Dataset, column: str) -> np.ndarray:
    """
    Heights and widths of the images of a column, read from their headers once and kept in the cache.

    Returns:
        `np.ndarray` of shape `(len(dataset), 2)`.

    Raises:
        `ValueError`: if an image cannot be read; names the row.
    """
    rows = dataset.select_columns(column).cast_column(column, Image(decode=False))

    def read(batch: dict[str, list]) -> dict[str, list[int]]:
        sizes = []
        for image in batch[column]:
            try:
                sizes.append(_header_size(image))
            except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError):
                sizes.append((0, 0))
        return {"height": [height for height, _ in sizes], "width": [width for _, width in sizes]}

    columns = computed_columns(rows, read, fingerprint(rows, "image sizes"), 1000, "Reading the sizes of images")
    found = columns.with_format("numpy")
    sizes = np.stack([found["height"][:], found["width"][:]], axis=1)
    for row in np.flatnonzero(sizes[:, 0] == 0).tolist():
        # Named by its row; or readable by now, where only its file has changed.
        sizes[row] = read_image(row, lambda row=row: _header_size(rows[row][column]))  # type: ignore[misc]
    return sizes


def nearest_bucket(sizes: np.ndarray, buckets: list[Size]) -> np.ndarray:
    """
    The number of each image's bucket: the nearest aspect ratio; of buckets with the same, the nearest area.

    Args:
        sizes (`np.ndarray` of shape `(images, 2)`): Heights and widths.
        buckets (`list[tuple[int, int]]`): Heights and widths.
    """
    sizes, targets = sizes.astype(np.float64), np.array(buckets, np.float64)
    ratio = np.abs(np.log(sizes[:, :1] / sizes[:, 1:]) - np.log(targets[:, 0] / targets[:, 1]))
    area = np.abs(np.log(sizes.prod(1, keepdims=True)) - np.log(targets.prod(1)))
    return np.where(ratio == ratio.min(1, keepdims=True), area, np.inf).argmin(1)


def in_whole_batches(buckets: np.ndarray, batch_size: int) -> np.ndarray:
    """
    All rows, one bucket after the other; the last batch of each is filled up with the bucket's last row.

    Args:
        buckets (`np.ndarray` of shape `(rows,)`): The number of each row's bucket.
        batch_size (`int`): Rows per batch, on all ranks together.
    """
    parts = [np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)]
    return np.concatenate([np.pad(part, (0, -len(part) % batch_size), mode="edge") for part in parts])
