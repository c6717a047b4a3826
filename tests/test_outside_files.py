"""Data from others read no file outside of their folder: each converter, each command, links and odd spellings."""

import io
import json
import os
import re
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value, load_dataset

from tests.conftest import picture
from trl_diffusion import unpair_preference_dataset
from trl_diffusion.cli import main
from trl_diffusion.cli.arguments import ScriptArguments
from trl_diffusion.cli.beta import random_rows
from trl_diffusion.data import (
    converters,
    from_folders,
    from_hpdv2,
    from_hpdv3,
    from_kto_csv,
    from_open_image_preferences,
    from_pickapic,
    from_scores,
    from_webdataset,
    select_preferred,
)
from trl_diffusion.data.paths import check_inside, inside_only


STREAMING = pytest.mark.parametrize("streaming", [False, True])
REFUSED = r"names the file .*, expected .*: if you trust the data, pass `allow_outside=True`"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder `data` with an image, beside which are a secret image and a secret text."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("data", "data2"):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "inside.png")
    picture(1).save(tmp_path / "secret.png")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path)
    (tmp_path / "data" / "inner.png").symlink_to(tmp_path / "data" / "inside.png")
    return tmp_path


# Names relative to `data`, and whether they stay inside.
NAMES = {
    "inside.png": True,
    "./inside.png": True,
    "../data/inside.png": True,
    "inner.png": True,
    "{place}/data/inside.png": True,
    "../secret.png": False,
    "{place}/secret.png": False,
    "link.png": False,
    "linked/secret.png": False,
    "../data2/inside.png": False,  # a folder whose name begins alike
    "file://{place}/secret.png": False,
    "https://example.com/a.png": False,
    "zip://a.png::{place}/secret.png": False,
}


def rows_of_files(place: Path, streaming: bool, **options):
    """By converter of files: the data set of an image with some name."""
    data = place / "data"

    def csv(name: str):
        (place / "a.csv").write_text(f"file_name,caption,split\n{name},p,exclusive_win\n")
        return from_kto_csv(place / "a.csv", data, streaming=streaming, **options)

    def hpdv2(name: str):
        row = {"prompt": "p", "human_preference": [0, 1], "file_path": ["inside.png", name]}
        (place / "a.json").write_text(json.dumps([row]))
        return from_hpdv2(place / "a.json", data, streaming=streaming, **options)

    def hpdv3(name: str):
        (place / "a.json").write_text(json.dumps([{"prompt": "p", "path1": "inside.png", "path2": name}]))
        return from_hpdv3(place / "a.json", data, streaming=streaming, **options)

    return {"kto_csv": csv, "hpdv2": hpdv2, "hpdv3": hpdv3}


@STREAMING
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("converter", ["kto_csv", "hpdv2", "hpdv3"])
def test_converters_of_files(place, converter, name, streaming):
    inside, name = NAMES[name], name.format(place=place)
    if inside:
        row = next(iter(rows_of_files(place, streaming)[converter](name)))
        assert np.array_equal(row["image" if "image" in row else "rejected"], picture(0))
        return
    with pytest.raises(ValueError, match=REFUSED):
        next(iter(rows_of_files(place, streaming)[converter](name)))
    if "://" not in name:
        assert next(iter(rows_of_files(place, streaming, allow_outside=True)[converter](name)))


@STREAMING
@pytest.mark.parametrize("link", ["image", "caption", "both"])
def test_links_in_folders(place, link, streaming):
    folder = place / "liked"
    folder.mkdir()
    for kind, suffix in (("image", "png"), ("caption", "txt")):
        if link in (kind, "both"):
            (folder / f"a.{suffix}").symlink_to(place / f"secret.{suffix}")
        else:
            picture(2).save(folder / "a.png") if kind == "image" else (folder / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match=REFUSED):
        from_folders(folder, folder, streaming=streaming)
    row = next(iter(from_folders(folder, folder, streaming=streaming, allow_outside=True)))
    assert row["prompt"] == ("mine" if link == "image" else "secret")


def test_a_link_that_is_set_while_a_stream_is_read(place):
    folder = place / "liked"
    folder.mkdir()
    picture(2).save(folder / "a.png")
    (folder / "a.txt").write_text("mine")
    stream = from_folders(folder, folder, streaming=True)
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(place / "secret.txt")
    with pytest.raises(ValueError, match=REFUSED):
        next(iter(stream))


# ---- Data sets whose rows name files --------------------------------------------------------------------------------

UNPAIRED = Features({"prompt": Value("string"), "image": Image(), "label": Value("bool")})
PAIRED = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})


def data_set(columns: dict, streaming: bool) -> Dataset:
    """As parquet from others gives it, nothing encoded again."""
    dataset = Dataset(pa.Table.from_pydict(columns))
    return dataset.to_iterable_dataset() if streaming else dataset


def by_converter(image, streaming: bool, **options):
    paired = {"chosen": [image], "rejected": [image], "prompt": ["p"]}
    uids = {"image_0_uid": ["a"], "image_1_uid": ["b"]}
    pickapic = {"caption": ["p"], "jpg_0": [image], "jpg_1": [image], "label_0": [1.0], "label_1": [0.0], **uids}
    scored = {"prompt": ["p"], "image": [image], "score": [1.0]}
    web = {"__key__": ["a"], "txt": ["p"], "cls": [1], "json": [{"image": image}]}
    preferences = Dataset(pa.Table.from_pydict(paired)).cast(PAIRED)
    preferences = preferences.to_iterable_dataset() if streaming else preferences
    return {
        "pickapic": lambda: from_pickapic(data_set(pickapic, streaming), **options),
        "pickapic, single images": lambda: from_pickapic(data_set(pickapic, streaming), layout="unpaired", **options),
        "scores": lambda: from_scores(data_set(scored, streaming), threshold=0.0, **options),
        "webdataset": lambda: from_webdataset(data_set(web, streaming), image="json.image", **options),
        "open_image_preferences": lambda: from_open_image_preferences(preferences, **options),
    }


CONVERTERS = list(by_converter({"bytes": b"", "path": "a"}, False))


def seen(dataset) -> np.ndarray:
    row = next(iter(dataset))
    return np.asarray(row["image" if "image" in row else "chosen"])


@STREAMING
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("converter", CONVERTERS)
def test_converters_of_data_sets(place, converter, as_text, streaming):
    def image(file: Path):
        return str(file) if as_text and converter != "open_image_preferences" else {"bytes": None, "path": str(file)}

    convert = lambda file, **options: by_converter(image(file), streaming, **options)[converter]()  # noqa: E731
    for file in (place / "secret.png", place / "data" / "link.png", place / "data" / ".." / "secret.png"):
        for options in ({}, {"image_dir": place / "data"}):
            with pytest.raises(ValueError, match=REFUSED):
                seen(convert(file, **options))
    with pytest.raises(ValueError, match="expected the bytes of the image"):
        seen(convert(place / "data" / "inside.png"))
    assert np.array_equal(seen(convert(place / "data" / "inside.png", image_dir=place / "data")), picture(0))
    assert np.array_equal(seen(convert(place / "secret.png", allow_outside=True)), picture(1))


@STREAMING
@pytest.mark.parametrize("converter", CONVERTERS)
def test_bytes_win_over_a_path(place, converter, streaming):
    """The `datasets` library itself reads the file where it encodes a row of a stream."""
    both = {"bytes": (place / "data" / "inside.png").read_bytes(), "path": str(place / "secret.png")}
    assert np.array_equal(seen(by_converter(both, streaming)[converter]()), picture(0))


@STREAMING
def test_bytes_win_over_a_path_in_every_function(place, streaming):
    both = {"bytes": (place / "data" / "inside.png").read_bytes(), "path": str(place / "secret.png")}
    pairs = Dataset(pa.Table.from_pydict({"prompt": ["p"], "chosen": [both], "rejected": [both]})).cast(PAIRED)
    single = Dataset(pa.Table.from_pydict({"prompt": ["p"], "image": [both], "label": [True]})).cast(UNPAIRED)
    if streaming:
        pairs, single = pairs.to_iterable_dataset(), single.to_iterable_dataset()
    for dataset in (
        unpair_preference_dataset(pairs),
        select_preferred(pairs),
        select_preferred(single),
        inside_only(single, None),
    ):
        assert np.array_equal(seen(dataset), picture(0))


def test_members_of_tar_files(place, monkeypatch):
    """Their names are not read as files of this machine."""
    data = (place / "data" / "inside.png").read_bytes()
    with tarfile.open(place / "a.tar", "w") as tar:
        for suffix, content in (("png", data), ("txt", b"p"), ("cls", b"1")):
            member = tarfile.TarInfo(f"../secret.{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for streaming in (False, True):
        # Where such a file is there, the `datasets` library itself puts its name in the place of the bytes.
        monkeypatch.chdir(place / "data")
        loaded = load_dataset("webdataset", data_files=str(place / "a.tar"), split="train", streaming=streaming)
        with pytest.raises(ValueError, match=REFUSED):
            seen(from_webdataset(loaded, image="png"))
        monkeypatch.chdir(place)
        os.utime(place / "a.tar")  # not from its cache
        loaded = load_dataset("webdataset", data_files=str(place / "a.tar"), split="train", streaming=streaming)
        assert np.array_equal(seen(from_webdataset(loaded, image="png")), picture(0))
    assert sorted(os.listdir(place)) == ["a.tar", "cache", "data", "data2", "secret.png", "secret.txt"]


def test_what_was_downloaded_is_inside(place, monkeypatch):
    (place / "cache").mkdir()
    check_inside(str(place / "cache" / "a.png"), None, "It")
    check_inside("hf://datasets/user/data@main/a.png", None, "It")
    check_inside("zip://a.png::hf://datasets/user/data/images.zip", None, "It")


# ---- Commands -------------------------------------------------------------------------------------------------------


def write_parquet_of(place: Path, file: str) -> str:
    table = pa.Table.from_pydict({"prompt": ["p"], "image": [{"bytes": None, "path": file}], "label": [True]})
    pq.write_table(Dataset(table).cast(UNPAIRED).data.table, place / "data" / "train.parquet")
    for name in ("link.png", "inner.png", "linked"):
        (place / "data" / name).unlink()
    return str(place / "data")


def test_data_commands(place, capsys):
    folder = write_parquet_of(place, str(place / "secret.png"))
    for command in ("inspect", "convert"):
        options = ["--output_dir", str(place / "out"), "--problems", "drop"] if command == "convert" else []
        run = ["data", command, "preferences", "--dataset_name", folder, *options]
        with pytest.raises(SystemExit):
            main(run)
        assert re.search(r"error: Row 0 of the data set names the file .*--allow_outside", capsys.readouterr().err)
        assert not (place / "out").exists()
        main([*run, "--allow_outside"])
    written = load_dataset(str(place / "out"), split="train")
    assert np.array_equal(seen(written), picture(1))


@STREAMING
def test_training_reads_its_own_folder(place, streaming):
    """Of `--dataset_name`; a data set that is given to a trainer in Python may name any file."""
    arguments = ScriptArguments(write_parquet_of(place, str(place / "secret.png")), dataset_streaming=streaming)
    with pytest.raises(ValueError, match=REFUSED):
        random_rows(arguments, 1, seed=0)
    arguments.allow_outside = True
    assert np.array_equal(seen(random_rows(arguments, 1, seed=0)), picture(1))


@STREAMING
def test_an_imagefolder_is_inside(place, streaming):
    (place / "data" / "metadata.jsonl").write_text('{"file_name": "inside.png", "prompt": "p", "label": true}')
    for name in ("link.png", "inner.png", "linked"):
        (place / "data" / name).unlink()
    dataset = load_dataset(str(place / "data"), split="train", streaming=streaming)
    assert np.array_equal(seen(inside_only(dataset, place / "data")), picture(0))


def test_a_stream_whose_columns_are_not_declared(place):
    row = {"prompt": "p", "image": str(place / "secret.png"), "label": True}
    (place / "a.jsonl").write_text(json.dumps(row) + "\n")
    stream = load_dataset("json", data_files=str(place / "a.jsonl"), split="train", streaming=True)
    with pytest.raises(ValueError, match=REFUSED):
        next(iter(inside_only(stream.map(lambda row: row), place / "data")))


def test_every_converter_can_be_allowed():
    for name in dir(converters):
        if name.startswith("from_"):
            assert "allow_outside" in getattr(converters, name).__kwdefaults__, name


def test_a_relative_folder_is_that_of_the_present(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "a.png").touch()
        monkeypatch.chdir(tmp_path / name)
        check_inside("data/a.png", "data", "row 0")
        with pytest.raises(ValueError, match=r"expected a file inside the folder 'data'"):
            check_inside("../one/data/../other.png", "data", "row 0")
