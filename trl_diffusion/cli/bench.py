"""`trl-diffusion bench`."""

import argparse
import functools
import json
import shlex
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

import trl_diffusion

from ..bench.estimate import as_markdown, estimate, published_models
from ..bench.measure import as_text, measure, synthetic_data
from ..bench.pipelines import RANDOM, random_pipeline
from ..bench.turns import compare, comparison_as_text
from ..families import family_of, load_pipeline
from .arguments import ModelArguments
from .errors import Parser, check_output_file, positive_int
from .inputs import ConfigParser, check_model


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
            others = [*argv, *shlex.split(options.against)]
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
    choice = argparse.ArgumentParser(add_help=False)
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
    parser.add_argument(
        "--batch_size", type=positive_int, default=1, help="images of a micro-batch; a pair has two (1)"
    )
    parser.add_argument("--lora_r", type=positive_int, default=16, help="rank of the LoRA (16)")
    return parser


def run_estimate(argv: list[str]) -> None:
    """Prints a table for each published model."""
    parser = make_estimate_parser()
    args = parser.parse_args(argv)
    models = published_models()
    for name in args.model or models:
        print(as_markdown(estimate(models[name], args.batch_size, args.lora_r)), end="\n\n", flush=True)
