"""What the scorers share: one signature, batches, a device, and weights without code in them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from PIL.Image import Image
from safetensors.torch import load_file
from typing_extensions import Self

from ..data.images import to_rgb


Scorer = Callable[[list[Image], list[str]], Sequence[float]]
"""From images and their prompts, two lists of the same length, to one number per image; higher is better."""


def default_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device or torch.device("cpu")


class ModelScorer(ABC):
    """
    A scorer around a frozen model, computed with in float32.

    Args:
        model (`torch.nn.Module`):
            The model.
        device (`torch.device` or `str`, *optional*):
            Where to compute. Defaults to the accelerator, or the CPU where there is none.
        batch_size (`int`, *optional*, defaults to `32`):
            Images per forward.
    """

    def __init__(self, model: torch.nn.Module, *, device: torch.device | str | None = None, batch_size: int = 32):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, found {batch_size}.")
        self.device = default_device() if device is None else torch.device(device)
        self.batch_size = batch_size
        self.model: Any = model.float().eval().requires_grad_(False).to(self.device)

    @classmethod
    def from_spec(cls, parts: list[str], device: torch.device | str | None = None) -> Self:
        """The scorer that the command line describes; `parts` are the first arguments of the constructor."""
        return cls(*parts, device=device)  # type: ignore[arg-type]  # the subclasses take nothing else by position

    @torch.no_grad()
    def __call__(self, images: list[Image], prompts: list[str]) -> list[float]:
        """
        Scores images.

        Args:
            images (`list[PIL.Image.Image]`): Any mode, any size.
            prompts (`list[str]`): The prompt of each image.

        Returns:
            `list[float]`: one score per image, higher is better.
        """
        if len(images) != len(prompts):
            raise ValueError(f"Found {len(images)} images and {len(prompts)} prompts, expected one prompt per image.")
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            batch = [to_rgb(image) for image in images[start : start + self.batch_size]]
            scores += self.score_batch(batch, prompts[start : start + self.batch_size]).tolist()
        return scores

    @abstractmethod
    def score_batch(self, images: list[Image], prompts: list[str]) -> torch.Tensor:
        """Scores of shape `(len(images),)`; the images are RGB."""


def score_images(name: str, scorer: Scorer, images: list[Image], prompts: list[str]) -> list[float]:
    """
    What `scorer` says, checked, since anybody's function may be a scorer.

    Raises:
        `ValueError`: if it returns another number of scores than of images, or one that is not finite.
    """
    scores = [float(score) for score in scorer(images, prompts)]
    if len(scores) != len(images):
        raise ValueError(
            f"The scorer {name!r} returned {len(scores)} scores for {len(images)} images, expected one per image."
        )
    if not all(map(math.isfinite, scores)):
        wrong = next(i for i, score in enumerate(scores) if not math.isfinite(score))
        raise ValueError(
            f"The scorer {name!r} returned {scores[wrong]} for {prompts[wrong]!r}, expected finite numbers."
        )
    return scores


def weights_file(model: str, filename: str) -> Path:
    """
    The file with a scorer's weights.

    Args:
        model (`str`): The file itself, a folder that holds it, or a Hub id.
        filename (`str`): Its published name.

    Raises:
        `ValueError`: if `model` is a folder without the file.
    """
    if Path(model).is_file():
        return Path(model)
    if Path(model).is_dir():
        if not (Path(model) / filename).is_file():
            raise ValueError(
                f"Found no {filename} in {model!r}: expected it there, or the path of a file with weights."
            )
        return Path(model) / filename
    return Path(hf_hub_download(model, filename))


def load_weights(file: Path) -> dict:
    """
    The tensors of a file by name: safetensors, or what `torch.save` wrote, of which nothing but plain data is read.
    """
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def load_converted(model: torch.nn.Module, weights: dict[str, torch.Tensor], source: Path) -> None:
    """
    `load_state_dict`, with an error that a person can read.

    Raises:
        `ValueError`: if the names or shapes are not the model's.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"The weights in {str(source)!r} do not fit: for {wrong[0]} found {found.get(wrong[0], 'nothing')}, "
            f"expected {expected.get(wrong[0], 'nothing')} ({len(wrong)} differ in all); pass the published file."
        )
    model.load_state_dict(weights)
