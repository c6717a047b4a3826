"""What is written to disk and to the Hub: weights that diffusers loads, whole or not at all."""

import itertools
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from diffusers import DiffusionPipeline
from huggingface_hub import save_torch_state_dict
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from . import engines
from .families import Family, family_class, load_pipeline, read_index
from .files import written_whole
from .redaction import redacted


ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
DENOISER_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
# Sub-folder of a checkpoint: the reference, where it is no longer the policy's start.
REFERENCE = "reference"
# Likewise: the moving average of the weights, in the files of the weights themselves.
EMA = "ema"


# Options of a `LoraConfig` that a LoRA file of diffusers brings back. Others (`modules_to_save`, `bias`, `kasa_config`
# ...) train something else, or compute the update in another way.
KNOWN_LORA_OPTIONS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("use_dora", "lora_bias", "runtime_config"),
}


def unknown_lora_options(config: PeftConfig) -> list[str]:
    """The options of a LoRA that a LoRA file of diffusers does not hold, as the user wrote them."""
    default = vars(type(config)())
    return [
        f"{name}={value!r}"
        for name, value in vars(config).items()
        if name not in KNOWN_LORA_OPTIONS and (value or None) != (default.get(name) or None)
    ]


def loads_as_diffusers_lora(config: PeftConfig, family: Family | type[Family]) -> bool:
    """Whether diffusers has LoRA files for the family, and they can hold everything that this configuration trains."""
    return family.loads_lora and isinstance(config, LoraConfig) and not unknown_lora_options(config)


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
                f"{family.denoiser_name}_lora_adapter_metadata": public_config(config),
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
    return redacted(Path(name).name if os.path.isabs(name) else name)


def stored_name(name: str) -> str:
    """What is recorded of a base model: its Hub id, or the absolute path of a folder, which holds from everywhere."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def public_config(config: PeftConfig) -> dict[str, Any]:
    """An adapter's configuration for a file that is shared: without the base model's path on this machine."""
    return config.to_dict() | {"base_model_name_or_path": public_name(config.base_model_name_or_path or "") or None}


def upload_folder(api, folder: Path, *, ignore_patterns: list[str], **kwargs: Any) -> Any:
    """
    As `HfApi.upload_folder`, with the [`public_name`] in place of the paths of this machine that the configurations in
    the folder name: those of the base model.
    """
    names = ("base_model_name_or_path", "_name_or_path")
    changed: dict[Path, dict[str, Any]] = {}
    for file in itertools.chain.from_iterable(map(folder.glob, (ADAPTER_CONFIG, "model_index.json", "*/config.json"))):
        try:
            found = json.loads(file.read_text())
        except ValueError:  # a file of others
            continue
        if not isinstance(found, dict):
            continue
        paths = {name: public_name(found[name]) for name in names if found.get(name)}
        if any(found[name] != paths[name] for name in paths):
            changed[file.relative_to(folder)] = found | paths
    if not changed:
        return api.upload_folder(folder_path=folder, ignore_patterns=ignore_patterns, **kwargs)
    # Links cost no space. The underscore keeps the copy itself out of every upload.
    public = Path(tempfile.mkdtemp(prefix="_public-", dir=folder))
    try:
        shutil.copytree(
            folder, public, ignore=shutil.ignore_patterns(*ignore_patterns), copy_function=_link, dirs_exist_ok=True
        )
        for name, content in changed.items():
            if (public / name).exists():
                (public / name).unlink()  # the link, not the file
                (public / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        result = api.upload_folder(folder_path=public, ignore_patterns=ignore_patterns, **kwargs)
    except BaseException:
        shutil.rmtree(public, ignore_errors=True)
        raise
    if kwargs.get("run_as_future"):
        result.add_done_callback(lambda _: shutil.rmtree(public, ignore_errors=True))
    else:
        shutil.rmtree(public, ignore_errors=True)
    return result


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


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
        upload_folder(api, output_dir, commit_message=message, ignore_patterns=["_*", "checkpoint-*", ".*"], **common)
    ]
    if args.hub_strategy in ("checkpoint", "all_checkpoints"):
        target = "last-checkpoint" if args.hub_strategy == "checkpoint" else checkpoint.name
        jobs.append(
            upload_folder(
                api,
                checkpoint,
                path_in_repo=target,
                commit_message=f"{message}, checkpoint",
                ignore_patterns=["_*"],
                **common,
            )
        )
    return jobs


def is_adapter(name: str) -> bool:
    """Whether `name` is the output folder of an adapter training."""
    return os.path.isfile(os.path.join(name, ADAPTER_CONFIG))


def base_model_of(name: str, base_model: str | None = None) -> str:
    """
    The base model of an adapter.

    Args:
        name (`str`): Output folder of an adapter training, or its Hub id.
        base_model (`str`, *optional*): Hub id or folder that replaces the one that the adapter names.

    Raises:
        `ValueError`: if the adapter names none, or a folder that is not there.
    """
    base = base_model or PeftConfig.from_pretrained(name).base_model_name_or_path
    if not base:
        raise ValueError(
            f"The {ADAPTER_CONFIG} in {name!r} names no base model: pass it as `base_model` (`--base_model`)."
        )
    return existing_base(name, base)


def existing_base(name: str, base: str) -> str:
    """
    `base`, the base model of the file or folder `name`.

    Raises:
        `ValueError`: if it is neither a folder nor a possible Hub id.
    """
    if os.path.isdir(base):
        return base
    try:
        validate_repo_id(base)
    except ValueError:
        raise ValueError(
            f"Found no base model {base!r}, on which {name!r} was trained, expected a folder or Hub id: pass where "
            "it is now as `base_model` (`--base_model`)."
        ) from None
    return base


@contextmanager
def naming_the_base(name: str, base: str) -> Iterator[None]:
    """Within, an error about a base model that cannot be read says whose base it is, and what to do."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise OSError(
            f"The base model {base!r} of {name!r} could not be read ({reason}): pass its folder or Hub id as "
            "`base_model` (`--base_model`)."
        ) from error


def check_all_loaded(denoiser, modules: Iterable[str], file: str) -> None:
    """
    Checks that diffusers has put a LoRA on all of `modules`: of names that it does not know it drops the weights.

    Raises:
        `ValueError`: if it has not.
    """
    modules = set(modules)
    found = {name.split(".lora_A.")[0] for name, _ in denoiser.named_parameters() if ".lora_A." in name}
    if missing := sorted(modules - found):
        raise ValueError(
            f"Found {len(modules)} modules in the LoRA {file!r}, of which this {type(denoiser).__name__} has got "
            f"{len(modules) - len(missing)}; missing is {missing[0]!r}: expected the model that it was trained on, "
            "pass it as `base_model` (`--base_model`)."
        )


@contextmanager
def refusing_other_sizes(name: str, denoiser) -> Iterator[None]:
    """Within, weights of an adapter that are larger or smaller than those of its base are an error about the base."""
    try:
        yield
    except RuntimeError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
        if reason is None:
            raise
        raise ValueError(
            f"The adapter {name!r} does not fit this {type(denoiser).__name__} ({reason}): expected the model that it "
            "was trained on, pass it as `base_model` (`--base_model`)."
        ) from error


def load_peft(denoiser, name: str) -> PeftModel:
    """
    `PeftModel.from_pretrained`, which would leave modules that the adapter does not have untrained with a warning.

    Args:
        denoiser (`ModelMixin`): The denoiser of the base model.
        name (`str`): Output folder of an adapter training, or its Hub id.

    Raises:
        `ValueError`: if the adapter was trained on another denoiser.
    """
    with refusing_other_sizes(name, denoiser), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys")
        try:
            return PeftModel.from_pretrained(denoiser, name)
        except UserWarning as warning:
            raise ValueError(
                f"The adapter {name!r} has no weights for some modules of this {type(denoiser).__name__} that it is "
                "for: expected the model that it was trained on, pass it as `base_model` (`--base_model`)."
            ) from warning


def load_trained(name: str, base_model: str | None = None, **kwargs: Any) -> DiffusionPipeline:
    """
    Loads a pipeline for inference: a Hub id, a pipeline's folder, the output folder of an adapter training, whose base
    model is loaded along, or a file that `trl-diffusion export` wrote.

    Args:
        name (`str`): Hub id, folder or file.
        base_model (`str`, *optional*): Hub id or folder of the base model, instead of the one that the adapter names.
        **kwargs: Passed on to [`families.load_pipeline`].

    Raises:
        `ValueError`: if the base model is not there, is none for this adapter, or is named for a whole pipeline.
    """
    if os.path.isfile(name):
        from .export import load_exported  # it imports this module

        return load_exported(name, base_model=base_model, **kwargs)
    if not is_adapter(name):
        if base_model is not None:
            raise ValueError(
                f"Found `base_model` ({base_model!r}) for {name!r}, expected it for an adapter's output folder or "
                "exported file: drop it."
            )
        return load_pipeline(name, **kwargs)
    if (Path(name) / "model_index.json").is_file():
        raise ValueError(
            f"Found both adapter_config.json and model_index.json in {name}, expected the weights of one training: "
            "move away those of the other."
        )
    config = PeftConfig.from_pretrained(name)
    base = base_model_of(name, base_model)
    with naming_the_base(name, base):
        family = family_class(read_index(base, **kwargs)["_class_name"])
        pipeline = load_pipeline(base, **kwargs)
    denoiser = getattr(pipeline, family.denoiser_name)
    if loads_as_diffusers_lora(config, family) and os.path.isfile(os.path.join(name, LORA_FILE)):
        with refusing_other_sizes(name, denoiser):
            pipeline.load_lora_weights(name, weight_name=LORA_FILE)
        with safe_open(os.path.join(name, LORA_FILE), "pt") as file:
            keys = [key.removeprefix(f"{family.denoiser_name}.") for key in file.keys()]
        check_all_loaded(denoiser, [key.split(".lora_A.")[0] for key in keys if ".lora_A." in key], name)
    else:
        setattr(pipeline, family.denoiser_name, load_peft(denoiser, name))
    return pipeline


__all__ = [
    "load_policy",
    "load_trained",
    "public_name",
    "save_frozen_parts",
    "save_policy",
    "save_training_args",
    "stored_name",
    "trained_tensors",
    "upload",
    "upload_folder",
]
