"""`trl-diffusion generate`."""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from ..callbacks import image_grid, sample_rows
from ..hub import load_trained
from .errors import Parser, check_output_dir, non_negative_float, positive_int, seed_number
from .inputs import check_model, read_lines


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="trl-diffusion generate", description="Draw images, and a grid of them.")
    parser.add_argument("--model_name_or_path", required=True, help="Hub id, pipeline folder, or a training's output")
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
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="dtype of the weights"
    )
    return parser


def run(argv: list[str]) -> None:
    """Writes `<prompt number>-<seed>.png` for each image, and `grid.png`."""
    args = make_parser().parse_args(argv)
    prompts = args.prompts or read_lines(args.prompts_file)
    check_output_dir(args.output_dir)
    check_model(args.model_name_or_path)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    pipeline = load_trained(args.model_name_or_path, dtype=args.dtype).to(device)
    kwargs = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    seeds = [args.seed + i for i in range(args.num_images_per_prompt)]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, prompt in enumerate(tqdm(prompts, desc="Drawing", unit="prompt")):
        rows += sample_rows(pipeline, [prompt], seeds, num_inference_steps=args.num_inference_steps, **kwargs)
        for seed, image in zip(seeds, rows[-1], strict=True):
            image.save(args.output_dir / f"{i:04d}-{seed}.png")
    image_grid(rows, prompts).save(args.output_dir / "grid.png")
    print(f"{len(prompts) * len(seeds)} images and grid.png written to {args.output_dir}.")
