"""Model families: what differs between Stable Diffusion and the others, one small file each."""

import os
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from ..redaction import redact_logs, redacted
from .base import Family
from .flux import Flux
from .flux2 import Flux2, Flux2Klein
from .pixart_sigma import PixArtSigma
from .qwen_image import QwenImage
from .sana import Sana
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL
from .z_image import ZImage


# A family from elsewhere is appended to it.
FAMILIES: list[type[Family]] = [
    StableDiffusion,
    StableDiffusionXL,
    PixArtSigma,
    StableDiffusion3,
    Flux,
    Flux2,
    Flux2Klein,
    Sana,
    QwenImage,
    ZImage,
]


def family_class(pipeline_class: str) -> type[Family]:
    """
    The family of the pipelines of a class, which is named exactly.

    Raises:
        `ValueError`: if no family handles this class.
    """
    for family in FAMILIES:
        if pipeline_class == family.pipeline_class:
            return family
    raise ValueError(
        f"Found a pipeline of class {pipeline_class}, which no family handles; expected one of "
        f"{[family.pipeline_class for family in FAMILIES]}."
    )


def family_of(pipeline: DiffusionPipeline) -> Family:
    """
    The family file of a pipeline, chosen by the pipeline's exact class. Whether the pipeline can be trained is not
    checked: [`~Family.check_trainable`] does that.

    Raises:
        `ValueError`: if no family handles this class.
    """
    return family_class(type(pipeline).__name__)(pipeline)


def sampling_kwargs(pipeline: DiffusionPipeline, **options: Any) -> dict[str, Any]:
    """
    Arguments of a pipeline's call, see [`~Family.sampling_kwargs`]. Pipelines of other classes are called with the
    options as they are.
    """
    for family in FAMILIES:
        if type(pipeline).__name__ == family.pipeline_class:
            return family(pipeline).sampling_kwargs(**options)
    return options


def _which_files(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that `load_config` takes too."""
    return {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}


def _check_folder(model: str) -> None:
    if os.path.isfile(model) or (os.path.isdir(model) and not os.path.isfile(os.path.join(model, "model_index.json"))):
        what = "file" if os.path.isfile(model) else "folder"
        raise ValueError(
            f"The {what} {model!r} is no diffusers pipeline: found no model_index.json in it, expected a folder "
            "written by `pipeline.save_pretrained`; single-file weights load with `<Pipeline>.from_single_file`, "
            "whose result can be passed as `model`."
        )


def read_index(model: str, **kwargs: Any) -> dict[str, Any]:
    """
    The model_index.json of a pipeline: its class, and the classes of its parts.

    Args:
        model (`str`): Hub id or local folder.
        **kwargs: Those of `DiffusionPipeline.from_pretrained`.

    Raises:
        `ValueError`: if `model` is a local folder that holds no diffusers pipeline.
    """
    redacted(kwargs)  # remembers the secrets, of which diffusers logs those that it does not know
    redact_logs()
    _check_folder(model)
    index: Any = DiffusionPipeline.load_config(model, **_which_files(kwargs))
    if "_class_name" not in index:
        raise ValueError(
            f"Found no `_class_name` in the model_index.json of {model!r}, expected that of a diffusers pipeline: "
            "save it again with `pipeline.save_pretrained`."
        )
    return index


def check_before_loading(model: str, **kwargs: Any) -> None:
    """
    Refuses what cannot be trained as far as configuration files tell it, without the weights, which may take long to
    load: the class of the pipeline, of its denoiser and of its VAE, their configurations, and the scheduler.

    Args:
        model (`str`): Hub id or local folder.
        **kwargs: Those of `DiffusionPipeline.from_pretrained`; the parts among them replace those of the files.

    Raises:
        `ValueError`: see [`~Family.check_trainable`].
    """
    if kwargs.get("custom_pipeline") is not None:
        return
    index, which = read_index(model, **kwargs), _which_files(kwargs)
    family = family_class(index["_class_name"])
    parts: dict[str, Any] = {}
    for name in (family.denoiser_name, *family.components):
        library, class_name = index.get(name) or (None, None)
        if name in kwargs:
            parts[name] = None if kwargs[name] is None else type(kwargs[name])
        elif class_name is None:
            parts[name] = None
        else:
            parts[name] = getattr(diffusers, class_name, object) if library == "diffusers" else object
    family.check_parts(parts)
    denoiser = parts[family.denoiser_name]
    if denoiser is not object and family.denoiser_class not in {base.__name__ for base in denoiser.__mro__}:
        raise ValueError(
            f"Found {denoiser.__name__} as the {family.denoiser_name} of a {family.pipeline_class}, expected "
            f"{family.denoiser_class}: load the text-to-image model."
        )

    def config_of(name: str) -> Any:
        return kwargs[name].config if name in kwargs else parts[name].load_config(model, subfolder=name, **which)

    # `object` is a class from elsewhere, whose configuration is seen when it is loaded.
    if denoiser is not object and parts["vae"] is not object:
        family.check_configs({**index, **kwargs}, config_of(family.denoiser_name), config_of("vae"))
    if parts["scheduler"] is not object:
        scheduler = kwargs.get("scheduler") or parts["scheduler"].from_config(config_of("scheduler"))
        pipeline: Any = SimpleNamespace(scheduler=scheduler)
        family(pipeline).check_scheduler()


def size_multiple(model: str, **kwargs: Any) -> tuple[str, int] | None:
    """
    Of how many pixels the sides of images must be multiples, from configuration files alone.

    Args:
        model (`str`): Hub id or local folder.
        **kwargs: Those of `DiffusionPipeline.from_pretrained`.

    Returns:
        `tuple[str, int]`: name of the pipeline's class, and the number; None for classes that no family handles.
    """
    index = read_index(model, **kwargs)
    for family in FAMILIES:
        library, vae = index.get("vae") or (None, None)
        if index["_class_name"] == family.pipeline_class and library == "diffusers" and vae in family.vae_classes:
            config = getattr(diffusers, vae).load_config(model, subfolder="vae", **_which_files(kwargs))
            return family.pipeline_class, family.scale_factor(config) * family.patch_size
    return None


def load_pipeline(model: str, **kwargs: Any) -> DiffusionPipeline:
    """
    `DiffusionPipeline.from_pretrained` with float32 weights unless `dtype` says otherwise.

    Args:
        model (`str`): Hub id or local folder.
        **kwargs: Passed on to `DiffusionPipeline.from_pretrained`; `dtype` may be a string such as `"bfloat16"`.

    Raises:
        `ValueError`: if `model` is a local folder that holds no diffusers pipeline.
    """
    redacted(kwargs)
    redact_logs()
    _check_folder(model)
    dtype = kwargs.pop("dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return DiffusionPipeline.from_pretrained(model, dtype=dtype, **kwargs)


def pipeline_quantization(
    model: str, quantization_config: PipelineQuantizationConfig | QuantizationConfigMixin, **kwargs: Any
) -> PipelineQuantizationConfig:
    """
    What `DiffusionPipeline.from_pretrained` takes as `quantization_config`.

    Args:
        model (`str`): Hub id or local folder.
        quantization_config (`PipelineQuantizationConfig` or a configuration such as `diffusers.BitsAndBytesConfig`):
            The first is taken as it is, another is for the denoiser alone.
        **kwargs: `revision`, `token` and the like, for reading which pipeline it is.

    Raises:
        `TypeError`: if it is neither.
    """
    if isinstance(quantization_config, PipelineQuantizationConfig):
        return quantization_config
    if not isinstance(quantization_config, QuantizationConfigMixin):
        raise TypeError(
            f"`quantization_config` is a {type(quantization_config).__module__}.{type(quantization_config).__name__}, "
            "expected one of diffusers: `diffusers.BitsAndBytesConfig`, `diffusers.TorchAoConfig`, or a "
            "`diffusers.PipelineQuantizationConfig`, which quantizes other parts of the pipeline too."
        )
    denoiser_name = family_class(read_index(model, **kwargs)["_class_name"]).denoiser_name
    return PipelineQuantizationConfig(quant_mapping={denoiser_name: quantization_config})


def resolve_model(
    model: "str | DiffusionPipeline | ModelMixin",
    processing_class: DiffusionPipeline | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    quantization_config: PipelineQuantizationConfig | QuantizationConfigMixin | None = None,
) -> Family:
    """
    The family, with its pipeline, of whatever a user may pass as the `model` of a trainer.

    Args:
        model (`str`, `DiffusionPipeline` or `ModelMixin`):
            Hub id, local folder, pipeline, or bare denoiser.
        processing_class (`DiffusionPipeline`, *optional*):
            The rest of the pipeline when `model` is a bare denoiser; its own denoiser, if any, is replaced.
        model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained` when `model` is an id or folder.
        quantization_config (`PipelineQuantizationConfig` or a configuration of diffusers, *optional*):
            How to quantize what is loaded, see [`pipeline_quantization`].

    Raises:
        `TypeError`: if `model` is none of these.
        `ValueError`: if the arguments do not belong together, the pipeline's family is unknown, or the pipeline cannot
            be trained as it is.
    """
    family = _resolve_family(model, processing_class, model_init_kwargs, quantization_config)
    family.check_trainable()
    return family


def _resolve_family(
    model: "str | DiffusionPipeline | ModelMixin",
    processing_class: DiffusionPipeline | None,
    model_init_kwargs: dict[str, Any] | None,
    quantization_config: PipelineQuantizationConfig | QuantizationConfigMixin | None,
) -> Family:
    if quantization_config is not None and not isinstance(model, str):
        raise ValueError(
            f"`quantization_config` is for a model that is loaded here; found an instantiated {type(model).__name__}: "
            "pass its Hub id or folder, or quantize it before and drop `quantization_config`."
        )
    if quantization_config is not None and "quantization_config" in (model_init_kwargs or {}):
        raise ValueError(
            "Found `quantization_config` as an argument and in `model_init_kwargs`, expected one of them: drop one."
        )
    if not isinstance(model, str) and model_init_kwargs:
        raise ValueError(
            "`model_init_kwargs` only apply when `model` is a Hub id or a folder; found an instantiated "
            f"{type(model).__name__}: drop them, or pass the id."
        )
    if isinstance(model, ModelMixin):
        if not isinstance(processing_class, DiffusionPipeline):
            raise ValueError(
                f"`model` is a bare {type(model).__name__}, so `processing_class` must be the rest of its pipeline; "
                f"found {type(processing_class).__name__}: pass "
                "`DiffusionPipeline.from_pretrained(base, <denoiser's name>=None)`."
            )
        family = family_class(type(processing_class).__name__)
        if type(model).__name__ != family.denoiser_class:
            raise ValueError(
                f"Found a {type(model).__name__} for a {family.pipeline_class}, expected a {family.denoiser_class}."
            )
        processing_class.register_modules(**{family.denoiser_name: model})
        return family(processing_class)
    if processing_class is not None:
        raise ValueError(
            "`processing_class` belongs to a bare denoiser; with a Hub id, folder or pipeline as `model` it is loaded "
            "along: drop it."
        )
    if isinstance(model, str):
        kwargs = dict(model_init_kwargs or {})
        if quantization_config is not None:
            kwargs["quantization_config"] = pipeline_quantization(model, quantization_config, **kwargs)
        check_before_loading(model, **kwargs)
        return family_of(load_pipeline(model, **kwargs))
    if isinstance(model, DiffusionPipeline):
        return family_of(model)
    raise TypeError(
        f"`model` must be a Hub id, a folder, a `DiffusionPipeline` or a diffusers denoiser, found "
        f"{type(model).__name__}"
        + (": pass the model that it wraps, and a `peft_config`." if "Peft" in type(model).__name__ else ".")
    )


__all__ = [
    "FAMILIES",
    "Family",
    "check_before_loading",
    "family_class",
    "family_of",
    "load_pipeline",
    "read_index",
    "resolve_model",
    "sampling_kwargs",
    "size_multiple",
]
