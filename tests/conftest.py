"""Tiny random pipelines and data sets; no hub, no download."""

import atexit
import os
import re
import shutil
import sys
import tempfile


os.environ.pop("CI", None)  # it hides TRL's telemetry call, which a diffusion model cannot answer
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
if "pytest" in sys.modules:  # and not a process that a test has started, which inherits the folder
    # What the `datasets` library keeps on disk, embeddings among it, must not pass from one run to the next.
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="trl-diffusion-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from tests.tiny import tiny_clip, tiny_stable_diffusion
from trl_diffusion import redaction


torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A tiny Stable Diffusion 1.x pipeline on disk, epsilon prediction, 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny CLIP with its processor on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    tiny_clip(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def no_secrets_of_other_tests():
    """What was once a secret in this process would be redacted for ever."""
    yield
    redaction._known.clear()


@pytest.fixture
def refused(capsys):
    """Runs `trl-diffusion` with a wrong input and returns what it writes on stderr: one line, with exit code 2."""

    def run(*argv) -> str:
        from trl_diffusion.cli import main

        capsys.readouterr()
        datasets.disable_progress_bars()  # as the command does, before the library is imported
        try:
            with pytest.raises(SystemExit) as exit_:
                main(list(map(str, argv)))
        finally:
            datasets.enable_progress_bars()
        lines = capsys.readouterr().err.strip().splitlines()
        assert exit_.value.code == 2
        assert len(lines) == 1, "\n".join(lines)
        assert re.match(r"trl-diffusion[ \w]*: error: \S", lines[0]), lines[0]
        return lines[0]

    return run


@pytest.fixture
def sd():
    return tiny_stable_diffusion()


def picture(seed: int, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


def unpaired(rows: int = 12) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [f"picture {i % 5}" for i in range(rows)],
            "image": [picture(i) for i in range(rows)],
            "label": [i % 3 == 0 for i in range(rows)],
        },
        features=Features({"prompt": Value("string"), "image": Image(), "label": Value("bool")}),
    )


@pytest.fixture(scope="session")
def feedback():
    return unpaired()


def pairs(rows: int = 12) -> Dataset:
    """Paired data; the seeds of the pictures are those of no picture of [`unpaired`]."""
    return Dataset.from_dict(
        {
            "prompt": [f"picture {i % 5}" for i in range(rows)],
            "chosen": [picture(1000 + 2 * i) for i in range(rows)],
            "rejected": [picture(1001 + 2 * i) for i in range(rows)],
        },
        features=Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()}),
    )


def embed(images: list[PILImage.Image], prompts: list[str]) -> np.ndarray:
    """An embedding without a model: mean colour of the image, and a direction that the prompt's letters tell."""
    colours = [np.asarray(image, np.float32).mean((0, 1)) / 127.5 - 1 for image in images]
    angles = [sum(map(ord, prompt)) for prompt in prompts]
    # The mean colours of noise differ little, which the factor makes up for.
    return np.array([[*(10 * c), np.cos(a), np.sin(a)] for c, a in zip(colours, angles, strict=True)], np.float32)
