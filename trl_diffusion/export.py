"""A trained model in the layouts of other programs: LoRA files for A1111, kohya's scripts and ComfyUI, merged weights.

diffusers reads the original names of Stable Diffusion's weights, but does not write them. They are written here, and
the tests read them back with diffusers.
"""

import math
import os
import re
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .families import Family, family_class, family_of, load_pipeline
from .files import written_whole
from .hub import load_trained, loads_as_diffusers_lora


LORA_LAYOUTS = ("diffusers", "kohya", "comfyui")
SINGLE_FILE_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")

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
    per_block = config["layers_per_block"] + 1
    for module, original in _UNET_LAYERS.items():
        if name == module or name.startswith(f"{module}."):
            return original + name.removeprefix(module)
    match = re.match(
        r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
    )
    if match is None:
        raise ValueError(f"The UNet's {name!r} has no name in the original layout of Stable Diffusion's weights.")
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
        layer = config["layers_per_block"]
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


def single_file_obstacle(pipeline: DiffusionPipeline) -> str | None:
    """Why [`single_file_weights`] does not take the pipeline; None if it does."""
    kind, pipe = type(pipeline).__name__, cast(Any, pipeline)
    if kind not in SINGLE_FILE_PIPELINES:
        return f"Found a {kind}, expected one of {list(SINGLE_FILE_PIPELINES)}: merge it into a folder instead."
    if kind == "StableDiffusionPipeline" and pipe.text_encoder.config.hidden_act != "quick_gelu":
        return (
            f"Found a text encoder with the activation {pipe.text_encoder.config.hidden_act!r}, as in Stable "
            "Diffusion 2.x, expected 'quick_gelu', that of 1.x and XL: merge it into a folder instead."
        )
    return None


def single_file_weights(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """
    All weights of a Stable Diffusion 1.x or XL pipeline under their original names, as one file holds them.

    Raises:
        `ValueError`: if the pipeline is another, or a Stable Diffusion 2.x.
    """
    obstacle = single_file_obstacle(pipeline)
    if obstacle is not None:
        raise ValueError(obstacle)
    kind, pipe = type(pipeline).__name__, cast(Any, pipeline)
    parts = {
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


def _kohya_alpha(module: str, rank: int, config: Any) -> float:
    """The alpha that means the same where the update is scaled by alpha / rank."""
    pattern = get_pattern_key(config.alpha_pattern.keys(), module)
    alpha = config.alpha_pattern.get(pattern, config.lora_alpha)
    return alpha * math.sqrt(rank) if config.use_rslora else alpha


def _save(tensors: dict[str, torch.Tensor], file: Path_, metadata: dict[str, str]) -> None:
    file = Path(file)
    if file.suffix != ".safetensors":
        raise ValueError(f"Found the file name {file.name!r}, expected one that ends in '.safetensors'.")
    if file.exists():
        raise ValueError(f"Found a file {str(file)!r}: expected none; choose another name.")
    with written_whole(file.parent) as staging:
        # Contiguous, and no two of them parts of one: safetensors takes nothing else.
        save_file(
            {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, staging / file.name, metadata
        )


def _as_kohya_or_comfyui(
    weights: dict[str, torch.Tensor], config: Any, index: dict[str, Any], layout: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of the layout, and what its readers look for in the metadata."""
    base = config.base_model_name_or_path
    unet_config: Any = diffusers.UNet2DConditionModel.load_config(base, subfolder="unet")
    suffix = re.compile(r"\.lora_[AB]\.weight$")
    original = layout == "comfyui" or index["_class_name"] == "StableDiffusionXLPipeline"
    modules = {
        module: unet_name(module, unet_config) if original else module
        for module in sorted({suffix.sub("", key) for key in weights})
    }
    alphas = {module: _kohya_alpha(module, len(weights[f"{module}.lora_A.weight"]), config) for module in modules}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    # diffusers 0.42 loses an alpha that not all modules have in common: it is put into the weights instead.
    for module in modules:
        if alphas[module] != alpha:
            weights[f"{module}.lora_B.weight"] = weights[f"{module}.lora_B.weight"] * (alphas[module] / alpha)
    renamed = {modules[suffix.sub("", key)] + suffix.search(key)[0]: t for key, t in weights.items()}  # type: ignore[index]
    if layout == "comfyui":
        tensors = {f"diffusion_model.{key}": tensor for key, tensor in renamed.items()}
        prefixes = [f"diffusion_model.{module}" for module in modules.values()]
    else:
        tensors = convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in renamed.items()})
        prefixes = [f"lora_unet_{module.replace('.', '_')}" for module in modules.values()]
    # diffusers has written the rank as alpha, which is right for alpha = rank only.
    tensors |= {f"{prefix}.alpha": torch.tensor(float(alpha)) for prefix in prefixes}
    ranks = {len(tensor) for key, tensor in weights.items() if key.endswith(".lora_A.weight")}
    return tensors, {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alpha:g}",
        "ss_sd_model_name": base,
    }


def lora_obstacle(config: PeftConfig, family: Family | type[Family], layout: str) -> str | None:
    """Why a layout of [`LORA_LAYOUTS`] cannot hold an adapter; None if it can."""
    if not family.loads_lora:
        return (
            f"Found a LoRA of a {family.pipeline_class}, for which diffusers has no LoRA files: merge it instead, or "
            "load it with `peft.PeftModel`."
        )
    with_magnitudes = isinstance(config, LoraConfig) and config.use_dora
    if not loads_as_diffusers_lora(config, family) or (with_magnitudes and layout != "diffusers"):
        return (
            f"The layout {layout!r} cannot hold all of this {'DoRA' if with_magnitudes else config.peft_type.value} "
            "adapter: expected LoRA without biases, trained modules or magnitudes; merge it instead."
        )
    if layout != "diffusers" and family.denoiser_name != "unet":
        return f"The layout {layout!r} is for UNets, found a {family.pipeline_class}: choose 'diffusers', or merge."
    return None


def export_lora(
    name: Path_,
    output_file: Path_,
    *,
    layout: Literal["diffusers", "kohya", "comfyui"] = "kohya",
    dtype: torch.dtype | None = None,
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
            whose pipeline has it.
            `"kohya"`: `lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`, as kohya's scripts write
            it and A1111, ComfyUI and diffusers read it; the modules of Stable Diffusion 1.x and 2.x under the names of
            diffusers, those of XL under the original ones. `"comfyui"`: `diffusion_model.<module>.lora_A.weight`,
            `.lora_B.weight` and `.alpha` under the original names, ComfyUI's generic layout. The two are for UNets. In
            them all modules have the same alpha: where `alpha_pattern` has others, the weights are scaled instead.
        dtype (`torch.dtype`, *optional*):
            Dtype of the weights. Defaults to that of the training.

    Raises:
        `ValueError`: if the folder holds no LoRA, the layout is unknown or cannot hold it, or the file exists.
    """
    if layout not in LORA_LAYOUTS:
        raise ValueError(f"Found layout={layout!r}, expected one of {list(LORA_LAYOUTS)}.")
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "adapter_config.json")):
        raise ValueError(
            f"Found no adapter_config.json in {str(name)!r}: expected the output folder of a LoRA training."
        )
    config: Any = PeftConfig.from_pretrained(str(name))
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"The adapter_config.json in {str(name)!r} names no base model: set `base_model_name_or_path`."
        )
    index: Any = DiffusionPipeline.load_config(base)
    family = family_class(index["_class_name"])
    obstacle = lora_obstacle(config, family, layout)
    if obstacle is not None:
        raise ValueError(obstacle)
    weights = {
        key.removeprefix("base_model.model."): t.to(dtype or t.dtype)
        for key, t in load_peft_weights(str(name), device="cpu").items()
    }
    metadata = {"format": "pt", LAYOUT: layout, BASE_MODEL: base}
    if layout != "diffusers":
        tensors, about = _as_kohya_or_comfyui(weights, config, index, layout)
        _save(tensors, output_file, metadata | about)
        return
    pipeline_class = getattr(diffusers, index["_class_name"])
    with TemporaryDirectory() as folder:
        layers = {
            f"{family.denoiser_name}_lora_layers": weights,
            f"{family.denoiser_name}_lora_adapter_metadata": config.to_dict(),
        }
        pipeline_class.save_lora_weights(folder, weight_name="lora.safetensors", **layers)
        with safe_open(f"{folder}/lora.safetensors", "pt") as file:
            metadata |= file.metadata()
        _save(load_file(f"{folder}/lora.safetensors"), output_file, metadata)


def _comfyui_to_kohya(tensors: dict[str, torch.Tensor], unet) -> dict[str, torch.Tensor]:
    modules = {
        unet_name(name, unet.config): name
        for name, m in unet.named_modules()
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    }
    kinds = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "alpha": "alpha"}
    kohya = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"diffusion_model\.(.+)\.({'|'.join(map(re.escape, kinds))})", key)
        if match is None or match[1] not in modules:
            raise ValueError(f"Found {key!r} in a LoRA in ComfyUI's layout, which is no part of this UNet's LoRA.")
        kohya[f"lora_unet_{modules[match[1]].replace('.', '_')}.{kinds[match[2]]}"] = tensor
    return kohya


# ---- Merged weights -------------------------------------------------------------------------------------------------


def load_merged(name: Path_, **kwargs: Any) -> DiffusionPipeline:
    """
    As [`~hub.load_trained`], with an adapter merged into the weights.

    Args:
        name (`str` or `os.PathLike`): Hub id, folder or file.
        **kwargs: Passed on to [`families.load_pipeline`].
    """
    if not os.path.isfile(os.path.join(name, "adapter_config.json")):
        return load_trained(str(name), **kwargs)
    pipeline = load_pipeline(PeftConfig.from_pretrained(name).base_model_name_or_path, **kwargs)
    family = family_of(pipeline)
    merged = PeftModel.from_pretrained(family.denoiser, name).merge_and_unload()
    setattr(pipeline, family.denoiser_name, merged)
    return pipeline


def export_merged(name: Path_, output: Path_, *, single_file: bool = False, dtype: torch.dtype | None = None) -> None:
    """
    Writes the whole model with what was trained merged into its weights.

    Args:
        name (`str` or `os.PathLike`):
            Output folder of a training, of any adapter of PEFT that can be merged or of the whole model.
        output (`str` or `os.PathLike`):
            A new folder, which `DiffusionPipeline.from_pretrained` loads; with `single_file` a `.safetensors` file.
        single_file (`bool`, *optional*, defaults to `False`):
            Whether to write one file under the original names of Stable Diffusion 1.x and XL, which A1111, ComfyUI and
            diffusers' `from_single_file` read. It holds no scheduler and no tokenizer.
        dtype (`torch.dtype`, *optional*):
            Dtype of the weights, in which they are also merged. Defaults to float32.

    Raises:
        `ValueError`: if `output` exists, the adapter cannot be merged, or `single_file` is asked for another family.
    """
    if os.path.exists(output) and not (os.path.isdir(output) and not os.listdir(output) and not single_file):
        raise ValueError(f"Found {str(output)!r}: expected a name that is not there yet.")
    pipeline = load_merged(name, dtype=dtype)
    if single_file:
        adapter = os.path.isfile(os.path.join(name, "adapter_config.json"))
        base = PeftConfig.from_pretrained(name).base_model_name_or_path if adapter else str(name)
        _save(single_file_weights(pipeline), output, {"format": "pt", LAYOUT: "single_file", BASE_MODEL: base})
        return
    with written_whole(output) as staging:
        pipeline.save_pretrained(staging)


# ---- Back again -----------------------------------------------------------------------------------------------------


def load_exported(file: Path_, **kwargs: Any) -> DiffusionPipeline:
    """
    Loads a file that [`export_lora`] or [`export_merged`] wrote, with its base model.

    Args:
        file (`str` or `os.PathLike`): A `.safetensors` file.
        **kwargs: Passed on to [`families.load_pipeline`]; of merged weights only `dtype`.

    Raises:
        `ValueError`: if the file does not tell its layout and base model.
    """
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    layout, base = metadata.get(LAYOUT), metadata.get(BASE_MODEL)
    if layout is None or base is None:
        raise ValueError(
            f"The metadata of {str(file)!r} name no layout and no base model: expected a file that `trl-diffusion "
            "export` wrote; load others with diffusers."
        )
    if layout == "single_file":
        index: Any = DiffusionPipeline.load_config(base)
        dtype = kwargs.pop("dtype", None) or torch.float32
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        pipeline_class = getattr(diffusers, index["_class_name"])
        return pipeline_class.from_single_file(str(file), config=base, dtype=dtype, **kwargs)
    pipeline: Any = load_pipeline(base, **kwargs)
    if layout == "comfyui":
        pipeline.load_lora_weights(_comfyui_to_kohya(load_file(file), pipeline.unet))
    else:
        pipeline.load_lora_weights(str(Path(file).parent), weight_name=Path(file).name)
    return pipeline
