"""The model card: what was trained from what, how, with which result, and how to load it."""

import functools
import json
import math
import os
import platform
import re
import shlex
from dataclasses import MISSING, fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import is_peft_model
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import HfHubHTTPError, validate_repo_id
from peft import LoraConfig, PeftConfig
from PIL import Image
from transformers import TrainingArguments

from . import engines
from .callbacks import ASSETS, LogImagesCallback, image_grid
from .curves import draw_curves
from .data.buckets import show_size
from .export import lora_obstacle, single_file_obstacle
from .hub import loads_as_diffusers_lora, public_name
from .markdown import code, fence, link, text


CURVES, BEFORE_AFTER = f"{ASSETS}/curves.png", f"{ASSETS}/before_after.png"
# Prompts of the picture of before and after, and their pictures' width in pixels.
COLUMNS, SIDE = 5, 192

# Options that say where a run ran and what it wrote, and not what it computed.
_NOT_SETTINGS = frozenset(
    "output_dir overwrite_output_dir run_name project report_to push_to_hub resume_from_checkpoint local_rank "
    "disable_tqdm use_cpu log_level log_level_replica log_on_each_node debug do_train do_eval do_predict deepspeed "
    "fsdp_config accelerator_config parallelism_config model_init_kwargs".split()
)
_ENGINES = {"replicated": "DDP", "deepspeed": "DeepSpeed", "fsdp2": "FSDP2"}
# What tells how good the policy is; the rest is for those who read curves.
_HEADLINE = re.compile(r"(^|_)(loss$|rewards/|win_rate/|score/)")


# ---- Names, licence, options ----------------------------------------------------------------------------------------


def is_hub_id(name: str | None) -> bool:
    """Whether `name` can be a model on the Hub (and is no local path)."""
    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except (HfHubHTTPError, ValueError):
        return False
    return True


@functools.cache
def base_license(base_model: str, revision: str | None = None) -> dict[str, str]:
    """
    `license`, `license_name` and `license_link` of a base model, as far as its card has them; never guessed.

    Args:
        base_model (`str`): Folder with a `README.md`, or Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
    """
    if os.path.isdir(base_model):
        file = Path(base_model) / "README.md"
        if not file.is_file():
            return {}
    elif is_hub_id(base_model):
        try:
            file = Path(hf_hub_download(base_model, "README.md", revision=revision))
        except OSError:  # no such file, no such repository, or no network
            return {}
    else:
        return {}
    try:
        data = metadata_load(file) or {}
    except (yaml.YAMLError, ValueError):
        return {}
    found = {
        name: data[name] for name in ("license", "license_name", "license_link") if isinstance(data.get(name), str)
    }
    if "license_link" in found and "://" not in found["license_link"]:
        file_name = found.pop("license_link")  # beside the base's card
        if is_hub_id(base_model):
            found["license_link"] = f"https://huggingface.co/{base_model}/blob/{revision or 'main'}/{file_name}"
    return found


def changed_options(args: TrainingArguments) -> dict[str, Any]:
    """The options that differ from their defaults and bear on the result, without tokens and machine paths."""
    recorded, changed = args.to_dict(), {}
    for field in fields(args):
        name = field.name
        if not field.init or name in _NOT_SETTINGS or name.startswith(("hub_", "trackio_")) or "token" in name:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = default.value if isinstance(default, Enum) else default
        value = recorded[name]
        # Trainer and TRL put False or an empty list for None.
        if value == default or (default is None and (value is False or value == [])):
            continue
        changed[name] = public_name(value) if isinstance(value, str) else value
    return json.loads(json.dumps(changed, default=str))  # plain types, which YAML writes plainly


def adapter_settings(config: PeftConfig) -> str:
    """An adapter's options that differ from their defaults; of LoRA also rank and alpha."""
    always = ("r", "lora_alpha") if isinstance(config, LoraConfig) else ()
    recorded, default = config.to_dict(), type(config)().to_dict()
    own = {"base_model_name_or_path", "inference_mode", "peft_type", "auto_mapping", "peft_version", "revision"}
    shown = {k: v for k, v in recorded.items() if k in always or (k not in own and v != default.get(k))}
    words = {k: ", ".join(sorted(map(str, v))) if isinstance(v, list | set | tuple) else v for k, v in shown.items()}
    return "; ".join([config.peft_type.value, *(f"{k} {v}" for k, v in words.items())])


def _versions() -> str:
    names = ["trl-diffusion", "trl", "transformers", "diffusers", "accelerate", "peft", "datasets", "torch"]
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


# ---- Pictures -------------------------------------------------------------------------------------------------------


def samples(trainer) -> list[tuple[str, dict[str, Path]]]:
    """Prompts of the trainer's [`LogImagesCallback`], each with its pictures, "before" and "after", as far as kept."""
    callbacks = trainer.callback_handler.callbacks
    callback = next((callback for callback in callbacks if isinstance(callback, LogImagesCallback)), None)
    found = []
    for i, prompt in enumerate(callback.prompts if callback else ()):
        paths = {when: Path(trainer.args.output_dir, ASSETS, f"{when}-{i}.png") for when in ("before", "after")}
        kept = {when: path for when, path in paths.items() if path.is_file() and _prompt_of(path) == prompt}
        if "after" in kept:
            found.append((prompt, kept))
    return found


def _prompt_of(path: Path) -> str | None:
    """A run that was resumed with other prompts has others' pictures of the start."""
    with Image.open(path) as picture:
        return picture.info.get("prompt")


def draw_pictures(trainer) -> None:
    """Writes what the card shows to the output folder: training curves, and samples before and after in two rows."""
    output_dir = Path(trainer.args.output_dir)
    drawn: dict[str, Image.Image | None] = {CURVES: draw_curves(trainer.state.log_history), BEFORE_AFTER: None}
    pairs = [kept for _, kept in samples(trainer)[:COLUMNS]]
    if pairs and all("before" in kept for kept in pairs):
        rows = []
        for when in ("before", "after"):
            pictures = [Image.open(kept[when]).convert("RGB") for kept in pairs]
            height = round(SIDE * pictures[0].height / pictures[0].width)
            rows.append([picture.resize((SIDE, height), Image.Resampling.LANCZOS) for picture in pictures])
        drawn[BEFORE_AFTER] = image_grid(rows, ["before", "after"])
    for name, picture in drawn.items():
        path = output_dir / name
        if picture is None:
            path.unlink(missing_ok=True)  # an earlier run's
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)


# ---- The text -------------------------------------------------------------------------------------------------------


def _cell(value: object) -> str:
    """Markdown of ours in a table; what comes from others has been through [`markdown.text`] or [`markdown.code`]."""
    return " ".join(str(value).split())


def _table(head: tuple[str, str], items) -> str:
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in items]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *rows])


def _details(summary: str, body: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{body}\n\n</details>"


def _literal(value: str) -> str:
    """A string in the code of a reader."""
    return f'"{value}"' if value.isprintable() and not set(value) & set('"\\') else ascii(value)


def _loading(trainer, base: str, load_id: str) -> str:
    """The section on how to load what was trained."""
    family, peft = trainer.family, is_peft_model(trainer.model)
    config: Any = trainer.model.peft_config["default"] if peft else None
    comment = "" if is_hub_id(trainer.base_model_id) else "  # the base model's folder"
    load_base = f"pipeline = DiffusionPipeline.from_pretrained({_literal(base)}){comment}\n"
    more = ""
    if not peft:
        loading = f"pipeline = DiffusionPipeline.from_pretrained({_literal(load_id)})"
    elif loads_as_diffusers_lora(config, family):
        loading = f"{load_base}pipeline.load_lora_weights({_literal(load_id)})"
    else:
        loading = (
            f"from peft import PeftModel\n\n{load_base}pipeline.{family.denoiser_name} = "
            f"PeftModel.from_pretrained(pipeline.{family.denoiser_name}, {_literal(load_id)})"
        )
    layout, folder = "", ""
    if not peft and single_file_obstacle(trainer.pipeline) is None:
        layout, folder = "single_file", "checkpoints"
    elif peft and lora_obstacle(config, family, "comfyui", trainer.model.targeted_module_names) is None:
        layout, folder = "comfyui", "loras"
    if layout:
        output = shlex.quote(f"{load_id.split('/')[-1]}.safetensors")
        command = (
            f"trl-diffusion export --model_name_or_path {shlex.quote(load_id)} --layout {layout} --output {output}"
        )
        more = f"\n\nIn ComfyUI: write one file, and put it into `models/{folder}`.\n\n{fence('bash', command)}"
    use = 'image = pipeline("a photo of a cat").images[0]'
    block = fence("python", f"from diffusers import DiffusionPipeline\n\n{loading}\n{use}")
    return f"## How to load\n\n{block}{more}"


def _last_metrics(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """The last value of each metric that is a finite number; the Hub takes no other."""
    metrics: dict[str, float] = {}
    for entry in log_history:
        metrics |= {k: v for k, v in entry.items() if isinstance(v, float) and k not in ("epoch", "total_flos")}
    timing = ("runtime", "per_second")
    return {k: v for k, v in metrics.items() if math.isfinite(v) and not any(word in k for word in timing)}


def _evaluation(metrics: dict[str, float], data_id: str | None, data_name: str | None) -> list[EvalResult]:
    """The evaluation's headlines in the Hub's form; win rates and scores are of prompts, the rest of held-out data."""
    results = []
    for name, value in metrics.items():
        if not name.startswith("eval_") or not _HEADLINE.search(name):
            continue
        of_prompts = "win_rate/" in name or "score/" in name
        results.append(
            EvalResult(
                task_type="text-to-image",
                dataset_type="prompts" if of_prompts else data_id or "preference",
                dataset_name="prompts drawn during training" if of_prompts else data_name or "held-out data",
                metric_type=name.removeprefix("eval_"),
                metric_value=value,
            )
        )
    return results


def _results(metrics: dict[str, float]) -> str:
    """The section on metrics: those of the evaluation that tell most, or of the training, and folded all others."""
    headlines = {k: v for k, v in metrics.items() if _HEADLINE.search(k)}
    shown = {k: v for k, v in headlines.items() if k.startswith("eval_")} or headlines
    show = lambda names: _table(("metric", "value"), ((text(k), f"{metrics[k]:.6g}") for k in names))  # noqa: E731
    rest = [name for name in metrics if name not in shown]
    section = f"## Results\n\nAs last logged.\n\n{show(shown)}"
    return f"{section}\n\n{_details('All other metrics', show(rest))}" if rest else section


def _settings(trainer, base: str, revision: str | None, data_name: str | None) -> dict[str, Any]:
    args = trainer.args
    adapter = trainer.model.peft_config["default"] if is_peft_model(trainer.model) else None
    return {
        "base model": text(base) if revision is None else f"{text(base)}, revision {code(revision)}",
        "training": "full" if adapter is None else text(f"adapter ({adapter_settings(adapter)})"),
        "training data": text(data_name) if data_name else "given as a `datasets.Dataset`",
        "training rows": trainer.num_train_rows or "streamed",
        "data fingerprint": f"`{trainer.data_fingerprint}`" if trainer.data_fingerprint else "streamed",
        "steps": trainer.state.global_step,
        "examples per step": trainer.examples_per_step,
        **trainer.card_settings(),
        "learning rate": args.learning_rate,
        "schedule": f"{args.lr_scheduler_type.value}, warm-up {args.warmup_steps:g}",
        "optimizer": args.optim.value,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "resolution": ", ".join(map(show_size, trainer.image_sizes)),
        "empty prompts": args.proportion_empty_prompts,
        "seed": args.seed,
        "data seed": args.seed if args.data_seed is None else args.data_seed,
        "processes": f"{args.world_size}, {_ENGINES[engines.engine_of(trainer.accelerator)]}"
        if args.world_size > 1
        else 1,
        "versions": _versions(),
    }


def _licence(found: dict[str, str]) -> str:
    if "license" not in found:
        return "That of the base model, in whose card none was found: look it up before you share this model."
    name = found.get("license_name", found["license"])
    return f"That of the base model: {link(name, found.get('license_link', ''))}."


def model_card(trainer, model_name: str | None = None, dataset_name: str | None = None, tags=None) -> ModelCard:
    """
    The model card, with the pictures that [`draw_pictures`] wrote.

    Args:
        trainer: A trainer of this library.
        model_name (`str`, *optional*): Name in the title. Defaults to the output folder's.
        dataset_name (`str`, *optional*): Data set's Hub id, or folder.
        tags (`str` or `list[str]`, *optional*): Further tags.
    """
    args, peft, output_dir = trainer.args, is_peft_model(trainer.model), Path(trainer.args.output_dir)
    model_name = model_name or output_dir.name
    base = public_name(trainer.base_model_id)
    base_id = base if is_hub_id(trainer.base_model_id) else None
    data_name = public_name(dataset_name) if dataset_name else None
    data_id = dataset_name if is_hub_id(dataset_name) else None
    revision = args.model_init_kwargs.get("revision") if isinstance(args.model_init_kwargs, dict) else None
    licence = base_license(trainer.base_model_id, revision)
    metrics, pictures, paper = _last_metrics(trainer.state.log_history), samples(trainer), trainer._paper
    widget = [
        {
            "text": prompt if when == "after" else f"{prompt} (before the training)",
            "output": {"url": f"{ASSETS}/{path.name}"},
        }
        for prompt, kept in pictures
        for when, path in reversed(kept.items())
    ]
    further_tags = [tags] if isinstance(tags, str) else tags or []
    data = ModelCardData(
        base_model=base_id,
        base_model_relation=None if base_id is None else "adapter" if peft else "finetune",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        datasets=data_id,
        model_name=model_name,
        tags=sorted({*trainer._tag_names, *further_tags, *(["lora"] if peft else [])}),
        eval_results=_evaluation(metrics, data_id, data_name) or None,
        widget=widget or None,
        **licence,
    )

    origin = f"[`{base}`](https://huggingface.co/{base})" if base_id else code(base)
    method = f"[{trainer._name}](https://huggingface.co/papers/{paper['id']})"
    sections = [f"# {text(model_name)}", f"{origin}, trained with {method} by `trl-diffusion`."]
    if (output_dir / BEFORE_AFTER).is_file():
        prompts = ", ".join(f"*{text(prompt)}*" for prompt, _ in pictures[:COLUMNS])
        sections += [
            f"![Samples before and after the training]({BEFORE_AFTER})",
            f"From the same seed before and after the training: {prompts}.",
        ]
    if pictures:
        sections.append("<Gallery />")  # where the Hub puts the widget's pictures
    sections += [
        _loading(trainer, base, trainer.hub_model_id or model_name),
        "## How it was trained",
        _table(("setting", "value"), _settings(trainer, base, revision, data_name).items()),
    ]
    options = yaml.safe_dump(changed_options(args), allow_unicode=True, width=100)
    sections.append(_details("All options that differ from their defaults", fence("yaml", options.rstrip("\n"))))
    if (output_dir / CURVES).is_file():
        sections.append(f"![Training curves]({CURVES})")
    if metrics:
        sections.append(_results(metrics))
    sections += ["## Licence", _licence(licence), "## Citation", fence("bibtex", paper["citation"])]
    content = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    return ModelCard(content.encode(errors="replace").decode())  # a folder's name may hold what UTF-8 cannot
