"""Which run an output folder belongs to: who writes into it, what it was started with, what a resume may change."""

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
import socket
import time
import uuid
import warnings
import zipfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate.utils import is_peft_model
from datasets import Dataset, Image, Value
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from .. import __version__, engines, files
from ..data.buckets import show_size
from ..data.features import plain_tensors
from ..data.formats import AnyDataset, present_columns
from ..families import Family
from ..hub import ADAPTER_FILE, public_name


RECORD = "run.json"
# Trainer leaves out of its uploads what starts with an underscore.
LOCK, HOLDER = "_lock", "_lock.json"

MAY_CHANGE = frozenset(
    # Where and how it runs. What a step computes is recorded as rows of a step and of a window.
    "per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size use_cpu local_rank deepspeed fsdp "
    "fsdp_config accelerator_config parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
    "attention_backend channels_last compile_repeated_blocks torch_compile torch_compile_backend torch_compile_mode "
    "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs "
    "torch_empty_cache_steps full_determinism cache_features precompute_ref_log_probs skip_memory_metrics use_cache "
    "debug "
    # How long it runs.
    "max_steps num_train_epochs "
    # What is logged, evaluated, sampled, saved and pushed, and where to.
    "output_dir overwrite_output_dir resume_from_checkpoint do_train do_eval do_predict logging_strategy "
    "logging_steps logging_first_step logging_dir logging_nan_inf_filter log_on_each_node log_level log_level_replica "
    "disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "eval_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches eval_use_gather_object "
    "eval_accumulation_steps per_device_eval_batch_size prediction_loss_only include_for_metrics batch_eval_metrics "
    "bf16_full_eval fp16_full_eval save_strategy save_steps save_total_limit save_only_model save_on_each_node "
    "enable_jit_checkpoint load_best_model_at_end metric_for_best_model greater_is_better push_to_hub hub_token "
    "hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision ema_export validation_prompts "
    "validation_steps num_validation_images validation_inference_steps validation_guidance_scale "
    "error_growth_limit error_growth_patience error_growth_action "
    # What a resume does, and what is compared by its contents: the base model, the data, the sizes of the images.
    "ignore_data_skip restore_callback_states_from_checkpoint model_init_kwargs resolution data_seed".split()
)
"""Options that a resume may change. All others change what is computed, those included that nobody has thought of."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Files of the weights: of an adapter, of a pipeline.
_ADAPTER = (ADAPTER_FILE, "adapter_config.json", "pytorch_lora_weights.safetensors")
_PIPELINE = "model_index.json"
# What else a run writes into its folder; trackers' logs stay.
_BESIDE = ("samples/step-*.png", "assets/before*.png", "assets/after*.png", "assets/curves.png", "win_rate.json")
_SAMPLED = 64


# ---- What a folder holds --------------------------------------------------------------------------------------------


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run, or of a checkpoint; empty if there is none."""
    file = folder / RECORD
    if not file.is_file():
        return {}
    fix = _delete(folder) if _CHECKPOINT.fullmatch(folder.name) else "delete the file, or choose another folder"
    record = read_json(file, fix)
    if not isinstance(record.get("settings"), dict) or not isinstance(record.get("id"), str):
        raise ValueError(f"Found no record of a run in {file}: {fix}.")
    return record


def read_json(file: Path, fix: str) -> dict[str, Any]:
    """The object in a JSON file. Raises `ValueError`, in one sentence that ends with `fix`, if there is none."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"Found no JSON in {file} ({error}), which is damaged: {fix}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Found a {type(content).__name__} in {file}, which is damaged: {fix}.")
    return content


def _delete(checkpoint: Path) -> str:
    return f"delete {checkpoint}, and resume from the checkpoint before"


def _check_readable(file: Path, fix: str) -> None:
    """Raises `ValueError` where the head of a file of tensors, or the directory at its end, cannot be read."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(file):
                pass
    except (SafetensorError, zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"Found {file} unreadable ({error}): {fix}.") from error


@contextlib.contextmanager
def damage_named(checkpoint: str | None) -> Iterator[None]:
    """Turns the errors of libraries that read a damaged file into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError) as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(
            f"Found {checkpoint} unreadable ({type(error).__name__}: {what}): {_delete(Path(str(checkpoint)))}."
        ) from error


def write_record(folder: Path, record: dict[str, Any]) -> None:
    with files.written_whole(folder) as staging:
        (staging / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def saved_weights(folder: Path) -> list[str]:
    """The files by which a folder is loaded as a model: those of an adapter, those of a pipeline."""
    return [name for name in (*_ADAPTER, _PIPELINE) if (folder / name).is_file()]


def check_output_dir(
    output_dir: str, resume: str | bool | None, overwrite: bool = False, own_id: str | None = None
) -> Path | None:
    """
    Decides whether a run may start in a folder. Reads only; see [`Run.started`].

    Args:
        output_dir (`str`): The folder.
        resume (`str` or `bool`, *optional*): A checkpoint, or `True` or `"latest"` for the last one of the folder.
        overwrite (`bool`, *optional*, defaults to `False`): `overwrite_output_dir`.
        own_id (`str`, *optional*): The run that asks.

    Returns:
        The checkpoint to resume from, or None for a start.

    Raises:
        `ValueError`: where the folder belongs to another run, or there is nothing to resume from.
    """
    folder = Path(output_dir)
    record = read_record(folder)
    found, weights = checkpoints(folder), saved_weights(folder)
    name = f" of a {record['settings'].get('method')} run" if record else ""
    what = f"{found[-1].name if found else 'the weights'}{name}" if found or weights else ""
    if resume in (None, False):
        own = own_id is not None and record.get("id") == own_id  # a trainer may train again
        if weights and not record and not (folder / "training_args.json").is_file():
            raise ValueError(
                f"Found {weights[0]} in {folder}, which no training of this library wrote: choose another "
                "`output_dir`, in which nothing can be overwritten."
            )
        if what and not overwrite and not own:
            raise ValueError(
                f"Found {what} in {folder}, expected a folder without another run: "
                f"{'go on with it by `resume_from_checkpoint=True`, ' if found else ''}replace it by "
                "`overwrite_output_dir=True`, or choose another `output_dir`."
            )
        return None
    if resume is True or resume == "latest":
        if overwrite:
            raise ValueError(
                "Found both `resume_from_checkpoint` and `overwrite_output_dir=True`, which deletes the checkpoints: "
                "leave one of them out."
            )
        if not found:
            raise ValueError(
                f"Found no checkpoint in {folder}{f', but {what}' if what else ''}, expected one to resume from: "
                "leave `resume_from_checkpoint` out to start"
                f"{', with `overwrite_output_dir=True` or in another folder' if what else ''}."
            )
        checkpoint = found[-1]
    else:
        checkpoint = Path(str(resume))
        inside = checkpoints(checkpoint)
        if not checkpoint.is_dir() or (inside and not (checkpoint / "trainer_state.json").is_file()):
            raise ValueError(
                f"Found {'no folder' if not checkpoint.is_dir() else 'no checkpoint but an output folder in'} "
                f"{resume}, expected a checkpoint to resume from"
                + (f": use {inside[-1]}." if inside else ", such as output_dir/checkpoint-100.")
            )
        if overwrite and checkpoint.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"Found `overwrite_output_dir=True`, which deletes {checkpoint}, from which to resume: leave one of "
                "them out."
            )
    if not overwrite:
        owner, whose = read_record(checkpoint).get("id"), f"that wrote {checkpoint}"
        if checkpoint in found and record:
            owner, whose = record["id"], "to which the folder belongs"
        others = [path for path in found if read_record(path).get("id", owner) != owner]
        if weights and record.get("id", owner) != owner:
            others.append(folder / weights[0])
        if others:
            raise ValueError(
                f"Found {others[0]}, which is not of the run {whose}: move it away, or choose another `output_dir`."
            )
    return checkpoint


def check_start(args) -> None:
    """[`check_folder`], on all ranks."""
    engines.check_processes(args)  # else each of several would think itself the first
    engines.on_first_rank(lambda: check_folder(args))


def check_folder(args) -> None:
    """[`check_output_dir`] for a command, which says beforehand how it starts; nobody may be writing there."""
    check_writable(args.output_dir)
    folder = Path(args.output_dir)
    with locked(folder) if folder.is_dir() else contextlib.nullcontext():
        check_output_dir(args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)


def clear(folder: Path) -> None:
    """Deletes what runs of this library left in a folder, and no other file."""
    found = checkpoints(folder)
    strange = [path for path in found if not any((path / name).is_file() for name in (RECORD, "trainer_state.json"))]
    if strange:
        raise ValueError(f"Found {strange[0]}, which is no checkpoint of a training: move it away.")
    if (folder / _PIPELINE).is_file():
        parts = json.loads((folder / _PIPELINE).read_text())
        found += [folder / name for name, part in parts.items() if isinstance(part, list) and (folder / name).is_dir()]
    for path in found:
        shutil.rmtree(path)
    shutil.rmtree(folder / files.INCOMPLETE, ignore_errors=True)
    card = folder / "README.md"
    single = [folder / name for name in (*_ADAPTER, _PIPELINE, "training_args.json")]
    if card.is_file() and "trl-diffusion" in card.read_text(errors="replace"):
        single.append(card)
    for path in [*single, *(path for pattern in _BESIDE for path in folder.glob(pattern))]:
        path.unlink(missing_ok=True)
    for name in ("samples", "assets"):
        with contextlib.suppress(OSError):  # holds other files, or is not there
            (folder / name).rmdir()
    # The last one: it tells until then that the rest is a run's.
    (folder / RECORD).unlink(missing_ok=True)


def check_kind(folder: Path, adapter: bool) -> None:
    """Raises `ValueError` where a folder holds weights of the other kind: which of them is loaded would be chance."""
    other = [name for name in saved_weights(folder) if (name == _PIPELINE) == adapter]
    if other:
        raise ValueError(
            f"Found {other[0]} in {folder}, expected a folder without a {'pipeline' if adapter else 'LoRA'}, beside "
            f"which {'an adapter' if adapter else 'a pipeline'} would not be found: choose another folder."
        )


def check_writable(output_dir: str) -> None:
    """
    Raises `OSError` where no file can be written to the output folder, before anything is computed for it. The folder
    is not made yet: the next check may refuse the run.
    """
    if not str(output_dir).strip():
        raise ValueError("Found an empty `output_dir`, expected a folder, such as outputs/kto.")
    # Where it is not there yet, its place: what is refused later leaves no empty folder.
    folder = next(path for path in (Path(output_dir), *Path(output_dir).parents) if os.path.exists(path))
    probe = folder / f"_probe-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"Found no way to write to `output_dir` {output_dir}: {error}; choose another folder, or make room."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


# ---- Who writes -----------------------------------------------------------------------------------------------------


def _holder(folder: Path) -> dict[str, Any]:
    try:
        holder = json.loads((folder / HOLDER).read_text())
        return {name: holder[name] for name in ("host", "pid", "started")}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _is_dead(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Holds the folder for this process; the operating system lets go of it however the process ends.

    Raises:
        `ValueError`: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, deadline = FileLock(folder / LOCK, thread_local=False), time.monotonic() + 15
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout as error:
            holder = _holder(folder)
            # Data loader workers of a killed process live on for some seconds, and with them its lock.
            if _is_dead(holder) and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            who = "another process"
            if holder:
                who = f"process {holder['pid']} on {holder['host']}, which trains since {holder['started']}"
            raise ValueError(
                f"Found {folder} in use by {who}: wait until it has ended, or choose another `output_dir`."
            ) from error
    try:
        left = _holder(folder)
        if left and left["host"] != socket.gethostname():
            warnings.warn(
                f"Found the lock of process {left['pid']} on {left['host']} in {folder}, which is free: make sure "
                "that this process has ended, if the file system does not share locks between machines.",
                stacklevel=2,
            )
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        (folder / HOLDER).write_text(
            json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started})
        )
        yield
    finally:
        # While it is held: who opened the file before finds out that it is gone.
        with contextlib.suppress(OSError):
            (folder / HOLDER).unlink(missing_ok=True)
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


# ---- What a run is --------------------------------------------------------------------------------------------------


def weights_fingerprint(family: Family) -> str:
    """
    Changes with the base model: its modules' names, shapes, dtypes and some values of each tensor, and the noise
    process. Reads little, so that it takes no time for large models either.
    """
    digest = xxhash.xxh3_128()
    for part, module in sorted(family.pipeline.components.items()):
        if isinstance(module, torch.nn.Module):
            _update(digest, part, module)
    scheduler = family.pipeline.scheduler.config
    digest.update(repr(sorted((k, str(v)) for k, v in scheduler.items() if not k.startswith("_"))).encode())
    return digest.hexdigest()


def model_fingerprint(model: torch.nn.Module) -> str:
    """As [`weights_fingerprint`], of one model."""
    digest = xxhash.xxh3_128()
    _update(digest, "model", model)
    return digest.hexdigest()


def _update(digest, part: str, module: torch.nn.Module) -> None:
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for plain in plain_tensors(tensor):
            if plain.is_meta:
                continue
            values = plain.detach().flatten()
            values = values[:: max(1, len(values) // _SAMPLED)][:_SAMPLED]
            digest.update(values.cpu().contiguous().view(torch.uint8).numpy().data)


def data_fingerprint(dataset: AnyDataset, columns: tuple[str, ...]) -> str:
    """
    Changes with the contents of the columns that a method reads: all prompts, labels and weights, and the images and
    embeddings of some rows, in their order. Wherever the data set lies, and however it was made.

    A stream is not read: for one, it changes with its name, columns and number of shards.
    """
    digest = xxhash.xxh3_128()
    if not isinstance(dataset, Dataset):
        info = dataset.info
        about = [info.dataset_name, info.config_name, str(dataset.split), dataset.num_shards, str(dataset.features)]
        digest.update(repr(about).encode())
        return digest.hexdigest()
    names = [name for name in present_columns(dataset, columns) if name in dataset.column_names]
    large = [name for name in names if not isinstance(dataset.features[name], Value)]
    plain = dataset.with_format(None)
    others = plain.select_columns([name for name in names if name not in large])
    digest.update(repr([len(dataset), names]).encode())
    if others.column_names:
        for batch in others.with_format("arrow").iter(1000):
            digest.update(repr(batch.to_pydict()).encode())
    if large:
        rows = sorted({i * (len(dataset) - 1) // max(1, _SAMPLED - 1) for i in range(_SAMPLED)})
        sample = plain.select_columns(large).select(rows)
        for name in large:
            if isinstance(dataset.features[name], Image):
                sample = sample.cast_column(name, Image(decode=False))
        for row in sample:
            for name in large:
                digest.update(_image_bytes(row[name]) if isinstance(row[name], dict) else repr(row[name]).encode())
    return digest.hexdigest()


def _image_bytes(image: dict[str, Any]) -> bytes:
    if image["bytes"] is not None:
        return image["bytes"]
    path = image["path"] or ""  # without both: named, with its row, by who reads it
    with contextlib.suppress(OSError):
        return Path(path).read_bytes()
    return os.path.basename(path).encode()  # inside of an archive, or not here


def _plain(value: Any) -> Any:
    """A value as JSON gives it back, without the paths of this machine."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, str):
        return public_name(value)
    return json.loads(json.dumps(value, default=str))


def _defaults_of(config: Any) -> dict[str, Any]:
    """Defaults of a dataclass by name, as a record has them."""
    missing = dataclasses.MISSING
    return {
        field.name: _plain(field.default if field.default_factory is missing else field.default_factory())
        for field in dataclasses.fields(config)
        if field.init and (field.default, field.default_factory) != (missing, missing)
    }


class Run:
    """
    What a trainer's run is: its identity, which is recorded in the output folder and in every checkpoint.

    Args:
        trainer ([`DiffusionTrainer`]): The trainer, after its set-up.
        base (`str`): [`weights_fingerprint`] of the model before the training.
        reference (`str`, *optional*): [`model_fingerprint`] of the reference, if one was given.
        data (`str`): [`data_fingerprint`] of the training data.
    """

    def __init__(self, trainer, base: str, reference: str | None, data: str):
        self.args, self.accelerator, self.id = trainer.args, trainer.accelerator, uuid.uuid4().hex
        self.folder = Path(trainer.args.output_dir)
        self.adapter, self.base_model_id = is_peft_model(trainer.model), trainer.base_model_id
        self._held = False
        options = {name: _plain(value) for name, value in self.args.to_dict().items() if name not in MAY_CHANGE}
        adapter = {}
        self._defaults = _defaults_of(self.args)
        if self.adapter:
            config = trainer.model.peft_config["default"]
            own = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")
            adapter = {f"adapter.{name}": _plain(v) for name, v in config.to_dict().items() if name not in own}
            self._defaults |= {f"adapter.{name}": value for name, value in _defaults_of(config).items()}
        # In the order in which differences are told.
        self.settings: dict[str, Any] = {
            "method": trainer._name,
            "training": "adapter" if self.adapter else "full fine-tuning",
            "base model": f"{public_name(self.base_model_id)} ({base[:12]})",
            "reference model": None if reference is None else reference[:12],
            "training rows": trainer.num_train_rows,
            "training data": data[:12],
            **adapter,
            "rows of a step (batch x accumulation x processes)": trainer.examples_per_step,
            "rows of a window": trainer.rows_per_window,
            "image sizes": [show_size(size) for size in trainer.image_sizes],
            **options,
            "timestep_sampling": self.args.timestep_sampling or trainer.family.timestep_sampling,
            "data_seed": trainer.example_builders[0].seed,
        }

    # ---- Its record -------------------------------------------------------------------------------------------------

    @property
    def record(self) -> dict[str, Any]:
        return {"id": self.id, "trl_diffusion": __version__, "settings": self.settings}

    def record_checkpoint(self, checkpoint: Path) -> None:
        """Writes the record into a checkpoint that is complete, with the sizes of its files."""
        sizes = {str(p.relative_to(checkpoint)): p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()}
        more = {"files": sizes, "save_only_model": self.args.save_only_model}
        (checkpoint / RECORD).write_text(json.dumps(self.record | more, indent=2, sort_keys=True) + "\n")

    def check_checkpoint(self, checkpoint: Path) -> None:
        """Raises `ValueError` where a checkpoint is not of this run, or not whole."""
        way_out = "resume from an earlier checkpoint, or start a new run from its weights"
        damaged = _delete(checkpoint)
        record = read_record(checkpoint)
        if "files" not in record:
            raise ValueError(f"Found no {RECORD} in {checkpoint}, expected the record of what was trained: {way_out}.")
        self._compare(record["settings"], checkpoint)
        if record.get("save_only_model"):
            raise ValueError(
                f"Found a checkpoint with `save_only_model=True` in {checkpoint}, without the optimizer's state, from "
                "which a run cannot go on: start a new run from its weights."
            )
        engines.check_checkpoint(checkpoint, self.accelerator)
        for name, size in record["files"].items():
            file = checkpoint / name
            if file.suffix == ".py":  # DeepSpeed's script
                continue
            if not file.is_file():
                raise ValueError(f"Found no {name} in {checkpoint}, with which it was saved: {way_out}.")
            # Text may have been edited.
            if file.suffix != ".json" and file.stat().st_size != size:
                raise ValueError(
                    f"Found {file.stat().st_size:,} bytes in {file}, expected the {size:,} that were saved: {damaged}."
                )
            _check_readable(file, damaged)
        if not isinstance(read_json(checkpoint / "trainer_state.json", damaged).get("global_step"), int):
            raise ValueError(f"Found no `global_step` in {checkpoint / 'trainer_state.json'}: {damaged}.")

    def _compare(self, recorded: dict[str, Any], checkpoint: Path) -> None:
        different = []
        for name in dict.fromkeys([*self.settings, *(name for name in recorded if name.startswith("adapter."))]):
            # What an earlier version did not record had its default.
            before, now = (found.get(name, self._defaults.get(name)) for found in (recorded, self.settings))
            same = before == now
            if name == "base model":  # by its weights, wherever it was loaded from
                same = str(before).split("(")[-1] == str(now).split("(")[-1]
            if not same:
                shown = name if " " in name or name in ("method", "training") else f"`{name}`"
                different.append(f"{shown} {before!r}, found {now!r}")
                if name in ("method", "training"):
                    break
        if different:
            raise ValueError(
                f"The run of {checkpoint} has {'; '.join(different[:3])}"
                f"{f' ({len(different) - 3} more)' if len(different) > 3 else ''}: resume with the recorded "
                f"value{'s' * (len(different) > 1)}, start in another `output_dir`, or start again here with "
                "`overwrite_output_dir=True`."
            )

    # ---- Its folder -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def started(self, resume: str | bool | None) -> Iterator[Path | None]:
        """
        Holds the output folder for a training, and yields the checkpoint to resume from; on all ranks.

        Raises:
            `ValueError`: where the folder belongs to another run or process, or the checkpoint does not fit.
        """
        with self._locked():
            checkpoint, self.id = engines.on_first_rank(lambda: (self._start(resume), self.id))
            yield checkpoint

    def _start(self, resume: str | bool | None) -> Path | None:
        overwrite = self.args.overwrite_output_dir
        checkpoint = check_output_dir(self.args.output_dir, resume, overwrite, self.id)
        if checkpoint is not None:
            self.check_checkpoint(checkpoint)
            self.id = read_record(checkpoint)["id"]
        elif checkpoints(self.folder):  # of its first time, from which its second one must not resume
            self.id = uuid.uuid4().hex
        if overwrite:
            base = Path(self.base_model_id)
            if base.exists() and base.resolve().is_relative_to(self.folder.resolve()):
                raise ValueError(
                    f"Found the base model in {base}, which `overwrite_output_dir=True` would delete: choose another "
                    "`output_dir`."
                )
            clear(self.folder)
        before = read_record(self.folder)
        finished = {k: v for k, v in before.items() if k == "finished" and checkpoint and before["id"] == self.id}
        write_record(self.folder, self.record | finished)
        return checkpoint

    @contextlib.contextmanager
    def saving(self, folder: Path) -> Iterator[None]:
        """Holds a folder while weights are written to it; on all ranks."""
        with contextlib.ExitStack() as stack:
            if folder.resolve() == self.folder.resolve():
                stack.enter_context(self._locked())
                engines.on_first_rank(self._claim)
            engines.on_first_rank(lambda: check_kind(folder, self.adapter))
            yield

    def _claim(self) -> None:
        record = read_record(self.folder)
        if record.get("id") == self.id:
            return
        if record:
            raise ValueError(f"Found another run in {self.folder}: save to another folder, with `save_model(folder)`.")
        check_output_dir(self.args.output_dir, None)
        write_record(self.folder, self.record)

    def check_still_ours(self) -> None:
        """Raises `ValueError` where another run has taken the folder, which no lock between machines prevented."""
        engines.on_first_rank(self._check_still_ours)

    def _check_still_ours(self) -> None:
        holder = _holder(self.folder)
        own = {"host": socket.gethostname(), "pid": os.getpid()}
        if read_record(self.folder).get("id") != self.id or (holder | own) != holder:
            raise ValueError(
                f"Found another run in {self.folder}"
                + (f", of process {holder['pid']} on {holder['host']}" if holder else "")
                + ", which was started since: two runs cannot share an `output_dir`."
            )

    def rotate(self, newest: Path, best: str | None) -> None:
        """
        Deletes checkpoints beyond `save_total_limit`, those of other runs and other folders never.

        transformers' version goes by times, which a copy changes, takes whatever is called `checkpoint-*`, and leaves
        half a checkpoint when it is killed.
        """
        if self.args.save_total_limit is None:
            return
        kept = {newest.name} if best is None else {newest.name, Path(best).name}
        own = [path for path in checkpoints(self.folder) if read_record(path).get("id") == self.id]
        # After a resume from an earlier one, later ones come first: they will be written again.
        step = _step(newest)
        own.sort(key=lambda path: (_step(path) <= step, _step(path)))
        surplus = len(own) - max(self.args.save_total_limit, len(kept))
        for path in [path for path in own if path.name not in kept][: max(0, surplus)]:
            files.remove(path)

    def finish(self, step: int, max_steps: int) -> None:
        """Records that nothing is left to train, up to so many steps."""
        done = {"finished": {"step": step, "max_steps": max_steps}}
        engines.on_first_rank(lambda: write_record(self.folder, self.record | done))

    def is_finished(self, checkpoint: Path, max_steps: int, takes_best: bool) -> bool:
        """Whether a resume from a checkpoint finds nothing left to train."""
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        step = state.get("global_step", 0)
        if step >= max_steps:
            return True
        done = read_record(self.folder).get("finished") or {}
        last = checkpoints(self.folder)[-1:] == [checkpoint]
        best = takes_best and state.get("best_model_checkpoint") is not None
        return last and done.get("max_steps") == max_steps and (best or done.get("step") == step)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._held:  # a save within the training
            yield
            return
        with contextlib.ExitStack() as stack:
            engines.on_first_rank(lambda: stack.enter_context(locked(self.folder)))
            self._held = True
            try:
                yield
            finally:
                self._held = False


__all__ = [
    "Run",
    "check_folder",
    "check_output_dir",
    "check_start",
    "check_writable",
    "data_fingerprint",
    "weights_fingerprint",
]
