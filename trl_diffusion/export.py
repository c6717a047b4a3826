"""A trained model in the layouts of other programs: LoRA files for A1111, kohya's scripts and ComfyUI, merged weights.

diffusers reads the original names of Stable Diffusion's weights, but does not write them. They are written here, and
the tests read them back with diffusers. What ComfyUI and kohya's scripts compute from the files is in the tests too
(`tests/key_maps.py`).
"""

import copy
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftConfig
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .families import Family, family_class, load_pipeline, read_index
from .files import written_whole
from .hub import (
    base_model_of,
    check_all_loaded,
    existing_base,
    is_adapter,
    load_peft,
    load_trained,
    naming_the_base,
    public_config,
    refusing_other_sizes,
    stored_name,
    unknown_lora_options,
)


LORA_LAYOUTS = ("diffusers", "kohya", "comfyui")
# With the factor on the latents of its VAE, which a file does not say.
SINGLE_FILE_PIPELINES = {"StableDiffusionPipeline": 0.18215, "StableDiffusionXLPipeline": 0.13025}

# What an exported file tells of itself, so that it can be loaded without being told more.
LAYOUT, BASE_MODEL = "trl_diffusion.layout", "trl_diffusion.base_model"

Path_ = str | os.PathLike


# ---- The original names of Stable Diffusion's weights ---------------------------------------------------------------

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_LAYERS = {
    name.removesuffix(".weight"): original.removesuffix(".weight")
    for part in ("layers", "addition_embed_type")
    for name, original in DIFFUSERS_TO_LDM_MAPPING["unet"][part].items()
    if name.endswith(".weight")
}


def unet_name(name: str, config: dict[str, Any]) -> str:
    """
    The original name of a module or parameter of a UNet of Stable Diffusion 1.x, 2.x or XL.

    Args:
        name (`str`): Its name in diffusers, e.g. `"mid_block.resnets.1.conv1.weight"`.
        config (`dict`): Configuration of the UNet.

    Raises:
        `ValueError`: if there is no such name in the original.
    """
    layers_per_block = config["layers_per_block"]
    if not isinstance(layers_per_block, int):
        raise ValueError(
            f"Found a UNet with layers_per_block={layers_per_block!r}, expected one number for all blocks, without "
            "which its modules have no original names: use the layout 'diffusers', or a merged folder."
        )
    per_block = layers_per_block + 1
    for module, original in _UNET_LAYERS.items():
        if name == module or name.startswith(f"{module}."):
            return original + name.removeprefix(module)
    match = re.match(
        r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
    )
    if match is None:
        raise ValueError(
            f"The UNet's {name!r} has no name in the original layout of Stable Diffusion's weights: use the layout "
            "'diffusers', or a merged folder."
        )
    where, kind, rest = match[1], match[3], match[5]
    block, layer = int(match[2] or 0), int(match[4])
    if kind == "resnets":
        rest = re.sub(rf"^({'|'.join(_RESNET)})(?=\.|$)", lambda found: _RESNET[found[0]], rest)
    inner = {"resnets": 0, "attentions": 1}.get(kind)
    if where == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{per_block * (block + 1)}.0.op" + rest.removeprefix("conv")
    if kind == "upsamplers":
        inner = 2 if "Attn" in config["up_block_types"][block] else 1
        layer = layers_per_block
    place = (
        f"input_blocks.{1 + per_block * block + layer}"
        if where == "down"
        else f"output_blocks.{per_block * block + layer}"
    )
    return f"{place}.{inner}.{rest}"


def vae_name(name: str, config: dict[str, Any]) -> str:
    """The original name of a parameter of Stable Diffusion's VAE."""
    original = DIFFUSERS_TO_LDM_MAPPING["vae"]
    if name in original:
        return original[name]
    last = len(config["up_block_types"]) - 1
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    for old, new in (
        ("down_blocks", "down"),
        ("resnets", "block"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("conv_shortcut", "nin_shortcut"),
        ("mid_block.attentions.0", "mid.attn_1"),
        ("group_norm", "norm"),
        ("to_out.0", "proj_out"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
    ):
        name = name.replace(old, new)
    return name


def _vae_weights(vae) -> dict[str, torch.Tensor]:
    weights = {vae_name(name, vae.config): tensor for name, tensor in vae.state_dict().items()}
    # The original's attention is made of 1 x 1 convolutions.
    attention = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")
    return {name: t[:, :, None, None] if attention.search(name) else t for name, t in weights.items()}


def _open_clip_weights(text_encoder) -> dict[str, torch.Tensor]:
    """The weights of SDXL's second text encoder under the names of OpenCLIP, which keeps queries to values in one."""
    mapping = DIFFUSERS_TO_LDM_MAPPING["openclip"]
    weights = dict(text_encoder.state_dict())
    new = {original: weights.pop(name) for name, original in mapping["layers"].items()}
    new["text_projection"] = new["text_projection"].T
    for name in [name for name in weights if ".self_attn.q_proj." in name]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    for name, tensor in weights.items():
        for ours, original in mapping["transformer"].items():
            name = name.replace(ours, original)
        new[f"transformer.{name}"] = tensor
    return new


def _noise_levels(zero_terminal_snr: bool) -> torch.Tensor:
    """`alphas_cumprod` of Stable Diffusion 1.x and XL, rescaled to zero terminal SNR (Lin et al., 2023) or not."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = (1 - betas).cumprod(0).sqrt()
    if zero_terminal_snr:
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return signal**2


def _noise_keys(kind: str, scheduler: Any) -> tuple[str, ...] | None:
    """
    The keys by which a single file says what noise its model, a pipeline of class `kind`, knows; None if it cannot.

    Without a key the noise of Stable Diffusion and the prediction of epsilon are understood. Of XL, `v_pred` says that
    v is predicted, and with it `ztsnr` that the terminal SNR is zero (`comfy/supported_models.py` of ComfyUI, read in
    November 2026).
    """
    found, prediction = getattr(scheduler, "alphas_cumprod", None), scheduler.config.get("prediction_type")
    if found is None:
        return None
    found = torch.as_tensor(found, dtype=torch.float64)
    for zero_snr in (False, True):
        expected = _noise_levels(zero_snr)
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=1e-5):
            break
    else:
        return None
    if prediction == "v_prediction" and kind == "StableDiffusionXLPipeline":
        return ("v_pred", "ztsnr") if zero_snr else ("v_pred",)
    return () if prediction == "epsilon" and not zero_snr else None


def _noise_obstacle(kind: str, scheduler: Any) -> str | None:
    if _noise_keys(kind, scheduler) is not None:
        return None
    names = ("prediction_type", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr")
    noise = ", ".join(f"{name}={scheduler.config.get(name)!r}" for name in names)
    return (
        f"Found a {kind} whose {type(scheduler).__name__} has {noise}, which a single file cannot say: expected the "
        "noise of Stable Diffusion ('scaled_linear' betas from 0.00085 to 0.012) with prediction_type='epsilon', or "
        "for XL 'v_prediction' (also with zero terminal SNR); merge it into a folder instead."
    )


def _other_pipeline(kind: str) -> str | None:
    return f"Found a {kind}, expected one of {list(SINGLE_FILE_PIPELINES)}: merge it into a folder instead."


def single_file_obstacle(pipeline: DiffusionPipeline) -> str | None:
    """Why [`single_file_weights`] does not take the pipeline; None if it does."""
    kind, pipe = type(pipeline).__name__, cast(Any, pipeline)
    if kind not in SINGLE_FILE_PIPELINES:
        return _other_pipeline(kind)
    parts = ["unet", "vae", "text_encoder", *["text_encoder_2"] * (kind == "StableDiffusionXLPipeline")]
    if missing := [part for part in parts if getattr(pipe, part) is None]:
        return f"Found a {kind} without {missing[0]}, which a single file holds: load the whole pipeline."
    if kind == "StableDiffusionPipeline" and pipe.text_encoder.config.hidden_act != "quick_gelu":
        return (
            f"Found a text encoder with the activation {pipe.text_encoder.config.hidden_act!r}, as in Stable "
            "Diffusion 2.x, expected 'quick_gelu', that of 1.x and XL: merge it into a folder instead."
        )
    vae, factor = pipe.vae.config, SINGLE_FILE_PIPELINES[kind]
    if vae.scaling_factor != factor or vae.shift_factor is not None or vae.latents_mean is not None:
        return (
            f"Found a VAE with scaling_factor={vae.scaling_factor}, shift_factor={vae.shift_factor} and latents_mean="
            f"{vae.latents_mean}, which a single file cannot say: expected a scaling_factor of {factor} alone, as "
            f"in a {kind}; merge it into a folder instead."
        )
    return _noise_obstacle(kind, pipe.scheduler)


def single_file_weights(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """
    All weights of a Stable Diffusion 1.x or XL pipeline under their original names, as one file holds them, and for a
    v-prediction XL the keys that say so.

    Raises:
        `ValueError`: if the pipeline is another, or a Stable Diffusion 2.x, or predicts what a file cannot say.
    """
    obstacle = single_file_obstacle(pipeline)
    if obstacle is not None:
        raise ValueError(obstacle)
    kind, pipe = type(pipeline).__name__, cast(Any, pipeline)
    parts = {
        "": {key: torch.zeros(0) for key in _noise_keys(kind, pipe.scheduler) or ()},
        "model.diffusion_model.": {unet_name(k, pipe.unet.config): v for k, v in pipe.unet.state_dict().items()},
        "first_stage_model.": _vae_weights(pipe.vae),
    }
    # transformers has dropped this prefix of the text model, the file has not.
    clip = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in pipe.text_encoder.state_dict().items()}
    if kind == "StableDiffusionPipeline":
        parts["cond_stage_model.transformer."] = clip
    else:
        parts["conditioner.embedders.0.transformer."] = clip
        parts["conditioner.embedders.1.model."] = _open_clip_weights(pipe.text_encoder_2)
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


# ---- LoRA -----------------------------------------------------------------------------------------------------------


_SUFFIX = re.compile(r"\.lora_[AB]\.weight$")
# Modules of a UNet on which kohya's scripts have no LoRA.
_NOT_IN_KOHYAS_SCRIPTS = re.compile(r"(conv_in|conv_out|time_embedding\..+|add_embedding\..+)")


def _alpha(module: str, rank: int, config: Any) -> float:
    """The alpha that means the same where the update is scaled by alpha / rank."""
    pattern = get_pattern_key(config.alpha_pattern.keys(), module)
    alpha = config.alpha_pattern.get(pattern, config.lora_alpha)
    return alpha * math.sqrt(rank) if config.use_rslora else alpha


def _modules_of(weights: dict[str, torch.Tensor]) -> list[str]:
    """
    The modules with a LoRA.

    Raises:
        `ValueError`: if there are other weights, or half a LoRA.
    """
    modules = sorted({_SUFFIX.sub("", key) for key in weights})
    expected = {f"{module}.lora_{part}.weight" for module in modules for part in "AB"}
    if other := sorted(weights.keys() ^ expected):
        raise ValueError(
            f"Found {other[0]!r} in the adapter, or missing from it: expected a lora_A.weight and a lora_B.weight of "
            "each module and nothing else; merge it instead."
        )
    return modules


def _check_new(file: Path_) -> None:
    file = Path(file)
    if file.suffix != ".safetensors":
        raise ValueError(f"Found the file name {file.name!r}, expected one that ends in '.safetensors'.")
    if file.exists():
        raise ValueError(f"Found a file {str(file)!r}: expected none; choose another name.")


def _save(tensors: dict[str, torch.Tensor], file: Path_, metadata: dict[str, str]) -> None:
    file = Path(file)
    _check_new(file)
    with written_whole(file.parent) as staging:
        # Contiguous, and no two of them parts of one: safetensors takes nothing else.
        save_file(
            {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, staging / file.name, metadata
        )


def _for_unet(
    weights: dict[str, torch.Tensor], config: Any, base: str, index: dict[str, Any], layout: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of kohya's or ComfyUI's layout for UNets, and what their readers look for in the metadata."""
    unet_config: Any = diffusers.UNet2DConditionModel.load_config(base, subfolder="unet")
    original = layout == "comfyui" or index["_class_name"] == "StableDiffusionXLPipeline"
    modules = {module: unet_name(module, unet_config) if original else module for module in _modules_of(weights)}
    names = Counter(modules.values())
    if twice := [module for module, name in modules.items() if names[name] > 1]:
        raise ValueError(f"Found one original name for the modules {twice}: use the layout 'diffusers', or merge.")
    skipped = [module for module in modules if _NOT_IN_KOHYAS_SCRIPTS.fullmatch(module)]
    if layout == "kohya" and skipped:
        warnings.warn(f"kohya's scripts have no LoRA on {skipped} and leave it out; ComfyUI reads it.", stacklevel=3)
    ranks = {module: len(weights[f"{module}.lora_A.weight"]) for module in modules}
    alphas = {module: _alpha(module, rank, config) for module, rank in ranks.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    # diffusers 0.42 loses an alpha that not all modules have in common: it is put into the weights instead.
    scaled = _scaled(weights, {module: alphas[module] / alpha for module in modules})
    renamed = {modules[_SUFFIX.sub("", key)] + _SUFFIX.search(key)[0]: t for key, t in scaled.items()}  # type: ignore[index]
    if layout == "comfyui":
        tensors = {f"diffusion_model.{key}": tensor for key, tensor in renamed.items()}
        prefixes = [f"diffusion_model.{module}" for module in modules.values()]
    else:
        tensors = convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in renamed.items()})
        prefixes = [f"lora_unet_{module.replace('.', '_')}" for module in modules.values()]
    # diffusers has written the rank as alpha, which is right for alpha = rank only.
    tensors |= {f"{prefix}.alpha": torch.tensor(float(alpha)) for prefix in prefixes}
    return tensors, {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(next(iter(ranks.values()))) if len(set(ranks.values())) == 1 else "Dynamic",
        "ss_network_alpha": f"{alpha:g}",
        "ss_sd_model_name": base,
    }


def _scaled(weights: dict[str, torch.Tensor], factors: dict[str, float]) -> dict[str, torch.Tensor]:
    """The weights with each module's update multiplied by its factor."""
    scaled = dict(weights)
    for module, factor in factors.items():
        tensor = weights[f"{module}.lora_B.weight"]
        scaled[f"{module}.lora_B.weight"] = (tensor.float() * factor).to(tensor.dtype)
    return scaled


def _for_transformer(weights: dict[str, torch.Tensor], config: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """
    ComfyUI's layout for transformers: weights under the names of diffusers, whose update needs no scale, and the
    configuration that says so. ComfyUI looks for no configuration, and without an alpha it takes 1 for the scale.
    """
    ranks = {module: len(weights[f"{module}.lora_A.weight"]) for module in _modules_of(weights)}
    config = copy.deepcopy(config)
    scaled = _scaled(weights, {module: _alpha(module, rank, config) / rank for module, rank in ranks.items()})
    config.lora_alpha, config.alpha_pattern, config.use_rslora = config.r, dict(config.rank_pattern), False
    return scaled, config


def lora_obstacle(
    config: PeftConfig, family: Family | type[Family], layout: str, modules: Iterable[str] = ()
) -> str | None:
    """Why a layout of [`LORA_LAYOUTS`] cannot hold an adapter on these modules; None if it can."""
    if not family.loads_lora:
        return (
            f"Found a LoRA of a {family.pipeline_class}, for which diffusers has no LoRA files: merge it instead, or "
            "load it with `peft.PeftModel`."
        )
    dora, unknown = False, [f"peft_type={config.peft_type.value!r}"]
    if isinstance(config, LoraConfig):
        dora, unknown = config.use_dora, unknown_lora_options(config)
        if layout != "diffusers":
            unknown += [f"{name}=True" for name in ("use_dora", "lora_bias") if getattr(config, name)]
    if unknown:
        kind = "DoRA" if dora else config.peft_type.value
        return (
            f"The layout {layout!r} cannot hold all of this {kind} adapter (found {', '.join(unknown)}): expected "
            "LoRA without biases, trained modules or magnitudes; merge it instead."
        )
    if family.denoiser_name == "unet" or layout == "diffusers":
        return None
    if layout == "kohya":
        return (
            f"The layout 'kohya' is for UNets, found a {family.pipeline_class}, whose modules kohya's scripts name "
            "and fuse otherwise: choose 'comfyui' or 'diffusers', or merge."
        )
    if family.comfyui_modules is None:
        return (
            f"Found a LoRA of a {family.pipeline_class}, expected a model whose LoRA files ComfyUI reads under the "
            "names of diffusers: choose 'diffusers', or merge."
        )
    unmapped = [module for module in modules if not re.fullmatch(family.comfyui_modules, module)]
    if unmapped:
        return (
            f"Found a LoRA on {unmapped[0]!r} of a {family.pipeline_class} ({len(unmapped)} such modules), expected "
            "modules that ComfyUI finds by their names in diffusers: choose 'diffusers', or merge."
        )
    return None


def export_lora(
    name: Path_,
    output_file: Path_,
    *,
    layout: Literal["diffusers", "kohya", "comfyui"] = "kohya",
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
) -> None:
    """
    Writes a trained LoRA as one file.

    Args:
        name (`str` or `os.PathLike`):
            Output folder of a LoRA training, or its Hub id.
        output_file (`str` or `os.PathLike`):
            A `.safetensors` file.
        layout (`str`, *optional*, defaults to `"kohya"`):
            `"diffusers"`: what `pipeline.load_lora_weights` reads, rank and alpha in the metadata, for every family
            whose pipeline has it. Programs that do not read this metadata run it at the wrong strength, unless alpha
            is the rank: ComfyUI takes 1 for alpha / rank.

            `"kohya"`: `lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`, as kohya's scripts write
            it and A1111, ComfyUI and diffusers read it; the modules of Stable Diffusion 1.x and 2.x under the names of
            diffusers, those of XL under the original ones. For UNets only.

            `"comfyui"`: for UNets `diffusion_model.<module>.lora_A.weight`, `.lora_B.weight` and `.alpha` under the
            original names, ComfyUI's generic layout. For the transformers of Stable Diffusion 3, FLUX.1, FLUX.2,
            Qwen-Image and Z-Image the names of diffusers, which ComfyUI maps to its own, with alpha / rank multiplied
            into `lora_B`: the file runs at the trained strength in ComfyUI and in diffusers.

            Where a UNet's modules differ in alpha / rank (`alpha_pattern`), the weights are scaled, since all modules
            of a file have the same alpha.
        dtype (`torch.dtype`, *optional*):
            Dtype of the weights. Defaults to that of the training.
        base_model (`str`, *optional*):
            Hub id or folder of the base model, instead of the one that the adapter names. The file names it in its
            metadata, a folder by its absolute path: pass the Hub id before you share the file.

    Raises:
        `ValueError`: if the folder holds no LoRA, the layout is unknown or cannot hold it, or the file exists.
    """
    name = str(name)
    if layout not in LORA_LAYOUTS:
        raise ValueError(f"Found layout={layout!r}, expected one of {list(LORA_LAYOUTS)}.")
    if os.path.isdir(name) and not is_adapter(name):
        raise ValueError(f"Found no adapter_config.json in {name!r}: expected the output folder of a LoRA training.")
    _check_new(output_file)
    config: Any = PeftConfig.from_pretrained(name)
    base = stored_name(base_model_of(name, base_model))
    with naming_the_base(name, base):
        index: Any = DiffusionPipeline.load_config(base)
    family = family_class(index["_class_name"])
    weights = {k.removeprefix("base_model.model."): t for k, t in load_peft_weights(name, device="cpu").items()}
    obstacle = lora_obstacle(config, family, layout, (key.split(".lora_")[0] for key in weights))
    if obstacle is not None:
        raise ValueError(obstacle)
    _check_fits(name, weights, base, family)
    metadata = {"format": "pt", LAYOUT: layout, BASE_MODEL: base}
    if layout != "diffusers" and family.denoiser_name == "unet":
        tensors, about = _for_unet(weights, config, base, index, layout)
        _save(_cast(tensors, dtype), output_file, metadata | about)
        return
    if layout == "comfyui":
        weights, config = _for_transformer(weights, config)
    pipeline_class = getattr(diffusers, index["_class_name"])
    with TemporaryDirectory() as folder:
        layers = {
            f"{family.denoiser_name}_lora_layers": _cast(weights, dtype),
            f"{family.denoiser_name}_lora_adapter_metadata": public_config(config),
        }
        pipeline_class.save_lora_weights(folder, weight_name="lora.safetensors", **layers)
        with safe_open(f"{folder}/lora.safetensors", "pt") as file:
            metadata |= file.metadata()
        _save(load_file(f"{folder}/lora.safetensors"), output_file, metadata)


def _check_fits(name: str, weights: dict[str, torch.Tensor], base: str, family: type[Family]) -> None:
    """Raises `ValueError` where a LoRA has other modules, or modules of another size, than its base, by the latter's
    configuration."""
    kind = getattr(diffusers, family.denoiser_class)
    with init_empty_weights():
        denoiser = kind.from_config(kind.load_config(base, subfolder=family.denoiser_name))
    sizes = {module: parameter.shape for module, parameter in denoiser.named_parameters()}
    for key in [key for key in weights if key.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        size, up = sizes.get(f"{module}.weight"), weights[f"{module}.lora_B.weight"]
        if size is None or len(size) < 2 or (size[0], size[1]) != (up.shape[0], weights[key].shape[1]):
            found = "none" if size is None else f"one of {tuple(size)}"
            raise ValueError(
                f"The adapter {name!r} is for a module {module!r} of ({up.shape[0]}, {weights[key].shape[1]}), found "
                f"{found} in the base {base!r}: pass the model that it was trained on as `base_model` "
                "(`--base_model`)."
            )


def _cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """All weights in `dtype`; an alpha is a number."""
    return {name: tensor.to(dtype) if dtype and tensor.ndim else tensor for name, tensor in tensors.items()}


def _load_for_unet(file: Path_, layout: str, pipeline: Any) -> None:
    """
    Puts what [`_for_unet`] wrote on the UNet.

    By the names of the modules: diffusers reads kohya's layout alone, and of kohya's names it drops those that it does
    not know without a word, such as that of SDXL's `add_embedding`.
    """
    unet = pipeline.unet
    original = layout == "comfyui" or type(pipeline).__name__ == "StableDiffusionXLPipeline"
    prefix, kinds = "diffusion_model.", {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "alpha": "alpha"}
    if layout == "kohya":
        prefix, kinds = "lora_unet_", {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "alpha": "alpha"}
    modules = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            written = unet_name(name, unet.config) if original else name
            modules[prefix + (written if layout == "comfyui" else written.replace(".", "_"))] = name
    weights, alphas = {}, {}
    for key, tensor in load_file(file).items():
        match = re.fullmatch(rf"(.+?)\.({'|'.join(map(re.escape, kinds))})", key)
        if match is None or match[1] not in modules:
            raise ValueError(
                f"Found {key!r} in the LoRA {str(file)!r}, which is no part of this UNet: expected the base model "
                "that it was trained on, pass it as `base_model` (`--base_model`)."
            )
        module, kind = modules[match[1]], kinds[match[2]]
        if kind == "alpha":
            alphas[module] = float(tensor)
        else:
            weights[f"{module}.{kind}.weight"] = tensor
    ranks = {module: len(weights[f"{module}.lora_A.weight"]) for module in alphas}
    (rank, _), (alpha, _) = (Counter(found.values()).most_common(1)[0] for found in (ranks, alphas))
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank},
        "target_modules": list(ranks),
    }
    with refusing_other_sizes(str(file), unet):
        unet.load_lora_adapter(weights, prefix=None, metadata=config)
    check_all_loaded(unet, ranks, str(file))


# ---- Merged weights -------------------------------------------------------------------------------------------------


def load_merged(name: Path_, base_model: str | None = None, **kwargs: Any) -> DiffusionPipeline:
    """
    As [`~hub.load_trained`], with an adapter merged into the weights.

    Args:
        name (`str` or `os.PathLike`): Hub id, folder or file.
        base_model (`str`, *optional*): Hub id or folder of the base model, instead of the one that the adapter names.
        **kwargs: Passed on to [`families.load_pipeline`].

    Raises:
        `ValueError`: if PEFT cannot merge the adapter, or the base model is not there.
    """
    name = str(name)
    if not is_adapter(name):
        whole: Any = load_trained(name, base_model=base_model, **kwargs)
        if os.path.isfile(name):
            denoiser = getattr(whole, family_class(type(whole).__name__).denoiser_name)
            if getattr(denoiser, "peft_config", None):
                denoiser.fuse_lora()
                denoiser.unload_lora()
        return whole
    base = base_model_of(name, base_model)
    with naming_the_base(name, base):
        denoiser_name = family_class(read_index(base, **kwargs)["_class_name"]).denoiser_name
        pipeline = load_pipeline(base, **kwargs)
    policy = load_peft(getattr(pipeline, denoiser_name), name)
    try:
        merged = policy.merge_and_unload()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"The {policy.peft_config['default'].peft_type.value} adapter in {name!r} cannot be merged into its base "
            f"({error}): load it with `load_trained`, or write it in the layout 'diffusers'."
        ) from error
    setattr(pipeline, denoiser_name, merged)
    return pipeline


def export_merged(
    name: Path_,
    output: Path_,
    *,
    single_file: bool = False,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
) -> None:
    """
    Writes the whole model with what was trained merged into its weights.

    Args:
        name (`str` or `os.PathLike`):
            Output folder of a training, of any adapter of PEFT that can be merged or of the whole model.
        output (`str` or `os.PathLike`):
            A new folder, which `DiffusionPipeline.from_pretrained` loads; with `single_file` a `.safetensors` file.
        single_file (`bool`, *optional*, defaults to `False`):
            Whether to write one file under the original names of Stable Diffusion 1.x and XL, which A1111, ComfyUI and
            diffusers' `from_single_file` read. It holds no scheduler and no tokenizer. For an XL that predicts v it
            says so (`v_pred`, and `ztsnr` for zero terminal SNR); what it cannot say is refused.
        dtype (`torch.dtype`, *optional*):
            Dtype of the weights, in which they are also merged. Defaults to float32.
        base_model (`str`, *optional*):
            Hub id or folder of an adapter's base model, instead of the one that the adapter names. A single file names
            it in its metadata, see [`export_lora`].

    Raises:
        `ValueError`: if `output` exists, the adapter cannot be merged, or `single_file` cannot hold the model.
    """
    name = str(name)
    if os.path.exists(output) and not (os.path.isdir(output) and not os.listdir(output) and not single_file):
        raise ValueError(f"Found {str(output)!r}: expected a name that is not there yet.")
    base = stored_name(base_model_of(name, base_model) if is_adapter(name) else name)
    if single_file:
        _check_new(output)
        with naming_the_base(name, base):
            index: Any = DiffusionPipeline.load_config(base)
        # Before the weights are loaded.
        kind, obstacle = index["_class_name"], _other_pipeline(index["_class_name"])
        if kind in SINGLE_FILE_PIPELINES:
            scheduler_class = getattr(diffusers, index["scheduler"][1])
            obstacle = _noise_obstacle(kind, scheduler_class.from_pretrained(base, subfolder="scheduler"))
        if obstacle is not None:
            raise ValueError(obstacle)
    pipeline = load_merged(name, base_model=base_model, dtype=dtype)
    if single_file:
        _save(single_file_weights(pipeline), output, {"format": "pt", LAYOUT: "single_file", BASE_MODEL: base})
        return
    with written_whole(output) as staging:
        pipeline.save_pretrained(staging)


# ---- Back again -----------------------------------------------------------------------------------------------------


def layout_and_base(file: Path_, base_model: str | None = None) -> tuple[str, str]:
    """
    The layout of a file that [`export_lora`] or [`export_merged`] wrote, and its base model.

    Args:
        file (`str` or `os.PathLike`): A `.safetensors` file.
        base_model (`str`, *optional*): Hub id or folder of the base model, instead of the one that the file names.

    Raises:
        `ValueError`: if the file does not tell its layout and base model, or the base model is not there.
    """
    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata() or {}
    layout, base = metadata.get(LAYOUT), base_model or metadata.get(BASE_MODEL)
    if layout is None or base is None:
        raise ValueError(
            f"The metadata of {str(file)!r} name no layout and no base model: expected a file that `trl-diffusion "
            "export` wrote; load others with diffusers."
        )
    return layout, existing_base(str(file), base)


def load_exported(file: Path_, base_model: str | None = None, **kwargs: Any) -> DiffusionPipeline:
    """
    Loads a file that [`export_lora`] or [`export_merged`] wrote, with its base model.

    Args:
        file (`str` or `os.PathLike`): A `.safetensors` file.
        base_model (`str`, *optional*): Hub id or folder of the base model, instead of the one that the file names.
        **kwargs: Passed on to [`families.load_pipeline`]; of merged weights only `dtype`.

    Raises:
        `ValueError`: if the file does not tell its layout and base model, or the base model does not fit.
    """
    file = str(file)
    layout, base = layout_and_base(file, base_model)
    if layout == "single_file":
        with naming_the_base(file, base):
            index: Any = DiffusionPipeline.load_config(base)
        dtype = kwargs.pop("dtype", None) or torch.float32
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        pipeline_class = getattr(diffusers, index["_class_name"])
        return pipeline_class.from_single_file(file, config=base, dtype=dtype, **kwargs)
    with naming_the_base(file, base):
        denoiser_name = family_class(read_index(base, **kwargs)["_class_name"]).denoiser_name
        pipeline: Any = load_pipeline(base, **kwargs)
    if layout != "diffusers" and denoiser_name == "unet":
        _load_for_unet(file, layout, pipeline)
        return pipeline
    denoiser = getattr(pipeline, denoiser_name)
    with refusing_other_sizes(file, denoiser):
        pipeline.load_lora_weights(str(Path(file).parent), weight_name=Path(file).name)
    with safe_open(file, "pt") as opened:
        keys = list(opened.keys())
    modules = {key.removeprefix(f"{denoiser_name}.").split(".lora_A.")[0] for key in keys if ".lora_A." in key}
    check_all_loaded(denoiser, modules, file)
    return pipeline
