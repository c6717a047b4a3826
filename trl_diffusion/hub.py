"""What is written to disk and to the Hub: weights that diffusers loads, whole or not at all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from diffusers import DiffusionPipeline
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from . import engines
from .families import Family, family_of, load_pipeline
from .files import written_whole


ADAPTER_FILE = "adapter_model.safetensors"
DENOISER_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
# Sub-folder of a checkpoint: the reference, where it is no longer the policy's start.
REFERENCE = "reference"
# Likewise: the moving average of the weights, in the files of the weights themselves.
EMA = "ema"


def loads_as_diffusers_lora(config: PeftConfig, family: Family | type[Family]) -> bool:
    """Whether diffusers has LoRA files for the family, and they can hold everything that this configuration trains."""
    return (
        family.loads_lora and isinstance(config, LoraConfig) and not config.modules_to_save and config.bias == "none"
    )


def trained_tensors(model) -> dict[str, torch.Tensor]:
    """
    The tensors of an unwrapped policy that are saved, of which a rank may hold a part: those of the adapter, or all.
    """
    tensors = engines.own_tensors(model)
    if is_peft_model(model):
        tensors = get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
    return tensors


def save_policy(model, family: Family, directory: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """
    Writes the trained weights and nothing that is frozen.

    An adapter is written twice: as PEFT's own files, from which training resumes, and, for LoRA where the pipeline has
    a loader, as `pytorch_lora_weights.safetensors` with rank and alpha in its metadata, which
    `pipeline.load_lora_weights` reads (without the metadata an alpha other than the rank would be reloaded wrongly,
    and silently). A denoiser is written to the sub-folder that a diffusers pipeline expects.

    Args:
        model (`PeftModel` or `ModelMixin`): The unwrapped policy.
        family ([`Family`]): Its family.
        directory (`Path`): Where to write.
        weights (`dict`, *optional*): Its [`trained_tensors`], gathered by all ranks where no rank holds them whole.
    """
    if weights is None:
        weights = engines.whole(trained_tensors(model))
    if not is_peft_model(model):
        folder = directory / family.denoiser_name
        model.save_config(folder)
        save_weights(weights, folder)
        return
    # adapter_config.json and adapter_model.safetensors; PEFT's card about itself is not wanted.
    save_file(weights, directory / ADAPTER_FILE, metadata={"format": "pt"})
    config = model.peft_config["default"]
    was_training, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(directory))
    config.inference_mode = was_training
    if loads_as_diffusers_lora(config, family):
        lora = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
        family.pipeline.save_lora_weights(
            directory,
            **{
                f"{family.denoiser_name}_lora_layers": lora,
                f"{family.denoiser_name}_lora_adapter_metadata": config.to_dict(),
            },
        )


def save_frozen_parts(family: Family, directory: Path) -> None:
    """Writes the pipeline around the denoiser, so that `DiffusionPipeline.from_pretrained(directory)` works."""
    family.pipeline.save_config(directory)  # model_index.json
    for name, component in family.pipeline.components.items():
        if component is not None and name != family.denoiser_name and hasattr(component, "save_pretrained"):
            component.save_pretrained(directory / name)


def load_policy(model, family: Family, directory: str | os.PathLike) -> None:
    """
    Loads what [`save_policy`] wrote into the unwrapped `model`, which may be sharded; on all ranks.

    Raises:
        `ValueError`: if the folder holds no such weights.
    """
    directory = Path(directory)
    if is_peft_model(model):
        if not (directory / ADAPTER_FILE).is_file():
            raise ValueError(f"Found no {ADAPTER_FILE} in {directory}: expected a checkpoint of an adapter training.")
        adapter = load_file(directory / ADAPTER_FILE)
        own = trained_tensors(model)
        expected = own.keys()
        if adapter.keys() != expected:
            missing, unexpected = sorted(expected - adapter.keys()), sorted(adapter.keys() - expected)
            raise ValueError(
                f"The adapter in {directory} does not fit this `peft_config`: missing {missing[:1]}, unexpected "
                f"{unexpected[:1]} ({len(missing)} and {len(unexpected)} in all); resume with the first run's."
            )
        engines.write(own, adapter)
    else:
        folder = directory / family.denoiser_name
        if not folder.is_dir():
            raise ValueError(
                f"Found no folder {family.denoiser_name!r} in {directory}: expected a checkpoint of full fine-tuning."
            )
        load_weights(model, folder)


def save_weights(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes a denoiser's weights under the file names of diffusers."""
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder, filename_pattern=DENOISER_PATTERN)


def load_weights(model, folder: Path) -> None:
    """
    Loads what [`save_weights`] wrote into an unwrapped denoiser, which may be sharded; on all ranks.

    Raises:
        `ValueError`: if they are of another architecture.
    """
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob(DENOISER_PATTERN.format(suffix="*"))):
        weights |= load_file(file)
    own = engines.own_tensors(model)
    if weights.keys() != own.keys():
        missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        raise ValueError(
            f"The weights in {folder} do not fit this {type(model).__name__}: missing {missing[:1]}, unexpected "
            f"{unexpected[:1]} ({len(missing)} and {len(unexpected)} in all); resume with the first run's model."
        )
    engines.write(own, weights)


def public_name(name: str) -> str:
    """
    What is told of a model, a data set or a folder: its id or relative path; of an absolute path the last part, since
    the rest tells of a machine and its user.
    """
    return Path(name).name if os.path.isabs(name) else name


def save_training_args(args: TrainingArguments, directory: Path) -> None:
    """
    Writes `training_args.json`, for the record.

    JSON and not the pickle that `Trainer` writes: that one holds the Hub token in plain text, and is pushed.
    """
    record = {k: public_name(v) if isinstance(v, str) else v for k, v in args.to_dict().items()}  # without tokens
    (directory / "training_args.json").write_text(json.dumps(record, indent=2, default=str, sort_keys=True) + "\n")


def upload(api, trainer, checkpoint: Path) -> list:
    """
    Pushes a checkpoint's weights, and with them everything else of the output folder, without blocking.

    `Trainer` copies transformers' file names only, so that its intermediate pushes carry no diffusers weights.

    Returns:
        The upload jobs (`concurrent.futures.Future`).
    """
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    trainer_state = {"optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "trainer_state.json"}
    trainer_state |= {REFERENCE, EMA, "run.json", "latest"}  # the last is DeepSpeed's
    with written_whole(output_dir) as staging:
        for entry in checkpoint.iterdir():
            if entry.name in trainer_state or entry.name.startswith(("rng_state", "global_step", "zero_to_")):
                continue
            copy = shutil.copytree if entry.is_dir() else shutil.copy2
            copy(entry, staging / entry.name)
        if not is_peft_model(trainer.model) and not (output_dir / "model_index.json").is_file():
            save_frozen_parts(trainer.family, staging)
    message = f"Training in progress, step {trainer.state.global_step}"
    common: dict[str, Any] = {
        "repo_id": trainer.hub_model_id,
        "token": args.hub_token,
        "revision": args.hub_revision,
        "run_as_future": True,
    }
    jobs = [
        api.upload_folder(
            folder_path=output_dir, commit_message=message, ignore_patterns=["_*", "checkpoint-*", ".*"], **common
        )
    ]
    if args.hub_strategy in ("checkpoint", "all_checkpoints"):
        target = "last-checkpoint" if args.hub_strategy == "checkpoint" else checkpoint.name
        jobs.append(
            api.upload_folder(
                folder_path=checkpoint, path_in_repo=target, commit_message=f"{message}, checkpoint", **common
            )
        )
    return jobs


def load_trained(name: str, **kwargs: Any) -> DiffusionPipeline:
    """
    Loads a pipeline for inference: a Hub id, a pipeline's folder, the output folder of an adapter training, whose base
    model is loaded along, or a file that `trl-diffusion export` wrote.

    Args:
        name (`str`): Hub id, folder or file.
        **kwargs: Passed on to [`families.load_pipeline`].
    """
    if os.path.isfile(name):
        from .export import load_exported  # it imports this module

        return load_exported(name, **kwargs)
    config_file = Path(name) / "adapter_config.json"
    if not config_file.is_file():
        return load_pipeline(name, **kwargs)
    if (Path(name) / "model_index.json").is_file():
        raise ValueError(
            f"Found both adapter_config.json and model_index.json in {name}, expected the weights of one training: "
            "move away those of the other."
        )
    config = PeftConfig.from_pretrained(name)
    pipeline = load_pipeline(config.base_model_name_or_path, **kwargs)
    family = family_of(pipeline)
    if loads_as_diffusers_lora(config, family):
        family.pipeline.load_lora_weights(name)
    else:
        setattr(pipeline, family.denoiser_name, PeftModel.from_pretrained(family.denoiser, name))
    return pipeline


__all__ = [
    "load_policy",
    "load_trained",
    "public_name",
    "save_frozen_parts",
    "save_policy",
    "save_training_args",
    "trained_tensors",
    "upload",
]
