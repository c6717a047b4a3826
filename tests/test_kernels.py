"""Options for speed: the same losses, and no option that is accepted and does nothing."""

import copy

import pytest
import torch

from tests import tiny
from tests.test_methods import BOTH, losses, trained, trainer_of
from trl_diffusion.trainer.policy import modules_known


@pytest.mark.slow
@BOTH
def test_compiled_blocks_train_alike(tmp_path, peft_config):
    options = {"peft_config": peft_config, "max_steps": 3}
    eager = trained("dpo", tmp_path / "eager", **options)
    compiled = trained("dpo", tmp_path / "compiled", compile_repeated_blocks="aot_eager", **options)
    assert losses(compiled)[0] == losses(eager)[0]
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-4)
    models = [compiled.family.denoiser] + ([] if peft_config else [compiled.reference.model])
    for model in models:
        blocks = [m for m in model.modules() if type(m).__name__ == "BasicTransformerBlock"]
        assert blocks
        assert all(block._compiled_call_impl is not None for block in blocks)


def test_compiled_blocks_are_saved_under_their_own_names(tmp_path):
    trainer = trained("sft", tmp_path, compile_repeated_blocks="eager", max_steps=1)
    trainer.save_model()
    loaded = type(trainer.pipeline).from_pretrained(tmp_path)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(loaded.unet.get_parameter(name), parameter)


@BOTH
def test_channels_last_trains_alike(tmp_path, peft_config):
    options = {"peft_config": peft_config, "max_steps": 3}
    first = trained("dpo", tmp_path / "first", **options)
    last = trained("dpo", tmp_path / "last", channels_last=True, **options)
    assert losses(last)[0] == losses(first)[0]
    assert losses(last) == pytest.approx(losses(first), abs=1e-3)
    models = [last.family.denoiser] + ([] if peft_config else [last.reference.model])
    for model in models:
        assert model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_attention_backend(tmp_path):
    """The plain formula instead of the fused one, in policy and reference."""
    options = {"resolution": 16, "max_steps": 2}
    default = trained("dpo", tmp_path / "default", pipeline=tiny.tiny_flux(), **options)
    plain = trained("dpo", tmp_path / "plain", pipeline=tiny.tiny_flux(), attention_backend="_native_math", **options)
    assert losses(plain)[0] == losses(default)[0]
    assert losses(plain) == pytest.approx(losses(default), abs=1e-4)
    for model in (plain.family.denoiser, plain.reference.model):
        assert {block.attn.processor._attention_backend for block in model.transformer_blocks} == {"_native_math"}


def test_fused_adamw_is_the_default(tmp_path):
    trainer = trained("kto", tmp_path, max_steps=1)
    assert trainer.optimizer.optimizer.defaults["fused"]


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (tiny.tiny_stable_diffusion, {"attention_backend": "native"}, r"has no effect on a UNet2DConditionModel"),
        (tiny.tiny_flux, {"attention_backend": "fast"}, r"`backend=.fast.` must be one of the following"),
        (tiny.tiny_flux, {"channels_last": True}, r"convolutions of a UNet, found a FluxTransformer2DModel: drop it"),
        (tiny.tiny_stable_diffusion_3, {"compile_repeated_blocks": "eager"}, r"finds no blocks in a SD3Transformer2D"),
        (tiny.tiny_stable_diffusion, {"compile_repeated_blocks": "inductor"}, r"wrong gradients of UNets on a CPU"),
        (
            tiny.tiny_stable_diffusion,
            {"compile_repeated_blocks": "eager", "torch_compile": True},
            r"Found `torch_compile=True`, which compiles all of the denoiser, .*: set one of them\.",
        ),
    ],
)
def test_refused(tmp_path, build, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of("dpo", tmp_path, pipeline=build(), resolution=16, **options)


class Policy(torch.nn.Module):
    """With a parameter of its own, one that two modules share, one that is missing, and a module without any."""

    def __init__(self):
        super().__init__()
        self.own = torch.nn.Parameter(torch.ones(1))
        self.blocks = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(), torch.nn.Linear(2, 2, bias=False))
        self.blocks[2].weight = self.blocks[0].weight


def same_objects(first, second) -> bool:
    return [id(one) for one in first] == [id(one) for one in second]


def test_known_modules_answer_as_a_search_would():
    policy = Policy()
    with modules_known(policy):
        assert same_objects(policy.parameters(), torch.nn.Module.parameters(policy))
        assert same_objects(policy.parameters(recurse=False), [policy.own])
        policy.blocks[0].bias = torch.nn.Parameter(torch.zeros(2))  # as an engine does, which cuts it up
        policy.blocks[2]._parameters = dict(policy.blocks[2]._parameters)
        policy.blocks[2].weight = torch.nn.Parameter(torch.ones(2, 2))
        assert len(list(policy.parameters())) == 4
        assert same_objects(policy.parameters(), torch.nn.Module.parameters(policy))
        policy.blocks[1].eval()  # somebody else's doing, in the midst of a training
        assert policy.train() is policy
        assert all(module.training for module in policy.modules())
        assert not any(module.training for module in policy.eval().modules())
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        policy.zero_grad()
        assert [parameter.grad for parameter in policy.parameters()] == 4 * [None]
    assert not {"train", "parameters"} & set(vars(policy))


def test_a_copy_made_in_training_is_on_its_own():
    policy = Policy()
    with modules_known(policy):
        other = copy.deepcopy(policy)
    other.blocks.append(torch.nn.Linear(2, 1))
    assert same_objects(other.parameters(), torch.nn.Module.parameters(other))
    assert not any(module.training for module in other.eval().modules())
    assert all(module.training for module in policy.modules())


@BOTH
def test_modules_are_forgotten_after_the_training(tmp_path, peft_config):
    trainer = trained("dpo", tmp_path, peft_config=peft_config, max_steps=1)
    assert not {"train", "parameters"} & set(vars(trainer.model))
