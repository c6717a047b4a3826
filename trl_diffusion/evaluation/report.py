"""What an evaluation found: as JSON, as Markdown, and as one page that needs nothing but itself."""

import base64
import html
import io
import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .. import markdown
from .statistics import Comparison, Estimate, Scores, compare, median_win_rate
from .win_rate import WinRate


class Evaluation(NamedTuple):
    """
    The scores of a policy and a baseline on the same prompts and seeds.

    Args:
        model (`str`), baseline (`str`): Their names.
        prompts (`list[str]`): Prompts.
        seeds (`list[int]`): The seeds of each prompt's images.
        scores (`dict[str, Scores]`), baseline_scores (`dict[str, Scores]`):
            By scorer: one row per prompt, one number per seed.
        settings (`dict[str, Any]`): How the images were drawn.
    """

    model: str
    baseline: str
    prompts: list[str]
    seeds: list[int]
    scores: Mapping[str, Scores]
    baseline_scores: Mapping[str, Scores]
    settings: dict[str, Any]

    def comparisons(self) -> dict[str, Comparison]:
        """By scorer."""
        return {name: compare(scores, self.baseline_scores[name]) for name, scores in self.scores.items()}


def report_folder(root: Path, file: str, record: Mapping[str, Any]) -> Path:
    """
    Where a report goes: into `root`, or, where that holds the report of another comparison, into a folder of `root`
    that is named after the policy. The report of the same comparison is replaced.

    Args:
        root (`Path`): The output folder.
        file (`str`): Name of the report's JSON file.
        record (`dict[str, Any]`): What makes it another comparison: entries of that file, `model` among them.
    """
    name = re.sub(r"[^\w.-]+", "-", "/".join(Path(record["model"]).parts[-2:])).strip("-.") or "policy"
    for i in itertools.count():
        folder = root if i == 0 else root / (name if i == 1 else f"{name}-{i}")
        if not (folder / file).is_file():
            return folder
        try:
            found = dict(json.loads((folder / file).read_text(encoding="utf-8")))
        except (ValueError, TypeError):  # a file of somebody else's
            continue
        if all(found.get(key) == value for key, value in json.loads(json.dumps(record)).items()):
            return folder
    raise AssertionError


def as_json(evaluation: Evaluation, comparisons: dict[str, Comparison]) -> dict[str, Any]:
    """Everything, down to the score of each image, as what `json.dumps` takes."""
    results = {}
    for name, comparison in comparisons.items():
        wilson = median_win_rate(evaluation.scores[name], evaluation.baseline_scores[name])
        results[name] = {
            key: value._asdict() if isinstance(value, Estimate) else value
            for key, value in comparison._asdict().items()
        } | {"wilson": {"low": wilson.low, "high": wilson.high}}
    return {"results": results, **evaluation._asdict()}


def _rows(comparisons: dict[str, Comparison]) -> list[list[str]]:
    """The cells of the table, head first."""

    def estimate(e: Estimate, factor: float = 1.0, unit: str = "", sign: str = "") -> str:
        return f"{factor * e.value:{sign}.4g}{unit} [{factor * e.low:{sign}.4g}, {factor * e.high:{sign}.4g}]"

    head = [
        "scorer",
        "policy",
        "baseline",
        "difference: mean, median",
        "win rate (medians)",
        "win rate (pairs)",
        "wins-ties-losses",
    ]
    rows = [[*head, "p (sign test)"]]
    for name, c in comparisons.items():
        rows.append(
            [
                name,
                f"{c.mean:.4g}",
                f"{c.baseline_mean:.4g}",
                f"{estimate(c.difference, sign='+')}, {c.median_difference:+.4g}",
                estimate(c.win_rate, 100, " %"),
                estimate(c.pair_win_rate, 100, " %"),
                f"{c.wins}-{c.ties}-{c.losses}",
                f"{c.p_value:.2g}",
            ]
        )
    return rows


def verdict(name: str, comparison: Comparison, wilson: WinRate) -> str:
    """
    One sentence on what a scorer found, by the win rate of the medians and the wider of its two intervals, and on a
    mean difference that points the other way.

    Args:
        name (`str`): Of the scorer.
        comparison ([`Comparison`]): Of its scores.
        wilson ([`WinRate`]): The same win rate with Wilson's interval, see [`median_win_rate`].
    """
    rate, difference = comparison.win_rate, comparison.difference
    low, high = min(rate.low, wilson.low), max(rate.high, wilson.high)
    found = f"win rate {100 * rate.value:.3g} %, 95 % interval {100 * low:.3g} % to {100 * high:.3g} %"
    if low > 0.5:
        sentence = f"{name}: the policy scores higher than the baseline ({found})"
    elif high < 0.5:
        sentence = f"{name}: the policy scores lower than the baseline ({found})"
    else:
        sentence = f"{name}: no clear difference ({found}, which includes 50 %)"
    side = (rate.value > 0.5) - (rate.value < 0.5)
    if side * difference.value < 0 or (side == 0 and not difference.low <= 0 <= difference.high):
        larger = "gains" if difference.value > 0 else "losses"
        sentence += (
            f"; the mean difference of {difference.value:+.4g} comes from larger {larger} and not from more of them "
            f"(median difference {comparison.median_difference:+.4g})"
        )
    return sentence + "."


def _verdicts(evaluation: Evaluation, comparisons: dict[str, Comparison]) -> list[str]:
    return [
        verdict(name, c, median_win_rate(evaluation.scores[name], evaluation.baseline_scores[name]))
        for name, c in comparisons.items()
    ]


def _explanation(evaluation: Evaluation) -> str:
    images = "1 image" if len(evaluation.seeds) == 1 else f"{len(evaluation.seeds)} images"
    settings = ", ".join(f"{name} {value}" for name, value in evaluation.settings.items())
    return (
        f"{len(evaluation.prompts)} prompts, {images} each, the same seeds for both; "
        f"{settings}. In brackets 95 % bootstrap intervals over prompts; an interval without width means that all "
        "prompts agree, so the sentence on each scorer takes the wider of it and Wilson's. The median difference is "
        "that of the prompts' medians. The win rate of medians compares the median image of each "
        "prompt, that of pairs the images of the same prompt and seed; ties count one half. The sign test is "
        "two-sided, on the medians."
    )


def as_markdown(evaluation: Evaluation, comparisons: dict[str, Comparison]) -> str:
    """A table, a sentence on each scorer, and what the numbers mean."""
    head, *rows = [f"| {' | '.join(map(markdown.text, row))} |" for row in _rows(comparisons)]
    rule = "|---" * len(_rows(comparisons)[0]) + "|"
    title = f"# {markdown.text(f'{evaluation.model} against {evaluation.baseline}')}"
    verdicts = [f"- {markdown.text(sentence)}" for sentence in _verdicts(evaluation, comparisons)]
    explanation = markdown.text(_explanation(evaluation))
    return "\n".join([title, "", head, rule, *rows, "", *verdicts, "", explanation, ""])


class Pair(NamedTuple):
    """Places of a prompt and a seed in an [`Evaluation`]."""

    prompt: int
    seed: int


def pick_pairs(scores: Scores, baseline_scores: Scores, count: int, seed: int = 0) -> dict[str, list[Pair]]:
    """
    The pairs of images to look at, no prompt twice in a list.

    Args:
        scores (`Scores` of shape `(prompts, images)`): The policy's.
        baseline_scores (`Scores` of shape `(prompts, images)`): The baseline's.
        count (`int`): Pairs in each list; all prompts if there are fewer.
        seed (`int`, *optional*, defaults to `0`): Of the random ones.

    Returns:
        `dict[str, list[Pair]]`: `largest gains` and `largest losses`, by the difference of the scores and most extreme
        first, of which there may be fewer than `count` or none, and `random`.
    """
    gains = np.asarray(scores, dtype=np.float64) - np.asarray(baseline_scores, dtype=np.float64)
    random = np.random.default_rng(seed)
    best, worst, order = gains.max(axis=1), gains.min(axis=1), random.permutation(len(gains))
    kinds: dict[str, tuple[np.ndarray, Any]] = {
        "largest gains": (gains.argmax(axis=1), [i for i in np.argsort(-best, kind="stable") if best[i] > 0]),
        "largest losses": (gains.argmin(axis=1), [i for i in np.argsort(worst, kind="stable") if worst[i] < 0]),
        "random": (random.integers(gains.shape[1], size=len(gains)), order),
    }
    return {kind: [Pair(int(i), int(images[i])) for i in rows[:count]] for kind, (images, rows) in kinds.items()}


def data_uri(image: Image.Image, side: int = 384) -> str:
    """An image as text that a page can hold, made smaller where it is larger than `side` pixels."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    if max(image.size) <= 128:  # a JPEG would blur it, and save nothing
        image.save(data, "PNG")
        return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    image.save(data, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
h1, h2 { overflow-wrap: anywhere; line-height: 1.25; }
body > div { overflow-x: auto; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .5rem; border: 1px solid #ddd; border-radius: 6px; }
figure div { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; text-align: center; }
img { width: 100%; border-radius: 4px; }
figcaption { overflow-wrap: anywhere; color: #555; }
"""


def as_html(
    evaluation: Evaluation,
    comparisons: dict[str, Comparison],
    load_pair: Callable[[str, int], tuple[Image.Image, Image.Image]],
    count: int = 6,
) -> str:
    """
    One page with the table and, for each scorer, the pairs of the largest gains, of the largest losses, and random
    ones, side by side with their difference.

    Args:
        evaluation ([`Evaluation`]): Scores.
        comparisons (`dict[str, Comparison]`): Their statistics.
        load_pair (`Callable[[str, int], tuple[Image, Image]]`): From prompt and seed to the policy's image and the
            baseline's.
        count (`int`, *optional*, defaults to `6`): Pairs of each kind.

    Returns:
        `str`: HTML that refers to nothing outside of it, and may not load anything either.
    """
    text = html.escape
    (head, *body) = _rows(comparisons)
    cells = lambda row, tag: "<tr>" + "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in row) + "</tr>"  # noqa: E731
    table = "\n".join([cells(head, "th"), *(cells(row, "td") for row in body)])
    title = text(f"{evaluation.model} against {evaluation.baseline}")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        f"<div><table>\n{table}\n</table></div>",
        *(f"<p>{text(sentence)}</p>" for sentence in _verdicts(evaluation, comparisons)),
        f"<p>{text(_explanation(evaluation))}</p>",
    ]
    for name, scores in evaluation.scores.items():
        baseline_scores = evaluation.baseline_scores[name]
        for kind, pairs in pick_pairs(scores, baseline_scores, count).items():
            parts.append(f"<h2>{text(name)}: {kind}</h2><section>" + ("" if pairs else "<p>None.</p>"))
            for i, j in pairs:
                prompt, seed = evaluation.prompts[i], evaluation.seeds[j]
                sides = [
                    f'<span><img src="{data_uri(image)}" alt="{who}">{who} {values[i][j]:.4g}</span>'
                    for who, image, values in zip(
                        ("policy", "baseline"), load_pair(prompt, seed), (scores, baseline_scores), strict=True
                    )
                ]
                difference = f"{scores[i][j] - baseline_scores[i][j]:+.4g}"
                caption = f"<figcaption>{difference} · {text(prompt)} · seed {seed}</figcaption>"
                parts.append(f"<figure><div>{''.join(sides)}</div>{caption}</figure>")
            parts.append("</section>")
    page = "\n".join([*parts, "</body></html>", ""])
    return page.encode(errors="replace").decode()  # a folder's name may hold what UTF-8 cannot
