"""A quantised base under an adapter. bitsandbytes needs a GPU to quantise: torchao's integers stand for all here."""

import math

import numpy as np
import pytest
import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

from tests import tiny
from tests.methods import METHODS
from tests.test_families import LORA, logged, overfit, trainer_of
from trl_diffusion.cli.arguments import ModelArguments
from trl_diffusion.data.features import modules_fingerprint
from trl_diffusion.families import family_of, load_pipeline, pipeline_quantization
from trl_diffusion.hub import load_trained


torchao = pytest.importorskip("torchao.quantization")
TorchAOBaseTensor = pytest.importorskip("torchao.utils").TorchAOBaseTensor

# Smallest linear layers of the tiny models are narrower than a group of 128.
INT8 = torchao.Int8WeightOnlyConfig()
BUILD = {
    "sd": tiny.tiny_stable_diffusion,
    "sdxl": tiny.tiny_stable_diffusion_xl,
    "sd3": tiny.tiny_stable_diffusion_3,
    "flux": tiny.tiny_flux,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, build in BUILD.items():
        build().save_pretrained(root / name)
    return {name: str(root / name) for name in BUILD}


def train(folder, model, method="dpo", peft_config=LORA, **options):
    options = {"resolution": 16, "max_steps": 2} | options
    return trainer_of(folder, model, method, peft_config, **options)


@pytest.mark.parametrize("name", BUILD)
def test_a_quantized_base(tmp_path, folders, name):
    """The start is exact, the loss falls, and the saved LoRA does the same on the same quantised base."""
    trainer = train(tmp_path / "run", folders[name], quantization_config=TorchAoConfig(INT8))
    assert trainer.family.is_quantized
    assert sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) > 0
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == np.float32(math.log(2))
    assert first["errors/chosen"] == first["ref_errors/chosen"]
    assert first["grad_norm"] > 0
    trainer.save_model()

    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        noised = trainer.corrupt(inputs)
        errors = trainer.errors(trainer.model.eval(), noised)
    loaded = load_trained(
        str(tmp_path / "run"), quantization_config=pipeline_quantization(folders[name], TorchAoConfig(INT8))
    )
    f = family_of(loaded)
    assert f.is_quantized
    f.denoiser.eval()
    trainer.family, policy = f, f.denoiser
    with torch.no_grad():
        torch.testing.assert_close(trainer.errors(policy, noised), errors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(tmp_path, folders, method):
    before, after = overfit(train(tmp_path, folders["sd3"], method, quantization_config=TorchAoConfig(INT8)))
    assert after < before


def test_its_errors_computed_beforehand(tmp_path, folders):
    """As a live reference finds them; weights that differ only in their integers have another name in the cache."""
    live, once = (
        train(
            tmp_path / str(ready),
            folders["sd"],
            precompute_ref_log_probs=ready,
            quantization_config=TorchAoConfig(INT8),
        )
        for ready in (False, True)
    )
    weight = next(p for p in live.family.denoiser.parameters() if isinstance(p, TorchAOBaseTensor))
    names = []
    for _ in range(2):
        names.append(modules_fingerprint({"": live.family.denoiser}))
        weight.qdata.neg_()
    names.append(modules_fingerprint({"": live.family.denoiser}))
    assert names[0] == names[2] != names[1]
    live.train()
    once.train()
    assert logged(once, "loss") == logged(live, "loss")


def test_a_model_that_was_quantized_before(tmp_path, folders):
    for model in (
        load_pipeline(folders["sd3"], quantization_config=pipeline_quantization(folders["sd3"], TorchAoConfig(INT8))),
        tiny.tiny_stable_diffusion_3(),
    ):
        if not family_of(model).is_quantized:  # in place, which leaves no trace in the configuration
            torchao.quantize_(model.transformer, INT8)
        assert family_of(model).is_quantized
        with pytest.raises(ValueError, match=r"Found a quantized SD3Transformer2DModel without `peft_config`"):
            train(tmp_path, model, peft_config=None)
        trainer = train(tmp_path, model)
        trainer.train()
        assert logged(trainer, "loss")[0] == np.float32(math.log(2))


def test_a_model_is_not_taken_for_quantized():
    for build in BUILD.values():
        assert not family_of(build()).is_quantized


def test_what_is_quantized(folders):
    config = TorchAoConfig(INT8)
    assert pipeline_quantization(folders["sd"], config).quant_mapping == {"unet": config}
    assert pipeline_quantization(folders["flux"], config).quant_mapping == {"transformer": config}
    given = PipelineQuantizationConfig(quant_mapping={"transformer": config, "text_encoder_3": config})
    assert pipeline_quantization(folders["sd3"], given) is given


def test_in_model_init_kwargs_too(tmp_path, folders):
    config = pipeline_quantization(folders["sd3"], TorchAoConfig(INT8))
    options = {"model_init_kwargs": {"quantization_config": config}}
    assert train(tmp_path, folders["sd3"], **options).family.is_quantized
    with pytest.raises(ValueError, match=r"Found a quantized SD3Transformer2DModel without `peft_config`"):
        train(tmp_path, folders["sd3"], peft_config=None, **options)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the refusal of a machine without an accelerator")
def test_bitsandbytes_on_a_cpu(tmp_path, folders):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(RuntimeError, match=r"No GPU found\. A GPU is needed for quantization"):
        train(tmp_path, folders["sd3"], quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_options_of_the_command_line():
    pytest.importorskip("bitsandbytes")
    assert ModelArguments("m").quantization_config() is None
    config = ModelArguments("m", load_in_4bit=True, dtype="bfloat16").quantization_config()
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert ModelArguments("m", load_in_8bit=True).quantization_config().load_in_8bit
    with pytest.raises(ValueError, match=r"`--load_in_4bit` and `--load_in_8bit`, expected one"):
        ModelArguments("m", load_in_4bit=True, load_in_8bit=True).quantization_config()
