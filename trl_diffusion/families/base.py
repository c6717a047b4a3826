"""What a model family has to tell: some names, and how its pipeline encodes prompts and images and calls its denoiser.

What most pipelines do alike stands here; a family's file holds what its own pipeline does otherwise. The calls were
read in the pipelines of diffusers 0.42.1, and the tests compare them with what those pipelines do.
"""

import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import DiffusionPipeline, ModelMixin

from ..likelihood import DDPMProcess, FlowProcess, NoiseProcess


Conditioning = dict[str, torch.Tensor]


class Posterior(NamedTuple):
    """The distribution of the latents of images: independent normal numbers, or, with `std` None, the mean itself."""

    mean: torch.Tensor
    std: torch.Tensor | None

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """The draw that the standard normal `noise`, of the shape of `mean`, picks."""
        return self.mean if self.std is None else self.mean + self.std * noise

    def scaled(self, shift: torch.Tensor | float, scale: torch.Tensor | float) -> "Posterior":
        """The distribution of `(latent - shift) * scale`."""
        return Posterior((self.mean - shift) * scale, None if self.std is None else self.std * scale)


def classifier_free_guidance(scale: float, negative_prompt: str) -> dict[str, Any]:
    """Arguments of pipelines that guide with `true_cfg_scale`, and only where they are given a negative prompt too."""
    return {"true_cfg_scale": scale} | ({"negative_prompt": negative_prompt} if scale > 1 else {})


def exact_size(options: dict[str, Any]) -> dict[str, Any]:
    """For pipelines that generate at the nearest size of their own list, and resize, unless they are told not to."""
    return options | ({"use_resolution_binning": False} if "height" in options else {})


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT_ATTENTION = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
"""The same for transformers in which the tokens of image and prompt attend to one another."""


FEW_STEP_SCHEDULERS = (
    "LCMScheduler",
    "TCDScheduler",
    "SCMScheduler",
    "CMStochasticIterativeScheduler",
    "FlowMatchLCMScheduler",
    "FlowMapEulerDiscreteScheduler",
    "HeliosDMDScheduler",
    "PiflowScheduler",
)
"""Schedulers of models that are distilled to few steps."""


class Family(ABC):
    """
    One model family, bound to a pipeline.

    Generating images, loading adapters and exporting need nothing but the family's names, so nothing is checked here:
    the trainers call [`check_trainable`].

    Args:
        pipeline (`DiffusionPipeline`): A pipeline of the family.
    """

    pipeline_class: ClassVar[str]
    """Exact name of the pipeline class."""
    denoiser_class: ClassVar[str]
    """Exact name of the denoiser's class."""
    denoiser_name: ClassVar[str] = "transformer"
    """The pipeline's attribute that is trained, e.g. `"unet"`."""
    components: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "tokenizer", "scheduler")
    """The pipeline's other attributes without which it cannot be trained."""
    vae_classes: ClassVar[tuple[str, ...]] = ("AutoencoderKL", "AsymmetricAutoencoderKL")
    """Names of the VAE's classes whose `encode` is known."""
    vae_options: ClassVar[tuple[str, ...]] = ("scaling_factor",)
    """Entries of the VAE's configuration without which the pipeline cannot decode latents."""
    latent_channels_option: ClassVar[str] = "latent_channels"
    """Entry of the VAE's configuration with the number of latent channels."""
    lora_targets: ClassVar[list[str]] = ATTENTION
    """Modules that LoRA adapts when the PEFT configuration names none."""
    timestep_sampling: ClassVar[str] = "uniform"
    """Distribution of the timesteps where the configuration names none, see [`~likelihood.TimestepSampling`]."""
    conditions_on_size: ClassVar[bool] = False
    """Whether [`denoise`] finds `"sizes"` in the conditioning, see [`~data.examples.ExampleBuilder`]."""
    has_idle_parameters: ClassVar[bool] = False
    """Whether some of the denoiser's parameters have no part in its answer, and so never get a gradient."""
    prompt_mask: ClassVar[str | None] = None
    """The mask in the conditioning, where [`encode_prompts`] pads prompts, with zeros, to the longest of them."""
    patch_size: ClassVar[int] = 1
    """Latent pixels along the side of one token of a transformer."""
    loads_lora: ClassVar[bool] = True
    """Whether the pipeline has `save_lora_weights` and `load_lora_weights`; else LoRA is saved as PEFT saves it."""
    comfyui_modules: ClassVar[str | None] = None
    """Of a transformer: the modules (a regular expression) that ComfyUI finds in a LoRA file by their names in
    diffusers; None if it finds none."""
    packs_latents: ClassVar[bool] = False
    """Whether the pipeline, and not the denoiser, stacks the latent pixels of a token into channels."""

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline: Any = pipeline

    @cached_property
    def process(self) -> Any:
        """How images are corrupted, read from the pipeline's scheduler once: sampling cannot disturb the training."""
        return self.noise_process()

    @property
    def denoiser(self) -> ModelMixin:
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def proportion_empty_prompts(self) -> float:
        """
        Share of the training examples that lose their prompt where the configuration names none: 0 for a model that is
        conditioned on the guidance scale and sampled without an unconditional side.
        """
        return 0.2

    @property
    def is_quantized(self) -> bool:
        """Whether some of the denoiser's weights are packed integers, or a tensor class that stands for such."""
        return any(type(p.data) is not torch.Tensor or not p.is_floating_point() for p in self.denoiser.parameters())

    @property
    def frozen_modules(self) -> dict[str, torch.nn.Module]:
        """The pipeline's modules other than the denoiser, by name."""
        return {
            name: module
            for name, module in self.pipeline.components.items()
            if isinstance(module, torch.nn.Module) and name != self.denoiser_name
        }

    @property
    def latent_channels(self) -> int:
        return self.pipeline.vae.config[self.latent_channels_option]

    def check_trainable(self) -> None:
        """
        Checks what training needs of the pipeline, and reads the noise process.

        Raises:
            `ValueError`: if the pipeline cannot be trained as it is.
        """
        parts = {name: getattr(self.pipeline, name) for name in (self.denoiser_name, *self.components)}
        self.check_parts({name: None if part is None else type(part) for name, part in parts.items()})
        self.check_configs(self.pipeline.config, self.denoiser.config, self.pipeline.vae.config)
        self.check_scheduler()
        sign = self.few_step_sign()
        if sign is not None:
            warnings.warn(
                f"Found a {self.pipeline_class} {sign}: if it is one, it forgets to generate in few steps while it "
                "trains, so train the model that it was distilled from.",
                stacklevel=2,
            )

    @classmethod
    def check_parts(cls, found: Mapping[str, type | None]) -> None:
        """
        Checks the pipeline's parts. Like [`check_configs`] it needs no weights, and is called before they are loaded.

        Args:
            found (`dict[str, type]`): Classes of the parts by name: None where there is none, `object` if not known.

        Raises:
            `ValueError`: if one is missing, or the VAE is of a class whose latents are not those of the denoiser.
        """
        missing = [name for name, part in found.items() if part is None]
        if missing:
            raise ValueError(
                f"Found a {cls.pipeline_class} without {missing[0]}, which training needs: load the whole pipeline."
            )
        vae = found.get("vae", object) or object
        if vae is not object and not {part.__name__ for part in vae.__mro__} & set(cls.vae_classes):
            raise ValueError(
                f"Found {vae.__name__} as the VAE of a {cls.pipeline_class}, expected {cls.vae_classes[0]}: load the "
                "pipeline with the VAE that its denoiser was trained with."
            )

    @classmethod
    def check_configs(cls, pipeline: Mapping[str, Any], denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
        """
        Checks the configurations of pipeline, denoiser and VAE, in which older files lack newer entries.

        Raises:
            `ValueError`: if such a model cannot be trained.
        """
        empty = [name for name in cls.vae_options if name in vae and vae[name] is None]
        if empty:
            raise ValueError(
                f"Found a VAE with {empty[0]}=None, without which a {cls.pipeline_class} cannot decode latents: set "
                f"it, for example `pipeline.vae.register_to_config({empty[0]}=...)`."
            )
        found, latent = denoiser.get("in_channels"), vae.get(cls.latent_channels_option)
        if found is None or latent is None:
            return
        expected = latent * (cls.patch_size**2 if cls.packs_latents else 1)
        if found != expected:
            raise ValueError(
                f"Found a {cls.denoiser_class} with {found} input channels over a VAE with {latent}: expected a "
                f"text-to-image {cls.denoiser_class}, whose input is the latent alone, in {expected} channels (those "
                "for inpainting or control take more)."
            )
        predicted, known = denoiser.get("out_channels"), cls.output_channels(found)
        if predicted is not None and predicted not in known:
            raise ValueError(
                f"Found a {cls.denoiser_class} with {predicted} output channels over {found} of input, expected "
                f"{known[0]}: what it predicts besides (a variance, for twice as many) is not supported."
            )

    @classmethod
    def output_channels(cls, in_channels: int) -> tuple[int, ...]:
        """Numbers of channels that [`denoise`] knows to handle as the denoiser's output."""
        return (in_channels,)

    def check_scheduler(self) -> None:
        """
        Checks the scheduler alone, and reads the noise process.

        Raises:
            `ValueError`: if it is one of few-step models, or of an unknown noise process.
        """
        name = type(self.pipeline.scheduler).__name__
        if name in FEW_STEP_SCHEDULERS:
            raise ValueError(
                f"Found a {self.pipeline_class} with {name}, which is for models that are distilled to few steps: "
                "expected the model that it was distilled from, with its own scheduler."
            )
        self.process = self.noise_process()

    def few_step_sign(self) -> str | None:
        """
        What in the configuration is as few-step models have it, and the base models of the family do not. Others may
        have it, so that it is a reason to warn and not to refuse.
        """
        return None

    @abstractmethod
    def noise_process(self) -> NoiseProcess:
        """How images are corrupted and what the denoiser answers."""

    def timestep_shift(self, height: int, width: int) -> float:
        """
        The shift towards noise of the timesteps of images of so many pixels, see [`~likelihood.TimestepSampling`]; 1
        is none.
        """
        return 1.0

    def default_resolution(self) -> int:
        """Side in pixels that the pipeline generates by default."""
        return self.denoiser.config.sample_size * self.pipeline.vae_scale_factor

    def resolution_multiple(self) -> int:
        """Sides must be multiples of this many pixels."""
        return self.pipeline.vae_scale_factor * self.patch_size

    @classmethod
    def scale_factor(cls, vae: Mapping[str, Any]) -> int:
        """Pixels along the side of one latent pixel, from the VAE's configuration: the `vae_scale_factor`."""
        return 2 ** (len(vae["block_out_channels"]) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape `(channels, height, width)` of the latent of an image of so many pixels."""
        scale = self.pipeline.vae_scale_factor
        return (self.latent_channels, height // scale, width // scale)

    def posterior(self, pixel_values: torch.Tensor) -> Posterior:
        """What the VAE makes of pixels, float32 and not scaled."""
        posterior = self.pipeline.vae.encode(pixel_values.to(self.pipeline.vae.dtype)).latent_dist
        return Posterior(posterior.mean.float(), posterior.std.float())

    def encode_prompt(self, prompts: list[str], **kwargs: Any) -> Any:
        """
        The pipeline's `encode_prompt` as its call uses it: what is not given has the default of the call, which is not
        always that of `encode_prompt` (Qwen-Image: 512 tokens, and not 1024).
        """
        call = inspect.signature(type(self.pipeline).__call__).parameters
        known = inspect.signature(self.pipeline.encode_prompt).parameters.keys() & call.keys() - {"prompt"}
        defaults = {name: call[name].default for name in known if call[name].default is not inspect.Parameter.empty}
        return self.pipeline.encode_prompt(prompts, **defaults | kwargs)

    @abstractmethod
    def encode_images(self, pixel_values: torch.Tensor) -> Posterior:
        """
        The distribution of the latents `(batch, *latent_shape)`, float32 and scaled as the denoiser knows them, for
        pixels `(batch, 3, height, width)` in [-1, 1].
        """

    @abstractmethod
    def encode_prompts(self, prompts: list[str], device: torch.device) -> Conditioning:
        """
        What [`denoise`] needs to know of `prompts`: tensors whose first dimension is the prompt. An empty prompt is
        encoded as the pipeline encodes the absence of one, for classifier-free guidance.

        Where prompts are as long as they are, the tensors are as long as the longest; behind the end of a shorter one
        its mask is 0 and so are its embeddings, so that rows of other batches can be stacked when padded alike.
        """

    def separate(self, conditioning: Conditioning) -> list[Conditioning]:
        """The conditioning of each prompt by itself, without what it was padded with."""
        rows = [dict(zip(conditioning, row, strict=True)) for row in zip(*conditioning.values(), strict=True)]
        if self.prompt_mask is None:
            return rows
        return [{name: part[: int(row[self.prompt_mask].sum())] for name, part in row.items()} for row in rows]

    def sampling_kwargs(self, **options: Any) -> dict[str, Any]:
        """
        Arguments of the pipeline's call for what a user asks of every family alike.

        Args:
            **options: `guidance_scale`, `height` and `width`, as far as they are given; others are passed on.
        """
        return options

    @abstractmethod
    def denoise(self, model, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """
        The denoiser's answer, of the shape of `x_t`.

        Args:
            model: The denoiser, or whatever wraps it.
            x_t (`torch.Tensor` of shape `(batch, *latent_shape)`): Corrupted latents.
            t (`torch.Tensor` of shape `(batch,)`): Timesteps, in the terms of the noise process.
            conditioning (`dict` of tensors): What [`encode_prompts`] gave, row by row for the images.
        """


class DDPMFamily(Family):
    """A family that is trained by the noise process of DDPM."""

    process: DDPMProcess

    def noise_process(self) -> DDPMProcess:
        return DDPMProcess.from_scheduler(self.pipeline.scheduler)

    def few_step_sign(self) -> str | None:
        config = self.pipeline.scheduler.config
        trailing = config.get("timestep_spacing") == "trailing" and not config.get("rescale_betas_zero_snr")
        if not trailing or self.process.prediction_type != "epsilon":
            return None
        return "whose scheduler has timestep_spacing='trailing', as those of SD-Turbo and SDXL-Turbo have"

    def encode_images(self, pixel_values: torch.Tensor) -> Posterior:
        return self.posterior(pixel_values).scaled(0.0, self.pipeline.vae.config.scaling_factor)


class FlowFamily(Family):
    """A family that is trained by flow matching, on a transformer."""

    process: FlowProcess
    # Of the SD3 paper; with an exponential shift it is the logit-normal whose mean is the scheduler's mu.
    timestep_sampling = "logit_normal"

    def noise_process(self) -> FlowProcess:
        return FlowProcess.from_scheduler(self.pipeline.scheduler)

    def timestep_shift(self, height: int, width: int) -> float:
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return config.get("shift", config.get("flow_shift"))
        # The scheduler's `time_shift` is this shift, with mu or exp(mu): t -> m / (m + 1 / t - 1).
        multiple = self.resolution_multiple()
        mu = self.shift_mu((height // multiple) * (width // multiple))
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu

    def shift_mu(self, sequence_length: int) -> float:
        """The scheduler's `mu` for images of so many tokens, as the pipelines' `calculate_shift` computes it."""
        config = self.pipeline.scheduler.config
        shortest, longest = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return low + (high - low) * (sequence_length - shortest) / (longest - shortest)

    def encode_images(self, pixel_values: torch.Tensor) -> Posterior:
        config = self.pipeline.vae.config
        return self.posterior(pixel_values).scaled(config.get("shift_factor") or 0.0, config.scaling_factor)
