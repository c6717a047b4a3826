"""Data contracts: which columns a method reads, and one clear sentence where a data set does not have them.

Unpaired: `prompt, image, label`. Paired: `prompt, chosen, rejected`. Supervised: `prompt, image`. Each with an
optional `weight`. Nothing is guessed and nothing is silently converted: other layouts go through a named converter.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Image, IterableDataset, List, Value


AnyDataset: TypeAlias = Dataset | IterableDataset

COLUMN_KINDS = {
    "prompt": "string",
    "image": "image",
    "chosen": "image",
    "rejected": "image",
    "label": "bool",
    "weight": "float",
    "chosen_embedding": "vector",
    "rejected_embedding": "vector",
}
EMBEDDING_COLUMNS = ("chosen_embedding", "rejected_embedding")
REF_ERRORS = "ref_errors"
"""The column of errors that the reference made of an example's draws, shape `(draws, images)`."""


class KnownLayout(NamedTuple):
    """A layout of the data that needs a converter, and the columns by which it is recognised."""

    title: str
    columns: tuple[str, ...]
    converter: str | None
    alone: bool = False
    """Whether it has no other columns."""

    def advice(self) -> str:
        """How to get the trainers' columns."""
        if self.converter is None:
            return "load `data-is-better-together/open-image-preferences-v1-binarized` instead"
        return (
            f"convert it with `trl-diffusion data convert {self.converter}`, or in Python with "
            f"`trl_diffusion.data.from_{self.converter}`"
        )


# The converters read these columns; some read more.
PICKAPIC = KnownLayout("Pick-a-Pic", ("caption", "jpg_0", "jpg_1", "label_0", "label_1"), "pickapic")
KTO_CSV = KnownLayout("the CSV of the Diffusion-KTO authors", ("file_name", "caption", "split"), "kto_csv")
HPDV2_TRAIN = KnownLayout("HPD v2", ("prompt", "human_preference"), "hpdv2")
HPDV2_TEST = KnownLayout("the test set of HPD v2", ("prompt", "rank"), "hpdv2")
HPDV3 = KnownLayout("HPD v3", ("prompt", "path1", "path2"), "hpdv3")
WEBDATASET = KnownLayout("tar files in the WebDataset format", ("__key__", "__url__"), "webdataset")
KNOWN_LAYOUTS = (
    PICKAPIC,
    KTO_CSV,
    HPDV2_TRAIN,
    HPDV2_TEST,
    HPDV3,
    KnownLayout(
        "open-image-preferences before it was binarized", ("image_simplified_dev", "image_simplified_sd"), None
    ),
    WEBDATASET,
    KnownLayout("a folder of images without prompts", ("image", "label"), "folders", alone=True),
    KnownLayout("a folder of images without prompts", ("image",), "folders", alone=True),
)


def known_layout(names: Iterable[str]) -> KnownLayout | None:
    """The layout that the columns of a data set look like, if it is known."""
    found = set(names)
    for layout in KNOWN_LAYOUTS:
        if found == set(layout.columns) if layout.alone else found.issuperset(layout.columns):
            return layout
    return None


def advice_for(names: Iterable[str], otherwise: str) -> str:
    """How to get the trainers' columns from these, in words that end an error message."""
    layout = known_layout(names)
    return otherwise if layout is None else f"this looks like {layout.title}: {layout.advice()}"


_FIXES = {
    "image": "`dataset.cast_column({name!r}, datasets.Image())`",
    "bool": "`dataset.cast_column({name!r}, datasets.Value('bool'))` for 0/1 numbers, or map your own values to True "
    "(liked) and False (disliked)",
    "string": "make it one string per row",
    "float": "`dataset.cast_column({name!r}, datasets.Value('float32'))`",
    "vector": "make it a list of floats per row, or drop the column and it is computed",
}


def _has_kind(feature, kind: str) -> bool:
    if kind == "image":
        return isinstance(feature, Image)
    if kind == "vector":
        return isinstance(feature, List) and _has_kind(feature.feature, "float")
    dtype = feature.dtype if isinstance(feature, Value) else None
    if kind == "string":
        return dtype in ("string", "large_string")
    if kind == "float":
        return dtype is not None and dtype.startswith("float")
    return dtype == kind


def _check_features(features: Mapping, columns: list[str], what: str) -> None:
    missing = [name for name in columns if name not in features]
    if missing:
        raise ValueError(
            f"The {what} lacks the column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}: found "
            f"{sorted(features)}, expected {columns}; "
            f"{advice_for(features, 'rename with `dataset.rename_column(old, new)`')}."
        )
    for name in columns:
        kind = COLUMN_KINDS[name]
        if not _has_kind(features[name], kind):
            raise ValueError(
                f"Column {name!r} of the {what} is {features[name]}, expected {kind}: "
                f"{_FIXES[kind].format(name=name)}."
            )


def present_columns(dataset: AnyDataset, required: tuple[str, ...]) -> list[str]:
    """The columns to read: the required ones and, where there is one, `weight`. The others are not even decoded."""
    optional = ["weight"] if dataset.column_names and "weight" in dataset.column_names else []
    return [*required, *optional]


def check_dataset(dataset: AnyDataset, required: tuple[str, ...], what: str) -> None:
    """
    Checks a data set against a contract, before anything is trained.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The data set.
        required (`tuple[str, ...]`): The method's columns.
        what (`str`): Its name in error messages, e.g. `"training data set"`.

    Raises:
        `TypeError`: if it is not a data set of the `datasets` library.
        `ValueError`: if it is empty, a column is missing or has another type, a value is None, or a weight is no
            weight. Of a streaming data set only the declared columns can be checked here; its rows are checked as they
            come.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"The {what} must be a `datasets.Dataset` or `datasets.IterableDataset`, found {type(dataset).__name__}"
            + (": pick a split, for example `dataset['train']`." if isinstance(dataset, dict) else ".")
        )
    if isinstance(dataset, IterableDataset):
        _check_features(dataset.features or {}, present_columns(dataset, required), what)
        return
    if len(dataset) == 0:
        raise ValueError(f"The {what} is empty: expected at least one row with the columns {list(required)}.")
    columns = present_columns(dataset, required)
    _check_features(dataset.features, columns, what)
    table = dataset.select_columns(columns).with_format("arrow")
    for name in columns:
        nulls = [
            start + int(np.flatnonzero(batch[name].is_null().to_numpy(zero_copy_only=False))[0])
            for start, batch in _arrow_batches(table)
            if batch[name].null_count
        ]
        if nulls:
            raise ValueError(
                f"Column {name!r} of the {what} is None in row {nulls[0]}: give it a value, or drop such rows with "
                f"`dataset.filter(lambda row: row[{name!r}] is not None)`."
            )
    if "weight" in columns:
        weights = read_weights(dataset)
        wrong = np.flatnonzero(~((weights >= 0) & (weights < np.inf)))
        if len(wrong):
            raise ValueError(_wrong_weight(weights[wrong[0]], int(wrong[0]), what))
        if not weights.any():
            raise ValueError(
                f"All {len(weights)} weights of the {what} are 0, which leaves every row out: give a positive "
                "`weight` to the rows that count."
            )


def _wrong_weight(weight: float, row: int, what: str) -> str:
    return (
        f"The `weight` in row {row} of the {what} is {weight:g}, expected a finite number that is not negative: it is "
        "a factor on the row's loss, and 0 leaves the row out."
    )


def weighted_rows(dataset: Dataset) -> Dataset:
    """The rows of a checked data set whose `weight` is not 0; all of them where there is no such column."""
    if "weight" not in dataset.column_names:
        return dataset
    weights = read_weights(dataset)
    return dataset if weights.all() else dataset.select(np.flatnonzero(weights))


def declare_columns(dataset: AnyDataset) -> AnyDataset:
    """
    Declares the columns of a stream that declares none, as every stream does after `map`.

    The first row tells which of the contract's columns there are; their types are the contract's.
    """
    if not isinstance(dataset, IterableDataset) or dataset.features is not None:
        return dataset
    types = {"string": Value("string"), "image": Image(), "bool": Value("bool"), "float": Value("float32")}
    types["vector"] = List(Value("float32"))
    first: Mapping = next(iter(dataset), {})
    names = [name for name in first if name in COLUMN_KINDS]
    if first and "image" not in {COLUMN_KINDS[name] for name in names}:
        expected = "an image column of the trainers: 'image', or 'chosen' and 'rejected'"
        raise ValueError(
            f"Found the columns {sorted(first)}, expected {expected}; "
            f"{advice_for(first, 'rename with `dataset.rename_column(old, new)`')}."
        )
    check_row(first, names, 0)
    return dataset.select_columns(names).cast(datasets.Features({name: types[COLUMN_KINDS[name]] for name in names}))


def _arrow_batches(table: Dataset, size: int = 100_000):
    for start in range(0, len(table), size):
        yield start, table[start : start + size]


def read_labels(dataset: Dataset) -> np.ndarray:
    """The `label` column as a bool array of shape `(len(dataset),)`, in one pass and without decoding an image."""
    column = dataset.select_columns("label").with_format("arrow")
    return np.concatenate([pc.cast(b["label"], "bool").to_numpy() for _, b in _arrow_batches(column)])


def read_weights(dataset: Dataset) -> np.ndarray:
    """The `weight` column, as [`read_labels`] reads labels."""
    column = dataset.select_columns("weight").with_format("arrow")
    return np.concatenate([pc.cast(b["weight"], "double").to_numpy() for _, b in _arrow_batches(column)])


def check_row(row: Mapping, columns: list[str], index: int) -> None:
    """The check of [`check_dataset`] for one row of a stream: a wrong or missing value is named by its row."""
    kinds = {"string": str, "bool": bool, "float": float, "vector": list}
    for name in columns:
        kind = COLUMN_KINDS[name]
        value = row.get(name)
        if value is None or (kind in kinds and not isinstance(value, kinds[kind])):
            raise ValueError(f"Column {name!r} is {value!r} in row {index}, expected {kind}.")
        if name == "weight" and not 0 <= value < np.inf:
            raise ValueError(_wrong_weight(value, index, "stream"))


def unpair_preference_dataset(dataset: AnyDataset) -> AnyDataset:
    """
    Turns pairs into single images: each row `prompt, chosen, rejected` becomes a liked and a disliked row.

    The images of a map-style data set are not decoded. The counterpart of TRL's function of the same name.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Paired preferences, with an optional `weight` that both rows inherit.

    Returns:
        The same kind of data set with the columns `prompt, image, label` (and `weight`), twice as long: the two images
        of a pair stand next to each other, the chosen one first.

    Raises:
        `ValueError`: if a column of the paired contract is missing.
    """
    dataset = declare_columns(dataset)
    columns = present_columns(dataset, ("prompt", "chosen", "rejected"))
    _check_features(dataset.features or {}, columns, "paired data set")
    if isinstance(dataset, Dataset):  # rows have other numbers afterwards
        check_dataset(dataset, ("prompt", "chosen", "rejected"), "paired data set")
    kept = [name for name in columns if name not in ("chosen", "rejected")]
    raw = dataset.select_columns(columns)
    if isinstance(dataset, Dataset):  # a stream would hand out images undecoded for good
        for name in ("chosen", "rejected"):
            raw = raw.cast_column(name, Image(decode=False))

    def unpair(batch: dict[str, list]) -> dict[str, list]:
        pairs = list(zip(batch["chosen"], batch["rejected"], strict=True))
        rows = {name: [value for value in batch[name] for _ in range(2)] for name in kept}
        return rows | {"image": [image for pair in pairs for image in pair], "label": [True, False] * len(pairs)}

    features = datasets.Features(
        {name: dataset.features[name] for name in kept} | {"image": Image(), "label": Value("bool")}
    )
    return raw.map(unpair, batched=True, remove_columns=["chosen", "rejected"], features=features)


def select_preferred(dataset: AnyDataset) -> AnyDataset:
    """
    What supervised fine-tuning may learn from: the chosen images of pairs, the liked ones of labelled images.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Paired (`prompt, chosen, rejected`), unpaired (`prompt, image, label`) or supervised (`prompt, image`)
            data, with an optional `weight`.

    Returns:
        The same kind of data set with the columns `prompt, image` (and `weight`); supervised data as it is.

    Raises:
        `ValueError`: if a column of the contract is missing or has another type, or no image is liked.
    """
    dataset = declare_columns(dataset)
    names = set(getattr(dataset, "column_names", None) or ())
    if {"chosen", "rejected"} <= names:
        check_dataset(dataset, ("prompt", "chosen"), "paired data set")
        return dataset.select_columns(present_columns(dataset, ("prompt", "chosen"))).rename_column("chosen", "image")
    if "label" not in names:
        return dataset
    check_dataset(dataset, ("prompt", "image", "label"), "labelled data set")
    columns = present_columns(dataset, ("prompt", "image"))
    if isinstance(dataset, IterableDataset):
        features = dataset.features
        return dataset.filter(lambda label: label, input_columns="label").cast(features).select_columns(columns)
    liked = np.flatnonzero(read_labels(dataset))
    if not len(liked):
        raise ValueError(
            f"All {len(dataset)} labels of the data set are False, expected liked images (True): supervised "
            "fine-tuning learns from nothing else."
        )
    return dataset.select(liked).select_columns(columns)


def check_paired(dataset: AnyDataset, what: str, trainer: str) -> None:
    """
    Refuses what is not paired, with the way out for single images with a label.

    Raises:
        `ValueError`: if the data set has a `label` and no pairs.
    """
    names = set(getattr(dataset, "column_names", None) or ())
    if "label" in names and not {"chosen", "rejected"} & names:
        raise ValueError(
            f"The {what} is unpaired: found {sorted(names)}, expected prompt, chosen and rejected for {trainer}; "
            "single images with a label are what `DiffusionKTOTrainer` trains on."
        )
