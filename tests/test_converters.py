"""Published layouts become the trainers' columns: known answers on small files, and properties against brute force."""

import csv
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Image, IterableDataset, Value, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from tests.conftest import picture, unpaired
from trl_diffusion.cli import data as cli_data
from trl_diffusion.cli import main
from trl_diffusion.data import (
    from_folders,
    from_hpdv2,
    from_hpdv3,
    from_kto_csv,
    from_open_image_preferences,
    from_pickapic,
    from_scores,
    from_webdataset,
    inspect_dataset,
    inspection,
    write_parquet,
)
from trl_diffusion.data.converters import _json_array, _liked_once, count_hpdv2, count_kto_csv, count_pickapic
from trl_diffusion.data.formats import check_dataset, declare_columns


PAIRED, UNPAIRED = ("prompt", "chosen", "rejected"), ("prompt", "image", "label")
STREAMING = pytest.mark.parametrize("streaming", [False, True])


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "png")
    return buffer.getvalue()


PNGS = [png(i) for i in range(8)]


def number(image) -> int:
    """Which of the test's pictures it is."""
    return next(i for i in range(8) if np.array_equal(np.asarray(image), np.asarray(picture(i))))


def unpaired_rows(dataset) -> list[tuple]:
    check_dataset(dataset, UNPAIRED, "converted data set")
    return [(row["prompt"], number(row["image"]), row["label"]) for row in dataset]


def paired_rows(dataset) -> list[tuple]:
    check_dataset(dataset, PAIRED, "converted data set")
    return [(row["prompt"], number(row["chosen"]), number(row["rejected"])) for row in dataset]


def kind(streaming: bool) -> type:
    return IterableDataset if streaming else Dataset


# ---- Pick-a-Pic -----------------------------------------------------------------------------------------------------

COMPARISONS = [
    # prompt, first image, second image, label of the first
    ("cat", 0, 1, 1.0),
    ("cat", 1, 2, 0.5),
    ("cat", 2, 0, 1.0),
    ("dog", 3, 4, 0.0),
    ("dog", 5, 6, 0.5),
]


def pickapic(comparisons=COMPARISONS, **columns) -> Dataset:
    """The columns of the data card that count, and one that does not."""
    prompts, first, second, labels = zip(*comparisons, strict=True)
    return Dataset.from_dict(
        {
            "caption": prompts,
            "jpg_0": [PNGS[i] for i in first],
            "jpg_1": [PNGS[i] for i in second],
            "image_0_uid": [f"uid-{i}" for i in first],
            "image_1_uid": [f"uid-{i}" for i in second],
            "label_0": labels,
            "label_1": [1 - label for label in labels],
            "model_0": ["some model"] * len(comparisons),
            **columns,
        }
    )


@STREAMING
def test_pickapic_pairs(streaming):
    source = pickapic()
    assert source.features["jpg_0"] == Value("binary")
    dataset = from_pickapic(source.to_iterable_dataset() if streaming else source)
    assert isinstance(dataset, kind(streaming))
    assert set(dataset.column_names) == set(PAIRED)
    assert paired_rows(dataset) == [("cat", 0, 1), ("cat", 2, 0), ("dog", 4, 3)]
    stored = dataset.cast_column("chosen", Image(decode=False))
    assert next(iter(stored))["chosen"]["bytes"] == PNGS[0]  # the file itself, not a picture saved again


@STREAMING
def test_pickapic_single_images(streaming):
    source = pickapic().to_iterable_dataset(num_shards=2) if streaming else pickapic()
    dataset = from_pickapic(source, layout="unpaired")
    assert isinstance(dataset, kind(streaming))
    # 0 lost to 2, but won against 1; 2 won, whatever the tie; 5 and 6 were in a tie only.
    expected = [("cat", 0, True), ("cat", 1, False), ("cat", 2, True), ("dog", 3, False), ("dog", 4, True)]
    assert unpaired_rows(dataset) == expected
    assert unpaired_rows(dataset) == expected  # and again in a second epoch
    both = from_pickapic(source, layout="unpaired", ties="both_liked")
    likes = {image: label for _, image, label in unpaired_rows(both)}
    assert likes == {0: True, 1: True, 2: True, 3: False, 4: True, 5: True, 6: True}


def test_pickapic_with_image_columns_and_unlabelled_rows():
    source = pickapic(has_label=[True, True, False, True, True]).cast_column("jpg_0", Image())
    assert paired_rows(from_pickapic(source)) == [("cat", 0, 1), ("dog", 4, 3)]
    assert count_pickapic(source) == {"comparisons": 5, "ties": 2, "without_label": 1}
    likes = {image: label for _, image, label in unpaired_rows(from_pickapic(source, layout="unpaired"))}
    assert likes == {0: True, 1: False, 3: False, 4: True}


comparison = st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0, None]))


@settings(max_examples=300, deadline=None)
@given(st.lists(comparison, min_size=1, max_size=12), st.sampled_from(["drop", "both_liked"]))
def test_liked_once_against_brute_force(comparisons, ties):
    verdicts = np.array([np.nan if verdict is None else verdict for *_, verdict in comparisons], np.float32)
    images = np.array([[first, second] for first, second, _ in comparisons])
    wins, order = {}, []
    for row, (first, second, verdict) in enumerate(comparisons):
        if verdict is None or (verdict == 0.5 and ties == "drop"):
            continue
        for side, (image, won) in enumerate(((first, verdict > 0), (second, verdict < 1))):
            if image not in wins:
                order.append((row, side, image))
            wins[image] = wins.get(image, False) or won
    expected = np.zeros((len(comparisons), 2), int)
    for row, side, image in order:
        expected[row, side] = 2 if wins[image] else 1
    np.testing.assert_array_equal(_liked_once(verdicts, images, ties), expected)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=9)
)
def test_pairs_against_brute_force(comparisons):
    source = pickapic([("p", *comparison) for comparison in comparisons])
    expected = [("p", *((a, b) if label == 1 else (b, a))) for a, b, label in comparisons if label != 0.5]
    assert [
        (row["prompt"], PNGS.index(row["chosen"]["bytes"]), PNGS.index(row["rejected"]["bytes"]))
        for row in from_pickapic(source.to_iterable_dataset())
        .cast_column("chosen", Image(decode=False))
        .cast_column("rejected", Image(decode=False))
    ] == expected
    assert count_pickapic(source)["ties"] == len(comparisons) - len(expected)


@STREAMING
@pytest.mark.parametrize("layout", ["paired", "unpaired"])
def test_pickapic_refuses_ties_on_request(layout, streaming):
    source = pickapic().to_iterable_dataset() if streaming else pickapic()
    with pytest.raises(ValueError, match=r"Comparison 1 is a tie: choose ties='drop'"):
        list(from_pickapic(source, layout=layout, ties="error"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ties": "both_liked"}, "ties='both_liked' with layout='paired'.*choose layout='unpaired'"),
        ({"ties": "first"}, r"Found ties='first', expected one of \['drop', 'both_liked', 'error'\]"),
        ({"layout": "single"}, r"Found layout='single', expected one of \['paired', 'unpaired'\]"),
    ],
)
def test_pickapic_options(options, message):
    with pytest.raises(ValueError, match=message):
        from_pickapic(pickapic(), **options)


def test_pickapic_refuses_other_columns_and_labels():
    with pytest.raises(ValueError, match=r"lacks the columns 'jpg_0', 'jpg_1' of Pick-a-Pic: found .*'caption'"):
        from_pickapic(pickapic().remove_columns(["jpg_0", "jpg_1"]))
    with pytest.raises(TypeError, match=r"found DatasetDict: pick a split"):
        from_pickapic(datasets.DatasetDict(train=pickapic()))
    wrong = pickapic().remove_columns("label_1").add_column("label_1", [1.0] * 5)
    with pytest.raises(ValueError, match=r"labels of comparison 0 are 1.0 and 1.0, expected 1 and 0"):
        from_pickapic(wrong)


def test_pickapic_advises_no_converter_that_is_used_already():
    with pytest.raises(ValueError, match=r"lacks the column 'image_0_uid' of Pick-a-Pic: found .*; choose the conv"):
        from_pickapic(pickapic().remove_columns("image_0_uid"), layout="unpaired")


def test_pickapic_stream_in_another_order():
    stream = from_pickapic(pickapic().to_iterable_dataset(num_shards=5), layout="unpaired")
    with pytest.raises(ValueError, match=r"Comparison \d is another one than when the labels were collected"):
        list(stream.shuffle(seed=1, buffer_size=1))


# ---- The Diffusion-KTO authors' CSV ---------------------------------------------------------------------------------


@pytest.fixture
def image_dir(tmp_path) -> Path:
    """`train/0.png` and so on, as the authors arrange them."""
    (tmp_path / "train").mkdir()
    for i, content in enumerate(PNGS):
        (tmp_path / "train" / f"{i}.png").write_bytes(content)
    return tmp_path


def write_csv(path: Path, rows: list[tuple], header=("file_name", "caption", "split")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


KTO_ROWS = [
    ("train/0.png", 'a "red", round apple', "exclusive_win"),
    ("train/1.png", "two\nlines", "intersections"),
    ("train/2.png", "", "exclusive_lose"),
    ("train/3.png", "äpfel", "intersections"),
]


@STREAMING
@pytest.mark.parametrize(("policy", "likes"), [("liked_once", [1, 1, 0, 1]), ("liked_always", [1, 0, 0, 0])])
def test_kto_csv(image_dir, policy, likes, streaming):
    path = write_csv(image_dir / "train_processed_v3.csv", KTO_ROWS)
    dataset = from_kto_csv(path, image_dir, policy=policy, streaming=streaming)
    assert isinstance(dataset, kind(streaming))
    prompts = ['a "red", round apple', "two\nlines", "", "äpfel"]
    assert unpaired_rows(dataset) == [
        (p, i, bool(like)) for i, (p, like) in enumerate(zip(prompts, likes, strict=True))
    ]
    assert count_kto_csv(path) == {"exclusive_win": 1, "intersections": 2, "exclusive_lose": 1}


def test_kto_csv_is_read_again_when_it_changes(image_dir):
    path = write_csv(image_dir / "a.csv", KTO_ROWS)
    assert len(from_kto_csv(path, image_dir)) == 4
    write_csv(path, KTO_ROWS[:2])
    assert len(from_kto_csv(path, image_dir)) == 2


def test_kto_csv_errors(image_dir):
    readme = write_csv(image_dir / "readme.csv", KTO_ROWS, header=("file_path", "caption", "label"))
    with pytest.raises(ValueError, match=r"lacks the columns 'file_name', 'split': found \['file_path'"):
        from_kto_csv(readme, image_dir, streaming=True)
    split = write_csv(image_dir / "split.csv", [*KTO_ROWS, ("train/4.png", "p", "win")])
    with pytest.raises(ValueError, match=r"Line 7 of .*split.csv has the split 'win', expected one of"):
        list(from_kto_csv(split, image_dir, streaming=True))
    with pytest.raises(ValueError, match=r"Found policy='often', expected one of"):
        from_kto_csv(split, image_dir, policy="often")


# ---- HPDv2 and HPDv3 ------------------------------------------------------------------------------------------------


def write_json(path: Path, value) -> Path:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    return path


@STREAMING
@pytest.mark.parametrize("files", ["file_path", "image_path"])
def test_hpdv2_train(image_dir, files, streaming):
    rows = [
        {"prompt": "a", "human_preference": [1, 0], files: ["0.png", "1.png"]},
        {"prompt": "b", "human_preference": [0, 1], files: ["2.png", "3.png"]},
        {"prompt": "c", "human_preference": [0, 0], files: ["4.png", "5.png"]},
    ]
    path = write_json(image_dir / f"{files}.json", rows)
    dataset = from_hpdv2(path, image_dir / "train", streaming=streaming)
    assert isinstance(dataset, kind(streaming))
    assert paired_rows(dataset) == [("a", 0, 1), ("b", 3, 2)]
    assert count_hpdv2(path) == {"comparisons": 3, "ties": 1}
    with pytest.raises(ValueError, match="are a tie: choose ties='drop'"):
        list(from_hpdv2(path, image_dir / "train", ties="error", streaming=True))


def test_hpdv2_test(image_dir):
    """The smaller the rank, the better; every two images make a pair."""
    row = {"prompt": "a", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 1, 2], "raw_annotations": []}
    path = write_json(image_dir / "test.json", [row])
    assert paired_rows(from_hpdv2(path, image_dir / "train")) == [("a", 1, 0), ("a", 1, 2)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "file_path": ["0", "1"]},
            r"Object 0 of .* has none of the keys \['human_preference', 'rank'\]",
        ),
        ({"prompt": "a", "rank": [1, 2]}, r"has none of the keys \['file_path', 'image_path'\]"),
        ({"prompt": "a", "file_path": ["0", "1"], "human_preference": [1]}, "has 2 images and the judgement"),
        ({"prompt": "a", "file_path": ["0", "1"], "human_preference": [2, 0]}, "expected a 1 and a 0 for two images"),
        ([1], r"Found \[1\] as element 0 of .*, expected an object"),
    ],
)
def test_hpdv2_errors(tmp_path, row, message):
    path = write_json(tmp_path / "train.json", [row])
    with pytest.raises(ValueError, match=message):
        from_hpdv2(path, tmp_path)


@STREAMING
def test_hpdv3(image_dir, streaming):
    row = {
        "path1": "train/1.png",
        "path2": "train/0.png",
        "prompt": "a",
        "model1": "x",
        "model2": "y",
        "confidence": None,
    }
    path = write_json(image_dir / "train.json", [row])
    dataset = from_hpdv3(path, image_dir, streaming=streaming)
    assert paired_rows(dataset) == [("a", 1, 0)]
    write_json(path, [{"prompt": "a", "path1": "train/1.png"}])
    with pytest.raises(ValueError, match=r"none of the keys \['path2'\]"):
        from_hpdv3(path, image_dir)


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), nested, max_size=3), max_size=6),
    st.integers(2, 30),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_json_arrays_are_read_in_pieces(tmp_path_factory, rows, chunk, indent, ascii_only):
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert [row for _, row in _json_array(str(path), chunk)] == rows


def test_broken_json(tmp_path):
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"lines.json starts with .*, expected a JSON array"):
        from_hpdv3(tmp_path / "lines.json", tmp_path)
    (tmp_path / "cut.json").write_text('[{"prompt": "a", "path1": "0", "path2": "1"}, {"prompt": "b"')
    with pytest.raises(ValueError, match=r"cut off or broken in its object 1"):
        from_hpdv3(tmp_path / "cut.json", tmp_path)


# ---- Others ---------------------------------------------------------------------------------------------------------


@STREAMING
def test_open_image_preferences(streaming):
    columns = {"prompt": ["a"], "chosen": [picture(0)], "rejected": [picture(1)], "category": ["Anime"]}
    kinds = {"prompt": Value("string"), "chosen": Image(), "rejected": Image(), "category": Value("string")}
    source = Dataset.from_dict(columns, features=Features(kinds))
    dataset = from_open_image_preferences(source.to_iterable_dataset() if streaming else source)
    assert set(dataset.column_names) == set(PAIRED)
    assert paired_rows(dataset) == [("a", 0, 1)]
    with pytest.raises(ValueError, match=r"lacks the column 'chosen' of open-image-preferences"):
        from_open_image_preferences(source.remove_columns("chosen"))


@STREAMING
def test_folders(tmp_path, streaming):
    for name, i in (("liked/b", 1), ("liked/sub/a", 0), ("disliked/c", 2)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".png").write_bytes(PNGS[i])
        path.with_suffix(".txt").write_text(f"caption of {i}\n")
    (tmp_path / "liked" / "notes.md").write_text("ignored")
    dataset = from_folders(tmp_path / "liked", tmp_path / "disliked", streaming=streaming)
    assert isinstance(dataset, kind(streaming))
    assert unpaired_rows(dataset) == [("caption of 1", 1, True), ("caption of 0", 0, True), ("caption of 2", 2, False)]


MARK = b"\xef\xbb\xbf"


@STREAMING
def test_a_byte_order_mark_is_no_part_of_the_text(image_dir, streaming):
    """Editors of Windows write it; it would become the first token of a prompt, or part of a column's name."""
    (image_dir / "train" / "0.txt").write_bytes(MARK + b"a cat")
    for i in range(1, len(PNGS)):
        (image_dir / "train" / f"{i}.txt").write_bytes(b"a dog")
    folders = from_folders(image_dir / "train", image_dir / "train", streaming=streaming)
    assert next(iter(folders))["prompt"] == "a cat"
    table = write_csv(image_dir / "a.csv", KTO_ROWS)
    objects = write_json(image_dir / "a.json", [{"prompt": "p", "path1": "train/0.png", "path2": "train/1.png"}])
    for file in (table, objects):
        file.write_bytes(MARK + file.read_bytes())
    assert next(iter(from_kto_csv(table, image_dir, streaming=streaming)))["prompt"] == 'a "red", round apple'
    assert next(iter(from_hpdv3(objects, image_dir, streaming=streaming)))["prompt"] == "p"


@STREAMING
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_refused_with_the_name_of_the_file(image_dir, encoding, streaming):
    for i in range(len(PNGS)):
        (image_dir / "train" / f"{i}.txt").write_bytes("café".encode(encoding))
    with pytest.raises(ValueError, match=r"0.txt' is no UTF-8 text \(.*\): save it in UTF-8"):
        list(from_folders(image_dir / "train", image_dir / "train", streaming=streaming))
    table = image_dir / "a.csv"
    table.write_text("file_name,caption,split\ntrain/0.png,café,exclusive_win\n", encoding=encoding)
    with pytest.raises(ValueError, match=r"a.csv' is no UTF-8 text"):
        from_kto_csv(table, image_dir, streaming=streaming)
    objects = image_dir / "a.json"
    objects.write_text('[{"prompt": "café", "path1": "a", "path2": "b"}]', encoding=encoding)
    with pytest.raises(ValueError, match=r"a.json' is no UTF-8 text"):
        from_hpdv3(objects, image_dir, streaming=streaming)


def test_a_file_name_that_is_none_is_refused(image_dir):
    objects = write_json(image_dir / "a.json", [{"prompt": "p", "path1": 5, "path2": "train/1.png"}])
    with pytest.raises(ValueError, match=r"Object 0 of .*a.json names the image file 5, expected a path"):
        from_hpdv3(objects, image_dir)


def test_folder_errors(tmp_path):
    (tmp_path / "liked").mkdir()
    with pytest.raises(ValueError, match=r"Found no image in .*liked"):
        from_folders(tmp_path / "liked", tmp_path / "liked")
    (tmp_path / "liked" / "a.png").write_bytes(PNGS[0])
    with pytest.raises(ValueError, match=r"Found no caption for 1 of 1 images .*a.png': expected 'a.txt' beside it"):
        from_folders(tmp_path / "liked", tmp_path / "liked")
    (tmp_path / "liked" / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"Found no folder .*disliked"):
        from_folders(tmp_path / "liked", tmp_path / "disliked")


def scored(scores: list[float]) -> Dataset:
    return Dataset.from_dict(
        {"prompt": ["p"] * len(scores), "image": [PNGS[i % 8] for i in range(len(scores))], "aesthetic": scores}
    ).cast_column("image", Image())


@STREAMING
def test_scores(streaming):
    source = scored([5.0, 1.0, 4.0, 2.0, 3.0])
    source = source.to_iterable_dataset() if streaming else source
    by_threshold = from_scores(source, score="aesthetic", threshold=4)
    assert unpaired_rows(by_threshold) == [("p", i, i in (0, 2)) for i in range(5)]
    # The quantiles at 0.8 and 0.4 are 4.2 and 2.6.
    by_quantile = from_scores(source, score="aesthetic", top=0.2, bottom=0.4)
    assert unpaired_rows(by_quantile) == [("p", 0, True), ("p", 1, False), ("p", 3, False)]


share = st.floats(0.05, 0.5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), share, share)
def test_quantiles_against_brute_force(scores, top, bottom):
    source = scored(scores).to_iterable_dataset()
    high, low = np.quantile(scores, 1 - top), np.quantile(scores, bottom)
    if any(high <= score <= low for score in scores):
        with pytest.raises(ValueError, match="lie both in the top"):
            from_scores(source, score="aesthetic", top=top, bottom=bottom)
        return
    expected = [score >= high for score in scores if score >= high or score <= low]
    found = from_scores(source, score="aesthetic", top=top, bottom=bottom).cast_column("image", Image(decode=False))
    assert [row["label"] for row in found] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected either `threshold`, or both"),
        ({"threshold": 1, "top": 0.1, "bottom": 0.1}, "expected either `threshold`, or both"),
        ({"top": 0.1}, "expected either `threshold`, or both"),
        ({"top": 0.6, "bottom": 0.6}, "expected shares in"),
        ({"threshold": 1, "score": "beauty"}, "lacks the column 'beauty'"),
    ],
)
def test_score_options(options, message):
    with pytest.raises(ValueError, match=message):
        from_scores(scored([1.0, 2.0]), **{"score": "aesthetic"} | options)


@pytest.mark.parametrize("options", [{"threshold": 1}, {"top": 0.5, "bottom": 0.5}])
def test_scores_that_are_no_numbers(options):
    with pytest.raises(ValueError, match=r"The 'aesthetic' of row 1 is nan, expected a finite number"):
        list(from_scores(scored([1.0, float("nan")]), score="aesthetic", **options))


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            for field, content in sample.items():
                entry = tarfile.TarInfo(f"{i:04d}.{field}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def read_tar(path: Path, streaming: bool):
    return load_dataset("webdataset", data_files=str(path), split="train", streaming=streaming)


@STREAMING
def test_webdataset(tmp_path, streaming):
    samples = [{"png": PNGS[i], "txt": f"prompt {i}".encode(), "cls": str(i % 2).encode()} for i in range(3)]
    dataset = from_webdataset(read_tar(write_tar(tmp_path / "a.tar", samples), streaming), image="png")
    assert isinstance(dataset, kind(streaming))
    assert unpaired_rows(dataset) == [(f"prompt {i}", i, i == 1) for i in range(3)]


@STREAMING
def test_webdataset_with_json(tmp_path, streaming):
    samples = [{"jpg": PNGS[i], "json": json.dumps({"caption": f"p{i}", "liked": i == 0}).encode()} for i in range(2)]
    source = read_tar(write_tar(tmp_path / "a.tar", samples), streaming)
    dataset = from_webdataset(source, prompt="json.caption", label="json.liked")
    assert unpaired_rows(dataset) == [("p0", 0, True), ("p1", 1, False)]


def test_webdataset_of_pairs(tmp_path):
    samples = [{"win.png": PNGS[1], "lose.png": PNGS[0], "txt": b"p"}]
    source = read_tar(write_tar(tmp_path / "a.tar", samples), streaming=True)
    assert paired_rows(from_webdataset(source, chosen="win.png", rejected="lose.png")) == [("p", 1, 0)]
    with pytest.raises(ValueError, match=r"chosen='win.png' and rejected=None: expected both"):
        from_webdataset(source, chosen="win.png")
    # Not the advice to use the converter that is used already.
    with pytest.raises(ValueError, match=r"lacks the columns 'jpg', 'cls' of tar files .*; choose the converter of"):
        from_webdataset(source)


def test_webdataset_labels(tmp_path):
    source = read_tar(write_tar(tmp_path / "a.tar", [{"jpg": PNGS[0], "txt": b"p", "cls": b"2"}]), streaming=True)
    with pytest.raises(ValueError, match="label of sample 0 is 2, expected 0 or 1"):
        list(from_webdataset(source))


# ---- Inspection -----------------------------------------------------------------------------------------------------


def make_unpaired(rows: list[tuple]) -> Dataset:
    return Dataset.from_dict(
        {name: list(values) for name, values in zip(UNPAIRED, zip(*rows, strict=True), strict=True)},
        features=Features({"prompt": Value("string"), "image": Image(), "label": Value("bool")}),
    )


def problems(report) -> dict[str, list[int]]:
    return {name: np.flatnonzero(rows).tolist() for name, rows in report.problems.items() if rows.any()}


@STREAMING
def test_inspection_of_single_images(tmp_path, streaming):
    cut = {"bytes": PNGS[2][:-40], "path": None}
    dataset = make_unpaired(
        [
            ("cat", picture(0), True),
            ("cat", picture(0), False),  # contradicts row 0
            ("dog", picture(0), False),
            (" ", picture(1, (24, 16)), False),
            ("dog", cut, True),
            ("dog", picture(0), False),  # repeats row 2
            ("dog", {"bytes": None, "path": str(tmp_path / "missing.png")}, True),
        ]
    )
    report = inspect_dataset(dataset.to_iterable_dataset() if streaming else dataset)
    assert (report.layout, report.rows, report.liked, report.prompts) == ("unpaired", 7, 3, 3)
    assert (report.images, report.different_images) == (7, 4)
    assert report.sizes == {(16, 16): 4, (24, 16): 1}
    assert problems(report) == {
        "contradiction": [0, 1],
        "empty_prompt": [3],
        "broken_image": [4, 6],
        "duplicate_row": [5],
    }
    assert report.first_rows[0] == {"prompt": "cat", "image": "16 x 16 PNG", "label": "liked"}
    assert report.keep(["broken_image", "duplicate_row"]).tolist() == [True, True, True, True, False, False, False]
    assert problems(inspect_dataset(dataset, decode=False))["broken_image"] == [6]


def test_inspection_of_pairs():
    pairs = [(0, 1), (1, 0), (2, 2), (0, 1), (0, 3)]
    columns = {
        "prompt": ["cat"] * 5,
        "chosen": [picture(a) for a, _ in pairs],
        "rejected": [picture(b) for _, b in pairs],
    }
    kinds = {"prompt": Value("string"), "chosen": Image(), "rejected": Image()}
    report = inspect_dataset(Dataset.from_dict(columns, features=Features(kinds)))
    assert (report.layout, report.liked, report.images, report.different_images) == ("paired", None, 10, 4)
    assert problems(report) == {"identical_pair": [2], "contradiction": [0, 1, 3], "duplicate_row": [3]}


row = st.tuples(st.sampled_from(["", "a", "b"]), st.integers(0, 2), st.booleans())


@settings(max_examples=40, deadline=None)
@given(st.lists(row, min_size=1, max_size=10))
def test_contradictions_and_repetitions_against_brute_force(rows):
    images = [{"bytes": PNGS[i], "path": None} for _, i, _ in rows]
    report = inspect_dataset(make_unpaired([(p, im, y) for (p, _, y), im in zip(rows, images, strict=True)]))
    expected = {
        "empty_prompt": [i for i, (prompt, _, _) in enumerate(rows) if not prompt],
        "contradiction": [i for i, (p, image, label) in enumerate(rows) if (p, image, not label) in rows],
        "duplicate_row": [i for i, current in enumerate(rows) if current in rows[:i]],
    }
    assert problems(report) == {name: places for name, places in expected.items() if places}


def test_what_training_does_to_the_images_is_counted():
    clear = picture(0).convert("RGBA")
    clear.putpixel((3, 4), (1, 2, 3, 254))
    turned = PILImage.Exif()
    turned[0x0112] = 6
    animation, upright = io.BytesIO(), io.BytesIO()
    picture(1).save(animation, "png", save_all=True, append_images=[picture(2)])
    picture(3, (20, 40)).save(upright, "png", exif=turned)
    images = [clear, picture(0).convert("RGBA"), animation.getvalue(), upright.getvalue(), picture(4, (16, 17))]
    rows = [("a", {"bytes": i, "path": None} if isinstance(i, bytes) else i, True) for i in images]
    report = inspect_dataset(make_unpaired(rows))
    assert (report.transparent, report.animated) == (1, 1)
    assert report.sizes == {(16, 16): 3, (40, 20): 1, (16, 17): 1}
    # A square keeps half of the wide image and 16/17 of the last one.
    assert report.cropped([(16, 16)]) == 1
    assert report.cropped([(16, 16)], share=0.05) == 2
    assert report.cropped([(16, 16), (16, 32)]) == 0
    assert [report.upscaled(buckets) for buckets in ([(16, 16)], [(17, 17)], [(16, 16), (24, 48)])] == [0, 4, 1]
    report = inspect_dataset(make_unpaired(rows), decode=False)
    assert (report.transparent, report.animated) == (None, 1)


RAW = {
    "pickapic": [{"caption": "p", "jpg_0": b"", "jpg_1": b"", "label_0": 1.0, "label_1": 0.0, "image_0_uid": "a"}],
    "kto_csv": [{"file_name": "a.png", "caption": "p", "split": "exclusive_win", "seed": 1}],
    "hpdv2": [
        {"prompt": "p", "human_preference": [0, 1], "image_path": ["a", "b"]},
        {"prompt": "p", "rank": [1, 2], "image_path": ["a", "b"], "user_hash": "c"},
    ],
    "hpdv3": [{"prompt": "p", "path1": "a.png", "path2": "b.png", "confidence": 0.9}],
    "webdataset": [{"__key__": "a", "__url__": "b", "jpg": b"", "txt": "p"}],
    "folders": [{"image": PNGS[0], "label": True}, {"image": PNGS[0]}],
}
DECLARED = pytest.mark.parametrize("declared", ["map", "stream", "stream without declared columns"])


@DECLARED
@pytest.mark.parametrize("layout", RAW)
def test_a_known_layout_is_recognised(layout, declared):
    expected = rf"this looks like .*: convert it with `trl-diffusion data convert {layout}`.*from_{layout}`\."
    for row in RAW[layout]:
        dataset = Dataset.from_list([row])
        if "image" in row:
            dataset = dataset.cast_column("image", Image())
        if declared != "map":
            dataset = dataset.to_iterable_dataset()
        if declared == "stream without declared columns":
            dataset = dataset.map(lambda row: row)
        for required in (PAIRED, UNPAIRED, ("prompt", "image")):
            with pytest.raises(ValueError, match=expected):
                check_dataset(declare_columns(dataset), required, "training data set")
        with pytest.raises(ValueError, match=expected):
            inspect_dataset(dataset)
        if layout != "pickapic":
            with pytest.raises(ValueError, match=expected):
                from_pickapic(dataset)


def test_other_layouts():
    binarized = Dataset.from_list([{"image_simplified_dev": b"", "image_simplified_sd": b"", "category": "a"}])
    with pytest.raises(
        ValueError, match=r"load `data-is-better-together/open-image-preferences-v1-binarized` instead"
    ):
        check_dataset(binarized, PAIRED, "training data set")
    # Of these only the names differ.
    for row in ({"caption": "p", "image": b""}, {"text": "p", "image": b"", "label": True}):
        with pytest.raises(ValueError, match=r"; rename with `dataset.rename_column"):
            check_dataset(Dataset.from_list([row]), UNPAIRED, "training data set")


def test_pairs_of_pickapic_need_no_names_of_images():
    rows = pickapic().remove_columns(["image_0_uid", "image_1_uid"])
    assert paired_rows(from_pickapic(rows)) == [("cat", 0, 1), ("cat", 2, 0), ("dog", 4, 3)]
    with pytest.raises(ValueError, match=r"lacks the columns 'image_0_uid', 'image_1_uid' of Pick-a-Pic"):
        from_pickapic(rows, layout="unpaired")


def test_inspection_errors():
    with pytest.raises(ValueError, match=r"Found the columns \['caption'.*expected prompt, chosen, rejected or"):
        inspect_dataset(pickapic())
    with pytest.raises(ValueError, match="Column 'label' is None in row 1"):
        inspect_dataset(make_unpaired([("a", picture(0), True), ("a", picture(1), None)]))
    with pytest.raises(ValueError, match="The data set is empty"):
        inspect_dataset(unpaired(3).select([]))


@STREAMING
def test_parquet(tmp_path, streaming):
    source = unpaired(7).add_column("weight", [0.5] * 7).add_column("other", list(range(7)))
    keep = np.array([True, False, True, True, True, True, False])
    files = write_parquet(
        source.to_iterable_dataset() if streaming else source, tmp_path, keep=keep, max_shard_size=1, split="test"
    )
    assert [file.name for file in files] == ["test-00000-of-00001.parquet"]
    dataset = load_dataset(str(tmp_path), split="test")
    assert dataset.column_names == ["prompt", "image", "label", "weight"]
    assert dataset.features["image"] == Image()
    kept = source.select(np.flatnonzero(keep))
    assert dataset["label"][:] == kept["label"][:]
    for name in ("prompt", "weight"):
        assert dataset[name][:] == kept[name][:]
    stored = [d.cast_column("image", Image(decode=False))["image"][:] for d in (dataset, kept)]
    assert [image["bytes"] for image in stored[0]] == [image["bytes"] for image in stored[1]]
    with pytest.raises(ValueError, match=r"Found test-00000-of-00001.parquet in .*: expected no such split"):
        write_parquet(source, tmp_path, split="test")
    with pytest.raises(ValueError, match="Found more than 5 rows, for which `keep` was made"):
        write_parquet(source, tmp_path / "b", keep=keep[:5])
    with pytest.raises(ValueError, match="No row is left to write"):
        write_parquet(source, tmp_path / "c", keep=np.zeros(7, bool))
    assert not list((tmp_path / "c").glob("*.parquet"))


def test_parquet_in_several_files_with_images_from_files(image_dir):
    path = write_csv(image_dir / "a.csv", [(f"train/{i % 8}.png", f"p{i}", "exclusive_win") for i in range(250)])
    files = write_parquet(from_kto_csv(path, image_dir, streaming=True), image_dir / "out", max_shard_size=1)
    assert [file.name for file in files] == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    for image in (image_dir / "train").iterdir():
        image.unlink()
    dataset = load_dataset(str(image_dir / "out"), split="train")
    assert dataset["prompt"][:] == [f"p{i}" for i in range(250)]
    assert number(dataset[249]["image"]) == 1


def test_a_stream_is_read_no_further_than_it_is_looked_at(monkeypatch):
    """Rows are not collected: when one is looked at, few of those behind it have been read."""
    read = looked = furthest = 0
    look_at = inspection._look_at

    def rows():
        nonlocal read
        for i in range(1000):
            read += 1
            yield {"prompt": f"prompt {i}", "image": {"bytes": PNGS[i % 8], "path": None}, "label": True}

    def count(*arguments):
        nonlocal looked, furthest
        looked += 1
        furthest = max(furthest, read - looked)
        return look_at(*arguments)

    monkeypatch.setattr(inspection, "_look_at", count)
    features = Features({"prompt": Value("string"), "image": Image(), "label": Value("bool")})
    assert inspect_dataset(IterableDataset.from_generator(rows, features=features)).rows == looked == 1000
    assert furthest <= 200


# ---- Commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pickapic_folder(tmp_path) -> str:
    (tmp_path / "pickapic").mkdir()
    pickapic([*COMPARISONS, ("dog", 4, 3, 0.0), ("", 7, 0, 1.0)]).to_parquet(tmp_path / "pickapic" / "train.parquet")
    return str(tmp_path / "pickapic")


def test_inspect_command(pickapic_folder, capsys):
    main(["data", "inspect", "pickapic", "--dataset_name", pickapic_folder])
    text = capsys.readouterr().out
    for line in (
        "comparisons: 7",
        "ties: 2",
        "paired data: 5 rows, 3 different prompts",
        "images: 10, of which 6 differ",
        "sizes: 16 x 16 (10); 1 in all, sides from 16 to 16",
        "crops: 0 images lose more than 10 % of their area to a square",
        "transparent: 0 images, which training composites on white",
        "animated: 0 images, of which training reads the first frame",
        "row 0: prompt 'cat'; chosen '16 x 16 PNG'; rejected '16 x 16 PNG'",
        "empty_prompt: 1 rows without a prompt",
        "contradiction: 2 rows that others contradict",
        "broken_image: 0 rows",
    ):
        assert line in text
    assert "row 3" not in text
    command = ["data", "inspect", "pickapic", "--dataset_name", pickapic_folder, "--layout", "unpaired"]
    main([*command, "--resolution", "16x24", "24x16"])
    text = capsys.readouterr().out
    assert "labels: 5 liked (83.3%), 1 disliked" in text
    assert "crops: 6 images lose more than 10 % of their area to 16x24 or 24x16" in text
    assert "enlarged: 6 images are smaller than 16x24 or 24x16" in text


def test_convert_command(pickapic_folder, tmp_path, capsys, refused):
    command = ["data", "convert", "pickapic", "--dataset_name", pickapic_folder, "--output_dir", str(tmp_path / "out")]
    main([*command, "--problems", "drop", "--contradiction", "keep"])
    captured = capsys.readouterr()
    assert "4 of 5 rows written" in captured.out
    for title in ("Counting the comparisons", "Inspecting", "Writing"):
        assert title in captured.err
    dataset = load_dataset(str(tmp_path / "out"), split="train")
    assert paired_rows(dataset) == [("cat", 0, 1), ("cat", 2, 0), ("dog", 4, 3), ("dog", 3, 4)]


@pytest.mark.parametrize(
    ("options", "undecided"),
    [
        ("", "--empty_prompt, --broken_image, --identical_pair, --contradiction, --duplicate_row"),
        ("--problems keep", "--broken_image"),
        ("--empty_prompt drop --contradiction keep", "--broken_image, --identical_pair, --duplicate_row"),
        ("--layout unpaired --broken_image drop", "--empty_prompt, --contradiction, --duplicate_row"),
    ],
)
def test_convert_asks_before_it_reads(tmp_path, monkeypatch, refused, options, undecided):
    for name in ("load_dataset", "load_data"):
        monkeypatch.setattr(cli_data, name, lambda *args, **kwargs: pytest.fail("read"))
    command = ["data", "convert", "pickapic", "--dataset_name", "no/such", "--output_dir", str(tmp_path)]
    message = refused(*command, *options.split())
    assert f"Found no choice for {undecided}, expected one before the data are read" in message
    (tmp_path / "train-00000-of-00001.parquet").touch()
    message = refused(*command, "--problems", "drop")
    assert re.search(r"Found train-00000-of-00001.parquet in .*: expected no such split", message)


def test_convert_keeps_all_but_broken_images(tmp_path, capsys):
    rows = [("a", picture(0), True), ("a", picture(0), False), ("a", picture(0), True), ("", picture(1), True)]
    rows.append(("b", {"bytes": PNGS[2][:-60], "path": None}, True))
    (tmp_path / "in").mkdir()
    make_unpaired(rows).to_parquet(tmp_path / "in" / "train.parquet")
    command = ["data", "convert", "preferences", "--dataset_name", str(tmp_path / "in")]
    main([*command, "--output_dir", str(tmp_path / "out"), "--problems", "keep", "--broken_image", "drop"])
    assert "4 of 5 rows written" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["kto_csv", "hpdv2", "hpdv3", "folders", "scores", "webdataset", "preferences"])
def test_each_layout_has_a_command(image_dir, tmp_path, capsys, layout):
    files = ["--annotations", str(tmp_path / "file"), "--image_dir", str(image_dir / "train")]
    options = {
        "kto_csv": files,
        "hpdv2": files,
        "hpdv3": files,
        "folders": ["--liked_dir", str(tmp_path / "liked"), "--disliked_dir", str(tmp_path / "liked")],
        "scores": ["--dataset_name", str(tmp_path / "data"), "--threshold", "2", "--score", "aesthetic"],
        "webdataset": ["--files", str(tmp_path / "a.tar"), "--image", "png"],
        "preferences": ["--dataset_name", str(tmp_path / "data")],
    }[layout]
    (tmp_path / "data").mkdir()
    if layout == "kto_csv":
        write_csv(tmp_path / "file", [("0.png", "p", "exclusive_win")])
    elif layout == "hpdv2":
        write_json(tmp_path / "file", [{"prompt": "p", "human_preference": [1, 0], "file_path": ["0.png", "1.png"]}])
    elif layout == "hpdv3":
        write_json(tmp_path / "file", [{"prompt": "p", "path1": "0.png", "path2": "1.png"}])
    elif layout == "folders":
        (tmp_path / "liked").mkdir()
        (tmp_path / "liked" / "a.png").write_bytes(PNGS[0])
        (tmp_path / "liked" / "a.txt").write_text("p")
    elif layout == "scores":
        scored([1.0, 3.0]).to_parquet(tmp_path / "data" / "train.parquet")
    elif layout == "webdataset":
        write_tar(tmp_path / "a.tar", [{"png": PNGS[0], "txt": b"p", "cls": b"1"}])
    else:
        unpaired(3).to_parquet(tmp_path / "data" / "train.parquet")
    main(["data", "inspect", layout, *options])
    text = capsys.readouterr().out
    assert f"{'paired' if layout.startswith('hpd') else 'unpaired'} data: " in text
    assert "row 0: prompt 'p" in text
    assert ("exclusive win: 1" in text) == (layout == "kto_csv")


def test_data_command_in_a_process(tmp_path):
    """As a person types it."""
    unpaired(4).to_parquet(tmp_path / "train.parquet")
    program = [str(Path(sys.executable).parent / "trl-diffusion"), "data", "inspect", "preferences"]
    result = subprocess.run(
        [*program, "--dataset_name", str(tmp_path), "--headers_only"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "unpaired data: 4 rows, 4 different prompts" in result.stdout
