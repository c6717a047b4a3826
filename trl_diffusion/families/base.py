"""What a model family has to tell: five short methods and a few names."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin

from ..likelihood import DDPMProcess


Conditioning = dict[str, torch.Tensor]


class Family(ABC):
    """
    One model family, bound to a pipeline.

    Args:
        pipeline (`DiffusionPipeline`): A complete pipeline of the family.
    """

    pipeline_class: ClassVar[str]
    """Exact name of the pipeline class."""
    denoiser_class: ClassVar[str]
    """Exact name of the denoiser's class."""
    denoiser_name: ClassVar[str]
    """The pipeline's attribute that is trained, e.g. `"unet"`."""
    lora_targets: ClassVar[list[str]]
    """Modules that LoRA adapts when the PEFT configuration names none."""

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline: Any = pipeline
        self.check()
        self.process = self.noise_process()

    @property
    def denoiser(self) -> ModelMixin:
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def frozen_modules(self) -> dict[str, torch.nn.Module]:
        """The pipeline's modules other than the denoiser, by name."""
        return {
            name: module
            for name, module in self.pipeline.components.items()
            if isinstance(module, torch.nn.Module) and name != self.denoiser_name
        }

    @abstractmethod
    def check(self) -> None:
        """Raises `ValueError` where the pipeline cannot be trained as it is."""

    @abstractmethod
    def noise_process(self) -> DDPMProcess:
        """How images are corrupted and what the denoiser answers."""

    @abstractmethod
    def default_resolution(self) -> int:
        """Side in pixels that the pipeline generates by default."""

    @abstractmethod
    def resolution_multiple(self) -> int:
        """Sides must be multiples of this many pixels."""

    @abstractmethod
    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """Shape of one image's latent."""

    @abstractmethod
    def encode_images(self, pixel_values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        Latents `(batch, *latent_shape)` as the denoiser knows them, for pixels `(batch, 3, height, width)` in [-1, 1];
        `noise`, of the latents' shape, picks the sample of the VAE's posterior.
        """

    @abstractmethod
    def encode_prompts(self, prompts: list[str], device: torch.device) -> Conditioning:
        """What [`denoise`] needs to know of `prompts`: tensors whose first dimension is the prompt."""

    @abstractmethod
    def denoise(self, model, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The denoiser's answer, of the shape of `x_t`. `model` is whatever wraps the denoiser."""
