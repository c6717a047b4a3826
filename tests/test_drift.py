"""
Drift armour: every upstream name that we override, or that is no part of an upstream library's public face.

Which names these are, the tests find by themselves, in the source (imports, attributes) and in the classes (methods);
one that is missing here, or that nobody uses any more, fails. Their parameters are those of the versions in
`constraints.txt`. After an upgrade a failure names what has moved and who relies on it.
"""

# ruff: noqa: E501

import ast
import importlib
import inspect
import pkgutil
from collections import defaultdict
from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

import trl_diffusion


ROOT = Path(trl_diffusion.__file__).parent
LIBRARIES = ("trl", "transformers", "diffusers", "peft", "accelerate", "datasets", "huggingface_hub")
# What the libraries document as importable from here; every deeper module is theirs to rearrange.
PUBLIC = {
    *LIBRARIES,
    "accelerate.utils",
    "datasets.exceptions",
    "diffusers.utils",
    "huggingface_hub.utils",
    "peft.utils",
    "transformers.integrations",
}

IMPORTED = {
    "accelerate.commands.launch._validate_launch_command": "(args)",
    "accelerate.commands.launch.deepspeed_launcher": "(args)",
    "accelerate.commands.launch.launch_command_parser": "(subparsers)",
    "accelerate.commands.launch.multi_gpu_launcher": "(args)",
    "accelerate.utils.fsdp_utils.fsdp2_prepare_model": "(accelerator, model)",
    "datasets.config.HF_DATASETS_CACHE": "value",
    "datasets.fingerprint.Hasher": "class",
    "datasets.fingerprint.generate_random_fingerprint": "(nbits)",
    "datasets.table.embed_table_storage": "(table, token_per_repo_id, local_files, remote_files)",
    "datasets.utils.file_utils.xopen": "(file, mode, *args, download_config, **kwargs)",
    "diffusers.loaders.single_file_utils.DIFFUSERS_TO_LDM_MAPPING": "value",
    "diffusers.pipelines.flux2.pipeline_flux2.compute_empirical_mu": "(image_seq_len, num_steps)",
    "diffusers.quantizers.quantization_config.QuantizationConfigMixin": "class",
    "huggingface_hub.constants.HF_HUB_CACHE": "value",
    "huggingface_hub.repocard.metadata_load": "(local_path)",
    "peft.tuners.tuners_utils.BaseTunerLayer": "class",
    "peft.utils.other.AuxiliaryTrainingWrapper": "class",
    "peft.utils.other.get_pattern_key": "(pattern_keys, key_to_match)",
    "transformers.integrations.deepspeed.HfTrainerDeepSpeedConfig": "class",
    "transformers.integrations.deepspeed.unset_hf_deepspeed_config": "()",
    "transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil": "class",
    "transformers.trainer.PushInProgress": "class",
    "transformers.trainer.SCHEDULER_NAME": "value",
    "transformers.trainer.hf_api": "()",
    "transformers.trainer_utils.PREFIX_CHECKPOINT_DIR": "value",
    "transformers.trainer_utils.TrainOutput": "class",
    "transformers.trainer_utils.has_length": "(dataset)",
    "trl.models.utils.prepare_deepspeed": "(model, accelerator)",
    "trl.trainer.base_config._BaseConfig": "class",
    "trl.trainer.base_trainer._BaseTrainer": "class",
    "trl.trainer.utils.disable_dropout_in_model": "(model)",
}
OVERRIDDEN = {
    "transformers.integrations.integration_utils.TensorBoardCallback.on_train_begin": "(self, args, state, control, **kwargs)",
    "transformers.trainer.Trainer._finalize_training": "(self, trial, num_train_samples, start_time)",
    "transformers.trainer.Trainer._get_dataloader": "(self, dataset, description, batch_size, sampler_fn, is_training, dataloader_key)",
    "transformers.trainer.Trainer._get_grad_norm": "(self, model, grad_norm)",
    "transformers.trainer.Trainer._get_output_dir": "(self, trial)",
    "transformers.trainer.Trainer._get_train_sampler": "(self, train_dataset)",
    "transformers.trainer.Trainer._load_best_model": "(self)",
    "transformers.trainer.Trainer._load_from_checkpoint": "(self, resume_from_checkpoint, model)",
    "transformers.trainer.Trainer._load_optimizer_and_scheduler": "(self, checkpoint)",
    "transformers.trainer.Trainer._load_rng_state": "(self, checkpoint)",
    "transformers.trainer.Trainer._load_scaler": "(self, checkpoint)",
    "transformers.trainer.Trainer._maybe_log_save_evaluate": "(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate)",
    "transformers.trainer.Trainer._prepare_for_training": "(self, max_steps, train_dataloader, resume_from_checkpoint)",
    "transformers.trainer.Trainer._prepare_input": "(self, data)",
    "transformers.trainer.Trainer._push_from_checkpoint": "(self, checkpoint_folder)",
    "transformers.trainer.Trainer._run_epoch": "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
    "transformers.trainer.Trainer._save": "(self, output_dir, state_dict)",
    "transformers.trainer.Trainer._save_checkpoint": "(self, model, trial)",
    "transformers.trainer.Trainer._save_optimizer_and_scheduler": "(self, output_dir)",
    "transformers.trainer.Trainer._set_signature_columns_if_needed": "(self)",
    "transformers.trainer.Trainer.compute_loss": "(self, model, inputs, return_outputs, num_items_in_batch)",
    "transformers.trainer.Trainer.evaluate": "(self, eval_dataset, ignore_keys, metric_key_prefix)",
    "transformers.trainer.Trainer.evaluation_loop": "(self, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)",
    "transformers.trainer.Trainer.get_batch_samples": "(self, epoch_iterator, num_batches, device)",
    "transformers.trainer.Trainer.log": "(self, logs, start_time)",
    "transformers.trainer.Trainer.prediction_step": "(self, model, inputs, prediction_loss_only, ignore_keys)",
    "transformers.trainer.Trainer.push_to_hub": "(self, commit_message, blocking, token, revision, private, **kwargs)",
    "transformers.trainer.Trainer.save_model": "(self, output_dir, _internal_call)",
    "transformers.trainer.Trainer.train": "(self, resume_from_checkpoint, trial, ignore_keys_for_eval)",
    "transformers.trainer.Trainer.training_step": "(self, model, inputs, num_items_in_batch)",
    "transformers.trainer_callback.TrainerCallback.on_log": "(self, args, state, control, **kwargs)",
    "transformers.trainer_callback.TrainerCallback.on_step_begin": "(self, args, state, control, **kwargs)",
    "transformers.trainer_callback.TrainerCallback.on_step_end": "(self, args, state, control, **kwargs)",
    "transformers.trainer_callback.TrainerCallback.on_train_begin": "(self, args, state, control, **kwargs)",
    "transformers.trainer_callback.TrainerCallback.on_train_end": "(self, args, state, control, **kwargs)",
    "transformers.training_args.TrainingArguments._VALID_DICT_FIELDS": "value",
    "transformers.training_args.TrainingArguments.learning_rate": "value",
    "transformers.training_args.TrainingArguments.logging_nan_inf_filter": "value",
    "transformers.training_args.TrainingArguments.remove_unused_columns": "value",
    "transformers.training_args.TrainingArguments.resume_from_checkpoint": "value",
    "transformers.training_args.TrainingArguments.to_dict": "(self)",
    "trl.trainer.base_config._BaseConfig.__post_init__": "(self)",
    "trl.trainer.base_config._BaseConfig.bf16": "value",
    "trl.trainer.base_trainer._BaseTrainer.__init__": "(self, *args, **kwargs)",
    "trl.trainer.base_trainer._BaseTrainer._name": "value",
    "trl.trainer.base_trainer._BaseTrainer._paper": "value",
    "trl.trainer.base_trainer._BaseTrainer._send_telemetry": "(self)",
    "trl.trainer.base_trainer._BaseTrainer._tag_names": "value",
    "trl.trainer.base_trainer._BaseTrainer.create_model_card": "(self, model_name, dataset_name, tags)",
    "trl.trainer.base_trainer._BaseTrainer.loss_is_scaled_for_ga": "value",
    "trl.scripts.utils.TrlParser.__init__": "(self, dataclass_types, **kwargs)",
    "trl.scripts.utils.TrlParser.parse_args_and_config": "(self, args, return_remaining_strings, fail_with_unknown_args, separate_remaining_strings)",
    "trl.scripts.utils.TrlParser.set_defaults_with_config": "(self, **kwargs)",
}
# With an underscore, read or set on an object; "attribute" where only instances have it.
ATTRIBUTES = {
    "argparse.ArgumentParser._actions": "attribute",
    "diffusers.ModelMixin._attention_backend": "attribute",
    "torch.UntypedStorage._cdata": "value",
    "argparse.ArgumentParser._get_values": "(self, action, arg_strings)",
    "transformers.PreTrainedConfig._commit_hash": "attribute",
    "peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters": "value",
    "peft.utils.other.AuxiliaryTrainingWrapper._disable_adapters": "attribute",
    "datasets.Dataset._fingerprint": "attribute",
    "transformers.Trainer._finish_current_push": "(self)",
    "transformers.Trainer._globalstep_last_logged": "attribute",
    "diffusers.UNet2DConditionModel._hf_peft_config_loaded": "value",
    "datasets.Dataset._indices": "attribute",
    "transformers.integrations.WandbCallback._initialized": "attribute",
    "transformers.integrations.TrackioCallback._initialized": "attribute",
    "diffusers.ModelMixin._no_split_modules": "value",
    "diffusers.FluxPipeline._pack_latents": "(latents, batch_size, num_channels_latents, height, width)",
    "diffusers.Flux2Pipeline._pack_latents": "(latents)",
    "diffusers.QwenImagePipeline._pack_latents": "(latents, batch_size, num_channels_latents, height, width)",
    "torch.nn.Module._parameters": "attribute",
    "diffusers.Flux2Pipeline._patchify_latents": "(latents)",
    "transformers.Trainer._init_training_state": "(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)",
    "transformers.Trainer._prepare_inputs": "(self, inputs)",
    "diffusers.Flux2Pipeline._prepare_latent_ids": "(latents)",
    "diffusers.FluxPipeline._prepare_latent_image_ids": "(batch_size, height, width, device, dtype)",
    "diffusers.DiffusionPipeline._progress_bar_config": "attribute",
    "diffusers.ModelMixin._repeated_blocks": "value",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "(*args, **kwargs)",
    "transformers.integrations.TrackioCallback._trackio": "attribute",
    "transformers.Trainer._train_batch_size": "attribute",
    "diffusers.FluxPipeline._unpack_latents": "(latents, height, width, vae_scale_factor)",
    "diffusers.QwenImagePipeline._unpack_latents": "(latents, height, width, vae_scale_factor)",
    "transformers.integrations.WandbCallback._wandb": "attribute",
}
# Python's own, of named tuples.
NAMED_TUPLE = {"_asdict", "_fields", "_replace"}


# ---- What we use ----------------------------------------------------------------------------------------------------


def is_upstream(module: str) -> bool:
    return module.split(".")[0] in LIBRARIES


def is_private(module: str, name: str) -> bool:
    return module not in PUBLIC or name.startswith("_")


@cache
def sources() -> dict[str, ast.Module]:
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def dotted(node: ast.expr) -> list[str]:
    """`["a", "b", "c"]` of `a.b.c`; empty of anything else."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return [*inner, node.attr] if inner else []
    return [node.id] if isinstance(node, ast.Name) else []


@cache
def imported_names() -> dict[str, set[str]]:
    """Upstream names that are imported, or reached through a module, from where they are not public; and our files."""
    found = defaultdict(set)
    for file, tree in sources().items():
        roots = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and is_upstream(node.module):
                for alias in node.names:
                    if is_private(node.module, alias.name):
                        found[f"{node.module}.{alias.name}"].add(file)
            elif isinstance(node, ast.Import):
                roots |= {alias.asname or alias.name for alias in node.names if is_upstream(alias.name)}
        for node in ast.walk(tree):
            names = dotted(node) if isinstance(node, ast.Attribute) else []
            if len(names) < 2 or names[0] not in roots:
                continue
            module = importlib.import_module(names[0])
            for name in names[1:]:
                if is_private(module.__name__, name) and not name.startswith("__"):
                    found[".".join([module.__name__, name])].add(file)
                module = getattr(module, name)
                if not isinstance(module, ModuleType):
                    break
    return found


def our_classes() -> list[type]:
    classes = []
    for info in pkgutil.walk_packages([str(ROOT)], "trl_diffusion."):
        module = importlib.import_module(info.name)
        classes += [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == info.name]
    return classes


@cache
def overridden_names() -> dict[str, set[str]]:
    """Names of our classes that an upstream base class has; the nearest one."""
    found = defaultdict(set)
    for ours in our_classes():
        bases = [base for base in ours.__mro__ if is_upstream(base.__module__)]
        for name in vars(ours):
            generated = is_dataclass(ours) and name == "__init__"
            if generated or (name.startswith("__") and name not in ("__init__", "__post_init__")):
                continue
            base = next((base for base in bases if name in vars(base)), None)
            if base is not None:
                found[f"{base.__module__}.{base.__qualname__}.{name}"].add(ours.__name__)
    return found


@cache
def private_attributes() -> dict[str, set[str]]:
    """Names with an underscore that are read or set on some object, and that nothing of ours defines."""
    found, ours = defaultdict(set), set()
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                found[node.attr].add(file)
                if isinstance(node.ctx, ast.Store) and dotted(node.value) == ["self"]:
                    ours.add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                ours |= {target.id for target in targets if isinstance(target, ast.Name)}
            # What is read by `getattr(object, "_name", ...)`.
            elif isinstance(node, ast.Call) and dotted(node.func) in (["getattr"], ["hasattr"]):
                name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
                if name.startswith("_"):
                    found[name].add(file)
    return {name: files for name, files in found.items() if name not in ours | NAMED_TUPLE}


# ---- What upstream has ----------------------------------------------------------------------------------------------


def resolve(name: str):
    """The object behind `package.module.Class.attribute`."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            found = inspect.getattr_static(found, part) if isinstance(found, type) else getattr(found, part)
        return found
    raise ImportError(name)


def shape(thing) -> str:
    """The parameters of a function or method, without defaults and annotations, or what else it is."""
    if isinstance(thing, staticmethod | classmethod):
        thing = thing.__func__
    if isinstance(thing, type):
        return "class"
    if not callable(thing):
        return "value"
    signature = inspect.signature(thing)
    plain = {"default": inspect.Parameter.empty, "annotation": inspect.Parameter.empty}
    return str(
        signature.replace(
            parameters=[parameter.replace(**plain) for parameter in signature.parameters.values()],
            return_annotation=inspect.Signature.empty,
        )
    )


def found_at(name: str) -> str:
    try:
        return shape(resolve(name))
    except ImportError:
        return "nothing"
    except AttributeError:
        # Instances may have what their class has not.
        owner, _, attribute = name.rpartition(".")
        try:
            classes = [c for c in getattr(resolve(owner), "__mro__", ()) if c is not object]
        except AttributeError:
            classes = []
        return "attribute" if any(attribute in inspect.getsource(c) for c in classes) else "nothing"


def assert_unchanged(name: str, expected: str, users: set[str]) -> None:
    library, found = name.split(".")[0], found_at(name)
    assert found == expected, (
        f"{library} {version(library)} has {found} at {name}, expected {expected}: adapt {', '.join(sorted(users))}, "
        "then this list."
    )


# ---- The tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "used"),
    [
        (set(IMPORTED), imported_names),
        (set(OVERRIDDEN), overridden_names),
        ({name.rpartition(".")[2] for name in ATTRIBUTES}, private_attributes),
    ],
    ids=["imported", "overridden", "attributes"],
)
def test_list_is_complete(listed, used):
    """What we use stands in the list, and nothing else does."""
    missing = {name: sorted(users) for name, users in used().items() if name not in listed}
    assert not missing, f"Found {missing}, which are upstream's and in no list: add them."
    assert not listed - set(used()), f"Found {sorted(listed - set(used()))}, which nobody uses: take them out."


@pytest.mark.parametrize("name", IMPORTED)
def test_imported_name(name):
    assert_unchanged(name, IMPORTED[name], imported_names()[name])


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_name(name):
    assert_unchanged(name, OVERRIDDEN[name], overridden_names()[name])


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_private_attribute(name):
    assert_unchanged(name, ATTRIBUTES[name], private_attributes()[name.rpartition(".")[2]])


def test_a_change_is_told_in_one_sentence():
    with pytest.raises(
        AssertionError, match=r"^trl [\d.]+ has \(self, .*\) at trl\..*\.log, expected \(self\): adapt X"
    ):
        assert_unchanged("trl.trainer.base_trainer._BaseTrainer.log", "(self)", {"X"})
    with pytest.raises(AssertionError, match=r"has nothing at trl\.trainer\.base_trainer\._Gone, expected class"):
        assert_unchanged("trl.trainer.base_trainer._Gone", "class", {"X"})
