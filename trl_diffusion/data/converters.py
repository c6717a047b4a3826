"""From the layouts in which preferences are published to the columns that the trainers read.

Each converter names one layout and checks it; nothing is guessed. Those that take a data set of the `datasets` library
return the same kind, map-style or streaming; those that read files stream on request. No image is decoded on the way.
"""

import csv
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError
from PIL import Image as PILImage
from tqdm.auto import tqdm

from .cache import fingerprint, folder_state
from .formats import HPDV3, KTO_CSV, PICKAPIC, WEBDATASET, AnyDataset, advice_for, check_dataset, known_layout
from .paths import BATCH_SIZE, check_inside, inside_only, stored_image


PAIRED = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
UNPAIRED = Features({"prompt": Value("string"), "image": Image(), "label": Value("bool")})

Path_ = str | os.PathLike


# ---- What the converters share --------------------------------------------------------------------------------------


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"Found {name}={value!r}, expected one of {list(choices)}.")


def _check_columns(dataset: AnyDataset, columns: Sequence[str], layout: str) -> None:
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"Expected a `datasets.Dataset` or `datasets.IterableDataset` in the layout of {layout}, found "
            f"{type(dataset).__name__}" + (": pick a split." if isinstance(dataset, dict) else ".")
        )
    found = dataset.column_names or list(next(iter(dataset), {}))
    missing = [name for name in columns if name not in found]
    if missing:
        known, advice = known_layout(found), "choose the converter of its layout, or rename its columns"
        # Not the converter that is asked for already.
        advice = advice if known is not None and known.title == layout else advice_for(found, advice)
        raise ValueError(
            f"The data set lacks the column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))} of {layout}: "
            f"found {sorted(found)}; {advice}."
        )


def _undecoded(dataset: AnyDataset) -> AnyDataset:
    """The data set with its images as they are stored: `{"bytes": ..., "path": ...}`."""
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset


def _transform(
    dataset: AnyDataset,
    convert: Callable[[dict[str, Any], int], list[tuple]],
    columns: Sequence[str],
    features: Features,
    image_dir: Path_ | None,
    allow_outside: bool,
) -> AnyDataset:
    """
    Applies `convert`, which turns a row and its number into any number of new rows, tuples in the order of `features`.

    Only `columns` are read, and only the new columns remain. Of images see [`~data.paths.stored_image`].
    """

    def new_rows(row: dict[str, Any], index: int) -> Iterator[list]:
        for values in convert(row, index):
            yield [
                stored_image(value, image_dir, allow_outside, f"Row {index} of the data set")
                if isinstance(feature, Image)
                else value
                for value, feature in zip(values, features.values(), strict=True)
            ]

    def convert_batch(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        new = [values for row, index in zip(rows, indices, strict=True) for values in new_rows(row, index)]
        return {name: [values[i] for values in new] for i, name in enumerate(features)}

    columns = list(columns)
    dataset = _undecoded(dataset.select_columns(columns))
    options = {"batched": True, "batch_size": BATCH_SIZE, "with_indices": True, "remove_columns": columns}
    if isinstance(dataset, Dataset):
        return dataset.map(convert_batch, features=features, desc="Converting", **options)
    # Features given to `map` would only be declared: `cast` also has the images decoded when a row is read.
    return dataset.map(convert_batch, **options).cast(features)


def _from_rows(rows: Callable[..., Iterator[dict]], features: Features, streaming: bool, state: Any, **kwargs: Any):
    """
    The data set of the rows that a generator function yields.

    Args:
        rows (`Callable`): Called with `kwargs`.
        features (`Features`): Its columns.
        streaming (`bool`): Whether to read the files anew each time, instead of once into the cache.
        state: What changes when the files change; the cache is told by it.
    """
    if streaming:
        return IterableDataset.from_generator(rows, features=features, gen_kwargs=kwargs)
    name = fingerprint(rows.__qualname__, kwargs, state)
    try:
        return Dataset.from_generator(rows, features=features, gen_kwargs=kwargs, fingerprint=name)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None  # the cause says what is wrong with the file


def _columns_in_batches(dataset: AnyDataset, columns: list[str], title: str) -> Iterator[dict[str, list]]:
    """A pass over a few columns, images not among them."""
    with tqdm(desc=title, total=len(dataset) if isinstance(dataset, Dataset) else None, unit=" rows") as bar:
        for batch in dataset.select_columns(columns).with_format(None).iter(batch_size=10_000):
            yield batch
            bar.update(len(batch[columns[0]]))


@contextmanager
def _utf8(file: Path_, newline: str | None = None) -> Iterator[TextIO]:
    """Opens a text file, with or without the byte order mark that editors of Windows write."""
    try:
        with open(file, newline=newline, encoding="utf-8-sig") as opened:
            yield opened
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is no UTF-8 text ({error}): save it in UTF-8.") from error


def _file_of(image_dir: str, name: str, allow_outside: bool, where: str) -> str:
    """The path of an image file that is named relative to a folder."""
    if not isinstance(name, str):
        raise ValueError(f"{where} names the image file {name!r}, expected a path: fix or drop the entry.")
    path = os.path.join(image_dir, name)
    if not allow_outside:
        check_inside(path, image_dir, where)
    return path


def _file_state(path: Path_) -> tuple[str, int, int]:
    stat = os.stat(path)
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


# ---- Pick-a-Pic -----------------------------------------------------------------------------------------------------

_UIDS = ("image_0_uid", "image_1_uid")
_LABELS = ("label_0", "label_1")
_JPGS = ("jpg_0", "jpg_1")


def _verdict(row: dict[str, Any], index: int) -> float | None:
    """1 if the first image won, 0 if the second, 0.5 for a tie, None without a judgement."""
    if not row.get("has_label", True):
        return None
    labels = (row["label_0"], row["label_1"])
    if labels not in ((1, 0), (0, 1), (0.5, 0.5)):
        raise ValueError(
            f"The labels of comparison {index} are {labels[0]} and {labels[1]}, expected 1 and 0, 0 and 1, or 0.5 and "
            "0.5 for a tie: drop the row, or set its `has_label` to False."
        )
    return labels[0]


def _judgement_columns(dataset: AnyDataset) -> list[str]:
    names = dataset.column_names or list(next(iter(dataset), {}))
    return [*_LABELS, *(["has_label"] if "has_label" in names else [])]


def _row_code(row: dict[str, Any]) -> int:
    return zlib.crc32("|".join(row[uid] for uid in _UIDS).encode())


def _read_comparisons(dataset: AnyDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    What is known of the comparisons without their images, in memory for a few bytes per row.

    Returns:
        Verdicts `(rows,)` as [`_verdict`] gives them, NaN for None; image numbers `(rows, 2)`, equal for the same
        image; and codes `(rows,)` that tell whether a later pass meets the same rows in the same order.
    """
    columns = [*_UIDS, *_judgement_columns(dataset)]
    verdicts, codes, uids = [], [], []
    index = 0
    for batch in _columns_in_batches(dataset, columns, "Reading the comparisons"):
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        found = [_verdict(row, index + i) for i, row in enumerate(rows)]
        verdicts.append(np.array([np.nan if value is None else value for value in found], np.float32))
        codes.append(np.fromiter(map(_row_code, rows), np.uint32, len(rows)))
        uids.append(pa.array([row[uid] for row in rows for uid in _UIDS], pa.string()))
        index += len(rows)
    if not index:
        raise ValueError("The data set is empty: expected comparisons in the layout of Pick-a-Pic.")
    # As a dictionary in Arrow's memory: a Python dict of two million names would take ten times as much.
    numbers = pa.chunked_array(uids).dictionary_encode().combine_chunks().indices.to_numpy()
    return np.concatenate(verdicts), numbers.reshape(-1, 2), np.concatenate(codes)


def _liked_once(verdicts: np.ndarray, images: np.ndarray, ties: str) -> np.ndarray:
    """
    What each row of comparisons contributes: `(rows, 2)`, 0 nothing, 1 a disliked, 2 a liked image.

    An image is liked if it won at least once. It appears where it is first judged.
    """
    judged = ~np.isnan(verdicts) if ties == "both_liked" else (verdicts == 0) | (verdicts == 1)
    wins = np.stack([verdicts > 0, verdicts < 1], axis=1) & judged[:, None]
    liked = np.zeros(images.max(initial=-1) + 1, bool)
    liked[images[wins]] = True
    places = np.flatnonzero(np.repeat(judged, 2))
    numbers, first = np.unique(images.ravel()[places], return_index=True)
    contributions = np.zeros(images.size, np.uint8)
    contributions[places[first]] = 1 + liked[numbers]
    return contributions.reshape(-1, 2)


def count_pickapic(dataset: AnyDataset) -> dict[str, int]:
    """
    Counts what [`from_pickapic`] may leave out: `comparisons`, `ties` and those `without_label`.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): In the layout of Pick-a-Pic; images are not read.
    """
    _check_columns(dataset, _LABELS, PICKAPIC.title)
    columns = _judgement_columns(dataset)
    counts: Counter = Counter()
    for batch in _columns_in_batches(dataset, columns, "Counting the comparisons"):
        for values in zip(*batch.values(), strict=True):
            counts[_verdict(dict(zip(batch, values, strict=True)), counts.total())] += 1
    return {"comparisons": counts.total(), "ties": counts[0.5], "without_label": counts[None]}


def from_pickapic(
    dataset: AnyDataset,
    *,
    layout: Literal["paired", "unpaired"] = "paired",
    ties: Literal["drop", "both_liked", "error"] = "drop",
    image_dir: Path_ | None = None,
    allow_outside: bool = False,
) -> AnyDataset:
    """
    Converts [Pick-a-Pic](https://huggingface.co/papers/2305.01569) v1 or v2.

    Its columns, of which others are ignored: `caption`; `jpg_0` and `jpg_1`, the bytes of two images (`binary`, or an
    image column); `label_0` and `label_1`, 1 for the preferred image, 0 for the other, 0.5 and 0.5 for a tie;
    unpaired, `image_0_uid` and `image_1_uid`; optionally `has_label`, False in rows that hold no judgement and are
    left out. (Read from the data card of v1; v2 has the same columns in all code that we have seen read it.)

    Unpaired, each image appears once, where it is first judged, and is liked if it was preferred at least once in all
    comparisons that it took part in, the rule of [Diffusion-KTO](https://huggingface.co/papers/2404.04465). (How its
    authors counted ties is not known.) The labels are collected in a first pass over the data, in about 100 bytes per
    comparison, before this function returns; a stream is thus read twice, and has to come in the same order again.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            One split.
        layout (`str`, *optional*, defaults to `"paired"`):
            `"paired"`: columns `prompt, chosen, rejected`; `"unpaired"`: `prompt, image, label`.
        ties (`str`, *optional*, defaults to `"drop"`):
            `"drop"` leaves ties out; `"both_liked"`, unpaired only, counts a tie as a win of both; `"error"` refuses
            them.
        image_dir (`str` or `os.PathLike`, *optional*):
            Folder in which image files must lie that rows name instead of holding their bytes, symlinks resolved.
            Without, rows must hold the bytes, or name what the `datasets` library downloaded.
        allow_outside (`bool`, *optional*, defaults to `False`):
            Whether rows may name any file.

    Returns:
        The same kind of data set as `dataset`.

    Raises:
        `TypeError`: if `dataset` is no data set.
        `ValueError`: if a column is missing, an option is unknown, a row has other labels or, with `ties="error"`, is
            a tie (both when that row is read); or if a stream comes in another order the second time.
    """
    _check_choice("layout", layout, ("paired", "unpaired"))
    _check_choice("ties", ties, ("drop", "both_liked", "error"))
    if ties == "both_liked" and layout == "paired":
        raise ValueError(
            "Found ties='both_liked' with layout='paired', where a tie has no winner: choose layout='unpaired', or "
            "ties='drop'."
        )
    uids = _UIDS if layout == "unpaired" else ()
    _check_columns(dataset, [*PICKAPIC.columns, *uids], PICKAPIC.title)
    judgement = _judgement_columns(dataset)

    def check_tie(index: int) -> None:
        if ties == "error":
            raise ValueError(f"Comparison {index} is a tie: choose ties='drop' or, unpaired, ties='both_liked'.")

    if layout == "paired":

        def pair(row: dict[str, Any], index: int) -> list[tuple]:
            verdict = _verdict(row, index)
            if verdict == 0.5:
                check_tie(index)
            if verdict is None or verdict == 0.5:
                return []
            first, second = row["jpg_0"], row["jpg_1"]
            return [(row["caption"], first, second) if verdict == 1 else (row["caption"], second, first)]

        return _transform(dataset, pair, ["caption", *_JPGS, *judgement], PAIRED, image_dir, allow_outside)

    verdicts, images, codes = _read_comparisons(dataset)
    for index in np.flatnonzero(verdicts == 0.5)[:1]:
        check_tie(int(index))
    contributions = _liked_once(verdicts, images, ties)

    def single(row: dict[str, Any], index: int) -> list[tuple]:
        if index >= len(codes) or codes[index] != _row_code(row):
            raise ValueError(
                f"Comparison {index} is another one than when the labels were collected: read the stream in one "
                "process and shuffle only what `trl-diffusion data convert` has written."
            )
        found = zip(contributions[index].tolist(), _JPGS, strict=True)
        return [(row["caption"], row[jpg], kind == 2) for kind, jpg in found if kind]

    return _transform(dataset, single, ["caption", *_JPGS, *_UIDS], UNPAIRED, image_dir, allow_outside)


# ---- The Diffusion-KTO authors' CSV ---------------------------------------------------------------------------------

KTO_SPLITS = ("exclusive_win", "intersections", "exclusive_lose")


def _kto_rows(csv_file: str) -> Iterator[dict[str, str]]:
    with _utf8(csv_file, newline="") as file:
        reader = csv.DictReader(file)
        missing = set(KTO_CSV.columns) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(
                f"{csv_file} lacks the column{'s' * (len(missing) > 1)} {', '.join(map(repr, sorted(missing)))}: "
                f"found {reader.fieldnames}, expected 'file_name', 'caption' and 'split', which is what the "
                "Diffusion-KTO authors' code reads (their README says otherwise): rename the columns."
            )
        for row in reader:
            if row["split"] not in KTO_SPLITS:
                raise ValueError(
                    f"Line {reader.line_num} of {csv_file} has the split {row['split']!r}, expected one of "
                    f"{list(KTO_SPLITS)}: fix or drop the line."
                )
            yield row


def _kto_examples(csv_file: str, image_dir: str, policy: str, allow_outside: bool) -> Iterator[dict[str, Any]]:
    liked = {"exclusive_win", "intersections"} if policy == "liked_once" else {"exclusive_win"}
    for row in _kto_rows(csv_file):
        path = _file_of(image_dir, row["file_name"], allow_outside, csv_file)
        yield {
            "prompt": row["caption"],
            "image": {"bytes": None, "path": path},
            "label": row["split"] in liked,
        }


def count_kto_csv(csv_file: Path_) -> dict[str, int]:
    """Counts the rows of each of the three splits of the Diffusion-KTO authors' CSV."""
    counts = Counter(row["split"] for row in _kto_rows(str(csv_file)))
    return {split: counts[split] for split in KTO_SPLITS}


def from_kto_csv(
    csv_file: Path_,
    image_dir: Path_,
    *,
    policy: Literal["liked_once", "liked_always"] = "liked_once",
    streaming: bool = False,
    allow_outside: bool = False,
) -> AnyDataset:
    """
    Converts the annotations that the authors of [Diffusion-KTO](https://huggingface.co/papers/2404.04465) made of
    Pick-a-Pic v2, such as `train_processed_v3.csv`.

    Their columns: `file_name`, an image file; `caption`, which may be empty; and `split`: `exclusive_win` for images
    that were only ever preferred, `exclusive_lose` for those that never were, `intersections` for the others. (Read
    from the authors' training script. Their README describes columns `file_path` and `label` instead.)

    Args:
        csv_file (`str` or `os.PathLike`):
            The CSV file.
        image_dir (`str` or `os.PathLike`):
            The folder that `file_name` is relative to. Whether the files exist is not checked here.
        policy (`str`, *optional*, defaults to `"liked_once"`):
            `"liked_once"`: images of `intersections` are liked, as in the paper (the script's `gt_label_wi_l`);
            `"liked_always"`: they are disliked (`gt_label_w_il`).
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return an `IterableDataset`.
        allow_outside (`bool`, *optional*, defaults to `False`):
            Whether images may lie outside of `image_dir`, symlinks resolved.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: with the columns `prompt, image, label`.

    Raises:
        `ValueError`: if the policy or a split is unknown, or a column is missing.
    """
    _check_choice("policy", policy, ("liked_once", "liked_always"))
    next(_kto_rows(str(csv_file)), None)  # its columns are checked now, also if the data set is streamed later
    return _from_rows(
        _kto_examples,
        UNPAIRED,
        streaming,
        _file_state(csv_file),
        csv_file=str(csv_file),
        image_dir=str(image_dir),
        policy=policy,
        allow_outside=allow_outside,
    )


# ---- HPDv2 and HPDv3 ------------------------------------------------------------------------------------------------

_JSON_GAP = re.compile(r"[\s,]*")


def _json_array(json_file: str, chunk: int = 1 << 20) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON array with their numbers, one at a time: the files are up to half a gigabyte long."""
    decoder = json.JSONDecoder()
    with _utf8(json_file) as file:
        buffer = file.read(chunk).lstrip()
        if not buffer.startswith("["):
            raise ValueError(f"{json_file} starts with {buffer[:10]!r}, expected a JSON array of objects.")
        place, index = 1, 0
        while True:
            place = _JSON_GAP.match(buffer, place).end()  # type: ignore[union-attr]  # it matches the empty string
            if buffer.startswith("]", place):
                return
            try:
                value, place = decoder.raw_decode(buffer, place)
            except json.JSONDecodeError as error:
                more = file.read(chunk)
                if not more:
                    raise ValueError(f"{json_file} is cut off or broken in its object {index}: {error}.") from error
                buffer, place = buffer[place:] + more, 0
                continue
            if not isinstance(value, dict):
                raise ValueError(f"Found {value!r} as element {index} of {json_file}, expected an object.")
            yield index, value
            index += 1


def _key(row: dict[str, Any], names: Sequence[str], where: str) -> Any:
    found = [name for name in names if name in row]
    if not found:
        raise ValueError(f"{where} has none of the keys {list(names)}: found {sorted(row)}.")
    return row[found[0]]


def _hpdv2_comparisons(json_file: str) -> Iterator[tuple[str, str, str, bool]]:
    """Prompt, better image, worse image, and whether it is a tie."""
    for index, row in _json_array(json_file):
        where = f"Object {index} of {json_file}"
        prompt = _key(row, ["prompt"], where)
        files = _key(row, ["file_path", "image_path"], where)
        if "human_preference" in row:
            costs = [-preference for preference in row["human_preference"]]
            expected = len(costs) == 2 and sorted(costs) in ([-1, 0], [0, 0], [-1, -1])
        else:
            costs = _key(row, ["human_preference", "rank"], where)
            expected = len(costs) > 1
        if len(costs) != len(files) or not expected:
            raise ValueError(
                f"{where} has {len(files)} images and the judgement {row.get('human_preference', row.get('rank'))}, "
                "expected a 1 and a 0 for two images, or a rank for each of several."
            )
        for (cost, file), (other_cost, other) in combinations(zip(costs, files, strict=True), 2):
            better, worse = (file, other) if cost <= other_cost else (other, file)
            yield prompt, better, worse, cost == other_cost


def _pair_of_files(
    prompt: str, image_dir: str, names: tuple[str, str], allow_outside: bool, where: str
) -> dict[str, Any]:
    chosen, rejected = (_file_of(image_dir, name, allow_outside, where) for name in names)
    return {
        "prompt": prompt,
        "chosen": {"bytes": None, "path": chosen},
        "rejected": {"bytes": None, "path": rejected},
    }


def _hpdv2_examples(json_file: str, image_dir: str, ties: str, allow_outside: bool) -> Iterator[dict[str, Any]]:
    for prompt, better, worse, tie in _hpdv2_comparisons(json_file):
        if tie and ties == "error":
            raise ValueError(f"{better} and {worse} of {json_file} are a tie: choose ties='drop' to leave ties out.")
        if not tie:
            yield _pair_of_files(prompt, image_dir, (better, worse), allow_outside, json_file)


def count_hpdv2(json_file: Path_) -> dict[str, int]:
    """Counts the `comparisons` of an HPDv2 annotation file and the `ties` among them."""
    counts = Counter(tie for *_, tie in _hpdv2_comparisons(str(json_file)))
    return {"comparisons": counts.total(), "ties": counts[True]}


def from_hpdv2(
    json_file: Path_,
    image_dir: Path_,
    *,
    ties: Literal["drop", "error"] = "drop",
    streaming: bool = False,
    allow_outside: bool = False,
) -> AnyDataset:
    """
    Converts the annotations of [HPD v2](https://huggingface.co/papers/2306.09341), `train.json` or `test.json`.

    Each is a JSON array. An object of `train.json` has `prompt`, two image files, and `human_preference`, 1 for the
    better one and 0 for the other; one of `test.json` has `prompt`, several image files and `rank`, the smaller the
    better, of which every two with different ranks make a pair. (Read from the data card and its authors' code. The
    files are under `file_path` or `image_path`; card and readers do not agree on it for `train.json`, so either is
    read. `raw_annotations`, the single judgements behind `rank`, are not used.)

    Args:
        json_file (`str` or `os.PathLike`):
            The annotation file; it is never in memory as a whole.
        image_dir (`str` or `os.PathLike`):
            The folder that the files are relative to. Whether they exist is not checked here.
        ties (`str`, *optional*, defaults to `"drop"`):
            `"drop"` leaves equal judgements out, `"error"` refuses them.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return an `IterableDataset`.
        allow_outside (`bool`, *optional*, defaults to `False`):
            Whether images may lie outside of `image_dir`, symlinks resolved.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: with the columns `prompt, chosen, rejected`.

    Raises:
        `ValueError`: if the file has another layout or, with `ties="error"`, a tie.
    """
    _check_choice("ties", ties, ("drop", "error"))
    next(_hpdv2_comparisons(str(json_file)), None)
    arguments = {
        "json_file": str(json_file),
        "image_dir": str(image_dir),
        "ties": ties,
        "allow_outside": allow_outside,
    }
    return _from_rows(_hpdv2_examples, PAIRED, streaming, _file_state(json_file), **arguments)


def _hpdv3_examples(json_file: str, image_dir: str, allow_outside: bool) -> Iterator[dict[str, Any]]:
    for index, row in _json_array(json_file):
        where = f"Object {index} of {json_file}"
        prompt, chosen, rejected = (_key(row, [name], where) for name in HPDV3.columns)
        yield _pair_of_files(prompt, image_dir, (chosen, rejected), allow_outside, where)


def from_hpdv3(
    json_file: Path_, image_dir: Path_, *, streaming: bool = False, allow_outside: bool = False
) -> AnyDataset:
    """
    Converts the annotations of [HPD v3](https://huggingface.co/papers/2508.03789).

    The file is a JSON array of objects with `prompt`, `path1`, the preferred image, and `path2`, the other. (Read from
    code of third parties and from the card of a successor; the original's own description of its keys could not be
    seen. Its `confidence` and `choice_dist` are not used.)

    Args:
        json_file (`str` or `os.PathLike`):
            The annotation file; it is never in memory as a whole.
        image_dir (`str` or `os.PathLike`):
            The folder that the paths are relative to. Whether the files exist is not checked here.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return an `IterableDataset`.
        allow_outside (`bool`, *optional*, defaults to `False`):
            Whether images may lie outside of `image_dir`, symlinks resolved.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: with the columns `prompt, chosen, rejected`.

    Raises:
        `ValueError`: if the file has another layout.
    """
    arguments: dict[str, Any] = {
        "json_file": str(json_file),
        "image_dir": str(image_dir),
        "allow_outside": allow_outside,
    }
    next(_hpdv3_examples(**arguments), None)
    return _from_rows(_hpdv3_examples, PAIRED, streaming, _file_state(json_file), **arguments)


# ---- Others ---------------------------------------------------------------------------------------------------------


def from_open_image_preferences(
    dataset: AnyDataset, *, image_dir: Path_ | None = None, allow_outside: bool = False
) -> AnyDataset:
    """
    Converts `data-is-better-together/open-image-preferences-v1-binarized`.

    It has the columns `prompt, chosen, rejected` already (seen in code of third parties); others are dropped. The
    annotations before they were binarized have another layout, which is not read.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            One split.
        image_dir (`str` or `os.PathLike`, *optional*):
            Folder in which image files must lie that rows name instead of holding their bytes, symlinks resolved.
            Without, rows must hold the bytes, or name what the `datasets` library downloaded.
        allow_outside (`bool`, *optional*, defaults to `False`):
            Whether rows may name any file.

    Returns:
        The same kind of data set.

    Raises:
        `TypeError`: if `dataset` is no data set.
        `ValueError`: if a column is missing or of another type.
    """
    _check_columns(dataset, list(PAIRED), "open-image-preferences")
    check_dataset(dataset, tuple(PAIRED), "open-image-preferences data set")
    return inside_only(dataset.select_columns(list(PAIRED)), image_dir, allow_outside)


_EXTENSIONS = frozenset(PILImage.registered_extensions())


def _folder_images(folder: str, allow_outside: bool) -> list[Path]:
    if not os.path.isdir(folder):
        raise ValueError(f"Found no folder {folder!r}: expected one with images and a .txt caption beside each.")
    images = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in _EXTENSIONS)
    if not images:
        raise ValueError(f"Found no image in {folder!r}: expected image files and a .txt caption beside each.")
    bare = [image for image in images if not image.with_suffix(".txt").is_file()]
    if bare:
        raise ValueError(
            f"Found no caption for {len(bare)} of {len(images)} images in {folder!r}, the first {str(bare[0])!r}: "
            f"expected {bare[0].with_suffix('.txt').name!r} beside it; an empty file stands for an empty prompt."
        )
    if not allow_outside:
        for file in (path for image in images for path in (image, image.with_suffix(".txt"))):
            check_inside(str(file), folder, f"The folder {folder!r}")
    return images


def _folder_examples(liked_dir: str, disliked_dir: str, allow_outside: bool) -> Iterator[dict[str, Any]]:
    for folder, label in ((liked_dir, True), (disliked_dir, False)):
        for path in _folder_images(folder, allow_outside):
            with _utf8(path.with_suffix(".txt")) as file:
                prompt = file.read().strip()
            yield {"prompt": prompt, "image": {"bytes": None, "path": str(path)}, "label": label}


def from_folders(
    liked_dir: Path_, disliked_dir: Path_, *, streaming: bool = False, allow_outside: bool = False
) -> AnyDataset:
    """
    Reads a folder of liked and one of disliked images, with their captions in text files beside them: `cat.png` and
    `cat.txt`. Sub-folders are read too; files that are neither are ignored.

    Args:
        liked_dir (`str` or `os.PathLike`):
            Folder of liked images.
        disliked_dir (`str` or `os.PathLike`):
            Folder of disliked images.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return an `IterableDataset`.
        allow_outside (`bool`, *optional*, defaults to `False`):
            Whether images and captions may be symlinks to files outside of their folder.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: with the columns `prompt, image, label`, liked images first,
        in the order of their names. Shuffle a stream of it.

    Raises:
        `ValueError`: if a folder is missing or without images, or an image is without a caption.
    """
    for folder in (liked_dir, disliked_dir):
        _folder_images(str(folder), allow_outside)
    state = [folder_state(str(folder)) for folder in (liked_dir, disliked_dir)]
    arguments = {"liked_dir": str(liked_dir), "disliked_dir": str(disliked_dir), "allow_outside": allow_outside}
    return _from_rows(_folder_examples, UNPAIRED, streaming, state, **arguments)


def from_scores(
    dataset: AnyDataset,
    *,
    score: str = "score",
    threshold: float | None = None,
    top: float | None = None,
    bottom: float | None = None,
    image_dir: Path_ | None = None,
    allow_outside: bool = False,
) -> AnyDataset:
    """
    Makes likes and dislikes of scored images.

    Either by a threshold: an image is liked if its score is at least `threshold`, else disliked. Or by quantiles: the
    share `top` with the highest scores is liked, the share `bottom` with the lowest disliked, the rest left out. That
    is, liked are scores of at least `numpy.quantile(scores, 1 - top)`, disliked those of at most
    `numpy.quantile(scores, bottom)`, over the whole data set, in a first pass over the scores.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            With the columns `prompt`, `image` and that of the scores.
        score (`str`, *optional*, defaults to `"score"`):
            Column of the scores.
        threshold (`float`, *optional*):
            Smallest score of a liked image.
        top (`float`, *optional*):
            Share of liked images, in (0, 1).
        bottom (`float`, *optional*):
            Share of disliked images, in (0, 1); together with `top` at most 1.
        image_dir (`str` or `os.PathLike`, *optional*):
            Folder in which image files must lie that rows name instead of holding their bytes, symlinks resolved.
            Without, rows must hold the bytes, or name what the `datasets` library downloaded.
        allow_outside (`bool`, *optional*, defaults to `False`):
            Whether rows may name any file.

    Returns:
        The same kind of data set with the columns `prompt, image, label`.

    Raises:
        `TypeError`: if `dataset` is no data set.
        `ValueError`: if neither or both ways are asked for, a share is out of range, a column is missing, a score is
            not a finite number, or scores are so often equal that one would be liked and disliked.
    """
    if (threshold is None) == (top is None and bottom is None) or (top is None) != (bottom is None):
        raise ValueError(
            f"Found threshold={threshold}, top={top} and bottom={bottom}: expected either `threshold`, or both `top` "
            "and `bottom`."
        )
    _check_columns(dataset, ["prompt", "image", score], "scored images")

    def checked(value: Any, index: int) -> float:
        if not isinstance(value, int | float) or not np.isfinite(value):
            raise ValueError(f"The {score!r} of row {index} is {value!r}, expected a finite number: drop the row.")
        return value

    if threshold is not None:
        low = high = threshold
    else:
        if top is None or bottom is None or not (0 < top < 1 and 0 < bottom < 1 and top + bottom <= 1):
            raise ValueError(f"Found top={top} and bottom={bottom}, expected shares in (0, 1) that sum to at most 1.")
        found = [np.array(b[score], object) for b in _columns_in_batches(dataset, [score], "Reading the scores")]
        values = np.array([checked(value, i) for i, value in enumerate(np.concatenate(found or [np.empty(0)]))], float)
        if not len(values):
            raise ValueError("The data set is empty: expected scored images.")
        low, high = np.quantile(values, bottom).item(), np.quantile(values, 1 - top).item()
        both = int(((values >= high) & (values <= low)).sum())
        if both:
            raise ValueError(
                f"{both} of {len(values)} scores lie both in the top {top} (at least {high}) and in the bottom "
                f"{bottom} (at most {low}): choose smaller shares, or a `threshold`."
            )

    def label(row: dict[str, Any], index: int) -> list[tuple]:
        value = checked(row[score], index)
        if value >= high:
            return [(row["prompt"], row["image"], True)]
        return [(row["prompt"], row["image"], False)] if threshold is not None or value <= low else []

    return _transform(dataset, label, ["prompt", "image", score], UNPAIRED, image_dir, allow_outside)


def from_webdataset(
    dataset: AnyDataset,
    *,
    prompt: str = "txt",
    image: str = "jpg",
    label: str = "cls",
    chosen: str | None = None,
    rejected: str | None = None,
    image_dir: Path_ | None = None,
    allow_outside: bool = False,
) -> AnyDataset:
    """
    Converts tar files in the [WebDataset](https://huggingface.co/docs/hub/datasets-webdataset) format, in which the
    files of a sample share a name and differ in what follows its first dot: `0001.jpg`, `0001.txt`, `0001.cls`.

    Preferences have no fixed names in this format, so the fields are given. `"json.caption"` is the entry `caption` of
    a field `json` (a field of the full name goes first).

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            `load_dataset("webdataset", data_files="train-*.tar", split="train", streaming=True)`.
        prompt (`str`, *optional*, defaults to `"txt"`):
            Field of the prompts.
        image (`str`, *optional*, defaults to `"jpg"`):
            Field of the images of unpaired data.
        label (`str`, *optional*, defaults to `"cls"`):
            Field of their labels: 1 or true for liked, 0 or false for disliked.
        chosen (`str`, *optional*):
            Field of the chosen images. With `rejected`, the data are pairs, and `image` and `label` are not read.
        rejected (`str`, *optional*):
            Field of the rejected images.
        image_dir (`str` or `os.PathLike`, *optional*):
            Folder in which image files must lie that rows name instead of holding their bytes, symlinks resolved.
            Without, rows must hold the bytes, or name what the `datasets` library downloaded.
        allow_outside (`bool`, *optional*, defaults to `False`):
            Whether rows may name any file.

    Returns:
        The same kind of data set, with the columns `prompt, image, label` or `prompt, chosen, rejected`.

    Raises:
        `TypeError`: if `dataset` is no data set.
        `ValueError`: if a field is missing, one of `chosen` and `rejected` is given alone, or a label is another value
            (when its row is read).
    """
    if (chosen is None) != (rejected is None):
        raise ValueError(f"Found chosen={chosen!r} and rejected={rejected!r}: expected both of them, or neither.")
    fields = [prompt, image, label] if chosen is None or rejected is None else [prompt, chosen, rejected]
    found = set(dataset.column_names or ()) if isinstance(dataset, Dataset | IterableDataset) else set()
    columns = [field if field in found else field.split(".")[0] for field in fields]
    _check_columns(dataset, columns, WEBDATASET.title)

    def read(row: dict[str, Any], field: str, column: str, index: int) -> Any:
        if field == column:
            return row[field]
        name = field.removeprefix(f"{column}.")
        if not isinstance(row[column], dict) or name not in row[column]:
            raise ValueError(f"Sample {index} has no {name!r} in its field {column!r}: found {row[column]!r}.")
        return row[column][name]

    def convert(row: dict[str, Any], index: int) -> list[tuple]:
        values = [read(row, field, column, index) for field, column in zip(fields, columns, strict=True)]
        if chosen is None:
            if values[2] not in (0, 1):
                raise ValueError(f"The label of sample {index} is {values[2]!r}, expected 0 or 1.")
            values[2] = bool(values[2])
        return [tuple(values)]

    features = UNPAIRED if chosen is None else PAIRED
    return _transform(dataset, convert, sorted(set(columns)), features, image_dir, allow_outside)
