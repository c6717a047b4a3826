"""What all trainers share: the model, the data, one number per image, metrics, saving.

A method's own file holds its columns, its loss and its metrics; nothing here knows which method runs.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset, concatenate_datasets
from diffusers import DiffusionPipeline, ModelMixin
from peft import PeftConfig
from transformers import EvalPrediction, TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import has_length
from trl.trainer.utils import disable_dropout_in_model

from .. import engines
from ..callbacks import ErrorGrowthCallback, LogImagesCallback, TensorBoardLogger
from ..data.buckets import Size, check_size, image_sizes, in_whole_batches, nearest_bucket, parse_sizes, show_size
from ..data.cache import fingerprint
from ..data.examples import ExampleBuilder, Examples, StreamingExamples, collate
from ..data.features import LATENTS, FeatureCache, PromptTable, encoders_fingerprint, modules_fingerprint
from ..data.formats import REF_ERRORS, AnyDataset, check_dataset, declare_columns, present_columns, weighted_rows
from ..data.images import ImageTransform
from ..data.samplers import KeyedSampler, Visits
from ..ema import EMACallback
from ..families import Family, resolve_model
from ..families.base import Conditioning, Posterior
from ..likelihood import TimestepSampling, denoising_error
from ..reference import Reference, SyncReferenceCallback, precomputed_errors
from .base_config import DiffusionConfig
from .metrics import Metrics, MetricSums
from .policy import allow_checkpointing, choose_kernels, compile_blocks, make_policy, modules_known
from .run import Run, check_writable, data_fingerprint, model_fingerprint, weights_fingerprint
from .saving import SavingTrainer


class Noised(NamedTuple):
    """A batch as the denoiser sees it; the first dimension counts images (of pairs: all chosen, then all rejected)."""

    x_t: torch.Tensor
    t: torch.Tensor
    noise_level: torch.Tensor  # place in the noise range, 0 to 1
    target: torch.Tensor
    weight: torch.Tensor
    conditioning: Conditioning
    # What the denoiser is told of the images themselves, which stays with them when prompts are exchanged.
    sizes: torch.Tensor | None = None


def rows_per_window(args: DiffusionConfig) -> int:
    """Rows of a window, on all ranks together; one of a method without."""
    if args.window is None:
        return 1
    ranks = 1 if args.window == "device" else args.world_size
    return (
        args.per_device_train_batch_size * ranks * (args.gradient_accumulation_steps if args.window == "step" else 1)
    )


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def as_device_has(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in a dtype that the device has; it must be that before it is moved there."""
    return tensor.to(widest_float(device)) if tensor.dtype == torch.float64 else tensor


def collate_for(device: torch.device, collator: Callable[[list], dict[str, Any]], examples: list) -> dict[str, Any]:
    """A batch that accelerate can move to the device."""
    batch = collator(examples)
    return {
        name: as_device_has(value, device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


class DiffusionTrainer(SavingTrainer):
    """
    Base class of the trainers; see a method's own class for how to use it.

    Args:
        model (`str`, `DiffusionPipeline` or `ModelMixin`):
            Hub id, local folder, pipeline, or bare denoiser. Weights are float32 unless `args.model_init_kwargs` says
            otherwise; with `bf16` or `fp16` they stay float32 and are computed with under autocast.
        ref_model (`ModelMixin`, *optional*):
            Frozen reference denoiser. Defaults to the policy before training: a frozen copy, or the adapter switched
            off.
        args ([`DiffusionConfig`]):
            The method's configuration.
        data_collator (`Callable`, *optional*):
            Makes a batch of a list of examples. Defaults to [`~data.examples.collate`].
        train_dataset (`Dataset` or `IterableDataset`):
            Training data, in the columns of the method.
        eval_dataset (`Dataset`, `IterableDataset` or a `dict` of them, *optional*):
            Held-out data in the same columns.
        processing_class (`DiffusionPipeline`, *optional*):
            The rest of the pipeline when `model` is a bare denoiser.
        callbacks (`list[TrainerCallback]`, *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and schedule. Default to AdamW and a linear schedule.
        quantization_config (`diffusers.BitsAndBytesConfig`, `diffusers.TorchAoConfig` ..., *optional*):
            Quantizes the denoiser when it is loaded, for `model` an id or folder and with `peft_config` only; a
            `diffusers.PipelineQuantizationConfig` quantizes what it names. A model that was quantized before may be
            passed as `model`.
        peft_config (`PeftConfig`, *optional*):
            Trains an adapter of this configuration instead of the whole denoiser. Without `target_modules` the
            family's attention projections are adapted.

    Raises:
        `TypeError`, `ValueError`: in one sentence, before the first step, where an argument cannot be used.
    """

    loss_is_scaled_for_ga = False

    config_class: ClassVar[type[DiffusionConfig]]
    columns: ClassVar[tuple[str, ...]]
    """Columns that the method reads."""
    image_columns: ClassVar[tuple[str, ...]]
    """Those of them that hold images."""
    feature_columns: ClassVar[tuple[str, ...]] = ()
    """Columns that [`add_features`] computes."""

    def __init__(
        self,
        model: str | DiffusionPipeline | ModelMixin,
        ref_model: ModelMixin | None = None,
        args: DiffusionConfig | None = None,
        data_collator=None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: DiffusionPipeline | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        quantization_config=None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else type(model).__name__
            args = self.config_class(f"{name.split('/')[-1]}-{self._name}")
        if not isinstance(args, self.config_class):
            raise TypeError(f"`args` must be a {self.config_class.__name__}, found {type(args).__name__}.")
        engines.check_processes(args)
        engines.on_first_rank(lambda: check_writable(args.output_dir))
        if quantization_config is not None and peft_config is None:
            raise ValueError(
                "Found `quantization_config` without `peft_config`: quantized weights cannot be trained; pass a "
                "`LoraConfig` to train an adapter on them, or drop `quantization_config`."
            )

        backend = args.torch_compile_backend if args.torch_compile else args.compile_repeated_blocks
        if backend == "inductor" and args.device.type == "cpu":
            # Seen with torch 2.13: zero gradients for some convolutions of a UNet, which would pass unnoticed.
            raise ValueError(
                "`torch_compile` with the inductor backend computes wrong gradients of UNets on a CPU: leave it off, "
                "or compile with the backend 'aot_eager'."
            )

        # Data: checked first, because it costs nothing.
        if train_dataset is None:
            raise ValueError("`train_dataset` is required.")
        self.data_fingerprint = train_dataset._fingerprint if isinstance(train_dataset, Dataset) else None
        train_dataset = self._prepare_dataset(train_dataset, "training data set", args)
        if isinstance(train_dataset, IterableDataset):
            self._check_training_stream(args)
        if eval_dataset is not None:
            eval_dataset = self._prepare_eval_dataset(eval_dataset, args)
        self.check_batch_size(args)
        self.check_computed_once(args)
        self.num_train_rows = len(train_dataset) if has_length(train_dataset) else None
        self._contents = data_fingerprint(train_dataset, self.columns + self.feature_columns)
        engines.check_ranks_agree(self._shared_settings(args, train_dataset, eval_dataset, peft_config))

        # Model. PEFT draws the adapter's start at random, so the seed is set before.
        set_seed(args.seed)
        init_kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else None
        self.family: Family = resolve_model(model, processing_class, init_kwargs, quantization_config)
        self.pipeline = self.family.pipeline
        self.base_model_id = (
            model if isinstance(model, str) else self.pipeline.config.get("_name_or_path") or "a pipeline in memory"
        )
        if args.proportion_empty_prompts is None:
            args.proportion_empty_prompts = self.family.proportion_empty_prompts
        self.image_sizes = self._resolve_image_sizes(args)
        self.timestep_sampling = self._resolve_timestep_sampling(args)
        if args.size_conditioning != "real" and not self.family.conditions_on_size:
            raise ValueError(
                f"`size_conditioning={args.size_conditioning!r}` is for models that are told the size of an image, as "
                f"SDXL is; found a {self.family.pipeline_class}: leave it at 'real'."
            )
        if ref_model is self.family.denoiser:
            raise ValueError("`model` and `ref_model` are the same object: omit `ref_model`, a frozen copy is made.")
        if args.sync_ref_model and peft_config is not None:
            raise ValueError(
                "Found `sync_ref_model=True` with a `peft_config`: the reference is the model with its adapter "
                "switched off, which cannot follow the policy; set it to False, or leave `peft_config` out."
            )
        if args.precompute_ref_log_probs:  # before the denoiser may carry an adapter
            self._ref_fingerprint = modules_fingerprint({"reference": ref_model or self.family.denoiser})
        base = weights_fingerprint(self.family)
        for denoiser in filter(None, (self.family.denoiser, ref_model)):
            choose_kernels(denoiser, args)
        policy = make_policy(self.family, peft_config, args, self.base_model_id)
        if ref_model is not None and type(ref_model).__name__ != self.family.denoiser_class:
            raise TypeError(f"`ref_model` must be a {self.family.denoiser_class}, found {type(ref_model).__name__}.")
        reference = None if ref_model is None else model_fingerprint(ref_model)
        if args.disable_dropout:
            for module in filter(None, (policy, ref_model)):
                disable_dropout_in_model(module)
        allow_checkpointing(self.family.denoiser)

        images, eval_images = train_dataset, eval_dataset
        train_dataset = self.add_features(train_dataset, args)
        if eval_dataset is not None:
            eval_dataset = self._add_eval_features(eval_dataset, args)
        # By fingerprint: what data sets with features, or reference errors, no longer tell.
        self._once: dict[str, tuple[PromptTable | None, np.ndarray | None]] = {}
        self._check_buckets(train_dataset, eval_dataset, args)
        builder = ExampleBuilder(
            columns=present_columns(train_dataset, self.columns + self.feature_columns),
            image_columns=self.image_columns,
            transform=ImageTransform(*self.image_sizes[0], args.center_crop, args.random_flip),
            latent_shape=self.family.latent_shape(*self.image_sizes[0]),
            proportion_empty_prompts=args.proportion_empty_prompts,
            seed=args.seed if args.data_seed is None else args.data_seed,
            sizes=args.size_conditioning if self.family.conditions_on_size else None,
            num_ref_draws=args.num_ref_draws,
            **self.shared_draws(args),
        )
        self.example_builders = [
            replace(
                builder,
                transform=replace(builder.transform, height=height, width=width),
                latent_shape=self.family.latent_shape(height, width),
            )
            for height, width in self.image_sizes
        ]
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = self.family.has_idle_parameters
        self.ema = None if args.ema_decay is None else EMACallback(self, args.ema_decay)

        super().__init__(
            model=policy,
            args=args,
            data_collator=functools.partial(collate_for, args.device, data_collator or collate),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            # Trainer would hand a pipeline's tokenizer to code for language models; the pipeline stays with us.
            processing_class=None,
            compute_metrics=self._whole_set_metrics,
            # The average goes first: other callbacks may draw with it.
            callbacks=[*([] if self.ema is None else [self.ema]), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.run = Run(self, base, reference, self._contents)
        engines.set_up(self.accelerator, self.family.denoiser, args)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"Found {self.args.n_gpu} devices in one process (DataParallel), expected one: start with "
                "`accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES."
            )
        tensorboard = self.pop_callback(TensorBoardCallback)
        if tensorboard is not None:
            self.add_callback(TensorBoardLogger(tensorboard.tb_writer))
        self._start_statistics()
        for module in self.family.frozen_modules.values():
            module.requires_grad_(False).eval()
        if not args.cache_features:
            self._move_encoders(self.accelerator.device)
        self.reference = self._make_reference(policy, ref_model, args)
        if args.sync_ref_model:
            self.add_callback(SyncReferenceCallback(self))
        if args.compile_repeated_blocks is not None:
            sharded = engines.is_sharded(self.accelerator)
            compile_blocks(self.family.denoiser, args, sharded)
            if self.reference is not None and self.reference.model is not None:
                compile_blocks(self.accelerator.unwrap_model(self.reference.model), args, sharded)
        self.train_dataset = self._compute_once(train_dataset, images, self._plan_visits())
        if eval_dataset is not None:
            self.eval_dataset = self._compute_eval_once(eval_dataset, eval_images)
        if args.precompute_ref_log_probs:
            self.reference = None
            if engines.is_sharded(self.accelerator):  # the engine takes it from there
                self.model.to("cpu")
        if args.validation_prompts:
            self.add_callback(
                LogImagesCallback(
                    self,
                    prompts=args.validation_prompts,
                    every_n_steps=args.validation_steps,
                    num_images_per_prompt=args.num_validation_images,
                    num_inference_steps=args.validation_inference_steps,
                    guidance_scale=args.validation_guidance_scale,
                )
            )

        if args.error_growth_limit is not None:
            self.add_callback(
                ErrorGrowthCallback(args.error_growth_limit, args.error_growth_patience, args.error_growth_action)
            )

    # ---- What a method defines --------------------------------------------------------------------------------------

    def evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """
        Metrics of a whole evaluation set, among them `loss`.

        Args:
            prediction (`EvalPrediction`):
                `predictions` of shape `(rows, 2 x images + 2 + features)`: errors of the policy, errors of the
                reference, weight, place in the noise range, and the numbers of `feature_columns`; `label_ids` of shape
                `(rows,)`: the `label` column, or zeros.
        """
        raise NotImplementedError

    def card_settings(self) -> dict[str, Any]:
        """The method's rows of the model card."""
        raise NotImplementedError

    def check_batch_size(self, args: DiffusionConfig) -> None:
        """Raises `ValueError` where the batch is too small for the method."""

    def check_computed_once(self, args: DiffusionConfig) -> None:
        """Raises `ValueError` where the method cannot use features or reference errors that were computed before."""

    def add_features(self, dataset: AnyDataset, args: DiffusionConfig) -> AnyDataset:
        """Adds the `feature_columns`, once all cheap checks have passed."""
        return dataset

    def shared_draws(self, args: DiffusionConfig) -> dict[str, Any]:
        """`share_noise` and `share_timestep` of [`ExampleBuilder`], where they are not the defaults."""
        return {}

    @property
    def scores_steps(self) -> bool:
        """Whether a step is scored before it is trained on, see [`_score`]."""
        return self.args.window == "step"

    @property
    def rows_per_window(self) -> int:
        """Rows over which the method takes its statistics (`args.window`)."""
        return rows_per_window(self.args)

    # ---- Set-up -----------------------------------------------------------------------------------------------------

    def _shared_settings(self, args: DiffusionConfig, train_dataset, eval_dataset, peft_config) -> dict[str, Any]:
        """What all ranks must have in common, by name."""
        rows = lambda dataset: len(dataset) if has_length(dataset) else None  # noqa: E731
        evaluation = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        return {
            **{f"`{name}`": value for name, value in args.to_dict().items() if name not in engines.OWN_SETTINGS},
            "`peft_config`": None if peft_config is None else str(peft_config),
            "the number of training rows": rows(train_dataset),
            "the columns of the training data": sorted(train_dataset.column_names or ()),
            "the rows of the training data": self._contents,
            "the number of evaluation rows": {name: rows(part) for name, part in evaluation.items()},
            "the rows of the evaluation data": {
                name: data_fingerprint(part, self.columns) for name, part in evaluation.items() if part is not None
            },
        }

    @contextmanager
    def ready_to_draw(self) -> Iterator[bool]:
        """
        Lets the pipeline draw inside the block, with the moving average of the weights if there is one.

        Yields whether this rank draws: the first one, or all together where each holds but a part of the weights.
        """
        name = self.family.denoiser_name
        averaged = nullcontext() if self.ema is None else self.ema.in_place_of_the_weights()
        with averaged, engines.callable_denoiser(self.model, self.pipeline, name):
            yield self.is_world_process_zero() or engines.in_parts(self.model)

    def _send_telemetry(self):
        # TRL's version reads `config.model_type`, which a diffusers model lacks, and raises for every user.
        pass

    def _prepare_dataset(self, dataset: AnyDataset, what: str, args: DiffusionConfig) -> AnyDataset:
        dataset = declare_columns(dataset)
        check_dataset(dataset, self.columns, what)
        if isinstance(dataset, Dataset):
            dataset = weighted_rows(dataset)
        else:
            if args.dataloader_num_workers > 0:
                raise ValueError(
                    f"Found a streaming {what} with dataloader_num_workers={args.dataloader_num_workers}: the place "
                    "of a row in the stream, which keys its noise, is known to a single reader only; set it to 0."
                )
            for name in ("cache_features", "precompute_ref_log_probs", "num_ref_draws"):
                if getattr(args, name):
                    raise ValueError(
                        f"`{name}={getattr(args, name)}` comes back to the same rows, found a streaming {what}: drop "
                        "it, or load the data set without `streaming=True`."
                    )
            if args.accelerator_config.dispatch_batches:
                raise ValueError("`dispatch_batches=True` is not supported with streaming data sets: unset it.")
            # None would let accelerate's first rank read for all and send batches on, which strings cannot follow.
            args.accelerator_config.dispatch_batches = False
        return dataset

    def _prepare_eval_dataset(self, dataset, args: DiffusionConfig):
        if isinstance(dataset, dict):
            return {
                name: self._prepare_dataset(part, f"evaluation data set {name!r}", args)
                for name, part in dataset.items()
            }
        return self._prepare_dataset(dataset, "evaluation data set", args)

    def _add_eval_features(self, dataset, args: DiffusionConfig):
        if isinstance(dataset, dict):
            return {name: self.add_features(part, args) for name, part in dataset.items()}
        return self.add_features(dataset, args)

    def _check_training_stream(self, args: DiffusionConfig) -> None:
        if args.max_steps <= 0:
            raise ValueError("A streaming data set has no length: set `max_steps`.")

    def _resolve_image_sizes(self, args: DiffusionConfig) -> list[Size]:
        default, multiple = self.family.default_resolution(), self.family.resolution_multiple()
        sizes = [(default, default)] if args.resolution is None else parse_sizes(args.resolution)
        for size in sizes:
            check_size(size, self.family.pipeline_class, multiple)
        return sizes

    def _resolve_timestep_sampling(self, args: DiffusionConfig) -> dict[tuple[int, ...], TimestepSampling]:
        """By the latents' shape: the scheduler may shift larger images more."""
        distribution = args.timestep_sampling or self.family.timestep_sampling
        args.check_timestep_sampling(distribution)
        return {
            self.family.latent_shape(*size): TimestepSampling(
                distribution,
                logit_mean=args.logit_mean,
                logit_std=args.logit_std,
                mode_scale=args.mode_scale,
                shift=self.family.timestep_shift(*size),
                min_timestep=args.min_timestep,
                max_timestep=args.max_timestep,
            )
            for size in self.image_sizes
        }

    def _make_reference(self, policy, ref_model, args: DiffusionConfig) -> Reference | None:
        copied = not args.precompute_ref_log_probs
        return Reference(policy, self.accelerator, ref_model, follow_mode=args.disable_dropout, copied=copied)

    # ---- Computed once ----------------------------------------------------------------------------------------------

    def _different_draws(self, visits: Visits) -> Visits:
        """Of these visits those with different draws: the first `num_ref_draws` of each row."""
        if self.args.num_ref_draws is None:
            return visits
        return Visits(np.minimum(visits.counts, self.args.num_ref_draws))

    def _plan_visits(self) -> Visits | None:
        """The visits of the training that the configuration describes; None where nothing depends on them."""
        args = self.args
        if not args.precompute_ref_log_probs and args.num_ref_draws is None:
            return None
        sampler = self._get_train_sampler()
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * sampler.steps_per_epoch)
        visits = sampler.visits(steps, with_windows=self.example_builders[0].share_timestep)
        draws = self._different_draws(visits)
        seen = visits.counts[draws.counts > 0] / draws.counts[draws.counts > 0]
        if seen.max() > 1 and self.is_world_process_zero():
            warnings.warn(
                f"With num_ref_draws={args.num_ref_draws} the training sees each draw of timestep and noise "
                f"{seen.mean():.3g} times on average, and up to {seen.max():.3g} times that of a row which is visited "
                f"{visits.counts.max()} times; the policy memorises what comes often, see docs/speed.md.",
                stacklevel=2,
            )
        self._planned = steps, sampler.examples_per_step, draws
        return draws

    def _check_planned(self, sampler: KeyedSampler) -> None:
        """Raises `ValueError` where a training would visit what no reference error was computed of."""
        steps, examples_per_step, draws = self._planned
        if (self.state.max_steps, sampler.examples_per_step) == (steps, examples_per_step):
            return
        needed = self._different_draws(sampler.visits(self.state.max_steps))
        other_windows = draws.windows is not None and sampler.examples_per_step != examples_per_step
        if other_windows or (needed.counts > draws.counts).any():
            raise ValueError(
                f"Found a training of {self.state.max_steps} steps of {sampler.examples_per_step} rows, but the "
                f"reference's errors were computed for {steps} steps of {examples_per_step} rows: make a new trainer "
                "with the length that you want."
            )

    def _move_encoders(self, device: torch.device | str) -> None:
        for module in self.family.frozen_modules.values():
            module.to(device)

    @contextmanager
    def whole_pipeline(self) -> Iterator[DiffusionPipeline]:
        """The pipeline to draw with, all of it on the device; encoders that features stand for leave it afterwards."""
        self._move_encoders(self.accelerator.device)
        yield self.pipeline
        if self.args.cache_features:
            self._move_encoders("cpu")

    @functools.cached_property
    def _encoders_name(self) -> str:
        return encoders_fingerprint(self.family)

    @functools.cached_property
    def _feature_cache(self) -> FeatureCache:
        args = self.args
        return FeatureCache(
            self.family,
            self._encoders_name,
            self.image_columns,
            [builder.transform for builder in self.example_builders],
            self.accelerator.device,
            self.compute_loss_context_manager,
            self.accelerator.mixed_precision,
            getattr(torch, args.features_dtype) if args.features_dtype else None,
            args.per_device_train_batch_size,
            args.dataloader_num_workers,
        )

    def _compute_once(self, dataset: AnyDataset, images: AnyDataset, visits: Visits | None) -> AnyDataset:
        """
        The data set with features, and with the reference's errors of these visits (None: of the evaluation's), as the
        configuration wants them; `images` is the same before a method's own columns were added.
        """
        args = self.args
        if not args.cache_features and not args.precompute_ref_log_probs:
            return dataset
        source, prompts = images.select_columns(["prompt", *self.image_columns]), None
        buckets = self.buckets(images)
        if args.cache_features:
            others = [name for name in self._columns_of(dataset) if name not in source.column_names]
            features, prompts = self._feature_cache(source, buckets)
            dataset = concatenate_datasets([dataset.select_columns(others), features], axis=1) if others else features
            self._move_encoders("cpu")
        if args.precompute_ref_log_probs:
            if self.reference is None:
                raise ValueError(
                    "The reference is gone, with `precompute_ref_log_probs=True`: give the evaluation data set to the "
                    "trainer's constructor."
                )
            columns = self._columns_of(dataset)
            builders = [replace(builder, columns=columns, prompts=prompts) for builder in self.example_builders]
            errors = precomputed_errors(
                self._reference_name(source, visits),
                Examples(dataset, builders, self.rows_per_window, buckets),
                visits,
                functools.partial(self._reference_errors_of, training=visits is not None),
                self.data_collator,
                args.per_device_train_batch_size,
                args.dataloader_num_workers,
            )
            dataset = concatenate_datasets([dataset, errors], axis=1)
        self._once[dataset._fingerprint] = (prompts, buckets)
        return dataset

    def _compute_eval_once(self, dataset, images):
        if isinstance(dataset, dict):
            return {name: self._compute_once(part, images[name], None) for name, part in dataset.items()}
        return self._compute_once(dataset, images, None)

    def _reference_name(self, source: Dataset, visits: Visits | None) -> str:
        """Changes with whatever the reference's errors depend on."""
        args = self.args
        return fingerprint(
            source,
            # Of an evaluation the place of a row says which window it is in.
            self.rows_per_window if visits is None and self.example_builders[0].share_timestep else visits,
            self._ref_fingerprint,
            self._encoders_name,
            repr([replace(builder, columns=[], num_ref_draws=None) for builder in self.example_builders]),
            [self.timestep_sampling, args.weighting, args.snr_gamma, vars(self.family.process)],
            [self.accelerator.mixed_precision, args.disable_dropout, args.cache_features, args.features_dtype],
            args.per_device_train_batch_size,  # in the last digits
        )

    @torch.no_grad()
    def _reference_errors_of(self, inputs: dict[str, Any], training: bool) -> torch.Tensor:
        """The reference's errors of a batch, `(rows, images)`, in the mode that it has beside the policy."""
        model, before = self.model.to(self.accelerator.device), self.model.training
        model.train(training and (is_peft_model(model) or self.args.disable_dropout))
        assert self.reference is not None
        computed = engines.autocast_alone(self.reference.model or model, self.args)
        with self.compute_loss_context_manager(), computed:
            errors = self.reference_errors(model, self.corrupt(self._prepare_inputs(inputs)))
        model.train(before)
        return errors.unflatten(0, (len(self.image_columns), -1)).T

    # ---- Data -------------------------------------------------------------------------------------------------------

    def _columns_of(self, dataset: AnyDataset) -> list[str]:
        """The columns that are read: of a data set with features, all that it has."""
        if dataset.column_names and LATENTS in dataset.column_names:
            return dataset.column_names
        computed = [name for name in (REF_ERRORS,) if dataset.column_names and name in dataset.column_names]
        return present_columns(dataset, self.columns + self.feature_columns) + computed

    def _builders_for(self, dataset: AnyDataset) -> list[ExampleBuilder]:
        columns = self._columns_of(dataset)
        prompts = self._once[dataset._fingerprint][0] if LATENTS in columns else None
        return [replace(builder, columns=columns, prompts=prompts) for builder in self.example_builders]

    @property
    def examples_per_step(self) -> int:
        """Rows of one optimizer step: ranks x micro-batch x accumulation."""
        return self.args.world_size * self._train_batch_size * self.args.gradient_accumulation_steps

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        builders = self._builders_for(dataset)
        examples: Examples | StreamingExamples
        if isinstance(dataset, IterableDataset):
            # As [`KeyedSampler`] does, so that no step, and no window of it, is smaller than the others.
            rows, drop_last = (self.examples_per_step, self.args.dataloader_drop_last) if is_training else (1, False)
            examples = StreamingExamples(dataset, builders[0], is_training, self.rows_per_window, rows, drop_last)
        else:
            buckets, order = self.buckets(dataset), None
            if buckets is not None and not is_training:
                order = in_whole_batches(buckets, batch_size * self.args.world_size)
            examples = Examples(dataset, builders, self.rows_per_window, buckets, order)
        drop_last = self.args.dataloader_drop_last
        # Trainer would leave out rows of an evaluation too, which is of the whole set.
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(examples, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.args.dataloader_drop_last = drop_last

    def buckets(self, dataset: Dataset) -> np.ndarray | None:
        """The number in `image_sizes` of each row's bucket, which its first image decides; None if there is one."""
        if len(self.image_sizes) == 1:
            return None
        if dataset._fingerprint in self._once:
            return self._once[dataset._fingerprint][1]
        return nearest_bucket(image_sizes(dataset, self.image_columns[0]), self.image_sizes)

    def _check_buckets(self, train_dataset: AnyDataset, eval_dataset, args: DiffusionConfig) -> None:
        if len(self.image_sizes) == 1:
            return
        evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        for dataset in (train_dataset, *filter(None, evaluated)):
            if isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"Found a streaming data set and {len(self.image_sizes)} sizes in `resolution`, into which its "
                    "images cannot be sorted ahead: name one size, or load the data set without `streaming=True`."
                )
            self.buckets(dataset)  # reads the sizes
        counts = [np.count_nonzero(self.buckets(train_dataset) == i) for i in range(len(self.image_sizes))]
        rows_per_step = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
        for size, count in zip(self.image_sizes, counts, strict=True):
            if 0 < count < rows_per_step:
                raise ValueError(
                    f"Found {count} rows in the bucket {show_size(size)}, fewer than the {rows_per_step} of one "
                    "optimizer step, which holds rows of one bucket: take the size out of `resolution`, so that they "
                    "go to the next nearest, or make the step smaller."
                )

    def _get_train_sampler(self, train_dataset=None):
        return KeyedSampler(
            len(self.train_dataset),
            self.examples_per_step,
            seed=self.example_builders[0].seed,
            shuffle=self.args.train_sampling_strategy == "random",
            drop_last=self.args.dataloader_drop_last,
            rows_per_window=self.rows_per_window,
            buckets=self.buckets(self.train_dataset),
        )

    def _run_epoch(self, *, train_dataloader, epoch: int, **kwargs):
        # After a resume in the midst of an epoch accelerate and Trainer wrap the sampler so often, with more than one
        # rank, that neither tells it the epoch: it would go on in the order, and with the noise, of the first one.
        sampler = train_dataloader.batch_sampler
        while sampler is not None and not isinstance(sampler, KeyedSampler):
            sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
        if sampler is not None:  # a stream has none
            sampler.set_epoch(epoch)
            if self.args.precompute_ref_log_probs:
                self._check_planned(sampler)
        return super()._run_epoch(train_dataloader=train_dataloader, epoch=epoch, **kwargs)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["pixel_values", "posterior_noise", "noise", "timestep", "sizes", "prompt"]
        self._signature_columns += ["latent_mean", "latent_std", "conditioning", REF_ERRORS]
        self._signature_columns += ["label", "weight", "row", *self.feature_columns]

    def _prepare_input(self, data):
        # Trainer's version rounds floats to DeepSpeed's dtype, and with them the noise and the targets.
        if isinstance(data, torch.Tensor):
            return as_device_has(data, self.args.device).to(self.args.device, non_blocking=True)
        if isinstance(data, Noised):  # scored before, and where it belongs
            return data
        return super()._prepare_input(data)

    # ---- One number per image ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def corrupt(self, inputs: dict[str, Any]) -> Noised:
        """Encodes images and prompts, and adds noise; the images of a row share prompt and timestep."""
        images = len(self.image_columns)
        # (rows, images, ...) -> (images * rows, ...): all first images, then all second ones.
        flat = lambda tensor: tensor.transpose(0, 1).flatten(0, 1)  # noqa: E731
        shared = lambda tensor: tensor.repeat(images, *[1] * (tensor.ndim - 1))  # noqa: E731
        if "pixel_values" in inputs:
            posterior = self.family.encode_images(flat(inputs["pixel_values"]))
            conditioning = self.family.encode_prompts(inputs["prompt"], posterior.mean.device)
        else:
            std = flat(inputs["latent_std"]) if "latent_std" in inputs else None
            posterior, conditioning = Posterior(flat(inputs["latent_mean"]), std), inputs["conditioning"]
        x0 = posterior.sample(flat(inputs["posterior_noise"]))
        noise = flat(inputs["noise"].expand(-1, images, *[-1] * (inputs["noise"].ndim - 2)))
        noise_level = shared(self.timestep_sampling[tuple(noise.shape[1:])](inputs["timestep"]))
        t = self.family.process.timesteps(noise_level)
        return Noised(
            x_t=self.family.process.corrupt(x0, noise, t),
            t=t,
            noise_level=noise_level,
            target=self.family.process.target(x0, noise, t),
            weight=self.family.process.weight(t, self.args.weighting, self.args.snr_gamma),
            conditioning={name: shared(tensor) for name, tensor in conditioning.items()},
            sizes=flat(inputs["sizes"]) if "sizes" in inputs else None,
        )

    def denoise(self, model, noised: Noised) -> torch.Tensor:
        """What the denoiser answers, of the shape of `noised.target`."""
        conditioning = noised.conditioning if noised.sizes is None else noised.conditioning | {"sizes": noised.sizes}
        with engines.autocast(model, self.accelerator):
            return self.family.denoise(model, noised.x_t, noised.t, conditioning)

    def errors_of(self, prediction: torch.Tensor, noised: Noised) -> torch.Tensor:
        """The weighted mean squared error of each answer, float32 of shape `(images,)`."""
        return noised.weight * denoising_error(prediction, noised.target)

    def errors(self, model, noised: Noised) -> torch.Tensor:
        """The policy's `e_theta`, see [`errors_of`]."""
        return self.errors_of(self.denoise(model, noised), noised)

    def frozen_side(self, model, inputs: dict[str, Any]) -> tuple[Noised, torch.Tensor]:
        """The corrupted images of a micro-batch and the reference's errors on them: all that needs no gradient."""
        if "noised" in inputs:
            return inputs["noised"], inputs["ref_errors"]
        noised = self.corrupt(inputs)
        if REF_ERRORS in inputs:
            return noised, inputs[REF_ERRORS].T.flatten()
        return noised, self.reference_errors(model, noised)

    def reference_errors(self, model, noised: Noised) -> torch.Tensor:
        """The reference's `e_ref` on the same corrupted images, without gradient."""
        assert self.reference is not None, "this method has no reference"
        with self.reference.policy(model) as reference:
            return self.errors(reference, noised)

    # ---- Over the window --------------------------------------------------------------------------------------------

    def window_values(self, model, inputs: dict[str, Any], noised: Noised, log_ratios: torch.Tensor) -> torch.Tensor:
        """
        What the method takes its statistics of: one row of numbers for each row of the micro-batch. For methods with a
        `window` only.

        Args:
            log_ratios (`torch.Tensor` of shape `(images,)`): `e_ref - e_theta`.
        """
        raise NotImplementedError

    def over_window(self, values: torch.Tensor) -> tuple[torch.Tensor, int]:
        """
        The [`window_values`] of the whole window; gradient flows to this micro-batch's own.

        Args:
            values (`torch.Tensor` of shape `(rows, ...)`): Those of this micro-batch; all are equally long.

        Returns:
            The values, and of how many micro-batches they are.
        """
        if self.args.window == "device":
            return values, 1
        if self.args.window == "step":
            parts = list(self._step_values)
            own = self._micro_batch * self.accelerator.num_processes + self.accelerator.process_index
        else:
            parts, own = self._gathered(values), self.accelerator.process_index
        parts[own] = values
        return torch.cat(parts), len(parts)

    def _gathered(self, values: torch.Tensor) -> list[torch.Tensor]:
        return list(self.accelerator.gather(values.detach()).split(len(values)))

    def window_mean(self, losses: torch.Tensor, parts: int) -> torch.Tensor:
        """
        The mean of losses that each of `parts` micro-batches computes alike, with gradient to its own values only.

        Their gradients are parts of the mean's gradient and must be added up; accumulation and the engines average
        them instead.
        """
        mean = losses.mean()
        return mean.detach() + parts * (mean - mean.detach())

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.scores_steps:
            batches = self._score(batches)
        return batches, num_items

    @torch.no_grad()
    def _score(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Takes the [`window_values`] of all micro-batches of a step before the first of them is trained on.

        The weights do not change meanwhile, so that each micro-batch can later put its own values, with their
        gradient, in the place of what was scored: together they have the loss and the gradient of one large batch. It
        costs one more forward of the policy; what was encoded and the reference's errors are kept.
        """
        model, self._step_values, self._micro_batch = self.model_wrapped, [], -1
        # As `training_step` will: in bf16, errors in another mode may differ in the last digits.
        model.train()
        scored = []
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                noised, ref_errors = self.frozen_side(model, inputs)
                log_ratios = ref_errors - self.errors(model, noised)
                self._step_values += self._gathered(self.window_values(model, inputs, noised, log_ratios))
            spent = ("pixel_values", "latent_mean", "latent_std", "conditioning", "posterior_noise", "noise")
            kept = {name: value for name, value in inputs.items() if name not in spent}
            scored.append(kept | {"noised": noised, "ref_errors": ref_errors})
        return scored

    # ---- Training and evaluation ------------------------------------------------------------------------------------

    def _start_statistics(self) -> None:
        self._metric_sums = MetricSums()
        self._means: dict[str, float] = {}
        self._step_values = []
        self._micro_batch = -1
        # A loss or gradient that is not finite is noticed at the next log or checkpoint: no synchronisation per step.
        self._first_bad_step = torch.tensor(torch.inf, device=self.accelerator.device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._micro_batch += 1
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._watch(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # In fp16 the scaler looks for a scale at which gradients are finite, and leaves out the steps until then.
        if grad_norm is not None and self.accelerator.scaler is None:
            self._watch(grad_norm)
        return grad_norm

    def _watch(self, value: torch.Tensor | float) -> None:
        finite = torch.as_tensor(engines.gathered(value), device=self._first_bad_step.device).isfinite()
        step = torch.full_like(self._first_bad_step, self.state.global_step + 1)
        self._first_bad_step = torch.where(finite, self._first_bad_step, self._first_bad_step.minimum(step))

    def _stop_if_not_finite(self) -> None:
        step = self.accelerator.gather(self._first_bad_step.reshape(1)).min().item()
        if step != torch.inf:
            raise FloatingPointError(
                f"The loss or its gradient stopped being finite at step {int(step)}: lower `learning_rate` or `beta`, "
                f"or set `bf16=True` instead of `fp16=True`; checkpoints in {self.args.output_dir} are from before."
            )

    def train(self, *args, **kwargs):
        self._start_statistics()
        with modules_known(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)):
            return super().train(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._stop_if_not_finite()
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._means = self.training_metrics(self._metric_sums.pop_means(self.accelerator))
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def record(self, metrics: Metrics) -> None:
        """Adds a micro-batch's values to the means of the next log."""
        self._metric_sums.add(metrics)

    def training_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """The metrics of a log, from the means since the last one. A method adds what is computed from means."""
        for name in ("chosen", "rejected"):
            # No reference error at all: every image of the log was at a timestep of weight 0.
            if means.get(f"ref_errors/{name}"):
                means[f"health/error_growth/{name}"] = means[f"errors/{name}"] / means[f"ref_errors/{name}"]
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._means)
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """As [`~transformers.Trainer.evaluate`]; the draws are fixed and the metrics are those of the whole set."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.prepared_for_evaluation(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prepared_for_evaluation(self, dataset, copies: int = 1):
        """
        A held-out data set as the trainer reads it: checked, in the method's columns, with its features.

        Args:
            dataset (`Dataset`, or a `dict` of them): The data.
            copies (`int`, *optional*, defaults to `1`):
                How often one data set is repeated, behind itself. A row's draws are a function of its place, so that
                each copy comes with others.
        """
        images = self._prepare_eval_dataset(dataset, self.args)
        dataset = self._add_eval_features(images, self.args)
        if copies > 1:
            images, dataset = (concatenate_datasets([part] * copies) for part in (images, dataset))
        return self._compute_eval_once(dataset, images)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # Only errors leave the step. The loss is computed once, over the whole evaluation set, so that it does not
        # depend on how the set was split into batches and ranks.
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.reference is None and REF_ERRORS not in inputs:
                noised = self.corrupt(inputs)
                errors = [self.errors(model, noised)]
            else:
                noised, ref_errors = self.frozen_side(model, inputs)
                errors = [self.errors(model, noised), ref_errors]
        rows = len(inputs["noise"])
        columns = [column for part in errors for column in part.reshape(-1, rows)]
        weight = inputs.get("weight", torch.ones_like(columns[0]))
        label = inputs.get("label", torch.zeros_like(columns[0]))
        columns += [weight, noised.noise_level[:rows].to(weight.dtype)]
        numbers = [torch.stack(columns, dim=1), *(inputs[name] for name in self.feature_columns)]
        if "row" in inputs:  # which buckets have put out of order
            numbers.append(inputs["row"].to(columns[0].dtype).unsqueeze(1))
        return None, torch.cat(numbers, dim=1), label

    def _each_row_once(self, predictions: np.ndarray, label_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What [`prediction_step`] gave, in the order of the data set and without the rows that filled up batches."""
        if len(self.image_sizes) == 1:
            return predictions, label_ids
        _, first = np.unique(predictions[:, -1], return_index=True)
        return predictions[first, :-1], label_ids[first]

    def _whole_set_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return self.evaluation_metrics(
            EvalPrediction(*self._each_row_once(prediction.predictions, prediction.label_ids))
        )

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        if output.predictions is None:
            return output
        predictions, label_ids = self._each_row_once(output.predictions, output.label_ids)
        loss = output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"]
        bad = np.flatnonzero(~np.isfinite(predictions).all(axis=1))
        # NaN is smaller than nothing: no checkpoint would be the best one from there on.
        if len(bad) or not math.isfinite(loss):
            first = f", row {bad[0]} the first of them" if len(bad) else ""
            raise FloatingPointError(
                f"The evaluation loss at step {self.state.global_step} is {loss}, with errors that are not finite in "
                f"{len(bad)} of {len(predictions)} rows{first}: if it is all of them lower `learning_rate` or `beta`, "
                "or set `bf16=True` instead of `fp16=True`; else look at the images of these rows."
            )
        return output._replace(predictions=predictions, label_ids=label_ids)
