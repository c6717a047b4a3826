"""
What training a published model takes, without its weights: parameters, FLOPs and memory.

The denoisers are built from their published configurations as fake tensors, which have a shape and a dtype but no
memory. Activations are not typed in: they are the tensors that autograd saves in a forward of the true modules.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from typing import Any

import diffusers
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..families import family_class


Published = dict[str, Any]
"""A file of `models/`: classes and configurations as published, and the shapes of the denoiser's inputs."""

ADAMW_STATES = 2
"""Numbers that AdamW keeps for a parameter."""

SHARDED: dict[str, tuple[str, ...]] = {
    "none": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights", "reference"),
    "fsdp": ("optimizer", "gradients", "weights", "reference"),
}
"""The parts of [`Memory`] of which each device holds its share, by engine; it holds the others whole."""

LATENT_SCALE = 8
"""Pixels to a side of a latent pixel, in all of the published models."""


def published_models() -> dict[str, Published]:
    """The published models by their short names."""
    folder = files(__package__) / "models"
    found = {entry.name.removesuffix(".json"): json.loads(entry.read_text()) for entry in folder.iterdir()}
    return {name: found[name] for name in ("sd15", "sdxl", "sd35-medium", "flux-dev")}


def build(part: Published, device: str = "meta") -> torch.nn.Module:
    """A module from its class and configuration; on the meta device it has shapes without weights."""
    with torch.device(device):
        if hasattr(diffusers, part["class"]):
            return getattr(diffusers, part["class"])(**part["config"])
        model_class = getattr(transformers, part["class"])
        return model_class(model_class.config_class(**part["config"]))


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Uninitialised weights and buffers for `torch.func.functional_call`."""
    found = {name: torch.empty_like(b, device="cpu") for name, b in model.named_buffers()}
    for name, p in model.named_parameters():
        found[name] = torch.empty_like(p, device="cpu").requires_grad_(p.requires_grad)
    return found


def inputs_of(model: Published, batch_size: int) -> dict[str, Any]:
    """Inputs of the denoiser, uninitialised."""
    side = model["resolution"] // LATENT_SCALE
    # `tokens` are patches of 2 x 2 latent pixels.
    lengths = {"B": batch_size, "side": side, "tokens": (side // 2) ** 2}

    def tensor(shape):
        if isinstance(shape, dict):
            return {name: tensor(part) for name, part in shape.items()}
        return torch.empty([lengths.get(length, length) for length in shape])

    return {name: tensor(shape) for name, shape in model["inputs"].items()}


def at_resolution(model: Published, resolution: int) -> Published:
    """
    A published model for images of another size.

    Raises:
        `ValueError`: if it does not take that size.
    """
    if resolution < 64 or resolution % 16:
        raise ValueError(f"Found resolution={resolution}, expected a multiple of 16 from 64 on")
    return {**model, "resolution": resolution}


def num_bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class SavedTensors:
    """
    Counts what autograd keeps for the backward of one forward, each storage once, without the model's own weights.

    Args:
        own (iterable of tensors): The model's weights and buffers.

    The blocks that the model would checkpoint are counted by themselves, so that one forward tells the memory with and
    without checkpointing.
    """

    def __init__(self, own: Iterable[torch.Tensor]):
        self._own = {self._key(t) for t in own}
        self._alive: list[torch.Tensor] = []  # or another tensor could get the place of one that has gone
        self._outside: dict[int, int] = {}
        self._blocks: list[dict[int, int]] = []
        self._kept_of_blocks: dict[int, int] = {}

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _add(self, tensor: torch.Tensor, where: dict[int, int]) -> None:
        if self._key(tensor) not in self._own:
            self._alive.append(tensor)
            where[self._key(tensor)] = tensor.untyped_storage().nbytes()

    @contextmanager
    def _counted(self, where: dict[int, int]) -> Iterator[None]:
        def pack(tensor):
            self._add(tensor, where)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def _block(self, function, *args, **kwargs):
        """Stands in for `torch.utils.checkpoint.checkpoint`, which keeps a block's inputs and computes it twice."""
        for value in args:
            if isinstance(value, torch.Tensor):
                self._add(value, self._kept_of_blocks)
        self._blocks.append({})
        with self._counted(self._blocks[-1]):
            return function(*args, **kwargs)

    def count(self, denoiser, forward) -> Any:
        """Runs `forward`, which calls the denoiser inside whatever wraps it, and counts."""
        denoiser.enable_gradient_checkpointing(self._block)
        with self._counted(self._outside):
            return forward()

    @property
    def bytes(self) -> int:
        """Without checkpointing."""
        everything = dict(self._outside)
        for block in self._blocks:
            everything |= block
        return sum(everything.values())

    @property
    def kept_bytes(self) -> int:
        """What is left of a forward with checkpointing."""
        return sum((self._outside | self._kept_of_blocks).values())

    @property
    def largest_block_bytes(self) -> int:
        """What the backward with checkpointing computes again, at most at a time."""
        kept = self._outside | self._kept_of_blocks
        return max(sum(size for key, size in block.items() if key not in kept) for block in self._blocks)


@dataclass(frozen=True)
class Mode:
    """
    One way to train.

    Args:
        lora_rank (`int`, *optional*): Rank of a LoRA on the family's attention projections. None: all weights.
        bf16 (`bool`, *optional*, defaults to `False`):
            Computes under bfloat16 autocast. Weights that are trained stay float32; the base of a LoRA, and the
            encoders beside it, are loaded in bfloat16.
        four_bit (`bool`, *optional*, defaults to `False`):
            The linear layers of a LoRA's base are kept in 4 bits, as `--load_in_4bit` has bitsandbytes do it.
        float32_base (`bool`, *optional*, defaults to `False`):
            With `bf16`, the base of a LoRA and the encoders are loaded in float32 nevertheless.
    """

    lora_rank: int | None = None
    bf16: bool = False
    four_bit: bool = False
    float32_base: bool = False

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Of a LoRA's base, and of the encoders."""
        half = self.bf16 and self.lora_rank is not None and not self.float32_base
        return torch.bfloat16 if half else torch.float32

    def __post_init__(self):
        if self.four_bit and self.lora_rank is None:
            raise ValueError("Found `four_bit` without `lora_rank`: weights of 4 bits cannot be trained; set a rank.")

    def __str__(self) -> str:
        kind = "full" if self.lora_rank is None else f"LoRA r={self.lora_rank}"
        return f"{kind}, {'bf16' if self.bf16 else 'fp32'}{', 4 bit' if self.four_bit else ''}" + (
            " on fp32" if self.float32_base else ""
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of one mode; [`total`] adds up what a run needs."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    encoders: int
    activations: int
    checkpointed: int

    def per_device(self, engine: str, num_processes: int) -> "Memory":
        """
        What each of several devices holds: its share of what the engine shards, rounded up, and all of the rest.

        Args:
            engine (`str`): One of [`SHARDED`].
            num_processes (`int`): Devices; each one computes its own micro-batch.
        """
        return replace(self, **{part: -(-getattr(self, part) // num_processes) for part in SHARDED[engine]})

    def total(self, *, checkpointing: bool, reference: bool, cached_features: bool) -> int:
        """
        Bytes of a run.

        Args:
            checkpointing (`bool`): Gradient checkpointing.
            reference (`bool`): A reference copy; there is none with LoRA, in supervised fine-tuning, or where the
                reference's errors were computed before.
            cached_features (`bool`): VAE and text encoders have left memory.
        """
        kept = self.weights + self.gradients + self.optimizer
        kept += (self.reference if reference else 0) + (0 if cached_features else self.encoders)
        return kept + (self.checkpointed if checkpointing else self.activations)


@dataclass(frozen=True)
class Estimate:
    """Of one published model, for micro-batches of `batch_size` images (a pair has two)."""

    name: str
    resolution: int
    batch_size: int
    parameters: int
    encoder_parameters: int
    flops: int
    """Of the denoiser's forward on one image; a multiplication and its addition are two."""
    memory: dict[Mode, Memory]
    """On each device."""
    engine: str = "none"
    num_processes: int = 1


def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


# What attention of fake tensors on a CPU runs as; the counter knows the GPU's kernels only.
ATTENTION_FLOPS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


FOUR_BIT_GROUP = 64
"""Numbers that share a scale, a float32, in 4 bits of bitsandbytes."""


def four_bit_bytes(weight: torch.Tensor) -> int:
    """Bytes of a weight and its scales in 4 bits."""
    return -(-weight.numel() // 2) + torch.float32.itemsize * -(-weight.numel() // FOUR_BIT_GROUP)


def _four_bit_forward(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    # As bitsandbytes' layer: it computes in its own dtype, also under autocast, and answers in that of the input.
    with torch.autocast("cpu", enabled=False):
        return torch.nn.functional.linear(x.to(linear.weight.dtype), linear.weight, linear.bias).to(x.dtype)


def training_memory(
    model: Published,
    mode: Mode,
    batch_size: int,
    encoder_parameters: int,
    tensors_are: AbstractContextManager | None = None,
) -> Memory:
    """
    The memory of training a model in one mode.

    Args:
        model (`dict`): One of [`published_models`].
        mode ([`Mode`]): How it is trained.
        batch_size (`int`): Images of a micro-batch.
        encoder_parameters (`int`): Those of VAE and text encoders.
        tensors_are (context manager, *optional*):
            What the forward runs in. Defaults to a `FakeTensorMode`; with a `nullcontext` the tensors are real.
    """
    denoiser: Any = build(model["denoiser"])
    policy: Any = denoiser
    saved_by_packing = 0
    if mode.lora_rank is not None:
        denoiser = denoiser.requires_grad_(False).to(mode.frozen_dtype)
        if mode.four_bit:
            for module in denoiser.modules():
                if isinstance(module, torch.nn.Linear):
                    saved_by_packing += num_bytes([module.weight]) - four_bit_bytes(module.weight)
                    module.forward = partial(_four_bit_forward, module)  # type: ignore[method-assign]
        targets = set(family_class(model["pipeline_class"]).lora_targets)
        with torch.device("meta"):
            policy = get_peft_model(denoiser, LoraConfig(r=mode.lora_rank, target_modules=targets))
    policy.train()
    with tensors_are or FakeTensorMode(allow_non_fake_inputs=True):
        tensors, inputs = tensors_of(policy), inputs_of(model, batch_size)
        saved = SavedTensors(tensors.values())
        with torch.autocast("cpu", torch.bfloat16, enabled=mode.bf16):
            answer = saved.count(denoiser, lambda: functional_call(policy, tensors, (), inputs))
    trained = [p for p in policy.parameters() if p.requires_grad]
    # What autocast has made of the weights stays until the end of the forward, also of checkpointed blocks.
    casts = sum(p.numel() for p in trained) * torch.bfloat16.itemsize if mode.bf16 else 0
    del answer
    return Memory(
        weights=num_bytes(policy.parameters()) + num_bytes(policy.buffers()) - saved_by_packing,
        gradients=num_bytes(trained),
        optimizer=ADAMW_STATES * num_bytes(trained),
        reference=num_bytes(policy.parameters()) if mode.lora_rank is None else 0,
        encoders=encoder_parameters * mode.frozen_dtype.itemsize,
        activations=saved.bytes,
        checkpointed=saved.kept_bytes + max(saved.largest_block_bytes, casts),
    )


def estimate(
    model: Published,
    batch_size: int = 1,
    lora_rank: int = 16,
    modes: list[Mode] | None = None,
    engine: str = "none",
    num_processes: int = 1,
) -> Estimate:
    """
    What training a published model takes.

    Args:
        model (`dict`): One of [`published_models`].
        batch_size (`int`, *optional*, defaults to `1`): Images of a micro-batch; a pair has two.
        lora_rank (`int`, *optional*, defaults to `16`): Rank of the LoRA.
        modes (`list[Mode]`, *optional*): Defaults to full and LoRA, each in fp32 and bf16, and LoRA in bf16 on 4 bits.
        engine (`str`, *optional*, defaults to `"none"`): One of [`SHARDED`].
        num_processes (`int`, *optional*, defaults to `1`): Devices that the engine shards over.
    """
    if modes is None:
        modes = [Mode(rank, bf16) for rank in (None, lora_rank) for bf16 in (False, True)]
        modes.append(Mode(lora_rank, bf16=True, four_bit=True))
    denoiser = build(model["denoiser"])
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), counter:
        functional_call(denoiser, tensors_of(denoiser), (), inputs_of(model, 1))
    encoder_parameters = sum(p.numel() for part in model["frozen"] for p in build(part).parameters())
    return Estimate(
        name=model["name"],
        resolution=model["resolution"],
        batch_size=batch_size,
        parameters=sum(p.numel() for p in denoiser.parameters()),
        encoder_parameters=encoder_parameters,
        flops=counter.get_total_flops(),
        memory={
            mode: training_memory(model, mode, batch_size, encoder_parameters).per_device(engine, num_processes)
            for mode in modes
        },
        engine=engine,
        num_processes=num_processes,
    )


PARTS = ("weights", "gradients", "optimizer", "reference", "encoders", "activations", "checkpointed")
COLUMNS = ("mode", *PARTS, "all of it", "least")


def as_markdown(found: Estimate) -> str:
    """A paragraph and a table, in GiB."""

    def row(mode: Mode, memory: Memory) -> str:
        most = memory.total(checkpointing=False, reference=True, cached_features=False)
        least = memory.total(checkpointing=True, reference=False, cached_features=True)
        parts = [getattr(memory, name) for name in PARTS]
        return f"| {mode} | " + " | ".join(f"{size / 2**30:.1f}" for size in (*parts, most, least)) + " |"

    devices = f" on each of {found.num_processes} GPUs ({found.engine})" if found.num_processes > 1 else ""
    lines = [
        f"**{found.name}**, {found.resolution} pixels, {found.batch_size} image(s) in a micro-batch{devices}: "
        f"{found.parameters / 1e9:.2f} B parameters ({found.parameters:,}), {found.flops / 1e12:.2f} TFLOP per image "
        f"and forward, {found.encoder_parameters / 1e9:.2f} B parameters in VAE and text encoders.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *[row(mode, memory) for mode, memory in found.memory.items()],
    ]
    return "\n".join(lines)
