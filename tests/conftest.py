"""Tiny random pipelines and data sets; no hub, no download."""

import os


os.environ.pop("CI", None)  # it hides TRL's telemetry call, which a diffusion model cannot answer
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from tests.tiny import tiny_stable_diffusion


torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A tiny Stable Diffusion 1.x pipeline on disk, epsilon prediction, 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(folder)
    return str(folder)


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
