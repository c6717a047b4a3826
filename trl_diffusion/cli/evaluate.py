"""`trl-diffusion evaluate`."""

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from ..data.buckets import show_size
from ..data.formats import check_dataset
from ..data.paths import folder_of, inside_only
from ..evaluation.images import ImageFolder
from ..evaluation.implicit import implicit_accuracy
from ..evaluation.prompts import read_prompts
from ..evaluation.report import Evaluation, as_html, as_json, as_markdown, report_folder
from ..evaluation.win_rate import WinRate
from ..export import load_merged
from ..families import check_before_loading, family_of
from ..files import written_whole
from ..hub import is_adapter, load_trained
from ..rewards import SCORERS, load_scorer, score_images, scorer_names
from ..rewards.base import default_device
from .errors import Parser, check_output_dir, non_negative_float, positive_int, seed_number
from .generate import check_resolution, image_size, pipeline_name
from .inputs import check_model, load_data, looks_like_a_path


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-diffusion evaluate",
        description="Compare a policy with a baseline: scores of images that both draw of the same prompts and seeds "
        "(--prompts_file, --scorers), how well the policy tells the images of preference data apart (--dataset_name), "
        "or both. Started again, the drawing goes on where it was interrupted.",
    )
    parser.add_argument(
        "--model_name_or_path", required=True, help="Hub id, pipeline folder, a training's output, or an exported file"
    )
    parser.add_argument("--baseline_name_or_path", required=True, help="the same, of what to compare with")
    parser.add_argument(
        "--base_model", help="the base model of the adapters, instead of the one that they name: Hub id or folder"
    )
    parser.add_argument(
        "--prompts_file",
        type=Path,
        help="txt (a prompt per line), json (lists of prompts or of objects: HPSv2), jsonl, csv, tsv (PartiPrompts) "
        "or parquet (Pick-a-Pic)",
    )
    parser.add_argument("--prompt_column", help="column or key of the prompts (prompt, Prompt or caption)")
    parser.add_argument("--max_prompts", type=positive_int, help="only the first so many")
    parser.add_argument(
        "--scorers",
        nargs="+",
        help=f"{', '.join(SCORERS)}, with a Hub id or folder as in clip=examples/emoji/clip, classifier=folder:label, "
        "aesthetic=head:clip; or module:function",
    )
    parser.add_argument(
        "--dataset_name", help="held-out preference data, pairs or images with a label: Hub id or local folder"
    )
    parser.add_argument("--dataset_config", help="configuration of the data set")
    parser.add_argument("--dataset_split", default="test", help="split of the data set (test)")
    parser.add_argument(
        "--allow_outside", action="store_true", help="let its rows name image files outside of its folder"
    )
    parser.add_argument(
        "--num_draws", type=positive_int, default=10, help="timesteps and noises for each of its rows (10)"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="where report.json, .md, .html, implicit.json and images/ go"
    )
    parser.add_argument(
        "--num_images_per_prompt", type=positive_int, default=5, help="images per prompt; odd is best (5)"
    )
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="the i-th image of each prompt starts from seed + i (0)"
    )
    parser.add_argument("--num_inference_steps", type=positive_int, default=25, help="sampling steps (25)")
    parser.add_argument("--guidance_scale", type=non_negative_float, help="guidance scale (each pipeline's own)")
    parser.add_argument(
        "--resolution", type=image_size, help="SIDE or HEIGHTxWIDTH of the images in pixels (the pipelines' own)"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="dtype of the weights"
    )
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        default=8,
        help="images drawn at once, of one prompt; rows of the data set (8)",
    )
    return parser


def load_on(device: torch.device, model: str, **kwargs: Any) -> DiffusionPipeline:
    return load_trained(model, **kwargs).to(device)


def run(argv: list[str]) -> None:
    """Images with [`compare_images`], preference data with [`compare_errors`]."""
    args = make_parser().parse_args(argv)
    if (args.prompts_file is None) != (args.scorers is None) or args.prompts_file is args.dataset_name is None:
        found = [name for name in ("prompts_file", "scorers", "dataset_name") if getattr(args, name) is not None]
        raise ValueError(
            f"Found {' and '.join(f'`--{name}`' for name in found) or 'nothing'} to compare with, expected "
            "`--prompts_file` with `--scorers`, `--dataset_name`, or all three."
        )
    if args.base_model and not (base_of(args, args.model_name_or_path) or base_of(args, args.baseline_name_or_path)):
        raise ValueError(
            f"Found `--base_model {args.base_model}` with two whole models, expected it with an adapter: drop it."
        )
    if args.prompts_file is not None:
        read_prompts(args.prompts_file, args.prompt_column)
    for spec in args.scorers or ():
        place = spec.partition("=")[2].partition(":")[0]
        if place and looks_like_a_path(place) and not os.path.exists(place):
            raise ValueError(f"Found no folder {place!r} for `--scorers {spec}`, expected a folder or a Hub id")
    check_output_dir(args.output_dir)
    policy, baseline = args.model_name_or_path, args.baseline_name_or_path
    check_model(policy, base_model=base_of(args, policy))
    check_model(baseline, "--baseline_name_or_path", base_model=base_of(args, baseline))
    check_resolution(args.resolution, policy, base_of(args, policy))
    check_resolution(args.resolution, baseline, base_of(args, baseline))
    if args.dataset_name is not None:
        compare_errors(args)
    if args.prompts_file is not None:
        compare_images(args)


def base_of(args: argparse.Namespace, model: str) -> str | None:
    """What `--base_model` means for one of the two models."""
    return args.base_model if is_adapter(model) or os.path.isfile(model) else None


def compare_errors(args: argparse.Namespace) -> None:
    """The policy's implicit reward against the baseline; see [`~evaluation.implicit_accuracy`]."""
    from ..trainer.dpo_trainer import DiffusionDPOConfig, DiffusionDPOTrainer
    from ..trainer.kto_trainer import DiffusionKTOConfig, DiffusionKTOTrainer

    dataset = load_data(args.dataset_name, args.dataset_config)
    if args.dataset_split not in dataset:
        raise ValueError(
            f"The data set {args.dataset_name!r} has no split {args.dataset_split!r}: found {list(dataset)}; choose "
            "with `--dataset_split`."
        )
    dataset = inside_only(dataset[args.dataset_split], folder_of(args.dataset_name), args.allow_outside)
    single = "label" in dataset.column_names
    config_class, trainer_class = (
        (DiffusionKTOConfig, DiffusionKTOTrainer) if single else (DiffusionDPOConfig, DiffusionDPOTrainer)
    )
    check_dataset(dataset, trainer_class.columns, f"data set {args.dataset_name!r}")  # before models are loaded
    policy, baseline = args.model_name_or_path, args.baseline_name_or_path
    for model in (policy, baseline):
        if not os.path.isfile(model):
            check_before_loading(pipeline_name(model, base_of(args, model)))
    device = default_device()
    trainer = trainer_class(
        model=load_merged(policy, base_of(args, policy), dtype="float32"),
        ref_model=family_of(load_merged(baseline, base_of(args, baseline), dtype="float32")).denoiser,
        # A beta of 1: rewards are differences of mean squared errors. The accuracy does not depend on it.
        args=config_class(
            str(args.output_dir),
            beta=1.0,
            seed=args.seed,
            resolution=None if args.resolution is None else [show_size(args.resolution)],
            per_device_train_batch_size=max(2, args.batch_size),
            per_device_eval_batch_size=args.batch_size,
            bf16=args.dtype == "bfloat16",
            fp16=args.dtype == "float16",
            use_cpu=device.type == "cpu",
            report_to="none",
        ),
        train_dataset=dataset,
    )
    result = implicit_accuracy(trainer, dataset, num_draws=args.num_draws)
    kind = (
        "images on their side of the reference point" if single else "pairs whose chosen image has the higher reward"
    )
    lines = [
        f"# Implicit reward of {args.model_name_or_path} against {args.baseline_name_or_path}",
        "",
        f"{result.accuracy.n} rows of {args.dataset_name} ({args.dataset_split}), {args.num_draws} draws each. In "
        "brackets 95 % intervals (Wilson).",
        "",
        f"| noise | {kind} |",
        "|---|---|",
        f"| all | {as_share(result.accuracy)} |",
        *(f"| quarter {i + 1} | {as_share(part)} |" for i, part in enumerate(result.bins)),
        "",
        f"Mean of e_ref - e_theta: chosen {result.chosen:.3g}, rejected {result.rejected:.3g}.",
        "",
    ]
    record = {
        "model": args.model_name_or_path,
        "baseline": args.baseline_name_or_path,
        "dataset": [args.dataset_name, args.dataset_config, args.dataset_split],
        **result._asdict(),
        "accuracy": result.accuracy._asdict(),
        "bins": [part and part._asdict() for part in result.bins],
    }
    about = {name: record[name] for name in ("model", "baseline", "dataset")}
    target = report_folder(args.output_dir, "implicit.json", about)
    with written_whole(target) as staging:
        (staging / "implicit.json").write_text(json.dumps(record, indent=1) + "\n")
        (staging / "implicit.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    print(f"implicit.json and implicit.md written to {target}.")


def as_share(found: WinRate | None) -> str:
    return "–" if found is None else f"{found.rate:.1%} [{found.low:.1%}, {found.high:.1%}]"


def compare_images(args: argparse.Namespace) -> None:
    """Draws, scores and compares; see [`~evaluation.compare`] for the statistics."""
    prompts = read_prompts(args.prompts_file, args.prompt_column)[: args.max_prompts]
    if len(prompts) < 2:
        raise ValueError(f"Found {len(prompts)} prompts, expected at least 2: a single one shows no spread.")
    seeds = [args.seed + i for i in range(args.num_images_per_prompt)]
    device = default_device()
    sys.path.append(os.getcwd())  # for a user's own module:function, as `python -m` would find it
    scorers = scorer_names(args.scorers)
    for name, spec in scorers.items():
        # A scorer that does not work is found out now, and not after hours of drawing.
        score_images(name, load_scorer(spec), [Image.new("RGB", (64, 64), "gray")], prompts[:1])

    kwargs: dict[str, Any] = {"num_inference_steps": args.num_inference_steps}
    if args.guidance_scale is not None:
        kwargs["guidance_scale"] = args.guidance_scale
    if args.resolution is not None:
        kwargs |= {"height": args.resolution[0], "width": args.resolution[1]}
    settings = {**kwargs, "dtype": args.dtype, "device": device.type}
    names = {"policy": args.model_name_or_path, "baseline": args.baseline_name_or_path}
    folders = {}
    for who, model in names.items():
        base_model = base_of(args, model)
        folders[who] = ImageFolder(args.output_dir / "images", model, settings, base_model)
        # The pipeline is held by this call alone, so that there is never more than one model in memory.
        load = functools.partial(load_on, device, model, base_model=base_model, dtype=args.dtype)
        folders[who].draw(load, prompts, seeds, args.batch_size, f"Drawing, {who}", **kwargs)

    scores: dict[str, dict[str, list[list[float]]]] = {who: {} for who in names}
    for name, spec in scorers.items():
        scorer = load_scorer(spec)
        for who, folder in folders.items():
            scores[who][name] = [
                score_images(name, scorer, [folder.load(prompt, seed) for seed in seeds], [prompt] * len(seeds))
                for prompt in tqdm(prompts, desc=f"Scoring, {name}, {who}", unit="prompt")
            ]
        del scorer

    evaluation = Evaluation(
        model=names["policy"],
        baseline=names["baseline"],
        prompts=prompts,
        seeds=seeds,
        scores=scores["policy"],
        baseline_scores=scores["baseline"],
        settings=settings,
    )
    comparisons = evaluation.comparisons()
    table = as_markdown(evaluation, comparisons)
    page = as_html(
        evaluation,
        comparisons,
        lambda prompt, seed: (folders["policy"].load(prompt, seed), folders["baseline"].load(prompt, seed)),
    )
    about = {"model": evaluation.model, "baseline": evaluation.baseline, "settings": settings}
    target = report_folder(args.output_dir, "report.json", about)
    with written_whole(target) as staging:
        (staging / "report.json").write_text(json.dumps(as_json(evaluation, comparisons), indent=1) + "\n")
        (staging / "report.md").write_text(table, encoding="utf-8")
        (staging / "report.html").write_text(page, encoding="utf-8")
    print(table)
    print(f"report.json, report.md and report.html written to {target}.")
