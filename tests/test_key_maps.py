"""ComfyUI and kohya's scripts compute from an exported file the update that was trained."""

import functools
import math

import pytest
import torch
from diffusers.loaders import single_file_utils
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests import key_maps, tiny
from trl_diffusion.export import export_lora, single_file_weights
from trl_diffusion.families import family_class
from trl_diffusion.hub import load_trained, save_policy


# The patterns are not made for one family.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")

UNETS = {"sd": tiny.tiny_stable_diffusion, "sdxl": tiny.tiny_stable_diffusion_xl}
TRANSFORMERS = {
    "flux": tiny.tiny_flux,
    "flux2": tiny.tiny_flux2,
    "flux2 klein": tiny.tiny_flux2_klein,
    "sd3": tiny.tiny_stable_diffusion_3,
    "qwen-image": tiny.tiny_qwen_image,
    "z-image": tiny.tiny_z_image,
}
OPTIONS = {
    "alpha = rank": {"r": 3, "lora_alpha": 3},
    "alpha > rank": {"r": 2, "lora_alpha": 7},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 7,
        "rank_pattern": {"to_k": 3, r".*blocks\.0\.ff.*": 4},
        "alpha_pattern": {"to_v": 1, "to_k": 5, "linear_1": 2},
    },
    "rslora and patterns": {
        "r": 2,
        "lora_alpha": 7,
        "use_rslora": True,
        "rank_pattern": {"to_k": 3},
        "alpha_pattern": {"to_v": 1},
    },
}


def layers(denoiser) -> dict[str, torch.nn.Module]:
    kinds = torch.nn.Linear | torch.nn.Conv2d
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, kinds)}


@functools.cache
def pipeline_of(family: str):
    return (UNETS | TRANSFORMERS)[family]()


def train(family: str, options: dict, folder, modules=None) -> dict[str, torch.Tensor]:
    """The output folder of an adapter with random weights on these modules, or all, and the updates it holds."""
    pipeline = (UNETS | TRANSFORMERS)[family]()
    cls = family_class(type(pipeline).__name__)
    denoiser = getattr(pipeline, cls.denoiser_name)
    base, out = folder / "base", folder / "out"
    pipeline.save_config(base)
    denoiser.save_config(base / cls.denoiser_name)
    if modules is None:
        modules = [name for name in layers(denoiser) if comfyui_finds(family, name)]
    model = get_peft_model(denoiser, LoraConfig(target_modules=list(modules), **options))
    model.peft_config["default"].base_model_name_or_path = str(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    out.mkdir()
    save_policy(model, cls(pipeline), out)
    updates = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
            updates[name] = module.scaling["default"] * (b.flatten(1) @ a.flatten(1))
    assert len(updates) == len(modules)
    return updates


def comfyui_finds(family: str, module: str) -> bool:
    return family in UNETS or key_maps.target_of(module, key_maps.TRANSFORMERS[family], 2) is not None


def assert_updates(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert expected
    assert max(update.abs().max() for update in expected.values()) > 0.1
    for name, update in found.items():
        torch.testing.assert_close(update, expected.get(name, torch.zeros_like(update)), rtol=0, atol=1e-6)
    assert expected.keys() <= found.keys()


# ---- Transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_comfyui_computes_what_was_trained(tmp_path, family, options):
    """From the layout for it; and from that of diffusers where alpha is the rank, and nowhere else."""
    expected = train(family, OPTIONS[options], tmp_path)
    denoiser = pipeline_of(family).transformer
    shapes = {name: module.weight.shape for name, module in layers(denoiser).items()}
    table = key_maps.TRANSFORMERS[family]
    export_lora(tmp_path / "out", tmp_path / "comfyui.safetensors", layout="comfyui")
    tensors = load_file(tmp_path / "comfyui.safetensors")
    found, left_out = key_maps.comfyui_transformer(tensors, shapes, table)
    assert not left_out
    assert_updates(found, expected)

    export_lora(tmp_path / "out", tmp_path / "diffusers.safetensors", layout="diffusers")
    found, left_out = key_maps.comfyui_transformer(load_file(tmp_path / "diffusers.safetensors"), shapes, table)
    assert not left_out
    equal = all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-6) for name in expected)
    assert equal == (options == "alpha = rank")


@pytest.mark.parametrize("options", ["rslora", "patterns", "rslora and patterns"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_diffusers_reads_the_same_from_comfyuis_file(tmp_path, family, options):
    expected = train(family, OPTIONS[options], tmp_path)
    export_lora(tmp_path / "out", tmp_path / "comfyui.safetensors", layout="comfyui")
    pipeline = TRANSFORMERS[family]()
    pipeline.load_lora_weights(tmp_path, weight_name="comfyui.safetensors")
    found = {
        name: module.get_delta_weight("default_0").double().flatten(1)
        for name, module in pipeline.transformer.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found.keys() == expected.keys()
    assert_updates(found, expected)


def test_comfyuis_file_is_read_with_its_base(tmp_path):
    expected = train("flux", OPTIONS["patterns"], tmp_path)
    tiny.tiny_flux().save_pretrained(tmp_path / "base")
    export_lora(tmp_path / "out", tmp_path / "comfyui.safetensors", layout="comfyui")
    for name in ("comfyui.safetensors", "out"):
        loaded = {
            n: m for n, m in load_trained(str(tmp_path / name)).transformer.named_modules() if hasattr(m, "lora_A")
        }
        assert_updates({n: m.get_delta_weight("default_0").double() for n, m in loaded.items()}, expected)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_what_comfyui_does_not_find_is_refused(tmp_path, family):
    """Every layer of the transformer is in ComfyUI's map and in the file, or its adapter is refused by name."""
    unknown = [name for name in layers(pipeline_of(family).transformer) if not comfyui_finds(family, name)]
    assert bool(unknown) == family.startswith("flux2")
    for i, module in enumerate(unknown):
        folder = tmp_path / str(i)
        folder.mkdir()
        train(family, {"r": 2}, folder, ["transformer_blocks.0.attn.to_q", module])
        with pytest.raises(
            ValueError, match=rf"Found a LoRA on '{module}' of a Flux2.*: choose 'diffusers', or merge"
        ):
            export_lora(folder / "out", folder / "lora.safetensors", layout="comfyui")
        export_lora(folder / "out", folder / "lora.safetensors", layout="diffusers")


class WithTheRest(dict):
    """A state dict that has whatever else a converter asks for."""

    def pop(self, key, *default):
        return super().pop(key, torch.zeros(6, 1))


@pytest.mark.parametrize(
    ("family", "convert"),
    [
        ("flux", single_file_utils.convert_flux_transformer_checkpoint_to_diffusers),
        ("flux2", single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers),
        ("sd3", single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers),
        ("z-image", single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers),
    ],
)
def test_the_rows_are_those_that_diffusers_converts(family, convert):
    """ComfyUI has the original weights: diffusers' own converter of them puts each row where the table says."""
    width = 3072  # of FLUX.1, which the converter knows by heart
    names = layers(pipeline_of(family).transformer)
    table = key_maps.TRANSFORMERS[family]
    shapes = {
        name: torch.Size(
            [
                width
                * (
                    4
                    if key_maps.target_of(name, table, 2)[1] == 3
                    else 2
                    if "swap" in key_maps.target_of(name, table, 2)
                    else 1
                ),
                1,
            ]
        )
        for name in names
        if comfyui_finds(family, name)
    }
    place = key_maps.Place(shapes, table)
    weights = {name: torch.arange(float(rows)).reshape(rows, 1) for name, rows in place.rows.items()}
    suffixes = [".weight"] if family in ("flux2", "z-image") else [".weight", ".bias"]
    converted = convert(WithTheRest({name + suffix: w.clone() for name, w in weights.items() for suffix in suffixes}))
    for module in shapes:
        expected = place.swapped(module, place.narrow(weights, module))
        assert torch.equal(converted[f"{module}.weight"], expected), module


# ---- UNets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
@pytest.mark.parametrize("family", UNETS)
@pytest.mark.filterwarnings("ignore:kohya's scripts have no LoRA")
def test_unets(tmp_path, family, layout, options):
    expected = train(family, OPTIONS[options], tmp_path)
    export_lora(tmp_path / "out", tmp_path / "lora.safetensors", layout=layout)
    tensors, used = load_file(tmp_path / "lora.safetensors"), set()
    # The original names, as diffusers converts them: each weight holds the number of its module.
    pipeline = pipeline_of(family)
    weights = {
        name: w for name, w in single_file_weights(pipeline).items() if name.startswith("model.diffusion_model.")
    }
    marked = {name: torch.full((1,), float(i)) for i, name in enumerate(weights)}
    converted = single_file_utils.convert_ldm_unet_checkpoint(dict(marked), dict(pipeline.unet.config))
    numbers = {int(value): name for name, value in converted.items()}
    originals = {
        numbers[i].removesuffix(".weight"): name.removeprefix("model.diffusion_model.").removesuffix(".weight")
        for i, name in enumerate(weights)
        if name.endswith(".weight")
    }
    scripts = "sd-scripts, XL" if family == "sdxl" else "sd-scripts, 1.x and 2.x"
    known_to_scripts = {
        f"{name}.{child}"
        for name, module in pipeline.unet.named_modules()
        if type(module).__name__ in key_maps.SD_SCRIPTS_MODULES
        for child in layers(module)
    }
    assert 0 < len(known_to_scripts) < len(expected)
    found = {}
    for module, original in originals.items():
        keys = key_maps.unet_keys(original, module)
        matching = [
            key for key in keys["comfyui"] if any(f"{key}.{up}" in tensors for up, _ in key_maps.COMFYUI_MATRICES)
        ]
        assert len(matching) == (module in expected)
        if matching:
            found[module] = key_maps.update(tensors, matching[0], used)
            if layout == "kohya" and module in known_to_scripts:
                assert matching == keys[scripts]
    assert tensors.keys() == used
    assert_updates(found, expected)


def test_what_kohyas_scripts_leave_out_is_said(tmp_path):
    train(
        "sdxl",
        {"r": 2},
        tmp_path,
        ["time_embedding.linear_1", "add_embedding.linear_2", "conv_in", "mid_block.resnets.0.conv1"],
    )
    with pytest.warns(
        UserWarning, match=r"no LoRA on \['add_embedding.linear_2', 'conv_in', 'time_embedding.linear_1'\]"
    ):
        export_lora(tmp_path / "out", tmp_path / "lora.safetensors", layout="kohya")


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("family", UNETS)
def test_what_a_single_file_says_of_the_noise(family, prediction, zero_snr):
    """ComfyUI takes an XL for one that predicts epsilon unless it finds `v_pred`, and looks for `ztsnr` beside it."""
    pipeline = UNETS[family](prediction_type=prediction)
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, rescale_betas_zero_snr=zero_snr
    )
    assert math.isclose(float(pipeline.scheduler.alphas_cumprod[-1]), 0.0, abs_tol=1e-6) == zero_snr
    says = {
        ("epsilon", False): set(),
        ("v_prediction", False): {"v_pred"},
        ("v_prediction", True): {"v_pred", "ztsnr"},
    }
    expected = says.get((prediction, zero_snr)) if family == "sdxl" or prediction == "epsilon" else None
    if expected is None:
        with pytest.raises(ValueError, match=rf"prediction_type='{prediction}'.*a single file cannot say.*folder"):
            single_file_weights(pipeline)
    else:
        assert single_file_weights(pipeline).keys() & {"v_pred", "ztsnr"} == expected
