"""The embedded example: its data contract, its models, its judges, and the demo itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Image, Value, load_dataset
from diffusers import StableDiffusionPipeline


EMOJI = Path(__file__).parents[1] / "examples" / "emoji"
sys.path.insert(0, str(EMOJI))

from common import LIKED, STYLES  # noqa: E402
from scoring import Judges, Sample, wilson_interval  # noqa: E402


@pytest.fixture(scope="module")
def drawings():
    return load_dataset(str(EMOJI / "data"), "drawings", split="train")


@pytest.fixture(scope="module")
def prompts():
    return {
        kind: load_dataset(str(EMOJI / "data"), "prompts", split=kind)["prompt"][:]
        for kind in ("feedback", "held_out")
    }


def test_drawings(drawings, prompts):
    names = set(drawings["prompt"][:])
    assert len(names) >= 64
    assert set(prompts["feedback"]) | set(prompts["held_out"]) == names
    assert len(prompts["held_out"]) == len(names) // 4
    assert set(zip(drawings["prompt"][:], drawings["style"][:], strict=True)) == {
        (n, s) for n in names for s in STYLES
    }
    assert {row["image"].size for row in drawings} == {(64, 64)}


def test_feedback_never_shows_a_held_out_prompt(prompts):
    for name, columns in (("feedback", {"image"}), ("preferences", {"chosen", "rejected"})):
        data = load_dataset(str(EMOJI / "data"), name, split="train")
        assert not set(data["prompt"][:]) & set(prompts["held_out"])
        assert set(data["prompt"][:]) == set(prompts["feedback"])
        assert all(isinstance(data.features[column], Image) for column in columns)


def test_liked_is_one_style(drawings):
    feedback = load_dataset(str(EMOJI / "data"), "feedback", split="train")
    assert feedback.features["label"] == Value("bool")
    liked = {row["image"].tobytes() for row in feedback if row["label"]}
    assert liked == {row["image"].tobytes() for row in drawings if row["style"] == LIKED and not row["held_out"]}
    assert sum(feedback["label"][:]) * len(STYLES) == len(feedback)


def test_base_is_a_standard_pipeline_and_draws():
    pipeline = StableDiffusionPipeline.from_pretrained(EMOJI / "base")
    assert pipeline.unet.dtype == torch.float32
    images = pipeline(["red apple"] * 2, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert images[0].size == (64, 64)
    assert pipeline.unet.config.sample_size == 16


def test_repository_weight():
    files = [file for file in EMOJI.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= 25e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_judges_on_drawings(drawings, prompts):
    """None of these names was seen by the style judge in its training."""
    judges = Judges()
    images = drawings["image"][:]
    liked = [style == LIKED for style in drawings["style"][:]]
    found = [style == LIKED for style in judges.styles(images)]
    assert sum(a == b for a, b in zip(liked, found, strict=True)) / len(liked) >= 0.95
    samples = [Sample(row["prompt"], 0, row["image"]) for row in drawings]
    _, top1 = judges.content(samples, [*prompts["feedback"], *prompts["held_out"]])
    assert top1 >= 0.9


def test_wilson_interval():
    """Known answer: 10 of 100 gives [0.0552, 0.1744]."""
    assert wilson_interval(10, 100) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert wilson_interval(100, 100)[1] == pytest.approx(1.0)


@pytest.mark.slow
def test_demo(tmp_path):
    """The whole way with two steps; what a full run gives stands in the README."""
    command = [sys.executable, str(EMOJI / "demo.py"), "--output_dir", str(tmp_path), "--samples", "16"]
    done = subprocess.run(
        [*command, "--max_steps", "2", "--per_device_train_batch_size", "4"],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == 2
    for kind in ("feedback", "held_out"):
        for when in ("before", "after"):
            r = results[kind][when]
            assert r["samples"] >= 16
            assert 0 <= r["liked_low"] <= r["liked_share"] <= r["liked_high"] <= 1
    assert "liked style" in done.stdout
    assert (tmp_path / "before_after.png").is_file()
    assert (tmp_path / "curves.png").is_file()
    StableDiffusionPipeline.from_pretrained(tmp_path)
