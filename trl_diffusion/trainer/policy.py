"""The denoiser before the training: what of it is trained, and how it is run."""

import copy
import functools
import operator
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from peft import PeftConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

from ..families import Family
from ..hub import stored_name
from .base_config import DiffusionConfig


def choose_kernels(denoiser: ModelMixin, args: DiffusionConfig) -> None:
    """
    Applies `attention_backend` and `channels_last`.

    Raises:
        `ValueError`: where they would do nothing, or diffusers knows no such backend.
    """
    name = type(denoiser).__name__
    if args.attention_backend is not None:
        denoiser.set_attention_backend(args.attention_backend)
        processors = [getattr(module, "processor", None) for module in denoiser.modules()]
        if not any(getattr(processor, "_attention_backend", None) for processor in processors):
            raise ValueError(
                f"`attention_backend={args.attention_backend!r}` has no effect on a {name}, whose attention does "
                "not go through diffusers' dispatcher: drop it."
            )
    if args.channels_last:
        # A patch embedding is a convolution too, but has no neighbours to look at.
        convolutions = [module for module in denoiser.modules() if isinstance(module, torch.nn.Conv2d)]
        if all(module.kernel_size == module.stride for module in convolutions):
            raise ValueError(f"`channels_last=True` is for the convolutions of a UNet, found a {name}: drop it.")
        denoiser.to(memory_format=torch.channels_last)


def compile_blocks(denoiser: ModelMixin, args: DiffusionConfig, sharded: bool) -> None:
    """
    Applies `compile_repeated_blocks`; `sharded` says whether the engine has cut the parameters up.

    Raises:
        `ValueError`: where diffusers names no blocks, or with cut parameters, with which it has not been tried.
    """
    if not denoiser._repeated_blocks:
        raise ValueError(
            f"`compile_repeated_blocks={args.compile_repeated_blocks!r}` finds no blocks in a "
            f"{type(denoiser).__name__}, for which diffusers names none: use `torch_compile=True`."
        )
    if sharded:
        raise ValueError(
            "`compile_repeated_blocks` has not been tried on parameters that ZeRO-3 or FSDP2 has cut up: drop it."
        )
    denoiser.compile_repeated_blocks(backend=args.compile_repeated_blocks)


def make_policy(family: Family, peft_config: PeftConfig | None, args: DiffusionConfig, base_model_id: str):
    """
    What is trained: the family's denoiser, or an adapter on it.

    Raises:
        `TypeError`, `ValueError`: where it cannot be trained, or not with this adapter.
    """
    denoiser = family.denoiser
    if getattr(denoiser, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The pipeline's denoiser already carries LoRA weights: merge them first with "
            "`pipeline.fuse_lora(); pipeline.unload_lora_weights()`."
        )
    if peft_config is None:
        if family.is_quantized:
            raise ValueError(
                f"Found a quantized {family.denoiser_class} without `peft_config`: quantized weights cannot "
                "be trained; pass a `LoraConfig` to train an adapter on them, or load it without quantization."
            )
        if denoiser.dtype != torch.float32:
            raise ValueError(
                f"Found {denoiser.dtype} weights for full fine-tuning, in which small updates vanish: load them "
                "in float32 and set `bf16=True` or `fp16=True` to compute in half precision."
            )
        return denoiser.requires_grad_(True)
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"`peft_config` must be a `peft.PeftConfig`, found {type(peft_config).__name__}.")
    kwargs = args.activation_checkpointing_kwargs or {}
    if args.activation_checkpointing and kwargs.get("use_reentrant"):
        raise ValueError(
            "Reentrant checkpointing loses the gradient of an adapter: drop `use_reentrant=True` from "
            "`activation_checkpointing_kwargs`."
        )
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"Found a `peft_config` of type {peft_config.peft_type.value}, which is for language models, with a "
            f"{family.denoiser_class}: use LoRA or another adapter of weights."
        )
    # With these, the denoiser without its adapter would no longer be the model that the training started from.
    start, bias = getattr(peft_config, "init_lora_weights", True), getattr(peft_config, "bias", "none")
    if not (start is True or start is False or start == "gaussian"):
        raise ValueError(
            f"`init_lora_weights={start!r}` changes the base weights, which are the reference: use True or 'gaussian'."
        )
    if bias != "none":
        raise ValueError(f"`bias={bias!r}` trains the base's biases, which belong to the reference: use 'none'.")
    peft_config = copy.copy(peft_config)
    if getattr(peft_config, "target_modules", ...) is None:
        peft_config.target_modules = set(family.lora_targets)
    denoiser.requires_grad_(False)
    try:
        policy = get_peft_model(denoiser, peft_config)
    except ValueError as error:
        names = sorted({name.split(".")[-1] for name, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ValueError(
            f"`peft_config` does not fit the {family.denoiser_class}: {error} Its linear modules end in "
            f"{names}; {family.lora_targets} are a good choice."
        ) from error
    # PEFT would record the denoiser's sub-folder; the pipeline is what a user loads the adapter into.
    policy.peft_config["default"].base_model_name_or_path = stored_name(base_model_id)
    return policy


def allow_checkpointing(denoiser: ModelMixin) -> None:
    """Gives a diffusers model the method by which `Trainer` switches gradient checkpointing on."""

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs=None, every_n_layers: int = 1, offload: bool = False
    ):
        if every_n_layers != 1 or offload:
            raise ValueError("`every_n_layers` and `offload` are not available for diffusion models: drop them.")
        kwargs = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        self.enable_gradient_checkpointing(functools.partial(checkpoint, **kwargs))

    denoiser.activation_checkpointing_enable = types.MethodType(activation_checkpointing_enable, denoiser)


@contextmanager
def modules_known(policy: torch.nn.Module) -> Iterator[None]:
    """
    Within, `train()` and `parameters()` of the policy go through a list of its modules.

    `Trainer` and accelerate call them several times a step, and torch looks for all modules in each call: with an
    adapter on a small model that took an eighth of the step. Modules must not be added within; parameters may be
    replaced, as FSDP2 does, and what holds them, as ZeRO-3 does.
    """
    modules = tuple(policy.modules())
    with_parameters = [module for module in modules if module._parameters]
    mode_of = operator.attrgetter("training")

    # `self` is another than `policy` in a deep copy, which does as it always would.
    def train(self, mode: bool = True):
        if self is not policy or {mode} != set(map(mode_of, modules)):
            type(self).train(self, mode)
        return self

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        if self is not policy or not recurse:
            return type(self).parameters(self, recurse)
        # One that modules share comes once.
        found = {id(p): p for module in with_parameters for p in module._parameters.values() if p is not None}
        return iter(found.values())

    methods = {"train": types.MethodType(train, policy), "parameters": types.MethodType(parameters, policy)}
    vars(policy).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(policy)[name]
