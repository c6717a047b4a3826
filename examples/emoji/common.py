"""Shared helpers of the emoji example: which drawings exist, how they are rendered, which prompts are used."""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn


HERE = Path(__file__).resolve().parent
SIZE = 64
# style name -> npm package that carries the drawings
STYLES = {
    "noto": "@iconify-json/noto",
    "noto-v1": "@iconify-json/noto-v1",
    "fluent-flat": "@iconify-json/fluent-emoji-flat",
    "fluent-high-contrast": "@iconify-json/fluent-emoji-high-contrast",
}
LIKED = "fluent-high-contrast"
# chosen by hand: easy to recognise, clear as a silhouette, the same content in all four drawings
PROMPTS = (
    *("cat-face", "dog-face", "fox", "lion", "pig-face", "rabbit-face", "panda", "frog", "penguin", "owl", "duck"),
    *("turtle", "shark", "crab", "snail", "butterfly", "honeybee", "lady-beetle", "spider", "tulip", "sunflower"),
    *("cactus", "palm-tree", "mushroom", "grapes", "watermelon", "banana", "pineapple", "red-apple", "pear"),
    *("cherries", "strawberry", "carrot", "cheese-wedge", "hamburger", "french-fries", "pizza", "doughnut"),
    *("birthday-cake", "soft-ice-cream", "rocket", "airplane", "helicopter", "sailboat", "tractor", "anchor"),
    *("castle", "volcano", "alarm-clock", "crescent-moon", "umbrella", "snowflake", "trophy", "soccer-ball"),
    *("wrapped-gift", "jack-o-lantern", "guitar", "light-bulb", "key", "scissors", "bell", "crown", "candle", "bomb"),
)
GROUPS = {0: "smileys", 1: "people", 3: "animals-nature", 4: "food-drink", 5: "travel-places", 6: "activities"}
GROUPS |= {7: "objects", 8: "symbols", 9: "flags"}


@dataclass(frozen=True)
class Concept:
    """One emoji that all four sets draw."""

    name: str  # icon name, for example "red-apple"
    label: str  # caption, for example "red apple"
    tags: tuple[str, ...]
    group: str


def slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "").replace("'", "")).strip("-")


def svg_of(icons: dict, name: str) -> str | None:
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    # the high-contrast set paints with currentColor: black on the white canvas
    return f'{head} width="{SIZE}" height="{SIZE}" viewBox="{box}" color="black">{icon["body"]}</svg>'


def render(svg: str) -> Image.Image:
    import resvg_py  # needed to build the data only

    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def load_concepts(node_modules: Path) -> tuple[list[Concept], dict[str, dict]]:
    """All concepts that exist in every style, and the icon sets themselves."""
    if not (node_modules / "emojibase-data").is_dir():
        raise SystemExit(f"{node_modules} holds no emojibase-data: see the docstring of build_data.py")
    sets = {s: json.loads((node_modules / package / "icons.json").read_text()) for s, package in STYLES.items()}
    concepts = {}
    for entry in json.loads((node_modules / "emojibase-data/en/data.json").read_text()):
        name = slug(entry["label"])
        if entry.get("group") in GROUPS and all(svg_of(icons, name) for icons in sets.values()):
            tags = tuple(t for t in entry.get("tags", ()) if t != entry["label"])
            concepts[name] = Concept(name, entry["label"].lower(), tags, GROUPS[entry["group"]])
    return list(concepts.values()), sets


def load_drawings(node_modules: Path) -> tuple[list[Concept], np.ndarray]:
    """Every concept in every style: uint8 array of shape (concepts, styles, 64, 64, 3). Takes a few seconds."""
    concepts, sets = load_concepts(node_modules)
    images = [[np.asarray(render(svg_of(sets[s], c.name) or "")) for s in STYLES] for c in concepts]
    return concepts, np.asarray(images)


def to_tensor(drawings: np.ndarray) -> torch.Tensor:
    """Channels first, -1 to 1."""
    return torch.from_numpy(drawings).movedim(-1, -3).float() / 127.5 - 1


def is_test_name(name: str) -> bool:
    """One name in ten is kept out of the training of the VAE, of CLIP and of the judge, to measure them."""
    return zlib.crc32(name.encode()) % 10 == 0


def multiply_in_bfloat16(model: nn.Module) -> None:
    """Convolutions and linear layers only: twice as fast on CPUs with AMX, where autocast over all is not, since its
    attention and group norms are slow in bfloat16."""

    def wrap(forward: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return forward(*args, **kwargs).float()

        return wrapped

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.forward = wrap(module.forward)  # type: ignore[method-assign]


def held_out_names(concepts: list[Concept]) -> set[str]:
    """A quarter of the prompts, taken evenly from each group: no feedback ever shows them."""
    chosen = set()
    prompts = [c for c in concepts if c.name in PROMPTS]
    for group in {c.group for c in prompts}:
        names = sorted((c.name for c in prompts if c.group == group), key=lambda n: zlib.crc32(n.encode()))
        chosen |= set(names[: len(names) // 4])
    return chosen


def grid(images: list[Image.Image], columns: int, scale: int = 1) -> Image.Image:
    rows = -(-len(images) // columns)
    step = SIZE * scale
    sheet = Image.new("RGB", (columns * step, rows * step), "white")
    for i, image in enumerate(images):
        sheet.paste(image.resize((step, step), Image.Resampling.NEAREST), (i % columns * step, i // columns * step))
    return sheet
