"""How two models' scores compare, and how sure that is: pure functions on numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .win_rate import win_rate


Scores = Sequence[Sequence[float]]
"""One row per prompt, one number per image; all rows equally long."""


class Estimate(NamedTuple):
    """A number with its confidence interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """One scorer's verdict, see [`compare`]."""

    prompts: int
    images_per_prompt: int
    mean: float
    baseline_mean: float
    difference: Estimate
    """Of the means, in units of the score."""
    median_difference: float
    """Of the prompts' medians, half of the prompts on either side: it never contradicts the win rate."""
    win_rate: Estimate
    """Share of prompts whose median score is higher than the baseline's, a tie counting one half."""
    pair_win_rate: Estimate
    """Share of pairs of the same prompt and seed, a tie counting one half."""
    wins: int
    ties: int
    losses: int
    """Of the prompts' medians."""
    p_value: float
    """Of the sign test on wins and losses."""


def _as_table(scores: Scores, name: str) -> np.ndarray:
    if len({len(row) for row in scores}) > 1:
        raise ValueError(
            f"Found rows of {sorted({len(row) for row in scores})} images in `{name}`, expected equal ones."
        )
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"Found `{name}` of shape {table.shape}, expected (prompts, images per prompt).")
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise ValueError(f"Found {table[row, column]} in `{name}` for prompt {row}, expected finite numbers.")
    return table


def prompt_medians(scores: Scores) -> list[float]:
    """
    The median of each prompt's scores: with an odd number of images the score of the median image, which is the one
    that the Diffusion-KTO paper compares (of 5), with an even number the mean of the two in the middle.

    Args:
        scores (`Sequence[Sequence[float]]` of shape `(prompts, images)`): Scores.

    Returns:
        `list[float]` of length `prompts`.

    Raises:
        `ValueError`: if the rows differ in length, there are none, or a score is not finite.
    """
    return np.median(_as_table(scores, "scores"), axis=1).tolist()


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """
    The percentile bootstrap's interval of a mean: prompts are drawn with replacement, `resamples` times.

    Images of one prompt are not independent of each other, so that prompts are drawn and not images. Where all values
    are equal the interval has no width, however few there are: look at [`win_rate`]'s (Wilson's) there.

    Args:
        values (`Sequence[float]` of length `prompts`):
            One number per prompt.
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the interval, in (0, 1).
        resamples (`int`, *optional*, defaults to `10_000`):
            Draws.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `tuple[float, float]`: lower and upper bound.

    Raises:
        `ValueError`: if there are fewer than 2 values, or `confidence` or `resamples` is out of range.
    """
    if len(values) < 2:
        raise ValueError(f"Found {len(values)} prompts, expected at least 2: a single one shows no spread.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, found {confidence}.")
    if resamples < 1:
        raise ValueError(f"`resamples` must be at least 1, found {resamples}.")
    numbers, random = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    # One draw after the other: all at once would take resamples x prompts numbers of memory.
    means = [numbers[random.integers(len(numbers), size=len(numbers))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """
    Two-sided p-value of the exact sign test: how likely so uneven a split is, or a more uneven one, if a win is as
    likely as a loss. Ties are left out.

    Args:
        wins (`int`): Prompts on which the policy is better.
        losses (`int`): Prompts on which it is worse.

    Returns:
        `float`: in (0, 1]; 1 where there are neither wins nor losses.

    Raises:
        `ValueError`: if a count is negative.
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"Found {wins} wins and {losses} losses, expected counts.")
    n = wins + losses
    # Whole numbers until the last division, which is exact to the last digit.
    term = tail = 1
    for k in range(1, min(wins, losses) + 1):
        term = term * (n - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**n)


def compare(
    scores: Scores,
    baseline_scores: Scores,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """
    Compares two models' scores for the same prompts and seeds.

    Intervals are [`bootstrap_interval`]'s, over prompts.

    Args:
        scores (`Sequence[Sequence[float]]` of shape `(prompts, images)`):
            The policy's scores, higher is better.
        baseline_scores (`Sequence[Sequence[float]]` of shape `(prompts, images)`):
            The baseline's.
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the intervals, in (0, 1).
        resamples (`int`, *optional*, defaults to `10_000`):
            Draws of the bootstrap.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        [`Comparison`].

    Raises:
        `ValueError`: if the shapes differ, there are fewer than 2 prompts, or a score is not finite.
    """
    ours, theirs = _as_table(scores, "scores"), _as_table(baseline_scores, "baseline_scores")
    if ours.shape != theirs.shape:
        raise ValueError(
            f"Found scores of shape {ours.shape} and {theirs.shape}, expected the same prompts and seeds."
        )

    def estimate(per_prompt: np.ndarray) -> Estimate:
        bounds = bootstrap_interval(per_prompt.tolist(), confidence=confidence, resamples=resamples, seed=seed)
        return Estimate(float(per_prompt.mean()), *bounds)

    points = lambda a, b: (1.0 + np.sign(a - b)) / 2  # noqa: E731  # 1, 1/2 or 0
    medians = points(np.median(ours, axis=1), np.median(theirs, axis=1))
    wins, losses = int((medians == 1).sum()), int((medians == 0).sum())
    return Comparison(
        prompts=ours.shape[0],
        images_per_prompt=ours.shape[1],
        mean=float(ours.mean()),
        baseline_mean=float(theirs.mean()),
        difference=estimate((ours - theirs).mean(axis=1)),
        median_difference=float(np.median(np.median(ours, axis=1) - np.median(theirs, axis=1))),
        win_rate=estimate(medians),
        pair_win_rate=estimate(points(ours, theirs).mean(axis=1)),
        wins=wins,
        ties=len(medians) - wins - losses,
        losses=losses,
        p_value=sign_test(wins, losses),
    )


def median_win_rate(scores: Scores, baseline_scores: Scores, *, confidence: float = 0.95):
    """[`win_rate`] of the prompts' medians: one comparison per prompt, with Wilson's interval."""
    return win_rate(prompt_medians(scores), prompt_medians(baseline_scores), confidence=confidence)


__all__ = [
    "Comparison",
    "Estimate",
    "bootstrap_interval",
    "compare",
    "median_win_rate",
    "prompt_medians",
    "sign_test",
]
