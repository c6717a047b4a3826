"""From files to batches: image modes, resize and crop, draws per row, pairs, columns."""

import io
import struct
import warnings
import zlib

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, Value
from PIL import Image as PILImage
from PIL import ImageCms, ImageOps

from tests.conftest import picture, unpaired
from tests.tiny import tiny_stable_diffusion
from trl_diffusion import DiffusionKTOConfig, DiffusionKTOTrainer, unpair_preference_dataset
from trl_diffusion.data import inspect_dataset, select_preferred
from trl_diffusion.data.draws import Draws, ExampleKey
from trl_diffusion.data.examples import ExampleBuilder, Examples, StreamingExamples, collate
from trl_diffusion.data.images import ImageTransform
from trl_diffusion.data.samplers import KeyedSampler


def draws(row: int = 0, seed: int = 0) -> Draws:
    return Draws(seed, ExampleKey(row, visit=0))


def builder(**changes) -> ExampleBuilder:
    settings = {
        "columns": ["prompt", "image", "label"],
        "image_columns": ("image",),
        "transform": ImageTransform(16, 16),
        "latent_shape": (4, 8, 8),
        "proportion_empty_prompts": 0.0,
        "seed": 0,
    }
    return ExampleBuilder(**settings | changes)


def to_pixels(image: PILImage.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


# ---- Image modes ----------------------------------------------------------------------------------------------------


NUMBERS = np.random.default_rng(0)
RGB = NUMBERS.integers(0, 256, (16, 16, 3), dtype=np.uint8)
ALPHA = NUMBERS.integers(0, 256, (16, 16), dtype=np.uint8)
LEVELS = NUMBERS.integers(0, 65536, (16, 16), dtype=np.uint16)
GREY = RGB[..., 0]


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def stored(image: PILImage.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(colours: np.ndarray) -> PILImage.Image:
    return PILImage.fromarray(np.dstack([colours, ALPHA]))


def palette() -> tuple[PILImage.Image, np.ndarray]:
    """An image of a palette, and its colours."""
    image = PILImage.fromarray(RGB).quantize(8)
    return image, np.array(image.getpalette()[:24]).reshape(8, 3)[np.asarray(image)]


def keyed_palette() -> tuple[bytes, np.ndarray]:
    image, colours = palette()
    return stored(image, "png", transparency=2), np.where((np.asarray(image) == 2)[..., None], 255, colours)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def key_of_16_bits() -> bytes:
    """A 16-bit PNG in which the level of the first pixel is transparent; the header ends at byte 33."""
    plain = stored(PILImage.fromarray(LEVELS), "png")
    return plain[:33] + png_chunk(b"tRNS", struct.pack(">H", LEVELS[0, 0])) + plain[33:]


def rgb_of_16_bits() -> bytes:
    """Which Pillow cannot write."""
    wide = NUMBERS.integers(0, 256, RGB.shape, dtype=np.uint16) + 256 * RGB.astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def cmyk() -> tuple[PILImage.Image, np.ndarray]:
    inks = NUMBERS.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    return PILImage.fromarray(inks, "CMYK"), (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255


def ycbcr() -> tuple[PILImage.Image, np.ndarray]:
    numbers = NUMBERS.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    y, cb, cr = np.moveaxis(numbers.astype(float), 2, 0) - [[[0]], [[128]], [[128]]]
    colours = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=2)
    return PILImage.fromarray(numbers, "YCbCr"), colours.clip(0, 255)


def lab() -> tuple[PILImage.Image, np.ndarray]:
    """Greys, whose lightness and colour have a formula: CIE 1976 and the curve of sRGB."""
    lightness = np.linspace(0, 255, 256).reshape(16, 16).astype(np.uint8)
    numbers = np.dstack([lightness, np.full((16, 16, 2), 128, np.uint8)])
    light = lightness / 255 * 100
    linear = np.where(light > 8, ((light + 16) / 116) ** 3, light / 903.3)
    curve = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    image = PILImage.new("LAB", (16, 16))
    image.frombytes(((numbers.astype(int) - [0, 128, 128]) % 256).astype(np.uint8).tobytes())
    return image, np.repeat(255 * curve[..., None], 3, axis=2)


def animated(kind: str) -> bytes:
    first, second = (PILImage.fromarray(pixels) for pixels in (RGB, 255 - RGB))
    if kind == "gif":
        first, second = palette()[0], second.quantize(8)
    return stored(first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "webp" else {}))


def black_and_white() -> PILImage.Image:
    return PILImage.fromarray(GREY > 127)


# What is stored, the pixels that it means, and how far integer arithmetic may be from them.
MODES = {
    "RGB": lambda: (stored(PILImage.fromarray(RGB), "png"), RGB, 0),
    "grey": lambda: (stored(PILImage.fromarray(GREY), "png"), GREY, 0),
    "1 bit": lambda: (stored(black_and_white(), "png"), 255 * (GREY > 127), 0),
    "1 bit tiff": lambda: (stored(black_and_white(), "tiff"), 255 * (GREY > 127), 0),
    "palette": lambda: (stored(palette()[0], "png"), palette()[1], 0),
    "gif": lambda: (stored(palette()[0], "gif"), palette()[1], 0),
    "RGBA": lambda: (stored(with_alpha(RGB), "png"), on_white(RGB, ALPHA), 1),
    "RGBA webp": lambda: (stored(with_alpha(RGB), "webp", lossless=True, exact=True), on_white(RGB, ALPHA), 1),
    "RGBA tiff": lambda: (stored(with_alpha(RGB), "tiff"), on_white(RGB, ALPHA), 1),
    "LA": lambda: (stored(with_alpha(GREY), "png"), on_white(np.dstack([GREY] * 3), ALPHA), 1),
    "opaque RGBA": lambda: (stored(PILImage.fromarray(RGB).convert("RGBA"), "png"), RGB, 0),
    "palette with a key": lambda: (*keyed_palette(), 0),
    "RGB with a key": lambda: (
        stored(PILImage.fromarray(RGB), "png", transparency=tuple(RGB[0, 0].tolist())),
        np.where((RGB == RGB[0, 0]).all(axis=2, keepdims=True), 255, RGB),
        0,
    ),
    "grey with a key": lambda: (
        stored(PILImage.fromarray(GREY), "png", transparency=int(GREY[0, 0])),
        np.where(GREY == GREY[0, 0], 255, GREY),
        0,
    ),
    "16 bit": lambda: (stored(PILImage.fromarray(LEVELS), "png"), LEVELS / 257, 0.5),
    "16 bit with a key": lambda: (key_of_16_bits(), np.where(LEVELS == LEVELS[0, 0], 255, LEVELS / 257), 0.5),
    "16 bit tiff": lambda: (stored(PILImage.fromarray(LEVELS), "tiff"), LEVELS / 257, 0.5),
    "16 bit big-endian tiff": lambda: (stored(PILImage.fromarray(LEVELS.astype(">u2")), "tiff"), LEVELS / 257, 0.5),
    "16 bit ppm": lambda: (stored(PILImage.fromarray(LEVELS), "ppm"), LEVELS / 257, 0.5),
    "16 bit jpeg 2000": lambda: (stored(PILImage.fromarray(LEVELS), "jpeg2000"), LEVELS / 257, 0.5),
    "16 bit RGB": lambda: (rgb_of_16_bits(), RGB, 0),
    "CMYK tiff": lambda: (stored((image := cmyk())[0], "tiff"), image[1], 1),
    "YCbCr tiff": lambda: (stored((image := ycbcr())[0], "tiff", compression="tiff_lzw"), image[1], 2),
    "LAB tiff": lambda: (stored((image := lab())[0], "tiff"), image[1], 2),
    "animated gif": lambda: (animated("gif"), palette()[1], 0),
    "animated webp": lambda: (animated("webp"), RGB, 0),
    "animated png": lambda: (animated("png"), RGB, 0),
    "uint16 array": lambda: (LEVELS, LEVELS / 257, 0.5),
    "uint8 array": lambda: (RGB, RGB, 0),
    "16 bit in memory": lambda: (PILImage.fromarray(LEVELS), LEVELS / 257, 0.5),
    "RGBA in memory": lambda: (with_alpha(RGB), on_white(RGB, ALPHA), 1),
    "CMYK in memory": lambda: ((image := cmyk())[0], image[1], 1),
    # By the library's own words: an ICC profile changes nothing.
    "ICC profile": lambda: (stored(PILImage.fromarray(RGB), "png", icc_profile=adobe_like()), RGB, 0),
}


def adobe_like() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()


def one_image(value) -> Dataset:
    image = {"bytes": value, "path": None} if isinstance(value, bytes) else value
    features = Features({"prompt": Value("string"), "image": Image(), "label": Value("bool")})
    return Dataset.from_dict({"prompt": ["p"], "image": [image], "label": [True]}, features=features)


def first_example(dataset: Dataset, streaming: bool) -> dict:
    if streaming:
        return next(iter(StreamingExamples(dataset.to_iterable_dataset(), builder(), training=True)))
    return Examples(dataset, [builder()])[0]


@pytest.mark.filterwarnings("ignore:Found transparent images")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", MODES)
def test_image_modes(name, streaming):
    value, expected, tolerance = MODES[name]()
    expected = np.broadcast_to(expected[..., None] if expected.ndim == 2 else expected, (16, 16, 3))
    pixels = first_example(one_image(value), streaming)["pixel_values"][0]
    assert pixels.dtype == torch.float32
    found = (pixels.permute(1, 2, 0).numpy() + 1) * 127.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance + 1e-3)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.full((16, 16), 0.5, np.float32), "floats"),
        (np.full((16, 16), 0.5, np.float64), "floats"),
        (np.full((16, 16), 200, np.int32), "32-bit integers"),
        (np.full((16, 16), 200, np.int64), "32-bit integers"),
        (stored(PILImage.fromarray(np.full((16, 16), 0.5, np.float32)), "tiff"), "floats"),
        (stored(PILImage.fromarray(np.full((16, 16), 70_000, np.int32)), "tiff"), "32-bit integers"),
    ],
)
@pytest.mark.filterwarnings("ignore:Downcasting")
def test_an_unknown_range_is_refused_with_its_row(value, kind, streaming):
    message = rf"The image in row 0 cannot be read \(found {kind}, whose range is unknown; expected 8 or 16 bits"
    with pytest.raises(ValueError, match=message):
        first_example(one_image(value), streaming)
    report = inspect_dataset(one_image(value), decode=not streaming)
    assert report.problems["broken_image"].tolist() == [True]


@pytest.mark.parametrize(("name", "count"), [("RGBA", 1), ("16 bit with a key", 1), ("opaque RGBA", 0), ("RGB", 0)])
def test_transparency_is_said(name, count):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            first_example(one_image(MODES[name]()[0]), streaming=False)
    said = [str(warning.message) for warning in caught]
    assert said == count * ["Found transparent images: they are composited on white."]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("sixteen_bits", [False, True])
def test_exif_orientation_is_applied_once(orientation, sixteen_bits):
    # How to bring the stored rows and columns upright, by the standard's figure.
    upright = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
        8: np.rot90,
    }[orientation]
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    pixels = LEVELS if sixteen_bits else RGB
    data = one_image(stored(PILImage.fromarray(pixels), "png", exif=exif))
    found = (first_example(data, streaming=False)["pixel_values"][0].permute(1, 2, 0).numpy() + 1) * 127.5
    expected = np.dstack(3 * [upright(LEVELS) / 257]) if sixteen_bits else upright(RGB)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.501 if sixteen_bits else 1e-3)


# ---- Resize, crop, flip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(16, 16), (32, 32), (8, 8), (40, 16), (16, 40), (37, 23), (23, 37), (5, 50), (17, 16)]
)
def test_shorter_side_fits_and_the_centre_stays(size):
    image = picture(0, size)
    factor = 16 / min(size)
    wide = (round(size[0] * factor), round(size[1] * factor))
    resized = image if wide == size else image.resize(wide, PILImage.Resampling.LANCZOS)
    left, top = (wide[0] - 16) // 2, (wide[1] - 16) // 2
    expected = resized.crop((left, top, left + 16, top + 16))
    pixels = ImageTransform(16, 16)(image, draws())
    assert pixels.shape == (3, 16, 16)
    assert torch.equal(pixels, ImageTransform(16, 16)(image, draws(row=7)))
    torch.testing.assert_close(pixels, to_pixels(expected), rtol=0, atol=1e-6)


def test_pixels_span_minus_one_to_one():
    black_and_white = PILImage.fromarray(np.repeat([[[0], [255]]], 3, axis=2).astype(np.uint8)).resize((16, 16), 0)
    pixels = ImageTransform(16, 16)(black_and_white, draws())
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)


def test_random_crop_takes_every_place_and_only_these():
    image = picture(0, (20, 16))
    places = [to_pixels(image.crop((left, 0, left + 16, 16))) for left in range(5)]
    transform = ImageTransform(16, 16, center_crop=False)
    seen = set()
    for row in range(100):
        pixels = transform(image, draws(row))
        assert torch.equal(pixels, transform(image, draws(row)))
        seen.add(next(i for i, place in enumerate(places) if torch.allclose(pixels, place, atol=1e-6)))
    assert seen == {0, 1, 2, 3, 4}


def test_random_flip_mirrors_half_and_leaves_the_crop():
    image = picture(0, (20, 16))
    plain, flipping = (
        ImageTransform(16, 16, center_crop=False),
        ImageTransform(16, 16, center_crop=False, random_flip=True),
    )
    mirrored = 0
    for row in range(200):
        pixels, original = flipping(image, draws(row)), plain(image, draws(row))
        assert torch.equal(pixels, flipping(image, draws(row)))
        if not torch.equal(pixels, original):
            assert torch.equal(pixels, original.flip(2))
            mirrored += 1
    assert 70 <= mirrored <= 130


def test_crop_and_flip_follow_seed_and_epoch():
    image = picture(0, (64, 16))
    transform = ImageTransform(16, 16, center_crop=False, random_flip=True)
    pixels = lambda seed, epoch: [transform(image, Draws(seed, ExampleKey(i, epoch))) for i in range(8)]  # noqa: E731
    same = lambda a, b: all(map(torch.equal, a, b))  # noqa: E731
    assert same(pixels(0, 0), pixels(0, 0))
    assert not same(pixels(0, 0), pixels(1, 0))
    assert not same(pixels(0, 0), pixels(0, 1))


# ---- Pairs ----------------------------------------------------------------------------------------------------------


def paired(rows: int = 5, weight: bool = False) -> Dataset:
    columns = {
        "prompt": [f"prompt {i}" for i in range(rows)],
        "chosen": [picture(2 * i) for i in range(rows)],
        "rejected": [picture(2 * i + 1) for i in range(rows)],
        "another": list(range(rows)),
    }
    kinds = {"prompt": Value("string"), "chosen": Image(), "rejected": Image(), "another": Value("int64")}
    if weight:
        columns["weight"], kinds["weight"] = [0.5 * i for i in range(rows)], Value("float32")
    return Dataset.from_dict(columns, features=Features(kinds))


def image_bytes(dataset, column: str) -> list[bytes]:
    return [row[column]["bytes"] for row in dataset.cast_column(column, Image(decode=False))]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("weight", [False, True])
def test_unpair(streaming, weight):
    pairs = paired(weight=weight)
    single = unpair_preference_dataset(pairs.to_iterable_dataset() if streaming else pairs)
    assert isinstance(single, IterableDataset if streaming else Dataset)
    assert set(single.column_names) == {"prompt", "image", "label"} | ({"weight"} if weight else set())
    assert single.features["label"] == Value("bool")
    assert isinstance(single.features["image"], Image)
    rows = list(single)
    assert [row["prompt"] for row in rows] == [f"prompt {i // 2}" for i in range(10)]
    assert [row["label"] for row in rows] == [True, False] * 5
    if weight:
        assert [row["weight"] for row in rows] == [0.5 * (i // 2) for i in range(10)]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(picture(i)))
    if streaming:  # hands out decoded images only
        return
    files = image_bytes(single, "image")
    assert files[::2] == image_bytes(pairs, "chosen")
    assert files[1::2] == image_bytes(pairs, "rejected")


def test_unpair_of_a_stream_without_declared_columns():
    """`stream.map(...)` forgets the columns' types."""
    stream = paired().to_iterable_dataset().map(lambda row: row)
    assert stream.features is None
    rows = list(unpair_preference_dataset(stream))
    assert [row["label"] for row in rows] == [True, False] * 5
    np.testing.assert_array_equal(np.asarray(rows[3]["image"]), np.asarray(picture(3)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_unpair_refuses_other_columns(name, streaming):
    dataset = paired().rename_column(name, "other")
    with pytest.raises(
        ValueError, match=rf"paired data set lacks the column '{name}': found .*'other'.*rename_column"
    ):
        unpair_preference_dataset(dataset.to_iterable_dataset() if streaming else dataset)


def test_unpair_refuses_paths():
    dataset = paired().remove_columns("chosen").add_column("chosen", ["a.png"] * 5)
    with pytest.raises(ValueError, match=r"'chosen' of the paired data set is .*string.*expected image"):
        unpair_preference_dataset(dataset)


# ---- What supervised fine-tuning learns from ------------------------------------------------------------------------


def in_kind(dataset: Dataset, kind: str):
    if kind == "map":
        return dataset
    stream = dataset.to_iterable_dataset()
    return stream.map(lambda row: row) if kind == "stream without declared columns" else stream


KINDS = pytest.mark.parametrize("kind", ["map", "stream", "stream without declared columns"])


@KINDS
@pytest.mark.parametrize("weight", [False, True])
def test_preferred_of_pairs_is_what_was_chosen(kind, weight):
    preferred = select_preferred(in_kind(paired(weight=weight), kind))
    assert isinstance(preferred, Dataset if kind == "map" else IterableDataset)
    assert set(preferred.column_names) == {"prompt", "image"} | ({"weight"} if weight else set())
    assert isinstance(preferred.features["image"], Image)
    rows = list(preferred)
    assert [row["prompt"] for row in rows] == [f"prompt {i}" for i in range(5)]
    if weight:
        assert [row["weight"] for row in rows] == [0.5 * i for i in range(5)]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(picture(2 * i)))


@KINDS
@pytest.mark.parametrize("weight", [False, True])
def test_preferred_of_labelled_images_is_what_was_liked(kind, weight):
    dataset = unpaired(8)
    if weight:
        dataset = dataset.add_column("weight", [0.5 * i for i in range(8)])
    preferred = select_preferred(in_kind(dataset, kind))
    assert set(preferred.column_names) == {"prompt", "image"} | ({"weight"} if weight else set())
    assert isinstance(preferred.features["image"], Image)
    rows = list(preferred)
    assert [row["prompt"] for row in rows] == [f"picture {i % 5}" for i in (0, 3, 6)]
    if weight:
        assert [row["weight"] for row in rows] == [0.0, 1.5, 3.0]
    for i, row in zip((0, 3, 6), rows, strict=True):
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(picture(i)))


@KINDS
def test_preferred_of_supervised_data_is_all_of_it(kind):
    dataset = unpaired(4).remove_columns("label").add_column("weight", [0.5 * i for i in range(4)])
    preferred = select_preferred(in_kind(dataset, kind))
    assert set(preferred.column_names) == {"prompt", "image", "weight"}
    rows = list(preferred)
    assert [row["weight"] for row in rows] == [0.0, 0.5, 1.0, 1.5]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(picture(i)))


def test_nothing_is_preferred():
    dataset = unpaired(3).remove_columns("label").add_column("label", [False] * 3)
    with pytest.raises(ValueError, match=r"All 3 labels of the data set are False, expected liked images \(True\)"):
        select_preferred(dataset)


@pytest.mark.parametrize("streaming", [False, True])
def test_preferred_refuses_a_label_that_is_no_boolean(streaming):
    dataset = unpaired(3).remove_columns("label").add_column("label", [1, 0, 1])
    with pytest.raises(ValueError, match=r"'label' of the labelled data set is .*int64.*expected bool"):
        select_preferred(dataset.to_iterable_dataset() if streaming else dataset)


# ---- Windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
def test_window_numbers_count_places_and_not_rows(shuffle):
    """Also over the end of a pass: 10 rows, filled up to two steps of 6."""
    sampler = KeyedSampler(10, 6, seed=0, shuffle=shuffle, rows_per_window=3)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert [key.window for key in sampler] == [place // 3 for place in range(12)]


def test_by_default_each_row_is_its_own_window():
    assert [key.window for key in KeyedSampler(5, 4, seed=0)] == list(range(8))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_rows_of_a_window_share_the_timestep_and_nothing_else(streaming, training):
    dataset, shared = unpaired(6), builder(share_timestep=True)
    if streaming:
        found = list(StreamingExamples(dataset.to_iterable_dataset(), shared, training, rows_per_window=3))
    else:
        examples = Examples(dataset, [shared], rows_per_window=3)
        keys = KeyedSampler(6, 6, seed=0, shuffle=False, rows_per_window=3) if training else range(6)
        found = [examples[key] for key in keys]
    timesteps = [example["timestep"] for example in found]
    assert timesteps[:3] == timesteps[:1] * 3
    assert timesteps[3:] == timesteps[3:4] * 3
    assert timesteps[0] != timesteps[3]
    assert len({example["noise"][0, 0, 0, 0].item() for example in found}) == 6


def test_the_windows_timestep_is_none_of_a_rows_own():
    """Windows and rows are both counted from 0, and yet their draws are not the same."""
    key = ExampleKey(3, epoch=1, window=3)
    row = unpaired(4)[3]
    assert builder(share_timestep=True)(row, key)["timestep"] != builder()(row, key)["timestep"]
    assert builder()(row, key._replace(window=9))["timestep"] == builder()(row, key)["timestep"]
    epochs = {builder(share_timestep=True)(row, key._replace(epoch=epoch))["timestep"] for epoch in (-1, 0, 1)}
    assert len(epochs) == 3


def test_noise_of_a_pair():
    """One noise for both images, or one for each; the draws that a pair shares in any case stay as they were."""
    row = paired(1)[0]
    columns = {"columns": ["prompt", "chosen", "rejected"], "image_columns": ("chosen", "rejected")}
    shared, own = (builder(**columns, share_noise=share)(row, ExampleKey(0, 0)) for share in (True, False))
    assert shared["noise"].shape == (1, 4, 8, 8)
    assert own["noise"].shape == (2, 4, 8, 8)
    assert not torch.equal(own["noise"][0], own["noise"][1])
    assert torch.equal(shared["posterior_noise"], own["posterior_noise"])
    assert shared["timestep"] == own["timestep"]


# ---- Batches --------------------------------------------------------------------------------------------------------


def test_collate_shapes_and_types():
    dataset = unpaired(3).add_column("weight", [1.0, 0.5, 2.0])
    examples = Examples(dataset, [builder(columns=["prompt", "image", "label", "weight"])])
    batch = collate([examples[ExampleKey(i, visit=0)] for i in range(3)])
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items() if name != "prompt"}
    assert shapes == {
        "pixel_values": ((3, 1, 3, 16, 16), torch.float32),
        "posterior_noise": ((3, 1, 4, 8, 8), torch.float32),
        "noise": ((3, 1, 4, 8, 8), torch.float32),
        "timestep": ((3,), torch.float64),
        "label": ((3,), torch.bool),
        "weight": ((3,), torch.float32),
    }
    assert batch["prompt"] == ["picture 0", "picture 1", "picture 2"]
    assert batch["label"].tolist() == [True, False, False]
    assert batch["weight"].tolist() == [1.0, 0.5, 2.0]
    assert ((0 <= batch["timestep"]) & (batch["timestep"] < 1)).all()


def test_only_the_methods_columns_are_read():
    """Another column, here one whose image cannot be decoded, is never touched."""
    broken = [{"bytes": b"broken", "path": None}] * 3
    dataset = unpaired(3).add_column("another", broken, feature=Image())
    assert set(Examples(dataset, [builder()])[0]) == {
        "pixel_values",
        "posterior_noise",
        "noise",
        "timestep",
        "prompt",
        "label",
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_prompts_in_training_and_never_in_evaluation(streaming):
    dataset, half = unpaired(200), builder(proportion_empty_prompts=0.5)
    if streaming:
        read = lambda training: list(StreamingExamples(dataset.to_iterable_dataset(), half, training))  # noqa: E731
    else:
        examples = Examples(dataset, [half])
        read = lambda training: [examples[ExampleKey(i, 0) if training else i] for i in range(200)]  # noqa: E731
    assert 70 <= sum(example["prompt"] == "" for example in read(True)) <= 130
    assert not any(example["prompt"] == "" for example in read(False))


def test_stream_and_map_style_give_the_same_examples():
    """The key of a streamed row is its place, so that both kinds of data set train alike."""
    keyed = Examples(unpaired(4), [builder(proportion_empty_prompts=0.3)])
    stream = StreamingExamples(unpaired(4).to_iterable_dataset(), keyed.builders[0], training=True)
    stream.set_epoch(2)
    for i, example in enumerate(stream):
        expected = keyed[ExampleKey(i, visit=2)]
        assert example.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(example[name], value)
            else:
                assert example[name] == value
    assert i == 3


# ---- The weight column ----------------------------------------------------------------------------------------------


def run(folder, dataset, steps: int = 1) -> DiffusionKTOTrainer:
    args = DiffusionKTOConfig(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        desirable_ratio=None,
        disable_tqdm=True,
    )
    trainer = DiffusionKTOTrainer(model=tiny_stable_diffusion(), args=args, train_dataset=dataset)
    trainer.train()
    return trainer


def weighted(value: float) -> Dataset:
    return unpaired().add_column("weight", [value] * 12)


@pytest.mark.parametrize("kind", ["map", "stream", "stream without declared columns"])
def test_weight_multiplies_the_loss(tmp_path, kind):
    """At the first step the loss of every row is 0.5, so that the mean weight shows."""
    dataset = weighted(3.0)
    if kind != "map":
        dataset = dataset.to_iterable_dataset()
    if kind.endswith("columns"):
        dataset = dataset.map(lambda row: row)
    assert run(tmp_path, dataset).state.log_history[0]["loss"] == 1.5


def test_weight_of_each_row(tmp_path):
    dataset = unpaired(4).add_column("weight", [1.0, 2.0, 4.0, 9.0])
    assert run(tmp_path, dataset).state.log_history[0]["loss"] == 0.5 * (1 + 2 + 4 + 9) / 4


def test_a_weight_of_one_changes_nothing(tmp_path):
    start = tiny_stable_diffusion().unet.state_dict()
    plain, ones = (run(tmp_path, d, 2).model.state_dict() for d in (unpaired(), weighted(1.0)))
    assert all(torch.equal(plain[name], ones[name]) for name in plain)
    assert not all(torch.equal(plain[name], start[name]) for name in plain)


@pytest.mark.parametrize("streaming", [False, True])
def test_weight_is_used_in_evaluation(tmp_path, streaming):
    trainer = run(tmp_path, unpaired())
    plain = trainer.evaluate(unpaired())["eval_loss"]
    dataset = weighted(2.0)
    doubled = trainer.evaluate(dataset.to_iterable_dataset() if streaming else dataset)["eval_loss"]
    assert doubled == pytest.approx(2 * plain, rel=1e-5)


def test_evaluation_data_need_no_weight(tmp_path):
    """Training rows with a weight, evaluation rows without: each data set has its own columns."""
    trainer = run(tmp_path, weighted(2.0))
    expected = trainer.evaluate(weighted(1.0))["eval_loss"]
    assert trainer.evaluate(unpaired())["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_train_as_single_images(tmp_path, streaming):
    """The trainer unpairs by itself, as TRL's does."""
    pairs, rows = paired(6), [row for i in range(6) for row in (("chosen", i), ("rejected", i))]
    single = Dataset.from_dict(
        {
            "prompt": [pairs[i]["prompt"] for _, i in rows],
            "image": [pairs[i][name] for name, i in rows],
            "label": [name == "chosen" for name, _ in rows],
        },
        features=unpaired(1).features,
    )
    if streaming:
        pairs, single = pairs.to_iterable_dataset(), single.to_iterable_dataset()
    by_itself, by_hand = (run(tmp_path, dataset, 2) for dataset in (pairs, single))
    expected = by_hand.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in by_itself.model.state_dict().items())


def test_data_set_from_a_parquet_folder(tmp_path):
    """What a person stores is what is read: bytes in, the same pixels out."""
    unpaired(3).to_parquet(tmp_path / "train.parquet")
    dataset = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    for i in range(3):
        expected = to_pixels(ImageOps.exif_transpose(picture(i)))
        torch.testing.assert_close(Examples(dataset, [builder()])[i]["pixel_values"][0], expected, rtol=0, atol=1e-6)
    buffer = io.BytesIO()
    picture(0).save(buffer, format="png")
    assert image_bytes(dataset, "image")[0] == buffer.getvalue()
