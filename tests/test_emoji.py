"""The embedded example: its data contract, its models, its judges, and the demo itself."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Image, Value, load_dataset
from diffusers import StableDiffusionPipeline
from PIL import Image as PILImage


EMOJI = Path(__file__).parents[1] / "examples" / "emoji"
sys.path.insert(0, str(EMOJI))

from common import LIKED, STYLES  # noqa: E402
from scoring import Judges, Sample, colourfulness  # noqa: E402


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


def test_colourfulness():
    """Known answers: a grey has none; half red and half green has a spread of 255 and a mean of 127.5."""
    grey = PILImage.new("RGB", (8, 8), (90, 90, 90))
    both = PILImage.new("RGB", (8, 8), (255, 0, 0))
    both.paste((0, 255, 0), (0, 0, 4, 8))
    # Red minus green is +-255, (red + green) / 2 - blue is 127.5 throughout.
    assert colourfulness([grey, both]) == pytest.approx([0.0, 255 + 0.3 * 127.5])


@pytest.mark.slow
def test_study(tmp_path, monkeypatch):
    """The comparison from end to end, with steps and samples as few as can be."""
    import study

    monkeypatch.setitem(study.COMMON, "max_steps", 1)
    monkeypatch.setattr(study, "IMAGES_PER_STEP", 4)
    for method in study.METHODS:
        monkeypatch.setitem(study.METHOD[method], "per_device_train_batch_size", 2)
    monkeypatch.setattr(study, "SAMPLING_STEPS", 1)
    monkeypatch.setattr(study, "prompts_of", lambda kind: ["red apple", "key"] if kind == "feedback" else ["rocket"])
    monkeypatch.setattr(study, "SEEDS", (0, 1))
    monkeypatch.setattr(study, "MANY", {"feedback": 1, "held_out": 1})
    monkeypatch.setattr(study, "BASE", study.Run("drawings", "base", samples={"feedback": 1, "held_out": 1}))
    study.pairs_of_samples(tmp_path / "samples.parquet", per_prompt=4)
    pairs = study.training_data("samples", tmp_path)
    assert len(pairs) == 4
    for row in pairs:
        chosen, rejected = colourfulness([row["chosen"], row["rejected"]])
        assert chosen >= rejected

    def run_here(runs, work, jobs):
        for run in runs:
            study.train(run, work)
        return [json.loads((work / f"{run.name}.json").read_text()) for run in runs]

    monkeypatch.setattr(study, "run_all", run_here)
    args = argparse.Namespace(work=tmp_path, results=tmp_path, images=tmp_path, jobs=1)
    (tmp_path / "learning_rates.json").write_text(json.dumps(dict.fromkeys(study.METHODS, 1e-4)))
    study.compare(args)
    table = (tmp_path / "comparison.md").read_text()
    assert all(table.count(f"| {method.upper()} | 0.0001 |") == 2 for method in study.METHODS)
    assert (tmp_path / "comparison.png").is_file()


@pytest.mark.slow
def test_study_of_draws(tmp_path, monkeypatch):
    """As short as can be; what is measured once is not measured again."""
    import study

    few = study.load_dataset(str(study.HERE / "data"), "feedback", split="train").select(range(8))
    monkeypatch.setattr(study, "load_dataset", lambda *args, **kwargs: few)
    monkeypatch.setattr(study, "IMAGES_PER_STEP", 4)
    monkeypatch.setattr(study, "DRAWS_STEPS", 5)
    monkeypatch.setattr(study, "SEEDS", (0,))
    monkeypatch.setattr(study, "NUM_DRAWS", (1, None))
    args = argparse.Namespace(work=tmp_path / "work", results=tmp_path)
    study.draws(args)
    table = (tmp_path / "draws.md").read_text()
    rows = [line.split(" | ")[0] for line in table.splitlines()]
    assert rows == ["| draws", "| ---", "| 1", "| all"]
    monkeypatch.setattr(study, "load_dataset", lambda *args, **kwargs: few.select(range(0)))
    study.draws(args)
    assert (tmp_path / "draws.md").read_text() == table


def test_cyanotypes(drawings):
    """The closed-form judge on what it was made for, on the drawings, and on known answers."""
    from styles import PRUSSIAN_BLUE, cyanotype, is_cyanotype

    plain = [image.convert("RGB") for image in drawings["image"][:]]
    assert all(is_cyanotype(image) for image in cyanotype(plain, []))
    assert sum(is_cyanotype(image) for image in plain) <= 0.05 * len(plain)
    ends = PILImage.new("RGB", (8, 8), (0, 0, 0))
    ends.paste((255, 255, 255), (0, 0, 4, 8))
    (blue,) = cyanotype([ends], [])
    assert sorted(colour for _, colour in blue.getcolors()) == [tuple(PRUSSIAN_BLUE.astype(int)), (255, 255, 255)]
    assert not is_cyanotype(ends)
    assert not is_cyanotype(PILImage.new("RGB", (8, 8), "white"))  # no ink


def test_pairs_of_silhouettes(drawings, prompts):
    from styles import style_pairs

    pairs = style_pairs("silhouette", prompts["feedback"][:2])
    by_style = {
        (row["prompt"], row["style"]): row["image"].convert("RGB").tobytes() for row in drawings if not row["held_out"]
    }
    assert pairs["prompt"][:] == [prompt for prompt in prompts["feedback"][:2] for _ in range(3)]
    rejected = {row["rejected"].tobytes() for row in pairs}
    assert rejected == {
        pixels for (prompt, style), pixels in by_style.items() if style != LIKED and prompt in pairs["prompt"][:]
    }
    assert all(row["chosen"].tobytes() == by_style[row["prompt"], LIKED] for row in pairs)


@pytest.mark.slow
def test_curves(tmp_path, monkeypatch, prompts):
    """The plots and the table of the docs, of runs as short as can be."""
    import study

    monkeypatch.setitem(study.COMMON, "max_steps", 2)
    for method in study.METHODS:
        monkeypatch.setitem(study.METHOD[method], "per_device_train_batch_size", 12 if method == "kto" else 2)
    monkeypatch.setattr(study, "SAMPLING_STEPS", 1)
    monkeypatch.setattr(study, "prompts_of", lambda kind: prompts[kind][:2])
    monkeypatch.setattr(study, "BASE", study.Run("drawings", "base", samples={"feedback": 1}))

    def run_here(runs, work, jobs):
        for run in runs:
            study.train(run, work)
        return [json.loads((work / f"{run.name}.json").read_text()) for run in runs]

    monkeypatch.setattr(study, "run_all", run_here)
    study.curves(argparse.Namespace(work=tmp_path, results=tmp_path, images=tmp_path, jobs=1))
    table = (tmp_path / "curves.md").read_text()
    assert all(f"| {name} | 2 |" in table for name in (*study.CURVES, *study.GUARDS, "Diffusion-KTO"))
    for name in ("curves_ill", "curves_guards", "curves_kto"):
        width, height = PILImage.open(tmp_path / f"{name}.png").size
        assert min(width, height) >= 400
        assert (tmp_path / f"{name}.png").stat().st_size < 300_000


@pytest.mark.slow
def test_style_study(tmp_path, monkeypatch, prompts):
    """From the pairs to table and pictures, with steps and samples as few as can be."""
    import study
    import styles

    monkeypatch.setattr(study, "STYLE_STEPS", 1)
    for method in study.METHODS:
        monkeypatch.setitem(study.METHOD[method], "per_device_train_batch_size", 2)
    monkeypatch.setattr(study, "SAMPLING_STEPS", 1)
    monkeypatch.setattr(styles, "SAMPLING_STEPS", 1)
    monkeypatch.setattr(study, "prompts_of", lambda kind: prompts[kind][:2])
    monkeypatch.setattr(study, "SEEDS", (0,))
    monkeypatch.setattr(study, "MANY", {"feedback": 1, "held_out": 2})
    started = []

    def run_here(runs, work, jobs):
        for target in study.STYLE_TARGETS:
            study.prepare_style(target, work)
        for run in runs:
            if not (work / f"{run.name}.json").exists():
                started.append(run.name)
                study.train(run, work)
        return [json.loads((work / f"{run.name}.json").read_text()) for run in runs]

    monkeypatch.setattr(study, "run_all", run_here)
    args = argparse.Namespace(work=tmp_path, results=tmp_path, images=tmp_path, jobs=1)
    (tmp_path / "learning_rates.json").write_text(json.dumps(dict.fromkeys(study.METHODS, 1e-4)))
    study.styles(args)
    table = (tmp_path / "styles.md").read_text()
    assert all(table.count(f"| {method.upper()} |") == 2 for method in study.METHODS)
    assert table.count("| held-out pictures in the style | 100 |") == 2
    assert (tmp_path / "styles.png").is_file()
    assert len(started) == 2 * (1 + len(study.METHODS))
    study.styles(args)  # what is there is not made again
    assert len(started) == 2 * (1 + len(study.METHODS))


@pytest.mark.slow
def test_train_base(tmp_path):
    """The supervised fine-tuning that made the base: here two steps of it, from random weights."""
    command = [sys.executable, str(EMOJI / "train_base.py"), "--output_dir", str(tmp_path / "run")]
    command += ["--out", str(tmp_path / "base"), "--max_steps", "2", "--per_device_train_batch_size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    made = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    ours = StableDiffusionPipeline.from_pretrained(EMOJI / "base")
    assert made.unet.config.down_block_types == ours.unet.config.down_block_types
    assert made.scheduler.config.prediction_type == ours.scheduler.config.prediction_type == "v_prediction"
    for name, p in ours.text_encoder.state_dict().items():
        assert torch.equal(made.text_encoder.state_dict()[name], p), name


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
