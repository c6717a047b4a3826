"""Aligns the emoji base model with likes and dislikes, and shows what changed.

    python examples/emoji/demo.py --output_dir outputs/demo

Liked are the black silhouettes, disliked the three coloured styles; a quarter of the prompts never occurs in the
feedback. Prints the share of samples in the liked style before and after, and writes to the output folder
`before_after.png`, `curves.png`, `results.json` and the trained pipeline. Further options are those of
`trl-diffusion kto`, on top of kto.yaml.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common import HERE, LIKED
from datasets import load_dataset
from PIL import Image, ImageDraw, ImageFont
from scoring import Judges, Sample, draw

from trl_diffusion import DiffusionKTOConfig, DiffusionKTOTrainer
from trl_diffusion.cli.training import make_parser, make_trainer
from trl_diffusion.evaluation.win_rate import wilson_interval


KINDS = {"feedback": "prompts with feedback", "held_out": "held-out prompts"}


def summarise(samples: list[Sample], judges: Judges, all_prompts: list[str]) -> dict[str, float]:
    liked = judges.styles([sample.image for sample in samples]).count(LIKED)
    low, high = wilson_interval(liked / len(samples), len(samples))
    score, top1 = judges.content(samples, all_prompts)
    return {
        "samples": len(samples),
        "liked_share": liked / len(samples),
        "liked_low": low,
        "liked_high": high,
        "clip_score": score,
        "clip_top1": top1,
    }


def before_after(pictures: dict[str, dict[str, list[Sample]]], rows: dict[str, int], columns: int = 3) -> Image.Image:
    """Left the base model, right the trained one, the same seeds; some prompts of each kind."""
    side, gap, head, name = 96, 28, 26, 168
    font, bold = ImageFont.load_default(size=15), ImageFont.load_default(size=17)
    width, count = name + 2 * columns * side + gap, sum(rows.values())
    sheet = Image.new("RGB", (width, head * (1 + len(rows)) + count * side), "white")
    canvas = ImageDraw.Draw(sheet)
    for k, title in enumerate(("before", "after")):
        centre = name + k * (columns * side + gap) + columns * side / 2
        canvas.text((centre, head / 2), title, "black", bold, anchor="mm")
    top = head
    for kind, number in rows.items():
        canvas.text((6, top + head / 2), KINDS[kind], "dimgray", bold, anchor="lm")
        top += head
        prompts = list(dict.fromkeys(sample.prompt for sample in pictures["before"][kind]))
        for prompt in prompts[:: max(1, len(prompts) // number)][:number]:
            canvas.text((6, top + side / 2), prompt, "black", font, anchor="lm")
            for k, when in enumerate(("before", "after")):
                own = [sample for sample in pictures[when][kind] if sample.prompt == prompt][:columns]
                for j, sample in enumerate(own):
                    left = name + k * (columns * side + gap) + j * side
                    sheet.paste(sample.image.resize((side, side), Image.Resampling.LANCZOS), (left, top))
            top += side
    return sheet


def curves(history: list[dict], results: dict[str, dict[str, dict[str, float]]]) -> plt.Figure:
    """Training rewards, errors relative to the reference, and the measured share of the liked style."""
    logs = [entry for entry in history if "loss" in entry]
    steps = [entry["step"] for entry in logs]
    figure, (rewards, errors, shares) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name, label, colour in (("chosen", "liked", "tab:green"), ("rejected", "disliked", "tab:red")):
        rewards.plot(steps, [entry.get(f"rewards/{name}", float("nan")) for entry in logs], color=colour, label=label)
        ratio = [
            entry.get(f"errors/{name}", float("nan")) / entry.get(f"ref_errors/{name}", float("nan")) for entry in logs
        ]
        errors.plot(steps, ratio, color=colour, label=label)
    rewards.set(title="reward: beta x (reference error - policy error)", xlabel="step")
    errors.set(title="policy error / reference error", xlabel="step")
    for axis, level in ((rewards, 0), (errors, 1)):
        axis.axhline(level, color="black", linewidth=0.6)
        axis.legend()
    for i, kind in enumerate(KINDS):
        for j, (when, colour) in enumerate((("before", "lightgray"), ("after", "tab:green"))):
            r = results[kind][when]
            spread = [[r["liked_share"] - r["liked_low"]], [r["liked_high"] - r["liked_share"]]]
            x = i + 0.36 * (j - 0.5)
            shares.bar(x, r["liked_share"], 0.34, yerr=spread, capsize=4, color=colour, label=None if i else when)
    shares.set(title="share of the liked style, 95 % interval", ylim=(0, 1.2))
    shares.set_xticks(range(len(KINDS)), KINDS.values())
    shares.legend(loc="upper center", ncols=2)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--samples", type=int, default=120, help="samples of each kind of prompt, at least")
    args, training_options = parser.parse_known_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    prompts = {kind: load_dataset(str(HERE / "data"), "prompts", split=kind)["prompt"][:] for kind in KINDS}
    all_prompts = [prompt for part in prompts.values() for prompt in part]
    judges = Judges()
    options = ["--config", str(HERE / "kto.yaml"), "--output_dir", str(args.output_dir), "--overwrite_output_dir"]
    options += training_options
    options += ["--model_name_or_path", str(HERE / "base"), "--dataset_name", str(HERE / "data")]
    script_args, training_args, model_args = make_parser(DiffusionKTOConfig, "demo").parse_args_and_config(options)
    trainer = make_trainer(DiffusionKTOTrainer, script_args, training_args, model_args)

    pictures: dict[str, dict[str, list[Sample]]] = {"before": {}, "after": {}}
    results: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in KINDS}

    def measure(when: str) -> None:
        for kind, names in prompts.items():
            samples = draw(trainer.pipeline, names, -(-args.samples // len(names)), f"sampling {when}, {KINDS[kind]}")
            pictures[when][kind] = samples
            results[kind][when] = summarise(samples, judges, all_prompts)

    measure("before")
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    measure("after")
    trainer.save_model()

    rows = {"feedback": 6, "held_out": 6}
    before_after(pictures, rows).quantize(256).save(args.output_dir / "before_after.png", optimize=True)
    curves(trainer.state.log_history, results).savefig(args.output_dir / "curves.png", dpi=100)
    report = {"training_seconds": seconds, "steps": trainer.state.global_step, **results}
    (args.output_dir / "results.json").write_text(json.dumps(report, indent=2) + "\n")

    print(f"\nTrained {trainer.state.global_step} steps in {seconds:.0f} s. Liked: {LIKED}.")
    for kind, title in KINDS.items():
        before, after = results[kind]["before"], results[kind]["after"]
        share = " -> ".join(
            f"{100 * r['liked_share']:.0f} % [{100 * r['liked_low']:.0f}, {100 * r['liked_high']:.0f}]"
            for r in (before, after)
        )
        print(
            f"{title} ({before['samples']} samples): liked style {share}; CLIP score "
            f"{before['clip_score']:.1f} -> {after['clip_score']:.1f} "
            f"({100 * after['clip_score'] / before['clip_score']:.0f} % of the base's); own prompt recognised "
            f"{100 * before['clip_top1']:.0f} % -> {100 * after['clip_top1']:.0f} %"
        )
    print(f"Pictures: {args.output_dir / 'before_after.png'}, {args.output_dir / 'curves.png'}")


if __name__ == "__main__":
    main()
