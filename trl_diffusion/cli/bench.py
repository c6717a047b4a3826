"""`trl-diffusion bench`."""

import argparse
import functools
import json
import shlex
import tempfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

import trl_diffusion

from ..bench.estimate import (
    ADAMW_STATES,
    SHARDED,
    Memory,
    Mode,
    as_markdown,
    at_resolution,
    estimate,
    published_models,
)
from ..bench.measure import as_text, measure, synthetic_data
from ..bench.pipelines import RANDOM, random_pipeline
from ..bench.turns import compare, comparison_as_text
from ..families import check_before_loading, family_of, load_pipeline
from ..trainer.base_config import PreferenceConfig
from .arguments import ModelArguments, ScriptArguments
from .errors import Parser, check_output_file, positive_int, suggestion
from .inputs import ConfigParser, check_model, read_config
from .launch import launch_options


METHODS = {"kto": "DiffusionKTO", "rpo": "DiffusionRPO", "dpo": "DiffusionDPO", "sft": "DiffusionSFT"}


@dataclass
class BenchArguments:
    """
    What to measure; all options of the method's configuration are understood too.

    Parameters:
        method (`str`, *optional*, defaults to `"kto"`):
            `"kto"`, `"rpo"`, `"dpo"` or `"sft"`.
        bench_steps (`int`, *optional*, defaults to `10`):
            Steps to measure; as many are then timed in parts.
        bench_warmup (`int`, *optional*, defaults to `2`):
            Steps before them.
        bare_loop (`bool`, *optional*, defaults to `True`):
            Whether to compare with the bare loop, which takes a copy of the weights.
        against (`str`, *optional*):
            Other options, in one string, e.g. `"--cache_features false"`: the same command with these behind it makes
            its steps in turns with this one. Prints the ratio of their images per second and the largest difference
            of their losses, in the place of parts and bare loop.
        peak_tflops (`float`, *optional*):
            What the accelerator can do at best, in TFLOP/s, to print the model FLOPs utilisation.
        json_file (`str`, *optional*):
            Where to write the numbers.
    """

    method: Literal["kto", "rpo", "dpo", "sft"] = field(default="kto", metadata={"help": "Method to measure."})
    bench_steps: int = field(default=10, metadata={"help": "Steps to measure, and then as many in parts."})
    bench_warmup: int = field(default=2, metadata={"help": "Steps before them."})
    bare_loop: bool = field(default=True, metadata={"help": "Whether to compare with the bare loop."})
    against: str | None = field(
        default=None, metadata={"help": "Other options in one string: the same command with them takes turns with it."}
    )
    peak_tflops: float | None = field(default=None, metadata={"help": "The accelerator's peak, in TFLOP/s, for MFU."})
    json_file: str | None = field(default=None, metadata={"help": "Where to write the numbers."})

    def __post_init__(self):
        if self.bench_steps < 1 or self.bench_warmup < 1:
            raise ValueError(
                f"Found bench_steps={self.bench_steps} and bench_warmup={self.bench_warmup}, expected at least 1."
            )
        if self.against is not None and self.peak_tflops is not None:
            raise ValueError("Found `peak_tflops` with `against`, which counts no FLOPs: drop one of them.")


@dataclass
class BenchModelArguments(ModelArguments):
    """
    [`ModelArguments`], in which `model_name_or_path` may also name a pipeline with random weights: `"small"`, the
    default, is a UNet of 28.6 M parameters over 32 x 32 latents under the VAE of Stable Diffusion; `"sd15"`, `"sdxl"`
    and `"sd35-medium"` have the published size (the last without T5).
    """

    model_name_or_path: str = field(
        default="small", metadata={"help": f"Hub id, folder, or with random weights: {', '.join(RANDOM)}."}
    )


def run(argv: list[str]) -> None:
    """Times the real training step beside a bare loop, or, with `--estimate`, tells what published models take."""
    run_estimate(argv) if "--estimate" in argv else run_measure(argv)


def run_measure(argv: list[str]) -> None:
    """Trains for some steps on pictures without a subject, and prints where the time goes."""
    with tempfile.TemporaryDirectory() as folder:
        options, *_ = parse_options(argv, folder)
        warmup, steps = options.bench_warmup, options.bench_steps
        if options.json_file is not None:
            check_output_file(Path(options.json_file))
        result: dict[str, Any]
        if options.against is None:
            # In parts as many more, and one while FLOPs are counted.
            result = measure(make_trainer(argv, folder, warmup + 2 * steps + 1), warmup, steps, options.bare_loop)
            text = as_text(result, options.peak_tflops)
        else:
            try:
                others = [*argv, *shlex.split(options.against)]
            except ValueError as error:
                raise ValueError(
                    f"Found against={options.against!r}, which is no command line: {error}; close what is open"
                ) from None
            if replace(parse_options(others, folder)[0], method=options.method) != options:
                raise ValueError(
                    f"Found options of the measurement in `against={options.against!r}`, which is one for both "
                    "trainings: give them outside of it."
                )
            make_other = functools.partial(make_trainer, others, f"{folder}/against", warmup + steps)
            result = compare(make_trainer(argv, folder, warmup + steps), make_other, warmup)
            text = comparison_as_text(result, options.against)
    print(text)
    if options.json_file is not None:
        Path(options.json_file).write_text(json.dumps(result, indent=2) + "\n")


def parse_options(argv: list[str], folder: str) -> tuple[BenchArguments, Any, BenchModelArguments]:
    """
    What a command line says of the measurement, of the training and of the model.

    Raises:
        `ValueError`: with more than one process, or a length of its own.
    """
    choice = Parser(prog="trl-diffusion bench", add_help=False)
    choice.strict = False  # the rest of the options comes after
    choice.add_argument("--method", choices=METHODS, default="kto")
    config_class = getattr(trl_diffusion, f"{METHODS[choice.parse_known_args(argv)[0].method]}Config")
    parser = ConfigParser((BenchArguments, config_class, BenchModelArguments), prog="trl-diffusion bench")
    parser.set_defaults(output_dir=folder, report_to="none", save_strategy="no", disable_tqdm=True)
    options, config, model = parser.parse_args_and_config(argv, fail_with_unknown_args=True)
    if config.max_steps != -1:
        raise ValueError(
            f"Found max_steps={config.max_steps}, expected none: `bench_warmup` and `bench_steps` say how many steps "
            "are made."
        )
    if config.world_size > 1:
        raise ValueError(
            f"Found {config.world_size} processes, and one is measured: start `trl-diffusion bench` alone."
        )
    return options, config, model


def make_trainer(argv: list[str], folder: str, max_steps: int):
    """The trainer of a command line, on pictures without a subject."""
    options, config, model = parse_options(argv, folder)
    trainer_class = getattr(trl_diffusion, f"{METHODS[options.method]}Trainer")
    pipeline: Any = model.model_name_or_path
    if pipeline in RANDOM:
        pipeline = random_pipeline(pipeline).to(dtype=getattr(torch, model.dtype))
    else:
        check_model(pipeline)
        config.model_init_kwargs = model.init_kwargs() | (config.model_init_kwargs or {})
        check_before_loading(pipeline, **config.model_init_kwargs)
        pipeline = load_pipeline(pipeline, **config.model_init_kwargs)
        config.model_init_kwargs = None
    side = config.resolution if isinstance(config.resolution, int) else family_of(pipeline).default_resolution()
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    config.max_steps = max_steps
    return trainer_class(
        model=pipeline,
        args=config,
        train_dataset=synthetic_data(rows_per_step * min(max_steps, 8), side, trainer_class),
        peft_config=model.peft_config(),
    )


def make_estimate_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-diffusion bench", description="What training takes: parameters, FLOPs and memory, estimated."
    )
    parser.add_argument(
        "--estimate", action="store_true", help="estimate from published configurations, without weights or a GPU"
    )
    parser.add_argument(
        "--model", nargs="+", choices=list(published_models()), help="models of the estimate (all of them)"
    )
    parser.add_argument("--config", help="a training's options: model, batch, resolution, precision, LoRA, engine ...")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="kto",
        help="method of --config: a row of dpo and rpo has two images (kto)",
    )
    parser.add_argument("--batch_size", type=positive_int, help="images of a micro-batch; a pair has two (1)")
    parser.add_argument("--lora_r", type=positive_int, help="rank of the LoRA (16)")
    parser.add_argument("--resolution", type=positive_int, help="side of the images in pixels (the model's own)")
    parser.add_argument("--engine", choices=SHARDED, help="what shards the training; DDP is none (none)")
    parser.add_argument("--num_processes", type=positive_int, help="GPUs that the engine shards over (1)")
    return parser


@dataclass(frozen=True)
class Recipe:
    """What a training's options say to the estimate."""

    model: str
    mode: Mode
    batch_size: int
    resolution: int | None
    engine: str
    num_processes: int
    checkpointing: bool
    reference: bool
    cached_features: bool
    average: bool

    @classmethod
    def from_config(cls, file: str, method: str) -> "Recipe":
        """
        Reads a YAML file of options of `trl-diffusion kto` and the others.

        Raises:
            `ValueError`: if the estimate does not know the model, or an option that bears on the memory.
        """
        given = read_config([file])
        config_class = getattr(trl_diffusion, f"{METHODS[method]}Config")
        defaults: dict[str, Any] = {f.name: f.default for kind in (ModelArguments, config_class) for f in fields(kind)}
        options = defaults | given
        known = {
            *defaults,
            *(f.name for f in fields(ScriptArguments)),
            *(name[2:] for name in launch_options()),
            "env",
        }
        for name in given.keys() - known:
            raise ValueError(f"Found the unknown option {name!r} in {file!r}{suggestion(name, known)}")
        for name in ("per_device_train_batch_size", "lora_r", "num_processes"):
            value = options.get(name, 1)
            if type(value) is not int or value < 1:
                raise ValueError(f"Found {name}={value!r} in {file!r}, expected a whole number of at least 1")
        sources = {model["source"]: name for name, model in published_models().items()}
        if options["model_name_or_path"] not in sources:
            raise ValueError(
                f"Found model_name_or_path={given.get('model_name_or_path')!r}, expected one of {[*sources]}"
            )
        if options["load_in_8bit"]:
            raise ValueError(
                "Found `load_in_8bit`, which the estimate does not know; expected `load_in_4bit` or neither"
            )
        if options["resolution"] is not None and not isinstance(options["resolution"], int):
            raise ValueError(
                f"Found resolution={options['resolution']}, expected one number; give it as `--resolution`"
            )
        engine = given.get("accelerate_config", "none")
        engine = {"fsdp2": "fsdp", "multi_gpu": "none", "single_gpu": "none"}.get(engine, engine)
        if engine not in SHARDED:
            raise ValueError(
                f"Found accelerate_config={engine!r}, expected one of {[*SHARDED]}; give it as `--engine`"
            )
        lora = options["use_peft"]
        images = len(getattr(trl_diffusion, f"{METHODS[method]}Trainer").image_columns)
        return cls(
            model=sources[options["model_name_or_path"]],
            mode=Mode(
                lora_rank=options["lora_r"] if lora else None,
                bf16=options["bf16"] in (None, True),
                four_bit=options["load_in_4bit"],
                float32_base=lora and options["bf16"] in (None, True) and options["dtype"] == "float32",
            ),
            batch_size=images * options["per_device_train_batch_size"],
            resolution=options["resolution"],
            engine=engine,
            num_processes=given.get("num_processes", 1),
            checkpointing=next(
                options[name]
                for name in ("activation_checkpointing", "gradient_checkpointing")
                if options[name] is not None
            ),
            reference=issubclass(config_class, PreferenceConfig) and not options["precompute_ref_log_probs"],
            cached_features=options["cache_features"],
            average=options["ema_decay"] is not None,
        )

    def needs(self, memory: Memory) -> int:
        """Bytes on each device, of what an estimate of [`Recipe.mode`] found."""
        total = memory.total(
            checkpointing=self.checkpointing, reference=self.reference, cached_features=self.cached_features
        )
        if not self.average:
            return total
        # As many float32 numbers as are trained, sharded as the weights are.
        trained = memory.optimizer * (self.num_processes if "optimizer" in SHARDED[self.engine] else 1) // ADAMW_STATES
        return total + trained // (self.num_processes if "weights" in SHARDED[self.engine] else 1)


def run_estimate(argv: list[str]) -> None:
    """Prints a table for each published model, or for the training of `--config`."""
    args = make_estimate_parser().parse_args(argv)
    models = published_models()
    if args.config is None:
        recipe, modes, names = None, None, args.model or [*models]
        engine, num_processes = args.engine or "none", args.num_processes or 1
    else:
        found = Recipe.from_config(args.config, args.method)
        recipe = replace(
            found,
            mode=replace(found.mode, lora_rank=args.lora_r or found.mode.lora_rank),
            engine=args.engine or found.engine,
            num_processes=args.num_processes or found.num_processes,
        )
        modes, names = [recipe.mode], args.model or [recipe.model]
        engine, num_processes = recipe.engine, recipe.num_processes
        args.batch_size, args.resolution = args.batch_size or recipe.batch_size, args.resolution or recipe.resolution
    for name in names:
        model = models[name] if args.resolution is None else at_resolution(models[name], args.resolution)
        result = estimate(model, args.batch_size or 1, args.lora_r or 16, modes, engine, num_processes)
        print(as_markdown(result), end="\n\n", flush=True)
        if recipe is not None:
            size = recipe.needs(result.memory[recipe.mode])
            print(f"With the options of {args.config}: {size / 2**30:.1f} GiB on each GPU.", end="\n\n", flush=True)
