"""
What other programs compute from a LoRA file: facts about their key maps and scales, written down from their sources.

Read on 26 November 2026, in a stored copy of the public repositories:

- ComfyUI (Comfy-Org/ComfyUI): `comfy/lora.py` at 17358c8f (which keys are looked for), `comfy/utils.py` at 09708eae
  (names of diffusers to its own, and to which rows of a fused weight), `comfy/weight_adapter/lora.py` at 6f98b150 (the
  update), `comfy/supported_models.py` at 01f03bbd (`v_pred`, `ztsnr`; there is no Sana), and, in
  comfyanonymous/ComfyUI, `comfy/ldm/qwen_image/model.py` at 01f4512b, whose modules are named as in diffusers.
- kohya's scripts (kohya-ss/sd-scripts): `networks/lora.py` at 02298e3c.
"""

import re

import torch


# ---- ComfyUI: transformers ------------------------------------------------------------------------------------------

# A LoRA key is `transformer.` and the module's name in diffusers. Given are ComfyUI's module, and where it holds
# several modules of diffusers in one weight, where in its rows this one starts, in multiples of the width; "swap":
# ComfyUI has shift and scale the other way round and swaps the halves of the update's rows.
Target = str | tuple[str, int | str]


def _qkv(names: tuple[str, str, str], fused: str) -> dict[str, Target]:
    return {name: (fused, i) for i, name in enumerate(names)}


_QKV, _ADD_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")

FLUX: dict[str, Target] = {
    **{
        f"transformer_blocks.N.attn.{k}": v
        for k, v in (
            _qkv(_QKV, "double_blocks.N.img_attn.qkv") | _qkv(_ADD_QKV, "double_blocks.N.txt_attn.qkv")
        ).items()
    },
    "transformer_blocks.N.attn.to_out.0": "double_blocks.N.img_attn.proj",
    "transformer_blocks.N.attn.to_add_out": "double_blocks.N.txt_attn.proj",
    "transformer_blocks.N.norm1.linear": "double_blocks.N.img_mod.lin",
    "transformer_blocks.N.norm1_context.linear": "double_blocks.N.txt_mod.lin",
    "transformer_blocks.N.ff.net.0.proj": "double_blocks.N.img_mlp.0",
    "transformer_blocks.N.ff.net.2": "double_blocks.N.img_mlp.2",
    "transformer_blocks.N.ff_context.net.0.proj": "double_blocks.N.txt_mlp.0",
    "transformer_blocks.N.ff_context.net.2": "double_blocks.N.txt_mlp.2",
    **{f"single_transformer_blocks.N.attn.{k}": v for k, v in _qkv(_QKV, "single_blocks.N.linear1").items()},
    "single_transformer_blocks.N.proj_mlp": ("single_blocks.N.linear1", 3),
    "single_transformer_blocks.N.proj_out": "single_blocks.N.linear2",
    "single_transformer_blocks.N.norm.linear": "single_blocks.N.modulation.lin",
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": ("final_layer.adaLN_modulation.1", "swap"),
    "proj_out": "final_layer.linear",
}

# One map serves both in ComfyUI. It lacks FLUX.2's modulations and its `time_guidance_embed`.
FLUX_2: dict[str, Target] = {
    **{k: v for k, v in FLUX.items() if k.startswith("transformer_blocks.N.attn.")},
    "transformer_blocks.N.ff.linear_in": "double_blocks.N.img_mlp.0",
    "transformer_blocks.N.ff.linear_out": "double_blocks.N.img_mlp.2",
    "transformer_blocks.N.ff_context.linear_in": "double_blocks.N.txt_mlp.0",
    "transformer_blocks.N.ff_context.linear_out": "double_blocks.N.txt_mlp.2",
    "single_transformer_blocks.N.attn.to_qkv_mlp_proj": "single_blocks.N.linear1",
    "single_transformer_blocks.N.attn.to_out": "single_blocks.N.linear2",
    **{k: FLUX[k] for k in ("x_embedder", "context_embedder", "norm_out.linear", "proj_out")},
}

SD3: dict[str, Target] = {
    **{f"transformer_blocks.N.attn.{k}": v for k, v in _qkv(_QKV, "joint_blocks.N.x_block.attn.qkv").items()},
    **{
        f"transformer_blocks.N.attn.{k}": v for k, v in _qkv(_ADD_QKV, "joint_blocks.N.context_block.attn.qkv").items()
    },
    **{f"transformer_blocks.N.attn2.{k}": v for k, v in _qkv(_QKV, "joint_blocks.N.x_block.attn2.qkv").items()},
    "transformer_blocks.N.attn.to_out.0": "joint_blocks.N.x_block.attn.proj",
    "transformer_blocks.N.attn2.to_out.0": "joint_blocks.N.x_block.attn2.proj",
    "transformer_blocks.N.attn.to_add_out": "joint_blocks.N.context_block.attn.proj",
    "transformer_blocks.N.norm1.linear": "joint_blocks.N.x_block.adaLN_modulation.1",
    "transformer_blocks.N.norm1_context.linear": "joint_blocks.N.context_block.adaLN_modulation.1",
    "transformer_blocks.LAST.norm1_context.linear": ("joint_blocks.LAST.context_block.adaLN_modulation.1", "swap"),
    "transformer_blocks.N.ff.net.0.proj": "joint_blocks.N.x_block.mlp.fc1",
    "transformer_blocks.N.ff.net.2": "joint_blocks.N.x_block.mlp.fc2",
    "transformer_blocks.N.ff_context.net.0.proj": "joint_blocks.N.context_block.mlp.fc1",
    "transformer_blocks.N.ff_context.net.2": "joint_blocks.N.context_block.mlp.fc2",
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": ("final_layer.adaLN_modulation.1", "swap"),
    "proj_out": "final_layer.linear",
}

_Z_IMAGE_BLOCK: dict[str, Target] = {
    **{f"attention.{k}": v for k, v in _qkv(_QKV, "attention.qkv").items()},
    "attention.to_out.0": "attention.out",
    **{name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")},
}
Z_IMAGE: dict[str, Target] = {
    **{
        f"{blocks}.N.{k}": f"{blocks}.N.{v}" if isinstance(v, str) else (f"{blocks}.N.{v[0]}", v[1])
        for blocks in ("layers", "context_refiner", "noise_refiner")
        for k, v in _Z_IMAGE_BLOCK.items()
    },
    **{name: name for name in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")},
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
}

_QWEN_BLOCK = [
    *(f"attn.{name}" for name in (*_QKV, *_ADD_QKV, "to_out.0", "to_add_out")),
    *(f"{part}.{name}" for part in ("img_mlp", "txt_mlp") for name in ("net.0.proj", "net.2")),
    *("img_mod.1", "txt_mod.1"),
]
QWEN_IMAGE: dict[str, Target] = {
    **{name: name for name in (f"transformer_blocks.N.{part}" for part in _QWEN_BLOCK)},
    **{name: name for name in ("img_in", "txt_in", "norm_out.linear", "proj_out")},
    **{name: name for name in (f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2))},
}

TRANSFORMERS = {
    "flux": FLUX,
    "flux2": FLUX_2,
    "flux2 klein": FLUX_2,
    "sd3": SD3,
    "qwen-image": QWEN_IMAGE,
    "z-image": Z_IMAGE,
}


def target_of(module: str, table: dict[str, Target], num_layers: int) -> tuple[str, int | str] | None:
    """ComfyUI's module for one of diffusers, and where in it; None if it has no name for it."""
    match = re.match(r"([a-z_]+)\.(\d+)\.(.+)", module)
    if match is None:
        target = table.get(module)
    else:
        last = table.get(f"{match[1]}.LAST.{match[3]}") if int(match[2]) == num_layers - 1 else None
        target = last or table.get(f"{match[1]}.N.{match[3]}")
    if target is None:
        return None
    name, where = (target, 0) if isinstance(target, str) else target
    return (re.sub(r"\.(N|LAST)\.", f".{match[2]}.", name) if match else name), where


# ---- The update -----------------------------------------------------------------------------------------------------

# The names of the two matrices, as ComfyUI looks for them: up, down.
COMFYUI_MATRICES = [("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")]


def update(tensors: dict[str, torch.Tensor], key: str, used: set[str]) -> torch.Tensor | None:
    """
    What ComfyUI adds to the weight of a module, as a matrix of its rows; None if the file has nothing for it.

    The scale is alpha / rank, the rank being the first dimension of the matrix that is applied first; without an alpha
    it is 1. kohya's scripts compute the same from `lora_up`, `lora_down` and alpha.
    """
    for up, down in COMFYUI_MATRICES:
        if f"{key}.{up}" not in tensors:
            continue
        a, b = tensors[f"{key}.{down}"].double(), tensors[f"{key}.{up}"].double()
        used |= {f"{key}.{up}", f"{key}.{down}"}
        scale = 1.0
        if f"{key}.alpha" in tensors:
            used.add(f"{key}.alpha")
            scale = tensors[f"{key}.alpha"].item() / a.shape[0]
        return scale * (b.flatten(1) @ a.flatten(1))
    return None


class Place:
    """Where ComfyUI has the weights of a transformer's modules, by their names in diffusers."""

    def __init__(self, shapes: dict[str, torch.Size], table: dict[str, Target]):
        blocks = [int(m[1]) for m in (re.match(r"transformer_blocks\.(\d+)", name) for name in shapes) if m]
        found = {module: target_of(module, table, max(blocks, default=0) + 1) for module in shapes}
        self.of = {module: target for module, target in found.items() if target is not None}
        self.shapes = shapes
        # The width is what the fused projections have, all of one size; the last may be wider.
        width = {name: shapes[module][0] for module, (name, where) in self.of.items() if where in (0, "swap")}
        self.start = {m: where * width[name] if isinstance(where, int) else 0 for m, (name, where) in self.of.items()}
        self.rows = {
            name: max(self.start[m] + shapes[m][0] for m, (other, _) in self.of.items() if other == name)
            for name in width
        }

    def narrow(self, weights: dict[str, torch.Tensor], module: str) -> torch.Tensor:
        """The rows of ComfyUI's weights that are this module's, as a view."""
        return weights[self.of[module][0]].narrow(0, self.start[module], self.shapes[module][0])

    def swapped(self, module: str, tensor: torch.Tensor) -> torch.Tensor:
        """The halves of the rows swapped where ComfyUI does so; twice is nothing."""
        return torch.cat(tensor.chunk(2)[::-1]) if self.of[module][1] == "swap" else tensor


def comfyui_transformer(
    tensors: dict[str, torch.Tensor], shapes: dict[str, torch.Size], table: dict[str, Target]
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """
    The updates that ComfyUI computes, by the names of diffusers, and the keys of the file that it leaves out.

    Args:
        tensors: The file.
        shapes: Shapes of the weights of all modules of the transformer, by their names in diffusers.
        table: One of [`TRANSFORMERS`].
    """
    place, used = Place(shapes, table), set()
    columns = {name: shapes[module][1:].numel() for module, (name, _) in place.of.items()}
    weights = {name: torch.zeros(rows, columns[name], dtype=torch.float64) for name, rows in place.rows.items()}
    for module in place.of:
        delta = update(tensors, f"transformer.{module}", used)
        if delta is not None:
            place.narrow(weights, module).add_(place.swapped(module, delta))
    return {m: place.swapped(m, place.narrow(weights, m)) for m in place.of}, tensors.keys() - used


# ---- UNets ----------------------------------------------------------------------------------------------------------

# kohya's scripts put LoRA on the linear layers and convolutions within these modules of the UNet, and on nothing else.
SD_SCRIPTS_MODULES = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")


def unet_keys(original: str, diffusers: str) -> dict[str, list[str]]:
    """
    Keys by which the programs look for a UNet's module, of which given are the original name and that in diffusers.

    kohya's scripts run Stable Diffusion 1.x and 2.x under the names of diffusers, and XL under the original ones.
    """
    kohya = {name: f"lora_unet_{name.replace('.', '_')}" for name in (original, diffusers)}
    return {
        "comfyui": [f"diffusion_model.{original}", kohya[original], kohya[diffusers]],
        "sd-scripts, 1.x and 2.x": [kohya[diffusers]],
        "sd-scripts, XL": [kohya[original]],
    }
