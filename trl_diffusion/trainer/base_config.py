"""Settings that all trainers share."""

import copy
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import PipelineQuantizationConfig
from trl.trainer.base_config import _BaseConfig

from ..data.buckets import parse_sizes, show_size
from ..engines import load_frozen_models_whole
from ..likelihood import TIMESTEP_SAMPLINGS, WEIGHTINGS
from ..redaction import redacted


# Lowest value, whether it is allowed itself, the value from which on it is too large, whether it must be whole.
_COUNT, _FROM_ZERO, _POSITIVE = (1, True, math.inf, True), (0, True, math.inf, False), (0, False, math.inf, False)
_NUMBERS = {
    **dict.fromkeys(
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps ddp_timeout num_ref_draws "
        "save_total_limit eval_accumulation_steps torch_empty_cache_steps dataloader_prefetch_factor "
        "ddp_bucket_cap_mb validation_steps num_validation_images validation_inference_steps "
        "error_growth_patience".split(),
        _COUNT,
    ),
    **dict.fromkeys(
        "learning_rate weight_decay adam_epsilon max_grad_norm warmup_steps eval_delay error_growth_limit "
        "validation_guidance_scale".split(),
        _FROM_ZERO,
    ),
    **dict.fromkeys("num_train_epochs logging_steps save_steps eval_steps".split(), _POSITIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, True, 1, False)),
    "dataloader_num_workers": (0, True, math.inf, True),
    "seed": (0, True, 2**32, True),  # numpy's
    "data_seed": (0, True, 2**63, True),
}


def check_number(name: str, value: Any) -> None:
    """Raises `ValueError` where a number is outside of what an option of [`DiffusionConfig`] allows."""
    low, closed, end, whole = _NUMBERS[name]
    try:
        number = value if isinstance(value, int) else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be a number, found {value!r}.") from None
    if not (low <= number < end and (closed or number != low)):
        expected = f"at least {low}" if closed else f"above {low}"
        expected += f" and below {end}" if end < math.inf else "" if whole else " and finite"
        raise ValueError(f"`{name}` must be {expected}, found {value}.")
    if whole and number != int(number):
        raise ValueError(f"`{name}` must be a whole number, found {value}.")


def check_mapping(name: str, value: Any) -> None:
    """Raises `ValueError` where an option that takes a mapping, from the command line as JSON, holds none."""
    where = f"`{name}`"
    if isinstance(value, str) and name in ("accelerator_config", "fsdp_config", "deepspeed") and value[:1] != "{":
        if not Path(value).is_file():  # named by who reads it
            return
        value, where = Path(value).read_text(), f"{value} (`{name}`)"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:  # without the text, which may hold a token
            raise ValueError(
                f"Found no JSON in {where} ({error}): write it like '{{\"name\": 1}}', with double quotes inside."
            ) from None
    if isinstance(value, list | str | int | float):
        raise ValueError(f"Found a {type(value).__name__} in {where}, expected a mapping like '{{\"name\": 1}}'.")


@dataclass(repr=False)
class DiffusionConfig(_BaseConfig):
    r"""
    Parameters shared by all trainers of this library, on top of [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `DiffusionPipeline.from_pretrained`, used when `model` is a Hub id or a folder.
            `dtype` may be a string such as `"bfloat16"`; it defaults to float32.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to switch dropout off in policy and reference. Their errors are compared in the fourth digit:
            dropout noise would drown the difference.

        > Parameters that control the data

        resolution (`int`, `str` or `list`, *optional*):
            Size of the training images in pixels: the side of a square, or `"HEIGHTxWIDTH"`, such as `"832x1216"`.
            Defaults to what the pipeline generates. A list of sizes makes buckets: each image (of a pair: the chosen
            one, the other follows it) goes to the size with the nearest aspect ratio, of those with the same to the
            nearest area, and all rows of an optimizer step are of one bucket. Validation images have the first size.
        center_crop (`bool`, *optional*, defaults to `True`):
            Whether images that are not square lose both ends alike. If `False`, the place of the crop is random.
        random_flip (`bool`, *optional*, defaults to `False`):
            Whether to mirror half of the images, left to right.
        proportion_empty_prompts (`float`, *optional*):
            Probability that a training example loses its prompt, so that classifier-free guidance keeps a good
            unconditional side. Defaults to 0.2, which Diffusion-DPO and Diffusion-KTO use, and to 0 for models that
            are conditioned on the guidance scale and sampled without an unconditional side (FLUX.1-dev, FLUX.2-dev).
            Evaluation keeps all prompts.

        size_conditioning (`str`, *optional*, defaults to `"real"`):
            What a model that is told the size and crop of an image (SDXL) is told: `"real"`, those of the image, or
            `"fixed"`, those of an image that was made at the resolution of the training, as the pipeline says when it
            draws. Other models know no `"fixed"`.

        > Parameters that control how fast the denoiser runs

        attention_backend (`str`, *optional*):
            The implementation of attention, as diffusers' `set_attention_backend` takes it: `"flash"`, `"_flash_3"`,
            `"xformers"`, ... Defaults to PyTorch's own choice. For denoisers that diffusers has moved to its
            dispatcher, such as FLUX and Qwen-Image; others refuse it.
        channels_last (`bool`, *optional*, defaults to `False`):
            Whether convolutions keep their channels last in memory, which suits tensor cores. For UNets.
        compile_repeated_blocks (`str`, *optional*):
            Compiles the blocks that a denoiser repeats, each kind once, with this backend of `torch.compile`, usually
            `"inductor"`: diffusers' regional compilation, which starts sooner than `torch_compile`. `tf32` and
            `optim` (fused AdamW by default) are those of [`~transformers.TrainingArguments`].

        > Parameters that control what is computed once

        cache_features (`bool`, *optional*, defaults to `False`):
            Whether latents of all images and embeddings of all prompts are computed before the training and kept on
            disk, in the cache of the `datasets` library. Worth it from the second epoch on: the VAE and the text
            encoders are not run again, by this run or a later one on the same data, and leave the accelerator.
        features_dtype (`str`, *optional*):
            `"float32"`, `"bfloat16"` or `"float16"`: how they are kept. Defaults to what the encoders give, with which
            the training is the same as without the cache.
        precompute_ref_log_probs (`bool`, *optional*, defaults to `False`):
            Whether the reference's errors are computed before the training and kept on disk, so that no reference
            model is held and none is run. A later run on the same draws, with another `beta` or learning rate, say,
            uses them again. TRL's name for the same thing.
        num_ref_draws (`int`, *optional*):
            How many different draws (timestep, noise, ...) an example has: its visits, counted over the whole
            training, go through them again and again. None gives each visit its own; with `precompute_ref_log_probs`
            the training is then the one with a live reference, and takes as many reference forwards in advance. Fewer
            draws cost less, and the policy memorises them, see docs/speed.md.

        > Parameters that control the timesteps

        timestep_sampling (`str`, *optional*):
            Distribution of the place in the noise range: `"uniform"`, `"logit_normal"` or `"mode"`, as in
            [Stable Diffusion 3](https://huggingface.co/papers/2403.03206). Defaults to the family's: `"uniform"` for
            models of the DDPM kind, `"logit_normal"` for flow matching (our choice for all of them). What is drawn
            is shifted as the pipeline's scheduler shifts it, at the resolution of the training.
        logit_mean (`float`, *optional*, defaults to `0.0`):
            Of `"logit_normal"`: mean of the normal number; above 0 leans towards noise.
        logit_std (`float`, *optional*, defaults to `1.0`):
            Of `"logit_normal"`: its standard deviation.
        mode_scale (`float`, *optional*, defaults to `1.29`):
            Of `"mode"`: above 0 favours the middle, below 0 both ends. From -1 to 1.75.
        min_timestep (`float`, *optional*, defaults to `0.0`):
            Low end of the part of the noise range (0 is the clean image) that all of this is squeezed into.
        max_timestep (`float`, *optional*, defaults to `1.0`):
            Its high end; 1 is pure noise.

        > Parameters that control the error

        weighting (`str`, *optional*, defaults to `"native"`):
            The factor on an image's error by its timestep, the same for policy and reference; in preference training
            it acts as a `beta` that depends on the timestep. `"native"` is none: the error is that of what the
            denoiser answers (the noise, v, or the velocity of a flow). `"epsilon"` is the error of the noise whatever
            the denoiser answers, `"min_snr"` that error times `min(1, snr_gamma / SNR)`
            ([Min-SNR](https://huggingface.co/papers/2303.09556)), `"elbo"` that error times its weight in the
            variational bound, which is meant for uniform timesteps, but at most 10.
        snr_gamma (`float`, *optional*, defaults to `5.0`):
            The bound of `weighting="min_snr"`.

        > Parameters that control the moving average of the weights

        ema_decay (`float`, *optional*):
            Keeps an exponential moving average of the trained weights, `average = d * average + (1 - d) * weights`
            after each optimizer step, sharded as they are; sample images are drawn with it. `d` warms up to this
            number, as `(1 + n) / (10 + n)` after `n` steps. 0.9999 is usual for long trainings. None keeps none.
        ema_export (`bool`, *optional*, defaults to `False`):
            Whether `save_model` writes the average in place of the last weights. Checkpoints hold both.

        > Parameters that control sample images

        validation_prompts (`list[str]`, *optional*):
            Prompts of the sample grids in `output_dir/samples` (see [`LogImagesCallback`]). None draws no samples.
        validation_steps (`int`, *optional*, defaults to `500`):
            Optimizer steps between two grids; one more is drawn before the first step.
        num_validation_images (`int`, *optional*, defaults to `4`):
            Images per prompt.
        validation_inference_steps (`int`, *optional*, defaults to `25`):
            Sampling steps.
        validation_guidance_scale (`float`, *optional*):
            Guidance scale. Defaults to the pipeline's own.

        > Parameters that guard against a model that falls apart

        error_growth_limit (`float`, *optional*):
            Largest growth of the chosen (liked) images' error over the reference's that is accepted; 0.1 is 10 %. None
            guards nothing. See [`ErrorGrowthCallback`]. Not for supervised fine-tuning, which has no reference.
        error_growth_patience (`int`, *optional*, defaults to `3`):
            Logs in a row that must be beyond it.
        error_growth_action (`str`, *optional*, defaults to `"warn"`):
            Whether to `"warn"` then, or to `"stop"` the training.

        > Parameters that control the output folder

        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether a training that starts in a folder with checkpoints or weights of another run deletes them, with
            that run's card, samples and record. Other files stay. Without it such a folder is refused.

        > Parameters whose defaults differ from [`~transformers.TrainingArguments`]

        bf16 (`bool`, *optional*):
            Whether to train under bfloat16 autocast. Defaults to `True` on an accelerator unless `fp16` is set, and to
            `False` on a CPU.
        resume_from_checkpoint (`str` or `bool`, *optional*):
            Checkpoint that the training commands resume from: a folder, or `"latest"` (also `True`, and
            `--resume_from_checkpoint` without a value) for the last one in `output_dir`. Given to
            [`~transformers.Trainer.train`] by hand in Python.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`):
            The filter would hide what stops the run here: a loss that is not finite. It also costs a synchronisation
            of the device in every step.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Columns that a method does not read are never loaded in any case; `True` is refused.
    """

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of `DiffusionPipeline.from_pretrained`, when `model` is an id or folder."
        },
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Whether to switch dropout off in policy and reference."}
    )
    # The parser's type; Python code may pass an integer, a string or pairs too.
    resolution: list[str] | None = field(
        default=None,
        metadata={
            "help": "Side of the square training images in pixels, or HEIGHTxWIDTH; several make buckets by aspect "
            "ratio. Defaults to what the pipeline generates."
        },
    )
    center_crop: bool = field(
        default=True, metadata={"help": "Whether to crop the centre; otherwise the place of the crop is random."}
    )
    random_flip: bool = field(default=False, metadata={"help": "Whether to mirror half of the images, left to right."})
    proportion_empty_prompts: float | None = field(
        default=None,
        metadata={
            "help": "Probability that a training example loses its prompt. Defaults to 0.2, and to 0 for models that "
            "are conditioned on the guidance scale."
        },
    )
    size_conditioning: Literal["real", "fixed"] = field(
        default="real", metadata={"help": "What SDXL is told of size and crop: the image's, or always the same."}
    )
    attention_backend: str | None = field(
        default=None, metadata={"help": "Implementation of attention, as diffusers' `set_attention_backend` takes it."}
    )
    channels_last: bool = field(default=False, metadata={"help": "Whether UNets keep channels last in memory."})
    compile_repeated_blocks: str | None = field(
        default=None, metadata={"help": "Backend with which the denoiser's repeated blocks are compiled."}
    )
    cache_features: bool = field(
        default=False,
        metadata={"help": "Whether to compute latents and prompt embeddings once, before the training."},
    )
    features_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "How features are kept. Defaults to what the encoders give."}
    )
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "Whether to compute the reference's errors before the training."}
    )
    num_ref_draws: int | None = field(
        default=None,
        metadata={"help": "How many different draws of noise an example has. Defaults to one for each visit."},
    )
    timestep_sampling: Literal["uniform", "logit_normal", "mode"] | None = field(
        default=None, metadata={"help": "Distribution of the timesteps. Defaults to the model family's."}
    )
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of the normal number behind `logit_normal`."})
    logit_std: float = field(default=1.0, metadata={"help": "Its standard deviation."})
    mode_scale: float = field(default=1.29, metadata={"help": "Strength of `mode`."})
    min_timestep: float = field(default=0.0, metadata={"help": "Lowest timestep, as a fraction of the noise range."})
    max_timestep: float = field(default=1.0, metadata={"help": "Highest timestep, as a fraction of the noise range."})
    weighting: Literal["native", "epsilon", "min_snr", "elbo"] = field(
        default="native", metadata={"help": "Factor on an image's error by its timestep."}
    )
    snr_gamma: float = field(default=5.0, metadata={"help": "Bound on the signal-to-noise ratio of `min_snr`."})
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of a moving average of the weights. None keeps none."}
    )
    ema_export: bool = field(
        default=False, metadata={"help": "Whether `save_model` writes the moving average of the weights."}
    )
    validation_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts of the sample grids written to `output_dir/samples`."}
    )
    validation_steps: int = field(default=500, metadata={"help": "Optimizer steps between two sample grids."})
    num_validation_images: int = field(default=4, metadata={"help": "Images per validation prompt."})
    validation_inference_steps: int = field(default=25, metadata={"help": "Sampling steps of validation images."})
    validation_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of validation images. Defaults to the pipeline's own."}
    )

    error_growth_limit: float | None = field(
        default=None,
        metadata={"help": "Accepted growth of the chosen images' error over the reference's; 0.1 is 10 %%."},
    )
    error_growth_patience: int = field(
        default=3, metadata={"help": "Logs in a row beyond `error_growth_limit` before something is done."}
    )
    error_growth_action: Literal["warn", "stop"] = field(
        default="warn", metadata={"help": "What is done then: a warning, or the end of the training."}
    )

    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to train under bfloat16 autocast. Defaults to True on an accelerator.",
            "nargs": "?",
            "const": True,
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to resume from; `latest`, or no value, is the last one in `output_dir`.",
            "nargs": "?",
            "const": "latest",
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to hide losses that are not finite; they stop the run anyway."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Refused: columns that the method does not read are never loaded anyway."}
    )

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Whether to delete what another run left in `output_dir`, instead of refusing to start."},
    )

    # A method that takes statistics over a window has a field of this name; one with a reference, of the other.
    window: ClassVar[str | None] = None
    sync_ref_model: ClassVar[bool] = False

    # TrainingArguments parses these from JSON strings on the command line.
    _VALID_DICT_FIELDS = [*_BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    def to_dict(self):
        # Trackers and files record this. transformers' version redacts its own tokens only, and fails with diffusers'
        # quantization configuration of a pipeline, which has no `to_dict`.
        recorded = copy.copy(self)
        if isinstance(self.model_init_kwargs, dict):
            kwargs = recorded.model_init_kwargs = dict(self.model_init_kwargs)
            if isinstance(kwargs.get("quantization_config"), PipelineQuantizationConfig):
                kwargs["quantization_config"] = {k: str(v) for k, v in vars(kwargs["quantization_config"]).items()}
        return redacted(super(DiffusionConfig, recorded).to_dict())

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    __str__ = __repr__

    def __post_init__(self):
        # What `accelerate launch` was told; it counts where the options say nothing.
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.bf16 is None and not self.fp16 and launched in ("bf16", "fp16"):
            setattr(self, launched, True)
        if self.bf16 is None and not torch.accelerator.is_available():
            # TRL's default of True is refused by TrainingArguments on a machine without an accelerator.
            self.bf16 = False
        # TRL's configuration still has transformers' old names, which would warn each user of its own default.
        for name in ("checkpointing", "checkpointing_kwargs"):
            if getattr(self, f"activation_{name}") is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        # Before engines and libraries divide by them.
        for name in _NUMBERS:
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        for name in self._VALID_DICT_FIELDS:
            check_mapping(name, getattr(self, name))
        if self.max_steps != -1 and not (isinstance(self.max_steps, int) and self.max_steps >= 1):
            raise ValueError(
                f"`max_steps` must be at least 1, or -1 to train `num_train_epochs`, found {self.max_steps}."
            )
        super().__post_init__()
        precision = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"
        if launched not in ("no", precision):
            raise ValueError(
                f"Found mixed_precision={launched!r} from `accelerate launch` or its configuration, and bf16="
                f"{self.bf16}, fp16={self.fp16}: give both the same, or start with `trl-diffusion`, which follows the "
                "options of the training."
            )
        if self.fp16 and self.device.type == "cpu":
            raise ValueError(
                "Found fp16 on a CPU, where accelerate computes in float32 all the same: set `fp16=False`, or use "
                "`bf16=True` with `use_cpu=True`."
            )
        if isinstance(self.resume_from_checkpoint, str):
            words: dict[str, Any] = {"true": True, "latest": True, "false": None}
            self.resume_from_checkpoint = words.get(self.resume_from_checkpoint.lower(), self.resume_from_checkpoint)
        elif self.resume_from_checkpoint is False:
            self.resume_from_checkpoint = None
        if self.resolution is not None:
            self.resolution = list(map(show_size, parse_sizes(self.resolution)))
        if self.deepspeed_plugin is not None:
            load_frozen_models_whole()
        if self.proportion_empty_prompts is not None and not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(f"`proportion_empty_prompts` must be in [0, 1], found {self.proportion_empty_prompts}.")
        if self.compile_repeated_blocks is not None and self.torch_compile:
            raise ValueError(
                "Found `torch_compile=True`, which compiles all of the denoiser, and "
                f"`compile_repeated_blocks={self.compile_repeated_blocks!r}`: set one of them."
            )
        if self.cache_features and not self.center_crop:
            raise ValueError(
                "`cache_features` keeps each image with one crop, and `center_crop=False` draws a new one at each "
                "visit: set one of them otherwise."
            )
        if self.features_dtype is not None and not self.cache_features:
            raise ValueError(
                f"`features_dtype={self.features_dtype!r}` belongs to `cache_features=True`: set that, or drop it."
            )
        self._check_choices(
            features_dtype=(None, "float32", "bfloat16", "float16"),
            weighting=WEIGHTINGS,
            size_conditioning=("real", "fixed"),
            timestep_sampling=(None, *TIMESTEP_SAMPLINGS),
        )
        if not 0 < self.logit_std < math.inf or not math.isfinite(self.logit_mean):
            raise ValueError(
                f"Found logit_mean={self.logit_mean} and logit_std={self.logit_std}, expected finite numbers, the "
                "second above 0: 0 and 1 are usual."
            )
        if not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"`mode_scale` must be between -1 and 2 / (pi - 2) = 1.75, found {self.mode_scale}: beyond them "
                "timesteps would leave the noise range; 1.29 is usual."
            )
        if not 0 <= self.min_timestep < self.max_timestep <= 1:
            raise ValueError(
                f"Found min_timestep={self.min_timestep} and max_timestep={self.max_timestep}, expected fractions of "
                "the noise range, 0 <= min_timestep < max_timestep <= 1."
            )
        if self.timestep_sampling is not None:
            self.check_timestep_sampling(self.timestep_sampling)
        if not 0 < self.snr_gamma < math.inf:
            raise ValueError(f"`snr_gamma` must be positive and finite, found {self.snr_gamma}: 5 is usual.")
        if self.weighting != "min_snr" and self.snr_gamma != 5.0:
            raise ValueError(
                f"`snr_gamma={self.snr_gamma}` belongs to `weighting='min_snr'`, found weighting={self.weighting!r}."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in (0, 1), found {self.ema_decay}: 0.9999 is usual.")
        if self.ema_export and self.ema_decay is None:
            raise ValueError("`ema_export=True` needs a moving average of the weights: set `ema_decay`.")
        if self.ema_export and self.load_best_model_at_end:
            raise ValueError(
                "Found both `ema_export=True` and `load_best_model_at_end=True`, expected one answer to which "
                "weights are saved at the end: leave one of them out."
            )
        if self.validation_prompts is not None and not isinstance(self.validation_prompts, list):
            raise ValueError(
                f"`validation_prompts` must be a list, found {self.validation_prompts!r}: put it in brackets."
            )
        self._check_choices(error_growth_action=("warn", "stop"))
        if self.error_growth_limit is None:
            for name, default in (("error_growth_patience", 3), ("error_growth_action", "warn")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` belongs to `error_growth_limit`, found None: set that too, "
                        "for example to 0.1."
                    )
        # What Trainer offers and a diffusion model cannot use is refused rather than ignored.
        unusable = {
            "neftune_noise_alpha": self.neftune_noise_alpha is not None,
            "label_smoothing_factor": self.label_smoothing_factor != 0,
            "remove_unused_columns": self.remove_unused_columns,
            "use_liger_kernel": self.use_liger_kernel,
            "train_sampling_strategy": self.train_sampling_strategy not in ("random", "sequential"),
            "batch_eval_metrics": self.batch_eval_metrics,
            "include_num_input_tokens_seen": self.include_num_input_tokens_seen not in (False, "no"),
            "fp16_full_eval": self.fp16_full_eval,
            "bf16_full_eval": self.bf16_full_eval,
            "accelerator_config.split_batches": self.accelerator_config.split_batches,
        }
        found = [name for name, used in unusable.items() if used]
        if found:
            raise ValueError(
                f"`{found[0]}` has no meaning for diffusion models here: leave it at its default"
                + (" (`bf16=True` evaluates under autocast)." if found[0].endswith("full_eval") else ".")
            )

    def check_timestep_sampling(self, distribution: str) -> None:
        """
        Raises `ValueError` where an option belongs to another distribution than the one that is used.

        Args:
            distribution (`str`): `timestep_sampling`, or the family's where it is None.
        """
        options = {
            "logit_mean": ("logit_normal", self.logit_mean != 0.0),
            "logit_std": ("logit_normal", self.logit_std != 1.0),
            "mode_scale": ("mode", self.mode_scale != 1.29),
        }
        for name, (owner, used) in options.items():
            if used and owner != distribution:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` belongs to `timestep_sampling={owner!r}`, found "
                    f"{distribution!r}: set that, or leave `{name}` at its default."
                )

    def _check_choices(self, **choices: tuple[str | None, ...]) -> None:
        """Python code may pass what the command line's parser would have refused."""
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {values}, found {getattr(self, name)!r}.")

    def _check_window(self) -> None:
        self._check_choices(window=("device", "batch", "step"))
        if self.window == "step" and not self.disable_dropout:
            raise ValueError(
                "`window='step'` scores each micro-batch before it trains on it, with other dropout the second time: "
                "leave `disable_dropout` at True."
            )

    def _check_beta(self, paper: str) -> None:
        beta = self.beta  # of the methods that have one
        if not 0 < beta < math.inf:
            raise ValueError(f"`beta` must be positive and finite, found {beta}: {paper}.")


@dataclass(repr=False)  # `DiffusionConfig` keeps tokens out of it
class PreferenceConfig(DiffusionConfig):
    r"""
    Parameters shared by the methods that compare with a reference, on top of [`DiffusionConfig`].

    Parameters:
        sync_ref_model (`bool`, *optional*, defaults to `False`):
            Whether the reference follows the policy, as in [TR-DPO](https://huggingface.co/papers/2404.09656). For
            full fine-tuning only: with an adapter there is no reference model of its own.
        ref_model_mixup_alpha (`float`, *optional*, defaults to `0.6`):
            How far: `reference = alpha * policy + (1 - alpha) * reference`.
        ref_model_sync_steps (`int`, *optional*, defaults to `512`):
            Every how many optimizer steps.
    """

    sync_ref_model: bool = field(  # type: ignore[misc]
        default=False, metadata={"help": "Whether the reference follows the policy."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "Share of the policy in the new reference, with `sync_ref_model`."}
    )
    ref_model_sync_steps: int = field(
        default=512, metadata={"help": "Optimizer steps between two updates of the reference, with `sync_ref_model`."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.sync_ref_model and (self.ref_model_mixup_alpha, self.ref_model_sync_steps) != (0.6, 512):
            raise ValueError(
                f"Found ref_model_mixup_alpha={self.ref_model_mixup_alpha} and ref_model_sync_steps="
                f"{self.ref_model_sync_steps}, which belong to `sync_ref_model=True`: set it, or leave them out."
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "Found both `sync_ref_model=True` and `precompute_ref_log_probs=True`, but errors that are computed "
                "beforehand are those of a reference that stays: leave one of them out."
            )
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(
                f"`ref_model_mixup_alpha` must be in (0, 1], found {self.ref_model_mixup_alpha}: 0.6 is usual."
            )
        if self.ref_model_sync_steps < 1:
            raise ValueError(f"`ref_model_sync_steps` must be at least 1, found {self.ref_model_sync_steps}.")
