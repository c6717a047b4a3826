"""Training curves as a picture, drawn with Pillow, which the library needs anyway."""

import math
from typing import Any

from PIL import Image, ImageDraw, ImageFont


METRICS = ("loss", "rewards/margins", "rewards/accuracies", "health/error_growth/chosen")
"""What is drawn of a log, each with what the evaluation logs under the same name."""

WIDTH, HEIGHT = 400, 210  # of one panel
LEFT, TOP, RIGHT, BOTTOM = 62, 34, 14, 28  # from its edges to the plot
SHARPNESS, FINER = 2, 2  # pixels per unit in the file, and while drawing, in each pixel of the file
TRAINING, EVALUATION, GRID, TEXT = "#2563eb", "#ea580c", "#e5e7eb", "#374151"


def series(log_history: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Steps and finite values of a metric."""
    points = [(entry["step"], entry[name]) for entry in log_history if name in entry and "step" in entry]
    return [(step, value) for step, value in points if math.isfinite(value)]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, at most `most + 1`."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= most)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw_curves(log_history: list[dict[str, Any]]) -> Image.Image | None:
    """
    One panel for each of [`METRICS`], and for each win rate, of which the log has at least two values.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.

    Returns:
        `PIL.Image.Image`, or None if there is nothing to draw.
    """
    win_rates = {key.removeprefix("eval_") for entry in log_history for key in entry if "win_rate/" in key}
    panels = []
    for name in (*METRICS, *sorted(win_rates)):
        curves = [(series(log_history, name), TRAINING), (series(log_history, f"eval_{name}"), EVALUATION)]
        if max(len(points) for points, _ in curves) > 1:
            panels.append((name, curves))
    if not panels:
        return None
    scale, columns = SHARPNESS * FINER, min(2, len(panels))
    size = (columns * WIDTH * scale, math.ceil(len(panels) / columns) * HEIGHT * scale)
    image = Image.new("RGB", size, "white")
    for i, (name, curves) in enumerate(panels):
        _draw_panel(ImageDraw.Draw(image), i % columns * WIDTH, i // columns * HEIGHT, name, curves, scale)
    return image.reduce(FINER)


def _draw_panel(draw: ImageDraw.ImageDraw, x0: float, y0: float, name: str, curves, scale: int) -> None:
    font, heading = (ImageFont.load_default(size=size * scale) for size in (11, 13))
    steps, values = zip(*(point for points, _ in curves for point in points), strict=True)
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def place(step: float, value: float) -> tuple[float, float]:
        across, up = (step - first) / (last - first), (value - low) / (high - low)
        return (
            (x0 + LEFT + across * (WIDTH - LEFT - RIGHT)) * scale,
            (y0 + HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)) * scale,
        )

    draw.text(((x0 + LEFT) * scale, (y0 + 10) * scale), name, TEXT, heading)
    for value in ticks(low, high, 5):
        (left, y), (right, _) = place(first, value), place(last, value)
        draw.line([(left, y), (right, y)], GRID, scale)
        draw.text((left - 6 * scale, y), f"{value:.6g}", TEXT, font, anchor="rm")
    for step in ticks(first, last, 5):
        if step == int(step):
            x, y = place(step, low)
            draw.text((x, y + 8 * scale), f"{step:g}", TEXT, font, anchor="mt")
    labels = [("evaluation", EVALUATION), ("training", TRAINING)]
    right = (x0 + WIDTH - RIGHT) * scale
    for (points, colour), (label, _) in zip(reversed(curves), labels, strict=True):
        line = [place(*point) for point in points]
        if len(line) > 1:
            draw.line(line, colour, 2 * scale, joint="curve")
        if len(line) <= 30:
            for x, y in line:
                draw.ellipse([x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale], colour)
        if line:
            draw.text((right, (y0 + 12) * scale), label, colour, font, anchor="ra")
            right -= draw.textlength(f"{label}   ", font)
