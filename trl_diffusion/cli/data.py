"""`trl-diffusion data inspect` and `trl-diffusion data convert`."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset

from ..data import converters
from ..data.buckets import Size, parse_sizes, show_size
from ..data.formats import AnyDataset
from ..data.inspection import PROBLEMS, DataReport, check_split_is_new, inspect_dataset, write_parquet
from ..data.paths import folder_of, inside_only
from .errors import Parser, check_data_file, check_output_dir, non_negative_int
from .inputs import load_data, reading


# ---- What it takes to read a layout --------------------------------------------------------------------------------


def _hub_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset_name", required=True, help="Hub id or local folder, as `load_dataset` takes it")
    parser.add_argument("--dataset_config", help="configuration of the data set")
    parser.add_argument("--dataset_split", default="train", help="split to read (train)")


def _hub(args: argparse.Namespace) -> AnyDataset:
    return load_data(args.dataset_name, args.dataset_config, args.dataset_split, streaming=True)


def _files(args: argparse.Namespace) -> dict[str, Any]:
    """Which files the rows of a data set may name, as the converters take it."""
    return {"image_dir": folder_of(args.dataset_name), "allow_outside": args.allow_outside}


def _pickapic_options(parser: argparse.ArgumentParser) -> None:
    _hub_options(parser)
    parser.add_argument(
        "--layout", choices=["paired", "unpaired"], default="paired", help="pairs, or single images (paired)"
    )
    parser.add_argument(
        "--ties", choices=["drop", "both_liked", "error"], default="drop", help="what becomes of ties (drop)"
    )


def _file_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", type=Path, required=True, help="the annotation file")
    parser.add_argument("--image_dir", type=Path, required=True, help="folder that the images' names are relative to")


def _kto_csv_options(parser: argparse.ArgumentParser) -> None:
    _file_options(parser)
    parser.add_argument(
        "--policy",
        choices=["liked_once", "liked_always"],
        default="liked_once",
        help="when an image that won and lost is liked (liked_once)",
    )


def _hpdv2_options(parser: argparse.ArgumentParser) -> None:
    _file_options(parser)
    parser.add_argument("--ties", choices=["drop", "error"], default="drop", help="what becomes of ties (drop)")


def _folders_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--liked_dir", type=Path, required=True, help="liked images, a .txt caption beside each")
    parser.add_argument("--disliked_dir", type=Path, required=True, help="disliked images, likewise")


def _scores_options(parser: argparse.ArgumentParser) -> None:
    _hub_options(parser)
    parser.add_argument("--score", default="score", help="column of the scores (score)")
    parser.add_argument("--threshold", type=float, help="smallest score of a liked image")
    parser.add_argument("--top", type=float, help="share of liked images, instead of a threshold")
    parser.add_argument("--bottom", type=float, help="share of disliked images, instead of a threshold")


def _webdataset_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", nargs="+", required=True, help="tar files")
    parser.add_argument("--prompt", default="txt", help="field of the prompts (txt)")
    parser.add_argument("--image", default="jpg", help="field of the images (jpg)")
    parser.add_argument("--label", default="cls", help="field of the labels (cls)")
    parser.add_argument("--chosen", help="field of the chosen images, for pairs")
    parser.add_argument("--rejected", help="field of the rejected images, for pairs")


@dataclass(frozen=True)
class Layout:
    """
    A layout of the data: its options, how to read it as a stream, what to count before it is converted, and whether
    there can be pairs in it.
    """

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    load: Callable[[argparse.Namespace], AnyDataset]
    count: Callable[[argparse.Namespace], dict[str, int]] = lambda args: {}
    has_pairs: Callable[[argparse.Namespace], bool] = lambda args: True


_SOURCES = ("dataset_name", "annotations", "liked_dir", "disliked_dir", "files")

LAYOUTS = {
    "preferences": Layout(
        "prompt, image, label or prompt, chosen, rejected: the trainers' own columns",
        _hub_options,
        lambda args: inside_only(_hub(args), folder_of(args.dataset_name), args.allow_outside),
    ),
    "pickapic": Layout(
        "Pick-a-Pic v1 and v2",
        _pickapic_options,
        lambda args: converters.from_pickapic(_hub(args), layout=args.layout, ties=args.ties, **_files(args)),
        lambda args: converters.count_pickapic(_hub(args)),
        lambda args: args.layout == "paired",
    ),
    "kto_csv": Layout(
        "the CSV of the Diffusion-KTO authors",
        _kto_csv_options,
        lambda args: converters.from_kto_csv(
            args.annotations, args.image_dir, policy=args.policy, streaming=True, allow_outside=args.allow_outside
        ),
        lambda args: converters.count_kto_csv(args.annotations),
        lambda args: False,
    ),
    "hpdv2": Layout(
        "HPD v2, train.json or test.json",
        _hpdv2_options,
        lambda args: converters.from_hpdv2(
            args.annotations, args.image_dir, ties=args.ties, streaming=True, allow_outside=args.allow_outside
        ),
        lambda args: converters.count_hpdv2(args.annotations),
    ),
    "hpdv3": Layout(
        "HPD v3",
        _file_options,
        lambda args: converters.from_hpdv3(
            args.annotations, args.image_dir, streaming=True, allow_outside=args.allow_outside
        ),
    ),
    "open_image_preferences": Layout(
        "open-image-preferences-v1-binarized",
        _hub_options,
        lambda args: converters.from_open_image_preferences(_hub(args), **_files(args)),
    ),
    "folders": Layout(
        "a folder of liked and one of disliked images",
        _folders_options,
        lambda args: converters.from_folders(
            args.liked_dir, args.disliked_dir, streaming=True, allow_outside=args.allow_outside
        ),
        has_pairs=lambda args: False,
    ),
    "scores": Layout(
        "scored images: prompt, image and a score",
        _scores_options,
        lambda args: converters.from_scores(
            _hub(args), score=args.score, threshold=args.threshold, top=args.top, bottom=args.bottom, **_files(args)
        ),
        has_pairs=lambda args: False,
    ),
    "webdataset": Layout(
        "tar files in the WebDataset format",
        _webdataset_options,
        lambda args: converters.from_webdataset(
            load_dataset("webdataset", data_files=args.files, split="train", streaming=True),
            prompt=args.prompt,
            image=args.image,
            label=args.label,
            chosen=args.chosen,
            rejected=args.rejected,
            allow_outside=args.allow_outside,
        ),
        has_pairs=lambda args: args.chosen is not None,
    ),
}


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trl-diffusion data", description="Look at preference data, or write them in the trainers' columns."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command, text in (
        ("inspect", "show the first rows, and count what is in the data"),
        ("convert", "inspect the data, and write them as parquet files"),
    ):
        layouts = commands.add_parser(command, help=text, description=text).add_subparsers(
            dest="source", required=True, metavar="layout", title="layouts"
        )
        for name, layout in LAYOUTS.items():
            options = layouts.add_parser(name, help=layout.help, description=layout.help)
            layout.add_options(options)
            options.add_argument(
                "--allow_outside",
                action="store_true",
                help="read images and captions also from files outside of the folders of the data",
            )
            options.add_argument("--first_rows", type=non_negative_int, default=3, help="how many rows to show (3)")
            options.add_argument(
                "--resolution",
                nargs="+",
                help="training sizes, such as 1024 or 832x1216, for which to count crops and enlargements (without: "
                "crops to a square)",
            )
            options.add_argument(
                "--headers_only",
                action="store_true",
                help="do not decode the images: faster, but files that are cut off count as good",
            )
            if command == "convert":
                options.add_argument("--output_dir", type=Path, required=True, help="folder of the parquet files")
                options.add_argument("--output_split", default="train", help="split that they are (train)")
                options.add_argument(
                    "--problems",
                    choices=["drop", "keep"],
                    help="what to do with all rows that have one of these problems",
                )
                for problem, meaning in PROBLEMS.items():
                    # What cannot be read cannot be kept either.
                    choices = ["drop"] if problem == "broken_image" else ["drop", "keep"]
                    options.add_argument(f"--{problem}", choices=choices, help=f"what to do with {meaning}")
    return parser


def describe(report: DataReport, counts: dict[str, int], buckets: list[Size] | None) -> str:
    """The report in words. Without `buckets` crops are those to a square, and nothing is said of enlargements."""
    lines = [f"{name.replace('_', ' ')}: {number:,}" for name, number in counts.items()]
    lines.append(f"{report.layout} data: {report.rows:,} rows, {report.prompts:,} different prompts")
    if report.liked is not None and report.rows:
        disliked = report.rows - report.liked
        lines.append(f"labels: {report.liked:,} liked ({report.liked / report.rows:.1%}), {disliked:,} disliked")
    lines.append(f"images: {report.images:,}, of which {report.different_images:,} differ")
    if report.sizes:
        common = ", ".join(f"{width} x {height} ({n:,})" for (width, height), n in report.sizes.most_common(5))
        sides = [side for size in report.sizes for side in size]
        lines.append(f"sizes: {common}; {len(report.sizes):,} in all, sides from {min(sides)} to {max(sides)}")
        target = " or ".join(map(show_size, buckets)) if buckets else "a square"
        lines.append(
            f"crops: {report.cropped(buckets or [(1, 1)]):,} images lose more than 10 % of their area to {target}"
        )
        if buckets:
            lines.append(f"enlarged: {report.upscaled(buckets):,} images are smaller than {target}")
    if report.transparent is not None:
        lines.append(f"transparent: {report.transparent:,} images, which training composites on white")
    lines.append(f"animated: {report.animated:,} images, of which training reads the first frame")
    for i, row in enumerate(report.first_rows):
        lines.append(f"row {i}: " + "; ".join(f"{name} {value!r}"[:100] for name, value in row.items()))
    lines += [f"{name}: {int(report.problems[name].sum()):,} {text}" for name, text in PROBLEMS.items()]
    return "\n".join(lines)


def policies_of(args: argparse.Namespace) -> dict[str, str]:
    """
    What to do with the rows that have a problem: "drop" or "keep" for each of [`PROBLEMS`].

    Raises:
        `ValueError`: if one of them is undecided.
    """
    policies = {problem: getattr(args, problem) or args.problems for problem in PROBLEMS}
    if args.problems == "keep":
        policies["broken_image"] = args.broken_image
    if not LAYOUTS[args.source].has_pairs(args):
        policies["identical_pair"] = "keep"  # there is none
    undecided = [f"--{problem}" for problem, policy in policies.items() if policy is None]
    if undecided:
        raise ValueError(
            f"Found no choice for {', '.join(undecided)}, expected one before the data are read: add `--problems "
            "drop`, or `--problems keep --broken_image drop`, or decide one by one; `trl-diffusion data inspect` "
            "counts such rows."
        )
    return policies


def run(argv: list[str]) -> None:
    """Streams: neither command needs more memory for more rows than some dozen bytes each."""
    args = make_parser().parse_args(argv)
    for file in getattr(args, "files", ()):
        check_data_file(file)
    if args.command == "convert":
        check_output_dir(args.output_dir)
    with reading(" and ".join(str(value) for name, value in vars(args).items() if value and name in _SOURCES)):
        inspect_or_convert(args)


def inspect_or_convert(args: argparse.Namespace) -> None:
    layout = LAYOUTS[args.source]
    buckets = parse_sizes(args.resolution) if args.resolution else None
    converting = args.command == "convert"
    policies = policies_of(args) if converting else {}
    if converting:
        check_split_is_new(args.output_dir, args.output_split)
    dataset = layout.load(args)
    counts = layout.count(args)
    report = inspect_dataset(dataset, decode=not args.headers_only, first_rows=args.first_rows)
    print(describe(report, counts, buckets))
    if converting:
        keep = report.keep(problem for problem, policy in policies.items() if policy == "drop")
        files = write_parquet(dataset, args.output_dir, split=args.output_split, keep=keep)
        print(f"{int(keep.sum()):,} of {report.rows:,} rows written to {args.output_dir} in {len(files)} files.")
