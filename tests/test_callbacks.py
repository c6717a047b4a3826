"""Sample images during training: the right files at the right steps, in all trackers, without a trace in the run."""

import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import TrainerCallback

from tests import methods
from tests.conftest import picture
from trl_diffusion import DiffusionKTOTrainer, LogImagesCallback
from trl_diffusion.callbacks import image_grid, sample_rows


PROMPTS = ["a cat", "a dog"]


def make_trainer(model, folder, **changes) -> DiffusionKTOTrainer:
    settings = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    return methods.make_trainer("kto", model, folder, **settings | changes)


def samples(**changes) -> dict:
    return {
        "validation_prompts": PROMPTS,
        "validation_steps": 2,
        "num_validation_images": 3,
        "validation_inference_steps": 2,
    } | changes


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def written(folder) -> list[str]:
    return sorted(path.name for path in (Path(folder) / "samples").glob("*"))


# ---- The grids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "steps", "expected"), [(1, 2, [0, 1, 2]), (2, 3, [0, 2, 3]), (2, 4, [0, 2, 4]), (500, 1, [0, 1])]
)
def test_grids_at_the_start_the_steps_and_the_end(sd, tmp_path, every, steps, expected):
    make_trainer(sd, tmp_path, max_steps=steps, **samples(validation_steps=every)).train()
    assert written(tmp_path) == [f"step-{step:06d}.png" for step in expected]


def test_a_grid_has_a_row_per_prompt_and_changes_with_the_weights(sd, tmp_path):
    make_trainer(sd, tmp_path, max_steps=2, **samples()).train()
    first, last = (Image.open(tmp_path / "samples" / f"step-{step:06d}.png") for step in (0, 2))
    assert first.size == last.size
    assert first.width == 3 * (16 + 4) + 4
    assert first.height > 2 * (16 + 4) + 4  # the captions take some more
    assert not np.array_equal(np.asarray(first), np.asarray(last))


def test_same_weights_draw_the_same_grid(sd, tmp_path):
    make_trainer(sd, tmp_path, learning_rate=0.0, max_steps=2, **samples(validation_steps=1)).train()
    first = pixels(tmp_path / "samples" / "step-000000.png")
    for step in (1, 2):
        np.testing.assert_array_equal(pixels(tmp_path / "samples" / f"step-{step:06d}.png"), first)


def test_a_grid_shows_what_the_pipeline_draws(sd, tmp_path):
    """The i-th image of each row starts from seed + i, drawn by the pipeline as a user would call it."""
    trainer = make_trainer(sd, tmp_path)
    grid = LogImagesCallback(
        trainer, PROMPTS, num_images_per_prompt=2, num_inference_steps=2, guidance_scale=3.0, seed=5
    ).draw()
    sd.unet.eval()
    for i, prompt in enumerate(PROMPTS):
        for j in range(2):
            generator = torch.Generator().manual_seed(5 + j)
            image = sd(prompt, generator=generator, num_inference_steps=2, guidance_scale=3.0).images[0]
            left, top = 4 + j * 20, 4 + (i + 1) * (grid.height - 4) // 2 - 20
            place = grid.crop((left, top, left + 16, top + 16))
            np.testing.assert_allclose(np.asarray(place, int), np.asarray(image, int), atol=1)


def test_resolution_of_the_samples_is_the_trainings(sd, tmp_path):
    make_trainer(sd, tmp_path, max_steps=1, resolution=8, **samples(num_validation_images=1)).train()
    assert Image.open(tmp_path / "samples" / "step-000000.png").width == 8 + 2 * 4


def test_a_resumed_run_adds_its_grids(sd_folder, tmp_path):
    changes = samples(validation_steps=1) | {"save_strategy": "steps", "save_steps": 1}
    make_trainer(sd_folder, tmp_path, max_steps=1, **changes).train()
    before = (tmp_path / "samples" / "step-000000.png").stat().st_mtime_ns
    make_trainer(sd_folder, tmp_path, max_steps=2, **changes).train(resume_from_checkpoint=True)
    assert written(tmp_path) == [f"step-{step:06d}.png" for step in (0, 1, 2)]
    assert (tmp_path / "samples" / "step-000000.png").stat().st_mtime_ns == before
    whole = make_trainer(sd_folder, tmp_path / "whole", max_steps=2, **changes)
    whole.train()
    np.testing.assert_array_equal(
        pixels(tmp_path / "samples" / "step-000002.png"), pixels(tmp_path / "whole" / "samples" / "step-000002.png")
    )


# ---- No trace in the run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"disable_dropout": False}], ids=["plain", "with dropout"])
def test_samples_change_nothing_of_the_training(sd_folder, tmp_path, changes):
    """Dropout draws from the global generator, which sampling must leave as it was."""
    runs = []
    for name, extra in (("without", {}), ("with", samples(validation_steps=1))):
        trainer = make_trainer(sd_folder, tmp_path / name, **changes | extra)
        trainer.train()
        runs.append(trainer)
    without, with_samples = ([e["loss"] for e in trainer.state.log_history if "loss" in e] for trainer in runs)
    assert len(without) == 3
    assert without == with_samples
    expected = runs[0].model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in runs[1].model.state_dict().items())


class Modes(TrainerCallback):
    def __init__(self, pipeline):
        self.pipeline, self.seen = pipeline, []

    def on_step_begin(self, args, state, control, **kwargs):
        modules = ("unet", "vae", "text_encoder")
        self.seen.append(tuple(getattr(self.pipeline, name).training for name in modules))


def test_modes_of_the_modules_are_restored(sd, tmp_path):
    modes = Modes(sd)
    make_trainer(sd, tmp_path, callbacks=[modes], **samples(validation_steps=1)).train()
    assert modes.seen == [(True, False, False)] * 3


@pytest.mark.parametrize("fails", [False, True])
def test_sample_rows_restores_modes_random_states_and_progress_bar(sd, monkeypatch, fails):
    sd.unet.train()
    sd.vae.eval()
    sd.set_progress_bar_config(desc="mine")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    if fails:
        monkeypatch.setattr(sd.vae, "decode", None)
        with pytest.raises(TypeError):
            sample_rows(sd, PROMPTS, [0], num_inference_steps=1)
    else:
        rows = sample_rows(sd, PROMPTS, [0, 1, 2], num_inference_steps=1)
        assert [len(row) for row in rows] == [3, 3]
    assert torch.equal(torch.get_rng_state(), state)
    assert sd.unet.training
    assert not sd.vae.training
    assert sd._progress_bar_config == {"desc": "mine"}


def test_samples_of_dropout_are_switched_off(sd):
    """The pipeline's UNet has dropout 0.1: in train mode two drawings would differ."""
    sd.unet.train()
    first, second = (sample_rows(sd, ["a cat"], [0], num_inference_steps=2)[0][0] for _ in range(2))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


# ---- Trackers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "steps"), [(2, [0, 2, 3]), (3, [0, 3])], ids=["end between", "end at a step"])
def test_tensorboard(sd, tmp_path, every, steps):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_trainer(sd, tmp_path, report_to="tensorboard", **samples(validation_steps=every)).train()
    event_file = next(tmp_path.rglob("events.out.tfevents*"))
    events = EventAccumulator(str(event_file.parent))
    events.Reload()
    images = events.Images("samples")
    assert [image.step for image in images] == steps
    for image in images:
        sent = tmp_path / f"{image.step}.png"
        sent.write_bytes(image.encoded_image_string)
        np.testing.assert_array_equal(pixels(sent), pixels(tmp_path / "samples" / f"step-{image.step:06d}.png"))
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [1, 2, 3]
    assert events.Scalars("train/loss")[0].value == 0.5
    assert "train/rewards/margins" in events.Tags()["scalars"]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The folder of a run that went to wandb and trackio, in a process of its own: they keep state in modules."""
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "home").mkdir()
    code = f"""
    import json, trackio, wandb
    from pathlib import Path
    from tests.test_callbacks import make_trainer, samples
    from tests.tiny import tiny_stable_diffusion
    from trackio.sqlite_storage import SQLiteStorage

    folder, trackers = Path({str(folder)!r}), ["wandb", "trackio"]
    make_trainer(tiny_stable_diffusion(), folder / "out", report_to=trackers, run_name="run", **samples()).train()
    wandb.finish()
    (run,) = SQLiteStorage.get_runs("huggingface")
    (folder / "trackio.json").write_text(json.dumps(SQLiteStorage.get_logs("huggingface", run), default=str))
    """
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_PROJECT": "test"}
    environment |= {"TRACKIO_DIR": str(folder / "trackio"), "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert written(folder / "out") == [f"step-{step:06d}.png" for step in (0, 2, 3)]
    return folder


def assert_scalars_arrived(logs: list[dict]) -> None:
    losses = {entry["train/global_step"]: entry["train/loss"] for entry in logs if "train/loss" in entry}
    assert list(losses) == [1, 2, 3]
    assert losses[1] == 0.5
    assert all("train/kl" in entry for entry in logs if "train/loss" in entry)


def wandb_history(file: Path) -> list[dict]:
    """What was logged in an offline run: records in blocks of 32 KiB, in the format of LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:  # too short for a record's head
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)  # after a checksum
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            items = Record.FromString(record).history.item
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
            record = b""
    return [row for row in rows if row]


@pytest.mark.slow
def test_wandb(tracked):
    (run,) = tracked.glob("wandb/offline-run-*")
    logs = wandb_history(next(run.glob("*.wandb")))
    assert_scalars_arrived(logs)
    grids = {
        entry["train/global_step"]: run / "files" / entry["samples/path"] for entry in logs if "samples/path" in entry
    }
    assert list(grids) == [0, 2, 3]
    for step, path in grids.items():
        np.testing.assert_array_equal(pixels(path), pixels(tracked / "out" / "samples" / f"step-{step:06d}.png"))


@pytest.mark.slow
def test_trackio(tracked):
    logs = json.loads((tracked / "trackio.json").read_text())
    assert_scalars_arrived(logs)
    assert [entry["train/global_step"] for entry in logs if "samples" in entry] == [0, 2, 3]
    sent = [pixels(path) for path in (tracked / "trackio" / "media").rglob("*.png")]
    for name in written(tracked / "out"):
        grid = pixels(tracked / "out" / "samples" / name)
        assert any(np.array_equal(grid, picture) for picture in sent)


# ---- image_grid -----------------------------------------------------------------------------------------------------


def test_image_grid_without_captions():
    rows = [[picture(3 * i + j, (20, 10)) for j in range(3)] for i in range(2)]
    grid = image_grid(rows, margin=2)
    assert grid.size == (3 * 22 + 2, 2 * 12 + 2)
    for i in range(2):
        for j in range(3):
            left, top = 2 + j * 22, 2 + i * 12
            place = grid.crop((left, top, left + 20, top + 10))
            np.testing.assert_array_equal(np.asarray(place), np.asarray(rows[i][j]))
    white = np.asarray(grid).copy()
    for i in range(2):
        for j in range(3):
            white[2 + i * 12 :][:10, 2 + j * 22 :][:, :20] = 255
    assert (white == 255).all()


def test_image_grid_rows_of_unequal_length():
    grid = image_grid([[picture(0)], [picture(1), picture(2), picture(3)]])
    assert grid.width == 3 * 20 + 4
    assert (np.asarray(grid.crop((24, 4, 64, 20))) == 255).all()


def test_image_grid_writes_captions():
    """Each row's caption stands above the row, and other words make other pixels."""
    rows = [[picture(0, (64, 64))], [picture(1, (64, 64))]]
    plain, cat, dog = image_grid(rows), image_grid(rows, ["cat", "cat"]), image_grid(rows, ["cat", "dog"])
    assert plain.width == cat.width == 72
    head = (cat.height - plain.height) // 2
    assert head >= 11
    assert cat.height == plain.height + 2 * head
    assert (np.asarray(cat.crop((0, 4, 72, 4 + head))) < 128).any()
    differ = np.flatnonzero((np.asarray(cat) != np.asarray(dog)).any(axis=(1, 2)))
    assert differ.min() >= 4 + 68 + head
    assert differ.max() < 4 + 68 + 2 * head


def test_long_captions_do_not_widen_the_grid():
    rows = [[picture(0, (64, 64)), picture(1, (64, 64))]]
    short, long = image_grid(rows, ["a"]), image_grid(rows, ["a very long caption " * 20])
    assert long.size == short.size
    margin = np.asarray(long)[:, -4:]
    assert (margin == 255).all()
    assert (np.asarray(long)[4:18, :-4] < 128).any()


@pytest.mark.parametrize("caption", ["word " * 20_000, "x" * 100_000, "猫" * 100_000, "." * 100_000])
def test_a_long_caption_is_measured_a_few_times(monkeypatch, caption):
    """Of 100,000 characters no more are looked at than could be seen, and the cut text fills the width."""
    measured = []
    textlength = ImageDraw.ImageDraw.textlength

    def counted(self, text, *args, **kwargs):
        measured.append((len(text), textlength(self, text, *args, **kwargs)))
        return measured[-1][1]

    monkeypatch.setattr(ImageDraw.ImageDraw, "textlength", counted)
    grid = image_grid([[picture(0, (64, 64)), picture(1, (64, 64))]], [caption])
    assert len(measured) < 12
    assert sum(length for length, _ in measured) < 4 * grid.width
    fitting = [width for _, width in measured if width <= grid.width - 8]
    assert max(fitting) > grid.width - 8 - 2 * 12  # no more than two characters are missing


@pytest.mark.parametrize("caption", ["", "two\nlines", "Ünïcödé 猫 🐈", " "])
def test_unusual_captions(caption):
    rows = [[picture(0, (64, 64))]]
    assert image_grid(rows, [caption]).size == image_grid(rows, ["plain"]).size


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_image_grid_of_other_modes(mode):
    image = picture(0, mode=mode)
    grid = image_grid([[image]])
    np.testing.assert_array_equal(np.asarray(grid.crop((4, 4, 20, 20))), np.asarray(image.convert("RGB")))
