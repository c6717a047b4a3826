"""What DDP, DeepSpeed and FSDP2 do differently: where the weights lie, and how to read and write them.

DDP and DeepSpeed ZeRO-1 and 2 keep whole weights on every rank. ZeRO-3 leaves an empty tensor in each parameter and
this rank's part beside it; FSDP2 makes parameters `DTensor`s. Nothing else in the library knows any of this.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import broadcast_object_list, gather_object, save_fsdp_optimizer, str_to_bool
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from diffusers import ModelMixin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config
from trl.models.utils import prepare_deepspeed


Engine = Literal["replicated", "deepspeed", "fsdp2"]

_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables in which launchers say how many processes they have started, torch's own first."""

OWN_SETTINGS = frozenset({"local_rank", "output_dir", "logging_dir", "run_name", "disable_tqdm", "log_level"})
"""Training arguments in which ranks may differ: each machine has its own paths, and what a rank prints is its own."""


def engine_of(accelerator: Accelerator) -> Engine:
    """Who holds the weights; "replicated" is one process or DDP."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "deepspeed"
    return "fsdp2" if accelerator.distributed_type == DistributedType.FSDP else "replicated"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the engine cuts the weights themselves in parts, of which each rank holds one."""
    engine = engine_of(accelerator)
    return engine == "fsdp2" or (engine == "deepspeed" and accelerator.state.deepspeed_plugin.zero_stage == 3)


# ---- Set-up ---------------------------------------------------------------------------------------------------------


def load_frozen_models_whole() -> None:
    """
    Takes back the global DeepSpeed configuration by which transformers' `from_pretrained` partitions what it loads.

    Under ZeRO-3 it would partition text encoders and scorers, which no DeepSpeed engine gathers again.
    """
    unset_hf_deepspeed_config()


def check_processes(args) -> None:
    """
    Raises `ValueError` where the processes or the engine that were asked for would not be those that train.

    accelerate says nothing then: it starts one process, trains in each one alone, or leaves the engine out.

    Args:
        args ([`DiffusionConfig`]): The trainer's configuration.
    """
    name = next((name for name in _WORLD_SIZES if os.environ.get(name)), None)
    started = 1 if name is None else int(os.environ[name])
    on_cpu = args.device.type == "cpu"
    if started != args.world_size:
        raise ValueError(
            f"Found {name}={started} and a training of {args.world_size} process(es), so that each would train alone: "
            + (
                "set `use_cpu=True` (`--use_cpu`) to train on the CPU."
                if on_cpu and not args.use_cpu
                else f"start with `torchrun`, `accelerate launch` or `trl-diffusion`, or unset {name}."
            )
        )
    # Only accelerate's launcher of one process sets the first two, and the third if it was asked for several.
    if name is None and {"ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys():
        raise ValueError(
            "Found `accelerate launch` for several processes, of which it starts one where there are not several "
            "devices: start the script with `torchrun --nproc_per_node N` and `use_cpu=True`, or set "
            "`--num_processes 1`."
        )
    if args.deepspeed_plugin is not None:
        if "LOCAL_RANK" not in os.environ:
            raise ValueError(
                "Found a DeepSpeed configuration in a process that no launcher has started, where DeepSpeed cannot "
                "run: start with `trl-diffusion`, `accelerate launch` or `torchrun`, also for one process."
            )
        if str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")):
            raise ValueError(
                "Found a DeepSpeed configuration under `accelerate launch --cpu`, which leaves DeepSpeed out: set "
                "`use_cpu=True` instead."
            )
        _check_deepspeed(args)
    if args.fsdp_plugin_args is not None or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        check_fsdp(args)


def _check_deepspeed(args) -> None:
    """Refuses before the model is loaded what transformers would refuse after it, or DeepSpeed would do otherwise."""
    if args.deepspeed:
        config = args.hf_deepspeed_config
    else:  # a configuration of accelerate's, which transformers would compare later
        config = HfTrainerDeepSpeedConfig(copy.deepcopy(args.deepspeed_plugin.hf_ds_config.config))
        config.trainer_config_process(args)
        load_frozen_models_whole()  # the global configuration, which it has set
    if config.mismatches:
        pairs = [entry.removeprefix("- ds ").replace(" vs hf ", " and ") for entry in config.mismatches]
        raise ValueError(
            f"Found {'; '.join(pairs)} in the DeepSpeed configuration and in that of the training: write 'auto' into "
            "the first, or the same value into both."
        )


def check_fsdp(args) -> None:
    """Refuses FSDP where accelerate shards nothing."""
    if args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # set by transformers; the next trainer may do without
        raise ValueError(
            f"Found FSDP with {args.world_size} process(es) on {args.device.type}, where accelerate shards nothing "
            "and says nothing: start it on more than one accelerator, or use `multi_gpu` (DDP)."
        )


def on_first_rank(function: Callable[[], Any]) -> Any:
    """What `function` returns on the first rank, the only one that runs it, or its error; on all ranks."""
    state = PartialState()
    result, error = None, None
    if state.is_main_process:
        try:
            result = function()
        except (ValueError, OSError) as found:
            error = found
    if state.num_processes > 1:
        result, error = broadcast_object_list([result, error])
    if error is not None:
        raise error
    return result


def check_ranks_agree(settings: dict[str, Any]) -> None:
    """
    Raises `ValueError` on all ranks where they differ in a setting, before one of them waits for the others for ever.

    Args:
        settings (`dict`): By name, what must be equal; values with a faithful `==`.
    """
    if PartialState().num_processes == 1:
        return
    found = gather_object([settings])
    for name in sorted(set().union(*found)):
        values = [part.get(name) for part in found]
        odd = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            raise ValueError(
                f"The ranks disagree on {name}: found {values[0]!r} on rank 0 and {values[odd]!r} on rank {odd}, "
                "expected the same on all: start every rank with the same command, on the same data."
            )


def width(denoiser: ModelMixin) -> int:
    """Width of the widest layer, which DeepSpeed's "auto" sizes are computed from."""
    config = denoiser.config
    if "block_out_channels" in config:
        return max(config["block_out_channels"])
    if "num_attention_heads" in config and "attention_head_dim" in config:
        return config["num_attention_heads"] * config["attention_head_dim"]
    if "dim" in config:
        return config["dim"]
    raise ValueError(
        f"Found no width in the configuration of a {type(denoiser).__name__}: replace 'auto' by numbers in "
        "`zero_optimization` of the DeepSpeed configuration."
    )


def set_up(accelerator: Accelerator, denoiser: ModelMixin, args) -> None:
    """
    Makes the engine's configuration fit a diffusion model; to be called before anything is given to the engine.

    Args:
        accelerator (`Accelerator`): The trainer's.
        denoiser (`ModelMixin`): What is trained, or what an adapter of it is.
        args ([`DiffusionConfig`]): The trainer's configuration.

    Raises:
        `ValueError`: for options with which training or saving would not be exact.
    """
    if is_sharded(accelerator) and args.save_on_each_node:
        raise ValueError(
            "Found `save_on_each_node=True` with sharded weights, which rank 0 alone gathers: set it to False and "
            "write to a folder that all nodes share."
        )
    engine = engine_of(accelerator)
    if engine == "deepspeed":
        _set_up_deepspeed(accelerator.state.deepspeed_plugin, denoiser, args)
    elif engine == "fsdp2":
        _set_up_fsdp(accelerator.state.fsdp_plugin, denoiser)


def _set_up_deepspeed(plugin, denoiser: ModelMixin, args) -> None:
    load_frozen_models_whole()  # the accelerator has just set it again
    config, zero = plugin.hf_ds_config.config, plugin.hf_ds_config.config["zero_optimization"]
    config.setdefault("gradient_clipping", args.max_grad_norm or 0.0)  # transformers fills in "auto" only
    if config.get("fp16", {}).get("enabled") is True:
        raise ValueError(
            "Found fp16 under DeepSpeed, which would turn the weights themselves into float16: set `bf16=True`, or "
            "use DDP or FSDP2."
        )
    writes_weights = [
        name for name, used in (("ema_decay", args.ema_decay), ("sync_ref_model", args.sync_ref_model)) if used
    ]
    if (zero.get("offload_param") or {}).get("device") == "nvme" and writes_weights:
        raise ValueError(
            f"Found `{writes_weights[0]}` with parameters offloaded to NVMe, where they cannot be averaged: offload "
            "them to the CPU, or leave the option out."
        )
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    if any(zero.get(name) == "auto" for name in sizes):
        side = width(denoiser)  # the values are those of transformers for a `hidden_size`
        for name, value in zip(sizes, (side * side, int(0.9 * side * side), 10 * side), strict=True):
            plugin.hf_ds_config.fill_only(f"zero_optimization.{name}", value)
    if config.get("bf16", {}).get("enabled") is True:
        # As under every other engine the weights stay float32 and are computed with under autocast; errors of policy
        # and reference are compared in the fourth digit, which bfloat16 weights do not have.
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


def _set_up_fsdp(plugin, denoiser: ModelMixin) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError("Found FSDP 1, expected FSDP 2: set `fsdp_version: 2`, or use `--accelerate_config fsdp2`.")
    if "FULL" not in str(plugin.state_dict_type):
        raise ValueError(
            f"Found {plugin.state_dict_type} for FSDP, which only as many ranks could resume from: set "
            "`fsdp_state_dict_type: FULL_STATE_DICT`."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "Found `fsdp_cpu_ram_efficient_loading: true`, for which diffusers cannot leave weights unloaded: set it "
            "to false."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "Found `fsdp_activation_checkpointing: true`, which renames the weights: set it to false and use "
            "`activation_checkpointing=True`."
        )
    if plugin.mixed_precision_policy is not None:
        # As under every other engine: gradients are added in float32, and timesteps are not rounded. See `autocast`.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
    if plugin.transformer_cls_names_to_wrap is None:
        # diffusers names the classes of all variants of an architecture; accelerate stumbles over one that is absent.
        present = {type(module).__name__ for module in denoiser.modules()}
        plugin.transformer_cls_names_to_wrap = [name for name in denoiser._no_split_modules or () if name in present]


def autocast(model: nn.Module, accelerator: Accelerator) -> contextlib.AbstractContextManager:
    """For the forward of a prepared model; of FSDP2's only, since other engines do it inside the model."""
    return accelerator.autocast() if isinstance(model, FSDPModule) else contextlib.nullcontext()


@contextlib.contextmanager
def autocast_alone(model: nn.Module, args) -> Iterator[None]:
    """Lets a model that no engine has compute in the precision in which an engine will have it compute."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    model.forward = torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16)(model.forward)
    try:
        yield
    finally:
        del model.forward  # the class has its own


def frozen_copy(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """
    A frozen copy of a model that no engine has yet, for [`prepare_frozen`].

    Where the engine will take its part of each weight, the copy has the same tensors until then: no rank ever holds
    all weights twice.
    """
    shared: dict[int, Any] = {}
    if is_sharded(accelerator):
        shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def prepare_frozen(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Puts a frozen model where the policy's engine has the policy: sharded alike, under the same autocast."""
    engine = engine_of(accelerator)
    if engine == "deepspeed":
        return prepare_deepspeed(model, accelerator)
    if engine == "fsdp2":
        # TRL's `prepare_fsdp` would gather the whole model at once; this cuts it into blocks, as the policy is.
        sharded = fsdp2_prepare_model(accelerator, model).eval()
        # The first and the last block would keep their parameters for a backward that does not come.
        sharded.set_reshard_after_forward(True)
        return sharded
    return accelerator.prepare_model(model, evaluation_mode=True)


# ---- Whole weights --------------------------------------------------------------------------------------------------


def _is_partitioned(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "ds_id")  # what ZeRO-3 marks its parameters with


def in_parts(model: nn.Module) -> bool:
    """Whether no rank holds a model's whole weights (any more), so that a forward needs all ranks."""
    return any(isinstance(p, DTensor) or _is_partitioned(p) for p in model.parameters())


def at_rest(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """
    The unwrapped model, after the engine has let go of what it keeps gathered between two forwards.

    ZeRO-3 keeps small parameters and those that it expects next, FSDP2 what the outermost block holds until a
    backward, which a frozen model never sees: none of it would follow when the ranks' parts are written.

    Args:
        model (`nn.Module`): As it is called in training.
        accelerator (`Accelerator`): The trainer's.
    """
    if any(_is_partitioned(p) for p in model.parameters()):
        model.optimizer.empty_partition_cache()  # type: ignore[union-attr,operator]  # a DeepSpeedEngine
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a model [`at_rest`], of which a rank may hold a part only."""
    return model.state_dict(keep_vars=True)


@torch.no_grad()
def whole(tensors: dict[str, torch.Tensor], keep: bool = True) -> dict[str, torch.Tensor]:
    """
    [`own_tensors`], or some of them, whole and in the host's memory, one gathered after the other.

    Each has a storage of its own: ZeRO-1 and 2 keep parameters side by side in one, which safetensors refuses.

    All ranks must call it; it is empty on those that do not `keep` them.
    """
    gathered = {}
    for name, tensor in tensors.items():
        if _is_partitioned(tensor):
            import deepspeed

            context: contextlib.AbstractContextManager = deepspeed.zero.GatheredParameters([tensor])
        else:
            context = contextlib.nullcontext()
        with context:
            full: Any = tensor
            if isinstance(tensor, DTensor):
                full = full.to(tensor.device_mesh.device_type).full_tensor()
            if keep:
                full = full.detach()
                borrowed = _is_partitioned(tensor) or full.untyped_storage().nbytes() > full.nbytes
                gathered[name] = full.to("cpu", copy=borrowed).contiguous()
    return gathered


def gathered(number: Any) -> Any:
    """A number that FSDP2 may have spread over the ranks, which must all call it."""
    return number.full_tensor() if isinstance(number, DTensor) else number


@torch.no_grad()
def write(tensors: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    """
    Copies whole `weights` into [`own_tensors`], each rank its part.

    Args:
        tensors (`dict`): A model's own tensors.
        weights (`dict`): By the same names, the same on all ranks.
    """
    for name, tensor in tensors.items():
        weight = weights[name]
        if weight.shape != getattr(tensor, "ds_shape", tensor.shape):
            raise ValueError(
                f"Found {name} of shape {tuple(weight.shape)}, expected "
                f"{tuple(getattr(tensor, 'ds_shape', tensor.shape))}: these weights are of another model."
            )
        if _is_partitioned(tensor):
            import deepspeed

            with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                tensor.copy_(weight)
        elif isinstance(tensor, DTensor):
            part = distribute_tensor(weight, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.to_local().copy_(part.to_local())
        else:
            tensor.copy_(weight)


def local_parts(model: nn.Module, trained: bool = False) -> list[torch.Tensor]:
    """
    What this rank holds of each parameter of a model [`at_rest`], to be read and written in place.

    Args:
        model (`nn.Module`): The model.
        trained (`bool`, *optional*, defaults to `False`): Whether to leave out what is frozen.
    """

    def part(parameter: Any) -> torch.Tensor:
        if _is_partitioned(parameter):
            return parameter.ds_tensor
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data

    return [part(parameter) for parameter in model.parameters() if parameter.requires_grad or not trained]


@contextlib.contextmanager
def callable_denoiser(model: nn.Module, pipeline, name: str) -> Iterator[None]:
    """
    Lets a pipeline call the denoiser inside of an adapter.

    What none of its blocks holds is gathered by FSDP2's outermost module alone, the adapter's, which the call would go
    around.

    Args:
        model (`nn.Module`): The policy as it is called in training.
        pipeline (`DiffusionPipeline`): The pipeline.
        name (`str`): Name of its denoiser.
    """
    denoiser = getattr(pipeline, name)
    if not isinstance(model, FSDPModule) or model is denoiser:
        yield
        return
    setattr(pipeline, name, model)
    try:
        yield
    finally:
        setattr(pipeline, name, denoiser)


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def save_optimizer(accelerator: Accelerator, optimizer, model: nn.Module, folder: str) -> None:
    """Writes FSDP2's optimizer, and not the weights a second time, as `Trainer` does."""
    save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, folder)


def check_checkpoint(checkpoint: str | Path, accelerator: Accelerator) -> None:
    """
    Raises `ValueError` where the optimizer's state in a checkpoint cannot be taken up by the engine and its ranks.

    Without this a run would go on with an optimizer that has forgotten everything.
    """
    checkpoint = Path(checkpoint)
    parts = list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt"))
    written: Engine | None = None
    if parts:
        written = "deepspeed"
    elif (checkpoint / "optimizer.bin").is_file():
        written = "fsdp2"
    elif (checkpoint / "optimizer.pt").is_file():
        written = "replicated"
    names = {"replicated": "one process or DDP", "deepspeed": "DeepSpeed", "fsdp2": "FSDP2"}
    engine = engine_of(accelerator)
    if written is not None and written != engine:
        raise ValueError(
            f"The optimizer's state in {checkpoint} was written under {names[written]}, found {names[engine]}: resume "
            "with the engine of the first run, or start a new run from the weights that it saved."
        )
    if parts and len(parts) != accelerator.num_processes:
        raise ValueError(
            f"The optimizer's state in {checkpoint} is in {len(parts)} parts, found {accelerator.num_processes} "
            f"rank(s), and DeepSpeed cannot cut it anew: resume with {len(parts)} ranks."
        )
