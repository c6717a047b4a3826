"""Several sizes of training images: which image goes where, in which order, and that nothing but the size differs."""

import io
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from trl import TrlParser

from tests import tiny
from tests.conftest import picture
from tests.methods import METHODS, make_trainer
from trl_diffusion import DiffusionSFTConfig
from trl_diffusion.data.buckets import image_sizes, in_whole_batches, nearest_bucket, parse_sizes
from trl_diffusion.data.samplers import DesirableRatioSampler, KeyedSampler


# (height, width) of the buckets, and of pictures near to them.
RESOLUTION = ["16", "16x24", "24x16"]
SHAPES = [(20, 20), (30, 44), (40, 27), (16, 16), (18, 30)]
BUCKETS = [0, 1, 2, 0, 1]


def shaped(i: int) -> PILImage.Image:
    height, width = SHAPES[i % 5]
    return picture(i, (width, height))


def unpaired(rows: int = 20) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [f"picture {i % 3}" for i in range(rows)],
            "image": [shaped(i) for i in range(rows)],
            "label": [i % 2 == 0 for i in range(rows)],
        },
        features=Features({"prompt": Value("string"), "image": Image(), "label": Value("bool")}),
    )


def supervised(rows: int = 20) -> Dataset:
    return unpaired(rows).remove_columns("label")


def pairs(rows: int = 20) -> Dataset:
    """The rejected images have other shapes than the chosen ones."""
    return Dataset.from_dict(
        {
            "prompt": [f"picture {i % 3}" for i in range(rows)],
            "chosen": [shaped(i) for i in range(rows)],
            "rejected": [shaped(i + 1) for i in range(rows)],
        },
        features=Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()}),
    )


def data_of(method: str, rows: int = 20) -> Dataset:
    return {"kto": unpaired, "sft": supervised}.get(method, pairs)(rows)


def make(folder, method="sft", pipeline=None, dataset=None, **changes):
    dataset = data_of(method) if dataset is None else dataset
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "resolution": RESOLUTION} | changes
    return make_trainer(method, pipeline or tiny.tiny_stable_diffusion(), folder, dataset, **settings)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- Sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (512, [(512, 512)]),
        ("832x1216", [(832, 1216)]),
        (["512"], [(512, 512)]),
        ([512, 768], [(512, 512), (768, 768)]),
        ([[832, 1216], (1024, 1024), "640"], [(832, 1216), (1024, 1024), (640, 640)]),
    ],
)
def test_ways_to_name_sizes(tmp_path, given, sizes):
    assert parse_sizes(given) == sizes
    config = DiffusionSFTConfig(str(tmp_path), use_cpu=True, resolution=given)
    assert parse_sizes(config.resolution) == sizes
    assert parse_sizes(json.loads(json.dumps(config.to_dict()["resolution"]))) == sizes


@pytest.mark.parametrize("given", ["12by6", [], [(1, 2, 3)], True, 512.0, [None], "x"])
def test_what_is_no_size(tmp_path, given):
    with pytest.raises(ValueError, match=r"expected a side such as 512, 'HEIGHTxWIDTH' such as '832x1216'"):
        DiffusionSFTConfig(str(tmp_path), use_cpu=True, resolution=given)


def test_a_size_twice(tmp_path):
    with pytest.raises(ValueError, match=r"Found the size 512 twice in `resolution`"):
        DiffusionSFTConfig(str(tmp_path), use_cpu=True, resolution=[512, "512x512"])


def test_sizes_on_the_command_line_and_in_yaml(tmp_path):
    parser = TrlParser(DiffusionSFTConfig)
    base = ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    assert parser.parse_args_and_config([*base, "--resolution", "512"])[0].resolution == ["512"]
    found = parser.parse_args_and_config([*base, "--resolution", "1024", "832x1216"])[0].resolution
    assert found == ["1024", "832x1216"]
    for text, expected in (
        ("512", ["512"]),
        ("[1024, 832x1216]", ["1024", "832x1216"]),
        ("[[8, 16], 8]", ["8x16", "8"]),
    ):
        (tmp_path / "a.yaml").write_text(f"resolution: {text}\n")
        parser = TrlParser(DiffusionSFTConfig)
        found = parser.parse_args_and_config([*base, "--config", str(tmp_path / "a.yaml")])[0].resolution
        assert found == expected


def test_nearest_bucket():
    buckets = [(512, 512), (512, 768), (1024, 1024), (768, 512)]
    images = np.array([[100, 100], [4000, 4000], [500, 760], [500, 540], [1000, 100], [100, 1000], [724, 724]])
    assert nearest_bucket(images, buckets).tolist() == [0, 2, 1, 0, 3, 1, 0]
    # A ratio counts the same turned by a right angle: 100 x 122 lies nearer to the square, 100 x 123 to 2 : 3.
    assert nearest_bucket(np.array([[100, 122], [100, 123], [122, 100], [123, 100]]), buckets).tolist() == [0, 1, 0, 3]


def test_sizes_are_read_without_decoding(tmp_path, monkeypatch):
    exif = PILImage.Exif()
    exif[0x0112] = 6  # a quarter turn
    images = []
    for i, format in enumerate(["PNG", "JPEG", "WEBP", "PNG", "JPEG"]):
        file = io.BytesIO()
        picture(i, (20 + i, 10)).save(file, format, **({"exif": exif} if i > 2 else {}))
        images.append({"bytes": file.getvalue(), "path": None})
    picture(9, (33, 44)).save(tmp_path / "a.png")
    images.append({"bytes": None, "path": str(tmp_path / "a.png")})
    data = Dataset.from_dict({"image": images}, features=Features({"image": Image()}))
    decoded = [np.array(image.size[::-1]) for image in data["image"]]
    assert [tuple(size) for size in decoded[3:5]] == [(23, 10), (24, 10)]  # `datasets` turns them
    monkeypatch.setattr(PILImage.Image, "load", lambda self: pytest.fail("decoded"))
    np.testing.assert_array_equal(image_sizes(data, "image"), decoded)
    reads = []
    monkeypatch.setattr(PILImage, "open", lambda *args: reads.append(args))
    np.testing.assert_array_equal(image_sizes(data, "image"), decoded)
    assert not reads


def test_an_image_without_a_size_is_named_by_its_row(tmp_path):
    file = io.BytesIO()
    picture(0).save(file, "PNG")
    images = [{"bytes": file.getvalue(), "path": None}, {"bytes": b"no image", "path": None}]
    data = Dataset.from_dict({"prompt": ["a", "b"], "image": images}, features=supervised(1).features)
    with pytest.raises(ValueError, match=r"The image in row 1 cannot be read .*: replace the file or drop the row"):
        make(tmp_path, dataset=data)


# ---- Order ----------------------------------------------------------------------------------------------------------


def steps_of(sampler, epoch: int = 0) -> np.ndarray:
    sampler.set_epoch(epoch)
    return np.array([key.row for key in sampler]).reshape(-1, sampler.examples_per_step)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_step_holds_one_bucket(shuffle, drop_last):
    buckets = np.random.default_rng(0).choice(3, 50, p=[0.6, 0.3, 0.1])
    sampler = KeyedSampler(50, 4, seed=0, shuffle=shuffle, drop_last=drop_last, buckets=buckets)
    seen = []
    for epoch in range(2):
        steps = steps_of(sampler, epoch)
        assert all(len(set(buckets[step])) == 1 for step in steps)
        counts = np.bincount(buckets[steps[:, 0]], minlength=3)
        sizes = np.bincount(buckets, minlength=3)
        np.testing.assert_array_equal(counts, sizes // 4 if drop_last else -(-sizes // 4))
        times = np.bincount(steps.flatten(), minlength=50)
        assert set(times) == ({0, 1} if drop_last else {1, 2})
        # A second visit comes with fresh noise.
        keys = list(sampler)
        assert len(set(keys)) == len(keys) == len(sampler)
        seen.append(steps)
    assert np.array_equal(*seen) != shuffle
    np.testing.assert_array_equal(steps_of(sampler, 1), seen[1])
    if shuffle:  # steps of all buckets in a mixed order
        order = buckets[seen[0][:, 0]]
        assert (np.diff(order) != 0).sum() > 2


def test_one_bucket_is_as_no_buckets():
    plain, bucketed = KeyedSampler(21, 4, seed=3), KeyedSampler(21, 4, seed=3, buckets=np.zeros(21, np.int64))
    assert list(plain) == list(bucketed)


def test_a_liked_share_in_each_bucket():
    rng = np.random.default_rng(0)
    labels, buckets = rng.random(300) < 0.4, rng.integers(0, 2, 300)
    steps = np.concatenate(
        [steps_of(DesirableRatioSampler(labels, 0.8, 10, seed=0, buckets=buckets), epoch) for epoch in range(4)]
    )
    assert all(len(set(buckets[step])) == 1 for step in steps)
    for bucket in range(2):
        assert labels[steps[buckets[steps[:, 0]] == bucket]].mean() == pytest.approx(0.8, abs=0.05)
    labels[buckets == 1] = False
    with pytest.raises(ValueError, match=r"labels in the bucket of row \d+ are False, expected liked and disliked"):
        DesirableRatioSampler(labels, 0.8, 10, seed=0, buckets=buckets)


def test_evaluation_in_whole_batches():
    order = in_whole_batches(np.array([0, 2, 0, 2, 2, 0, 0]), 2)
    assert order.tolist() == [0, 2, 5, 6, 1, 3, 4, 4]


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_training_in_buckets(tmp_path, method):
    """Steps of one size each, an exact start, and a resume that is the same to the last bit."""
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    trainer = make(tmp_path / "whole", method, **options)
    shapes: list[tuple[int, ...]] = []
    trainer.family.denoiser.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[2:])))
    trainer.train()
    per_step = len(shapes) // 4
    steps = [set(shapes[i : i + per_step]) for i in range(0, len(shapes), per_step)]
    assert [len(step) for step in steps] == [1] * 4
    assert set.union(*steps) <= {(8, 8), (8, 12), (12, 8)}
    assert len(set.union(*steps)) > 1
    start = {"kto": 0.5, "dpo": np.float32(math.log(2)), "rpo": np.float32(math.log(2))}
    if method in start:
        assert losses(trainer)[0] == start[method]

    resumed = make(tmp_path / "resumed", method, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(trainer)
    for ours, theirs in zip(resumed.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", ["kto", "rpo"])
def test_a_step_may_be_split_in_any_way(tmp_path, method):
    found = []
    for batch in (4, 2):
        trainer = make(
            tmp_path / str(batch),
            method,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=4 // batch,
            window="step",
            max_steps=3,
        )
        trainer.train()
        found.append(losses(trainer))
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_does_not_depend_on_batches(tmp_path, method):
    """The last batch of a bucket is filled up with rows that must not count twice."""
    data = data_of(method, 13)
    found = [
        make(tmp_path, method, eval_dataset=data, per_device_eval_batch_size=size).evaluate() for size in (1, 2, 5)
    ]
    for metrics in found:
        for name in {name for name in found[0] if name == "eval_loss" or "/" in name}:
            assert metrics[name] == pytest.approx(found[0][name], rel=1e-5, abs=1e-7), name


def test_predictions_are_in_the_order_of_the_rows(tmp_path):
    """Row by row the error of the row itself, at the size of its bucket."""
    data = supervised(13)
    predictions = make(tmp_path, per_device_eval_batch_size=4).predict(data).predictions
    assert len(predictions) == 13
    for bucket, resolution in enumerate(RESOLUTION):
        alone = make(tmp_path, resolution=resolution, per_device_eval_batch_size=13).predict(data).predictions
        rows = [row for row in range(13) if BUCKETS[row % 5] == bucket]
        np.testing.assert_allclose(predictions[rows], alone[rows], rtol=1e-4)


def test_a_pair_has_the_size_of_its_chosen_image(tmp_path):
    trainer = make(tmp_path, "dpo", per_device_train_batch_size=4, dataloader_drop_last=True)
    data = trainer.train_dataset
    assert trainer.buckets(data).tolist() == BUCKETS * 4
    loader = trainer.get_train_dataloader()
    expected = {(3, height, width) for height, width in parse_sizes(RESOLUTION)}
    assert {tuple(batch["pixel_values"].shape[2:]) for batch in loader} == expected


def test_sdxl_is_told_the_size_of_the_bucket(tmp_path):
    for conditioning in ("real", "fixed"):
        trainer = make(
            tmp_path,
            pipeline=tiny.tiny_stable_diffusion_xl(),
            size_conditioning=conditioning,
            dataloader_drop_last=True,
        )
        for batch in trainer.get_train_dataloader():
            height, width = batch["pixel_values"].shape[-2:]
            for original_height, original_width, top, left, *target in batch["sizes"].flatten(0, 1).tolist():
                assert target == [height, width]
                if conditioning == "fixed":
                    assert (original_height, original_width, top, left) == (height, width, 0, 0)
                else:
                    scale = max(height / original_height, width / original_width)
                    assert (original_height, original_width) in SHAPES
                    assert top == (round(original_height * scale) - height) // 2
                    assert left == (round(original_width * scale) - width) // 2


def test_the_shift_is_that_of_the_bucket(tmp_path):
    trainer = make(tmp_path, pipeline=tiny.tiny_flux(), resolution=[16, "32x64"], dataloader_drop_last=True)
    shapes = set()
    for batch in trainer.get_train_dataloader():
        height, width = batch["pixel_values"].shape[-2:]
        noised = trainer.corrupt(batch)
        shift = trainer.family.timestep_shift(height, width)
        s = torch.special.expit(torch.special.ndtri(batch["timestep"]))
        torch.testing.assert_close(noised.t, (shift * s / (1 + (shift - 1) * s)).float(), rtol=1e-5, atol=1e-6)
        shapes.add((height, width, shift))
    assert len({shift for *_, shift in shapes}) == len(shapes) == 2


def test_one_size_that_is_no_square(tmp_path):
    """Needs no sorting, and so works on a stream too."""
    data = supervised()
    trainer = make(tmp_path, dataset=data.to_iterable_dataset(), resolution="16x24", max_steps=2)
    trainer.train()
    assert next(iter(trainer.get_train_dataloader()))["pixel_values"].shape == (2, 1, 3, 16, 24)
    assert all(map(math.isfinite, losses(trainer)))


def test_validation_images_have_the_first_size(tmp_path):
    trainer = make(
        tmp_path,
        resolution=["16x24", 16],
        max_steps=1,
        validation_prompts=["a"],
        num_validation_images=1,
        validation_inference_steps=1,
    )
    shapes = []
    trainer.family.denoiser.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[2:])))
    trainer.train()
    assert shapes[0] == shapes[-1] == (8, 12)  # drawn before and after the one step


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_a_stream_cannot_be_sorted(tmp_path):
    with pytest.raises(ValueError, match=r"streaming data set and 3 sizes in `resolution`.* name one size, or load"):
        make(tmp_path, dataset=supervised().to_iterable_dataset())
    with pytest.raises(ValueError, match=r"streaming data set and 3 sizes in `resolution`"):
        make(tmp_path, eval_dataset={"held_out": supervised().to_iterable_dataset()})


def test_a_bucket_smaller_than_a_step(tmp_path):
    with pytest.raises(ValueError, match=r"Found 4 rows in the bucket 24x16, fewer than the 8 of one optimizer step"):
        make(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)


def test_a_bucket_that_is_no_multiple(tmp_path):
    with pytest.raises(ValueError, match=r"resolution=16x25, expected a multiple of 2 .*: use 16x24 or 16x26"):
        make(tmp_path, resolution=[16, "16x25"])


def test_a_bucket_of_one_kind(tmp_path):
    data = unpaired().filter(lambda row: row["label"] or row["image"].size != (27, 40))
    with pytest.raises(ValueError, match=r"expected liked and disliked images in each: set `desirable_ratio=None`"):
        make(tmp_path, "kto", dataset=data, per_device_train_batch_size=2).train()
