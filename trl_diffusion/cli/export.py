"""`trl-diffusion export`."""

import argparse
from pathlib import Path

import torch

from ..export import LORA_LAYOUTS, export_lora, export_merged
from .errors import Parser
from .inputs import check_model


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-diffusion export",
        description="Write a trained model for other programs; `trl-diffusion generate` reads all of it.",
    )
    parser.add_argument("--model_name_or_path", required=True, help="a training's output folder, or its Hub id")
    parser.add_argument(
        "--layout",
        required=True,
        choices=[*LORA_LAYOUTS, "merged", "single_file"],
        help="a LoRA for diffusers, for kohya's scripts and A1111, or for ComfyUI; or the whole model with what was "
        "trained merged into it, as a folder for diffusers, or as a single file in the layout of Stable Diffusion",
    )
    parser.add_argument("--output", type=Path, required=True, help="a .safetensors file; for 'merged' a folder")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the weights (as trained; merged: float32)",
    )
    return parser


def run(argv: list[str]) -> None:
    """Writes one file, or for `--layout merged` a folder."""
    args = make_parser().parse_args(argv)
    check_model(args.model_name_or_path)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    if args.layout in LORA_LAYOUTS:
        export_lora(args.model_name_or_path, args.output, layout=args.layout, dtype=dtype)
    else:
        export_merged(args.model_name_or_path, args.output, single_file=args.layout == "single_file", dtype=dtype)
    print(f"{args.output} written.")
