"""Draw with the base (or any pipeline that came from it) and measure style and content of the samples.

    python examples/emoji/evaluate.py --model examples/emoji/base --seeds 4

Prints, for the prompts with feedback and for the held-out ones: the share of each style (by the judge, and by the
nearest of the prompt's own four drawings), and how often the CLIP model finds the right prompt among all 64.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from common import HERE, STYLES, grid
from datasets import load_dataset
from diffusers import StableDiffusionPipeline
from scoring import Judges, draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "base")
    parser.add_argument("--seeds", type=int, default=4, help="pictures for each prompt")
    parser.add_argument("--grid", type=Path, help="write the samples as one picture")
    args = parser.parse_args()

    drawings = load_dataset(str(HERE / "data"), "drawings", split="train")
    prompts = list(dict.fromkeys(drawings["prompt"]))
    held_out = dict(zip(drawings["prompt"], drawings["held_out"], strict=True))
    pipeline = StableDiffusionPipeline.from_pretrained(args.model)
    samples = draw(pipeline, prompts, args.seeds)
    if args.grid:
        args.grid.parent.mkdir(parents=True, exist_ok=True)
        grid([sample.image for sample in samples], columns=4 * args.seeds).save(args.grid, optimize=True)

    judges = Judges()
    own = {(row["prompt"], row["style"]): np.asarray(row["image"], dtype=np.float32) for row in drawings}
    for name, wanted in (("prompts with feedback", False), ("held-out prompts", True)):
        part = [sample for sample in samples if held_out[sample.prompt] == wanted]
        print(f"{name}: {len(part)} samples")
        nearest = []
        for sample in part:
            x = np.asarray(sample.image, dtype=np.float32)
            errors = {s: float(np.square(own[sample.prompt, s] - x).mean()) for s in STYLES}
            nearest.append(min(errors, key=errors.__getitem__))
        styles = judges.styles([sample.image for sample in part])
        for title, values in (("style, judge", styles), ("style, nearest drawing", nearest)):
            counts = Counter(values)
            print(f"  {title}:", ", ".join(f"{s} {counts[s] / len(part):.3f}" for s in STYLES))
        score, top1 = judges.content(part, prompts)
        print(f"  content: CLIP score {score:.1f}, top-1 of {len(prompts)} {top1:.3f}")


if __name__ == "__main__":
    main()
