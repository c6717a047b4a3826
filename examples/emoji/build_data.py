"""Build the emoji data set from npm packages that carry openly licensed drawings.

    npm install @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 @iconify-json/fluent-emoji-flat@1.2.6 \
        @iconify-json/fluent-emoji-high-contrast@1.2.6 emojibase-data@17.0.0
    python examples/emoji/build_data.py --node-modules node_modules

Writes the parquet files of four configurations to --out; the README.md there (committed) declares them for
`datasets.load_dataset`:

- drawings: every prompt in every style;
- feedback: likes and dislikes for Diffusion-KTO, liked is the style "fluent-high-contrast";
- preferences: the same judgement as pairs, for DPO-like methods;
- prompts: the prompts alone, split into those the feedback shows and those held out from it.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from common import HERE, LIKED, PROMPTS, STYLES, grid, held_out_names, load_concepts, render, svg_of
from datasets import Dataset, Features, Image, List, Value
from PIL.Image import Image as Picture


def png(picture: Picture) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node-modules", type=Path, default=Path("node_modules"))
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--grid", type=Path, default=HERE / "images/drawings.png", help="overview of all drawings")
    args = parser.parse_args()

    concepts, sets = load_concepts(args.node_modules)
    held_out = held_out_names(concepts)
    order = {name: i for i, name in enumerate(PROMPTS)}
    chosen = sorted((c for c in concepts if c.name in order), key=lambda c: order[c.name])
    if missing := set(PROMPTS) - {c.name for c in chosen}:
        raise SystemExit(f"not drawn in every style: {sorted(missing)}")
    pictures = {c.name: {s: render(svg_of(sets[s], c.name) or "") for s in STYLES} for c in chosen}
    images = {name: {s: png(p) for s, p in row.items()} for name, row in pictures.items()}

    drawings = [
        {
            "prompt": c.label,
            "tags": list(c.tags),
            "style": style,
            "group": c.group,
            "held_out": c.name in held_out,
            "image": images[c.name][style],
        }
        for c in chosen
        for style in STYLES
    ]
    shown = [c for c in chosen if c.name not in held_out]
    feedback = [
        {"prompt": c.label, "image": images[c.name][style], "label": style == LIKED} for c in shown for style in STYLES
    ]
    preferences = [
        {"prompt": c.label, "chosen": images[c.name][LIKED], "rejected": images[c.name][style]}
        for c in shown
        for style in STYLES
        if style != LIKED
    ]
    text, flag = Value("string"), Value("bool")
    columns = {"prompt": text, "tags": List(text), "style": text, "group": text, "held_out": flag, "image": Image()}
    tables = {
        "drawings/train": (drawings, columns),
        "feedback/train": (feedback, {"prompt": text, "image": Image(), "label": flag}),
        "preferences/train": (preferences, {"prompt": text, "chosen": Image(), "rejected": Image()}),
        "prompts/feedback": ([{"prompt": c.label} for c in shown], {"prompt": text}),
        "prompts/held_out": ([{"prompt": c.label} for c in chosen if c.name in held_out], {"prompt": text}),
    }
    for name, (rows, features) in tables.items():
        path = args.out / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=Features(features)).to_parquet(path)
        print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")
    args.grid.parent.mkdir(parents=True, exist_ok=True)
    grid([pictures[c.name][s] for c in chosen for s in STYLES], columns=16).save(args.grid, optimize=True)


if __name__ == "__main__":
    main()
