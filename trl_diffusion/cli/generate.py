"""`trl-diffusion generate`."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..callbacks import image_grid, sample_rows
from ..data.buckets import Size, check_size, parse_sizes
from ..families import size_multiple
from ..hub import load_trained
from .errors import Parser, check_output_dir, non_negative_float, positive_int, seed_number
from .inputs import check_model, read_lines


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="trl-diffusion generate", description="Draw images, and a grid of them.")
    parser.add_argument(
        "--model_name_or_path", required=True, help="Hub id, pipeline folder, a training's output, or an exported file"
    )
    parser.add_argument(
        "--base_model", help="an adapter's base model, instead of the one that it names: Hub id or folder"
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompts", nargs="+", help="one row of the grid per prompt")
    prompts.add_argument("--prompts_file", type=Path, help="text file, one prompt per line")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the pictures go")
    parser.add_argument("--num_images_per_prompt", type=positive_int, default=4, help="images per prompt (4)")
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="the i-th image of each prompt starts from seed + i (0)"
    )
    parser.add_argument("--num_inference_steps", type=positive_int, default=25, help="sampling steps (25)")
    parser.add_argument("--guidance_scale", type=non_negative_float, help="guidance scale (the pipeline's own)")
    parser.add_argument(
        "--resolution", type=image_size, help="SIDE or HEIGHTxWIDTH of the images in pixels (the pipeline's own)"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="dtype of the weights"
    )
    return parser


def image_size(text: str) -> Size:
    """An option's type: `512` or `832x1216`, height before width."""
    try:
        (size,) = parse_sizes(text)
        if min(size) < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected SIDE such as 512, or HEIGHTxWIDTH such as 832x1216"
        ) from None
    return size


def pipeline_name(model: str, base_model: str | None = None) -> str:
    """The Hub id or folder of the pipeline behind a model: of an adapter its base, or `base_model` instead of it."""
    adapter = Path(model) / "adapter_config.json"
    if not adapter.is_file():
        return model
    return base_model or json.loads(adapter.read_text())["base_model_name_or_path"]


def check_resolution(size: Size | None, model: str, base_model: str | None = None) -> None:
    """
    Checks that a model generates images of a size, before its weights are loaded.

    Args:
        size (`tuple[int, int]`, *optional*): Height and width.
        model (`str`): Hub id, folder or file, as [`~hub.load_trained`] takes it.
        base_model (`str`, *optional*): The base model of an adapter, instead of the one that it names.

    Raises:
        `ValueError`: if it does not.
    """
    if size is None or os.path.isfile(model):
        return
    found = size_multiple(pipeline_name(model, base_model))
    if found is not None:
        check_size(size, *found)


def run(argv: list[str]) -> None:
    """Writes `<prompt number>-<seed>.png` for each image, and `grid.png`."""
    args = make_parser().parse_args(argv)
    prompts = args.prompts or read_lines(args.prompts_file)
    check_output_dir(args.output_dir)
    check_model(args.model_name_or_path, base_model=args.base_model)
    check_resolution(args.resolution, args.model_name_or_path, args.base_model)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    pipeline = load_trained(args.model_name_or_path, args.base_model, dtype=args.dtype).to(device)
    kwargs: dict[str, Any] = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    if args.resolution is not None:
        kwargs |= {"height": args.resolution[0], "width": args.resolution[1]}
    seeds = [args.seed + i for i in range(args.num_images_per_prompt)]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, prompt in enumerate(tqdm(prompts, desc="Drawing", unit="prompt")):
        rows += sample_rows(pipeline, [prompt], seeds, num_inference_steps=args.num_inference_steps, **kwargs)
        for seed, image in zip(seeds, rows[-1], strict=True):
            image.save(args.output_dir / f"{i:04d}-{seed}.png")
    image_grid(rows, prompts).save(args.output_dir / "grid.png")
    print(f"{len(prompts) * len(seeds)} images and grid.png written to {args.output_dir}.")
