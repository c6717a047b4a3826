"""What `trl-diffusion export` writes is read back by diffusers as the model that was trained."""

import copy
import functools
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from tests.tiny import tiny_stable_diffusion, tiny_stable_diffusion_xl, tiny_text_encoder, tiny_tokenizer
from trl_diffusion.cli import main
from trl_diffusion.export import export_lora, export_merged, lora_obstacle, single_file_weights, unet_name
from trl_diffusion.families import family_class
from trl_diffusion.hub import load_trained, save_policy


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ADAPTERS = {
    # In each the alpha that other programs have to know is another than the rank.
    "lora": LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS),
    "patterns": LoraConfig(
        r=2, lora_alpha=8, target_modules=TARGETS, rank_pattern={"to_q": 3}, alpha_pattern={"attn2.to_v": 1}
    ),
    "rslora": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_rslora=True),
    "convolutions": LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=["to_q", "conv1", "conv2", "conv_in", "conv_out", "time_emb_proj", "conv_shortcut", "proj_in"],
    ),
    "dora": LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, use_dora=True),
    "modules to save": LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, modules_to_save=["conv_out"]),
    "loha": LoHaConfig(r=2, alpha=8, target_modules=TARGETS),
    "lora's bias": LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, lora_bias=True),
    "biases": LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, bias="all"),
    "some layers": LoraConfig(
        r=2, lora_alpha=8, target_modules=TARGETS, layers_to_transform=[0], layers_pattern="attentions"
    ),
    "everything": LoraConfig(r=2, lora_alpha=8, target_modules=r".*(to_.|conv.?|linear_.|conv_in|conv_out|emb_proj)"),
}
PLAIN = ["lora", "patterns", "rslora", "convolutions", "some layers"]


BASES = {
    "sd": tiny_stable_diffusion,
    "sdxl": tiny_stable_diffusion_xl,
    "sdxl without size": lambda: without_sizes(tiny_stable_diffusion_xl()),
}


def without_sizes(pipeline):
    """Its UNet receives neither sizes nor the pooled embedding: it has no `add_embedding`."""
    config = {name: value for name, value in pipeline.unet.config.items() if not name.startswith("_")}
    for name in ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        config[name] = None
    pipeline.register_modules(unet=type(pipeline.unet)(**config))
    return pipeline


# Of merged or much larger updates.
TOLERANCE = {"everything": 1e-5}


def lora_modules(pipeline) -> set[str]:
    return {name for name, module in pipeline.unet.named_modules() if hasattr(module, "lora_A")}


def answer(pipeline) -> torch.Tensor:
    """The denoiser's output, unrounded and unclipped."""
    generator = torch.Generator().manual_seed(0)
    config = pipeline.unet.config
    side, width = config.sample_size, config.cross_attention_dim
    x, text = torch.randn(2, 4, side, side, generator=generator), torch.randn(2, 3, width, generator=generator)
    added = {}
    if config.addition_embed_type == "text_time":
        pooled = pipeline.text_encoder_2.config.projection_dim
        added = {"text_embeds": torch.randn(2, pooled, generator=generator), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        return pipeline.unet(x, torch.tensor([10, 700]), text, added_cond_kwargs=added, return_dict=False)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Output folders of adapters whose weights are all random, and their bases."""

    @functools.cache
    def base(family: str) -> str:
        folder = str(tmp_path_factory.mktemp("bases") / family)
        BASES[family]().save_pretrained(folder)
        return folder

    @functools.cache
    def trained(adapter: str, family: str = "sd") -> tuple[str, str]:
        pipeline = DiffusionPipeline.from_pretrained(base(family))
        config = copy.deepcopy(ADAPTERS[adapter])
        model = get_peft_model(pipeline.unet, config)
        config.base_model_name_or_path = base(family)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("out")
        save_policy(model, SimpleNamespace(pipeline=pipeline, denoiser_name="unet", loads_lora=True), folder)
        return str(folder), base(family)

    return trained


def metadata(file) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


# ---- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "comfyui"])
@pytest.mark.parametrize(
    ("adapter", "family"),
    [
        *((adapter, "sd") for adapter in PLAIN),
        *((adapter, "sdxl") for adapter in ("lora", "patterns", "everything")),
        ("everything", "sdxl without size"),
    ],
)
@pytest.mark.filterwarnings("ignore:kohya's scripts have no LoRA")
def test_lora_comes_back(trained, tmp_path, adapter, family, layout):
    folder, _ = trained(adapter, family)
    export_lora(folder, tmp_path / "lora.safetensors", layout=layout)
    expected = load_trained(folder)
    loaded = load_trained(str(tmp_path / "lora.safetensors"))
    assert lora_modules(loaded) == lora_modules(expected)
    assert (adapter, family) != ("everything", "sdxl") or "add_embedding.linear_1" in lora_modules(loaded)
    torch.testing.assert_close(answer(loaded), answer(expected), rtol=0, atol=TOLERANCE.get(adapter, 1e-6))
    loaded.unload_lora_weights()  # what is left is the base
    assert (answer(loaded) - answer(expected)).abs().max() > 0.01


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_diffusers_reads_it_without_us(trained, tmp_path, layout):
    folder, base = trained("patterns")
    export_lora(folder, tmp_path / "lora.safetensors", layout=layout)
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    torch.testing.assert_close(answer(pipeline), answer(load_trained(folder)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("adapter", ["dora", "lora's bias"])
def test_more_than_lora_in_the_layout_of_diffusers(trained, tmp_path, adapter):
    folder, _ = trained(adapter)
    export_lora(folder, tmp_path / "lora.safetensors", layout="diffusers")
    loaded = load_trained(str(tmp_path / "lora.safetensors"))
    torch.testing.assert_close(answer(loaded), answer(load_trained(folder)), rtol=0, atol=1e-6)


def test_keys_and_metadata_of_kohya(trained, tmp_path):
    folder, base = trained("lora")
    export_lora(folder, tmp_path / "lora.safetensors", layout="kohya")
    tensors = load_file(tmp_path / "lora.safetensors")
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {f"{module}.{kind}" for kind in ("lora_down.weight", "lora_up.weight", "alpha")} <= tensors.keys()
    assert len(tensors) == 3 * 2 * 4 * len([k for k in tensors if k.endswith("attn1_to_q.alpha")])
    assert tensors[f"{module}.lora_down.weight"].shape[0] == 2
    assert {t.item() for k, t in tensors.items() if k.endswith(".alpha")} == {8.0}
    found = metadata(tmp_path / "lora.safetensors")
    assert (found["ss_network_dim"], found["ss_network_alpha"], found["ss_sd_model_name"]) == ("2", "8", base)


def test_alphas_of_patterns_and_rslora(trained, tmp_path):
    """One alpha for all modules, since diffusers does not read more; what a module's own differs is in its weights."""
    export_lora(trained("patterns")[0], tmp_path / "patterns.safetensors")
    tensors = load_file(tmp_path / "patterns.safetensors")
    assert {t.item() for k, t in tensors.items() if k.endswith(".alpha")} == {8.0}
    own = load_file(Path(trained("patterns")[0]) / "adapter_model.safetensors")
    for name, scale in (("attn2.to_v", 1 / 8), ("attn1.to_v", 1)):
        module = f"down_blocks.0.attentions.0.transformer_blocks.0.{name}"
        found = tensors[f"lora_unet_{module.replace('.', '_')}.lora_up.weight"]
        assert torch.equal(found, own[f"base_model.model.{module}.lora_B.weight"] * scale)
    assert metadata(tmp_path / "patterns.safetensors")["ss_network_dim"] == "Dynamic"
    export_lora(trained("rslora")[0], tmp_path / "rslora.safetensors")
    alphas = {t.item() for k, t in load_file(tmp_path / "rslora.safetensors").items() if k.endswith(".alpha")}
    assert alphas == {16.0}  # 8 / sqrt(4) = 16 / 4
    assert metadata(tmp_path / "rslora.safetensors")["ss_network_alpha"] == "16"


def test_keys_of_comfyui_and_of_kohya_for_xl(trained, tmp_path):
    export_lora(trained("lora")[0], tmp_path / "comfyui.safetensors", layout="comfyui")
    tensors = load_file(tmp_path / "comfyui.safetensors")
    module = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    assert {f"{module}.{kind}" for kind in ("lora_A.weight", "lora_B.weight", "alpha")} <= tensors.keys()
    export_lora(trained("lora", "sdxl")[0], tmp_path / "xl.safetensors", layout="kohya")
    keys = load_file(tmp_path / "xl.safetensors").keys()
    assert all(key.startswith(("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_")) for key in keys)


def test_dtype(trained, tmp_path):
    export_lora(trained("lora")[0], tmp_path / "lora.safetensors", dtype=torch.float16)
    weights = {k: t for k, t in load_file(tmp_path / "lora.safetensors").items() if k.endswith(".weight")}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("adapter", "layout", "message"),
    [
        ("dora", "kohya", "'kohya' cannot hold all of this DoRA"),
        ("dora", "comfyui", "'comfyui' cannot hold all of this DoRA"),
        ("loha", "kohya", "cannot hold all of this LOHA adapter.*merge it"),
        ("modules to save", "diffusers", r"cannot hold all of this LORA adapter \(found modules_to_save="),
        ("biases", "diffusers", r"cannot hold all of this LORA adapter \(found bias='all'\).*merge it"),
        ("lora's bias", "kohya", r"'kohya' cannot hold all of this LORA adapter \(found lora_bias=True\).*merge it"),
        ("lora's bias", "comfyui", r"'comfyui' cannot hold .* \(found lora_bias=True\).*merge it"),
        ("lora", "a1111", r"Found layout='a1111', expected one of \['diffusers', 'kohya', 'comfyui'\]"),
    ],
)
def test_what_a_layout_cannot_hold(trained, tmp_path, adapter, layout, message):
    with pytest.raises(ValueError, match=message):
        export_lora(trained(adapter)[0], tmp_path / "lora.safetensors", layout=layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layout", "pipeline", "modules", "message"),
    [
        ("kohya", "StableDiffusionXLPipeline", ["to_q"], None),
        ("comfyui", "StableDiffusionXLPipeline", ["to_q"], None),
        (
            "kohya",
            "FluxPipeline",
            ["to_q"],
            r"'kohya' is for UNets, found a FluxPipeline.*choose 'comfyui' or 'diffus",
        ),
        ("comfyui", "FluxPipeline", ["x_embedder"], None),
        ("comfyui", "Flux2Pipeline", ["x_embedder"], None),
        (
            "comfyui",
            "Flux2Pipeline",
            ["single_stream_modulation.linear"],
            r"Found a LoRA on 'single_stream_mod.*'diff",
        ),
        ("comfyui", "SanaPipeline", ["to_q"], r"LoRA of a SanaPipeline, expected .* ComfyUI.*choose 'diffusers'"),
        ("diffusers", "SanaPipeline", ["to_q"], None),
        ("comfyui", "PixArtSigmaPipeline", ["to_q"], r"PixArtSigmaPipeline, for which diffusers has no LoRA files"),
    ],
)
def test_layouts_of_families(layout, pipeline, modules, message):
    """The card asks the same before it offers a file."""
    found = lora_obstacle(LoraConfig(), family_class(pipeline), layout, modules)
    assert (found is None) == (message is None)
    assert message is None or re.search(message, found)


def test_no_adapter(trained, tmp_path):
    with pytest.raises(ValueError, match=r"Found no adapter_config.json in .*output folder of a LoRA training"):
        export_lora(trained("lora")[1], tmp_path / "lora.safetensors")


def test_names_of_files(trained, tmp_path):
    with pytest.raises(ValueError, match=r"Found the file name 'lora.ckpt', expected .* '.safetensors'"):
        export_lora(trained("lora")[0], tmp_path / "lora.ckpt")
    (tmp_path / "lora.safetensors").write_text("")
    with pytest.raises(ValueError, match="expected none; choose another name"):
        export_lora(trained("lora")[0], tmp_path / "lora.safetensors")


def test_a_file_of_others_is_not_guessed_at(tmp_path):
    save_file({"lora_unet_x.alpha": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="name no layout and no base model"):
        load_trained(str(tmp_path / "lora.safetensors"))


# ---- Merged weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "lora's bias"])
def test_merged_folder(trained, tmp_path, adapter):
    folder, _ = trained(adapter)
    export_merged(folder, tmp_path / "merged")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name in loaded.unet.state_dict())
    torch.testing.assert_close(answer(loaded), answer(load_trained(folder)), rtol=0, atol=5e-4)


def test_what_cannot_be_merged(trained, tmp_path):
    """A bias of the adapter, where the layer has none."""
    with pytest.raises(ValueError, match=r"The LORA adapter in .* cannot be merged into its base.*diffusers'"):
        export_merged(trained("lora's bias")[0], tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_merged_single_file(trained, tmp_path):
    folder, base = trained("lora")
    export_merged(folder, tmp_path / "merged.safetensors", single_file=True)
    expected = load_trained(folder)
    loaded = load_trained(str(tmp_path / "merged.safetensors"))
    torch.testing.assert_close(answer(loaded), answer(expected), rtol=0, atol=5e-4)
    for part in ("vae", "text_encoder"):
        original, found = getattr(expected, part).state_dict(), getattr(loaded, part).state_dict()
        assert original.keys() == found.keys()
        assert all(torch.equal(found[name], original[name]) for name in original)
    keys = load_file(tmp_path / "merged.safetensors").keys()
    assert "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight" in keys
    assert "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight" in keys
    # A full model goes the same way.
    export_merged(base, tmp_path / "base.safetensors", single_file=True)
    base_pipeline = DiffusionPipeline.from_pretrained(base)
    assert torch.equal(answer(load_trained(str(tmp_path / "base.safetensors"))), answer(base_pipeline))


def test_single_file_of_xl(tmp_path):
    pipeline = tiny_stable_diffusion_xl()
    # As in the real one, the text encoders differ in width: by that diffusers tells them apart in the file.
    pipeline.text_encoder_2 = tiny_text_encoder(tiny_tokenizer(), 24, model_class=CLIPTextModelWithProjection)
    pipeline.save_pretrained(tmp_path / "base")
    export_merged(tmp_path / "base", tmp_path / "xl.safetensors", single_file=True)
    loaded = load_trained(str(tmp_path / "xl.safetensors"))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        original, found = getattr(pipeline, part).state_dict(), getattr(loaded, part).state_dict()
        assert original.keys() == found.keys()
        assert all(torch.equal(found[name], original[name]) for name in original)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_single_file_of_a_v_prediction_xl_comes_back(tmp_path, zero_snr):
    pipeline = tiny_stable_diffusion_xl(prediction_type="v_prediction")
    pipeline.text_encoder_2 = tiny_text_encoder(tiny_tokenizer(), 24, model_class=CLIPTextModelWithProjection)
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, rescale_betas_zero_snr=zero_snr
    )
    pipeline.save_pretrained(tmp_path / "base")
    export_merged(tmp_path / "base", tmp_path / "xl.safetensors", single_file=True)
    assert load_file(tmp_path / "xl.safetensors").keys() & {"v_pred", "ztsnr"} == {"v_pred", *["ztsnr"] * zero_snr}
    loaded = load_trained(str(tmp_path / "xl.safetensors"))
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    original = pipeline.unet.state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in loaded.unet.state_dict().items())


def test_the_noise_is_checked_before_weights_are_loaded(tmp_path):
    pipeline = tiny_stable_diffusion("v_prediction")
    pipeline.save_config(tmp_path)
    pipeline.scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"prediction_type='v_prediction', beta_schedule=.* a single file cannot say"):
        export_merged(tmp_path, tmp_path / "sd.safetensors", single_file=True)


def test_single_file_of_another_vae():
    pipeline = tiny_stable_diffusion()
    pipeline.vae.register_to_config(scaling_factor=0.5)
    with pytest.raises(ValueError, match=r"scaling_factor=0.5.* a single file cannot say: expected .* 0.18215"):
        single_file_weights(pipeline)


@pytest.mark.parametrize("family", BASES)
def test_diffusers_own_converters_undo_the_names(family):
    pipeline = BASES[family]()
    weights = single_file_weights(pipeline)
    unet = convert_ldm_unet_checkpoint(dict(weights), dict(pipeline.unet.config))
    vae = convert_ldm_vae_checkpoint(dict(weights), dict(pipeline.vae.config))
    for found, module in ((unet, pipeline.unet), (vae, pipeline.vae)):
        original = module.state_dict()
        assert found.keys() == original.keys()
        assert all(torch.equal(found[name], original[name]) for name in original)


def test_unet_names_are_those_of_the_original():
    """Some of Stable Diffusion 1.5's, known from its file."""
    config = {
        "layers_per_block": 2,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    }
    known = {
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "down_blocks.3.resnets.1.conv2.bias": "input_blocks.11.0.out_layers.3.bias",
        "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
        "mid_block.resnets.1.norm1.weight": "middle_block.2.in_layers.0.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.resnets.2.time_emb_proj.weight": "output_blocks.11.0.emb_layers.1.weight",
        "conv_norm_out.weight": "out.0.weight",
    }
    assert {name: unet_name(name, config) for name in known} == known
    with pytest.raises(ValueError, match=r"'encoder_hid_proj.weight' has no name in the original"):
        unet_name("encoder_hid_proj.weight", config)


def test_single_file_of_another_family(trained, tmp_path):
    pipeline = tiny_stable_diffusion()
    pipeline.text_encoder.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match=r"activation 'gelu', as in Stable Diffusion 2.x"):
        single_file_weights(pipeline)
    other = diffusers.DDPMPipeline(unet=pipeline.unet, scheduler=pipeline.scheduler)
    with pytest.raises(ValueError, match="Found a DDPMPipeline, expected one of"):
        single_file_weights(other)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2"])
def test_single_file_of_a_part(part):
    pipeline = tiny_stable_diffusion_xl()
    pipeline.register_modules(**{part: None})
    with pytest.raises(
        ValueError, match=f"Found a StableDiffusionXLPipeline without {part}, which a single file holds"
    ):
        single_file_weights(pipeline)


def test_no_weights_are_loaded_of_another_family(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "_diffusers_version": "0.42.1"}')
    with pytest.raises(ValueError, match="Found a FluxPipeline, expected one of"):
        export_merged(tmp_path, tmp_path / "flux.safetensors", single_file=True)


# ---- What only training needs ---------------------------------------------------------------------------------------


def test_a_vae_that_overflows_in_training_is_no_obstacle(trained, tmp_path):
    """SDXL's VAE must not be trained with in float16, but the pipeline samples with it."""
    folder, base = trained("lora", "sdxl")
    export_merged(folder, tmp_path / "merged", dtype=torch.float16)
    export_merged(folder, tmp_path / "merged.safetensors", single_file=True, dtype=torch.float16)
    for name in (folder, base, str(tmp_path / "merged")):
        loaded = load_trained(name, dtype="float16")
        assert {loaded.vae.dtype, loaded.unet.dtype} == {torch.float16}
    options = [
        "--prompts",
        "a cat",
        "--num_images_per_prompt",
        "1",
        "--num_inference_steps",
        "1",
        "--dtype",
        "float16",
    ]
    main(["generate", "--model_name_or_path", folder, "--output_dir", str(tmp_path / "images"), *options])
    assert (tmp_path / "images" / "grid.png").is_file()


# ---- Commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["kohya", "merged", "single_file"])
def test_export_and_generate(trained, tmp_path, capsys, layout):
    folder, _ = trained("lora")
    output = tmp_path / ("model" if layout == "merged" else "model.safetensors")
    main(["export", "--model_name_or_path", folder, "--layout", layout, "--output", str(output)])
    assert f"{output} written." in capsys.readouterr().out
    options = ["--prompts", "a cat", "--num_images_per_prompt", "1", "--num_inference_steps", "2"]
    pictures = {}
    for name, model in (("trained", folder), ("exported", str(output))):
        main(["generate", "--model_name_or_path", model, "--output_dir", str(tmp_path / name), *options])
        pictures[name] = np.asarray(diffusers.utils.load_image(str(tmp_path / name / "0000-0.png")), np.int16)
    assert np.abs(pictures["trained"] - pictures["exported"]).max() <= 1
    assert pictures["trained"].std() > 1
