"""`trl-diffusion beta measure` and `trl-diffusion beta convert`."""

import argparse
import tempfile
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset

from ..data.formats import declare_columns
from ..evaluation.calibration import FACTORS, Calibration, calibrate_beta, convert_beta
from .arguments import ModelArguments, ScriptArguments
from .errors import Parser, positive_float, positive_int
from .inputs import ConfigParser, check_model, load_data


METHODS = ("kto", "rpo", "dpo")
SHUFFLE_BUFFER = 1000
"""Rows of a stream among which those to measure with are chosen."""


@dataclass
class BetaArguments:
    """
    What to measure.

    Parameters:
        gradient_factor (`float`, *optional*, defaults to `0.5`):
            Wanted mean slope of the loss after the steps, as a share of that at the start.
        num_rows (`int`, *optional*, defaults to `256`):
            Rows of the data set to train on and to measure with, chosen at random by `seed`; of a stream, from the
            first rows of each file.
        num_steps (`int`, *optional*, defaults to `10`):
            Optimizer steps at the learning rate of the training, without warm-up.
    """

    gradient_factor: float = field(
        default=0.5, metadata={"help": "Wanted slope of the loss, as a share of the start's."}
    )
    num_rows: int = field(default=256, metadata={"help": "Rows to train on and to measure with, chosen at random."})
    num_steps: int = field(default=10, metadata={"help": "Optimizer steps, at the full learning rate."})

    def __post_init__(self):
        for option in ("num_rows", "num_steps"):
            if getattr(self, option) < 1:
                raise ValueError(f"`--{option}` must be at least 1, found {getattr(self, option)}.")
        if not 0 < self.gradient_factor < 1:
            raise ValueError(f"`--gradient_factor` must be between 0 and 1, found {self.gradient_factor}.")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-diffusion beta",
        description="Find the beta of a model and a data set, or what another code base's beta is here.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    measure = commands.add_parser(
        "measure",
        help="a few steps of a training, and the beta that would brake it by then",
        description="Trains some steps on some rows without a brake, in one process, and prints the log-ratios and "
        "the beta at which the loss would by then be flatter by a given factor. Nothing is saved; of the training's "
        "options those for its schedule, for saving, evaluating, reporting and pictures, and for what is computed "
        "beforehand do not apply.",
    )
    measure.add_argument("method", choices=METHODS, help="options after it are the method's own")
    convert = commands.add_parser(
        "convert",
        help="the beta that is as strong elsewhere",
        description="Prints the beta of each trainer here that is as strong as a number from another code base.",
    )
    convert.add_argument("--beta", type=positive_float, required=True, help="the number there")
    convert.add_argument(
        "--source",
        choices=sorted(FACTORS),
        required=True,
        help="the Diffusion-DPO authors' code; diffusers' example script for SD or SDXL; the Diffusion-KTO authors; "
        "DPO in the code bases for flow models; `sum`: a code that sums squared errors over the latent dimensions, as "
        "SimpleTuner does, without a factor 1/2; or a trainer here",
    )
    convert.add_argument(
        "--latent_elements", type=positive_int, help="for `sum`: channels x height x width of a latent image"
    )
    return parser


def run(argv: list[str]) -> None:
    """`measure` takes the options of the method's training, with a configuration file too; see [`calibrate_beta`]."""
    if argv[:1] == ["measure"] and argv[1:2] and argv[1] in METHODS:
        measure(argv[1], argv[2:])
        return
    args = make_parser().parse_args(argv)
    for target in METHODS:
        beta = convert_beta(args.beta, args.source, target, latent_elements=args.latent_elements)
        print(f"{target}: {beta:g}")


def measure(method: str, argv: list[str]) -> None:
    import trl_diffusion

    name = f"Diffusion{method.upper()}"
    config_class, trainer_class = getattr(trl_diffusion, f"{name}Config"), getattr(trl_diffusion, f"{name}Trainer")
    parser = ConfigParser(
        (BetaArguments, ScriptArguments, config_class, ModelArguments), prog=f"trl-diffusion beta measure {method}"
    )
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--output_dir", folder, "--save_strategy", "no", "--eval_strategy", "no", "--report_to", "none"]
        beta_args, script_args, training_args, model_args = parser.parse_args_and_config([*argv, *quiet])
        check_model(model_args.model_name_or_path)
        dataset = random_rows(script_args, beta_args.num_rows, training_args.seed)
        asked = training_args.beta
        training_args.max_steps = beta_args.num_steps
        training_args.lr_scheduler_type, training_args.warmup_steps = "constant", 0
        training_args.validation_prompts, training_args.push_to_hub = None, False
        training_args.cache_features, training_args.precompute_ref_log_probs = False, False
        training_args.model_init_kwargs = model_args.init_kwargs() | (training_args.model_init_kwargs or {})
        trainer = trainer_class(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=dataset,
            peft_config=model_args.peft_config(),
        )
        found = calibrate_beta(trainer, gradient_factor=beta_args.gradient_factor, betas=(asked,))
    print(describe(found, beta_args.gradient_factor, method, asked))


def random_rows(script_args: ScriptArguments, count: int, seed: int) -> Dataset:
    """
    Rows of the training data, chosen by `seed`: the first ones may all have one label, as in sorted data. Of a stream
    they are from the first `SHUFFLE_BUFFER` rows, at least `count`, of files in random order.
    """
    dataset = load_data(
        script_args.dataset_name,
        script_args.dataset_config,
        script_args.dataset_train_split,
        script_args.dataset_streaming,
    )
    if not script_args.dataset_streaming:
        return dataset.select(np.random.default_rng(seed).permutation(len(dataset))[:count])
    dataset = declare_columns(dataset).shuffle(seed, buffer_size=max(count, SHUFFLE_BUFFER))
    return Dataset.from_list(list(dataset.take(count)), features=dataset.features)


def describe(found: Calibration, gradient_factor: float, method: str, asked: float) -> str:
    """The calibration in words."""
    lines = [
        f"after {found.steps} steps without a brake, {found.rows} rows:",
        f"log-ratio e_ref - e_theta: {found.scale:.3g} (root mean square), mean of chosen {found.chosen:.3g}, of "
        f"rejected {found.rejected:.3g}",
        f"beta of {method} and the mean slope that it leaves of the loss, 1 being that of the start:",
    ]
    for beta, factor in found.factors.items():
        note = " <- wanted" if beta == found.beta else " <- yours" if beta == asked else ""
        lines.append(f"{beta:>12.4g}  {factor:.3f}{note}")
    if found.beta is None:
        lines.append(
            f"No beta leaves a slope of {gradient_factor:g}: too many rows are still on the wrong side; take more "
            "steps (`--num_steps`) or a higher `--gradient_factor`."
        )
    return "\n".join(lines)
